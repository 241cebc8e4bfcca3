"""Twenty fine-tunes arrive one by one and each needs a new merged model: fold it in, or merge all again?

streammerge folds each arrival into its state and renders the model. mergekit, which has no state, merges the
base and all fine-tunes so far anew. The same methods, the same files, side by side in one run; and at the end
whether both models of task arithmetic are the same.

    python benchmarks/arrivals.py                  a model of 0.05 GiB, about six minutes on two cores
    python benchmarks/arrivals.py --gib 0.1        twice that
    python benchmarks/arrivals.py --commands all   mergekit's command at every arrival, and not at three
    python benchmarks/arrivals.py --quick

mergekit, under the LGPL, runs as a program in an environment of its own, which is made once, with pip, and
kept in $XDG_CACHE_HOME/streammerge-quality: 1.6 GB, about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from common import WIDTH, finish, fold_once, notes, options, progress, say, table, workplace
from memory import shapes, write_model
from safetensors.torch import load_file

from streammerge.engine import Engine
from streammerge.offline import Job, Request

sys.path.append(str(Path(__file__).with_name("quality")))
from peer_environment import REQUIRES, environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

ARRIVALS, QUICK_ARRIVALS = 20, 3
COMMANDS_AT = "1,10,20"
HEAD = 64  # numbers of an attention head
DENSITY = 0.2
SCALE = 0.3
STEP = 2.0**-7  # of bf16: neighbouring numbers differ by at most this share
NOTHING = 1e-8  # what float32 rounds away from weights of about 0.02


@dataclass(frozen=True)
class Method:
    """One method by both: our knobs, and the peer's parameters of every fine-tune."""

    name: str
    knobs: Mapping[str, Any]
    parameters: Mapping[str, float]


METHODS = (
    Method("task_arithmetic", {"scale": SCALE}, {"weight": SCALE}),
    Method("ties", {"density": DENSITY, "scope": "tensor"}, {"weight": 1.0, "density": DENSITY}),
)


# ------------------------------------------------------------------------------------------- the two programs


class Worker:
    """A process that answers lines of JSON with lines of JSON, the first of which says that it is ready.

    `start` are the seconds until then. What it prints to standard error is shown if it fails.
    """

    def __init__(self, argv: Sequence[str | Path], log: Path, **environ: str) -> None:
        """Start it, and wait until it is ready."""
        self._log = log
        began = time.perf_counter()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environ},
            )
        self._answer()
        self.start = time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, **question: str) -> dict[str, float]:
        """Put a line to it."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(self._log.read_text(encoding="utf-8"))
        found: dict[str, float] = json.loads(line)
        return found


def serve(root: Path, method: Method) -> None:
    """Be the product's process: one job, which folds what the lines name."""
    work = root / f"work-{method.name}"
    work.mkdir()
    request = Request(root / "base", (), root / "nowhere", method.name, method.knobs)
    job = Job.begin(request, Engine(device="cpu"), work)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(fold_once(job, Path(asked["fine_tune"]), Path(asked["out"]))), flush=True)


def peer_python() -> list[str | Path]:
    """The peer's Python; -I: neither this folder's modules nor PYTHONPATH's are the peer's."""
    return [environment() / "bin" / "python", "-I"]


