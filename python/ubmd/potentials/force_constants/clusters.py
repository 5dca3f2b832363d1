"""Clusters of sites on the infinite lattice, and their orbits under the space group.

A site is four integers (cell offset, sublattice), packed into one int64 *key* that is linear in the offset: a lattice
translation adds a constant, and the order of keys doesn't change under it. A cluster of order n is a sorted row of n
keys (sites may repeat), moved so that its first site lies in cell 0: one row per cluster modulo translations.

Orbits of clusters as in Eriksson, Fransson and Erhart, Adv. Theory Simul. 2, 1800184 (2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ubmd.errors import SettingsError
from ubmd.potentials.force_constants.lattice import Lattice
from ubmd.potentials.force_constants.symmetry import Integers

SITE_BITS, OFFSET_BITS = 16, 13
DISTANCE_TOLERANCE = 1e-4  # Å: a shell of neighbours this close above the cutoff still belongs to it
_WEIGHTS = np.array([2 * i + 1 for i in range(6)], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def encode(sites: Integers) -> Integers:
    """Keys [...] of sites [..., 4]."""
    weights = np.array([1 << (2 * OFFSET_BITS), 1 << OFFSET_BITS, 1], dtype=np.int64) << SITE_BITS
    return sites[..., :3] @ weights + sites[..., 3]


def decode(keys: np.ndarray) -> np.ndarray:
    """Sites [..., 4] of keys [...]."""
    half, mask = 1 << (OFFSET_BITS - 1), (1 << OFFSET_BITS) - 1
    rest = keys >> SITE_BITS
    z = ((rest + half) & mask) - half
    rest = (rest - z) >> OFFSET_BITS
    y = ((rest + half) & mask) - half
    return np.stack([(rest - y) >> OFFSET_BITS, y, z, keys & ((1 << SITE_BITS) - 1)], axis=-1)


def anchor(key: Integers) -> Integers:
    """Translation part of keys: subtracting it moves the site to cell 0."""
    return (key >> SITE_BITS) << SITE_BITS


def canonical(rows: Integers) -> Integers:
    """Sorted rows [..., n] of keys with the first site in cell 0."""
    rows = np.sort(rows, axis=-1)
    return rows - anchor(rows[..., :1])


def neighbours(lattice: Lattice, sublattice: int, cutoff: float) -> np.ndarray:
    """Sites [N, 4] within the cutoff (Å) of a site in cell 0, itself included."""
    heights = 1.0 / np.linalg.norm(np.linalg.inv(lattice.cell), axis=0)
    spread = np.ptp(lattice.scaled, axis=0)
    reach = np.ceil(cutoff / heights + spread).astype(int)
    cells = np.stack(np.meshgrid(*[np.arange(-r, r + 1) for r in reach], indexing="ij"), axis=-1).reshape(-1, 1, 3)
    vectors = (cells + lattice.scaled - lattice.scaled[sublattice]) @ lattice.cell
    cell, site = np.nonzero(np.linalg.norm(vectors, axis=-1) <= cutoff + DISTANCE_TOLERANCE)
    return np.concatenate([cells[cell, 0], site[:, None]], axis=1).astype(np.int64)


class ClusterTable:
    """All clusters of one order on a lattice, modulo translations.

    Attributes:
        rows: canonical keys [C, n].
    """

    def __init__(self, lattice: Lattice, order: int, cutoff: float) -> None:
        self.lattice, self.order, self.cutoff = lattice, order, cutoff
        self.rows = np.concatenate([_expand(c, order) for c in _cliques(lattice, order, cutoff)])
        self._hash = _hash(self.rows)
        self._sorted = np.argsort(self._hash)
        self._hash = self._hash[self._sorted]

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Indices [...] of canonical rows [..., n].

        Raises:
            SettingsError: a row isn't in the table, because the cutoff cuts through a shell of neighbours.
        """
        position = np.searchsorted(self._hash, _hash(rows)).clip(max=len(self._hash) - 1)
        index: Integers = self._sorted[position]
        if not (self.rows[index] == rows).all():
            raise SettingsError(
                f"The cutoff {self.cutoff} Å of order {self.order} cuts through a shell of neighbours: "
                "move it by 0.01 Å."
            )
        return index

    def images(self) -> np.ndarray:
        """Index [G, C] of the cluster to which each operation takes each cluster."""
        keys, inverse = np.unique(self.rows, return_inverse=True)
        inverse = inverse.reshape(self.rows.shape)
        sites = decode(keys)
        result = np.empty((len(self.lattice.rotations), len(self.rows)), dtype=np.int64)
        for g in range(len(result)):
            moved = encode(self.lattice.images(np.full(len(sites), g), sites))
            result[g] = self.find(canonical(moved[inverse]))
        return result


