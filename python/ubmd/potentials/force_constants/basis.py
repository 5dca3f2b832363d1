"""Cluster basis of force-constant potentials: E - E0 = sum over clusters of (1/alpha!) Phi_alpha · u^alpha.

The force constants of a cluster with bodies k of multiplicity m_k are symmetric in the m_k indices of each body. They
are stored in isometric coordinates of symmetric tensors (`symmetric_embedding`), where rotations are orthogonal and the
norm is that of the full tensor. Per orbit the site symmetry leaves a subspace; the translational sum rules
sum_j Phi(i1 ... i_(n-1), j) = 0 couple the orbits of an order and leave the parameters. The basis is orthonormal in the
Frobenius norm of *all* force constants of that order per primitive cell (every ordered tuple of sites counts), or, with
a decay, in that norm with every force constant divided by the size that is expected at the cluster's diameter.

The expansion, its symmetry and its sum rules: Born and Huang, Dynamical Theory of Crystal Lattices (Clarendon Press,
1954); Esfarjani and Stokes, Phys. Rev. B 77, 144112 (2008). As a linear model of orbits of clusters, fitted to forces:
Zhou et al., Phys. Rev. Lett. 113, 185501 (2014); Eriksson, Fransson and Erhart, Adv. Theory Simul. 2, 1800184 (2019).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from io import BytesIO
from itertools import combinations_with_replacement, permutations, product
from math import factorial, prod
from pathlib import Path
from weakref import WeakKeyDictionary
from zipfile import BadZipFile

import numpy as np
from ase import Atoms

from ubmd.errors import DataError, ModelError, SettingsError
from ubmd.files import replacing
from ubmd.potentials.force_constants.clusters import (
    ClusterTable,
    Orbit,
    OrbitTable,
    anchor,
    canonical,
    encode,
    neighbours,
)
from ubmd.potentials.force_constants.lattice import Lattice, Supercell
from ubmd.potentials.force_constants.pairs import PAIRS, PairFunctions, site_pairs
from ubmd.potentials.force_constants.shells import NEAR, Shells
from ubmd.potentials.force_constants.symmetry import SYMMETRY_TOLERANCE

FORMAT, FORMAT_PAIRS = 1, 2  # earlier versions refuse a basis with pair functions
NULL_TOLERANCE = 1e-8  # eigenvalues of the sum rules' Gram matrix: rounding is below 1e-12, the rules above 1e-3


@dataclass(frozen=True, eq=False)
class OrderBasis:
    """Parameters of one order.

    Attributes:
        order, cutoff: order n and the largest pair distance in its clusters, Å.
        orbits: orbits of its clusters that have a force constant.
        raw: tensors of each orbit's prototype allowed by its site symmetry [D, p] in isometric coordinates.
        parameters: raw coefficients of each parameter [sum of p, P_n], orthonormal columns (see `_decaying`).
    """

    order: int
    cutoff: float
    orbits: list[Orbit]
    raw: list[np.ndarray]
    parameters: np.ndarray

    @classmethod
    def build(cls, lattice: Lattice, order: int, cutoff: float, decay: float | None = None) -> OrderBasis:
        table = OrbitTable.build(ClusterTable(lattice, order, cutoff))
        raw = [_allowed(lattice, orbit) for orbit in table.orbits]
        parameters = _translational_null_space(lattice, table, raw)
        if parameters.shape[1] == 0:
            raise SettingsError(
                f"Order {order} has no free force constant within {cutoff} Å: raise its cutoff or leave the order out."
            )
        if decay is not None:
            diameters = [_diameter(lattice, orbit) for orbit in table.orbits]
            parameters = _decaying(parameters, np.repeat(diameters, [basis.shape[1] for basis in raw]), decay)
        # symmetry may forbid every tensor of an orbit
        alive = [i for i, basis in enumerate(raw) if basis.shape[1] > 0]
        return cls(order, cutoff, [table.orbits[i] for i in alive], [raw[i] for i in alive], parameters)

    def tensors(self, parameters: np.ndarray) -> list[np.ndarray]:
        """Force constants of each orbit's prototype [D, K] in isometric coordinates, from parameters [P_n, K]."""
        ends = np.cumsum([basis.shape[1] for basis in self.raw])[:-1]
        pieces = np.split(self.parameters @ parameters, ends)
        return [basis @ piece for basis, piece in zip(self.raw, pieces, strict=True)]


