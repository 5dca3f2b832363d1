"""The symmetry of an ideal crystal: its operations, its primitive cell, and crystals that have it only nearly."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import find_mic, minkowski_reduce
from numpy.typing import NDArray

from ubmd.errors import DataError, SettingsError

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

SYMMETRY_TOLERANCE = 1e-5  # Å, spglib's symprec; crystals that obey their symmetry this well are taken as they are
_LARGEST_SHARE = 0.1  # of the shortest distance between atoms; beyond it, any operation would be a symmetry
_FIRST_CUBIC = 195  # number of a space group
_OVERLAP = 0.1  # Å
_NO_GROUP = "spglib finds no space group: check the ideal structure for overlapping atoms or a flat cell."


@dataclass(frozen=True)
class SpaceGroup:
    """A space group by its international symbol and number, with the number of operations of the primitive cell."""

    symbol: str
    number: int
    operations: int

    def __str__(self) -> str:
        return f"{self.symbol} ({self.number}), {self.operations} operation{'s' if self.operations > 1 else ''}"


def operations(atoms: Atoms, tolerance: float) -> tuple[Integers, Array]:
    """Rotations [G, 3, 3] and translations [G, 3] in fractional coordinates, within a tolerance (Å).

    Raises:
        DataError: spglib finds none.
        SettingsError: spglib isn't installed.
    """
    try:
        dataset = _dataset(atoms, tolerance)
    except ImportError:
        raise SettingsError("Force-constant potentials need spglib: pip install 'ubmd[crystal]'.") from None
    if dataset is None:
        raise DataError(_NO_GROUP)
    return np.array(dataset.rotations, dtype=np.int64), np.array(dataset.translations)


def space_group(cell: np.ndarray, rotations: np.ndarray, translations: np.ndarray) -> SpaceGroup | None:
    """The group that operations of a primitive cell form; None if spglib isn't installed or doesn't know it."""
    if np.linalg.det(cell) < 0.0:  # else spglib would name the mirror image of a chiral crystal
        cell, translations = -cell, -translations
    try:
        import spglib
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            found = spglib.get_spacegroup_type_from_symmetry(rotations, translations, cell, SYMMETRY_TOLERANCE)
        except getattr(spglib, "SpglibError", ()):
            found = None
    return None if found is None else SpaceGroup(found.international_short, int(found.number), len(rotations))


def _dataset(atoms: Atoms, tolerance: float) -> Any:
    """What spglib finds in a structure; None if nothing. ImportError without spglib."""
    import spglib

    cell: Any = (np.array(atoms.cell), atoms.get_scaled_positions(), atoms.numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # on how spglib reports that it has found nothing
        try:
            return spglib.get_symmetry_dataset(cell, tolerance)
        except getattr(spglib, "SpglibError", ()):
            return None


def group_name(atoms: Atoms, tolerance: float) -> str | None:
    """'Fd-3m (227)' within a tolerance (Å); None if spglib isn't installed or finds none."""
    try:
        dataset = _dataset(atoms, tolerance)
    except ImportError:
        return None
    return None if dataset is None else f"{dataset.international} ({dataset.number})"


def cubic_axes(atoms: Atoms, tolerance: float) -> Array | None:
    """Rotation [3, 3] that takes a cubic crystal's axes to the Cartesian ones, within a tolerance (Å).

    None of other crystals, and if spglib isn't installed.
    """
    try:
        dataset = _dataset(atoms, tolerance)
    except ImportError:
        return None
    if dataset is None or dataset.number < _FIRST_CUBIC:
        return None
    return np.array(dataset.std_rotation_matrix)


def primitive_of(atoms: Atoms, tolerance: float) -> Atoms:
    """Primitive cell at the crystal's own place and orientation (spglib's own reduction may shift the origin)."""
    pure = _pure_translations(atoms, tolerance)
    if len(pure) == 1:
        copy: Atoms = atoms.copy()
        return copy
    vectors = _shortest_basis(pure @ np.array(atoms.cell), np.array(atoms.cell))
    keep = _distinct_modulo(atoms.positions, atoms.numbers, vectors, 10 * tolerance)
    if len(keep) * len(pure) != len(atoms):
        raise DataError("The primitive cell is ambiguous: give the ideal structure without displacements.")
    return Atoms(atoms.numbers[keep], positions=atoms.positions[keep], cell=vectors, pbc=True)


