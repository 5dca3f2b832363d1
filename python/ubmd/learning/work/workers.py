"""Where tasks run: labels, MD runs and trainings, each in a process of its own.

An executor has ``submit(function, *arguments, timeout) -> Future`` and ``stop()``; `outcome` turns the future into the
result, or into a reason. Whatever the executor (threads of this process by default, or those of
`learning.work.executors`), it only decides where `isolated` is called: that runs the task in a child process by means
of pebble. Arguments and results are small (settings, paths): structures travel in files.

What a task gets everywhere:

- a crash (segmentation fault), a time-out or an exception costs the task it happened in, no other one, and becomes a
  `TaskFailed` with one sentence; what is the machine's fault (a process killed from outside, no memory, no more
  processes) becomes `WorkersLost`;
- whatever a task leaves changed in its process does not reach the next one (`ubmd.learning.work.inside`);
- torch, OpenMP and BLAS use one thread, so that a task repeats bit for bit;
- its process ends with the driver, also when that is killed with ``kill -9`` (Linux: PR_SET_PDEATHSIG), and so do the
  programs that a reference has started (`ubmd.learning.work.keeper`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from ubmd import errors
from ubmd.errors import MachineError, UbmdError, describe, one_line
from ubmd.faults import killed_by, killed_from_outside, machine_fault
from ubmd.learning.work.inside import CLOSED, NO_PROCESS, Reply, initialise, run_task

_POLL = 0.2  # s between two looks at a running task, or less for shorter time limits
_SHORTEST_POLL = 0.01
_LONGEST_STEP = 1.0  # s between two such looks that count; what is longer, this process could not run
_GRACE = 1.0  # s in which pebble notices by itself that a process has ended
_LONGEST_HALT = 60.0  # s that a worker may be stopped (SIGSTOP) before it counts as lost


class TaskFailed(UbmdError):
    """A task failed; the message is the reason, ``details`` the traceback if there is one."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


class TaskTimeout(TaskFailed):
    """A task took longer than its limit."""


class TaskCrashed(TaskFailed):
    """The process of a task crashed or ended itself (segmentation fault, abort, ``os._exit``)."""


class WorkersLost(TaskFailed):
    """The task never ran to an end, by no fault of its own, but of the machine: it may be submitted again."""


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
        _start_tracker()
        self._pools = Pools()
        self._threads = ThreadPoolExecutor(self.processes, "ubmd_worker")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Future[Any]:
        """Run ``function(*arguments)`` in a worker process; see `Executor`."""
        refused = threading.Event()
        try:
            return self._threads.submit(self._pools.run, function, arguments, timeout, refused.is_set)
        except RuntimeError as error:
            reason = machine_fault(error)
            if not reason:
                raise
            refused.set()  # it stays in the queue of threads that may have started before
            lost: Future[Any] = Future()
            lost.set_result((None, "WorkersLost", f"{_UNSTARTED}: {reason}.", ""))
            return lost

    def stop(self) -> None:
        """End all workers at once, whatever they are doing."""
        self._pools.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)


def _start_tracker() -> None:
    """Start the process that cleans up after multiprocessing, so that it ignores SIGHUP.

    By itself it only ignores Ctrl-C and SIGTERM: when a terminal closes it would die, and a new one show a traceback.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        with suppress(OSError):  # no more processes: those that need it will say so
            resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _NoLock:
    """Stands for a lock that one process alone would ever take."""

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Always."""
        return True

    def release(self) -> None:
        """Nothing to do."""


