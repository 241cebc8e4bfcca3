"""Disks and memory that fail: the order of writes, writes that fail, and the daemon through all of it."""

from __future__ import annotations

import contextlib
import errno
import resource
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from daemons import Site, until
from faults import writes
from faults.disk import COMPILER, Disk
from faults.forks import ForkedSite, Forks
from faults.order import breaches

from streammerge.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build the failing disk with")


@pytest.fixture
def failing(tmp_path: Path) -> Disk:
    """A disk below the store of `site` that fails when it is told to."""
    return Disk(tmp_path / "disk", tmp_path / "site" / "store")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site without anything published."""
    return Site(tmp_path / "site", reserve="1KB")


# ------------------------------------------------------------------------------------------- order of writes


@needs_compiler
def test_every_name_is_durable_before_it_is_built_upon(tmp_path: Path) -> None:
    """In one journey each file is fsynced before its name counts, each name before what follows."""
    root = tmp_path / "site"
    disk = Disk(tmp_path / "disk", root)
    with Forks(tmp_path, disk.environment) as forks:
        journey = writes.begin(tmp_path, forks, disk, root)
        for number in range(len(writes.STEPS)):
            journey.step(number, 0)
    calls = list(disk.log())
    assert breaches(calls, journey.site.store) == []
    renamed = {writes.pattern(call, root)[1] for call in calls if call.name == "rename"}
    assert {"store/candidates/.building-V", "store/candidates/V", "store/inbox/N.part"} <= renamed
    synced = {writes.pattern(call, root) for call in calls if call.name in ("fsync", "fdatasync")}
    redundant = {  # what another fsync covers as well: SQLite's of the folder, after which it asks no result
        kind
        for kind in synced
        if not breaches([c for c in calls if writes.pattern(c, root) != kind], root / "store")
    }
    assert redundant == {("fdatasync", "store/ledger.db-journal"), ("fdatasync", "store")}


@needs_compiler
def test_a_commit_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    """Where what a gate found, a version, or what a target confirmed is not fsynced: the end is the same."""
    root = tmp_path / "site"
    disk = Disk(tmp_path / "disk", root)
    with Forks(tmp_path, disk.environment) as forks:
        journey = writes.begin(tmp_path, forks, disk, root)
        journey.undisturbed(steps=1)
        calls = {call.number: call for call in sorted(journey.calls[0], key=lambda call: call.number)}
        accepted = next(number for number, call in calls.items() if call.other.parent.name == "snapshots")
        commits = [n for n, call in calls.items() if writes.pattern(call, root) == writes.COMMIT]
        measured = max(number for number in commits if number < accepted)
        recorded = min(number for number in commits if number > accepted)
        log_is_named = commits[0] + 1  # where SQLite has made its log it fsyncs the folder, and goes on
        assert calls[log_is_named].path == root / "store"
        for number in (log_is_named, measured, recorded, *commits[-3:-1]):
            assert journey.disturbed(0, number, errno.EIO, stays=False) == (True, []), calls[number]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kind_of_write_may_fail(tmp_path: Path) -> None:
    """A call of each kind fails once, with ENOSPC and with EIO: what is left in the end is the same."""
    assert writes.measure(tmp_path, "short").differences == []


@needs_compiler
def test_a_ledger_that_fails_is_no_failure_of_a_target(tmp_path: Path) -> None:
    """What a target said and nobody could write down is asked again by the next command."""
    failing = Disk(tmp_path / "disk", tmp_path / "site" / "store")
    site = ForkedSite(tmp_path / "site", reserve="1KB")
    hook = site.program(  # with a file `break` beside it the next call to the disk fails
        "hook",
        f"cd {site.root}\n"
        'echo "$STREAMMERGE_VERSION $STREAMMERGE_DELIVERY" >> told\n'
        f"[ ! -e break ] || {sys.executable} - <<'END'\n"
        "import struct\n"
        f"with open('{tmp_path}/disk/control', 'r+b') as control:\n"
        "    calls, = struct.unpack('q', control.read(8))\n"
        f"    control.write(struct.pack('qq', calls + 1, {errno.EIO}))\n"
        "END",
    )
    site.configure(targets=[{"name": "hook", "type": "exec", "argv": [hook]}])
    site.publish("model", 1)
    with Forks(tmp_path, failing.environment) as site.forks:
        site.run("run", "--once")
        (site.root / "break").touch()
        assert "disk I/O error" in site.run("rollback", "--yes").stderr
        (site.root / "break").unlink()
        with closing(Ledger(site.store / "ledger.db", read_only=True)) as ledger:
            open_now = ledger.rows("select version, attempts, error from outbox where state = 'pending'")
            assert open_now == [{"version": 0, "attempts": 0, "error": ""}]
        site.run("gc")
    told = (site.root / "told").read_text().splitlines()
    assert told[2] == told[3], "the same delivery"
    assert [line.split()[0] for line in told] == ["0", "1", "0", "0"]
    assert site.served == []


@needs_compiler
def test_a_command_that_was_done_is_not_called_failed(tmp_path: Path) -> None:
    """Where `current` cannot move after a rollback was written down, it is in force at the next start."""
    failing = Disk(tmp_path / "disk", tmp_path / "site" / "store", "symlink")
    site = ForkedSite(tmp_path / "site", reserve="1KB")
    site.publish("model", 1)
    with Forks(tmp_path, failing.environment) as site.forks:
        site.run("run", "--once")
        failing.set(error=errno.EIO, failing=1)
        site.run("rollback", "--yes", code=75)
        failing.heal()
        with closing(Ledger(site.store / "ledger.db", read_only=True)) as ledger:
            assert [row["state"] for row in ledger.rows("select state from commands")] == ["done"]
        site.run("run", "--once")
        assert site.served == []
        assert site.ask("status")["held"]


# ---------------------------------------------------------------------------------------- a disk without room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of one megabyte."""
    place = tmp_path / "site" / "store"
    place.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> Path:
    """Take all the space that a file system has."""
    ballast = place / "inbox" / ".ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return ballast


