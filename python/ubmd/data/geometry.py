"""Cells and positions that a neighbour search can work with, and the search itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list, primitive_neighbor_list
from numpy.typing import NDArray
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from ubmd.errors import DataError, LabelError

SAME_PLACE = 1e-3  # Å: closer atoms are one atom given twice
_THINNEST = 0.1  # Å between lattice planes; thousands of periodic images otherwise
_WIDEST = 1e6  # Å
_MOST_CELLS = 5e4  # of a neighbour search, half of vesin's own limit
_FEW = 32  # atoms of a molecule, up to which all pairs are faster than a search
_SEARCHED = 2.0  # Å, for atoms at one place: with less the search takes longer
_SHORTEST = 1e-3  # Å, of a periodic vector
_PARALLEL = 1e-6  # smallest volume of the periodic vectors, relative to the product of their lengths

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""centres i [P], neighbours j [P], vectors x_j - x_i [P, 3] in Å"""


def check_cell(atoms: Atoms) -> None:
    """DataError if a cell is not finite, or its periodic vectors do not span a lattice. Other vectors don't matter."""
    cell = np.asarray(atoms.cell)
    if not np.isfinite(cell).all():
        raise DataError("the cell contains NaN or infinity.")
    axes = np.flatnonzero(atoms.pbc)
    if not len(axes):
        return
    vectors = cell[axes]
    lengths = np.linalg.norm(vectors, axis=1)
    for axis, length in zip(axes, lengths, strict=True):
        name = "abc"[axis]
        if length < _SHORTEST:
            raise DataError(f"periodic along vector {name}, but that cell vector is zero.")
        if length > _WIDEST:
            raise DataError(f"cell vector {name} is {length:.3g} Å long; lengths are in Å.")
    directions = vectors / lengths[:, None]
    if len(axes) > 1 and np.sqrt(max(0.0, np.linalg.det(directions @ directions.T))) < _PARALLEL:
        if len(axes) == 3:
            raise DataError("the cell is flat: its three vectors lie in a plane.")
        first, second = ("abc"[axis] for axis in axes)
        raise DataError(
            f"periodic along vectors {first} and {second}, but these cell vectors are parallel; correct cell or pbc."
        )
    for axis, height in zip(axes, heights(vectors), strict=True):
        if height < _THINNEST:
            raise DataError(f"the cell is flat: it is only {height:.2g} Å thick along vector {'abc'[axis]}.")


