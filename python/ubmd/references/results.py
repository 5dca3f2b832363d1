"""What a calculator returns, as plain numbers: there are many ways to say "none"."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.abc import GetPropertiesMixin
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import full_3x3_to_voigt_6_stress

from ubmd.data.periodicity import has_stress, stress_within
from ubmd.errors import LabelError, one_line

Results = dict[str, np.ndarray | float]
"""energy (eV), forces (eV/Å) and perhaps stress (eV/Å^3, 6 Voigt, tension positive)"""


def read_results(atoms: Atoms, calculator: GetPropertiesMixin) -> Results:
    """Energy, forces and, for periodic structures if there is one, the stress of a structure.

    Of slabs and wires the stress has no components along the free directions.

    Args:
        atoms: the structure; not changed, the calculator gets copies.
        calculator: computes it. None, an exception that says "not implemented", a method that is not there, and a
            stress of zeros beside forces that are not zero mean that it has no stress.

    Raises:
        LabelError: there is no energy, there are no forces, or they are not real numbers.
    """
    results: Results = {"forces": read_forces(atoms, calculator)}
    results["energy"] = _energy(atoms, calculator)
    if has_stress(atoms):
        stress = _stress(atoms, calculator)
        if stress is not None and (stress.any() or not np.any(results["forces"])):
            results["stress"] = stress_within(stress, atoms)
    return results


def read_forces(atoms: Atoms, calculator: GetPropertiesMixin) -> np.ndarray:
    """Forces [n, 3] of a structure, eV/Å; it is not changed, the calculator gets a copy.

    Raises:
        LabelError: there are none, they are not real numbers, one per component, or perhaps not in the order of the
            atoms.
    """
    copy = _apart(atoms, calculator)
    try:
        forces = as_numbers("forces", copy.get_forces(apply_constraint=False))
    except PropertyNotImplementedError as error:
        raise LabelError(f"The reference computes no forces ({error}).") from error
    n_atoms = len(atoms)
    if forces.shape != (n_atoms, 3):
        raise LabelError(
            f"The reference returned forces of shape {forces.shape} for {n_atoms} atoms instead of ({n_atoms}, 3)."
        )
    if _is_reordered(atoms, copy):
        raise LabelError(
            "The reference sorted the atoms that it was given: its forces may be in another order. Let it sort a copy."
        )
    return forces


def _is_reordered(before: Atoms, after: Atoms) -> bool:
    """Whether a structure has the same atoms as before in another order."""
    if len(before) != len(after):
        return False
    for columns in ([0], [0, 1, 2, 3]):  # elements alone: the calculator may have moved the atoms, too
        old, new = (np.column_stack([a.numbers, a.positions])[:, columns] for a in (before, after))
        if not np.array_equal(old, new) and np.array_equal(old[np.lexsort(old.T)], new[np.lexsort(new.T)]):
            return True
    return False


def _apart(atoms: Atoms, calculator: GetPropertiesMixin) -> Atoms:
    """A copy for one question to a calculator, which may change it: wrap it, shift it, give it a cell."""
    copy: Atoms = atoms.copy()
    copy.calc = calculator
    return copy


def as_numbers(name: str, value: Any) -> np.ndarray:
    """A new array of float64 from what a calculator returned as its ``name``.

    Raises:
        LabelError: it is None, masked, complex, or contains something other than numbers.
    """
    if value is None:
        raise LabelError(f"The reference returned no {name} (None).")
    if np.ma.is_masked(value):
        raise LabelError(f"The reference returned {name} with masked values.")
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise LabelError(
            f"The reference returned {name} that are not an array of numbers ({one_line(error)})."
        ) from error
    for item in array.ravel() if array.dtype == object else array.ravel()[:1].tolist():
        _check_kind(name, item)
    return np.array(array, dtype=float)


def _check_kind(name: str, value: Any) -> None:
    """LabelError unless a value is a real number."""
    kind = "O" if value is None else np.asarray(value).dtype.kind
    if kind == "c":
        raise LabelError(f"The reference returned {name} with complex numbers.")
    if kind not in "iuf":
        raise LabelError(f"The reference returned {name} with values that are not numbers ({type(value).__name__}).")


def _energy(atoms: Atoms, calculator: GetPropertiesMixin) -> float:
    """The energy whose derivative the forces are, where the calculator tells it apart (smeared electrons)."""
    energy = as_numbers("energy", _free_energy(atoms, calculator))
    if energy.size != 1:
        raise LabelError(f"The reference returned an energy of shape {energy.shape}, not one number.")
    return float(energy.item())


def _free_energy(atoms: Atoms, calculator: GetPropertiesMixin) -> Any:
    """``free_energy`` of a calculator, else its ``energy``."""
    try:
        energy = calculator.get_potential_energy(_apart(atoms, calculator), force_consistent=True)
    except NotImplementedError:
        energy = None
    except TypeError as error:
        if "force_consistent" not in str(error):  # a calculator older than this keyword
            raise
        energy = None
    return calculator.get_potential_energy(_apart(atoms, calculator)) if energy is None else energy


def _stress(atoms: Atoms, calculator: GetPropertiesMixin) -> np.ndarray | None:
    """Stress [6], or None if the calculator has none."""
    method = getattr(calculator, "get_stress", None)
    try:
        value = None if method is None else method(_apart(atoms, calculator))
    except NotImplementedError:
        value = None
    if value is None:
        return None
    stress = as_numbers("stress", value)
    if stress.shape in ((3, 3), (9,)):
        return np.array(full_3x3_to_voigt_6_stress(stress.reshape(3, 3)))
    if stress.shape != (6,):
        raise LabelError(f"The reference returned a stress of shape {stress.shape} instead of (6,) or (3, 3).")
    return stress
