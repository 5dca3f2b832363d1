"""A cell and its exact repetition: label a small cell with a force field whose topology is given for a larger one.

Atom numbers carry the topology, so the copies of an atom in the large cell are not interchangeable: if MD has moved an
atom of the small cell through the boundary, its copies must change places, or bonds are torn. The bonds themselves
say how: each is as short as its nearest periodic image allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.geometry import find_mic

from ubmd.errors import LabelError, SettingsError

_TOLERANCE = 0.01  # Å between the copies of an atom in the data file, after translation


class Repetition:
    """The large cell ``whole`` as ``repeat`` copies of a unit (repeat = (1, 1, 1): the cell itself)."""

    def __init__(self, whole: Atoms, bonds: np.ndarray, repeat: Sequence[int]) -> None:
        """Find the unit.

        Args:
            whole: the large cell, its atoms in the order of the topology.
            bonds: pairs of bonded atoms [b, 2], from 0.
            repeat: number of copies along each cell vector.

        Raises:
            SettingsError: ``whole`` is not a repetition of this kind.
        """
        self._repeat = np.array(repeat, dtype=int)
        if self._repeat.shape != (3,) or (self._repeat < 1).any():
            raise SettingsError("reference.arguments.repeat must be three whole numbers, 1 or more, e.g. [2, 1, 1].")
        self.count = int(self._repeat.prod())
        """copies of the unit in the large cell"""
        first, self._image = _copies(whole, self._repeat, self.count)
        # the lowest number among the copies of an atom stands for them, so the unit keeps the order of the large cell
        kept, self._owner = np.unique(first, return_inverse=True)
        self.unit = whole[kept]
        """the small cell with its atoms in the order that structures must have"""
        self.unit.set_cell(whole.cell[:] / self._repeat[:, None])
        self._bonds = self._owner[bonds]
        self._steps = self._image[bonds[:, 1]] - self._image[bonds[:, 0]]
        self._walk = _spanning_walk(self._bonds, len(self.unit))

    def repeated(self, atoms: Atoms) -> Atoms:
        """The large cell of a structure [n atoms of the unit], in the order of the topology.

        Raises:
            LabelError: other atoms or another order than the unit, or a bond that no choice of copies closes.
        """
        self._check(atoms)
        if self.count == 1:
            return atoms
        cell = atoms.cell[:]
        shift = self._shifts(atoms)
        images = (self._image + shift[self._owner]) % self._repeat
        positions = atoms.positions[self._owner] + images @ cell
        return Atoms(atoms.numbers[self._owner], positions, cell=cell * self._repeat[:, None], pbc=True)

    def unit_forces(self, forces: np.ndarray) -> np.ndarray:
        """Forces on the unit's atoms [n, 3] from those on all copies [count · n, 3]: the mean of the copies."""
        mean = np.zeros((len(self.unit), 3))
        np.add.at(mean, self._owner, forces)
        return mean / self.count

    def _check(self, atoms: Atoms) -> None:
        found, expected = atoms.get_chemical_symbols(), self.unit.get_chemical_symbols()
        if len(found) != len(expected):
            raise LabelError(f"The structure has {len(found)} atoms but the reference's data file {len(expected)}.")
        for index, (symbol, wanted) in enumerate(zip(found, expected, strict=True)):
            if symbol != wanted:
                raise LabelError(
                    f"Atom {index} (from 0) is {symbol} in the structure but {wanted} in the reference's data file; "
                    "put the atoms in the same order."
                )
        if self.count > 1 and not atoms.pbc.all():
            raise LabelError("reference.arguments.repeat is for structures that are periodic in all directions.")

    def _shifts(self, atoms: Atoms) -> np.ndarray:
        """Cell translations [n, 3] that close all bonds: the copies of atom k are exchanged by shift k."""
        first, second = self._bonds.T
        straight = atoms.positions[second] - atoms.positions[first]
        nearest, _ = find_mic(straight, atoms.cell, pbc=True)
        turns = np.rint(np.linalg.solve(atoms.cell[:].T, (nearest - straight).T).T).astype(int)
        # bond (i, j): image_j + shift_j - image_i - shift_i = turns
        wanted = turns - self._steps
        shift = np.zeros((len(atoms), 3), dtype=int)
        for bond, parent, child, sign in self._walk:
            shift[child] = shift[parent] + sign * wanted[bond]
        wrong = ((shift[second] - shift[first] - wanted) % self._repeat).any(axis=1)
        if wrong.any():
            i, j = self._bonds[int(np.flatnonzero(wrong)[0])]
            raise LabelError(f"The bond between atoms {i} and {j} (from 0) is torn or longer than half the cell.")
        return shift


def _copies(whole: Atoms, repeat: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(lowest atom that each atom is a copy of [N], number of unit cells between the two [N, 3])."""
    owner = np.full(len(whole), -1)
    image = np.zeros((len(whole), 3), dtype=int)
    unit_cell = whole.cell[:] / repeat[:, None]
    for atom in range(len(whole)):
        if owner[atom] >= 0:
            continue
        apart = np.linalg.solve(unit_cell.T, (whole.positions - whole.positions[atom]).T).T
        steps = np.rint(apart).astype(int)
        distance = np.linalg.norm((apart - steps) @ unit_cell, axis=1)
        copies = np.flatnonzero((distance < _TOLERANCE) & (whole.numbers == whole.numbers[atom]))
        steps %= repeat
        if len(copies) != count or len(np.unique(steps[copies], axis=0)) != count:
            a, b, c = repeat
            raise SettingsError(
                f"The data file is not an exact {a} x {b} x {c} repetition of a smaller cell (atom {atom + 1}); "
                "change reference.arguments.repeat."
            )
        owner[copies] = atom
        image[copies] = steps[copies]
    return owner, image


def _spanning_walk(bonds: np.ndarray, n_atoms: int) -> list[tuple[int, int, int, int]]:
    """(bond, atom reached before, atom reached, +1 or -1 if the bond names them in the other order) of every atom."""
    neighbours: list[list[tuple[int, int, int]]] = [[] for _ in range(n_atoms)]
    for bond, (i, j) in enumerate(bonds.tolist()):
        neighbours[i].append((bond, j, 1))
        neighbours[j].append((bond, i, -1))
    walk, seen = [], np.zeros(n_atoms, dtype=bool)
    for root in range(n_atoms):
        if seen[root]:
            continue
        seen[root] = True
        stack = [root]
        while stack:
            parent = stack.pop()
            for bond, child, sign in neighbours[parent]:
                if not seen[child]:
                    seen[child] = True
                    walk.append((bond, parent, child, sign))
                    stack.append(child)
    return walk