class ClusterBasis:
    """Basis of a force-constant potential on a crystal; parameters have units of eV/Å^order.

    Pair functions of the true distance may be part of it: their parameters (eV) come last and have the order PAIRS.
    """

    def __init__(
        self,
        lattice: Lattice,
        parts: list[OrderBasis],
        decay: float | None = None,
        pairs: PairFunctions | None = None,
    ) -> None:
        self.lattice = lattice
        self.parts = parts
        self.decay = decay
        self.pairs = pairs
        self._plans: WeakKeyDictionary[Supercell, list[list[_OrbitPlan]]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[object, ...]:
        # the tables of boxes are computed again where they are needed
        return ClusterBasis, (self.lattice, self.parts, self.decay, self.pairs)

    @classmethod
    def build(
        cls,
        crystal: Atoms,
        cutoffs: Mapping[int, float],
        decay: float | None = None,
        tolerance: float = SYMMETRY_TOLERANCE,
        pairs: float | None = None,
    ) -> ClusterBasis:
        """Basis for an ideal crystal (any cell of it) and one cutoff (Å) per order, such as {2: 5.4, 3: 4.0, 4: 4.0}.

        Args:
            crystal: the ideal crystal.
            cutoffs: largest diameter of the clusters by order, Å.
            decay: length (Å) over which force constants are expected to fall by a factor e with the cluster's diameter.
                It decides what labels cannot: in a box shorter than twice a cutoff, the force constants of a pair and
                of its periodic images occur only as a sum, which is then assigned to the nearest ones. None: all alike.
            tolerance: of the symmetry, Å; with more than the default, the crystal is symmetrised first.
            pairs: cutoff of pair functions of the true distance, Å; None: no such functions.

        Raises:
            SettingsError: an order is outside 2-6, or a cutoff isn't positive or cuts through a shell of neighbours.
            DataError: the crystal has no usable symmetry.
        """
        if not cutoffs or not set(cutoffs) <= set(range(2, 7)):
            raise SettingsError(
                "crystal.cutoffs: force constants have orders 2 to 6; give one cutoff for each order wanted, from 2 on."
            )
        if not all(np.isfinite(c) and c > 0 for c in cutoffs.values()):
            raise SettingsError("crystal.cutoffs: a cutoff isn't a positive length; give every cutoff in Å.")
        lattice = Lattice.from_atoms(crystal, tolerance)
        parts = [OrderBasis.build(lattice, order, cutoffs[order], decay) for order in sorted(cutoffs)]
        return cls(lattice, parts, decay, None if pairs is None else PairFunctions.build(lattice, pairs))

    def without_pairs(self) -> ClusterBasis:
        """The force constants alone."""
        return self if self.pairs is None else ClusterBasis(self.lattice, self.parts, self.decay)

    @property
    def orders(self) -> list[int]:
        """Orders of the force constants."""
        return [part.order for part in self.parts]

    @property
    def all_orders(self) -> list[int]:
        """The same, and PAIRS if there are pair functions."""
        return self.orders if self.pairs is None else [*self.orders, PAIRS]

    @property
    def cutoffs(self) -> dict[int, float]:
        """Cutoff of each order, Å."""
        return {part.order: part.cutoff for part in self.parts}

    @property
    def all_cutoffs(self) -> dict[int, float]:
        """The same, and that of PAIRS if there are pair functions."""
        return self.cutoffs if self.pairs is None else self.cutoffs | {PAIRS: self.pairs.cutoff}

    @property
    def n_parameters(self) -> int:
        return len(self.parameter_orders)

    @property
    def parameter_orders(self) -> np.ndarray:
        """Order of each parameter, int [P]."""
        counts = [(part.parameters.shape[1], part.order) for part in self.parts]
        if self.pairs is not None:
            counts.append((self.pairs.n_parameters, PAIRS))
        return np.concatenate([np.full(count, order) for count, order in counts])

    def supercell(self, atoms: Atoms) -> Supercell:
        """Sites of a box, ideal or moderately displaced.

        Keep the object for all structures of that box: the tables of its clusters are made once.
        """
        return Supercell(self.lattice, atoms)

    def energy_features(self, structure: Atoms | np.ndarray, supercell: Supercell | None = None) -> np.ndarray:
        """Features [P] with E - E0 = features · θ of displacements [n, 3] (Å) in a supercell, or of atoms.

        Displacements of many structures [B, n, 3] give [B, P].
        """
        displacements, box = self._displacements(structure, supercell)
        if displacements.ndim == 3:
            return np.stack([self.energy_features(u, box) for u in displacements])
        monomials = self._monomials(displacements)
        result = []
        for part, plans in zip(self.parts, self._plan(box), strict=True):
            raw = [_energy(plan, monomials) @ basis for plan, basis in zip(plans, part.raw, strict=True)]
            result.append(np.concatenate(raw) @ part.parameters)
        if self.pairs is not None:
            result.append(self.pairs.energy_features(displacements, box))
        return np.concatenate(result)

    def force_matrix(self, structure: Atoms | np.ndarray, supercell: Supercell | None = None) -> np.ndarray:
        """Matrix A [3n, P] with F = A θ (eV/Å): minus the derivatives of the energy features.

        Displacements of many structures [B, n, 3] give their matrices one below the other [3nB, P].
        """
        displacements, box = self._displacements(structure, supercell)
        if displacements.ndim == 3:
            return np.concatenate([self.force_matrix(u, box) for u in displacements])
        monomials = self._monomials(displacements)
        n = len(displacements)
        result = np.empty((3 * n, self.n_parameters))
        start = 0
        for part, plans in zip(self.parts, self._plan(box), strict=True):
            raw = np.concatenate(
                [_gradient(plan, monomials, basis, n) for plan, basis in zip(plans, part.raw, strict=True)], axis=2
            )
            stop = start + part.parameters.shape[1]
            np.matmul(raw.reshape(3 * n, -1), -part.parameters, out=result[:, start:stop])
            start = stop
        if self.pairs is not None:
            result[:, start:] = self.pairs.force_matrix(displacements, box)
        return result

    def forces(
        self, parameters: np.ndarray, structure: Atoms | np.ndarray, supercell: Supercell | None = None
    ) -> np.ndarray:
        """Forces [n, 3] (eV/Å) of one structure for parameters [P]; [K, n, 3] for K sets of parameters [P, K].

        The same as the force matrix times the parameters, without the matrix; displacements of many structures
        [B, n, 3] add a first axis.
        """
        displacements, box = self._displacements(structure, supercell)
        if displacements.ndim == 3:
            return np.stack([self.forces(parameters, u, box) for u in displacements])
        many = np.asarray(parameters, dtype=np.float64).reshape(self.n_parameters, -1)
        monomials = self._monomials(displacements)
        result = np.zeros((len(displacements), 3, many.shape[1]))
        start = 0
        for part, plans in zip(self.parts, self._plan(box), strict=True):
            stop = start + part.parameters.shape[1]
            for plan, tensor in zip(plans, part.tensors(many[start:stop]), strict=True):
                result -= _gradient(plan, monomials, tensor, len(displacements))
            start = stop
        if self.pairs is not None:
            result += (self.pairs.force_matrix(displacements, box) @ many[start:]).reshape(result.shape)
        return result[..., 0] if np.ndim(parameters) == 1 else np.moveaxis(result, -1, 0)

    def force_constants(self, parameters: np.ndarray, order: int, supercell: Supercell) -> np.ndarray:
        """All force constants of one order between the atoms of a box, [n, ..., n, 3, ..., 3], eV/Å^order.

        Periodic images of a cluster are summed. For phonon programs; memory grows as (3n)^order. The second order has
        the pair functions' second derivatives at the ideal crystal in it.

        Raises:
            SettingsError: the basis lacks that order, or it is above 2 and there are pair functions.
        """
        if order not in self.orders:
            raise SettingsError(f"The basis has no order {order}: choose one of {self.orders}.")
        if self.pairs is not None and order > 2:
            raise SettingsError(
                "Force constants above order 2, as for heat conductivity, aren't available with crystal.pairs: fit a "
                "potential without it."
            )
        part, plans = next(x for x in zip(self.parts, self._plan(supercell), strict=True) if x[0].order == order)
        chosen = np.asarray(parameters, dtype=np.float64)[self.parameter_orders == order, None]
        result = np.zeros([len(supercell)] * order + [3] * order)
        for plan, tensor in zip(plans, part.tensors(chosen), strict=True):
            _add_force_constants(result, plan, full_tensor(plan.multiplicity, tensor), self.lattice)
        if self.pairs is not None:
            values = np.asarray(parameters, dtype=np.float64)[self.parameter_orders == PAIRS]
            for first, second, constants in _pair_constants(self.pairs, supercell):
                np.add.at(result, (first, second), constants @ values)
        return result

    @cached_property
    def shells(self) -> Shells:
        """Neighbours whose differences of displacements are compared with those of the labels."""
        higher = [part.cutoff for part in self.parts if part.order > 2]
        return Shells(self.lattice, max(higher, default=NEAR * self.lattice.shortest_distance))

    @property
    def wall_power(self) -> int:
        """Power of the wall beyond the labels: above that of the polynomial."""
        return max(self.orders) + 1

    def fixed(
        self,
        core: np.ndarray | None,
        limits: np.ndarray | None,
        structure: Atoms | np.ndarray,
        supercell: Supercell | None = None,
    ) -> tuple[float, np.ndarray]:
        """Energy (eV) and forces [n, 3] (eV/Å) of what has no parameters: core and wall (`Posterior.core`, `.limits`).

        Features and force matrix lack them. None: there is none.
        """
        displacements, box = self._displacements(structure, supercell)
        energy, forces = 0.0, np.zeros_like(displacements)
        if self.pairs is not None and core is not None:
            energy, forces = self.pairs.core(core, displacements, box)
        if limits is not None:
            of_wall = self.shells.wall(limits, self.wall_power, displacements, box)
            energy, forces = energy + of_wall[0], forces + of_wall[1]
        return energy, forces

    def save(self, path: Path) -> None:
        """Write the basis to an npz file."""
        with replacing(path) as handle:
            handle.write(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Content of that file."""
        arrays = {name: getattr(self.lattice, name) for name in _LATTICE_FIELDS}
        for part in self.parts:
            arrays[f"parameters_{part.order}"] = part.parameters
            for i, (orbit, raw) in enumerate(zip(part.orbits, part.raw, strict=True)):
                arrays |= {f"orbit_{part.order}_{i}_{name}": np.asarray(getattr(orbit, name)) for name in _ORBIT_FIELDS}
                arrays[f"orbit_{part.order}_{i}_raw"] = raw
        orbits = [[part.order, part.cutoff, len(part.orbits)] for part in self.parts]
        number = FORMAT
        if self.pairs is not None:
            arrays |= self.pairs.arrays()
            number = FORMAT_PAIRS
        header = json.dumps({"format": number, "kind": "cluster basis", "orders": orbits, "decay": self.decay})
        file = BytesIO()
        np.savez(file, header=np.array(header), **arrays)
        return file.getvalue()

    @classmethod
    def load(cls, path: Path | BytesIO) -> ClusterBasis:
        """Read what `save` wrote, or the content of such a file.

        Raises:
            ModelError: the file is missing, damaged or of another format.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays["header"]))
            if header["kind"] != "cluster basis" or header["format"] not in (FORMAT, FORMAT_PAIRS):
                raise ModelError(f"{path} has format {header['format']}, not {FORMAT}: build the cluster basis again.")
            lattice = Lattice(*(arrays[name] for name in _LATTICE_FIELDS))
            parts = [_load_order(arrays, order, cutoff, count) for order, cutoff, count in header["orders"]]
            pairs = PairFunctions.from_arrays(lattice, arrays) if header["format"] == FORMAT_PAIRS else None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ModelError(f"{path} is not a cluster basis ({error}): build and save it again.") from error
        return cls(lattice, parts, header.get("decay"), pairs)

    def _displacements(
        self, structure: Atoms | np.ndarray, supercell: Supercell | None
    ) -> tuple[np.ndarray, Supercell]:
        if isinstance(structure, Atoms):
            box = self.supercell(structure) if supercell is None else supercell
            return box.displacements(structure), box
        if supercell is None:
            raise DataError("Displacements alone do not define the box: give the supercell they belong to as well.")
        displacements = np.asarray(structure, dtype=np.float64)
        if displacements.ndim not in (2, 3) or displacements.shape[-2:] != (len(supercell), 3):
            raise DataError(f"Displacements must have shape [{len(supercell)}, 3], not {list(displacements.shape)}.")
        return displacements, supercell

    def _plan(self, supercell: Supercell) -> list[list[_OrbitPlan]]:
        if supercell not in self._plans:
            self._plans[supercell] = [[_orbit_plan(orbit, supercell) for orbit in part.orbits] for part in self.parts]
        return self._plans[supercell]

    def _monomials(self, displacements: np.ndarray) -> list[_Monomials]:
        """Entry m: monomials of degree m of the displacements rotated back by every operation."""
        rotations = self.lattice.cartesian_rotations
        turned = np.einsum("gba,nb->gna", rotations, displacements)
        return [_Monomials.build(m, turned, rotations) for m in range(max(self.orders) + 1)]


