"""How near does an arrival come to copying its bytes, and what does it cost to merge by hand instead?

A Llama-shaped bf16 model of random numbers, its state of two fine-tunes, and a third that arrives: base,
fine-tune and state are read and hashed, the new state and the new model written, hashed and on disk. Next to
it, in turn: `cp` and `dd` of as many bytes, and the plain loop that merging by hand is (load everything, add,
save everything). Every run is a process of its own and begins with nothing of the files in memory.

    python benchmarks/stream.py              1 GiB for what copies, 0.25 GiB for what computes
    python benchmarks/stream.py --gib 0.5    quicker
    python benchmarks/stream.py --folder D   where there is room for about nine times --gib
    python benchmarks/stream.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    GIB,
    bytes_of,
    child,
    drop_cache,
    files_of,
    finish,
    fold_once,
    fsync,
    idle_mib,
    notes,
    options,
    progress,
    reset_peak,
    say,
    status_mib,
    table,
    workplace,
)
from memory import shapes, write_model
from safetensors.torch import load_file, save_file

from streammerge.engine import Engine
from streammerge.methods import Totals
from streammerge.offline import Job, Request
from streammerge.state import STATISTICS, State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

COPY, LOOP = "cp and dd of the same bytes", "plain loop: load, add, save"
SCALE = 0.3
EARLIER = 2  # fine-tunes that the state holds
BLOCK = "8M"  # that dd reads at once


@dataclass(frozen=True)
class Part:
    """One table: a model, and what runs on it in turn."""

    title: str
    gib: float
    hidden: int
    rounds: int
    methods: tuple[str, ...]
    loop: bool


def parts(asked: argparse.Namespace) -> list[Part]:
    """What copies on the large model; what computes on a smaller one."""
    if asked.quick:
        return [
            Part("quick", 0.01, 128, 1, ("average", "task_arithmetic", "spectral_cap", "opcm"), loop=True)
        ]
    elementwise = ("average", "task_arithmetic")
    return [
        Part("elementwise methods", asked.gib, asked.hidden, asked.rounds, elementwise, loop=True),
        Part("spectral methods", asked.spectral_gib, asked.hidden, 3, ("spectral_cap", "opcm"), loop=False),
    ]


# ---------------------------------------------------------------------------------- in processes of their own


def make_state(root: Path, method: str) -> dict[str, Any]:
    """Fold the earlier fine-tunes; what is printed describes the state that they leave."""
    work = root / f"made-{method}"
    work.mkdir()
    job = begin(root, method, work)
    for number in range(1, EARLIER + 1):
        job.fold(root / f"fine-tune-{number}")
    job.state.folder.rename(root / f"state-{method}")
    shutil.rmtree(work)
    state = {"hashes": dict(job.state.hashes), "totals": dataclasses.asdict(job.state.totals)}
    (root / f"state-{method}.json").write_text(json.dumps(state), encoding="utf-8")
    return {}


def fold(root: Path, method: str) -> dict[str, float]:
    """Fold the arriving fine-tune into that state and render; nothing but this is timed."""
    work = root / f"work-{method}"
    linked = work / "state-0"
    linked.mkdir(parents=True)
    for path in files_of(root / f"state-{method}"):
        os.link(path, linked / path.name)  # a fold removes the state that it replaces
    job = begin(root, method, work)
    described = json.loads((root / f"state-{method}.json").read_bytes())
    job.state = State(linked, described["hashes"], Totals(**described["totals"]))
    drop_cache(root)
    reset_peak()
    seconds = fold_once(job, arriving(root), work / "model")
    return {**seconds, "peak_mib": status_mib("VmHWM")}


def begin(root: Path, method: str, work: Path) -> Job:
    """A job without a store, of this base; it reads the base once."""
    engine = Engine(device="cpu", residency="disk")
    return Job.begin(Request(root / "base", (), root / "nowhere", method), engine, work)


def loop(root: Path, method: str) -> dict[str, float]:
    """Do by hand, with everything in memory, what a fold and a rendering of task arithmetic do."""
    work = root / "work-loop"
    work.mkdir()
    drop_cache(root)
    reset_peak()
    began = time.perf_counter()
    base, tuned = loaded(root / "base"), loaded(arriving(root))
    old = loaded(root / f"state-{method}")
    state = {name: old[name] + (tuned[name].float() - values.float()) for name, values in base.items()}
    model = {name: (values.float() + SCALE * state[name]).bfloat16() for name, values in base.items()}
    for name, tensors in (("state", state), ("model", model)):
        save_file(tensors, work / f"{name}.safetensors")
        fsync(work / f"{name}.safetensors")
    return {"seconds": time.perf_counter() - began, "peak_mib": status_mib("VmHWM")}


def loaded(folder: Path) -> dict[str, Tensor]:
    """Every weight of a folder, in memory."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != STATISTICS:
            found |= load_file(path)
    return found


IN_CHILD: Mapping[str, Callable[[Path, str], dict[str, Any]]] = {
    "make_state": make_state,
    "fold": fold,
    "loop": loop,
}


# ------------------------------------------------------------------------------------------------ measurement


def arriving(root: Path) -> Path:
    """The fine-tune that arrives."""
    return root / f"fine-tune-{EARLIER + 1}"