def write_config(root: Path, method: Method, arrived: int) -> Path:
    """Write what the peer is to merge: base and all that arrived, computed in float32, written as bf16."""
    models = [
        {"model": str(root / f"fine-tune-{number}"), "parameters": dict(method.parameters)}
        for number in range(1, arrived + 1)
    ]
    settings = {
        "merge_method": method.name,
        "base_model": str(root / "base"),
        "models": models,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    path = root / "merge.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # which is YAML too
    return path


def command(config: Path, out: Path, log: Path) -> float:
    """Seconds of the peer's own command, start and all."""
    argv = [*peer_python(), "-m", "mergekit.scripts.run_yaml", config, out, "--no-copy-tokenizer", "--quiet"]
    began = time.perf_counter()
    with log.open("wb") as errors:
        done = subprocess.run(argv, stdout=errors, stderr=errors, env=OFFLINE, check=False)
    if done.returncode:
        sys.exit(log.read_text(encoding="utf-8"))
    return time.perf_counter() - began


OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


# ------------------------------------------------------------------------------------------------ measurement


def write(root: Path, names: Mapping[str, tuple[int, ...]], number: int, hidden: int) -> None:
    """Write the base, number 0, or a fine-tune, with a configuration that the peer knows."""
    folder = root / (f"fine-tune-{number}" if number else "base")
    write_model(folder, dict(names), number)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": names["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("mlp.up_proj.weight") for name in names),
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": max(hidden // 4 // HEAD, 1),
        "vocab_size": names["lm_head.weight"][0],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(root: Path, method: Method, arrivals: int, at: Sequence[int]) -> dict[str, Any]:
    """All arrivals by one method: both in a process that stays, and the peer's command at some."""
    log = root / "errors"
    ours = [sys.executable, __file__, "--in-child", method.name, "--folder", str(root)]
    theirs = [*peer_python(), Path(__file__).with_name("arrivals_peer.py")]
    rows = []
    with ExitStack() as stack:
        product = stack.enter_context(Worker(ours, log.with_suffix(".ours")))
        peer = stack.enter_context(Worker(theirs, log.with_suffix(".theirs"), HF_HUB_OFFLINE="1"))
        for number in range(1, arrivals + 1):
            progress(f"arrivals: {method.name}, arrival {number} of {arrivals}")
            made = {name: root / f"{name}-{method.name}-{number}" for name in ("ours", "theirs", "command")}
            folded = product.ask(fine_tune=str(root / f"fine-tune-{number}"), out=str(made["ours"]))
            config = write_config(root, method, number)
            merged = peer.ask(config=str(config), out=str(made["theirs"]))
            by_command = command(config, made["command"], log) if number in at else None
            rows.append({"folded": folded["seconds"], "merged": merged["seconds"], "command": by_command})
            is_last = number == arrivals
            agreement = compare(made["ours"], made["theirs"], root / "base") if is_last else {}
            for folder in made.values():
                remove(folder)
    return {
        "method": method.name,
        "arrivals": arrivals,
        "start": product.start,
        "peer_start": peer.start,
        **totals(rows, product.start, peer.start),
        "agreement": agreement,
        "rows": rows,
    }


def remove(folder: Path) -> None:
    """Take a model away, if it is there."""
    for path in folder.glob("*"):
        path.unlink()
    if folder.exists():
        folder.rmdir()


def totals(rows: Sequence[Mapping[str, float | None]], start: float, peer_start: float) -> dict[str, Any]:
    """Sums over all arrivals. Where a command was not run, it is taken for the merge and a median start."""
    folded = sum(row["folded"] or 0.0 for row in rows)
    merged = sum(row["merged"] or 0.0 for row in rows)
    starts = [row["command"] - (row["merged"] or 0.0) for row in rows if row["command"] is not None]
    one_start = statistics.median(starts) if starts else peer_start
    commands = sum(
        row["command"] if row["command"] is not None else (row["merged"] or 0.0) + one_start for row in rows
    )
    return {
        "folded": folded,
        "folded_with_start": folded + start,
        "merged": merged,
        "commands": commands,
        "command_start": one_start,
        "commands_measured": len(starts),
    }


def compare(ours: Path, theirs: Path, base: Path) -> dict[str, float]:
    """Of all weights: the share with the same bits, and the share further apart than rounding explains."""
    left, right, before = (loaded(folder) for folder in (ours, theirs, base))
    same = apart = count = 0
    squares = moved = 0.0
    for name, values in left.items():
        a, b, start = values.float(), right[name].float(), before[name].float()
        same += int((a == b).sum())
        apart += int(((a - b).abs() > STEP * torch.maximum(a.abs(), b.abs()) + NOTHING).sum())
        count += a.numel()
        squares += float((a - b).double().square().sum())
        moved += float((b - start).double().square().sum())
    return {
        "same": same / count,
        "beyond_rounding": apart / count,
        "difference": (squares / moved) ** 0.5 if moved else 0.0,
    }


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a model."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


