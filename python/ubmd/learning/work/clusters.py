"""Executors of clusters, made from the options of a settings file: those of Parsl and executorlib.

A wrong option gives a one-sentence error that names it; what the packages leave open (addresses, encryption, when jobs
take their last task) is set to what suits tasks of minutes to hours.
"""

from __future__ import annotations

import datetime
import importlib
import inspect
import ipaddress
import os
import re
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor as StandardExecutor
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from ubmd.errors import SettingsError, describe, one_line
from ubmd.learning.work.workers import available_cores
from ubmd.settings import WorkerSettings
from ubmd.spelling import nearest

_EXECUTORLIB = ("SingleNodeExecutor", "SlurmJobExecutor")
_LAST_TASK = 0.75  # of a job's walltime, after which it takes no new tasks
_FAILED_BLOCKS = 60  # in a row, some minutes of trying, after which the batch system counts as down
_ANSWER = 60.0  # s that Parsl's interchange may take to answer
# As `python interchange.py`, whatever PATH is, and in a session of its own: Ctrl-C in a terminal would reach it, too.
_INTERCHANGE = (
    "import os, runpy; os.setsid(); "
    "runpy.run_module('parsl.executors.high_throughput.interchange', run_name='__main__')"
)


def tasks_at_once(settings: WorkerSettings) -> int:
    """How many tasks run at the same time, as far as the settings tell: with parsl, on all nodes of all jobs."""
    options = settings.options
    if settings.executor == "parsl":
        provider = options.get("provider", {})
        blocks = [provider.get(key, 1) for key in ("nodes_per_block", "max_blocks")]
        per_node = options.get("max_workers_per_node") or settings.processes
        if per_node is None:
            cores = provider.get("cores_per_node") or available_cores()
            per_node = max(1, int(cores / options.get("cores_per_worker", 1)))
        return int(per_node * blocks[0] * blocks[1])
    if settings.executor == "executorlib":
        cores = options.get("resource_dict", {}).get("cores", 1)
        given = options.get("max_workers") or options.get("max_cores", 0) // cores
        return given or settings.processes or _cores_of_job()
    return settings.processes or available_cores()


# ------------------------------------------------------------------------------------------ parsl


def parsl_executor(settings: WorkerSettings, folder: Path, token: str) -> StandardExecutor:
    """An executor of Parsl that is running.

    Args:
        settings: of the workers.
        folder: for Parsl's scripts and logs.
        token: part of the names of its jobs.

    Raises:
        SettingsError: an option is wrong, or Parsl does not start.
    """
    config = parsl_config(settings, folder, token)
    try:
        return _Parsl(config)
    except Exception as error:
        raise SettingsError(f"Parsl does not start ({describe(error)}); its logs are in {config.run_dir}.") from error


