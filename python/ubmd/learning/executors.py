"""Executors other than this machine's processes: Parsl, executorlib, and any ``concurrent.futures.Executor``.

They all need a file system that the driver and the tasks share, and the same installation of ubmd on both sides.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor as StandardExecutor
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from ubmd.errors import SettingsError
from ubmd.learning.inside import Reply, start_keeper
from ubmd.learning.workers import Executor, Pools, Workers, available_cores
from ubmd.settings import WorkerSettings

_LOOK = 2.0  # s between two looks for the file that says that tasks are wanted


def make_executor(settings: WorkerSettings, folder: Path) -> Executor:
    """The executor of these settings; ``folder`` is for what it writes about itself.

    Raises:
        SettingsError: its package is not installed, or refuses the options.
    """
    if settings.executor == "pebble":
        return Workers(settings.processes)
    start_keeper("UBMD_DRIVER")  # their own processes on this machine would survive a killed driver
    maker = {"parsl": _parsl, "executorlib": _executorlib}[settings.executor]
    try:
        executor = maker(settings, folder)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"workers.executor = '{settings.executor}' needs a package that is not installed ({error}); "
            "install it with: pip install 'ubmd[parallel]'"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise SettingsError(f"workers.options do not suit {settings.executor}: {error}") from error
    return Adapter(executor, folder, settings.processes, owned=True)


class Adapter:
    """The interface of `ubmd.learning.workers.Executor` around a ``concurrent.futures.Executor``.

    Each task runs in a child process of where the executor puts it, so that crashes and time-outs cost one task there
    as well. Few executors can stop a running task: ours look for a file, and end when it is gone.
    """

    def __init__(
        self, executor: StandardExecutor, folder: Path, processes: int | None = None, owned: bool = False
    ) -> None:
        """``folder``: seen by the tasks; ``processes``: tasks at once; ``owned``: shut the executor down in the end."""
        self.processes = processes or getattr(executor, "_max_workers", None) or available_cores()
        self._executor = executor
        self._owned = owned
        self._wanted = folder / f".wanted-{secrets.token_hex(8)}"
        folder.mkdir(parents=True, exist_ok=True)
        self._wanted.touch()

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Future[Any]:
        """Run ``function(*arguments)`` wherever the executor likes."""
        task = pickle.dumps((function, arguments))
        return self._executor.submit(isolated, list(sys.path), str(self._wanted), os.getpid(), task, timeout)

    def stop(self) -> None:
        """Stop all tasks; the executor too, if it is ours: one that was given may have other work."""
        self._wanted.unlink(missing_ok=True)
        _children.stop()  # threads of this very process
        if self._owned:
            with warnings.catch_warnings(action="ignore"):  # parsl says that it cannot cancel: we have done it
                self._executor.shutdown(wait=False, cancel_futures=True)


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
    """Asked often whether a task is to stop; looks for the file only now and then, since it may be far away."""

    def __init__(self, wanted: Path, driver: int) -> None:
        self._wanted = wanted
        self._driver = driver
        self._parent = os.getppid()
        self._next = 0.0
        self._gone = False  # two threads ask: what one has seen, the other must hear, too

    def __call__(self) -> bool:
        if os.getpid() != self._driver and os.getppid() != self._parent:
            os._exit(1)  # what started this process was killed: nobody will fetch the result
        if not self._gone and time.monotonic() >= self._next:
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


def _parsl(settings: WorkerSettings, folder: Path) -> StandardExecutor:
    from parsl.concurrent import ParslPoolExecutor

    return ParslPoolExecutor(parsl_config(settings, folder))


def parsl_config(settings: WorkerSettings, folder: Path) -> Any:
    """A parsl Config; options: those of HighThroughputExecutor, and of its provider with 'name' and 'launcher'."""
    from parsl import Config
    from parsl.executors import HighThroughputExecutor

    options = dict(settings.options)
    provider = dict(options.pop("provider", {"name": "LocalProvider", "init_blocks": 1, "max_blocks": 1}))
    name, launcher = provider.pop("name", None), provider.pop("launcher", None)
    if name is None:
        raise SettingsError("workers.options.provider needs a name, such as 'SlurmProvider' or 'LocalProvider'.")
    if launcher is not None:
        provider["launcher"] = getattr(import_module("parsl.launchers"), launcher)()
    if settings.processes is not None:
        options.setdefault("max_workers_per_node", settings.processes)
    options.setdefault("label", "ubmd")
    executor = HighThroughputExecutor(provider=getattr(import_module("parsl.providers"), name)(**provider), **options)
    # 'simple' would end idle jobs only when all are idle.
    return Config(
        executors=[executor], run_dir=str(folder / "parsl"), strategy="htex_auto_scale", initialize_logging=False
    )


def _executorlib(settings: WorkerSettings, folder: Path) -> StandardExecutor:
    """An executor of executorlib; options: its own, and its 'name'."""
    options = dict(settings.options)
    name = options.pop("name", "SingleNodeExecutor")
    if settings.processes is not None:
        options.setdefault("max_workers", settings.processes)
    if name.endswith("ClusterExecutor"):  # one job per task; it talks through files
        options.setdefault("cache_directory", str(folder / "executorlib"))
    else:
        options.setdefault("block_allocation", True)  # processes that stay, else each task starts a new one
    # Each task would be searched for futures among its arguments, and wait for them: ours have none.
    options.setdefault("disable_dependencies", True)
    made: StandardExecutor = getattr(import_module("executorlib"), name)(**options)
    return made
