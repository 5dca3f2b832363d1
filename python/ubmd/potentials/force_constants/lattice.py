"""The ideal crystal: primitive cell, space group, and the sites of supercells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from ase import Atoms
from ase.geometry import find_mic, minkowski_reduce

from ubmd.errors import DataError
from ubmd.potentials.force_constants.symmetry import (
    SYMMETRY_TOLERANCE,
    Array,
    Integers,
    SpaceGroup,
    operations,
    primitive_of,
    space_group,
    symmetric_cell,
    symmetrised,
)

LINDEMANN = 0.15  # rms displacement over the shortest distance between sites; crystals melt below this


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

    cell: Array
    scaled: Array
    numbers: Integers
    rotations: Integers
    translations: Array

    @classmethod
    def from_atoms(cls, atoms: Atoms, tolerance: float = SYMMETRY_TOLERANCE) -> Lattice:
        """Lattice of an ideal crystal, given as its primitive cell or any supercell of it (Å, pbc in three directions).

        A primitive input cell is kept as it is; a larger one is reduced without rotating or shifting the crystal. With
        a tolerance (Å) looser than the default, the crystal is symmetrised first.

        Raises:
            DataError: the cell isn't periodic, or spglib finds no symmetry in it.
            SettingsError: the tolerance is so loose that atoms would merge.
        """
        _check_periodic_and_finite(atoms)
        exact, tolerance = symmetrised(atoms, tolerance), min(tolerance, SYMMETRY_TOLERANCE)
        primitive = primitive_of(exact, tolerance)
        rotations, translations = operations(primitive, tolerance)
        cell = symmetric_cell(np.array(primitive.cell), rotations)
        return cls(cell, primitive.get_scaled_positions(wrap=False), primitive.numbers.copy(), rotations, translations)

    @property
    def positions(self) -> np.ndarray:
        """Cartesian positions of the sublattices [S, 3], Å."""
        return self.scaled @ self.cell

    @cached_property
    def space_group(self) -> SpaceGroup | None:
        """None without spglib."""
        return space_group(self.cell, self.rotations, self.translations)

    def is_same(self, other: Lattice) -> bool:
        """Whether both are one crystal with the same symmetry; primitive vectors and last digits may differ."""
        if self.rotations.shape != other.rotations.shape or len(self.numbers) != len(other.numbers):
            return False
        matrix = other.cell @ np.linalg.inv(self.cell)
        if np.abs(matrix - np.rint(matrix)).max() > 1e-7 or abs(round(np.linalg.det(matrix))) != 1:
            return False
        distance = find_mic((other.positions[:, None] - self.positions).reshape(-1, 3), self.cell)[1]
        distance[(other.numbers[:, None] != self.numbers).ravel()] = np.inf
        return bool(distance.reshape(len(self.numbers), -1).min(axis=1).max() < 1e-6)

    def places(self, sites: Integers) -> Array:
        """Cartesian positions [n, 3] of sites [n, 4] (cell, sublattice), Å."""
        return (sites[:, :3] + self.scaled[sites[:, 3]]) @ self.cell

    @cached_property
    def shortest_distance(self) -> float:
        """Distance of the closest two sites, Å."""
        shifts = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        reduced, _ = minkowski_reduce(self.cell)
        vectors = find_mic((self.positions[:, None] - self.positions).reshape(-1, 3), reduced)[0]
        distances = np.linalg.norm(vectors[:, None] + shifts @ reduced, axis=-1)
        return float(distances[distances > SYMMETRY_TOLERANCE].min())

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
        self.determinant: int = abs(round(np.linalg.det(self.matrix)))
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

    def _code(self, offset: Integers) -> Integers:
        """One integer per class of cell offsets [..., 3] that are periodic images of each other."""
        adjugate = np.rint(np.linalg.inv(self.matrix) * self.determinant).astype(np.int64)
        wrapped: Integers = (offset @ adjugate) % self.determinant
        return (wrapped[..., 0] * self.determinant + wrapped[..., 1]) * self.determinant + wrapped[..., 2]

    def index(self, sublattice: Integers, offset: Integers) -> Integers:
        """Atoms [...] on the sites `sublattice` [...] of the cells `offset` [..., 3], through periodic images."""
        codes = self._code(offset) * len(self.lattice.numbers) + sublattice
        return self._order[np.searchsorted(self._codes, codes)]

    def displacements(self, atoms: Atoms) -> np.ndarray:
        """Displacements from the sites [n, 3], Å, by minimum image; atoms in the order of the box that was mapped."""
        if len(atoms) != len(self) or not np.array_equal(atoms.numbers, self.lattice.numbers[self.sublattice]):
            raise DataError("The structure's atoms differ from the box's: keep number, order and species of the atoms.")
        if not np.allclose(np.array(atoms.cell), self.cell, atol=1e-3):
            raise DataError("The structure's cell differs from the ideal one: force constants need the fixed cell.")
        vectors: Array = find_mic(atoms.positions - self.ideal, self.cell)[0]
        return vectors


def _integer_matrix(lattice: Lattice, cell: Array, tolerance: float) -> Integers:
    exact = cell @ np.linalg.inv(lattice.cell)
    matrix = np.rint(exact).astype(np.int64)
    if np.abs(exact - matrix).max() > tolerance or round(np.linalg.det(matrix)) == 0:
        raise DataError(
            "The box is not an integer multiple of the primitive cell: "
            "repeat the ideal crystal without straining or rotating it."
        )
    return matrix


def _nearest_sites(lattice: Lattice, atoms: Atoms) -> tuple[Integers, Integers]:
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


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the crystal lies in a box that may be rotated and have any origin.

    Attributes:
        supercell: the box in the crystal's own frame.
        rotation: orthogonal matrix [3, 3] that takes column vectors of the crystal's frame to the box's.
        cell: the box's own vectors in rows [3, 3], Å.
    """

    supercell: Supercell
    rotation: Array
    cell: Array

    @classmethod
    def fit(cls, lattice: Lattice, atoms: Atoms, tolerance: float = 1e-3) -> Placement:
        """Find sites, rotation and origin for a box whose atoms are moderately displaced.

        Boxes that hold the crystal without rotation are tried first, then every rotation that takes lattice vectors to
        those of the box (LAMMPS rotates boxes, for instance).

        Raises:
            DataError: the box is no integer multiple of the primitive cell in any orientation (within `tolerance`, in
                lattice vectors), it isn't periodic or has the wrong atoms, or two atoms are nearest to one site.
        """
        _check_periodic_and_finite(atoms)
        best: tuple[float, Placement] | None = None
        problem = DataError(
            "The box is not an integer multiple of the primitive cell: repeat the ideal crystal without straining it."
        )
        for rotation, matrix in _orientations(lattice, np.array(atoms.cell), tolerance):
            turned = Atoms(atoms.numbers, atoms.positions @ rotation, cell=matrix @ lattice.cell, pbc=True)
            for shift in _origins(lattice, turned):
                turned.positions = atoms.positions @ rotation - shift
                try:
                    placement = cls(Supercell(lattice, turned), rotation, np.array(atoms.cell))
                except DataError as error:
                    problem = error
                    continue
                size = float(np.sqrt(np.mean(np.sum(placement.displacements(atoms) ** 2, axis=1))))
                if size < LINDEMANN * lattice.shortest_distance:
                    return placement
                if best is None or size < best[0]:
                    best = size, placement
        if best is None:
            raise problem
        return best[1]

    def fits(self, atoms: Atoms) -> bool:
        """Whether atoms and box are those that were placed."""
        return (
            np.array_equal(atoms.numbers, self.supercell.lattice.numbers[self.supercell.sublattice])
            and bool(atoms.pbc.all())
            and np.allclose(np.array(atoms.cell), self.cell, rtol=0.0, atol=1e-5)
        )

    def displacements(self, atoms: Atoms) -> np.ndarray:
        """Displacements from the sites [n, 3] in the crystal's frame, Å; their mean is zero wherever the atoms drift.

        Atoms in the order of the box that was placed.
        """
        vectors: Array = atoms.positions @ self.rotation - self.supercell.ideal
        vectors -= vectors[0].copy()  # of one image, however far the whole crystal has drifted
        cell = self.supercell.cell
        vectors -= np.rint(vectors @ np.linalg.inv(cell)) @ cell
        vectors -= vectors.mean(axis=0)
        return vectors

    def turn(self, vectors: Array) -> Array:
        """Vectors [..., 3] of the crystal's frame in that of the box."""
        return vectors @ self.rotation.T


