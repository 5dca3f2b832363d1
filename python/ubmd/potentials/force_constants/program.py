"""Flat tables of a cluster basis, from which energies, forces and features are computed centre by centre.

A centre on sublattice s sees the displacements of its K_s *relative sites*. Every cluster of the crystal belongs to one
centre, its *anchor*; its energy is a multilinear form of the monomials x^a y^b z^c (degree m_k) of its bodies,

    E = sum_(i1 ... ib) c_(i1 ... ib) M^(m1)_i1(u_1) ... M^(mb)_ib(u_b),

with coefficients in the crystal's Cartesian frame. They come from the parameters in three steps: raw coefficients of an
order (`OrderBasis.parameters`), tensor of each orbit's prototype (`OrderBasis.raw`), and each cluster's operation.
Clusters of one sublattice and one tuple of degrees form a *block*; in it bodies have rising degrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import factorial, prod

import numpy as np

from ubmd.potentials.force_constants.basis import ClusterBasis, _representations, _symmetric_indices
from ubmd.potentials.force_constants.clusters import anchor, encode, neighbours
from ubmd.potentials.force_constants.lattice import Lattice

MAX_BODIES = 6


@dataclass(frozen=True, eq=False)
class Block:
    """Clusters (or members) of one sublattice and one tuple of degrees.

    Attributes:
        sublattice: of the centre.
        first, count: rows of the tables.
        offset: where its coefficients [count, prod(D)] begin; of members: body that is the centre.
        degrees: rising.
    """

    sublattice: int
    first: int
    count: int
    offset: int
    degrees: tuple[int, ...]

    def row(self) -> list[int]:
        """The same as a list of integers."""
        return [self.sublattice, self.first, self.count, self.offset, *self.degrees]


def block_table(blocks: list[Block]) -> np.ndarray:
    """Blocks as one array [B, 10], no degree being 0."""
    result = np.zeros((len(blocks), 4 + MAX_BODIES), dtype=np.int64)
    for i, block in enumerate(blocks):
        result[i, : len(block.row())] = block.row()
    return result


@dataclass(frozen=True, eq=False)
class BasisTables:
    """Tables of a basis.

    Attributes:
        sites: relative sites [K_s, 4] of each sublattice, the centre first, all within the largest cutoff.
        blocks: clusters by block, each cluster of the crystal once.
        bodies: relative site of each body of each cluster [N, 6], -1 where there is none.
        operations: operation that takes the orbit's prototype to the cluster [N].
        components: component of the prototypes' tensors that each coefficient [C] comes from before rotation.
        members: all clusters that contain the centre, by block and by the body that is the centre; here bodies are in
            the order of the orbit's prototype, so degrees need not rise.
        member_bodies: relative sites [M, 6]; the centre is 0.
        member_orbits, member_operations: orbit (row of `orbits`) and operation of each [M].
        orbits: components D and raw coefficients p of each orbit [O, 2], in the order of the basis.
        orders: raw coefficients and parameters of each order [n, 2].
        raw: tensors [D, p] of all orbits, concatenated to a vector.
        parameters: raw coefficients by parameters of all orders, concatenated to a vector.
        turns: for each degree from 1: matrices [G, D, D] from the prototype's isometric components to coefficients.
    """

    sites: list[np.ndarray]
    blocks: list[Block]
    bodies: np.ndarray
    operations: np.ndarray
    components: np.ndarray
    members: list[Block]
    member_bodies: np.ndarray
    member_orbits: np.ndarray
    member_operations: np.ndarray
    orbits: np.ndarray
    orders: np.ndarray
    raw: np.ndarray
    parameters: np.ndarray
    turns: list[np.ndarray]

    def sparse_turns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The matrices' non-zero elements, row by row: first row of each degree [8], first element of each row, columns
        and values of the elements."""
        starts, firsts, columns, values = [0, 0], [np.zeros(1, dtype=np.int64)], [], []
        for turn in self.turns:
            rows = turn.reshape(-1, turn.shape[-1])
            starts.append(starts[-1] + len(rows))
            firsts.append(firsts[-1][-1] + np.cumsum(np.count_nonzero(rows, axis=1)))
            columns.append(np.nonzero(rows)[1])
            values.append(rows[rows != 0.0])
        starts += [starts[-1]] * (MAX_BODIES + 2 - len(starts))
        return np.array(starts), np.concatenate(firsts), np.concatenate(columns), np.concatenate(values)

    @classmethod
    def compile(cls, basis: ClusterBasis, reach: float = 0.0) -> BasisTables:
        """Tables of a basis; its lattice's Cartesian frame is that of the displacements.

        Relative sites are those within the largest cutoff, or within ``reach`` (Å) if that is more.
        """
        lattice = basis.lattice
        reach = max(reach, *basis.cutoffs.values())
        sites = [_relative_sites(lattice, s, reach) for s in range(len(lattice.numbers))]
        index = [{int(key): i for i, key in enumerate(encode(s).tolist())} for s in sites]
        clusters = _sorted_clusters(basis, index)
        blocks, components, offset = [], [], 0
        for first, count in _runs([(c.sublattice, c.degrees) for c in clusters]):
            some = clusters[first : first + count]
            blocks.append(Block(some[0].sublattice, first, count, offset, some[0].degrees))
            components += [c.components for c in some]
            offset += sum(len(c.components) for c in some)
        members, member_bodies, member_orbits, member_operations = _members(clusters, sites, index)
        parts = basis.parts
        return cls(
            sites=sites,
            blocks=blocks,
            bodies=_padded([c.bodies for c in clusters]),
            operations=np.array([c.operation for c in clusters], dtype=np.int64),
            components=np.concatenate(components),
            members=members,
            member_bodies=member_bodies,
            member_orbits=member_orbits,
            member_operations=member_operations,
            orbits=np.array([basis.shape for part in parts for basis in part.raw], dtype=np.int64),
            orders=np.array([part.parameters.shape for part in parts], dtype=np.int64),
            raw=np.concatenate([basis.ravel() for part in parts for basis in part.raw]),
            parameters=np.concatenate([part.parameters.ravel() for part in parts]),
            turns=[_turns(lattice, m) for m in range(1, max(basis.orders) + 1)],
        )


