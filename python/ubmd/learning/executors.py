"""Executors other than this machine's processes: Parsl, executorlib, and any ``concurrent.futures.Executor``.

They all need a file system that the driver and the tasks share, and the same installation of ubmd on both sides.
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor as StandardExecutor
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import Any

from ubmd.errors import SettingsError
from ubmd.learning.workers import Executor, Pools, Reply, Workers, available_cores
from ubmd.settings import WorkerSettings

_pools: Pools | None = None  # of a process that an executor has started
_lock = threading.Lock()


def make_executor(settings: WorkerSettings, folder: Path) -> Executor:
    """The executor of these settings; ``folder`` is for what it writes about itself.

    Raises:
        SettingsError: its package is not installed, or refuses the options.
    """
    if settings.executor == "pebble":
        return Workers(settings.processes)
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
    return Adapter(executor, settings.processes, owned=True)


class Adapter:
    """The interface of `ubmd.learning.workers.Executor` around a ``concurrent.futures.Executor``.

    Each task runs in a child process of where the executor puts it, so that crashes and time-outs cost one task there
    as well.
    """

    def __init__(self, executor: StandardExecutor, processes: int | None = None, owned: bool = False) -> None:
        """``processes``: tasks at the same time; ``owned``: shut the executor down in the end."""
        self.processes = processes or getattr(executor, "_max_workers", None) or available_cores()
        self._executor = executor
        self._owned = owned

    def submit(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Future[Any]:
        """Run ``function(*arguments)`` wherever the executor likes."""
        task = pickle.dumps((function, arguments))
        return self._executor.submit(isolated, list(sys.path), task, timeout)

    def stop(self) -> None:
        """Stop at once, if the executor is ours; one that was given may have other work."""
        _stop_isolated()  # threads of this very process
        if self._owned:
            self._executor.shutdown(wait=False, cancel_futures=True)


def isolated(path: list[str], task: bytes, timeout: float | None) -> Reply:
    """Run a pickled task in a child process of the calling thread.

    ``path`` is the driver's sys.path: modules of the user must be found before the task is unpickled.
    """
    global _pools
    sys.path += [entry for entry in path if entry not in sys.path]
    function, arguments = pickle.loads(task)
    with _lock:
        if _pools is None:
            _pools = Pools()
        pools = _pools
    return pools.run(function, arguments, timeout)


def _stop_isolated() -> None:
    global _pools
    with _lock:
        pools, _pools = _pools, None
    if pools is not None:
        pools.stop()


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