_LATTICE_FIELDS = ("cell", "scaled", "numbers", "rotations", "translations")
_ORBIT_FIELDS = ("sites", "multiplicity", "operations", "stabiliser", "permutations")


def _load_order(arrays: dict[str, np.ndarray], order: int, cutoff: float, count: int) -> OrderBasis:
    orbits, raw = [], []
    for i in range(count):
        fields = {name: arrays[f"orbit_{order}_{i}_{name}"] for name in _ORBIT_FIELDS}
        multiplicity = tuple(int(m) for m in fields.pop("multiplicity"))
        orbits.append(Orbit(multiplicity=multiplicity, **fields))
        raw.append(arrays[f"orbit_{order}_{i}_raw"])
    return OrderBasis(order, cutoff, orbits, raw, arrays[f"parameters_{order}"])


# Symmetric tensors


@cache
def _symmetric_indices(degree: int) -> np.ndarray:
    """Sorted Cartesian indices of the independent components [D, degree], D = (degree + 1)(degree + 2)/2."""
    indices = list(combinations_with_replacement(range(3), degree))
    return np.array(indices, dtype=np.int64).reshape(len(indices), degree)


@cache
def symmetric_embedding(degree: int) -> np.ndarray:
    """Isometry [3^degree, D] from independent components to full symmetric tensors."""
    column = {tuple(index): i for i, index in enumerate(_symmetric_indices(degree).tolist())}
    result = np.zeros((3**degree, len(column)))
    for row, index in enumerate(product(range(3), repeat=degree)):
        result[row, column[tuple(sorted(index))]] = 1.0
    embedding: np.ndarray = result / np.linalg.norm(result, axis=0)
    return embedding