class _Process(SpawnProcess):
    """A process that Ctrl-C in a terminal does not reach while it starts; see `inside.initialise`.

    It does not import the driver's script, as multiprocessing would do: tasks are functions of this package, and a
    script that calls `ubmd.run` without "if __name__ == '__main__':" would be run again.
    """

    def start(self) -> None:
        """Start it with SIGINT blocked: before it can handle the signal, it would end with a traceback."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _no_main_script():
                super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_starting = threading.Lock()


@contextmanager
def _no_main_script() -> Iterator[None]:
    """Let multiprocessing find no script of this process: it looks at ``__main__`` while it starts another one."""
    with _starting:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


class _Spawn(SpawnContext):
    """How processes start: fork would copy the driver's torch threads and locks in an unknown state.

    It keeps the processes of its pool: pebble takes one that ends with exit code 0 for finished, and waits on. Locks
    are for workers that share a pool: ours have one each, and a real lock would take a semaphore in /dev/shm, which
    stays there when driver and workers are killed together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[BaseProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:  # type: ignore[override]
        """A process, not yet started."""
        self.processes.append(_Process(*args, **kwargs))
        return self.processes[-1]

    def RLock(self) -> Any:
        """No lock."""
        return _NoLock()


class _Worker:
    """A worker process in a pebble pool of its own: one that is killed in the middle of a message blocks no other."""

    def __init__(self) -> None:
        """The process starts with the first task."""
        self._context = _Spawn()
        self._pool = ProcessPool(max_workers=1, initializer=initialise, initargs=(os.getpid(),), context=self._context)

    def submit(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Future[tuple[Reply, bool]]:
        """Run ``run_task(function, *arguments)``."""
        future: Future[tuple[Reply, bool]] = self._pool.schedule(run_task, args=(function, *arguments))
        return future

    def is_fit(self) -> bool:
        """Whether it can take a task."""
        return self.exit_code() is None and self._pool.active

    def exit_code(self) -> int | None:
        """Exit code of the process (negative: the signal that killed it) if it has ended."""
        ended = [process.exitcode for process in self._context.processes if process.exitcode is not None]
        return ended[0] if ended else None

    def is_stopped(self) -> bool:
        """Whether the process is held up by SIGSTOP or a debugger (where there is a /proc)."""
        return any(_state(process.pid) in ("T", "t") for process in self._context.processes)

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._pool.stop()
        self._pool.join()


def _state(process: int | None) -> str:
    """Letter of the state of a process, see proc(5); empty where it is not known."""
    try:
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return ""


class Pools:
    """One child process per calling thread, kept from task to task (a force field is built once)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: dict[int, _Worker] = {}
        self._stopped = False

    def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        timeout: float | None,
        unwanted: Callable[[], bool] | None = None,
    ) -> Reply:
        """Run a task in this thread's process and wait for it, or until ``unwanted()``."""
        if unwanted is not None and unwanted():
            return _STOPPED
        worker = None
        try:
            worker = self._worker()
            future = worker.submit(function, arguments)
            given_up = self._wait(worker, future, timeout, unwanted)
            reply, worn = (given_up, True) if given_up is not None else future.result()
        except ProcessExpired as error:
            reply, worn = (None, *_end_of(error.exitcode), ""), True
        except (BrokenProcessPool, CancelledError, RuntimeError, OSError, MachineError) as error:
            code = None if worker is None else worker.exit_code()
            reason = _not_started(error) if code is None else _end_of(code, began=False)[1]
            reply, worn = (None, "WorkersLost", reason, ""), True
        if worn or reply[1] == "WorkersLost":
            self._discard(worker)
        return reply

    def _wait(
        self,
        worker: _Worker,
        future: Future[Any],
        timeout: float | None,
        unwanted: Callable[[], bool] | None,
    ) -> Reply | None:
        """Wait until a task is done, or return why not.

        Only time in which the task can run counts: not that in which the machine sleeps, or a batch system or a user
        has stopped the worker or this process.
        """
        ran = halted = ended = 0.0  # s
        last = time.monotonic()
        poll = _POLL if timeout is None else min(_POLL, max(timeout, _SHORTEST_POLL))
        while not wait([future], timeout=poll).done:
            now = time.monotonic()
            step, last = min(now - last, _LONGEST_STEP), now
            # A pool that is stopped may leave its futures waiting.
            if self._stopped or (unwanted is not None and unwanted()):
                return _STOPPED
            code = worker.exit_code()
            if code is not None:
                ended += step
                if ended > _GRACE:  # pebble has had its time to say so
                    return (None, *_end_of(code, future.running()), "")
            elif worker.is_stopped():
                halted += step
                if halted > _LONGEST_HALT:
                    return None, "WorkersLost", f"The worker process was stopped (SIGSTOP) for {halted:.0f} s.", ""
            else:
                halted = 0.0
                ran += step if future.running() else 0.0
            if timeout is not None and ran > timeout:
                return None, "TaskTimeout", f"It took longer than the limit of {timeout:g} s.", ""
        return None

    def stop(self) -> None:
        """End all processes; later tasks are lost."""
        with self._lock:
            self._stopped = True
            workers = list(self._workers.values())
        for worker in workers:
            worker.end()

    def _worker(self) -> _Worker:
        """This thread's worker; a new one if the last one has died idle."""
        thread = threading.get_ident()
        with self._lock:
            worker = self._workers.get(thread)
        if worker is not None and not worker.is_fit():
            self._discard(worker)
            worker = None
        if worker is None:
            worker = _Worker()
        with self._lock:
            if self._stopped:
                raise CancelledError
            self._workers[thread] = worker
        return worker

    def _discard(self, worker: _Worker | None) -> None:
        with self._lock:
            if self._stopped or worker is None:
                return
            self._workers.pop(threading.get_ident(), None)
        worker.end()


_UNSTARTED = "A worker process could not be started"
_STOPPED: Reply = (None, "WorkersLost", "The worker process was stopped.", "")


def _end_of(code: int | None, began: bool = True) -> tuple[str, str]:
    """(kind of error, one sentence) for the exit code of a lost worker (negative: the signal that killed it)."""
    if code is not None and code < 0:
        kind = "WorkersLost" if killed_from_outside(code) else "TaskCrashed"
        reason = f"The worker process was {killed_by(-code)}."
    elif code == NO_PROCESS:
        return "WorkersLost", f"{_UNSTARTED}: the system allows no more processes (ulimit -u)."
    elif code == CLOSED:
        kind, reason = "TaskCrashed", "The task closed files (pipes) that its worker process needs (os.close)."
    else:
        kind, reason = "TaskCrashed", f"The worker process ended by itself with exit code {code}."
    if not began:
        return "WorkersLost", f"{reason[:-1]} before it began the task."
    return kind, reason


def _not_started(error: BaseException) -> str:
    """One sentence for a worker that is not there."""
    fault = machine_fault(error)
    if fault:
        return f"{_UNSTARTED}: {fault}."
    return f"The worker process was lost ({one_line(error)})."


def outcome(future: Future[Any]) -> Any:
    """The result of a task.

    Raises:
        UbmdError: what the task raised, if it was an error meant for the user.
        TaskFailed: the task raised something else, crashed, or ran out of time.
        WorkersLost: the task never ran to an end, by no fault of its own.
    """
    try:
        reply = future.result()
    except (CancelledError, Exception) as error:  # an executor's own: a lost node, a broken connection
        raise WorkersLost(f"The executor lost the task ({describe(error)}).") from None
    return opened(reply)


def opened(reply: Reply) -> Any:
    """The value of a reply; raises its error as `outcome`."""
    value, kind, reason, details = reply
    if not kind:
        return value
    if kind in _OWN_ERRORS:
        raise _OWN_ERRORS[kind](reason, details)
    raise getattr(errors, kind)(reason)


def available_cores() -> int:
    """Cores that this process may use (a batch system may allow fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
