"""Before a run: whether its settings fit the start structures, and whether a given test set can be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ase import Atoms
from ase.data import atomic_numbers

from ubmd.data.constraints import check_free, is_fixed
from ubmd.data.state import describe_state, mixed_states
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, SettingsError
from ubmd.files import check_name
from ubmd.learning.held_out import given_test_set
from ubmd.learning.start import check_start, check_states
from ubmd.potentials.baseline import check_baseline
from ubmd.potentials.kinds import check_backend
from ubmd.settings import RunSettings

_KEYS = 8  # that a sentence lists


def verify(
    settings: RunSettings,
    base: Path,
    remark: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Atoms]:
    """Check the settings against the start structures, and a given test set; returns the start structures.

    ``remark`` is called with sentences on labels that may be a mistake, ``tell`` with where they were taken from.

    Raises:
        DataError: the file with the start structures, or with the test set, cannot be used.
        SettingsError: it is missing, or the settings name elements or atoms that the structures don't have.
    """
    check_run_dir(Path(settings.run_dir))
    path = base / settings.start.file
    if not path.exists():
        raise SettingsError(f"start.file: there is no file {path} (the path is relative to the settings file).")
    if settings.md.colvars is not None and not (base / settings.md.colvars).is_file():
        raise SettingsError(
            f"md.colvars: there is no file {base / settings.md.colvars} (the path is relative to the settings file)."
        )
    structures = read_start(settings, base)
    present = sorted({symbol for atoms in structures for symbol in atoms.symbols}, key=atomic_numbers.__getitem__)
    found = ", ".join(present)
    for key, elements in (("bias.species", settings.bias.species), ("model.elements", settings.model.elements or ())):
        for element in elements:
            if element not in atomic_numbers:
                raise SettingsError(f"{key} names '{element}', which is not an element.")
    for element in settings.bias.species:
        if element not in present:
            raise SettingsError(
                f"bias.species names {element}, but {settings.start.file} holds only {found}; remove it."
            )
    for element in present:
        if settings.model.elements and element not in settings.model.elements:
            raise SettingsError(f"{settings.start.file} holds {element}; add it to model.elements.")
    check_baseline(settings.model, {*present, *(settings.model.elements or ())})
    check_backend(settings.model, settings.uncertainty, base)
    check_start(structures, settings)
    check_states(structures, settings)
    _check_sampled(structures[0], settings, base)
    smallest = min(len(atoms) for atoms in structures)
    for name, indices in settings.variables.torsions.items():
        if max(indices) >= smallest or min(indices) < 0 or len(set(indices)) < 4:
            raise SettingsError(
                f"variables.torsions.{name} = {list(indices)} needs four different atoms, counted from 0; "
                f"{settings.start.file} has {smallest}."
            )
    _check_test_states(structures, given_test_set(settings, base, remark, tell), settings, remark)
    return structures


def read_start(settings: RunSettings, base: Path) -> list[Atoms]:
    """The start structures. They need no labels, so that they may lack keys that other files have."""
    return read_structures(base / settings.start.file, settings.labels, missing_ok=True)


def input_files(settings: RunSettings, base: Path) -> dict[str, Path]:
    """Key -> file, of the settings whose files must not change during a run."""
    colvars = settings.md.colvars
    return {"start.file": base / settings.start.file} | ({} if colvars is None else {"md.colvars": base / colvars})


def _check_sampled(atoms: Atoms, settings: RunSettings, base: Path) -> None:
    """SettingsError if reference MD is to make the test set, but every atom of its start is fixed."""
    test = settings.test
    if test is None or (test.file is not None and (base / test.file).exists()):
        return
    try:
        check_free(atoms)
    except DataError as error:
        raise SettingsError(f"{settings.start.file}, from which reference MD makes the test set: {error}") from None


def _check_test_states(
    structures: list[Atoms], test: list[Atoms], settings: RunSettings, remark: Callable[[str], None]
) -> None:
    """A remark on a given test set that says that its structures are in another state than the start structures."""
    n = len(structures)
    for first, second, difference in mixed_states([*structures, *test], settings.reference.info):
        if first < n <= second:
            remark(
                f"test.file: frame {second - n} has the composition of frame {first} of {settings.start.file} but "
                f"{difference}; labels of two states cannot be compared."
            )
            return


def state_remarks(structures: list[Atoms], settings: RunSettings) -> Iterator[str]:
    """What the start structures pass on to all others, and what they don't, in sentences."""
    state = sorted({describe_state(atoms, settings.reference.info) for atoms in structures} - {""})
    if state:
        yield f"In every structure the calculator sees: {'; or '.join(state)}."
    unseen = sorted({key for atoms in structures for key in atoms.info} - {*settings.reference.info})
    if unseen:
        more = ", ..." if len(unseen) > _KEYS else ""
        yield (
            f"The calculator does not see these keys of info: {', '.join(map(str, unseen[:_KEYS]))}{more} (list those "
            "that it reads in reference.info)."
        )
    fixed = [int(is_fixed(atoms).sum()) for atoms in structures]
    if any(fixed):
        yield (
            f"Fixed atoms (FixAtoms): {_counts(fixed)} of {_counts([len(atoms) for atoms in structures])}. They stay "
            "where they are in all MD; temperatures, bias and thresholds are those of the others."
        )


def _counts(numbers: list[int]) -> str:
    """One number, or the range of several."""
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} to {most}"


def check_run_dir(path: Path) -> None:
    """SettingsError if the folder of the run cannot be made or written, as far as this is known without making it."""
    check_name(path, "run_dir")
    there = existing_folder(path)
    reason = "" if os.access(there, os.W_OK | os.X_OK) else f"{there} is read-only"
    if not there.is_dir():
        reason = f"{there} is a file"
    if reason:
        raise SettingsError(f"run_dir = {path} cannot be made or written ({reason}); set another run_dir.")


def existing_folder(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.exists())
