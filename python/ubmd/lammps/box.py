"""How a structure lies in LAMMPS: its orientation and its box, for every periodicity.

LAMMPS wants the first cell vector along x and the second in the xy plane. It has no tilt along a direction that is not
periodic: there, vectors are replaced by perpendicular ones, and the box leaves room around the atoms.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from ase import Atoms
from ase.calculators.lammps import Prism
from numpy.typing import NDArray

from ubmd.data.periodicity import is_partly_periodic, perpendicular_cell

Array = NDArray[np.float64]

_MARGIN = 10.0  # Å of empty space around the atoms; LAMMPS shrinks the box of a molecule at once


class Box:
    """The box of a structure, and the way from its own orientation to that of LAMMPS."""

    def __init__(self, atoms: Atoms) -> None:
        self.pbc: NDArray[np.bool_] = np.array(atoms.pbc, dtype=bool)
        self._own = np.array(atoms.cell[:], dtype=np.float64)
        self.rotation: Array = np.eye(3)
        """own orientation to LAMMPS's: rows of vectors are multiplied by it"""
        self._edges: Array = np.zeros((3, 3))
        if self.pbc.any():
            prism = Prism(perpendicular_cell(self._own, self.pbc))
            # no tilt along free directions, not even one of 1e-17, which LAMMPS would refuse
            tilted = np.outer(self.pbc, self.pbc) | np.eye(3, dtype=bool)
            self.rotation, self._edges = prism.rot_mat, np.where(tilted, prism.cell, 0.0)
        self.positions = self._turned(atoms)
        """[n, 3] in LAMMPS's orientation, within the periodic vectors, Å"""
        self._low = self.positions.min(axis=0) - _MARGIN
        self._high = self.positions.max(axis=0) + _MARGIN

    def commands(self, types: int) -> list[str]:
        """Commands that make an empty box with so many atom types."""
        return [f"boundary {' '.join(self._boundary())}", "box tilt large", self._region(), f"create_box {types} cell"]

    def cell(self, box: Array) -> Array:
        """Cell vectors in LAMMPS's orientation [3, 3], from those of its box: free ones are the structure's own."""
        return np.where(self.pbc[:, None], box, self._own @ self.rotation)

    def own_cell(self) -> Array:
        """Cell vectors in the structure's orientation, zero where it is free [3, 3]."""
        return np.where(self.pbc[:, None], self._own, 0.0)

    def barostat(self, coupling: Literal["iso", "aniso", "tri"], pressure: float, damping: float) -> str:
        """Words of fix npt for the periodic directions; pressure in bar (of the structure's own volume), damping in ps.

        Raises:
            ValueError: a pressure on a structure whose own cell has no volume.
        """
        if self.pbc.all():
            return f"{coupling} {pressure:.17g} {pressure:.17g} {damping:.17g}"
        axes = [axis for axis, periodic in zip("xyz", self.pbc, strict=True) if periodic]
        scaled = f"{self._scaled(pressure):.17g}"
        words = [f"{axis} {scaled} {scaled} {damping:.17g}" for axis in axes]
        if len(axes) == 2:
            words += [f"couple {''.join(axes)}"] if coupling == "iso" else []
            words += [f"{''.join(axes)} 0.0 0.0 {damping:.17g}"] if coupling == "tri" else []
        return " ".join(words)

    def _scaled(self, pressure: float) -> float:
        """The pressure in LAMMPS's box, of another height, that gives the same force per length."""
        if pressure == 0.0:
            return 0.0
        own = abs(float(np.linalg.det(self._own)))
        if own == 0.0:
            raise ValueError("a pressure needs a cell with a volume: give every cell vector a length, or use 0")
        lengths = np.where(self.pbc, np.diag(self._edges), self._high - self._low)
        return pressure * own / float(np.prod(lengths))

    def _boundary(self) -> list[str]:
        """Shrink-wrapped around molecules; around slabs and wires the box grows with the atoms, but does not shrink."""
        free = "m" if self.pbc.any() else "s"
        return ["p" if periodic else free for periodic in self.pbc]

    def _region(self) -> str:
        low, high = np.where(self.pbc, 0.0, self._low), np.where(self.pbc, np.diag(self._edges), self._high)
        bounds = " ".join(f"{a:.17g} {b:.17g}" for a, b in zip(low, high, strict=True))
        if not self.pbc.any():
            return f"region cell block {bounds} units box"
        tilts = " ".join(f"{self._edges[row, column]:.17g}" for row, column in ((1, 0), (2, 0), (2, 1)))
        return f"region cell prism {bounds} {tilts} units box"  # upright ones, too: a barostat may tilt them

    def _turned(self, atoms: Atoms) -> Array:
        if not self.pbc.any():
            return np.array(atoms.positions)
        if self.pbc.all():
            return np.asarray(Prism(self._own).vector_to_lammps(atoms.get_positions(wrap=True)))
        inside = Atoms(atoms.numbers, atoms.positions, cell=perpendicular_cell(self._own, self.pbc), pbc=self.pbc)
        turned: Array = inside.get_positions(wrap=True) @ self.rotation
        return turned


def deformation(cell: Array, start: Atoms) -> Array:
    """Deformation [3, 3] that turns the cell of a structure into another one; of free directions, none."""
    if not is_partly_periodic(start):
        return np.asarray(np.linalg.solve(start.cell[:], cell))
    before, after = (perpendicular_cell(vectors, start.pbc) for vectors in (start.cell[:], cell))
    return np.asarray(np.linalg.solve(before, after))
