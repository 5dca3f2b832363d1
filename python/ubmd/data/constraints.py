"""Atoms that are kept fixed (FixAtoms), and structures in which something can move."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from ubmd.errors import DataError


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
    if len(fixed_atoms(atoms)) == len(atoms):
        raise DataError("all atoms are fixed (FixAtoms), so that nothing would move: leave some of them free.")


def held_atoms(atoms: Atoms) -> np.ndarray:
    """Indices of the atoms that FixAtoms fixes, whatever other constraints there are."""
    held = [np.asarray(c.index, dtype=np.int64) for c in atoms.constraints if isinstance(c, FixAtoms)]
    indices = np.concatenate([np.empty(0, dtype=np.int64), *held])
    out = indices[(indices < -len(atoms)) | (indices >= len(atoms))]
    if len(out):
        raise DataError(f"FixAtoms fixes atom {out[0]}, but there are only {len(atoms)} atoms (counted from 0).")
    return np.unique(indices % max(1, len(atoms)))