@cache
def _contraction(degree: int) -> np.ndarray:
    """Matrix [D(degree - 1), 3, D(degree)] that frees one index of a symmetric tensor."""
    full = symmetric_embedding(degree).reshape(3 ** (degree - 1), 3, -1)
    return np.tensordot(symmetric_embedding(degree - 1).T, full, axes=1)


def _rotation_representation(rotations: np.ndarray, degree: int) -> np.ndarray:
    """Orthogonal matrices [G, D, D] of rotations [G, 3, 3] on symmetric tensors."""
    result = np.ones((len(rotations), 1, 1))
    for m in range(1, degree + 1):
        contraction = _contraction(m)
        result = np.einsum("iaj,gik,gab,kbl->gjl", contraction, result, rotations, contraction, optimize=True)
    return result


class _Representations:
    """Matrices of all operations on symmetric tensors of every degree."""

    def __init__(self, lattice: Lattice) -> None:
        self._rotations = lattice.cartesian_rotations
        self._known: dict[int, np.ndarray] = {}

    def __getitem__(self, degree: int) -> np.ndarray:
        if degree not in self._known:
            self._known[degree] = _rotation_representation(self._rotations, degree)
        return self._known[degree]


_REPRESENTATIONS: WeakKeyDictionary[Lattice, _Representations] = WeakKeyDictionary()