def copy(root: Path, method: str) -> dict[str, float]:
    """Copy the state and the fine-tune, read the base, wait for the disk: with the system's own programs."""
    work = root / "work-copy"
    work.mkdir()
    state, model = work / "state", work / "model"
    drop_cache(root)
    began = time.perf_counter()
    run("cp", "-r", "--reflink=never", root / f"state-{method}", state)
    run("cp", "-r", "--reflink=never", arriving(root), model)
    for path in files_of(root / "base"):
        run("dd", f"if={path}", "of=/dev/null", f"bs={BLOCK}", "status=none")
    run("sync", *files_of(state, model))
    return {"seconds": time.perf_counter() - began}


def run(program: str, *arguments: str | Path) -> None:
    """Run one of the system's programs."""
    subprocess.run([shutil.which(program) or program, *arguments], check=True)


def measure(part: Part, root: Path, idle: float) -> dict[str, Any]:
    """One table's figures."""
    write_models(part, root)
    for method in part.methods:
        progress(f"stream: the state of {method}")
        child(__file__, "--in-child", "make_state", str(root), method)
    first = part.methods[0]
    read = bytes_of(root / "base", arriving(root), root / f"state-{first}")
    written = bytes_of(root / "base", root / f"state-{first}")
    runs: dict[str, Callable[[], dict[str, Any]]] = {COPY: lambda: copy(root, first)}
    if part.loop:
        runs[LOOP] = lambda: child(__file__, "--in-child", "loop", str(root), first)
    for method in part.methods:
        runs[method] = lambda method=method: child(__file__, "--in-child", "fold", str(root), method)  # type: ignore[misc]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(part.rounds):
        for name, one in runs.items():
            progress(f"stream: {part.title}, round {number + 1} of {part.rounds}, {name}")
            os.sync()  # nothing that an earlier run left to write may be waited for in this one
            found[name].append(one())
            for folder in root.glob("work-*"):
                shutil.rmtree(folder)
    return {
        **dataclasses.asdict(part),
        "read": read,
        "written": written,
        "rows": rows(found, read + written, idle),
    }


def write_models(part: Part, root: Path) -> None:
    """The base and its fine-tunes."""
    names = shapes(part.gib, part.hidden)
    for number in range(EARLIER + 2):
        progress(f"stream: writing model {number + 1} of {EARLIER + 2}")
        write_model(root / (f"fine-tune-{number}" if number else "base"), names, number)


def rows(found: Mapping[str, list[dict[str, Any]]], moved: int, idle: float) -> list[dict[str, Any]]:
    """Medians of every run."""
    medians = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in found.items()
    }
    return [
        {
            "row": name,
            "gb_per_second": moved / 1e9 / median["seconds"],
            "share_of_copy": medians[COPY]["seconds"] / median["seconds"],
            "faster_than_loop": medians[LOOP]["seconds"] / median["seconds"] if LOOP in medians else None,
            "over_idle_mib": median["peak_mib"] - idle if "peak_mib" in median else None,
            **median,
        }
        for name, median in medians.items()
    ]


# ----------------------------------------------------------------------------------------------------- report


def text(found: dict[str, Any]) -> str:
    """One table."""
    read, written = found["read"] / GIB, found["written"] / GIB
    head = ("", "seconds", "fold", "render", "GB/s", "of cp's speed", "loop / this", "peak MiB over idle")
    keys = (
        "row",
        "seconds",
        "fold",
        "render",
        "gb_per_second",
        "share_of_copy",
        "faster_than_loop",
        "over_idle_mib",
    )
    title = (
        f"{found['title']}: model of {found['gib']:g} GiB, hidden size {found['hidden']}; "
        f"{read:.2f} GiB to read, {written:.2f} GiB to write; medians of {found['rounds']} interleaved rounds"
    )
    return f"{title}\n\n{table(head, ([row.get(key) for key in keys] for row in found['rows']))}"


NOTES = notes(
    "Cold: before each run its files are dropped from the page cache; after each the new ones are on disk "
    "(fsync). GB/s are of the bytes that must move, however often a run reads them.",
    "cp's bytes: the state and the fine-tune are copied, the base is read. It hashes nothing.",
    "The time of a fold is without the start of Python and without the reading of the base that a job begins "
    "with; a daemon does these once.",
    "Peak memory is the kernel's VmHWM over that of a process that has only imported torch and safetensors; "
    "files that the loop maps count where they are resident.",
    "On a virtual disk the host's cache may answer what the guest dropped.",
)


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--spectral-gib", type=float, default=0.25)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5, help="of the elementwise methods")
    parser.add_argument("--folder", type=Path, default=None, help="where there is room")
    parser.add_argument("--in-child", nargs=3, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_child:
        name, root, method = asked.in_child
        print(json.dumps(IN_CHILD[name](Path(root), method)))
        return
    idle = idle_mib()
    results = []
    for part in parts(asked):
        with workplace("stream", asked.folder) as root:
            results.append(measure(part, root, idle))
        say(text(results[-1]), "")
    say(NOTES)
    finish("stream", {"idle_mib": idle, "tables": results})


if __name__ == "__main__":
    main()
