"""Atoms that are kept fixed, and structures in which something can move.

A user fixes atoms by ASE's FixAtoms. Structures that come from such a start have them in the array ``fixed`` instead
(True where an atom is fixed): a constraint would make ASE, and every program that reads the data set with it, report
forces of zero for them.
"""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from ubmd.errors import DataError

FIXED = "fixed"


def fixed_atoms(atoms: Atoms) -> np.ndarray:
    """Indices of the atoms that ASE's FixAtoms fixes, sorted, from 0 (-1 is the last atom).

    Raises:
        DataError: a constraint of another kind, which is not supported, or one on atoms that are not there.
    """
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise DataError(
                f"the structure has a constraint {type(constraint).__name__}, but only FixAtoms is supported: remove "
                "it with atoms.set_constraint()."
            )
    return held_atoms(atoms)


def check_free(atoms: Atoms) -> None:
    """DataError if no atom can move: constraints other than FixAtoms, or FixAtoms on every atom."""
    fixed_atoms(atoms)
    if is_fixed(atoms).all():
        raise DataError("all atoms are fixed (FixAtoms), so that nothing would move: leave some of them free.")


def is_fixed(atoms: Atoms) -> np.ndarray:
    """Whether each atom [n] is fixed, by FixAtoms or by the array ``fixed``."""
    fixed = np.zeros(len(atoms), dtype=bool)
    if not atoms.constraints and FIXED not in atoms.arrays:
        return fixed
    fixed[held_atoms(atoms)] = True
    noted = np.asarray(atoms.arrays.get(FIXED, fixed))
    return fixed | (noted.astype(bool) if noted.dtype.kind in "bui" else False)


def take_fixed(atoms: Atoms, source: Atoms) -> None:
    """Note in the array ``fixed`` which atoms are fixed in another structure of the same atoms; nothing if none is."""
    fixed = is_fixed(source)
    if fixed.any():
        atoms.set_array(FIXED, fixed)


def held_atoms(atoms: Atoms) -> np.ndarray:
    """Indices of the atoms that FixAtoms fixes, whatever other constraints there are."""
    held = [np.asarray(c.index, dtype=np.int64) for c in atoms.constraints if isinstance(c, FixAtoms)]
    indices = np.concatenate([np.empty(0, dtype=np.int64), *held])
    out = indices[(indices < -len(atoms)) | (indices >= len(atoms))]
    if len(out):
        raise DataError(f"FixAtoms fixes atom {out[0]}, but there are only {len(atoms)} atoms (counted from 0).")
    return np.unique(indices % max(1, len(atoms)))
