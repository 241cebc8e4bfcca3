"""How this process gets memory for tensors: large pages, and no new ones for every panel.

A page that a process touches for the first time costs it a fault, which on a virtual machine takes longer
than the arithmetic on what it holds. So buffers of a panel's size are kept by the C library and used again,
and those of whole weights are asked for in large pages.
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
MAPPED_BYTES = 3 << 19  # from this size on a buffer goes back to the system when it is freed
KEPT_BYTES = 16 << 20  # of free memory, at most, at the end of the C library's heap
GLIBC = libc if hasattr(libc := ctypes.CDLL(None), "mallopt") else None
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # read by torch when it allocates for the first time


def begin() -> None:
    """Large pages for torch's large buffers, one heap for all threads: what one frees, another uses.

    To be called before torch is imported and before there is a second thread, which would keep a heap of its
    own for as long as the process lives.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
    if GLIBC is not None:
        GLIBC.mallopt(ARENA_MAX, 1)


def keep_small_buffers() -> None:
    """Have glibc keep what panels need and give back what whole weights needed, which would add up."""
    if GLIBC is not None:
        GLIBC.mallopt(MMAP_THRESHOLD, MAPPED_BYTES)
        GLIBC.mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """Give the free pages between buffers back to the system; to be called now and then, for it costs."""
    if GLIBC is not None:
        GLIBC.malloc_trim(0)
