"""Where tasks run: labels, MD runs and trainings, each in a process of its own.

An executor has ``submit(function, *arguments, timeout) -> Future`` and ``stop()``; `outcome` turns the future into the
result, or into a reason. Whatever the executor (threads of this process by default, or those of
`ubmd.learning.executors`), it only decides where `isolated` is called: that runs the task in a child process by means
of pebble. Arguments and results are small (settings, paths): structures travel in files.

What a task gets everywhere:

- a crash (segmentation fault, out of memory), a time-out or an exception costs the task it happened in, no other one,
  and becomes a `TaskFailed` with one sentence;
- torch, OpenMP and BLAS use one thread, so that a task repeats bit for bit;
- its process ends with the driver, also when that is killed with ``kill -9`` (Linux: PR_SET_PDEATHSIG), and so do the
  programs that a reference has started (`ubmd.learning.keeper`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import RLock
from pathlib import Path
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from ubmd import errors
from ubmd.errors import StorageError, UbmdError, describe, one_line

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENMM_CPU_THREADS")
_POLL = 0.2  # s between two looks whether all is to stop
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_keepers: list[subprocess.Popen[bytes]] = []
_LONGEST_TRACEBACK = 20_000  # characters: the message at its end may be a whole output
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Reply = tuple[Any, str, str, str]
"""(value, kind of error or empty text, reason, traceback): errors as text: foreign ones may not survive pickle."""


class TaskFailed(UbmdError):
    """A task failed; the message is the reason, ``details`` the traceback if there is one."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


class TaskTimeout(TaskFailed):
    """A task took longer than its limit."""


class TaskCrashed(TaskFailed):
    """The process of a task was lost: perhaps its own fault, perhaps that of the machine."""


class WorkersLost(TaskFailed):
    """The task never ran to an end, by no fault of its own: it may be submitted again."""


_OWN_ERRORS = {kind.__name__: kind for kind in (TaskFailed, TaskTimeout, TaskCrashed, WorkersLost)}


class Executor(Protocol):
    """Runs tasks somewhere."""

    processes: int
    """tasks that run at the same time, as far as known"""

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Future[Any]:
        """Run ``function(*arguments)``; ``timeout`` (s) counts from the task's start. For `outcome`."""

    def stop(self) -> None:
        """End all tasks at once, whatever they are doing."""


class Workers:
    """Worker processes on this machine; use it in a ``with`` block. A process starts when a task first needs it."""

    def __init__(self, processes: int | None = None) -> None:
        """``processes`` workers; None: one per core that this process may use."""
        self.processes = processes or available_cores()
        self._pools = Pools()
        self._threads = ThreadPoolExecutor(self.processes, "ubmd_worker")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Future[Any]:
        """Run ``function(*arguments)`` in a worker process; see `Executor`."""
        return self._threads.submit(self._pools.run, function, arguments, timeout)

    def stop(self) -> None:
        """End all workers at once, whatever they are doing."""
        self._pools.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)


class _Spawn(SpawnContext):
    """How processes start: fork would copy the driver's torch threads and locks in an unknown state.

    It keeps the locks of its pool: pebble removes them from the system before it stops the process, and one that is
    just starting would not find them and print a traceback.
    """

    def __init__(self) -> None:
        super().__init__()
        self._locks: list[RLock] = []

    def RLock(self) -> RLock:
        """A lock that lives as long as this context."""
        self._locks.append(super().RLock())
        return self._locks[-1]


