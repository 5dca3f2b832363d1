"""The ideal crystal: primitive cell, space group, and the sites of supercells."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import find_mic, minkowski_reduce

from ubmd.errors import DataError, SettingsError

SYMMETRY_TOLERANCE = 1e-5  # Å, spglib's symprec


@dataclass(frozen=True, eq=False)
class Lattice:
    """Primitive cell with its space group.

    Attributes:
        cell: lattice vectors in rows [3, 3], Å.
        scaled: fractional positions of the sublattices [S, 3].
        numbers: atomic numbers [S].
        rotations: integer rotations in fractional coordinates [G, 3, 3], x' = R x + t.
        translations: fractional translations [G, 3].
    """

    cell: np.ndarray
    scaled: np.ndarray
    numbers: np.ndarray
    rotations: np.ndarray
    translations: np.ndarray

    @classmethod
    def from_atoms(cls, atoms: Atoms, tolerance: float = SYMMETRY_TOLERANCE) -> Lattice:
        """Lattice of an ideal crystal, given as its primitive cell or any supercell of it (Å, pbc in three directions).

        A primitive input cell is kept as it is; a larger one is reduced without turning or shifting the crystal.

        Raises:
            DataError: the cell isn't periodic, or spglib finds no symmetry in it.
        """
        if not atoms.pbc.all():
            raise DataError("A crystal must be periodic in three directions: set pbc of the ideal structure to True.")
        primitive = _primitive(atoms, tolerance)
        rotations, translations = _symmetry(primitive, tolerance)
        cell = _symmetric_cell(np.array(primitive.cell), rotations)
        return cls(cell, primitive.get_scaled_positions(wrap=False), primitive.numbers.copy(), rotations, translations)

    @property
    def positions(self) -> np.ndarray:
        """Cartesian positions of the sublattices [S, 3], Å."""
        return self.scaled @ self.cell

    @cached_property
    def cartesian_rotations(self) -> np.ndarray:
        """Orthogonal matrices [G, 3, 3] that act on Cartesian column vectors."""
        return self.cell.T @ self.rotations @ np.linalg.inv(self.cell.T)

    @cached_property
    def site_images(self) -> tuple[np.ndarray, np.ndarray]:
        """Sublattice [G, S] and cell offset [G, S, 3] to which operation g takes sublattice s of cell 0."""
        images = np.einsum("gij,sj->gsi", self.rotations, self.scaled) + self.translations[:, None]
        difference = images[:, :, None] - self.scaled  # [G, S, S, 3]
        offsets = np.rint(difference).astype(np.int64)
        distance = np.linalg.norm((difference - offsets) @ self.cell, axis=-1)
        distance[:, self.numbers[:, None] != self.numbers] = np.inf
        target = distance.argmin(axis=-1)
        chosen = np.take_along_axis(offsets, target[..., None, None], axis=2)[:, :, 0]
        return target, chosen

    def images(self, operation: np.ndarray, sites: np.ndarray) -> np.ndarray:
        """Sites [..., 4] (cell offset, sublattice) after operations of matching shape [...]."""
        target, shift = self.site_images
        sublattice = sites[..., 3]
        offset = np.einsum("...ij,...j->...i", self.rotations[operation], sites[..., :3]) + shift[operation, sublattice]
        return np.concatenate([offset, target[operation, sublattice][..., None]], axis=-1)


def _symmetry(atoms: Atoms, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    try:
        import spglib
    except ImportError:
        raise SettingsError("Force-constant potentials need spglib: pip install 'ubmd[crystal]'.") from None
    cell: Any = (np.array(atoms.cell), atoms.get_scaled_positions(), atoms.numbers)
    dataset = spglib.get_symmetry_dataset(cell, tolerance)
    if dataset is None:
        raise DataError("spglib finds no space group: check the ideal structure for overlapping atoms or a flat cell.")
    return np.array(dataset.rotations, dtype=np.int64), np.array(dataset.translations)


def _primitive(atoms: Atoms, tolerance: float) -> Atoms:
    """Primitive cell at the crystal's own place and orientation (spglib's own reduction may shift the origin)."""
    rotations, translations = _symmetry(atoms, tolerance)
    pure = translations[(rotations == np.eye(3, dtype=np.int64)).all(axis=(1, 2))]
    if len(pure) == 1:
        return atoms.copy()
    vectors = _shortest_basis(pure @ np.array(atoms.cell), np.array(atoms.cell))
    keep = _distinct_modulo(atoms.positions, atoms.numbers, vectors, tolerance)
    if len(keep) * len(pure) != len(atoms):
        raise DataError("The primitive cell is ambiguous: give the ideal structure without displacements.")
    return Atoms(atoms.numbers[keep], positions=atoms.positions[keep], cell=vectors, pbc=True)


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


def _distinct_modulo(positions: np.ndarray, numbers: np.ndarray, cell: np.ndarray, tolerance: float) -> list[int]:
    """Indices of the first atom of every class of atoms that differ by a vector of the lattice `cell`."""
    keep: list[int] = []
    for i, (position, number) in enumerate(zip(positions, numbers, strict=True)):
        same = [j for j in keep if numbers[j] == number]
        if not same or find_mic(positions[same] - position, cell)[1].min() > 10 * tolerance:
            keep.append(i)
    return keep


def _symmetric_cell(cell: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Cell with the metric averaged over the point group, so that Cartesian rotations are orthogonal to rounding."""
    metric = np.mean(rotations.transpose(0, 2, 1) @ (cell @ cell.T) @ rotations, axis=0)
    inverse = np.linalg.inv(cell)
    values, vectors = np.linalg.eigh(inverse @ metric @ inverse.T)
    return cell @ (vectors * np.sqrt(values)) @ vectors.T