def symmetric_cell(cell: Array, rotations: Integers) -> Array:
    """Cell with the metric averaged over the point group, so that Cartesian rotations are orthogonal to rounding."""
    metric = np.mean(rotations.transpose(0, 2, 1) @ (cell @ cell.T) @ rotations, axis=0)
    inverse = np.linalg.inv(cell)
    values, vectors = np.linalg.eigh(inverse @ metric @ inverse.T)
    symmetric: Array = cell @ (vectors * np.sqrt(values)) @ vectors.T
    return symmetric


def symmetrised(atoms: Atoms, tolerance: float) -> Atoms:
    """The crystal with the symmetry that it has within a tolerance (Å) made exact, for files with rounded numbers.

    Within the default tolerance it is taken as it is. Else positions and the cell's metric become averages over all
    operations. The crystal is neither rotated nor shifted as a whole, the cell stays the same multiple of the primitive
    one, and atoms keep their order.

    Raises:
        SettingsError: the tolerance is so loose that atoms would merge.
        DataError: spglib finds no symmetry, or one that is not consistent.
    """
    if tolerance <= SYMMETRY_TOLERANCE:
        return atoms
    _check_tolerance(atoms, tolerance)
    cell, sites, offsets = _folded(atoms, tolerance)
    numbers, scaled = atoms.numbers[np.unique(sites, return_index=True)[1]], _means(atoms, cell, sites, offsets)
    rotations, translations = operations(Atoms(numbers, scaled @ cell, cell=cell, pbc=True), tolerance)
    matrix = np.rint(np.array(atoms.cell) @ np.linalg.inv(cell))
    cell = symmetric_cell(cell, rotations)
    scaled = _averaged(scaled, numbers, cell, rotations, translations)
    exact = Atoms(numbers, scaled @ cell, cell=cell, pbc=True)
    if len(operations(exact, SYMMETRY_TOLERANCE)[0]) < len(rotations):
        raise DataError(
            f"The symmetry of the ideal crystal within {tolerance:g} Å is inconsistent: give better positions, or "
            "another crystal.tolerance."
        )
    return Atoms(atoms.numbers, (offsets + scaled[sites]) @ cell, cell=matrix @ cell, pbc=atoms.pbc)


def largest_change(before: Atoms, after: Atoms) -> tuple[float, float]:
    """How far `symmetrised` has moved an atom within its cell, and a component of the cell's vectors, Å."""
    shifts = (after.get_scaled_positions(wrap=False) - before.get_scaled_positions(wrap=False)) @ np.array(after.cell)
    cells = np.array(after.cell) - np.array(before.cell)
    return float(np.linalg.norm(shifts, axis=1).max()), float(np.abs(cells).max())


def _check_tolerance(atoms: Atoms, tolerance: float) -> None:
    cell = minkowski_reduce(np.array(atoms.cell))[0]
    pairs = (atoms.positions[:, None] - atoms.positions)[np.triu_indices(len(atoms), 1)]
    lengths = [*np.linalg.norm(cell, axis=1), *(find_mic(pairs, cell)[1] if len(pairs) else ())]
    shortest = float(min(lengths))
    if shortest < _OVERLAP:
        raise DataError(_NO_GROUP)
    if tolerance > _LARGEST_SHARE * shortest:
        raise SettingsError(
            f"crystal.tolerance = {tolerance:g} Å is too loose for atoms that are {shortest:.3g} Å apart: give at most "
            f"{_LARGEST_SHARE:g} of that, and far less if it is only to correct rounded numbers."
        )


def _pure_translations(atoms: Atoms, tolerance: float) -> Array:
    """Translations [T, 3] of the crystal inside its cell, fractional."""
    rotations, translations = operations(atoms, tolerance)
    pure: Array = translations[(rotations == np.eye(3, dtype=np.int64)).all(axis=(1, 2))]
    return pure


