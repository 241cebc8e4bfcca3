"""Large files past the page cache: every byte as it was given, and the cache as it was before."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import random
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from benches import PLAIN, bench_of

from streammerge import machine, pagecache
from streammerge.engine import Engine
from streammerge.headers import find
from streammerge.pagecache import BUFFER_BYTES, TRAIL_BYTES, NewFile
from streammerge.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZES = (
    0, 1, 4095, 4096, 4097, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 2 * BUFFER_BYTES,
    3 * BUFFER_BYTES + 123,
)  # fmt: skip
CHUNKS = (BUFFER_BYTES + 1, 1, 4095, 65_537, 300_001, 4096, 2 * BUFFER_BYTES)
DISTURBANCES = ("none", "refused when asked for", "refused when written", "short writes")
READ_AHEAD_BYTES = 24 << 20  # generous: what a kernel reads beyond what it was asked for


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder on a file system whose page cache can be emptied and looked into."""
    if (kind := machine.file_system(tmp_path)) in ("tmpfs", "ramfs"):
        pytest.skip(f"{kind} is nothing but page cache")
    probe = tmp_path / "probe"
    probe.write_bytes(b"x" * (1 << 20))
    if cached(probe) != 1 << 20:
        pytest.skip("this file system does not tell what is cached")
    empty_cache(probe)
    if cached(probe):
        pytest.skip("this file system keeps what it is asked to drop")
    probe.unlink()
    return tmp_path


def cached(path: Path) -> int:
    """How many bytes of a file lie in the page cache, by mincore(2), which leaves them as they are."""
    size = path.stat().st_size
    if not size:
        return 0
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), size)
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    first = ctypes.c_char.from_buffer(mapped)
    libc = ctypes.CDLL(None, use_errno=True)
    assert not libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
    del first
    mapped.close()
    return min(sum(page & 1 for page in pages) * mmap.PAGESIZE, size)


def empty_cache(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(path: Path) -> None:
    """Read a file whole, and one beside it that nobody drops."""
    witness = path.with_name("witness")
    witness.write_bytes(bytes(1 << 20))
    assert path.read_bytes()


def is_whole(path: Path) -> bool:
    """Whether all of a file that was cached still is; where the whole machine's cache was emptied, skip."""
    if cached(path) == path.stat().st_size:
        return True
    witness = path.with_name("witness")
    if witness.exists() and cached(witness) < witness.stat().st_size:
        pytest.skip("somebody else empties the page cache")
    return False


def goes_past_the_cache(folder: Path) -> bool:
    """Whether the file system takes O_DIRECT."""
    try:
        os.close(os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    (folder / "direct").unlink()
    return True


def is_direct(descriptor: int) -> bool:
    """Whether what is written goes past the page cache."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def disturb(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the file system behave as others do."""
    real_control, real_write, turns = fcntl.fcntl, os.write, itertools.count()

    def control(descriptor: int, command: int, flags: int = 0) -> Any:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_control(descriptor, command, flags)

    def refuse(descriptor: int, content: memoryview) -> int:
        if is_direct(descriptor):
            del content  # or the traceback keeps the buffer open
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, content)

    def shorten(descriptor: int, content: memoryview) -> int:
        return real_write(descriptor, content[: (4096 * 7, 1_000_003, 1)[next(turns) % 3]])

    if kind == "refused when asked for":
        monkeypatch.setattr(fcntl, "fcntl", control)
    elif kind != "none":
        monkeypatch.setattr(os, "write", refuse if kind == "refused when written" else shorten)


# -------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("size", SIZES)
def test_every_byte_is_written(
    size: int, disturbance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size, the pieces and the file system, the file holds what was given, no more."""
    content = random.Random(size).randbytes(size)
    disturb(disturbance, monkeypatch)
    new = NewFile(tmp_path / "new", size)
    view, places = memoryview(content), itertools.cycle(CHUNKS)
    while view:
        length = next(places)
        new.write(view[:length])
        view = view[length:]
    new.finish()
    new.close()
    assert (tmp_path / "new").read_bytes() == content


def test_what_is_given_may_be_changed_afterwards(tmp_path: Path) -> None:
    """A piece that was taken is copied: its buffer belongs to the caller again."""
    new = NewFile(tmp_path / "new", 8)
    piece = bytearray(b"good")
    new.write(memoryview(piece))
    piece[:] = b"evil"
    new.write(memoryview(b"more"))
    new.finish()
    new.close()
    assert (tmp_path / "new").read_bytes() == b"goodmore"


def test_the_room_is_reserved_before_anything_is_written(disk: Path) -> None:
    """A disk that is too full says so in the beginning, not after hours of work."""
    new = NewFile(disk / "new", 5 << 20)
    assert (disk / "new").stat().st_blocks * 512 >= 5 << 20
    new.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("size", [100, BUFFER_BYTES * 2])
def test_an_error_in_writing_carries_the_path(
    number: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk or a broken one is raised with its number and the path, and the file can be closed."""

    def fail(descriptor: int, content: memoryview) -> int:
        del content  # or the traceback keeps the buffer open
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)
    new = NewFile(tmp_path / "new", size)
    with pytest.raises(OSError, match="new") as caught:
        write_all(new, bytes(size))
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "new"))
    new.close()


