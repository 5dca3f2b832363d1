"""Settings of a process for its memory and threads. Library calls leave them as they found them.

The one exception is an environment variable for OpenMP, which `ubmd.run` and `ubmd.train` set if it is not set.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of the parameters in glibc's malloc.h
_LARGEST_BLOCK = 1 << 25  # bytes; glibc takes no more
_KEPT = 1 << 28  # bytes of freed memory at the end of the heap


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed blocks for the next step of this process instead of giving them back to the system.

    Memory that is requested again comes page by page, each filled with zeros: in a training step of 700 atoms more than
    10^4 page faults, a quarter of its time. The command ``ubmd`` and its workers do this; a program that trains through
    the Python package may, too. Only glibc has this switch, and it cannot be undone; returns whether it worked.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))


def spin_briefly() -> None:
    """Let idle OpenMP threads spin briefly, then sleep, unless the user has said otherwise.

    Long spinning slowed training and prediction down up to 25 times where other programs used the cores too. It is read
    when torch is loaded: it works before that only.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads for a while; None leaves it alone (torch takes all cores)."""
    import torch  # the command line asks for memory long before it needs this

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
