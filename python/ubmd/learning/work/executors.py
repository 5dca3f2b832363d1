"""Executors other than this machine's processes: Parsl, executorlib, and any ``concurrent.futures.Executor``.

They all need a file system that the driver and the tasks share, and the same installation of ubmd on both sides.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import Executor as StandardExecutor
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from ubmd.errors import SettingsError, describe, one_line
from ubmd.learning.work.clusters import executorlib_executor, job_label, parsl_executor, tasks_at_once
from ubmd.learning.work.inside import Reply, start_keeper
from ubmd.learning.work.keeper import cancel_jobs
from ubmd.learning.work.workers import Executor, Pools, Workers, available_cores
from ubmd.settings import WorkerSettings

_WANTED = ".wanted-"  # beginning of the name of the file that says that tasks are wanted
_BATCH_SYSTEM = re.compile(r"\b(?:sbatch|qsub|bsub|condor_submit): [^\n]+")  # why it takes no job
_TOKEN = 8  # bytes of a driver's token
_LOOK = 2.0  # s between two looks for the file that says that tasks are wanted


def make_executor(settings: WorkerSettings, folder: Path) -> Executor:
    """The executor of these settings; ``folder`` is for what it writes about itself.

    Raises:
        SettingsError: its package is not installed, or refuses the options.
    """
    if settings.executor == "pebble":
        return Workers(settings.processes)
    token = secrets.token_hex(_TOKEN)
    jobs = _jobs(settings, token)
    # Their own processes on this machine, and their jobs, would survive a killed driver.
    start_keeper("UBMD_DRIVER", *([f"jobs={jobs}"] if jobs else []))
    try:
        executor = _made(settings, folder, token)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"workers.executor = '{settings.executor}' needs a package that is not installed ({error}); "
            "install it with: pip install 'ubmd[parallel]'"
        ) from None
    return Adapter(executor, folder, tasks_at_once(settings), owned=True, token=token, jobs=jobs)


def _made(settings: WorkerSettings, folder: Path, token: str) -> StandardExecutor:
    if settings.executor == "parsl":
        return parsl_executor(settings, folder, token)
    return executorlib_executor(settings)


def _jobs(settings: WorkerSettings, token: str) -> str:
    """Text contained in the names of the jobs that this executor submits to SLURM; empty if it submits none."""
    provider = settings.options.get("provider", {})
    is_slurm = isinstance(provider, Mapping) and provider.get("name") == "SlurmProvider"
    return job_label(settings, token) if settings.executor == "parsl" and is_slurm else ""


def forget_dead_drivers(folder: Path) -> None:
    """End what earlier drivers of a run have left on other machines; the caller holds the lock of its folder.

    Tasks on nodes end when the file is gone that says that they are wanted. Jobs that still wait are cancelled.
    """
    for wanted in folder.glob(f"{_WANTED}*"):
        with suppress(OSError):
            jobs, token = wanted.read_text(errors="replace"), wanted.name.removeprefix(_WANTED)
            wanted.unlink()
            if len(token) == 2 * _TOKEN and jobs.endswith(f"-{token}"):  # nothing that other jobs' names could contain
                cancel_jobs(jobs)


class Adapter:
    """The interface of `ubmd.learning.work.workers.Executor` around a ``concurrent.futures.Executor``.

    Each task runs in a child process of where the executor puts it, so that crashes and time-outs cost one task there
    as well. Few executors can stop a running task: ours look for a file, and end when it is gone.
    """

    def __init__(
        self,
        executor: StandardExecutor,
        folder: Path,
        processes: int | None = None,
        owned: bool = False,
        token: str | None = None,
        jobs: str = "",
    ) -> None:
        """The executor may be in use elsewhere, too.

        Args:
            executor: where the tasks run.
            folder: seen by the tasks.
            processes: tasks at once.
            owned: shut the executor down in the end.
            token: of this driver; None: a new one.
            jobs: text contained in the names of its jobs in SLURM: they are cancelled in the end.
        """
        self.processes = processes or getattr(executor, "_max_workers", None) or available_cores()
        self._executor = executor
        self._owned = owned
        self._jobs = jobs
        self._wanted = folder / f"{_WANTED}{token or secrets.token_hex(_TOKEN)}"
        folder.mkdir(parents=True, exist_ok=True)
        self._wanted.write_text(jobs)

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Future[Any]:
        """Run ``function(*arguments)`` wherever the executor likes; one that is broken loses the task."""
        task = pickle.dumps((function, arguments))
        reply: Future[Reply] = Future()
        reply.set_running_or_notify_cancel()
        try:
            theirs = self._executor.submit(isolated, list(sys.path), str(self._wanted), os.getpid(), task, timeout)
        except Exception as error:
            reply.set_result(_lost(error))
        else:
            theirs.add_done_callback(lambda done: reply.set_result(_reply(done)))
        return reply

    def stop(self) -> None:
        """Stop all tasks; the executor too, if it is ours: one that was given may have other work."""
        self._wanted.unlink(missing_ok=True)
        _children.stop()  # threads of this very process
        if self._owned:
            with warnings.catch_warnings(action="ignore"):  # parsl says that it cannot cancel: we have done it
                self._executor.shutdown(wait=False, cancel_futures=True)
        if self._jobs:  # Parsl leaves those of a broken executor
            cancel_jobs(self._jobs)


def _reply(done: Future[Reply]) -> Reply:
    try:
        return done.result()
    except (CancelledError, Exception) as error:  # an executor's own: a lost node, a broken connection
        return _lost(error)


def _lost(error: BaseException) -> Reply:
    """The reply of a task that an executor has lost; what the batch system says about it matters most."""
    said = dict.fromkeys(one_line(line) for line in _BATCH_SYSTEM.findall(str(error)))
    return None, "WorkersLost", f"The executor lost the task ({'; '.join(said) or describe(error)}).", ""


def isolated(path: list[str], wanted: str, driver: int, task: bytes, timeout: float | None) -> Reply:
    """Run a pickled task in a child process of the calling thread.

    Args:
        path: the driver's sys.path; modules of the user must be found before the task is unpickled.
        wanted: a file that is removed when the task is to stop.
        driver: process id of the driver, on its machine.
        task: pickled function and arguments.
        timeout: s, or None.
    """
    sys.path += [entry for entry in path if entry not in sys.path]
    function, arguments = pickle.loads(task)
    unwanted = _Unwanted(Path(wanted), driver)
    with _children.of_task(unwanted) as pools:
        return pools.run(function, arguments, timeout, unwanted)


class _Unwanted:
    """Called often: whether a task is to stop; looks for the file only now and then, since it may be far away."""

    def __init__(self, wanted: Path, driver: int) -> None:
        self._wanted = wanted
        self._driver = driver
        self._parent = os.getppid()
        self._next = 0.0
        self._gone = False

    def __call__(self) -> bool:
        if os.getpid() != self._driver and os.getppid() != self._parent:
            os._exit(1)  # what started this process was killed: nobody will fetch the result
        if not self._gone and time.monotonic() >= self._next:  # two threads ask: neither must miss it
            self._next = time.monotonic() + _LOOK
            self._gone = not self._wanted.exists()
        return self._gone


class _Children:
    """Child processes of a process that an executor has started: made for a first task, ended when no run wants more.

    They must not outlive the run: they hold memory, and Python waits for them before it ends a process. A ``with
    ProcessPoolExecutor()`` block would never be left.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: Pools | None = None
        self._unwanted: _Unwanted | None = None  # of the newest task
        self._running = 0
        self._tidy = False  # whether the end of this process ends them

    @contextmanager
    def of_task(self, unwanted: _Unwanted) -> Iterator[Pools]:
        """The pools, kept at least as long as the task runs."""
        with self._lock:
            self._running += 1
            self._unwanted = unwanted
            if not self._tidy:  # before Python waits for child processes
                Finalize(None, self.stop, exitpriority=1)
                self._tidy = True
            if self._pools is None:
                _mend_start_method()
                self._pools = Pools()
                threading.Thread(target=self._watch, args=(self._pools,), name="ubmd_children", daemon=True).start()
            pools = self._pools
        try:
            yield pools
        finally:
            with self._lock:
                self._running -= 1

    def stop(self, only: Pools | None = None) -> bool:
        """End all children (of idle pools ``only``); returns whether there are none any more."""
        with self._lock:
            if only is not None and self._pools is only and self._running:
                return False
            pools = self._pools if only is None or self._pools is only else None
            if pools is not None:
                self._pools = None
        if pools is not None:
            pools.stop()
        return True

    def _watch(self, pools: Pools) -> None:
        """End the children soon after the run."""
        while True:
            time.sleep(_LOOK)
            unwanted = self._unwanted
            with suppress(OSError):  # the file system does not answer: look again
                if unwanted is not None and unwanted() and self.stop(pools):
                    return
            if self._pools is not pools:
                return


def _mend_start_method() -> None:
    """Child processes are told this process's start method, and end at once if they don't know it (joblib's 'loky')."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method("spawn", force=True)


_children = _Children()


def _forget_children() -> None:
    """After a fork: the children are those of another process, and its lock may be held by nobody."""
    global _children
    _children = _Children()


os.register_at_fork(after_in_child=_forget_children)