def test_a_full_disk_is_waited_out(tmp_path: Path, small_disk: Path) -> None:
    """Without room the daemon is not ready and says so, what is served stays, and with room it goes on."""
    site = Site(tmp_path / "site", reserve="1KB")
    with site.daemon() as daemon:
        site.publish("first", 1)
        daemon.until_state(first="folded")
        ballast = fill(small_disk)
        site.publish("second", 2)
        until(lambda: daemon.get("/readyz")[0] == 503, "not ready")
        assert "space" in daemon.get("/readyz")[1] or "free" in daemon.get("/readyz")[1]
        assert daemon.metric("streammerge_disk_full") == 1
        assert daemon.get("/healthz")[0] == 200
        assert site.served == ["first"]
        ballast.unlink()
        daemon.until_state(second="folded")
        until(lambda: daemon.get("/readyz")[0] == 200, "ready again")
        assert site.served == ["first", "second"]
    site.run("verify")


def test_a_disk_that_fills_up_during_a_fold_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    """No room even for the ledger: the candidate waits until there is some; the daemon lives on."""
    site = Site(tmp_path / "site", reserve="1KB")
    gate = site.program(
        "gate",
        'case $1 in */000000-*) ;; *) touch "$(dirname "$0")/asked"\n'
        'while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.1; done ;; esac\necho "{}"',
    )
    site.configure(gates=[{"name": "slow", "type": "command", "argv": [gate, "{snapshot}"]}])
    with site.daemon() as daemon:
        site.publish("first", 1)
        until((site.root / "asked").exists, "the gate is asked")
        ballast = fill(small_disk)
        (site.root / "go").touch()
        time.sleep(2.0)
        assert daemon.process.poll() is None, "the daemon died"
        ballast.unlink()
        daemon.until_state(first="folded")
        until(lambda: daemon.get("/readyz")[0] == 200, "ready again")
        assert site.served == ["first"]
    site.run("verify")


