"""Work beside work: order and errors are those of work done in turn, memory is bounded, threads end."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import pytest

from streammerge.errors import Stopped
from streammerge.streams import ROOM_BYTES, SHORT_BYTES, Behind, ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE_SECONDS = 10.0  # until something that must happen has not
GLANCE_SECONDS = 0.05  # in which what must not happen would have


def until(claim: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
    """Wait until something is so; give whether it ever was."""
    deadline = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def beside(name: str) -> list[threading.Thread]:
    """List the threads of one kind that run."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


class Source:
    """Counts from 0 and remembers how far it was asked to, and by whom."""

    def __init__(self, items: int, error: BaseException | None = None) -> None:
        self.produced, self.callers = 0, set[int]()
        self._items, self._error = items, error

    def __iter__(self) -> Iterator[int]:
        for number in range(self._items):
            self.callers.add(threading.get_ident())
            self.produced += 1
            yield number
        if self._error is not None:
            raise self._error


# ---------------------------------------------------------------------------------------------- reading ahead


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
@pytest.mark.parametrize("items", [0, 1, 2, 100])
def test_items_come_in_their_order(items: int, depth: int) -> None:
    """Everything comes once, in the iterator's order, however many are read ahead."""
    assert list(ahead(iter(Source(items)), depth)) == list(range(items))
    assert not beside("ahead")


def test_any_item_is_an_item() -> None:
    """None, zero and empty things are no end."""
    assert list(ahead(iter([None, 0, (), "", False]), 2)) == [None, 0, (), "", False]


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_so_many_are_read_ahead_and_no_more(depth: int) -> None:
    """While an item is in use, `depth` more are produced beside it, never one beyond."""
    source = Source(20)
    with closing(ahead(iter(source), depth)) as items:
        assert source.produced == 0
        for taken, _ in enumerate(items, 1):
            expected = min(taken + depth, 20)
            assert until(lambda expected=expected: source.produced >= expected)  # type: ignore[misc]
            time.sleep(GLANCE_SECONDS / 10)
            assert source.produced == expected


def test_what_was_used_is_let_go_before_the_next_is_waited_for() -> None:
    """An item lives no longer than its user needs it: `depth` items and one, not two, lie in memory."""
    made: list[weakref.ref[Behind]] = []
    was_freed = []

    def make() -> Behind:
        item = Behind()
        made.append(weakref.ref(item))
        return item

    def source() -> Iterator[Behind]:
        yield make()
        was_freed.append(until(lambda: made[0]() is None, 1.0))
        yield make()

    with closing(ahead(source(), 1)) as items:
        for item in items:
            del item
    assert was_freed == [True]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 3])
@pytest.mark.parametrize("error", [KeyError("lost"), Stopped("asked to stop"), KeyboardInterrupt()])
def test_an_error_comes_in_its_place(error: BaseException, items: int, depth: int) -> None:
    """All items before it come first; then the very error of the iterator, and its thread is gone."""
    got: list[int] = []

    def use(found: Iterator[int]) -> None:
        for item in found:
            time.sleep(0.001)  # the error is there long before its turn
            got.append(item)

    with pytest.raises(type(error)) as caught, closing(ahead(iter(Source(items, error)), depth)) as found:
        use(found)
    assert got == list(range(items))
    assert caught.value is error
    assert not beside("ahead")


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_stops_the_iterator(taken: int) -> None:
    """Once it is closed no item is produced any more, and its thread has ended."""
    source = Source(1000)
    items = ahead(iter(source), 3)
    for _ in range(taken):
        next(items)
    items.close()
    assert not beside("ahead")
    produced = source.produced
    assert produced <= taken + 3
    time.sleep(GLANCE_SECONDS)
    assert source.produced == produced


def test_closing_waits_for_the_item_that_is_being_produced() -> None:
    """The iterator is stopped between two items, not within one: files that it reads can be closed after."""
    begun, gate, finished = threading.Event(), threading.Event(), []

    def source() -> Iterator[int]:
        yield 0
        begun.set()
        gate.wait(PATIENCE_SECONDS)
        finished.append(1)
        yield 1
        finished.append(2)
        yield 2

    items = ahead(source(), 2)
    assert next(items) == 0
    assert begun.wait(PATIENCE_SECONDS)
    threading.Timer(GLANCE_SECONDS, gate.set).start()
    items.close()
    assert finished == [1]
    assert not beside("ahead")