class Pools:
    """One child process per calling thread, kept from task to task (a force field is built once).

    Every process has a pool of its own: one that is killed while it holds the lock of a shared queue would block all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[int, ProcessPool] = {}
        self._stopped = False

    def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        timeout: float | None,
        unwanted: Callable[[], bool] | None = None,
    ) -> Reply:
        """Run a task in this thread's process and wait for it, or until ``unwanted()``."""
        pool = self._pool()
        try:
            future = pool.schedule(guarded, args=(function, *arguments), timeout=timeout)
            # A pool that is stopped may leave its futures waiting.
            while not wait([future], timeout=_POLL).done:
                if self._stopped or (unwanted is not None and unwanted()):
                    self._discard(pool)
                    return None, "WorkersLost", "The worker process was stopped.", ""
            reply: Reply = future.result()
        except FutureTimeout:
            return None, "TaskTimeout", f"It took longer than the limit of {timeout:g} s.", ""
        except ProcessExpired as error:
            self._discard(pool)  # it may have held a lock of its pool
            return None, "TaskCrashed", _crash_reason(error.exitcode), ""
        except (BrokenProcessPool, CancelledError, RuntimeError) as error:
            self._discard(pool)
            return None, "WorkersLost", f"The worker process was lost ({one_line(error)}).{_unguarded()}", ""
        return reply

    def stop(self) -> None:
        """End all processes; later tasks are lost."""
        with self._lock:
            self._stopped = True
            pools = list(self._pools.values())
        for pool in pools:
            pool.stop()
        for pool in pools:
            pool.join()

    def _pool(self) -> ProcessPool:
        """This thread's pool; a new one if an idle process's death has broken the last one."""
        thread = threading.get_ident()
        with self._lock:
            pool = self._pools.get(thread)
        if pool is not None and not pool.active:
            self._discard(pool)
            pool = None
        if pool is None:
            pool = ProcessPool(
                max_workers=1,
                initializer=_initialise,
                initargs=(os.getpid(),),
                context=_Spawn(),
            )
        with self._lock:
            if self._stopped:
                raise CancelledError
            self._pools[thread] = pool
        return pool

    def _discard(self, pool: ProcessPool) -> None:
        with self._lock:
            if self._stopped:
                return
            self._pools.pop(threading.get_ident(), None)
        pool.stop()
        pool.join()


def _unguarded() -> str:
    """What to do where each new process runs the driver's script again, because multiprocessing imports it."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    try:
        guarded = script is None or "__name__" in Path(script).read_text(encoding="utf-8", errors="replace")
    except OSError:
        guarded = True
    return "" if guarded else f" Put what {script} does below a line if __name__ == '__main__': workers import it."


def outcome(future: Future[Any]) -> Any:
    """The result of a task.

    Raises:
        UbmdError: what the task raised, if it was an error meant for the user.
        TaskFailed: the task raised something else, crashed, or ran out of time.
        WorkersLost: the task never ran to an end, by no fault of its own.
    """
    try:
        value, kind, reason, details = future.result()
    except (CancelledError, Exception) as error:  # an executor's own: a lost node, a broken connection
        raise WorkersLost(f"The executor lost the task ({describe(error)}).") from None
    if not kind:
        return value
    if kind in _OWN_ERRORS:
        raise _OWN_ERRORS[kind](reason, details)
    raise getattr(errors, kind)(reason)


def guarded(function: Callable[..., Any], *arguments: Any) -> Reply:
    """The reply of a call, also if it raises."""
    try:
        return function(*arguments), "", "", ""
    except UbmdError as error:
        kind = next(c.__name__ for c in type(error).__mro__ if c.__name__ in _OWN_ERRORS or hasattr(errors, c.__name__))
        return None, kind, one_line(error) or type(error).__name__, ""
    except (Exception, SystemExit) as error:
        kind = "StorageError" if isinstance(error, OSError) and is_full(error) else "TaskFailed"
        return None, kind, describe(error), traceback.format_exc()[:_LONGEST_TRACEBACK]


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or the one that it came from, says that a disk, quota or file-size limit is full."""
    while error is not None:
        if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def available_cores() -> int:
    """Cores that this process may use (a batch system may allow fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    _take_along_what_it_starts()
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


def _take_along_what_it_starts() -> None:
    """Let all programs that this process starts end with it."""
    start_keeper("UBMD_WORKER", "session")
    os.setsid()


def start_keeper(name: str, *options: str) -> None:
    """Start the keeper, which outlives this process just long enough to kill what it has started.

    Args:
        name: environment variable of this process, and of what it starts from now on.
        options: see `ubmd.learning.keeper`.
    """
    value = f"{os.getpid()}-{secrets.token_hex(8)}"
    keeper = str(Path(__file__).with_name("keeper.py"))
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", keeper, str(os.getpid()), f"{name}={value}", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # a pipe that the driver writes to must close with the driver
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _keepers.append(process)  # Python would warn about a forgotten one
    os.environ[name] = value
    os.environ["SPT_NOENV"] = "1"  # setproctitle, which Parsl uses, would overwrite it
