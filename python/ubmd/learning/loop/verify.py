"""Before a run: whether its settings fit the start structures, and whether a given test set can be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ase import Atoms
from ase.data import atomic_numbers

from ubmd.data.constraints import check_free, is_fixed
from ubmd.data.state import describe_state, mixed_states
from ubmd.errors import DataError, SettingsError
from ubmd.files import check_name
from ubmd.learning.given import elements_of, given_remarks, read_given, set_aside
from ubmd.learning.held_out import given_test_set
from ubmd.learning.start import check_md_device, check_start, check_states, read_start
from ubmd.potentials.baseline import check_baseline
from ubmd.potentials.kinds import backend_of, check_backend, check_training_device
from ubmd.potentials.starting import file_to_start_from
from ubmd.runs.folder import RunFolder
from ubmd.settings import RunSettings

_KEYS = 8  # that a sentence lists
_FEWEST = 2  # labels to begin with: one trains, one validates


def verify(
    settings: RunSettings,
    base: Path,
    remark: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
    here: bool = True,
) -> list[Atoms]:
    """Check the settings against the start structures, and a given test set; returns the start structures.

    ``remark`` is called with sentences on labels that may be a mistake, ``tell`` with where they were taken from.
    ``here``: whether tasks run where the settings say, rather than in an executor that was given.

    Raises:
        DataError: the file with the start structures, or with the test set, cannot be used.
        SettingsError: it is missing, or the settings name elements or atoms that the structures don't have.
    """
    check_run_dir(Path(settings.run_dir))
    if settings.md.colvars is not None and not (base / settings.md.colvars).is_file():
        raise SettingsError(
            f"md.colvars: there is no file {base / settings.md.colvars} (the path is relative to the settings file)."
        )
    given = read_given(settings, base, remark, tell)
    structures = read_start(settings, base, given)
    if settings.start.labels is not None:
        _check_given(given, settings, settings.start.labels, remark)
    present = elements_of([*structures, *given])
    found = ", ".join(present)
    for key, elements in (("bias.species", settings.bias.species), ("model.elements", settings.model.elements or ())):
        for element in elements:
            if element not in atomic_numbers:
                raise SettingsError(f"{key} names '{element}', which is not an element.")
    for element in settings.bias.species:
        if element not in present:
            raise SettingsError(
                f"bias.species names {element}, but {settings.start.source} holds only {found}; remove it."
            )
    for element in present:
        if settings.model.elements and element not in settings.model.elements:
            raise SettingsError(f"{settings.start.source} holds {element}; add it to model.elements.")
    check_baseline(settings.model, {*present, *(settings.model.elements or ())})
    backend = check_backend(settings.model, settings.uncertainty, base)
    check_training_device(backend, settings.training)
    if here:
        check_md_device(settings.md.device, "md.device", settings.workers)
    model_to_start_from(settings, base)
    check_start(structures, settings)
    check_states(structures, settings)
    if settings.start.file is not None and not settings.start.mixed_states:
        _check_given_states(structures, given, settings)
    _check_sampled(structures[0], settings, base)
    smallest = min(len(atoms) for atoms in structures)
    for name, indices in settings.variables.torsions.items():
        if max(indices) >= smallest or min(indices) < 0 or len(set(indices)) < 4:
            raise SettingsError(
                f"variables.torsions.{name} = {list(indices)} needs four different atoms, counted from 0; "
                f"{settings.start.source} has {smallest}."
            )
    _check_test_states(structures, given_test_set(settings, base, remark, tell), settings, remark)
    return structures


def input_files(settings: RunSettings, base: Path) -> dict[str, Path]:
    """Key -> file, of the settings whose files must not change during a run."""
    named = {
        "start.file": settings.start.file,
        "start.labels": settings.start.labels,
        "md.colvars": settings.md.colvars,
    }
    return {key: base / path for key, path in named.items() if path is not None}


def model_to_start_from(settings: RunSettings, base: Path) -> Path | None:
    """The file of ``start.model``, if it is set: the run's own copy, once it has labels, since another may change.

    Raises:
        SettingsError: there is none.
    """
    if settings.start.model is None:
        return None
    folder = RunFolder(Path(settings.run_dir))
    if folder.start_model.exists() and folder.has_labels():
        return folder.start_model
    backend = backend_of(settings.model, base)
    return file_to_start_from(base / settings.start.model, backend, "start.model")


def _check_given(given: list[Atoms], settings: RunSettings, file: Path, remark: Callable[[str], None]) -> None:
    """SettingsError if given labels cannot be used in these settings; remarks on what may be a mistake in them."""
    usable, refused = set_aside(given, settings.reference)
    if not usable:
        raise SettingsError(
            f"start.labels: no structure of {file} can be used (are its units eV and Å?); the first: "
            f"{refused[0].info['reason']}"
        )
    if len(usable) + settings.start.count < _FEWEST:
        raise SettingsError(
            f"start.labels: {file} has only one structure, and one more is needed for the validation: set start.count."
        )
    for sentence in given_remarks(given, refused, file):
        remark(sentence)


def _check_given_states(structures: list[Atoms], given: list[Atoms], settings: RunSettings) -> None:
    """SettingsError if given labels are of another state than the start structures: a model cannot tell them apart."""
    n = len(structures)

    def name(k: int) -> str:
        return f"frame {k} of {settings.start.file}" if k < n else f"frame {given[k - n].info['replica']}"

    for first, second, difference in mixed_states([*structures, *given], settings.reference.info):
        if second >= n:
            raise SettingsError(
                f"{settings.start.labels}: {name(second)} has the same composition as {name(first)} but {difference}, "
                "which a model cannot tell apart: start from one state, or set start.mixed_states = true."
            )


def _check_sampled(atoms: Atoms, settings: RunSettings, base: Path) -> None:
    """SettingsError if reference MD is to make the test set, but every atom of its start is fixed."""
    test = settings.test
    if test is None or (test.file is not None and (base / test.file).exists()):
        return
    try:
        check_free(atoms)
    except DataError as error:
        raise SettingsError(f"{settings.start.source}, from which reference MD makes the test set: {error}") from None


def _check_test_states(
    structures: list[Atoms], test: list[Atoms], settings: RunSettings, remark: Callable[[str], None]
) -> None:
    """A remark on a given test set that says that its structures are in another state than the start structures."""
    n = len(structures)
    for first, second, difference in mixed_states([*structures, *test], settings.reference.info):
        if first < n <= second:
            remark(
                f"test.file: frame {second - n} has the composition of frame {first} of {settings.start.source} but "
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
