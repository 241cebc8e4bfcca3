"""What the benchmarks share: interleaved timing, peak memory, tables, the machine, the one call of a fold.

Every script prints its tables, then notes on how to read them, and as its last line one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from streammerge.offline import Job

MIB, GIB = 1 << 20, 1 << 30
WIDTH = 110  # of a line of text
QUICK = "a small run of a few seconds, to see that it works; its figures say nothing"


# ------------------------------------------------------------------------------------------------ the subject


def fold_once(job: Job, fine_tune: Path, out: Path) -> dict[str, float]:
    """One arrival as the product does it, from the fine-tune's files to a new state and a new model.

    out      the folder of the model, made here
    returns  seconds of the fold, of the rendering where the fold did not do that too, and of the whole
    """
    out.mkdir()
    began = time.perf_counter()
    rendered = job.fold(fine_tune, model=out)
    folded = time.perf_counter()
    if rendered is not None:
        return {"fold": folded - began, "seconds": folded - began}
    job.render(out)
    ended = time.perf_counter()
    return {"fold": folded - began, "render": ended - folded, "seconds": ended - began}


# ----------------------------------------------------------------------------------------------------- timing


def timed(run: Callable[[], object], settle: Callable[[], None] = lambda: None) -> float:
    """Seconds of one call; `settle` waits for what the call only started, as on a GPU."""
    settle()
    began = time.perf_counter()
    run()
    settle()
    return time.perf_counter() - began


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    settle: Callable[[], None] = lambda: None,
    *,
    warm: bool = True,
) -> dict[str, float]:
    """Median seconds of each run: every round runs all of them in turn; with `warm` one more goes before."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm):
        for name, run in runs.items():
            seconds = timed(run, settle)
            if number >= warm:
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


# --------------------------------------------------------------------------------------- memory and processes


def status_mib(field: str) -> float:
    """A line of this process's status in MiB: VmRSS is resident now, VmHWM the most there was."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def reset_peak() -> None:
    """Let VmHWM begin anew from what is resident now, where the kernel allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def child(script: str | Path, *arguments: str) -> dict[str, Any]:
    """Run a script in a process of its own and give what it prints as its last line, which is JSON."""
    argv = [sys.executable, str(script), *arguments]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{Path(script).name} {' '.join(arguments)} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def idle_mib() -> float:
    """Peak resident set of a process that has only imported torch and safetensors: the least of three."""
    program = "import re, torch, safetensors.torch; print(open('/proc/self/status').read())"
    texts = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    return min(int(text.split("VmHWM:")[1].split()[0]) / 1024 for text in texts)


# ------------------------------------------------------------------------------------------------------ files


def files_of(*folders: Path) -> list[Path]:
    """All files below these folders."""
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def bytes_of(*folders: Path) -> int:
    """Size of all files below these folders."""
    return sum(path.stat().st_size for path in files_of(*folders))


def drop_cache(*folders: Path) -> None:
    """Have the kernel forget the files below these folders, so that reading them reads the disk."""
    for path in files_of(*folders):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fsync(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def workplace(name: str, folder: Path | None) -> Iterator[Path]:
    """A temporary folder, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=f"streammerge-{name}-", dir=folder) as made:
        yield Path(made)


# ----------------------------------------------------------------------------------------- options and output


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the question, the usage lines and --quick."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=QUICK)
    return parser


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out a table in Markdown: the first column to the left, the others to the right."""
    lines = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| "
        + " | ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def _cell(value: object) -> str:
    """A number with about three figures; what is not known as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 0.001 else f"{value:,.{_decimals(value)}f}"
    return str(value)


def _decimals(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 4


def notes(*lines: str) -> str:
    """What to know when reading the table."""
    return "\n".join(textwrap.fill(f"- {line}", WIDTH, subsequent_indent="  ") for line in lines)


def say(*parts: str) -> None:
    """Print parts with an empty line between them."""
    print("\n\n".join(parts), flush=True)


def progress(text: str) -> None:
    """Tell the one who waits, on standard error."""
    print(text, file=sys.stderr, flush=True)


def finish(benchmark: str, found: Mapping[str, Any]) -> None:
    """Print the line of JSON that ends a script's output."""
    print()
    print(json.dumps(rounded({"benchmark": benchmark, **found, **versions()})), flush=True)


def rounded(value: Any) -> Any:  # noqa: ANN401 -- what JSON can hold
    """Keep five figures of every float: more than any measurement has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return value


def versions() -> dict[str, object]:
    """What the figures depend on, of software and threads."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def leave(text: str) -> NoReturn:
    """Nothing can be measured here, which is no failure: say why and end."""
    print(text)
    sys.exit(0)


# ------------------------------------------------------------------------------------------------ the machine


def machine(folder: Path | None = None) -> dict[str, Any]:
    """Describe the hardware, without its name: processor, cores, memory, disk under `folder`, GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / GIB, 1),
        "disk": disk(folder or Path(tempfile.gettempdir())),
        "gpu": gpu,
        "load": round(os.getloadavg()[0], 2),
    }


def slug(found: Mapping[str, Any]) -> str:
    """A short name of a kind of machine, such as amd-epyc-2-cores."""
    words = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", str(found["processor"]).lower())
    text = f"{words} {found['cores']} cores {found['gpu']}".lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def processor() -> str:
    """The processor's model as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def disk(folder: Path) -> str:
    """File system and kind of disk under a folder, as far as the kernel tells."""
    device = folder.stat().st_dev
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = {line.split()[2]: line.split(" - ")[1].split()[0] for line in mounts}
    kind = kinds.get(number, "a file system of unknown kind")
    place = Path(f"/sys/dev/block/{number}")
    if not place.exists():
        return kind
    block = place.resolve()
    queue = next((p / "queue" for p in (block, block.parent) if (p / "queue").is_dir()), None)
    if block.name.startswith(("vd", "xvd")):
        return f"{kind} on a virtual disk"
    if block.name.startswith("nvme"):
        return f"{kind} on NVMe"
    turns = queue is not None and (queue / "rotational").read_text(encoding="utf-8").strip() == "1"
    return f"{kind} on a {'rotating disk' if turns else 'disk that does not rotate'}"