class Supercell:
    """Sites of a periodic box whose vectors are integer combinations of the primitive ones.

    Attributes:
        sublattice, offset: lattice site of every atom, [n] and [n, 3].
        matrix: box = matrix @ primitive cell, integer [3, 3], any determinant but zero.
        ideal: ideal positions [n, 3], Å, each next to its atom's.
    """

    def __init__(self, lattice: Lattice, atoms: Atoms, tolerance: float = 1e-3) -> None:
        """Assign each atom to the nearest site of its species.

        Raises:
            DataError: the box is no integer multiple of the primitive cell (within `tolerance`, in lattice vectors),
                or two atoms are nearest to one site.
        """
        self.lattice = lattice
        self.matrix = _integer_matrix(lattice, np.array(atoms.cell), tolerance)
        self.determinant = abs(round(np.linalg.det(self.matrix)))
        self.cell = self.matrix @ lattice.cell
        if len(atoms) != self.determinant * len(lattice.numbers):
            raise DataError(
                f"The box has {len(atoms)} atoms but the ideal crystal has "
                f"{self.determinant * len(lattice.numbers)} sites in it: give a structure without vacancies."
            )
        self.sublattice, self.offset = _nearest_sites(lattice, atoms)
        self.ideal = (self.offset + lattice.scaled[self.sublattice]) @ lattice.cell
        codes = self._code(self.offset) * len(lattice.numbers) + self.sublattice
        self._order = np.argsort(codes)
        self._codes = codes[self._order]
        if len(atoms) > 1 and (np.diff(self._codes) == 0).any():
            raise DataError("Two atoms are nearest to one lattice site: start from a structure closer to the crystal.")

    def __len__(self) -> int:
        return len(self.sublattice)

    def _code(self, offset: np.ndarray) -> np.ndarray:
        """One integer per class of cell offsets [..., 3] that are periodic images of each other."""
        adjugate = np.rint(np.linalg.inv(self.matrix) * self.determinant).astype(np.int64)
        wrapped = (offset @ adjugate) % self.determinant
        return (wrapped[..., 0] * self.determinant + wrapped[..., 1]) * self.determinant + wrapped[..., 2]

    def index(self, sublattice: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Atoms [...] on the sites `sublattice` [...] of the cells `offset` [..., 3], through periodic images."""
        codes = self._code(offset) * len(self.lattice.numbers) + sublattice
        return self._order[np.searchsorted(self._codes, codes)]

    def displacements(self, atoms: Atoms) -> np.ndarray:
        """Displacements from the sites [n, 3], Å, by minimum image; atoms in the order of the box that was mapped."""
        if len(atoms) != len(self) or not np.array_equal(atoms.numbers, self.lattice.numbers[self.sublattice]):
            raise DataError("The structure's atoms differ from the box's: keep number, order and species of the atoms.")
        if not np.allclose(np.array(atoms.cell), self.cell, atol=1e-3):
            raise DataError("The structure's cell differs from the ideal one: force constants need the fixed cell.")
        return find_mic(atoms.positions - self.ideal, self.cell)[0]


def _integer_matrix(lattice: Lattice, cell: np.ndarray, tolerance: float) -> np.ndarray:
    exact = cell @ np.linalg.inv(lattice.cell)
    matrix = np.rint(exact).astype(np.int64)
    if np.abs(exact - matrix).max() > tolerance or round(np.linalg.det(matrix)) == 0:
        raise DataError(
            "The box is no integer multiple of the primitive cell: "
            "repeat the ideal crystal without straining or turning it."
        )
    return matrix


def _nearest_sites(lattice: Lattice, atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Sublattice [n] and cell offset [n, 3] of the nearest site of each atom's species."""
    n, s = len(atoms), len(lattice.numbers)
    difference = (atoms.positions[:, None] - lattice.positions).reshape(-1, 3)
    vectors, distance = find_mic(difference, lattice.cell)
    distance = distance.reshape(n, s)
    distance[atoms.numbers[:, None] != lattice.numbers] = np.inf
    if not np.isfinite(distance.min(axis=1)).all():
        raise DataError("The box holds a species that the ideal crystal lacks: use the same elements in both.")
    sublattice = distance.argmin(axis=1)
    cells = ((difference - vectors).reshape(n, s, 3))[np.arange(n), sublattice]
    return sublattice, np.rint(cells @ np.linalg.inv(lattice.cell)).astype(np.int64)
