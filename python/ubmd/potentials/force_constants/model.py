"""A force-constant potential as LAMMPS sees it: one TorchScript module with the fast part of `Deployed`'s interface."""

import json
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from ubmd.operators import available
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.crystal_module import CrystalModule
from ubmd.potentials.force_constants.lattice import Lattice
from ubmd.potentials.force_constants.program import BasisTables, block_table, derivatives, recursion
from ubmd.potentials.force_constants.regression import Posterior
from ubmd.uncertainty.posterior import deviation

TINY = 1e-8  # eV/atom: u of the ideal lattice, where the root has no derivative
CHUNK = 4_000_000  # numbers per intermediate tensor


class CrystalModel(CrystalModule):
    """Energies, forces and Bayesian uncertainties of a crystal whose energy is linear in its parameters.

    The methods are those of the fast part of `gmnn.deployed.Deployed` with these meanings. ``species`` [n] are
    sublattices of the centres. The edges of a centre are its relative sites in the order of metadata's lattice.sites
    (the first is the centre); ``edge_vector`` [P, 3] holds the *displacement* of the atom on each of them, Å, in the
    crystal's Cartesian frame; ``neighbours`` is ignored. So the force on an atom is minus the sum of the gradient over
    all edges that point to it. Energies and features of a centre are those of the clusters anchored there: each cluster
    of the crystal counts once. Features are the derivatives of E by the parameters (eV/Å^order each), structure by
    structure only. Everything is float64 in every precision.

    Args:
        basis: cluster basis on the crystal.
        posterior: fitted parameters and their covariance.
        energy_scale, force_scale: calibration of the two uncertainties.
        max_displacement: the displacement limit of the polynomials, Å.
        energy: of the ideal lattice per primitive cell, eV.
        reach: relative sites are those within the largest cutoff, or within this distance if it is more, Å.
    """

    theta: Tensor
    coefficients: Tensor
    bodies: Tensor
    operations: Tensor
    components: Tensor
    member_bodies: Tensor
    member_orbits: Tensor
    member_operations: Tensor
    raw: Tensor
    parameter_map: Tensor
    centroids: Tensor
    site_counts: Tensor
    orbit_table: Tensor
    order_table: Tensor
    block_table: Tensor
    member_table: Tensor
    turn_start: Tensor
    turn_first: Tensor
    turn_column: Tensor
    turn_value: Tensor

    def __init__(
        self,
        basis: ClusterBasis,
        posterior: Posterior,
        *,
        energy_scale: float = 1.0,
        force_scale: float = 1.0,
        max_displacement: float,
        energy: float = 0.0,
        reach: float = 0.0,
    ) -> None:
        super().__init__()
        self.operators = available()
        self.chunk, self.tiny = CHUNK, TINY
        self.energy_scale, self.force_scale = float(energy_scale), float(force_scale)
        self.site_energy = float(energy) / len(basis.lattice.numbers)
        self.n_features = basis.n_parameters
        program = BasisTables.compile(basis, reach)
        self._take(program)
        places, centroids = _places(basis.lattice, program)
        self.places = [_numbers(place) for place in places]
        self.register_buffer("centroids", _numbers(centroids))
        self.register_buffer("theta", _numbers(posterior.mean))
        self.triangular = not np.tril(posterior.factor, -1).any()
        self.register_buffer("factor", _numbers(posterior.factor))
        self.register_buffer("coefficients", self.expand(_numbers(posterior.mean)))
        cutoff = max(reach, *basis.cutoffs.values())
        self.description = json.dumps(_metadata(basis, program, cutoff, max_displacement, energy))

    def _take(self, program: BasisTables) -> None:
        """Tables as attributes that TorchScript knows."""
        self.n_sites: list[int] = [len(sites) for sites in program.sites]
        self.blocks: list[list[int]] = [block.row() for block in program.blocks]
        self.members: list[list[int]] = [block.row() for block in program.members]
        self.orbits: list[list[int]] = program.orbits.tolist()
        self.orders: list[list[int]] = program.orders.tolist()
        self.max_degree = len(program.turns)
        for name in ("bodies", "operations", "components", "member_bodies", "member_orbits", "member_operations"):
            self.register_buffer(name, torch.from_numpy(getattr(program, name)))
        self.register_buffer("raw", _numbers(program.raw))
        self.register_buffer("parameter_map", _numbers(program.parameters))
        for name, blocks in (("block_table", program.blocks), ("member_table", program.members)):
            self.register_buffer(name, torch.from_numpy(block_table(blocks)))
        self.register_buffer("site_counts", torch.tensor(self.n_sites))
        self.register_buffer("orbit_table", torch.from_numpy(program.orbits))
        self.register_buffer("order_table", torch.from_numpy(program.orders))
        for name, array in zip(("start", "first", "column", "value"), program.sparse_turns(), strict=True):
            self.register_buffer(f"turn_{name}", torch.from_numpy(array))
        self.turns: list[Tensor] = [_numbers(turn) for turn in program.turns]
        recursions = [recursion(m) for m in range(1, self.max_degree + 1)]
        self.parents: list[Tensor] = [torch.from_numpy(parent) for parent, _ in recursions]
        self.axes: list[Tensor] = [torch.from_numpy(axis) for _, axis in recursions]
        slopes = [derivatives(m) for m in range(1, self.max_degree + 1)]
        self.lower: list[Tensor] = [torch.from_numpy(position.ravel()) for position, _ in slopes]
        self.exponents: list[Tensor] = [_numbers(factor.astype(np.float64)) for _, factor in slopes]

    def tables(self) -> list[Tensor]:
        """What the operators take (cpp/ops/clusters.cpp lists them)."""
        return [
            self.site_counts,
            self.block_table,
            self.bodies,
            self.operations,
            self.components,
            self.orbit_table,
            self.order_table,
            self.raw,
            self.parameter_map,
            self.turn_start,
            self.turn_first,
            self.turn_column,
            self.turn_value,
            self.member_table,
            self.member_bodies,
            self.member_orbits,
            self.member_operations,
        ]

    @torch.jit.export
    def evaluate(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(E [n] eV, d sum(E)/d displacement [P, 3], tape)."""
        with torch.no_grad():
            displacement = edge_vector.to(torch.float64)
            energy, gradient = self.contract(species, first, displacement, self.coefficients)
            tape: list[Tensor] = []
            if keep:
                tape = [species, first, displacement]
            return energy + self.site_energy, gradient, tape

    @torch.jit.export
    def features(self, tape: list[Tensor], by_structure: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """(sums, phi without rows, no factors); the sums are the derivatives of sum(E) by all coefficients [C]."""
        with torch.no_grad():
            factors: list[Tensor] = []
            species, first, displacement = tape
            sums = [self.moments(species, first, displacement)]
            return sums, displacement.new_zeros([0, self.n_features]), factors

    @torch.jit.export
    def feature_sum(self, sums: list[Tensor]) -> Tensor:
        """phi [p] of all atoms from the sums of all chunks."""
        with torch.no_grad():
            return self.reduce(sums[0])

    @torch.jit.export
    def directions(self, w: Tensor, by_structure: bool) -> list[Tensor]:
        """The coefficients [C] of parameters w [p]."""
        with torch.no_grad():
            return [self.expand(w.to(torch.float64))]

    @torch.jit.export
    def feature_gradient(
        self, tape: list[Tensor], factors: list[Tensor], directions: list[Tensor], w: Tensor
    ) -> Tensor:
        """d(sum_i w·phi_i)/d displacement [P, 3]: the gradient of the energy for parameters w."""
        if len(directions) == 0:
            raise RuntimeError("A crystal has no features of single atoms: bias the structure's uncertainty instead.")
        with torch.no_grad():
            species, first, displacement = tape
            return self.contract(species, first, displacement, directions[0])[1]

    @torch.jit.export
    def site_uncertainties(self, tape: list[Tensor]) -> Tensor:
        """Largest standard deviation u_i [n] of each centre's force components, eV/Å, calibrated."""
        with torch.no_grad():
            species, first, displacement = tape
            if self.operators:
                sigma: Tensor = torch.ops.ubmd.crystal_deviations(
                    species, first, displacement, self.factor, self.triangular, self.tables()
                )
                return self.force_scale * sigma
            result = displacement.new_zeros([species.size(0)])
            for s in range(len(self.n_sites)):
                centres = torch.nonzero(species == s).squeeze(1)
                width = self.widest(self.members, s) * 3 + 3 * self.n_features
                for some in centres.split(max(1, self.chunk // width)):
                    u = displacement[self.edges(some, first, s)]
                    rows = self.project(self.site_moments(u, s))
                    result[some] = self.force_scale * deviation(torch.matmul(rows, self.factor), 0.0).amax(1)
            return result

    @torch.jit.export
    def strain_derivative(self, tape: list[Tensor]) -> Tensor:
        """d sum(E)/d strain [3, 3] (eV, rows: component of the position) when the ideal positions are strained.

        In a strained crystal displacements grow with the distance, so the parts of forces that cancel in a periodic
        one (sum rules) must be assigned to places. A cluster without one of its sites, k, has one place whatever k
        is: its centroid. So a cluster of order n with centroid c (of all its sites) gives
        n/(n - 1) sum_k (x_k - c) ⊗ dE/du_k with the ideal positions x. That the displacements are strained, too, adds
        sum u ⊗ dE/du, which isn't in the result.
        """
        with torch.no_grad():
            species, first, displacement = tape
            gradient = self.contract(species, first, displacement, self.levers(3))[1]
            result = gradient.new_zeros([3, 3])
            for s in range(len(self.n_sites)):
                centres = torch.nonzero(species == s).squeeze(1)
                result += self.places[s].t() @ gradient[self.edges(centres, first, s)].sum(0)
            for a in range(3):
                result[a] -= self.contract(species, first, displacement, self.levers(a))[1].sum(0)
            return result

    def levers(self, axis: int) -> Tensor:
        """Coefficients [C] of each cluster times n/(n - 1), and times a component of its centroid for axis < 3."""
        result: list[Tensor] = []
        for block in self.blocks:
            order = 0
            for m in block[4:]:
                order += m
            table = self.table(block, self.coefficients).reshape([block[2], -1]) * (order / (order - 1))
            if axis < 3:
                table = table * self.centroids[block[1] : block[1] + block[2], axis].unsqueeze(1)
            result.append(table.flatten())
        return torch.cat(result)

    # Centres of one sublattice

    def edges(self, centres: Tensor, first: Tensor, s: int) -> Tensor:
        """Edges [n, K] of centres on sublattice s."""
        if bool((first[centres + 1] - first[centres] != self.n_sites[s]).any()):
            raise RuntimeError("A centre of the crystal doesn't have one edge for each of its relative sites.")
        return first[centres].unsqueeze(1) + torch.arange(self.n_sites[s])

    def widest(self, blocks: list[list[int]], s: int) -> int:
        """Numbers per centre in the largest intermediate tensor of the blocks of sublattice s."""
        largest = 1
        for block in blocks:
            if block[0] == s:
                numbers = block[2]
                for m in block[4:]:
                    numbers *= self.dimension(m)
                largest = max(largest, numbers)
        return largest

    def dimension(self, degree: int) -> int:
        """Number of monomials of one degree."""
        return (degree + 1) * (degree + 2) // 2

    def monomials(self, u: Tensor) -> list[Tensor]:
        """Monomials [n, K, D] of each degree from 0 of displacements [n, K, 3]."""
        result = [torch.ones_like(u[:, :, :1])]
        for m in range(self.max_degree):
            result.append(result[m].index_select(2, self.parents[m]) * u.index_select(2, self.axes[m]))
        return result

    def slopes(self, monomials: list[Tensor], m: int) -> Tensor:
        """Derivatives [n, K, 3, D] of the monomials of degree m."""
        lower = monomials[m - 1].index_select(2, self.lower[m - 1])
        shaped: Tensor = lower.unflatten(2, [3, self.dimension(m)])
        return shaped * self.exponents[m - 1]

    def bodies_of(self, monomials: list[Tensor], block: list[int], sites: Tensor) -> list[Tensor]:
        """Monomials [n, N, D] of each body of the clusters of a block; sites [N, 6]."""
        result: list[Tensor] = []
        for k, m in enumerate(block[4:]):
            result.append(monomials[m].index_select(1, sites[:, k]))
        return result

    def outer(self, factors: list[Tensor]) -> Tensor:
        """Products [n, N, prod(D)] of factors [n, N, D]."""
        result = factors[0]
        for factor in factors[1:]:
            result = (result.unsqueeze(3) * factor.unsqueeze(2)).flatten(2)
        return result

    def table(self, block: list[int], flat: Tensor) -> Tensor:
        """The part [N, D1, ..., Db] of a vector of coefficients that belongs to a block."""
        shape = [block[2]]
        for m in block[4:]:
            shape.append(self.dimension(m))
        count = 1
        for size in shape:
            count *= size
        return flat[block[3] : block[3] + count].view(shape)

    # Energies, gradients and features in the crystal's frame

    def contract(
        self, species: Tensor, first: Tensor, displacement: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Energies [n] and the gradient of their sum [P, 3]."""
        if self.operators:
            both: tuple[Tensor, Tensor] = torch.ops.ubmd.crystal_energies(
                species, first, displacement, coefficients, self.tables()
            )
            return both
        energy = displacement.new_zeros([species.size(0)])
        gradient = torch.zeros_like(displacement)
        for s in range(len(self.n_sites)):
            centres = torch.nonzero(species == s).squeeze(1)
            for some in centres.split(max(1, self.chunk // self.widest(self.blocks, s))):
                edges = self.edges(some, first, s)
                energy[some], gradient[edges] = self.contract_some(displacement[edges], s, coefficients)
        return energy, gradient

    def contract_some(self, u: Tensor, s: int, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Energies [n] and gradients [n, K, 3] of centres on one sublattice."""
        monomials = self.monomials(u)
        slopes = [torch.zeros_like(value) for value in monomials]
        energy = u.new_zeros([u.size(0)])
        for block in self.blocks:
            if block[0] != s:
                continue
            sites = self.bodies[block[1] : block[1] + block[2]]
            table = self.table(block, coefficients)
            factors = self.bodies_of(monomials, block, sites)
            for k, m in enumerate(block[4:]):
                others = factors[:k] + factors[k + 1 :]
                turned = table.movedim(k + 1, -1).reshape([block[2], -1, self.dimension(m)])
                if len(others) == 0:
                    slope = turned.squeeze(1).unsqueeze(0).expand_as(factors[0])
                else:
                    slope = torch.einsum("ncr,crd->ncd", self.outer(others), turned)
                slopes[m].index_add_(1, sites[:, k], slope)
                if k == 0:
                    energy += (factors[0] * slope).flatten(1).sum(1)
        gradient = torch.zeros_like(u)
        for m in range(1, self.max_degree + 1):
            gradient += torch.einsum("nkad,nkd->nka", self.slopes(monomials, m), slopes[m])
        return energy, gradient

    def moments(self, species: Tensor, first: Tensor, displacement: Tensor) -> Tensor:
        """Derivatives of sum(E) by all coefficients [C]."""
        if self.operators:
            summed: Tensor = torch.ops.ubmd.crystal_moments(species, first, displacement, self.tables())
            return summed
        result = displacement.new_zeros([self.components.size(0)])
        for s in range(len(self.n_sites)):
            centres = torch.nonzero(species == s).squeeze(1)
            for some in centres.split(max(1, self.chunk // self.widest(self.blocks, s))):
                monomials = self.monomials(displacement[self.edges(some, first, s)])
                for block in self.blocks:
                    if block[0] == s:
                        sites = self.bodies[block[1] : block[1] + block[2]]
                        product = self.outer(self.bodies_of(monomials, block, sites)).sum(0)
                        self.table(block, result).view(product.shape).add_(product)
        return result

    def site_moments(self, u: Tensor, s: int) -> Tensor:
        """Derivatives [n, 3, D] by each centre's displacement of all orbits' moments, in the prototypes' frame."""
        monomials = self.monomials(u)
        starts = torch.cumsum(self.orbit_table[:, 0], 0) - self.orbit_table[:, 0]
        result = u.new_zeros([u.size(0), 3, int(self.orbit_table[:, 0].sum())])
        for block in self.members:
            if block[0] != s:
                continue
            rows = slice(block[1], block[1] + block[2])
            factors = self.bodies_of(monomials, block, self.member_bodies[rows])
            centre = block[3]
            slope = self.slopes([value[:, :1] for value in monomials], block[4 + centre])[:, 0]  # [n, 3, D]
            axes: list[Tensor] = []
            for a in range(3):
                factors[centre] = slope[:, a].unsqueeze(1).expand(-1, block[2], -1)
                axes.append(self.outer(factors))
            products = self.turned_back(block, self.member_operations[rows], torch.stack(axes, 1))
            places = starts[self.member_orbits[rows]].unsqueeze(1) + torch.arange(products.size(-1))
            result.index_add_(2, places.flatten(), products.flatten(2))
        return result

    def turned_back(self, block: list[int], operations: Tensor, products: Tensor) -> Tensor:
        """Products [..., N, prod(D)] of the clusters of a block as moments of their prototypes."""
        shape = products.shape
        left, right = 1, products.size(-1)
        for m in block[4:]:
            size = self.dimension(m)
            right = right // size
            shaped = products.reshape([-1, block[2], left, size, right])
            products = torch.einsum("zclir,cij->zcljr", shaped, self.turns[m - 1][operations])
            left = left * size
        return products.reshape(shape)

    # Between parameters and coefficients

    def expand(self, w: Tensor) -> Tensor:
        """Coefficients [C] of all clusters from parameters w [p]."""
        if self.operators:
            expanded: Tensor = torch.ops.ubmd.crystal_expand(w, self.tables())
            return expanded
        pieces: list[Tensor] = []
        start, place, at, orbit = 0, 0, 0, 0
        for order in self.orders:
            n_raw, n = order[0], order[1]
            matrix = self.parameter_map[place : place + n_raw * n].view(n_raw, n)
            coefficients = torch.mv(matrix, w[start : start + n])
            start += n
            place += n_raw * n
            used = 0
            while used < n_raw:
                d, p = self.orbits[orbit][0], self.orbits[orbit][1]
                pieces.append(torch.mv(self.raw[at : at + d * p].view(d, p), coefficients[used : used + p]))
                at += d * p
                used += p
                orbit += 1
        tensors = torch.cat(pieces)[self.components]
        result: list[Tensor] = []
        for block in self.blocks:
            table = self.table(block, tensors)
            operations = self.operations[block[1] : block[1] + block[2]]
            flat = table.reshape([-1])
            left, right = 1, flat.size(0) // block[2]
            for m in block[4:]:
                size = self.dimension(m)
                right = right // size
                shaped = flat.reshape([block[2], left, size, right])
                flat = torch.einsum("cij,cljr->clir", self.turns[m - 1][operations], shaped).reshape([-1])
                left = left * size
            result.append(flat)
        return torch.cat(result)

    def reduce(self, moments: Tensor) -> Tensor:
        """Derivatives by the parameters [p] from those by the coefficients [C]: the transpose of `expand`."""
        if self.operators:
            reduced: Tensor = torch.ops.ubmd.crystal_reduce(moments, self.tables())
            return reduced
        tensors = moments.new_zeros([int(self.orbit_table[:, 0].sum())])
        for block in self.blocks:
            products = self.table(block, moments).flatten(1)
            operations = self.operations[block[1] : block[1] + block[2]]
            places = self.components[block[3] : block[3] + products.numel()]
            tensors.index_add_(0, places, self.turned_back(block, operations, products).flatten())
        return self.project(tensors)

    def project(self, tensors: Tensor) -> Tensor:
        """Derivatives by the parameters [..., p] from those by the components of the prototypes' tensors [..., D]."""
        result: list[Tensor] = []
        place, at, orbit, component = 0, 0, 0, 0
        for order in self.orders:
            n_raw, n = order[0], order[1]
            pieces: list[Tensor] = []
            used = 0
            while used < n_raw:
                d, p = self.orbits[orbit][0], self.orbits[orbit][1]
                some = tensors[..., component : component + d]
                pieces.append(torch.matmul(some, self.raw[at : at + d * p].view(d, p)))
                at += d * p
                component += d
                used += p
                orbit += 1
            matrix = self.parameter_map[place : place + n_raw * n].view(n_raw, n)
            result.append(torch.matmul(torch.cat(pieces, -1), matrix))
            place += n_raw * n
        return torch.cat(result, -1)


def _numbers(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))


def _places(lattice: Lattice, program: BasisTables) -> tuple[list[np.ndarray], np.ndarray]:
    """Relative sites [K_s, 3] of each sublattice and centroids of all clusters [N, 3], positions from the centre, Å.

    A site that is m times in a cluster counts m times.
    """
    places = [
        (sites[:, :3] + lattice.scaled[sites[:, 3]] - lattice.scaled[s]) @ lattice.cell
        for s, sites in enumerate(program.sites)
    ]
    centroids = np.zeros((len(program.bodies), 3))
    for block in program.blocks:
        rows = slice(block.first, block.first + block.count)
        bodies = places[block.sublattice][program.bodies[rows, : len(block.degrees)]]
        centroids[rows] = np.average(bodies, axis=1, weights=block.degrees)
    return places, centroids


def _metadata(
    basis: ClusterBasis, program: BasisTables, cutoff: float, max_displacement: float, energy: float
) -> dict[str, Any]:
    """The part of the file's record that follows from the model itself; an export adds where it comes from."""
    numbers = basis.lattice.numbers
    elements = [chemical_symbols[z] for z in dict.fromkeys(numbers.tolist())]
    return {
        "format": 1,
        "kind": "force constants",
        "elements": elements,
        "cutoff": cutoff,
        "units": "eV, Å",
        "uncertainty": {"kind": "posterior", "projections": basis.n_parameters},
        "operators": ["ubmd"] if available() else [],
        "lattice": {
            "cell": basis.lattice.cell.tolist(),
            "scaled": basis.lattice.scaled.tolist(),
            "species": [elements.index(chemical_symbols[z]) for z in numbers],
            "sites": [sites.tolist() for sites in program.sites],
            "max_displacement": float(max_displacement),
            "energy": float(energy),
        },
    }