def test_an_error_of_the_user_stops_the_iterator() -> None:
    """Where work on an item fails, that error is raised, nothing more is produced, and the thread ends."""
    source = Source(1000)
    with pytest.raises(ZeroDivisionError), closing(ahead(iter(source), 2)) as items:
        assert [1 // (3 - item) for item in items]
    assert source.produced <= 4 + 2
    assert not beside("ahead")


def test_the_iterator_runs_on_one_other_thread() -> None:
    """All items are produced by one thread, which is not the caller's, while the caller works."""
    source = Source(30)
    assert len(list(ahead(iter(source), 3))) == 30
    assert len(source.callers) == 1
    assert threading.get_ident() not in source.callers


# --------------------------------------------------------------------------------------------- writing behind


class Gated:
    """Calls that wait for a gate; remembers which ran, and on which threads."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.ran: list[int] = []
        self.callers: set[int] = set()

    def call(self, number: int) -> Callable[[], None]:
        return partial(self._run, number)

    def _run(self, number: int) -> None:
        assert self.gate.wait(PATIENCE_SECONDS)
        self.callers.add(threading.get_ident())
        self.ran.append(number)


def fail(error: BaseException) -> None:
    """Raise it."""
    raise error


def test_calls_are_made_in_their_order() -> None:
    """Short and long ones, waiting or not, run one after the other as they were given."""
    ran: list[int] = []
    behind = Behind()
    sizes = (SHORT_BYTES, ROOM_BYTES * 2, 0, SHORT_BYTES - 1, SHORT_BYTES * 3, ROOM_BYTES // 2, 1)

    def call(number: int, size: int) -> None:
        time.sleep(0.002 if size >= SHORT_BYTES else 0)
        ran.append(number)

    for number in range(70):
        size = sizes[number % len(sizes)]
        behind(partial(call, number, size), size)
    behind.finish()
    behind.close()
    assert ran == list(range(70))


def test_a_long_call_runs_beside_the_caller() -> None:
    """The caller goes on while it runs, on one other thread."""
    gated, behind = Gated(), Behind()
    for number in range(3):
        behind(gated.call(number), SHORT_BYTES)
    assert gated.ran == []
    gated.gate.set()
    behind.finish()
    assert gated.ran == [0, 1, 2]
    assert len(gated.callers) == 1
    assert threading.get_ident() not in gated.callers
    behind.close()
    assert not beside("behind")


def test_a_short_call_runs_after_those_that_wait_and_at_once() -> None:
    """It has run when the call returns, not before all earlier ones; alone it needs no thread."""
    gated, behind = Gated(), Behind()
    alone = Gated()
    alone.gate.set()
    behind(alone.call(0), SHORT_BYTES - 1)
    assert alone.callers == {threading.get_ident()}
    assert not beside("behind")
    for number in (0, 1):
        behind(gated.call(number), SHORT_BYTES)
    threading.Timer(GLANCE_SECONDS, gated.gate.set).start()
    behind(lambda: gated.ran.append(2), SHORT_BYTES - 1)
    assert gated.ran == [0, 1, 2]
    behind.close()


@pytest.mark.parametrize("later", ["finish", "short", "full"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Stopped("asked to stop")])
def test_an_error_is_raised_by_a_later_call(error: BaseException, later: str) -> None:
    """What a call raised comes out of finish, of a short call, or of one for which there is no room."""
    behind, ran = Behind(), list[str]()
    size = 1 if later == "short" else ROOM_BYTES
    call = behind.finish if later == "finish" else partial(behind, lambda: ran.append(later), size)
    behind(partial(fail, error), ROOM_BYTES)
    with pytest.raises(type(error)) as caught:
        call()
    assert caught.value is error
    assert ran == []
    behind.close()
    assert not beside("behind")


def test_the_first_error_is_the_one_that_is_raised() -> None:
    """Of several that fail, the earliest says why."""
    behind = Behind()
    for number in range(3):
        behind(partial(fail, OSError(number, "failed")), SHORT_BYTES)
    with pytest.raises(OSError, match="Errno 0"):
        behind.finish()
    behind.close()


@pytest.mark.parametrize(("size", "room"), [(ROOM_BYTES // 4, 4), (ROOM_BYTES // 3, 3), (ROOM_BYTES * 3, 1)])
def test_the_caller_waits_where_there_is_no_room(size: int, room: int) -> None:
    """What waits keeps at most ROOM_BYTES alive, or one call that is larger; then the caller waits."""
    gated, behind, accepted = Gated(), Behind(), list[int]()

    def give() -> None:
        for number in range(10):
            behind(gated.call(number), size)
            accepted.append(number)

    giving = threading.Thread(target=give)
    giving.start()
    assert until(lambda: len(accepted) == room)
    time.sleep(GLANCE_SECONDS)
    assert len(accepted) == room
    gated.gate.set()
    giving.join(PATIENCE_SECONDS)
    behind.finish()
    assert gated.ran == list(range(10))
    behind.close()


def test_room_comes_back() -> None:
    """What is done counts no more: long after, as much may wait as in the beginning."""
    behind = Behind()
    for _ in range(20):
        behind(lambda: None, ROOM_BYTES)
    behind.finish()
    gated, done = Gated(), threading.Event()

    def give() -> None:
        for number in range(4):
            behind(gated.call(number), ROOM_BYTES // 4)
        done.set()

    giving = threading.Thread(target=give)
    giving.start()
    assert done.wait(PATIENCE_SECONDS)
    gated.gate.set()
    giving.join(PATIENCE_SECONDS)
    behind.close()


@pytest.mark.parametrize("is_failing", [False, True])
def test_closing_drops_what_has_not_begun(is_failing: bool) -> None:
    """What runs is waited for, what waits is forgotten, no error comes out, and the thread has ended."""
    gated, behind = Gated(), Behind()
    begun = threading.Event()

    def first() -> None:
        begun.set()
        gated.call(0)()
        if is_failing:
            raise OSError(28, "No space left on device")

    behind(first, SHORT_BYTES)
    for number in (1, 2, 3):
        behind(gated.call(number), SHORT_BYTES)
    assert begun.wait(PATIENCE_SECONDS)
    threading.Timer(GLANCE_SECONDS, gated.gate.set).start()
    behind.close()
    assert gated.ran == [0]
    assert not beside("behind")
    time.sleep(GLANCE_SECONDS)
    assert gated.ran == [0]
