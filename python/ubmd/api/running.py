"""`ubmd.run`: a run with structures and a calculator that are Python objects, and events that are objects, too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.abc import GetPropertiesMixin

from ubmd.api.tables import Given, Tables, as_list, base_of, fill, source_of, stem_of, tables_of
from ubmd.cli.console import make_console
from ubmd.cli.run import progress_of
from ubmd.data.extxyz import as_extxyz
from ubmd.errors import SettingsError
from ubmd.files import write_text
from ubmd.references.pickled import Packed, pack
from ubmd.runs.event_records import Event, read_event
from ubmd.runs.folder import RunFolder
from ubmd.runs.run import Run
from ubmd.runs.schedules import DYNAMIC, Schedule, schedule_of_tables
from ubmd.settings import make_settings

_STRUCTURES, _CALCULATOR = "structures.extxyz", "calculator.pickle"  # in the folder inputs/ of a run
_OWN_STRUCTURES = {"start": ("file", "labels"), "crystal": ("structure",)}  # settings that name structures


def run(
    settings: Given = None,
    calculator: GetPropertiesMixin | Callable[[], GetPropertiesMixin] | None = None,
    structures: Atoms | Iterable[Atoms] | None = None,
    *,
    listener: Callable[[Event], None] | None = None,
    progress: bool = True,
    executor: Executor | None = None,
    from_iteration: int | None = None,
) -> Run:
    """Start or resume a run, as `ubmd run` does; returns when it has ended.

    >>> import ubmd
    >>> from ase.build import bulk
    >>> from ase.calculators.emt import EMT
    >>> settings = {"run_dir": "silver", "loop": {"labels": 20}, "md": {"replicas": 2}, "training": {"epochs": 20}}
    >>> run = ubmd.run(settings, EMT(), bulk("Ag", cubic=True), progress=False)
    >>> len(run.dataset)
    20

    Ctrl-C (in a notebook: interrupt the kernel) ends it, and the same call resumes it.

    Args:
        settings: tables and keys as in a settings file (``ubmd schema run`` lists them), or the path of such a file.
            Files that a dictionary names are relative to the working directory, those of a settings file to its folder.
        calculator: what labels, instead of ``reference.calculator``: an ASE calculator, or a function without
            arguments that makes one. It is copied to the processes that label (``workers.processes``). Its class may be
            defined in a script or notebook.
        structures: what the run starts from, instead of ``start.file``: one or several. If all are labelled, the
            run begins with these labels. Settings that are not given are then those that ``ubmd init`` proposes.
        listener: called with every event (`ubmd.events`), also with epochs and MD steps, which are not kept. What it
            raises ends the run, which can be resumed.
        progress: print what happens, as the command does.
        executor: where labels, MD and trainings run: any ``concurrent.futures.Executor``. Default: as the table
            ``workers`` of the settings says.
        from_iteration: go back to this iteration of the loop, if wanted with other settings. Later labels are moved to
            the folder ``aside``.

    Returns:
        The run: its ``model`` (a path), ``dataset``, ``history``, ``events()`` and ``report()``.

    Raises:
        SettingsError: the settings cannot work, or don't continue the run in the folder; the calculator cannot be sent
            to other processes.
        DataError, LabelError, SimulationError, TrainingError, StorageError, MachineError: as their names say.
    """
    values, base = tables_of(settings), base_of(settings)
    schedule = schedule_of_tables(values)
    given = None if structures is None else as_list(structures, "structures")
    packed = None if calculator is None else pack(calculator)
    _name_inputs(values, base, schedule, given, packed)
    made = make_settings(schedule.settings, values, source=source_of(settings))
    _write_inputs(RunFolder(Path(made.run_dir)), given, packed)
    options: dict[str, Any] = {"executor": executor}
    if from_iteration is not None:
        if not schedule.takes_back:
            raise SettingsError(f"from_iteration is for active-learning loops, not for a {schedule.name} run.")
        options["from_iteration"] = from_iteration
    with ExitStack() as stack:
        shown = stack.enter_context(progress_of(schedule, made, base, make_console())) if progress else None

        def hear(event: dict[str, Any]) -> None:
            if shown is not None:
                shown(event)
            if listener is not None:
                listener(read_event(event))

        return Run(schedule.run(made, base, hear, **options))


# ------------------------------------------------------------------------------------------ objects as files


def _name_inputs(
    values: Tables, base: Path, schedule: Schedule, structures: list[Atoms] | None, calculator: Packed | None
) -> None:
    """Let the settings name the files that the objects will be in.

    Raises:
        SettingsError: the settings name others, or there is nothing that labels.
    """
    if structures is not None:
        values.setdefault("run_dir", f"{stem_of(structures)}_run")
    folder = Path(os.path.relpath(Path(values.get("run_dir", ".")) / "inputs", base))
    if structures is not None:
        _refuse_both(values, "structures", _OWN_STRUCTURES)
        _fill_in(values, schedule, structures, folder / _STRUCTURES)
    if calculator is not None:
        _refuse_both(values, "calculator", {"reference": ("calculator", "arguments")})
        values["reference"] = {**values.get("reference", {}), **calculator.settings(str(folder / _CALCULATOR))}
    elif structures is not None and "reference" not in values:
        raise SettingsError("There is nothing that labels: give a calculator, or set reference.calculator.")


def _refuse_both(values: Tables, argument: str, keys: dict[str, tuple[str, ...]]) -> None:
    for table, names in keys.items():
        given = values.get(table)
        for name in names:
            if isinstance(given, dict) and name in given:
                raise SettingsError(f"Give {argument} or the setting {table}.{name}, not both.")


def _fill_in(values: Tables, schedule: Schedule, structures: list[Atoms], file: Path) -> None:
    """What `ubmd init` proposes for these structures, where the settings say nothing."""
    if schedule is DYNAMIC and "crystal" not in values and ("model" in values or "training" in values):
        values.setdefault("start", {})["file"] = str(file)
        return
    suggestions = schedule.propose(structures, file, stem_of(structures))
    suggestions.pop("reference.calculator", None)
    fill(values, suggestions)


def _write_inputs(folder: RunFolder, structures: list[Atoms] | None, calculator: Packed | None) -> None:
    """Write the objects into the folder of the run; one with labels keeps those that it was started with.

    A calculator of the same class and parameters is the same one: the bytes of a class from a notebook differ whenever
    it is defined again.

    Raises:
        SettingsError: a run with labels was started from other structures.
    """
    inputs, begun = folder.path / "inputs", folder.has_labels()
    if structures is not None:
        path, text = inputs / _STRUCTURES, as_extxyz(structures)
        if begun and path.exists() and path.read_text(encoding="utf-8") != text:
            raise SettingsError(
                f"The run in {folder.path} was started from other structures ({path}): give these, or set another "
                "run_dir."
            )
        write_text(path, text)
    if calculator is not None and not (begun and (inputs / _CALCULATOR).exists()):
        calculator.keep(inputs / _CALCULATOR)