def test_what_is_fetched_does_not_take_the_room_of_its_fold(tmp_path: Path, small_disk: Path) -> None:
    """Where a fine-tune would fit and its fold would not, not a byte is fetched."""
    site = Site(tmp_path / "site", reserve="1KB")
    site.once()
    site.publish("model", 1)
    size = (site.inflow / "model" / "model.safetensors").stat().st_size
    site.configure(reserve=shutil.disk_usage(small_disk).free - 2 * size)
    assert "fetching" in site.once(code=75).stderr
    assert [path for path in (site.store / "inbox").rglob("*") if path.is_file()] == []


# ------------------------------------------------------------------------------------------ a disk that fails


@needs_compiler
@pytest.mark.parametrize(
    ("error", "says", "metric"),
    [
        (errno.EIO, "Input/output error", "streammerge_disk_failing"),
        pytest.param(
            errno.EROFS, "Read-only file system", "streammerge_disk_failing", marks=pytest.mark.slow
        ),
        pytest.param(errno.EDQUOT, "Disk quota exceeded", "streammerge_disk_full", marks=pytest.mark.slow),
    ],
)
def test_a_failing_disk_is_waited_out(site: Site, failing: Disk, error: int, says: str, metric: str) -> None:
    """While nothing can be written the daemon lives, says why, serves what it served, and then goes on."""
    with site.daemon(code=0, prefix=(), **failing.environment) as daemon:
        site.publish("first", 1)
        daemon.until_state(first="folded")
        failing.set(error=error, failing=1)
        site.publish("second", 2)
        until(lambda: daemon.get("/readyz")[0] == 503, "not ready")
        assert says in daemon.get("/readyz")[1]
        assert str(site.store) in daemon.get("/readyz")[1]
        assert daemon.metric(metric) == 1
        if metric == "streammerge_disk_failing":
            assert daemon.metric("streammerge_disk_errors_total") >= 1
        assert daemon.get("/healthz")[0] == 200
        assert site.served == ["first"]
        failing.heal()
        daemon.until_state(second="folded")
        until(lambda: daemon.get("/readyz")[0] == 200, "ready again")
        assert daemon.metric(metric) == 0
    assert site.served == ["first", "second"]
    site.run("verify")


@needs_compiler
def test_a_rollback_is_carried_out_when_the_disk_works_again(tmp_path: Path, site: Site) -> None:
    """Where `current` cannot be moved after a rollback was written down, it moves later, in the hold."""
    failing = Disk(tmp_path / "disk", site.store, "symlink")
    with site.daemon(code=0, prefix=(), **failing.environment) as daemon:
        for number, name in enumerate(("first", "second"), 1):
            site.publish(name, number)
            daemon.until_state({name: "folded"})
        failing.set(error=errno.EIO, failing=1)
        site.run("rollback", "--yes", "--no-wait")
        until(lambda: daemon.get("/readyz")[0] == 503, "not ready")
        assert site.served == ["first", "second"]
        failing.heal()
        until(lambda: site.served == ["first"], "rolled back")
        until(lambda: daemon.get("/readyz")[0] == 200, "ready again")
        assert daemon.ask("status")["held"]
    site.run("verify")


