"""One label: energy, forces and stress of a structure, or the reason why it has none."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.abc import GetPropertiesMixin
from ase.calculators.calculator import SCFError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic

from ubmd.data.geometry import check_geometry, unfit_structures
from ubmd.data.state import bare, check_state, state_hash
from ubmd.errors import LabelError, SettingsError, describe, one_line
from ubmd.faults import FULL, check_machine, in_worker
from ubmd.references.cache import through_cache
from ubmd.references.calculators import make_calculator, variables
from ubmd.references.programs import scratch_folder
from ubmd.references.results import Results, read_results
from ubmd.settings import ReferenceSettings

_FEWEST_FOR_MEDIAN = 3
_FEWEST_FOR_FORCES = 5  # labels before
_RUNAWAY = 5.0  # largest force over that of all labels before
_MOVED = 0.01  # Å; a structure further than this from the requested one is another one

# One calculator per process: building a force field or starting a code can cost more than a label.
_cache: dict[tuple[str, str], GetPropertiesMixin] = {}
_states: dict[tuple[str, str], str] = {}  # of the structures that these calculators computed last


def cached_calculator(settings: ReferenceSettings, base: Path, state: str = "") -> GetPropertiesMixin:
    """The calculator of these settings in this process, made on first use, and again for each change of state.

    ASE's calculators return their last results for a structure that differs only in tags, masses or ``info``.

    Args:
        settings: of the reference.
        base: folder that file arguments are relative to.
        state: `ubmd.data.state.state_hash` of the structures that follow.

    Raises:
        SettingsError: see `make_calculator`.
    """
    key = _key(settings, base)
    if _states.get(key, state) != state:
        _cache.pop(key, None)
    if key not in _cache:
        _cache[key] = make_calculator(settings, base)
    _states[key] = state
    return _cache[key]


def _key(settings: ReferenceSettings, base: Path) -> tuple[str, str]:
    return settings.model_dump_json(), str(Path(base).resolve())


def label(atoms: Atoms, settings: ReferenceSettings, base: Path) -> Atoms:
    """A labelled copy of a structure, for one call in a worker process (the caller sets the time-out).

    Args:
        atoms: the structure; not changed. The calculator sees a copy of its own, with charges, moments, tags, masses
            and the keys of ``info`` that the settings name: what the cache tells apart. Constraints are left out: a
            label has the reference's own forces.
        settings: calculator, its arguments, the cache and the limits beyond which a label is rejected.
        base: folder that file arguments are relative to.

    Returns:
        The copy with a SinglePointCalculator: energy (eV; the force-consistent one where the calculator has it),
        forces (eV/Å) and, for fully periodic structures if the calculator has it, stress (eV/Å^3, 6 Voigt).

    Raises:
        LabelError: one sentence with the reason for the rejection.
        MachineError: the machine failed, no fault of the structure.
        SettingsError: the calculator cannot be made.
    """
    check_geometry(atoms, settings.min_distance)
    copy: Atoms = atoms.copy()
    copy.set_constraint()
    with unfit_structures():
        check_state(copy, settings.info)
    results = through_cache(copy, settings, base, lambda: _compute(bare(copy, settings.info), settings, base))
    check_force(np.asarray(results["forces"]), settings.force_limit)
    if settings.noise > 0.0:
        results["forces"] = results["forces"] + settings.noise * _noise(copy)
    copy.calc = SinglePointCalculator(copy, **results)
    return copy


def _noise(atoms: Atoms) -> np.ndarray:
    """Standard normal numbers [n, 3] that belong to a structure: a label that is computed again is the same."""
    place = atoms.positions.tobytes() + atoms.cell[:].tobytes() + atoms.numbers.tobytes()
    seed = int.from_bytes(hashlib.sha256(place).digest()[:16], "little")
    return np.random.default_rng(seed).standard_normal((len(atoms), 3))


def _compute(atoms: Atoms, settings: ReferenceSettings, base: Path) -> Results:
    """Energy, forces and perhaps stress; whatever a foreign code raises becomes a LabelError.

    Raises:
        MachineError: the machine failed.
        OSError: the disk is full.
        KeyboardInterrupt: a user's Ctrl-C, outside of workers.
    """
    calculator = cached_calculator(settings, base, state_hash(atoms, settings.info))
    try:
        with surroundings(calculator, settings):
            results = read_results(atoms, calculator)
        _check_computed(atoms, calculator)
    except SettingsError:
        raise
    except BaseException as error:  # some libraries end the process (sys.exit), or have their own kinds
        # The state of a calculator after a failure is unknown (ASE's keep results): the next label starts a new one.
        _cache.pop(_key(settings, base), None)
        if isinstance(error, LabelError):
            raise
        raise_if_not_its_own(error)
        what = "did not converge" if _tells_no_convergence(error) else "failed"
        raise LabelError(f"The reference {what} ({describe(error)}).") from error
    if _is_unconverged(calculator):
        raise LabelError("The reference did not converge.")
    for name, value in results.items():
        if not np.isfinite(value).all():
            raise LabelError(f"The reference returned a label that is not finite ({name}).")
    return results


def _is_unconverged(calculator: GetPropertiesMixin) -> bool:
    """Whether a calculator says so (some have a method or another thing of this name)."""
    converged = getattr(calculator, "converged", True)
    return isinstance(converged, bool | np.bool_) and not converged


def _check_computed(atoms: Atoms, calculator: GetPropertiesMixin) -> None:
    """LabelError if the calculator's own record says that it computed another structure.

    A structure that was shifted as a whole, or whose atoms went to other periodic images, is still the same.
    """
    computed = getattr(calculator, "atoms", None)
    if not isinstance(computed, Atoms):
        return
    if not np.array_equal(computed.numbers, atoms.numbers):
        raise LabelError("The reference computed a structure with elements other than those requested.")
    if atoms.pbc.any() and not np.allclose(computed.cell[:], atoms.cell[:], rtol=0.0, atol=_MOVED):
        raise LabelError("The reference computed a structure with a cell other than the one requested.")
    if (atoms.pbc & ~computed.pbc).any():
        raise LabelError("The reference computed the structure without its periodicity (pbc).")
    moved = computed.positions - atoms.positions
    distance = find_mic(moved - moved[0], atoms.cell, atoms.pbc)[1]
    if distance.max() > _MOVED:
        atom = int(np.argmax(distance))
        raise LabelError(
            f"The reference moved the atoms before it computed them (atom {atom} by {distance[atom]:.2f} Å relative to "
            "atom 0, counted from 0): the label is that of another structure."
        )


def raise_if_not_its_own(error: BaseException) -> None:
    """Raise an error of a calculator again if it is the fault of the machine, the disk or the user, not the structure.

    Raises:
        MachineError: with the machine's fault.
        BaseException: the error itself.
    """
    if isinstance(error, OSError) and error.errno in FULL:
        raise error
    if isinstance(error, KeyboardInterrupt) and not in_worker():
        raise error
    check_machine(error)


@contextmanager
def surroundings(calculator: GetPropertiesMixin, settings: ReferenceSettings) -> Iterator[None]:
    """What a calculator finds while it computes: the variables of the settings, and a folder for its files."""
    with variables(settings.environment), _own_directory(calculator), _one_process():
        yield


@contextmanager
def _one_process() -> Iterator[None]:
    """Only the process that has begun leaves the block: a child that a calculator forked and let return ends here."""
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(0)


@contextmanager
def _own_directory(calculator: GetPropertiesMixin) -> Iterator[None]:
    """A folder of its own for a calculator that would write to the working directory.

    ASE's file-based calculators write to ``directory``, '.' by default, where several workers would overwrite each
    other's files. A directory in the settings is left alone.
    """
    before = getattr(calculator, "directory", None)
    if str(before) != "." or not getattr(calculator, "writes_files", True):
        yield
        return
    kind: Any = type(before)  # GenericFileIOCalculator wants a Path, older calculators a text
    with scratch_folder() as folder:
        setattr(calculator, "directory", kind(folder))  # noqa: B010 (not every calculator has one)
        try:
            yield
        finally:
            setattr(calculator, "directory", before)  # noqa: B010


def _tells_no_convergence(error: BaseException) -> bool:
    return isinstance(error, SCFError) or "not converge" in one_line(error).lower()


def check_force(forces: np.ndarray, force_limit: float) -> None:
    """LabelError for forces [n, 3] (eV/Å) that are absurdly large."""
    size = np.linalg.norm(forces, axis=1)
    largest = int(np.argmax(size))
    if size[largest] > force_limit:
        raise LabelError(
            f"The force on atom {largest} (from 0) is {size[largest]:.1f} eV/Å, above the limit {force_limit:g} eV/Å "
            "(reference.force_limit)."
        )


def energy_jumps(new: Sequence[Atoms], known: Sequence[Atoms], limit: float) -> dict[int, str]:
    """Labels whose energy is implausible compared with those known before, as for SCF solutions in a wrong state.

    Energies per atom are compared with the median of the labels of the same composition, those known before or, if
    there are none yet, the new ones themselves. Fewer than three are not enough.

    Args:
        new: labelled structures.
        known: labels accepted before.
        limit: largest distance from the median, eV per atom.

    Returns:
        index in ``new`` -> one sentence with the reason.
    """
    reasons = {}
    before, now = _energies_by_composition(known), _energies_by_composition(new)
    medians = {name: (len(same), float(np.median(same))) for name, same in (now | before).items()}
    for k, atoms in enumerate(new):
        count, median = medians[_composition(atoms)]
        distance = _energy_per_atom(atoms) - median
        if count >= _FEWEST_FOR_MEDIAN and abs(distance) > limit:
            reasons[k] = (
                f"The energy is {distance:+.2f} eV/atom away from the median of {count} labels of the same "
                f"composition, beyond {limit:g} eV/atom (reference.energy_limit)."
            )
    return reasons


def force_jumps(new: Sequence[Atoms], known: Sequence[Atoms]) -> dict[int, str]:
    """Labels of a crystal whose largest force is out of proportion: their atoms had left their sites.

    Learning such a frame makes a potential of displacements worse for all others; in SnSe one raised the noise from
    0.005 to 3 eV/Å. Fewer than _FEWEST_FOR_FORCES labels say too little of what is usual; after that many, no label of
    nine runs of SnSe at 300 and 600 K exceeded 1.7 times the largest before it.

    Args:
        new: labelled structures.
        known: labels accepted before.

    Returns:
        index in ``new`` -> one sentence with the reason.
    """
    if len(known) < _FEWEST_FOR_FORCES:
        return {}
    before = max(_largest_force(atoms) for atoms in known)
    return {
        k: f"The largest force is {force:.3g} eV/Å, that of all {len(known)} labels before {before:.3g} eV/Å: an atom "
        "had left its site, and such a frame is not learnt."
        for k, force in enumerate(map(_largest_force, new))
        if force > _RUNAWAY * before
    }


def _largest_force(atoms: Atoms) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


def _energies_by_composition(structures: Sequence[Atoms]) -> dict[str, list[float]]:
    """Energies per atom, eV, of the structures of each composition."""
    energies: dict[str, list[float]] = {}
    for atoms in structures:
        energies.setdefault(_composition(atoms), []).append(_energy_per_atom(atoms))
    return energies


def _composition(atoms: Atoms) -> str:
    return str(atoms.symbols.formula.reduce()[0].format("hill"))


def _energy_per_atom(atoms: Atoms) -> float:
    return float(atoms.get_potential_energy() / len(atoms))
