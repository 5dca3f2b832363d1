"""Pair functions of the true distance beside the force constants of a crystal, and a fixed repulsive core.

E = sum over pairs of V_ab(r), V_ab(r) = sum_k w_k exp(-(r - r_k)²/2w²) f(r), where r is the distance of the atoms, not
that of their sites, and f(r) = (1 + cos(πr/r_c))/2 below the cutoff r_c. The energy is linear in the coefficients w_k,
so that the regression, its Bayesian errors and the bias are those of force constants. V_ab is bounded: added to a
second order without negative curvature, it gives an energy that no displacement lowers without limit.

The functions of a pair of elements begin at START of their shortest distance in the ideal crystal. Coefficients are
combined to parameters that exert no force on the atoms of the ideal crystal.

Where no label reaches, V_ab says nothing and goes to 0 for r → 0. Below the shortest labelled distance d_ab there is a
fixed core CORE (d_ab/r - 1)³: without bound for r → 0, with two continuous derivatives at d_ab, zero on all labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from ase.neighborlist import primitive_neighbor_list
from numpy.typing import NDArray

from ubmd.errors import SettingsError
from ubmd.potentials.force_constants.clusters import neighbours
from ubmd.potentials.force_constants.lattice import Lattice, Supercell

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

PAIRS = 0  # their "order" among the orders of parameters
START = 0.75  # first centre over the shortest distance in the ideal crystal
SPACING = WIDTH = 0.3  # Å, between centres and of the Gaussians
MARGIN = 0.2  # Å, from the last centre to the cutoff at least
CORE = 100.0  # eV: 0.14 eV at 0.9 d, 0.55 eV at 0.85 d


@dataclass(frozen=True, eq=False)
class Neighbours:
    """All ordered pairs of a structure that are nearer than the cutoff.

    Attributes:
        first, second: atoms [E].
        vector: from the first to the second [E, 3], Å.
        kind: kind of pair [E].
    """

    first: Integers
    second: Integers
    vector: Array
    kind: Integers

    @property
    def distance(self) -> Array:
        """Å [E]."""
        found: Array = np.linalg.norm(self.vector, axis=1)
        return found


@dataclass(frozen=True, eq=False)
class PairFunctions:
    """Pair functions of the elements of a crystal.

    Attributes:
        lattice: ideal crystal.
        cutoff: Å.
        species: atomic numbers of each kind of pair [T, 2], the smaller first.
        kinds: kind of pair of each function [R].
        centres: its r_k [R], Å.
        parameters: coefficients w of each parameter [R, P], orthonormal columns.
    """

    lattice: Lattice
    cutoff: float
    species: Integers
    kinds: Integers
    centres: Array
    parameters: Array

    @classmethod
    def build(cls, lattice: Lattice, cutoff: float) -> PairFunctions:
        """Functions up to a cutoff (Å).

        Raises:
            SettingsError: the cutoff is no positive length, or so short that no function is left.
        """
        if not (math.isfinite(cutoff) and cutoff > 0.0):
            raise SettingsError(
                "crystal.pairs: the cutoff of the pair functions is not a positive length; give it in Å."
            )
        species = np.array(list(combinations_with_replacement(np.unique(lattice.numbers).tolist(), 2)), dtype=np.int64)
        kinds: list[int] = []
        centres: list[float] = []
        for kind, shortest in enumerate(ideal_distances(lattice, species)):
            start = math.floor(10.0 * START * shortest) / 10.0
            grid = np.arange(start, cutoff - MARGIN + 1e-9, SPACING)
            kinds += [kind] * len(grid)
            centres += grid.tolist()
        functions = cls(lattice, cutoff, species, np.array(kinds, np.int64), np.array(centres), np.eye(len(kinds)))
        parameters = functions._without_ideal_force() if kinds else np.zeros((0, 0))
        if parameters.shape[1] == 0:
            raise SettingsError(
                f"crystal.pairs = {cutoff:g} Å leaves no pair function: raise it beyond the nearest neighbours."
            )
        return cls(lattice, cutoff, species, functions.kinds, functions.centres, parameters)

    @property
    def n_parameters(self) -> int:
        """P."""
        return int(self.parameters.shape[1])

    def neighbours(self, displacements: Array, box: Supercell) -> Neighbours:
        """Pairs of displaced atoms [n, 3] (Å) of a box."""
        positions = box.ideal + displacements
        i, j, vector = primitive_neighbor_list("ijD", [True] * 3, box.cell, positions, self.cutoff)
        numbers = self.lattice.numbers[box.sublattice]
        return Neighbours(i, j, vector, self.kind_of(numbers[i], numbers[j]))

    def kind_of(self, first: Integers, second: Integers) -> Integers:
        """Kind of pair [...] of two atomic numbers [...]."""
        table = np.full((self.species.max() + 1,) * 2, -1, dtype=np.int64)
        table[self.species[:, 0], self.species[:, 1]] = table[self.species[:, 1], self.species[:, 0]] = np.arange(
            len(self.species)
        )
        found: Integers = table[first, second]
        return found

    def energy_features(self, displacements: Array, box: Supercell) -> Array:
        """Derivatives [P] of the energy beyond that of the ideal crystal by the parameters."""
        return (self._sums(displacements, box) - self._sums(np.zeros_like(displacements), box)) @ self.parameters

    def force_matrix(self, displacements: Array, box: Supercell) -> Array:
        """Derivatives [3n, P] of the forces by the parameters."""
        pairs = self.neighbours(displacements, box)
        return self._forces(pairs, len(displacements)).reshape(-1, len(self.kinds)) @ self.parameters

    def hessian(self, vector: Array, kind: Integers) -> Array:
        """Second derivatives [E, 3, 3, P] of the energy of single pairs [E, 3] by the vector between them."""
        distance = np.linalg.norm(vector, axis=1)
        _, slope, curvature = self.radial(distance, kind)
        axis = vector / distance[:, None]
        along = axis[:, :, None] * axis[:, None, :]
        across = np.eye(3) - along
        found: Array = np.einsum("eab,er->eabr", along, curvature)
        found += np.einsum("eab,er->eabr", across, slope / distance[:, None])
        return found @ self.parameters

    def radial(self, distance: Array, kind: Integers) -> tuple[Array, Array, Array]:
        """Values of the functions at distances [E] of pairs of some kinds, and two derivatives, each [E, R].

        Functions of other kinds are zero.
        """
        inside = (distance < self.cutoff)[:, None] & (kind[:, None] == self.kinds)
        x = (distance[:, None] - self.centres) / WIDTH
        gauss = np.where(inside, np.exp(-0.5 * x**2), 0.0)
        wave = math.pi / self.cutoff
        f = 0.5 * (1.0 + np.cos(wave * distance))[:, None]
        f1 = -0.5 * wave * np.sin(wave * distance)[:, None]
        f2 = -0.5 * wave**2 * np.cos(wave * distance)[:, None]
        g1, g2 = -x / WIDTH * gauss, (x**2 - 1.0) / WIDTH**2 * gauss
        return gauss * f, g1 * f + gauss * f1, g2 * f + 2.0 * g1 * f1 + gauss * f2

    # The core

    def shortest(self, displacements: Array, box: Supercell) -> Array:
        """Shortest distance of each kind of pair [T], Å; the cutoff where none is nearer."""
        pairs = self.neighbours(displacements, box)
        found = np.full(len(self.species), self.cutoff)
        np.minimum.at(found, pairs.kind, pairs.distance)
        return found

    def ideal_core(self) -> Array:
        """Radii of the core [T] before there are labels: the shortest distances of the ideal crystal, Å."""
        return np.minimum(ideal_distances(self.lattice, self.species), self.cutoff)

    def core(self, radii: Array, displacements: Array, box: Supercell) -> tuple[float, Array]:
        """Energy (eV) and forces [n, 3] (eV/Å) of the core with radii [T] (Å)."""
        pairs = self.neighbours(displacements, box)
        distance, radius = pairs.distance, radii[pairs.kind]
        excess = np.maximum(radius / distance - 1.0, 0.0)
        slope = -3.0 * CORE * excess**2 * radius / distance**2
        forces = np.zeros_like(displacements)
        np.add.at(forces, pairs.first, (slope / distance)[:, None] * pairs.vector)
        return 0.5 * CORE * float(np.sum(excess**3)), forces

    # Files

    def arrays(self) -> dict[str, Array | Integers]:
        """What a file holds beside the lattice."""
        names = ("species", "kinds", "centres", "parameters")
        return {"pairs_cutoff": np.array(self.cutoff)} | {f"pairs_{name}": getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, lattice: Lattice, arrays: Mapping[str, Any]) -> PairFunctions:
        """From the content of a file; KeyError if something is missing."""
        names = ("species", "kinds", "centres", "parameters")
        return cls(lattice, float(arrays["pairs_cutoff"]), *(arrays[f"pairs_{name}"] for name in names))

    def _sums(self, displacements: Array, box: Supercell) -> Array:
        """Sum of each function over all pairs [R]; each pair counts once."""
        pairs = self.neighbours(displacements, box)
        total: Array = 0.5 * self.radial(pairs.distance, pairs.kind)[0].sum(axis=0)
        return total

    def _forces(self, pairs: Neighbours, n: int) -> Array:
        """Forces [n, 3, R] of all functions."""
        distance = pairs.distance
        slope = self.radial(distance, pairs.kind)[1]
        each = (pairs.vector / distance[:, None])[:, :, None] * slope[:, None, :]
        result = np.zeros((n, 3, len(self.kinds)))
        np.add.at(result, pairs.first, each)
        return result

    def _without_ideal_force(self) -> Array:
        """Orthonormal combinations [R, P] of the functions without force on the sites of the ideal crystal."""
        rows = []
        for sublattice in range(len(self.lattice.numbers)):
            _, vector, kind = site_pairs(self, sublattice, self.cutoff)
            slope = self.radial(np.linalg.norm(vector, axis=1), kind)[1]
            rows.append((vector / np.linalg.norm(vector, axis=1)[:, None]).T @ slope)
        _, values, right = np.linalg.svd(np.concatenate(rows))
        rank = int(np.sum(values > 1e-8 * max(values.max(), 1e-300)))
        combinations: Array = right[rank:].T
        return combinations


def site_pairs(functions: PairFunctions, sublattice: int, reach: float) -> tuple[Integers, Array, Integers]:
    """Sites [N, 4] within `reach` (Å) of a site, itself left out, vectors to them [N, 3] and kinds of pair [N]."""
    lattice = functions.lattice
    sites = neighbours(lattice, sublattice, reach)
    vector = (sites[:, :3] + lattice.scaled[sites[:, 3]] - lattice.scaled[sublattice]) @ lattice.cell
    other = np.linalg.norm(vector, axis=1) > 1e-6
    sites, vector = sites[other], vector[other]
    numbers = lattice.numbers[sites[:, 3]]
    return sites, vector, functions.kind_of(np.full_like(numbers, lattice.numbers[sublattice]), numbers)


def ideal_distances(lattice: Lattice, species: Integers) -> Array:
    """Shortest distance of each kind of pair [T] in the ideal crystal, Å."""
    found = np.full(len(species), np.inf)
    reach = 2.0 * lattice.shortest_distance
    while not np.isfinite(found).all():
        for s, number in enumerate(lattice.numbers):
            sites = neighbours(lattice, s, reach)
            vector = (sites[:, :3] + lattice.scaled[sites[:, 3]] - lattice.scaled[s]) @ lattice.cell
            distance = np.linalg.norm(vector, axis=1)
            for k, (a, b) in enumerate(species.tolist()):
                if number == a:
                    chosen = distance[(lattice.numbers[sites[:, 3]] == b) & (distance > 1e-6)]
                    found[k] = min(found[k], chosen.min(initial=np.inf))
        reach *= 1.5
    return found
