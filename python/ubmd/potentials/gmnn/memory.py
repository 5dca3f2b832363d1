"""The C library's memory, set up for many short-lived tensors of a few megabytes."""

from __future__ import annotations

import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of the parameters in glibc's malloc.h
_LARGEST_BLOCK = 1 << 25  # bytes; glibc takes no more
_KEPT = 1 << 28  # bytes of freed memory at the end of the heap


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed blocks for the next step of this process instead of giving them back to the system.

    Whatever is fetched again comes page by page, each filled with zeros: in a training step of 700 atoms more than
    10^4 page faults, a quarter of its time. Only glibc has this switch; returns whether it worked.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