def write_all(new: NewFile, content: bytes) -> None:
    """Write and finish."""
    new.write(content)
    new.finish()


def test_an_invalid_argument_that_stays_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing is refused through the cache too, there is an error with the path, no endless loop."""

    def fail(descriptor: int, content: memoryview) -> int:
        del content
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "write", fail)
    new = NewFile(tmp_path / "new", BUFFER_BYTES)
    with pytest.raises(OSError, match="new") as caught:
        write_all(new, bytes(BUFFER_BYTES))
    assert caught.value.errno == errno.EINVAL
    new.close()


LIMITED = """
import os, resource, sys
from pathlib import Path
from streammerge.pagecache import NewFile
when, path, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
before = len(os.listdir("/proc/self/fd"))
try:
    if when == "reserved":
        limit()
    new = NewFile(path, size)
    limit()
    try:
        new.write(bytes(size))
        new.finish()
    finally:
        new.close()
except OSError as exc:
    print(exc.errno, exc.filename, len(os.listdir("/proc/self/fd")) - before)
"""


@pytest.mark.parametrize("when", ["reserved", "written"])
@pytest.mark.parametrize("size", [5000, BUFFER_BYTES * 2])
def test_a_limit_of_the_system_carries_the_path(when: str, size: int, tmp_path: Path) -> None:
    """Where the kernel itself says no, on reserving or on writing: number, path, and no file left open."""
    path = tmp_path / "new"
    command = [sys.executable, "-c", LIMITED, when, str(path), str(size)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert found.stdout.split() == [str(errno.EFBIG), str(path), "0"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


# ------------------------------------------------------------------------------ what writing leaves in memory


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("size", [1, 4097, BUFFER_BYTES, 3 * BUFFER_BYTES + 123])
def test_what_was_written_is_not_cached(
    size: int, disturbance: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished file is durable and takes no memory, by whichever way it was written."""
    disturb(disturbance, monkeypatch)
    new = NewFile(disk / "new", size)
    new.write(random.Random(size).randbytes(size))
    new.finish()
    assert cached(disk / "new") == 0
    new.close()


def test_a_large_file_takes_no_memory_while_it_is_written(disk: Path) -> None:
    """It goes past the page cache, rather than through it and out again."""
    if not goes_past_the_cache(disk):
        pytest.skip("this file system does not take O_DIRECT")
    new = NewFile(disk / "new", 4 * BUFFER_BYTES)
    new.write(b"x" * (4 * BUFFER_BYTES))
    assert cached(disk / "new") == 0
    new.close()


# ------------------------------------------------------------------------------ what reading leaves in memory


def test_what_lies_in_the_cache_is_seen(disk: Path) -> None:
    """Cached is what was just read, not what was dropped; half of it is enough, a quarter is not."""
    path = disk / "file"
    path.write_bytes(bytes(64 << 20))
    with path.open("rb") as file:
        for part, expected in ((1.0, True), (0.6, True), (0.25, False), (0.0, False)):
            empty_cache(path)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read beyond
            for place in range(0, int((64 << 20) * part), 1 << 20):
                os.pread(file.fileno(), 1 << 20, place)
            assert pagecache.is_cached(file.fileno()) == expected, part


def test_looking_does_not_change_what_is_seen(disk: Path) -> None:
    """A file that was not cached is not because somebody asked, or opened it and read nothing."""
    path = disk / "file"
    path.write_bytes(bytes(32 << 20))
    empty_cache(path)
    with path.open("rb") as one, path.open("rb") as other:
        for file in (one, other, one, other):
            assert not pagecache.is_cached(file.fileno())
            time.sleep(0.05)  # what the kernel began to read is there now
    assert cached(path) == 0


