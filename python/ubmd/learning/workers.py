"""Worker processes on this machine: labels and MD runs, each in a process of its own.

Any executor with the same ``submit(function, *arguments, timeout) -> Future`` can take this one's place. Arguments and
results are small (settings, paths): structures travel in files.

What a worker promises:

- a crash (segmentation fault, out of memory), a time-out or an exception costs the task it happened in, no other one,
  and becomes a `TaskFailed` with one sentence;
- torch, OpenMP and BLAS use one thread per worker, so that a task repeats bit for bit;
- workers end with the driver, also when that is killed with ``kill -9`` (Linux: PR_SET_PDEATHSIG; elsewhere they
  end when they next look for work). Programs that a reference itself started are not covered by this.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessPool

from ubmd import errors
from ubmd.errors import UbmdError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENMM_CPU_THREADS")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class TaskFailed(UbmdError):
    """A task in a worker failed; the message is the reason, ``details`` the traceback if there is one."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


class WorkersLost(TaskFailed):
    """All workers were lost, for instance because an idle one was killed: the task may be submitted again."""


class Workers:
    """A pool of worker processes; use it in a ``with`` block.

    A worker is started when the first task comes, and again after it was lost.
    """

    def __init__(self, processes: int | None = None) -> None:
        """``processes`` workers; None: one per core."""
        self.processes = processes or os.cpu_count() or 1
        self._pool: ProcessPool | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Future[Any]:
        """Run ``function(*arguments)`` in a worker; ``timeout`` (s) counts from the task's start.

        `outcome` turns the future into the result or into a reason.
        """
        return self._running_pool().schedule(_guarded, args=(function, *arguments), timeout=timeout)

    def stop(self) -> None:
        """End all workers at once, whatever they are doing."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _running_pool(self) -> ProcessPool:
        """The pool; a new one if an idle worker's death has broken the last one (pebble then refuses new tasks)."""
        if self._pool is not None and not self._pool.active:
            self.stop()
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self.processes,
                initializer=_initialise,
                initargs=(os.getpid(),),
                # fork would copy the driver's torch threads and locks in an unknown state
                context=multiprocessing.get_context("spawn"),
            )
        return self._pool


def outcome(future: Future[Any]) -> Any:
    """The result of a finished or running task of `Workers.submit`.

    Raises:
        UbmdError: what the task raised, if it was an error meant for the user.
        TaskFailed: the task raised something else, crashed, or ran out of time.
        WorkersLost: all workers were lost; no fault of the task.
    """
    try:
        value, kind, reason, details = future.result()
    except FutureTimeout as error:
        seconds = error.args[1] if len(error.args) > 1 else None
        raise TaskFailed(f"It took longer than the limit of {seconds:g} s." if seconds else "It timed out.") from None
    except ProcessExpired as error:
        raise TaskFailed(_crash_reason(error.exitcode)) from None
    except (BrokenProcessPool, CancelledError) as error:
        raise WorkersLost(f"The worker processes were lost ({error}).") from None
    if kind is None:
        return value
    known = getattr(errors, kind, None) if kind else None
    raise TaskFailed(reason, details) if known is None else known(reason)


def _guarded(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None, str, str]:
    """(value, kind of error, reason, traceback) of a call: a foreign exception may not survive pickling."""
    try:
        return function(*arguments), None, "", ""
    except UbmdError as error:
        return None, type(error).__name__, str(error), ""
    except Exception as error:
        return None, "", f"{type(error).__name__}: {error}", traceback.format_exc()


def _crash_reason(code: int | None) -> str:
    """One sentence for the exit code of a lost worker (negative: the signal that killed it)."""
    if code is None or code >= 0:
        return f"The worker process ended by itself with exit code {code}."
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = {"SIGKILL": " (often: out of memory)", "SIGSEGV": " (a crash in compiled code)"}.get(name, "")
    return f"The worker process was killed by {name}{hint}."


def _initialise(driver: int) -> None:
    """Tie this worker to its driver (a process id) and limit it to one thread, before torch or LAMMPS is imported."""
    _die_with(driver)
    # pebble's own handler is Python code, which waits for a busy LAMMPS to return.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in _THREAD_VARIABLES:
        os.environ[name] = "1"
    if "torch" in sys.modules:  # a driver script that imports torch at its top
        sys.modules["torch"].set_num_threads(1)


def _die_with(driver: int) -> None:
    """Ask the kernel to kill this process when the driver (its parent) ends, however that happens."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:  # it ended before we could ask
        os._exit(1)