class Placer:
    """Placements of many boxes: the last one is kept while its atoms stay near their sites."""

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice
        self._last: Placement | None = None

    def __call__(self, atoms: Atoms) -> tuple[Placement, np.ndarray]:
        """The placement of a box and the displacements [n, 3] (Å, crystal's frame); raises as `Placement.fit`."""
        if self._last is not None and self._last.fits(atoms):
            displacements = self._last.displacements(atoms)
            # else perhaps the same atoms in another order
            if np.linalg.norm(displacements, axis=1).max() < 0.5 * self.lattice.shortest_distance:
                return self._last, displacements
        self._last = Placement.fit(self.lattice, atoms)
        return self._last, self._last.displacements(atoms)


def _check_periodic_and_finite(atoms: Atoms) -> None:
    if not atoms.pbc.all():
        raise DataError("A crystal must be periodic in three directions: set pbc of the structure to True.")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(np.array(atoms.cell)).all()):
        raise DataError("Positions or cell contain values that are not finite numbers.")


def _orientations(lattice: Lattice, cell: np.ndarray, tolerance: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rotations R and integer matrices M with box = M @ primitive cell @ Rᵀ; no rotation first, if that is one."""
    exact = cell @ np.linalg.inv(lattice.cell)
    matrix = np.rint(exact).astype(np.int64)
    if np.abs(exact - matrix).max() <= tolerance and round(np.linalg.det(matrix)) != 0:
        yield np.eye(3), matrix
    length = tolerance * float(np.linalg.norm(lattice.cell, axis=1).max())
    metric = cell @ cell.T
    norms = np.sqrt(np.diag(metric))
    if np.linalg.det(cell) == 0.0:
        return
    candidates = [_lattice_vectors(lattice.cell, norm, length) for norm in norms]
    vectors = [integers @ lattice.cell for integers in candidates]
    for i, a in enumerate(vectors[0]):
        seconds = np.nonzero(np.abs(vectors[1] @ a - metric[0, 1]) < length * (norms[0] + norms[1]))[0]
        thirds = np.nonzero(np.abs(vectors[2] @ a - metric[0, 2]) < length * (norms[0] + norms[2]))[0]
        for j in seconds:
            products = vectors[2][thirds] @ vectors[1][j]
            for k in thirds[np.abs(products - metric[1, 2]) < length * (norms[1] + norms[2])]:
                matrix = np.array([candidates[0][i], candidates[1][j], candidates[2][k]])
                rotation = _nearest_rotation(matrix @ lattice.cell, cell)
                if np.abs(matrix @ lattice.cell @ rotation.T - cell).max() < length:
                    yield rotation, matrix


def _lattice_vectors(cell: Array, norm: float, tolerance: float) -> Integers:
    """Integer combinations [N, 3] of lattice vectors whose length is `norm`."""
    reach = np.floor((norm + tolerance) * np.linalg.norm(np.linalg.inv(cell), axis=0)).astype(int)
    grid = np.stack(np.meshgrid(*[np.arange(-r, r + 1) for r in reach], indexing="ij"), axis=-1).reshape(-1, 3)
    found: Integers = grid[np.abs(np.linalg.norm(grid @ cell, axis=1) - norm) < tolerance]
    return found


def _nearest_rotation(start: Array, end: Array) -> Array:
    """Orthogonal R that best takes the rows of `start` to those of `end`, end = start @ Rᵀ."""
    left, _, right = np.linalg.svd(end.T @ start)
    rotation: Array = left @ right
    return rotation


def _origins(lattice: Lattice, atoms: Atoms) -> Iterator[np.ndarray]:
    """Shifts [3] to try: none, then those that put one of a few atoms on a site."""
    positions = atoms.positions.copy()  # the caller moves the atoms
    yield np.zeros(3)
    rarest = min(set(lattice.numbers.tolist()), key=lambda z: int((lattice.numbers == z).sum()))
    chosen = np.nonzero(atoms.numbers == rarest)[0]
    for atom in chosen[:: max(len(chosen) // 4, 1)][:4]:
        for site in lattice.positions[lattice.numbers == rarest]:
            yield positions[atom] - site