class _Parsl(StandardExecutor):
    """An executor around a kernel of Parsl; a script may have another one."""

    def __init__(self, config: Any) -> None:
        from parsl import DataFlowKernel
        from parsl.concurrent import ParslPoolExecutor

        self._kernel = DataFlowKernel(config)
        self._pool = ParslPoolExecutor(dfk=self._kernel)
        self._kernel.job_status_poller.poll()  # submits the first jobs, else only after some seconds

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = self._pool.submit(function, *args, **kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if not self._kernel.cleanup_called:
            self._kernel.cleanup()


def job_label(settings: WorkerSettings, token: str) -> str:
    """Text contained in the names of all jobs of the driver with this token."""
    return f"{settings.options.get('label', 'ubmd')}-{token}"


def parsl_config(settings: WorkerSettings, folder: Path, token: str) -> Any:
    """A parsl Config; options: those of HighThroughputExecutor, and of its provider with 'name' and 'launcher'.

    Raises:
        SettingsError: an option is wrong.
    """
    from parsl import Config

    where = "workers.options"
    options = dict(settings.options)
    provider = _provider(options.pop("provider", {"name": "LocalProvider"}), f"{where}.provider")
    defaults = {
        "address": _address(provider, options),
        "encrypted": True,
        "max_workers_per_node": settings.processes,
        "interchange_launch_cmd": [sys.executable, "-P", "-c", _INTERCHANGE],
        "block_error_handler": _give_up,
    }
    if hasattr(provider, "walltime"):
        defaults["drain_period"] = int(_LAST_TASK * _seconds(provider.walltime))
    if "address" in options:
        _check_address(options["address"])
    options = defaults | options | {"label": job_label(settings, token)}
    executor = _made(_high_throughput_executor(), options, where, provider=provider)
    # 'simple' would end idle jobs only when all are idle.
    return Config(
        executors=[executor], run_dir=str(folder / "parsl"), strategy="htex_auto_scale", initialize_logging=False
    )


def _provider(options: Any, where: str) -> Any:
    """A provider of Parsl from its table."""
    from parsl import launchers, providers

    if not isinstance(options, Mapping):
        raise SettingsError(f"{where} must be a table with a name, such as 'SlurmProvider', not {options!r}.")
    options = dict(options)
    kind = _named(providers, options.pop("name", None), f"{where}.name", "SlurmProvider")
    given = {}
    if "launcher" in options:
        launcher = options.pop("launcher")
        launcher = dict(launcher) if isinstance(launcher, Mapping) else {"name": launcher}
        name = launcher.pop("name", None)
        maker = _named(launchers, name, f"{where}.launcher", "SrunLauncher")
        given["launcher"] = _made(maker, launcher, f"{where}.launcher")
    if "walltime" in options:
        _seconds(options["walltime"])
    if "worker_init" in inspect.signature(kind).parameters and isinstance(options.get("worker_init", ""), str):
        # Parsl's programs lie beside Python; what the user's own line puts first stays first.
        programs = shlex.quote(str(Path(sys.executable).parent))
        options["worker_init"] = f"export PATH={programs}:$PATH\n{options.get('worker_init', '')}"
    return _made(kind, options, where, **given)


def _seconds(walltime: Any) -> int:
    """A walltime of Parsl, s."""
    if isinstance(walltime, datetime.time):
        raise SettingsError(f"workers.options.provider.walltime = {walltime} must be in quotes.")
    match = re.fullmatch(r"(\d+):([0-5]?\d):([0-5]?\d)", str(walltime))
    if match is None:
        raise SettingsError(
            f"workers.options.provider.walltime = {walltime!r} must be hours, minutes and seconds, such as '04:00:00'."
        )
    hours, minutes, seconds = (int(number) for number in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _address(provider: Any, options: Mapping[str, Any]) -> str | None:
    """Address of this machine for workers. Without one, Parsl would listen on all addresses, and ask the internet."""
    from parsl.addresses import address_by_hostname, address_by_route
    from parsl.launchers import SimpleLauncher, SingleNodeLauncher
    from parsl.providers import LocalProvider

    if "address" in options:
        return None
    if isinstance(provider, LocalProvider) and isinstance(provider.launcher, SimpleLauncher | SingleNodeLauncher):
        return "127.0.0.1"
    for find in (address_by_hostname, address_by_route):  # neither sends anything
        with suppress(OSError, ValueError):
            address = str(find())
            if not ipaddress.ip_address(address).is_loopback:  # many machines call themselves 127.0.1.1
                return address
    return "127.0.0.1"


def _check_address(address: Any) -> None:
    """SettingsError if it is none of this machine: Parsl would wait for minutes, and say nothing."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
        with socket.socket(family) as one:
            one.bind((address, 0))
    except (OSError, ValueError, TypeError):
        raise SettingsError(
            f"workers.options.address = {address!r} must be an IP address of this machine (of the network that the "
            "nodes see; 'ip address' shows them)."
        ) from None


def _high_throughput_executor() -> Callable[..., Any]:
    """Parsl's HighThroughputExecutor with three faults fixed, made by a function because Parsl is optional."""
    from parsl.executors import HighThroughputExecutor
    from parsl.executors.high_throughput.errors import CommandClientTimeoutError

    class Executor(HighThroughputExecutor):
        """Leaves jobs that are needed in the queue, and notices that its interchange has died."""

        def start(self) -> None:
            super().start()
            ask = self.command_client.run

            def run(message: Any, max_retries: int = 3, timeout_s: float | None = _ANSWER) -> Any:
                try:
                    return ask(message, max_retries, timeout_s)
                except CommandClientTimeoutError:
                    self._lose_interchange()
                    raise

            # Without a time limit, its caller would wait for a dead process forever.
            self.command_client.run = run
            threading.Thread(target=self._watch, name="ubmd_interchange", daemon=True).start()

        def scale_in(self, blocks: int, max_idletime: float | None = None) -> list[str]:
            """Cancel jobs; asked for none, Parsl (2026.10) would cancel all that still wait in the queue."""
            if blocks < 1:
                return []
            ended: list[str] = super().scale_in(blocks, max_idletime)
            return ended

        def _watch(self) -> None:
            if self.interchange_proc is not None:
                self.interchange_proc.wait()
            if not self._result_queue_thread_exit.is_set():
                self._lose_interchange()

        def _lose_interchange(self) -> None:
            if not self.bad_state_is_set:
                self.set_bad_state_and_fail_all(ConnectionError("the interchange of Parsl has died on this machine"))

    return Executor


def _give_up(executor: Any, status: dict[str, Any]) -> None:
    """Fail all tasks if no job ever started, or if none is left and new ones have failed again and again.

    Parsl's own rule would retry forever once one job has started. A batch system may be down for some minutes.
    """
    from parsl.jobs.error_handlers import simple_error_handler
    from parsl.jobs.states import JobState

    simple_error_handler(executor, status)
    alive = any(job.state in (JobState.PENDING, JobState.RUNNING) for job in status.values())
    newest = sorted(status, key=int)[-_FAILED_BLOCKS:]
    if not executor.bad_state_is_set and not alive and len(newest) == _FAILED_BLOCKS:
        simple_error_handler(executor, {block: status[block] for block in newest})


# ------------------------------------------------------------------------------------------ executorlib


def executorlib_executor(settings: WorkerSettings) -> StandardExecutor:
    """An executor of executorlib; options: its own, and its 'name'.

    Raises:
        SettingsError: an option is wrong.
    """
    options = dict(settings.options)
    name = options.pop("name", _EXECUTORLIB[0])
    if name not in _EXECUTORLIB:
        raise SettingsError(
            f"workers.options.name = {name!r} must be {_EXECUTORLIB[0]!r} (processes of this machine) or "
            f"{_EXECUTORLIB[1]!r} (inside one SLURM job){_perhaps(str(name), _EXECUTORLIB)}; for tasks in jobs of "
            "their own, set workers.executor = 'parsl'."
        )
    if name == "SlurmJobExecutor" and "SLURM_JOB_ID" not in os.environ:
        raise SettingsError(
            "workers.options.name = 'SlurmJobExecutor' works inside a SLURM job: start the run in one (sbatch, salloc)."
        )
    # Processes that stay, else each task starts a new one. Otherwise executorlib would also search the arguments of
    # each task for futures and wait for them: ours have none.
    defaults: dict[str, Any] = {"block_allocation": True, "disable_dependencies": True}
    if not options.get("max_workers") and not options.get("max_cores"):
        defaults["max_workers"] = tasks_at_once(settings)
    made: StandardExecutor = _made(
        getattr(importlib.import_module("executorlib"), name), defaults | options, "workers.options"
    )
    return made


def _cores_of_job() -> int:
    """Tasks of the SLURM job that this process runs in; cores of this machine if it is in none."""
    tasks = os.environ.get("SLURM_NTASKS", "")
    return int(tasks) if tasks.isdigit() else available_cores()


# ------------------------------------------------------------------------------------------ wrong options


def _named(module: Any, name: Any, where: str, example: str) -> Any:
    """A class of a module of Parsl by its name."""
    known = sorted(set(module.__all__))
    if name is None:
        raise SettingsError(f"{where} is missing: give a name, such as {example!r}.")
    if name not in known:
        raise SettingsError(f"{where} = {name!r} must be one of {', '.join(known)}{_perhaps(str(name), known)}.")
    return getattr(module, name)


def _made(kind: Callable[..., Any], options: Mapping[str, Any], where: str, **given: Any) -> Any:
    """``kind(**options, **given)``; ``given`` is our own.

    Raises:
        SettingsError: an option is unknown, or refused.
    """
    known = inspect.signature(kind).parameters
    for name in options:
        if name not in known or name in given:
            raise SettingsError(
                f"{where} has no option {name!r}{_perhaps(name, set(known) - set(given))}; see the documentation of "
                f"{_public(kind)}."
            )
    options = {
        # A settings file has lists only.
        name: tuple(value) if isinstance(value, list) and "Tuple" in str(known[name].annotation) else value
        for name, value in options.items()
    }
    try:
        return kind(**options, **given)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # typeguard's, and those of packages that a provider lacks, have no base of their own
        wrong = re.match(r'argument "(\w+)"', str(error))
        if wrong and wrong[1] in options:
            expected = inspect.formatannotation(known[wrong[1]].annotation)
            reason = f"{where}.{wrong[1]} = {options[wrong[1]]!r} must be of type {expected}."
        else:
            reason = f"{where}: {_public(kind)} refuses this: {one_line(error)}"
        raise SettingsError(reason) from error


def _public(kind: Callable[..., Any]) -> str:
    """The name of a class in the documentation."""
    return next((c.__name__ for c in inspect.getmro(kind) if not c.__module__.startswith("ubmd")), "")  # type: ignore[arg-type]


def _perhaps(name: str, known: Any) -> str:
    meant = nearest(name, known)
    return f" (perhaps {meant!r}?)" if meant else ""