def heights(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances between the lattice planes of independent vectors [k, 3], Å."""
    if not len(vectors):
        return np.zeros(0)
    return np.asarray(1.0 / np.linalg.norm(np.linalg.pinv(vectors), axis=0))


def check_apart(atoms: Atoms) -> None:
    """DataError that names two atoms at the same place, directly or through a periodic boundary."""
    first, second, vectors = neighbours(atoms, _SEARCHED)
    check_pairs(atoms, first, second, vectors)


def check_pairs(
    atoms: Atoms, first: NDArray[np.int64], second: NDArray[np.int64], vectors: NDArray[np.float64]
) -> None:
    """As `check_apart`, for pairs that are known."""
    if not len(vectors):
        return
    squares = np.einsum("pk,pk->p", vectors, vectors)
    pair = int(np.argmin(squares))
    if squares[pair] < SAME_PLACE**2:
        i, j = sorted((int(first[pair]), int(second[pair])))
        raise DataError(
            f"atoms {i} ({atoms.symbols[i]}) and {j} ({atoms.symbols[j]}), counted from 0, are at the same place "
            f"({np.sqrt(squares[pair]):.1g} Å apart{_boundary(atoms, i, j)}); remove one of them."
        )


def _boundary(atoms: Atoms, i: int, j: int) -> str:
    """What to add where two atoms meet through the periodic boundary only."""
    apart = np.linalg.norm(atoms.positions[j] - atoms.positions[i])
    return " through the periodic boundary" if apart > SAME_PLACE else ""


def neighbours(atoms: Atoms, cutoff: float) -> Pairs:
    """All directed pairs within ``cutoff`` (Å), sorted by centre.

    Raises:
        DataError: positions or cell that no search can work with.
    """
    if not np.isfinite(atoms.positions).all():
        raise DataError("Positions or cell contain values that are not finite numbers.")
    check_cell(atoms)
    if len(atoms) <= _FEW and not atoms.pbc.any():
        return _among_few(atoms.positions, cutoff)
    cell = np.asarray(atoms.cell)
    if _is_slender(atoms, cutoff):
        i, j, vectors = primitive_neighbor_list("ijD", atoms.pbc, cell, atoms.positions, float(cutoff))
    else:
        from vesin import NeighborList  # imports torch: two seconds that a worker which labels molecules need not wait

        i, j, vectors = NeighborList(cutoff=cutoff, full_list=True, sorted=True).compute(
            points=atoms.positions, box=cell, periodic=atoms.pbc, quantities="ijD"
        )
    return i.astype(np.int64), j.astype(np.int64), np.array(vectors, dtype=np.float64).reshape(-1, 3)


def _among_few(positions: NDArray[np.float64], cutoff: float) -> Pairs:
    """`neighbours` of a small molecule, from all its pairs: as many as vesin finds, in a third of the time.

    Raises:
        DataError: atoms so far apart that it must be a mistake.
    """
    vectors = positions[None] - positions[:, None]
    squares = np.einsum("ijk,ijk->ij", vectors, vectors)
    if len(positions) and squares.max() > _WIDEST**2:
        raise _too_wide(float(np.sqrt(squares.max())))
    near = squares < cutoff**2
    np.fill_diagonal(near, False)
    first, second = np.nonzero(near)
    return first, second, vectors[near]


def _too_wide(distance: float) -> DataError:
    return DataError(f"the atoms are up to {distance:.3g} Å apart; positions are in Å.")


def count_parts(atoms: Atoms, cutoff: float) -> int:
    """Number of separate parts: atoms of different parts are nowhere within ``cutoff`` (Å) of each other.

    Raises:
        DataError: as in `neighbours`.
    """
    first, second, _ = neighbours(atoms, cutoff)
    bonds = coo_array((np.ones(len(first)), (first, second)), shape=(len(atoms), len(atoms)))
    return int(connected_components(bonds, directed=False)[0])


def _is_slender(atoms: Atoms, cutoff: float) -> bool:
    """Whether atoms are spread so wide, but not in all directions, that vesin would divide by zero.

    It merges search cells by one factor for all directions once there are more than 1e5, until a thin direction has
    none left.

    Raises:
        DataError: atoms so far apart that it must be a mistake.
    """
    periodic = np.asarray(atoms.pbc)
    spans = np.ptp(atoms.positions, axis=0) if len(atoms) else np.zeros(3)
    if not periodic.all() and (widest := float(np.linalg.norm(spans))) > _WIDEST:
        raise _too_wide(widest)
    if periodic.any():
        spans = np.full(3, np.linalg.norm(spans))
        spans[periodic] = heights(np.asarray(atoms.cell)[periodic])
    cells = np.maximum(1.0, np.ceil(spans / cutoff))
    total = float(cells.prod())
    return total > _MOST_CELLS and bool(cells.min() * np.cbrt(_MOST_CELLS / total) < 2.0)


@contextmanager
def unfit_structures() -> Iterator[None]:
    """A DataError about a structure as a LabelError."""
    try:
        yield
    except DataError as error:
        raise LabelError(f"The structure cannot be labelled: {error}") from None


def check_geometry(atoms: Atoms, min_distance: float) -> None:
    """LabelError if positions or cell are invalid, or two atoms are closer than this share of their covalent radii.

    Whatever the share, two atoms may not be at the same place.
    """
    bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if len(bad):
        raise LabelError(f"The position of atom {bad[0]} (from 0) is not finite.")
    with unfit_structures():
        check_cell(atoms)
    limits = min_distance * covalent_radii[atoms.numbers]
    first, second, distance = neighbor_list("ijd", atoms, cutoff=limits)
    if len(distance):
        pair = int(np.argmin(distance))
        i, j = first[pair], second[pair]
        limit = limits[[i, j]].sum()
        raise LabelError(
            f"Atoms {i} ({atoms.symbols[i]}) and {j} ({atoms.symbols[j]}) are too close: {distance[pair]:.3f} Å, "
            f"limit {limit:.3f} Å (reference.min_distance)."
        )
    if 2.0 * limits.min() <= SAME_PLACE:  # else the search above has seen them
        with unfit_structures():
            check_apart(atoms)
