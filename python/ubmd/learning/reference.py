"""The reference of a run, checked before anything is written: a run must not begin with one that cannot label."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ubmd.errors import LabelError, SettingsError, UbmdError
from ubmd.learning.work.groups import nothing_ended, run_tasks
from ubmd.learning.work.tasks import reference_record
from ubmd.learning.work.workers import Executor, TaskFailed, Workers, WorkersLost
from ubmd.runs.folder import RunFolder
from ubmd.settings import ReferenceSettings, WorkerSettings


def look_at_reference(
    folder: RunFolder, settings: ReferenceSettings, base: Path, workers: Executor, retries: int = 0
) -> dict[str, Any]:
    """The software that labels a run without any label yet, for its manifest; empty for a run with labels.

    The calculator is made where labels will be, in a worker: the driver's machine may lack the program, and a module of
    the user may do anything when it is imported. The worker keeps it for its labels.

    Args:
        folder: of the run.
        settings: the reference.
        base: folder that its files are relative to.
        workers: where to make it.
        retries: how often it is tried again if the worker's process is lost.

    Raises:
        SettingsError: the calculator cannot be imported or made.
        MachineError: no worker could try, by a fault of the machine.
    """
    if folder.has_labels():
        return {}
    found: list[dict[str, Any]] = []
    failures: list[UbmdError] = []

    def done(_: int, record: dict[str, Any] | None, error: UbmdError | None) -> None:
        if error is not None:
            failures.append(error)
        else:
            found.append(record or {})

    try:
        run_tasks(workers, reference_record, {0: (settings, base)}, settings.timeout, done, retries=retries)
    except SettingsError:
        if not _cache_has_labels(settings, base):
            raise
    if failures and not _cache_has_labels(settings, base):
        raise _cannot_be_made(settings, failures[0]) from None
    return found[0] if found else {}


def check_here(settings: ReferenceSettings, workers: WorkerSettings, base: Path) -> Iterator[str]:
    """Make the calculator once in a process of this machine, if labels will be made here; remarks about it.

    Raises:
        SettingsError: it cannot be imported or made.
    """
    if workers.executor != "pebble":
        return
    with tempfile.TemporaryDirectory(prefix="ubmd_check_") as name, Workers(1) as one:
        record = look_at_reference(RunFolder(Path(name)), settings, Path(base).absolute(), one)
    yield from (f"Remark: {text}" for text in remarks(record, settings))


def remarks(record: dict[str, Any], settings: ReferenceSettings) -> Sequence[str]:
    """What the user should know about a reference that works."""
    names = ", ".join(record.get("unrecognised", []))
    if not names:
        return []
    return [f"reference.arguments: passed on to {settings.calculator}, which does not name them: {names}."]


def _cannot_be_made(settings: ReferenceSettings, error: UbmdError) -> UbmdError:
    if isinstance(error, WorkersLost):
        return nothing_ended("task", error)
    if not isinstance(error, TaskFailed | LabelError):
        return error
    return SettingsError(f"reference.calculator = {settings.calculator!r} cannot be made: {error}")


def _cache_has_labels(settings: ReferenceSettings, base: Path) -> bool:
    """Whether all labels may come from the cache: these need no calculator."""
    if settings.cache is None:
        return False
    return any((Path(base) / Path(settings.cache).expanduser()).glob("??/*.extxyz"))