def _representations(lattice: Lattice) -> _Representations:
    return _REPRESENTATIONS.setdefault(lattice, _Representations(lattice))


def _dimensions(multiplicity: tuple[int, ...]) -> list[int]:
    return [(m + 1) * (m + 2) // 2 for m in multiplicity]


def _turned(lattice: Lattice, operation: int, multiplicity: tuple[int, ...], tensors: np.ndarray) -> np.ndarray:
    """Tensors [D1, ..., Db, p] of a prototype, rotated to its image under an operation (bodies in the same order)."""
    known = _representations(lattice)
    for axis, m in enumerate(multiplicity):
        tensors = np.moveaxis(np.tensordot(known[m][operation], tensors, axes=(1, axis)), 0, axis)
    return tensors


# Site symmetry and sum rules


def _allowed(lattice: Lattice, orbit: Orbit) -> np.ndarray:
    """Tensors of the prototype that its site symmetry allows [D, p], scaled to unit norm of all force constants."""
    shape = _dimensions(orbit.multiplicity)
    size = prod(shape)
    projector = np.zeros((size, size))
    identity = np.eye(size).reshape(*shape, size)
    for operation, permutation in zip(orbit.stabiliser, orbit.permutations, strict=True):
        turned = _turned(lattice, operation, orbit.multiplicity, identity)
        # body k goes to body permutation[k]: its axis becomes axis permutation[k]
        turned = np.moveaxis(turned, range(len(shape)), permutation.tolist())
        projector += turned.reshape(size, size)
    values, vectors = np.linalg.eigh(projector / len(orbit.stabiliser))
    tuples = factorial(sum(orbit.multiplicity)) / prod(factorial(m) for m in orbit.multiplicity)
    allowed: np.ndarray = vectors[:, values > 0.5] / np.sqrt(len(orbit.operations) * tuples)
    return allowed


def _translational_null_space(lattice: Lattice, table: OrbitTable, raw: list[np.ndarray]) -> np.ndarray:
    """Orthonormal raw coefficients [P_raw, P] that fulfil the translational sum rules of one order."""
    starts = np.concatenate([[0], np.cumsum([basis.shape[1] for basis in raw])])
    gram = np.zeros((starts[-1], starts[-1]))
    clusters = table.clusters
    if clusters.order == 2:
        lower = [_single_site(lattice, s) for s in range(len(lattice.numbers))]
    else:
        lower = OrbitTable.build(ClusterTable(lattice, clusters.order - 1, clusters.cutoff)).orbits
    for orbit in lower:
        blocks = _sum_rule(lattice, table, raw, orbit)
        if not blocks:
            continue
        columns = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in blocks])
        rule = np.concatenate(list(blocks.values()), axis=1)
        gram[np.ix_(columns, columns)] += rule.T @ rule * len(orbit.operations)
    values, vectors = np.linalg.eigh(gram / max(np.trace(gram) / max(len(gram), 1), 1e-300))
    return vectors[:, values < NULL_TOLERANCE]