# ----------------------------------------------------------------------------------------------------- report


def text(found: dict[str, Any]) -> str:
    """Two tables and the comparison of one method."""
    count, agreement = found["arrivals"], found["agreement"]
    each = [
        (str(number), row["folded"], row["merged"], row["merged"] / row["folded"], row["command"])
        for number, row in enumerate(found["rows"], start=1)
    ]
    folded, started = found["folded"], found["folded_with_start"]
    about = "" if found["commands_measured"] == count else f", {found['commands_measured']} of them measured"
    whole = [
        ("streammerge, process that stays", folded, folded / count, 1.0, None),
        ("the same with its start", started, started / count, None, 1.0),
        (
            "mergekit, process that stays",
            found["merged"],
            found["merged"] / count,
            found["merged"] / folded,
            None,
        ),
        (
            f"mergekit, a command an arrival{about}",
            found["commands"],
            found["commands"] / count,
            None,
            found["commands"] / started,
        ),
    ]
    head = ("arrival", "streammerge s", "mergekit s", "mergekit / streammerge", "mergekit's command s")
    totals_head = (
        f"{count} arrivals",
        "seconds",
        "an arrival",
        "without starts",
        "with starts",
    )
    return "\n\n".join(
        (
            f"{found['method']}: one arrival after the other",
            table(head, each),
            f"{found['method']}: all of them; ratios to streammerge",
            table(totals_head, whole),
            sentence(agreement),
        )
    )


def sentence(agreement: dict[str, float]) -> str:
    """How alike the two models are."""
    return textwrap.fill(
        f"After the last arrival {agreement['same']:.4%} of all weights are equal in both models, and "
        f"{agreement['beyond_rounding']:.4%} further apart than a rounding to bf16 explains; the difference "
        f"is {agreement['difference']:.2g} of the merged delta's length.",
        WIDTH,
    )


NOTES = notes(
    f"{' and '.join(REQUIRES)}. Both compute in float32 and write bf16, with torch's number of threads; "
    "files are in the page cache for both.",
    "streammerge's arrival is a fold and a rendering; it hashes what it reads and writes, and waits until "
    "state and model are on disk. mergekit does neither. A daemon adds its ledger, screens and gates.",
    "The start of streammerge is that of Python, its imports and one reading of the base, once. mergekit is "
    "a command: its start is counted at every arrival where it says so, and left out where it stays.",
    "ties: both trim within each weight. streammerge keeps all elements as large as the smallest kept, "
    "mergekit a fixed number; bf16 fine-tunes have many elements of equal size, so the models differ there. "
    "Of float32 fine-tunes both make the same model but for a few elements in a hundred thousand.",
)


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--gib", type=float, default=0.05)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--arrivals", type=int, default=ARRIVALS)
    parser.add_argument(
        "--commands", default=",".join(map(str, COMMANDS_AT)), help="at which arrivals, or all"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where there is room")
    parser.add_argument("--in-child", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_child:
        serve(asked.folder, next(method for method in METHODS if method.name == asked.in_child))
        return
    if asked.quick:
        asked.gib, asked.hidden, asked.arrivals, asked.commands = 0.002, 128, QUICK_ARRIVALS, "1"
    report(asked)


def report(asked: argparse.Namespace) -> None:
    """Both methods."""
    environment()  # before anything is timed
    every = range(1, asked.arrivals + 1)
    at = list(every) if asked.commands == "all" else [int(word) for word in asked.commands.split(",") if word]
    results = []
    with workplace("arrivals", asked.folder) as root:
        names = shapes(asked.gib, asked.hidden)
        for number in range(asked.arrivals + 1):
            write(root, names, number, asked.hidden)
        for method in METHODS:
            results.append(measure(root, method, asked.arrivals, at))
            say(text(results[-1]), "")
    say(NOTES)
    finish("arrivals", {"gib": asked.gib, "hidden": asked.hidden, "peer": REQUIRES, "methods": results})


if __name__ == "__main__":
    main()
