"""Structures that are periodic in some directions only: slabs, wires, and what a stress is there.

Stress acts within the space that the periodic vectors span. It is, as everywhere in ASE, dE/d(strain) divided by the
volume of the cell, free vectors included; times the length of a slab's cell along its normal, V/A, it is the force per
length that does not depend on the empty space.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry.cell import complete_cell
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

Array = NDArray[np.float64]


def is_partly_periodic(atoms: Atoms) -> bool:
    """Whether a structure is periodic in one or two directions."""
    return bool(atoms.pbc.any() and not atoms.pbc.all())


def describe_periodicity(atoms: Atoms) -> str:
    """Periodicity in words: 'periodic', 'periodic along cell vectors 1 and 2', 'not periodic'."""
    if not is_partly_periodic(atoms):
        return "periodic" if atoms.pbc.all() else "not periodic"
    numbers = [str(k + 1) for k in np.flatnonzero(atoms.pbc)]
    return f"periodic along cell vector{'s' if len(numbers) > 1 else ''} {' and '.join(numbers)}"


def has_stress(atoms: Atoms) -> bool:
    """Whether a structure can have a stress: it is periodic in some direction, and its cell has a volume."""
    return bool(atoms.pbc.any()) and atoms.cell.rank == 3


def projector(atoms: Atoms) -> Array:
    """Projection [3, 3] onto the space of the periodic vectors; the unit matrix without any."""
    if not is_partly_periodic(atoms):
        return np.eye(3)
    vectors = atoms.cell[:][atoms.pbc]
    projection: Array = np.linalg.pinv(vectors) @ vectors
    return np.where(np.abs(projection - np.round(projection)) < 1e-12, np.round(projection), projection)


def stress_within(stress: Array, atoms: Atoms) -> Array:
    """Stress [6] (Voigt, ASE's order) without the components along free directions, which become 0."""
    if not is_partly_periodic(atoms):
        return stress
    projection = projector(atoms)
    within: Array = full_3x3_to_voigt_6_stress(projection @ voigt_6_to_full_3x3_stress(stress) @ projection)
    return within


def stress_components(stress: Array, atoms: Atoms) -> Array:
    """Independent components of a stress [6]: all six of a crystal, three of a slab [11, 22, 12], one of a wire.

    Those of slabs and wires refer to orthonormal vectors of which the first lies along the first periodic vector.
    """
    if not is_partly_periodic(atoms):
        return stress
    vectors, lower = np.linalg.qr(atoms.cell[:][atoms.pbc].T)
    basis = (vectors * np.sign(np.diag(lower))).T
    inside = basis @ voigt_6_to_full_3x3_stress(stress) @ basis.T
    return np.concatenate([np.diag(inside), inside[np.triu_indices(len(inside), 1)]])


def perpendicular_cell(cell: Any, pbc: Any) -> Array:
    """Cell vectors [3, 3] with free ones replaced by right-handed unit vectors perpendicular to all others."""
    matrix, periodic = np.array(cell, dtype=np.float64), np.asarray(pbc)[:, None]
    free = np.flatnonzero(~np.asarray(pbc))
    if not len(free):
        return matrix
    complete: Array = np.where(periodic, matrix, complete_cell(np.where(periodic, matrix, 0.0)))
    if np.linalg.det(complete) < 0.0:
        complete[free[0]] *= -1.0
    return complete