@pytest.mark.parametrize("call", ["mmap", "mincore"])
def test_where_it_cannot_be_told_a_file_counts_as_cached(
    call: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What might lie in memory for somebody else is not dropped."""

    class Refusing:
        """The C library, one of whose calls fails."""

        def __getattr__(self, name: str) -> object:
            failed = pagecache.MAP_FAILED if call == "mmap" else -1
            return (lambda *_: failed) if name == call else getattr(real, name)

    real = pagecache.LIBC
    path = disk / "file"
    path.write_bytes(b"x" * (1 << 20))
    empty_cache(path)
    with path.open("rb") as file:
        assert not pagecache.is_cached(file.fileno())
        monkeypatch.setattr(pagecache, "LIBC", Refusing())
        assert pagecache.is_cached(file.fileno())


def save_weights(where: Path, megabytes: int) -> Path:
    """Write a model of a few weights that are not cached; give its one file."""
    elements = (megabytes << 18) // 4 + 12_345  # no weight begins or ends at a page
    models.save(where, {f"w{i}": torch.full((elements,), float(i)) for i in range(4)})
    path = where / "model.safetensors"
    empty_cache(path)
    return path


@contextmanager
def opened(path: Path, how: str) -> Iterator[Weights]:
    """Open a model's file in one of the ways in which it is read front to back, once."""
    with Weights(find(path), hashing=how == "hashing", whole=how == "whole", once=how == "once") as found:
        yield found


@pytest.mark.parametrize("how", ["hashing", "whole", "once"])
@pytest.mark.parametrize("megabytes", [1, 7, 48])
def test_what_was_not_cached_is_not_after_it_was_read(how: str, megabytes: int, disk: Path) -> None:
    """Read to its end, panel by panel or weight by weight, a file leaves nothing of itself in memory."""
    path = save_weights(disk / "base", megabytes)
    for panel in (1 << 18, 1 << 30):
        with opened(path, how) as found:
            for name, entry in found.entries.items():
                for start in range(0, entry.elements, panel):
                    found.read(name, start, min(start + panel, entry.elements))
        assert cached(path) == 0


def test_the_order_of_reading_does_not_matter(disk: Path) -> None:
    """Read weight by weight from the last to the first, a file leaves nothing either."""
    path = save_weights(disk / "base", 8)
    with opened(path, "hashing") as found:
        for name in reversed(list(found.entries)):
            found.read(name)
    assert cached(path) == 0


def test_it_is_dropped_on_the_way(disk: Path) -> None:
    """While a large file is read, memory holds what was read lately and what the kernel reads ahead."""
    path = save_weights(disk / "base", 96)
    most = 0
    with opened(path, "hashing") as found:
        for name, entry in found.entries.items():
            for start in range(0, entry.elements, 1 << 20):
                found.read(name, start, min(start + (1 << 20), entry.elements))
                most = max(most, cached(path))
    assert most <= TRAIL_BYTES + READ_AHEAD_BYTES


@pytest.mark.parametrize("how", ["hashing", "whole", "once"])
def test_what_was_cached_stays(how: str, disk: Path) -> None:
    """A file that others serve from is left in memory whole."""
    path = save_weights(disk / "base", 20)
    fill_cache(path)
    with opened(path, how) as found:
        for name in found.entries:
            found.read(name)
    assert is_whole(path)


def test_what_will_be_read_again_is_not_dropped(disk: Path) -> None:
    """Inside `unhashed`, and where a file is opened to be read at random, what was read stays."""
    path = save_weights(disk / "base", 20)
    fill_cache(path)
    empty_cache(path)
    with opened(path, "hashing") as found:
        with found.unhashed():
            for name in found.entries:
                found.read(name)
        assert is_whole(path)
    assert is_whole(path)
    empty_cache(path)
    with opened(path, "at random") as found:
        for name in found.entries:
            found.read(name)
    assert is_whole(path)


def test_after_unhashed_reading_counts_again(disk: Path) -> None:
    """What is read once more, to be hashed, is dropped behind it."""
    path = save_weights(disk / "base", 8)
    with opened(path, "hashing") as found:
        with found.unhashed():
            found.read("w0")
        found.read_rest()
    assert cached(path) == 0


@pytest.mark.parametrize("was_cached", [False, True])
def test_a_fold_and_a_render_leave_the_cache_as_it_was(was_cached: bool, disk: Path) -> None:
    """Base and fine-tune are in memory afterwards if they were before; states and models are not."""
    base = {models.SQUARE: torch.randn(3000, 2048), models.NORM: torch.ones(2048)}
    models.save(disk / "base", base)
    models.make_fine_tune(disk / "ft", base, seed=1)
    read = [disk / name / "model.safetensors" for name in ("base", "ft")]
    run = bench_of(disk / "run", disk / "base", method="average")

    def check(*written: Path) -> None:
        for path in read:
            assert is_whole(path) if was_cached else cached(path) <= path.stat().st_size / 20, path
        for path in written:
            assert cached(path) <= 4096, path

    for path in read:
        fill_cache(path) if was_cached else empty_cache(path)
    run.fold(disk / "ft")
    check(*run.state.folder.iterdir())
    for name in ("after the fold", "after a restart"):
        out = disk / name
        out.mkdir()
        run.engine.render(run.recipe, run.state, PLAIN, out)
        check(*out.glob("*.safetensors"))
        run.engine = Engine(device="cpu", threads=1, residency="disk")  # will prove the base again