def _folded(atoms: Atoms, tolerance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Primitive cell [3, 3] (Å), and every atom's sublattice [n] and cell [n, 3], of a crystal that isn't exact."""
    box = np.array(atoms.cell)
    pure = _pure_translations(atoms, tolerance)
    count = len(pure)
    if count == 1:
        return box, np.arange(len(atoms)), np.zeros((len(atoms), 3))
    # T translations form a group of that order, in which each is a multiple of 1/T of the box.
    cell = _shortest_basis(np.rint(pure * count) / count @ box, box)
    first = _distinct_modulo(atoms.positions, atoms.numbers, cell, 4 * tolerance)
    vectors, distances = find_mic((atoms.positions[:, None] - atoms.positions[first]).reshape(-1, 3), cell)
    distances = distances.reshape(len(atoms), -1)
    distances[atoms.numbers[:, None] != atoms.numbers[first]] = np.inf
    sites = distances.argmin(axis=1)
    if len(first) * count != len(atoms) or (np.bincount(sites) != count).any():
        raise DataError("The primitive cell is ambiguous: give the ideal structure without displacements.")
    chosen = vectors.reshape(len(atoms), -1, 3)[np.arange(len(atoms)), sites]
    offsets = (atoms.positions - atoms.positions[first][sites] - chosen) @ np.linalg.inv(cell)
    return cell, sites, np.rint(offsets)


def _means(atoms: Atoms, cell: np.ndarray, sites: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Fractional positions of the sublattices [S, 3], averaged over their atoms."""
    scaled = atoms.positions @ np.linalg.inv(cell) - offsets
    return np.array([scaled[sites == s].mean(axis=0) for s in range(int(sites.max()) + 1)])


def _averaged(scaled: Array, numbers: np.ndarray, cell: Array, rotations: Integers, translations: Array) -> Array:
    """Fractional positions [S, 3] averaged over all operations, with the mean where it was."""
    total = np.zeros_like(scaled)
    for rotation, translation in zip(rotations, translations, strict=True):
        images = scaled @ rotation.T + translation
        difference = images[:, None] - scaled
        difference -= np.rint(difference)
        distance = np.linalg.norm(difference @ cell, axis=-1)
        distance[numbers[:, None] != numbers] = np.inf
        target = distance.argmin(axis=1)
        total[target] += difference[np.arange(len(scaled)), target]
    shifts = total / len(rotations)
    averaged: Array = scaled + shifts - shifts.mean(axis=0)
    return averaged


def _shortest_basis(pure: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Basis of the lattice made by pure translations [T, 3] and the rows of cell, right-handed."""
    reduced, _ = minkowski_reduce(cell)
    shifts = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) @ reduced
    short, _ = find_mic(pure, reduced)
    candidates = (short[:, None] + shifts).reshape(-1, 3)
    length = np.linalg.norm(candidates, axis=1)
    candidates = candidates[np.argsort(length, kind="stable")][np.sort(length) > 1e-3]
    volume = abs(np.linalg.det(cell)) / len(pure)
    # The shortest independent vectors of a lattice in three dimensions are a basis of it.
    basis: list[np.ndarray] = []
    for candidate in candidates:
        trial = np.array([*basis, candidate])
        if np.linalg.svd(trial, compute_uv=False)[-1] > 1e-3 * length.max():
            basis.append(candidate)
        if len(basis) == 3:
            break
    found = np.array(basis)
    if not np.isclose(abs(np.linalg.det(found)), volume, rtol=1e-3):
        raise DataError("No primitive cell was found in the ideal structure: give the primitive cell itself.")
    return found if np.linalg.det(found) > 0 else -found


def _distinct_modulo(positions: np.ndarray, numbers: np.ndarray, cell: np.ndarray, limit: float) -> list[int]:
    """Indices of the first atom of every class of atoms that differ by a vector of `cell`, within a limit (Å)."""
    keep: list[int] = []
    for i, (position, number) in enumerate(zip(positions, numbers, strict=True)):
        same = [j for j in keep if numbers[j] == number]
        if not same or find_mic(positions[same] - position, cell)[1].min() > limit:
            keep.append(i)
    return keep