def _diameter(lattice: Lattice, orbit: Orbit) -> float:
    """Largest distance between two bodies of an orbit's clusters, Å."""
    places = lattice.places(orbit.sites)
    return float(np.linalg.norm(places[:, None] - places, axis=-1).max())


def _decaying(parameters: np.ndarray, diameters: np.ndarray, decay: float) -> np.ndarray:
    """The same space of raw coefficients [P_raw, P] in a basis that is orthonormal for coefficients over their scale.

    The scale is exp(-d/decay) in the clusters' diameter d [P_raw], from the shortest pair on (single sites as that).
    Independent parameters of equal variance then stand for force constants with these scales: with θ = N x for the
    columns N that were there, x has the precision NᵀW^-2 N = L Lᵀ, and y = Lᵀx is what is independent.
    """
    shortest = diameters[diameters > 0.0].min(initial=diameters.max())
    scale = np.exp(-np.maximum(diameters - shortest, 0.0) / decay)
    weighted = parameters / scale[:, None]
    factor = np.linalg.cholesky(weighted.T @ weighted)
    return np.linalg.solve(factor, parameters.T).T


def _single_site(lattice: Lattice, sublattice: int) -> Orbit:
    none = np.zeros((1, 1), dtype=np.int64)
    return Orbit(np.array([[0, 0, 0, sublattice]]), (1,), none[0], none[0], none)


def _sum_rule(lattice: Lattice, table: OrbitTable, raw: list[np.ndarray], lower: Orbit) -> dict[int, np.ndarray]:
    """Sum over j of the force constants of `lower` plus site j, by orbit: matrices [3 D(lower), p]."""
    keys = encode(lower.sites)
    partners = _common_neighbours(lattice, lower.sites, table.clusters.cutoff)
    expanded = np.repeat(keys, lower.multiplicity)
    rows = np.concatenate([np.tile(expanded, (len(partners), 1)), partners[:, None]], axis=1)
    found = table.clusters.find(canonical(rows))
    blocks: dict[int, np.ndarray] = {}
    for partner, cluster in zip(partners, found, strict=True):
        index = int(table.orbit_of[cluster])
        if raw[index].shape[1] == 0:
            continue
        orbit, operation = table.orbits[index], int(table.operation_of[cluster])
        shape = _dimensions(orbit.multiplicity)
        tensors = _turned(lattice, operation, orbit.multiplicity, raw[index].reshape(*shape, -1))
        term = _with_free_partner(lattice, orbit, operation, tensors, keys, partner)
        blocks[index] = blocks[index] + term if index in blocks else term
    return blocks


