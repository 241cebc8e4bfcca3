"""Work beside work: reading ahead and writing behind, each on a thread of its own, in bounded memory.

A fold reads, hashes, computes, hashes and writes. Done one after the other each waits for the rest; here they
overlap, and the order of everything within one stream is kept, so that results do not depend on timing.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from concurrent.futures import Future

Item = TypeVar("Item")

SHORT_BYTES = 1 << 16  # below this a thread costs more than the work
ROOM_BYTES = 4 << 20  # that wait to be written, or hashed, in one stream


def ahead(items: Iterator[Item], depth: int) -> Generator[Item]:
    """Yield the items of an iterator that runs on a thread of its own, up to `depth` items ahead.

    What it raises is raised here, in its place. Closing this generator stops that one between two items.
    """
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # next gives an item or `end`
            del item
    finally:
        pool.shutdown(cancel_futures=True)


class Behind:
    """Calls that are made one after the other on a thread of their own, in bounded memory."""

    def __init__(self) -> None:
        """The thread begins with the first call."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._held = 0

    def __call__(self, function: Callable[[], None], size: int) -> None:
        """Have it called in its turn, at once where that is sooner; raises what an earlier call raised.

        size  bytes that it keeps alive
        """
        if size < SHORT_BYTES:
            self.finish()
            function()
            return
        while self._waiting and self._held + size > ROOM_BYTES:
            self._next()
        self._held += size
        self._waiting.append((self._pool.submit(function), size))

    def _next(self) -> None:
        future, size = self._waiting.popleft()
        self._held -= size
        future.result()

    def finish(self) -> None:
        """Wait for all; raises what one of them raised."""
        while self._waiting:
            self._next()

    def close(self) -> None:
        """Forget what has not begun and wait for the rest; raises nothing."""
        self._pool.shutdown(cancel_futures=True)
