"""Before a dynamic run: its box, whether settings and files fit, and what would be run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ase import Atoms

from ubmd.data.constraints import fixed_atoms, is_fixed
from ubmd.data.periodicity import describe_periodicity
from ubmd.data.state import bare, check_state, describe_state, state_info, take_state
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, SettingsError
from ubmd.learning.held_out import given_test_set
from ubmd.learning.reference import check_here
from ubmd.learning.start import check_md_device, check_movable
from ubmd.potentials.kinds import kind_of_settings
from ubmd.settings.dynamic import DynamicRunSettings, box_file


def ideal_box(settings: DynamicRunSettings, base: Path) -> Atoms:
    """The box of the dynamics, without displacements, in the state (charges, moments, masses) of its file.

    Raises:
        SettingsError: its file is missing, or its state cannot be that of a repeated box.
        DataError: it holds no structure.
    """
    path, info = box_file(settings, base), settings.reference.info
    atoms = read_structures(path, compare=False)[0]
    try:
        check_state(atoms, info)
        fixed_atoms(atoms)
    except DataError as error:
        raise SettingsError(f"{path}: {error}") from None
    keys = state_info(atoms, info)
    if keys and max(settings.start.repeat) > 1:
        name, value = next(iter(keys.items()))
        raise SettingsError(
            f"start.repeat: {path} has {name} = {value}, which is that of the unrepeated box; give a file of the "
            "repeated box as start.file."
        )
    box = bare(atoms, info)
    if settings.start.file is None:
        box = kind_of_settings(settings).learner_class().ideal(box, settings)
        take_state(box, atoms, info)
    repeated: Atoms = box.repeat(settings.start.repeat)
    return repeated


def input_files(settings: DynamicRunSettings, base: Path) -> dict[str, Path]:
    """Key -> file, of the settings whose files must not change during a run.

    Raises:
        SettingsError: a file is not there.
    """
    return {"start.file": box_file(settings, base)} | kind_of_settings(settings).learner_class().inputs(settings, base)


def check_box(settings: DynamicRunSettings, base: Path) -> Atoms:
    """The box, if LAMMPS can move it.

    Raises:
        SettingsError: it cannot, or the file is missing.
        DataError: the file holds no structure.
    """
    box = ideal_box(settings, base)
    check_movable(box, box_file(settings, base).name, settings.reference.min_distance)
    return box


def verify(
    settings: DynamicRunSettings,
    base: Path,
    remark: Callable[[str], None],
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Check a given test set.

    ``remark`` is called with sentences on labels that may be a mistake, ``tell`` with where they were taken from.

    The box is checked where the run begins (`check_box`).

    Raises:
        DataError: the test set cannot be used.
    """
    given_test_set(settings, base, remark, tell)


def check(settings: DynamicRunSettings, base: Path) -> Iterator[str]:
    """Check the settings against the structures; yields sentences on what would be run.

    Raises:
        SettingsError, DataError: the first mistake.
    """
    box = check_box(settings, base)
    said: list[str] = []
    given_test_set(
        settings,
        base,
        lambda sentence: said.append(f"Remark: {sentence}"),
        lambda sentence: said.append(f"Labels of {sentence}"),
    )
    yield from said
    if settings.bias is not None:
        for element in settings.bias.species:
            if element not in set(box.symbols):
                raise SettingsError(f"bias.species names {element}, but the box does not contain it; remove it.")
    state = describe_state(box, settings.reference.info)
    if state:
        yield f"In every structure the calculator sees: {state}."
    if fixed := int(is_fixed(box).sum()):
        yield (
            f"Fixed atoms (FixAtoms): {fixed} of {len(box)}. They stay where they are in all MD; temperatures, bias "
            "and errors are those of the others."
        )
    dynamic = settings.dynamic
    check_md_device(dynamic.device, "dynamic.device", settings.workers)
    temperatures = ", ".join(f"{t:g}" for t in dynamic.temperatures)
    yield (f"Box: {box.symbols.formula.format('hill')}, {len(box)} atoms, {describe_periodicity(box)}.")
    yield (
        f"{dynamic.trajectories} trajectories of {dynamic.steps:,} steps "
        f"({dynamic.steps * dynamic.timestep / 1000.0:g} ps) at {temperatures} K, "
        f"{'biased' if settings.bias else 'unbiased'}; at most {dynamic.labels} reference calculations."
    )
    yield from kind_of_settings(settings).learner_class().plan(settings, base, box)
    yield from check_here(settings.reference, settings.workers, base)