@needs_compiler
def test_a_rollback_finds_what_could_not_be_recorded(tmp_path: Path, site: Site) -> None:
    """A version was moved into its place and the ledger was full: a rollback asked for then is no damage."""
    gate = site.program(
        "gate",
        'case $1 in */000002-*) touch "$(dirname "$0")/asked"\n'
        'while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.1; done ;; esac\necho "{}"',
    )
    site.configure(gates=[{"name": "slow", "type": "command", "argv": [gate, "{snapshot}"]}])
    failing = Disk(tmp_path / "disk", site.store, "pwrite64")  # what the ledger is written with
    with site.daemon(code=0, prefix=(), **failing.environment) as daemon:
        site.publish("first", 1)
        daemon.until_state(first="folded")
        site.publish("second", 2)
        until((site.root / "asked").exists, "the gate is asked")
        failing.set(error=errno.ENOSPC, sleep=200_000)  # what the gate found is written yet
        (site.root / "go").touch()
        until(lambda: 2 in site.versions(), "moved into its place")
        failing.set(failing=1, sleep=0)
        until(lambda: daemon.get("/readyz")[0] == 503, "not ready")
        site.run("rollback", "0", "--yes", "--no-wait")
        failing.heal()
        until(lambda: site.served == [], "rolled back")
        assert daemon.states() == {"first": "denied", "second": "denied"}
    assert [row["state"] for row in site.ask("history")] == ["accepted", "rolled_back", "rolled_back"]
    site.run("verify")


def test_a_store_that_can_only_be_read_is_left_alone(tmp_path: Path, small_disk: Path) -> None:
    """Starting on one ends with 75 and a hint, whatever is run; what is served can be read."""
    site = Site(tmp_path / "site", reserve="1KB")
    site.publish("first", 1)
    site.once()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for arguments in (("run",), ("rollback", "--yes")):
        ended = site.run(*arguments, code=75)
        assert "Read-only file system" in ended.stderr
        assert "hint:" in ended.stderr
    assert site.ask("status")["head"]["version"] == 1
    site.run("verify")
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    site.publish("second", 2)
    site.once()
    assert site.served == ["first", "second"]


@needs_compiler
@pytest.mark.slow
def test_a_slow_disk_is_no_failure(site: Site, failing: Disk) -> None:
    """Where every write takes its time the worker shows signs of life, and the daemon is ready throughout."""
    with site.daemon(code=0, prefix=(), WATCHDOG_USEC="3000000", **failing.environment) as daemon:
        failing.set(sleep=30_000)
        site.publish("model", 1)
        answers = []

        def folded() -> bool:
            answers.append(daemon.get("/readyz")[0])
            return daemon.states().get("model") == "folded"

        until(folded, "folded", seconds=60)
        failing.heal()
        assert set(answers) == {200}
        assert not daemon.events("disk.failing")
    assert site.served == ["model"]


# -------------------------------------------------------------------------------------------------- memory


def test_a_fold_without_memory_is_waited_out(tmp_path: Path) -> None:
    """Under a limit that a fold does not fit in the daemon lives and says why; when it is lifted it folds."""
    random = torch.Generator().manual_seed(0)
    site = Site(tmp_path / "site", {"weight": torch.randn(1024, 1024, generator=random) / 32})
    with site.daemon() as daemon:
        site.publish("first", 1)
        daemon.until_state(first="folded")
        limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_DATA)
        used = memory_of(daemon.process.pid)
        enough_to_look = used + (6 << 20)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_DATA, (enough_to_look, limits[1]))
        threads = len(list(threads_of(daemon.process.pid)))
        site.publish("second", 2)
        until(lambda: daemon.get("/readyz")[0] == 503, "not ready")
        assert "memory" in daemon.get("/readyz")[1]
        assert daemon.metric("streammerge_memory_short") == 1
        assert daemon.get("/healthz")[0] == 200
        assert site.served == ["first"]
        assert not list((site.store / "candidates").iterdir())
        resource.prlimit(daemon.process.pid, resource.RLIMIT_DATA, limits)
        daemon.until_state(second="folded")
        until(lambda: daemon.get("/readyz")[0] == 200, "ready again")
        assert daemon.metric("streammerge_memory_short") == 0
        assert len(list(threads_of(daemon.process.pid))) >= threads
    assert site.served == ["first", "second"]
    site.run("verify")


def memory_of(process: int) -> int:
    """Bytes that count towards a process's RLIMIT_DATA."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) * 1024


def threads_of(process: int) -> Iterator[Path]:
    """The threads of a process."""
    return Path(f"/proc/{process}/task").iterdir()