def _common_neighbours(lattice: Lattice, sites: np.ndarray, cutoff: float) -> np.ndarray:
    """Keys of the sites within the cutoff of all sites [b, 4]."""
    common: np.ndarray | None = None
    for site in sites:
        near = encode(neighbours(lattice, int(site[3]), cutoff)) + anchor(encode(site))
        common = near if common is None else np.intersect1d(common, near)
    assert common is not None
    return common


def _with_free_partner(
    lattice: Lattice, orbit: Orbit, operation: int, tensors: np.ndarray, keys: np.ndarray, partner: int
) -> np.ndarray:
    """Tensors [D1, ..., Db, p] of a cluster as [3 D(lower), p]: axes of the lower bodies, then the partner."""
    moved = encode(lattice.images(np.full(len(orbit.sites), operation), orbit.sites))
    lowest = min(keys.min(), partner)
    moved += anchor(lowest) - anchor(moved.min())
    axes = [int(np.nonzero(moved == key)[0][0]) for key in keys]
    if partner in keys:
        place = int(np.nonzero(keys == partner)[0][0])
        tensors = tensors.transpose(*axes, tensors.ndim - 1)
        freed = np.tensordot(_contraction(orbit.multiplicity[axes[place]]), tensors, axes=(2, place))
        freed = np.moveaxis(freed, 0, place + 1)  # now [3, D1, ..., Db, p]
        return np.moveaxis(freed, 0, -2).reshape(-1, freed.shape[-1])
    last = int(np.nonzero(moved == partner)[0][0])
    return tensors.transpose(*axes, last, tensors.ndim - 1).reshape(-1, tensors.shape[-1])


# Evaluation


@dataclass(frozen=True, eq=False)
class _Monomials:
    """Monomials of one degree m in isometric coordinates, for displacements rotated back by every operation.

    Attributes:
        values: [G, n, D]; Phi · u^m = values · Phi.
        gradients: derivatives by the displacement before rotation [G, n, 3, D]; None for degree 0.
    """

    values: np.ndarray
    gradients: np.ndarray | None = field(default=None)

    @classmethod
    def build(cls, degree: int, turned: np.ndarray, rotations: np.ndarray) -> _Monomials:
        values = np.ones((*turned.shape[:2], 1))
        lower = values
        for m in range(1, degree + 1):
            lower = values
            values = np.einsum("gni,gna,iad->gnd", lower, turned, _contraction(m), optimize=True)
        if degree == 0:
            return cls(values)
        # d(u^m)/du_a = m u^(m-1) with one index free
        gradients = degree * np.einsum("gni,gab,ibd->gnad", lower, rotations, _contraction(degree), optimize=True)
        return cls(values, gradients)


@dataclass(frozen=True, eq=False)
class _Entry:
    """Clusters in which body `body` lies on one sublattice.

    Attributes:
        atoms: atoms of that sublattice [T].
        operations: operation of each cluster at an atom [E].
        others: atoms of the other bodies [b - 1, T, E].
    """

    body: int
    atoms: np.ndarray
    operations: np.ndarray
    others: np.ndarray


@dataclass(frozen=True, eq=False)
class _OrbitPlan:
    multiplicity: tuple[int, ...]
    entries: list[_Entry]


def _orbit_plan(orbit: Orbit, supercell: Supercell) -> _OrbitPlan:
    """Atoms of the clusters of an orbit in a supercell, seen from each atom and body."""
    lattice = supercell.lattice
    count, bodies = len(orbit.operations), len(orbit.sites)
    operations = np.repeat(orbit.operations[:, None], bodies, axis=1)
    images = lattice.images(operations, np.tile(orbit.sites, (count, 1, 1)))  # [N, b, 4]
    entries = []
    for body in range(bodies):
        for sublattice in np.unique(images[:, body, 3]):
            chosen = images[images[:, body, 3] == sublattice]
            atoms = np.nonzero(supercell.sublattice == sublattice)[0]
            relative = chosen[..., :3] - chosen[:, body : body + 1, :3]
            others = [
                supercell.index(chosen[:, k, 3], supercell.offset[atoms][:, None] + relative[:, k])
                for k in range(bodies)
                if k != body
            ]
            stacked = np.array(others, dtype=np.int64).reshape(bodies - 1, len(atoms), len(chosen))
            entries.append(_Entry(body, atoms, orbit.operations[images[:, body, 3] == sublattice], stacked))
    return _OrbitPlan(orbit.multiplicity, entries)