@dataclass(frozen=True, eq=False)
class Orbit:
    """Clusters that the space group takes into one another; body k of a cluster is the image of the prototype's body k.

    Attributes:
        sites: distinct sites of the prototype [b, 4].
        multiplicity: how often each occurs [b]; the sum is the order.
        operations: one operation per cluster of the orbit modulo translations [N]; the first gives the prototype.
        stabiliser: operations that keep the prototype [H] (up to a translation).
        permutations: body to which each of them takes body k [H, b].
    """

    sites: np.ndarray
    multiplicity: tuple[int, ...]
    operations: np.ndarray
    stabiliser: np.ndarray
    permutations: np.ndarray


@dataclass(frozen=True, eq=False)
class OrbitTable:
    """Orbits of a cluster table, with the orbit and one operation (prototype to cluster) of every cluster [C]."""

    clusters: ClusterTable
    orbits: list[Orbit]
    orbit_of: np.ndarray
    operation_of: np.ndarray

    @classmethod
    def build(cls, clusters: ClusterTable) -> OrbitTable:
        images = clusters.images()
        prototypes = np.unique(images.min(axis=0))
        orbit_of, operation_of = np.empty((2, images.shape[1]), dtype=np.int64)
        orbits = []
        for i, prototype in enumerate(prototypes):
            members, operations = np.unique(images[:, prototype], return_index=True)
            orbit_of[members], operation_of[members] = i, operations
            stabiliser = np.nonzero(images[:, prototype] == prototype)[0]
            orbits.append(_orbit(clusters.lattice, clusters.rows[prototype], operations, stabiliser))
        return cls(clusters, orbits, orbit_of, operation_of)


def _orbit(lattice: Lattice, row: np.ndarray, operations: np.ndarray, stabiliser: np.ndarray) -> Orbit:
    keys, counts = np.unique(row, return_counts=True)
    sites = decode(keys)
    moved = encode(
        lattice.images(np.repeat(stabiliser[:, None], len(keys), axis=1), np.tile(sites, (len(stabiliser), 1, 1)))
    )
    moved -= anchor(moved.min(axis=1, keepdims=True))
    permutations = np.searchsorted(keys, moved)
    return Orbit(sites, tuple(int(c) for c in counts), operations, stabiliser, permutations)


def _hash(rows: np.ndarray) -> np.ndarray:
    """Hash [...] of rows [..., n] modulo 2^64 (a collision can only make `find` raise an error)."""
    mixed = rows.astype(np.uint64)
    mixed ^= mixed >> np.uint64(29)
    mixed = mixed * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    hashes: np.ndarray = (mixed * _WEIGHTS[: rows.shape[-1]]).sum(axis=-1, dtype=np.uint64)
    return hashes


def _cliques(lattice: Lattice, order: int, cutoff: float) -> list[np.ndarray]:
    """Sets of b = 1..order distinct sites with all pair distances within the cutoff: keys [C_b, b] for each b."""
    found: list[list[np.ndarray]] = [[] for _ in range(order)]
    for sublattice in range(len(lattice.numbers)):
        sites = neighbours(lattice, sublattice, cutoff)
        keys = encode(sites)
        later = np.argsort(keys)
        later = later[keys[later] > sublattice]  # the first site has the smallest key of the set
        keys, sites = keys[later], sites[later]
        positions = lattice.places(sites)
        near = np.linalg.norm(positions[:, None] - positions, axis=-1) <= cutoff + DISTANCE_TOLERANCE
        near = np.triu(near, 1)
        chosen, allowed = np.zeros((1, 0), dtype=np.int64), np.ones((1, len(keys)), dtype=bool)
        for bodies in range(order):
            first = np.full((len(chosen), 1), sublattice, dtype=np.int64)
            found[bodies].append(np.concatenate([first, keys[chosen]], axis=1))
            if bodies + 1 < order:
                clique, last = np.nonzero(allowed)
                chosen, allowed = np.column_stack([chosen[clique], last]), allowed[clique] & near[last]
    return [np.concatenate(rows) for rows in found]


def _expand(cliques: np.ndarray, order: int) -> np.ndarray:
    """Rows [., order] in which each site of the cliques [C, b] occurs at least once."""
    bodies = cliques.shape[1]
    rows = []
    for cuts in combinations(range(1, order), bodies - 1):
        counts = np.diff([0, *cuts, order])
        rows.append(np.repeat(cliques, counts, axis=1))
    return np.concatenate(rows)