@dataclass(frozen=True, eq=False)
class _Cluster:
    sublattice: int
    degrees: tuple[int, ...]
    bodies: tuple[int, ...]  # relative sites of the anchor
    operation: int
    components: np.ndarray
    orbit: int
    prototype: tuple[tuple[int, ...], tuple[int, ...]]  # degrees and bodies in the order of the prototype


@cache
def powers(degree: int) -> np.ndarray:
    """Exponents [D, 3] of the monomials of one degree."""
    indices = _symmetric_indices(degree)
    return np.stack([(indices == axis).sum(axis=1) for axis in range(3)], axis=1)


@cache
def derivatives(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Monomial of the degree below [3, D] and factor [3, D] of the derivatives by x, y, z."""
    lower = {tuple(p): i for i, p in enumerate(powers(degree - 1).tolist())}
    position, factor = np.zeros((2, 3, len(powers(degree))), dtype=np.int64)
    for j, exponents in enumerate(powers(degree).tolist()):
        for axis in range(3):
            if exponents[axis] > 0:
                reduced = tuple(e - (a == axis) for a, e in enumerate(exponents))
                position[axis, j], factor[axis, j] = lower[reduced], exponents[axis]
    return position, factor


@cache
def recursion(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Monomial of the degree below and axis, both [D], whose product each monomial is."""
    lower = {tuple(index): i for i, index in enumerate(_symmetric_indices(degree - 1).tolist())}
    indices = _symmetric_indices(degree).tolist()
    return np.array([lower[tuple(i[:-1])] for i in indices]), np.array([i[-1] for i in indices])


def _relative_sites(lattice: Lattice, sublattice: int, cutoff: float) -> np.ndarray:
    sites = neighbours(lattice, sublattice, cutoff)
    vectors = (sites[:, :3] + lattice.scaled[sites[:, 3]] - lattice.scaled[sublattice]) @ lattice.cell
    return sites[np.lexsort([encode(sites), np.round(np.linalg.norm(vectors, axis=1), 6)])]


def _turns(lattice: Lattice, degree: int) -> np.ndarray:
    """Isometric components are sqrt(m!/a!b!c!) times those of monomials; the energy has 1/m! for each body."""
    counts = factorial(degree) / np.array([prod(factorial(e) for e in p) for p in powers(degree).tolist()])
    turns = _representations(lattice)[degree].copy()
    turns[np.abs(turns) < 1e-14] = 0.0  # rounding of rotations that only swap axes
    scaled: np.ndarray = (np.sqrt(counts) / factorial(degree))[:, None] * turns
    return scaled


def _sorted_clusters(basis: ClusterBasis, index: list[dict[int, int]]) -> list[_Cluster]:
    clusters: list[_Cluster] = []
    start, number = 0, 0
    for part in basis.parts:
        for orbit, raw in zip(part.orbits, part.raw, strict=True):
            count, bodies = len(orbit.operations), len(orbit.sites)
            operations = np.repeat(orbit.operations[:, None], bodies, axis=1)
            images = basis.lattice.images(operations, np.tile(orbit.sites, (count, 1, 1)))
            numbers = np.arange(start, start + len(raw)).reshape([_dimension(m) for m in orbit.multiplicity])
            for operation, keys in zip(orbit.operations.tolist(), encode(images), strict=True):
                clusters.append(_cluster(number, orbit.multiplicity, operation, keys, numbers, index))
            start, number = start + len(raw), number + 1
    return sorted(clusters, key=lambda c: (c.sublattice, c.degrees, c.bodies))


def _cluster(
    orbit: int,
    multiplicity: tuple[int, ...],
    operation: int,
    keys: np.ndarray,
    numbers: np.ndarray,
    index: list[dict[int, int]],
) -> _Cluster:
    """A cluster with bodies in rising degree; among equal degrees nearer ones first, for many common beginnings."""
    keys = keys - anchor(keys.min())
    sublattice = int(keys.min())
    places = [index[sublattice][int(key)] for key in keys]
    order = sorted(range(len(keys)), key=lambda k: (multiplicity[k], places[k]))
    return _Cluster(
        sublattice=sublattice,
        degrees=tuple(multiplicity[k] for k in order),
        bodies=tuple(places[k] for k in order),
        operation=operation,
        components=numbers.transpose(order).ravel(),
        orbit=orbit,
        prototype=(multiplicity, tuple(places)),
    )


def _members(
    clusters: list[_Cluster], sites: list[np.ndarray], index: list[dict[int, int]]
) -> tuple[list[Block], np.ndarray, np.ndarray, np.ndarray]:
    """Blocks, relative sites [M, 6], orbits [M] and operations [M] of all clusters that contain a centre."""
    rows = []
    for cluster in clusters:
        degrees, bodies = cluster.prototype
        keys = encode(sites[cluster.sublattice][list(bodies)])
        for k, key in enumerate(keys):
            moved = keys - anchor(key)
            sublattice = int(moved[k])
            places = [index[sublattice][int(m)] for m in moved]
            rows.append((sublattice, degrees, k, cluster.orbit, cluster.operation, places))
    rows.sort()
    blocks = [
        Block(rows[first][0], first, count, rows[first][2], rows[first][1])
        for first, count in _runs([row[:3] for row in rows])
    ]
    orbits, operations = (np.array([row[i] for row in rows], dtype=np.int64) for i in (3, 4))
    return blocks, _padded([row[5] for row in rows]), orbits, operations


def _runs(keys: Sequence[tuple[object, ...]]) -> list[tuple[int, int]]:
    """Start and length of each run of equal keys."""
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    return [(start, stop - start) for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True)]


def _dimension(degree: int) -> int:
    return (degree + 1) * (degree + 2) // 2


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    result = np.full((len(rows), MAX_BODIES), -1, dtype=np.int64)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result
