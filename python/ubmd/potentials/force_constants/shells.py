"""How far neighbours in a crystal move apart: what labels have, and a wall beyond it.

A force constant of order n multiplies differences of displacements of sites at most its cutoff apart (the sum rules
leave nothing else). A polynomial of order 3 and more has no lower bound: it falls without end in directions that labels
do not reach. The wall of a pair of neighbours,

    E = WALL (|u_i - u_j|/D - 1)^(n + 1) beyond D, n the largest order,

is zero on all labels, where no pair of that shell has a larger difference than D, and grows faster than the polynomial:
with it, a second order without negative curvature and pair functions (which are bounded), the energy has a lower bound.
Because it is zero on the labels, it is no part of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ubmd.potentials.force_constants.clusters import neighbours
from ubmd.potentials.force_constants.lattice import Lattice, Supercell

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

WALL = 20.0  # eV: for order 3, 10 meV at 1.15 D, 1.3 eV at 1.5 D
LEAST = 0.2  # D over the shortest distance between sites, at least: few labels of small displacements say little
NEAR = 1.4  # reach over the shortest distance, for crystals of order 2
_DECIMALS = 4  # of distances (Å) that are the same


@dataclass(frozen=True, eq=False)
class Differences:
    """All ordered pairs of neighbours in a box.

    Attributes:
        first, second: atoms [E].
        shell: [E].
    """

    first: Integers
    second: Integers
    shell: Integers

    def vectors(self, displacements: Array) -> Array:
        """u of the second minus u of the first [E, 3], Å, from displacements [n, 3]."""
        found: Array = displacements[self.second] - displacements[self.first]
        return found


class Shells:
    """Pairs of neighbouring sites; a shell is a pair of elements at one distance.

    Attributes:
        lattice: ideal crystal.
        sites: neighbours of each sublattice, [N, 4] each.
        shell: the shell of each, [N] each.
        distance: of each shell [K], Å.
    """

    def __init__(self, lattice: Lattice, reach: float) -> None:
        """``reach``: largest distance of neighbours, Å."""
        self.lattice = lattice
        self.sites: list[Integers] = []
        keys: list[Array] = []
        for s, number in enumerate(lattice.numbers):
            sites = neighbours(lattice, s, reach)
            vector = (sites[:, :3] + lattice.scaled[sites[:, 3]] - lattice.scaled[s]) @ lattice.cell
            distance = np.linalg.norm(vector, axis=1)
            other = distance > 1e-6
            elements = np.sort(np.stack([np.full(len(sites), number), lattice.numbers[sites[:, 3]]], 1), 1)
            self.sites.append(sites[other])
            keys.append(np.column_stack([elements, distance.round(_DECIMALS)])[other])
        unique, shell = np.unique(np.concatenate(keys), axis=0, return_inverse=True)
        self.shell: list[Integers] = np.split(shell.ravel(), np.cumsum([len(part) for part in keys])[:-1])
        self.distance: Array = unique[:, 2]
        self.least = LEAST * lattice.shortest_distance
        self._pairs: WeakKeyDictionary[Supercell, Differences] = WeakKeyDictionary()

    def pairs(self, box: Supercell) -> Differences:
        """Of a box; through its periodic images. Found once: every label is in one of few boxes."""
        if box not in self._pairs:
            self._pairs[box] = self._find_pairs(box)
        return self._pairs[box]

    def _find_pairs(self, box: Supercell) -> Differences:
        first, second, shells = [], [], []
        for s, (sites, shell) in enumerate(zip(self.sites, self.shell, strict=True)):
            atoms = np.nonzero(box.sublattice == s)[0]
            for site, kind in zip(sites, shell, strict=True):
                first.append(atoms)
                second.append(box.index(np.full(len(atoms), site[3]), box.offset[atoms] + site[:3]))
                shells.append(np.full(len(atoms), kind))
        return Differences(np.concatenate(first), np.concatenate(second), np.concatenate(shells))

    def no_labels(self) -> Array:
        """D [K] before there are labels, Å."""
        return np.full(len(self.distance), self.least)

    def largest(self, displacements: Array, box: Supercell) -> Array:
        """Largest |u_i - u_j| of each shell [K], Å, for displacements [n, 3]; at least that of `no_labels`."""
        pairs = self.pairs(box)
        found = self.no_labels()
        np.maximum.at(found, pairs.shell, np.linalg.norm(pairs.vectors(displacements), axis=1))
        return found

    def wall(self, limits: Array, power: int, displacements: Array, box: Supercell) -> tuple[float, Array]:
        """Energy (eV) and forces [n, 3] (eV/Å) of the wall beyond limits D [K] (Å)."""
        pairs = self.pairs(box)
        vector = pairs.vectors(displacements)
        size, limit = np.linalg.norm(vector, axis=1), limits[pairs.shell]
        excess = np.maximum(size / limit - 1.0, 0.0)
        slope = WALL * power * excess ** (power - 1) / limit / np.where(size > 0.0, size, 1.0)
        forces = np.zeros_like(displacements)
        np.add.at(forces, pairs.first, slope[:, None] * vector)
        return 0.5 * WALL * float(np.sum(excess**power)), forces