def _rest(plan: _OrbitPlan, entry: _Entry, monomials: list[_Monomials]) -> np.ndarray:
    """Products of the other bodies' monomials [T, E, D of the rest]."""
    degrees = [m for k, m in enumerate(plan.multiplicity) if k != entry.body]
    shape = (len(entry.atoms), len(entry.operations))
    result = np.ones((*shape, 1))
    for degree, atoms in zip(degrees, entry.others, strict=True):
        values = monomials[degree].values[entry.operations, atoms]
        result = (result[..., :, None] * values[..., None, :]).reshape(*shape, -1)
    return result


def _energy(plan: _OrbitPlan, monomials: list[_Monomials]) -> np.ndarray:
    """Moment tensor of an orbit [D]: sum of u^alpha / alpha! over its clusters, in the prototype's frame."""
    total: np.ndarray | float = 0.0
    for entry in plan.entries:
        if entry.body == 0:
            values = monomials[plan.multiplicity[0]].values[entry.operations, entry.atoms[:, None]]
            rest = _rest(plan, entry, monomials)
            total = total + values.reshape(-1, values.shape[-1]).T @ rest.reshape(-1, rest.shape[-1])
    return np.ravel(total) / prod(factorial(m) for m in plan.multiplicity)


def _gradient(plan: _OrbitPlan, monomials: list[_Monomials], basis: np.ndarray, n: int) -> np.ndarray:
    """Derivatives of an orbit's raw energy features by the displacements [n, 3, p]."""
    result = np.zeros((n, 3, basis.shape[1]))
    shape = _dimensions(plan.multiplicity)
    for entry in plan.entries:
        gradients = monomials[plan.multiplicity[entry.body]].gradients
        assert gradients is not None
        left = gradients[entry.operations, entry.atoms[:, None]]  # [T, E, 3, D]
        atoms, count = left.shape[:2]
        moments = left.reshape(atoms, count, -1).transpose(0, 2, 1) @ _rest(plan, entry, monomials)
        tensors = np.moveaxis(basis.reshape(*shape, -1), entry.body, 0).reshape(-1, basis.shape[1])
        result[entry.atoms] += moments.reshape(atoms, 3, -1) @ tensors
    return result / prod(factorial(m) for m in plan.multiplicity)


def full_tensor(multiplicity: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
    """All components [3, ..., 3] of isometric coordinates [D, 1], indices of body 0 first."""
    full = tensor.reshape(_dimensions(multiplicity))
    for axis, m in enumerate(multiplicity):
        full = np.moveaxis(np.tensordot(symmetric_embedding(m), full, axes=(1, axis)), 0, axis)
    return full.reshape([3] * sum(multiplicity))


def _add_force_constants(result: np.ndarray, plan: _OrbitPlan, tensor: np.ndarray, lattice: Lattice) -> None:
    """Add an orbit's force constants [3, ..., 3] (prototype) at every ordered tuple of atoms of its clusters."""
    order = tensor.ndim
    labels = np.repeat(np.arange(len(plan.multiplicity)), plan.multiplicity).tolist()
    for entry in (entry for entry in plan.entries if entry.body == 0):
        for cluster, operation in enumerate(entry.operations):
            turned = tensor
            for axis in range(order):
                turned = np.moveaxis(np.tensordot(lattice.cartesian_rotations[operation], turned, (1, axis)), 0, axis)
            atoms = [entry.atoms, *entry.others[:, :, cluster]]
            seen = set()
            for places in permutations(range(order)):
                bodies = tuple(labels[place] for place in places)
                if bodies not in seen:
                    seen.add(bodies)
                    # one body visits each atom of its sublattice once: no index tuple repeats within this statement
                    result[tuple(atoms[body] for body in bodies)] += turned.transpose(places)


def _pair_constants(pairs: PairFunctions, supercell: Supercell) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Atoms [N], atoms [N] and second-order force constants [N, 3, 3, P] by the parameters of the pair functions."""
    for sublattice in range(len(supercell.lattice.numbers)):
        sites, vector, kind = site_pairs(pairs, sublattice, pairs.cutoff)
        hessian = pairs.hessian(vector, kind)
        atoms = np.nonzero(supercell.sublattice == sublattice)[0]
        for site, constants in zip(sites, hessian, strict=True):
            others = supercell.index(np.full(len(atoms), site[3]), supercell.offset[atoms] + site[:3])
            yield atoms, others, np.broadcast_to(-constants, (len(atoms), *constants.shape))
        yield atoms, atoms, np.broadcast_to(hessian.sum(axis=0), (len(atoms), *hessian.shape[1:]))
