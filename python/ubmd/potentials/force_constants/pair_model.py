"""A force-constant potential with pair functions as LAMMPS sees it: force constants and pairs in one module."""

import json
import math

import numpy as np
import torch
from torch import Tensor

from ubmd.operators import available
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.crystal_module import CrystalModule
from ubmd.potentials.force_constants.model import TINY, CrystalModel
from ubmd.potentials.force_constants.pairs import CORE, PAIRS, WIDTH, PairFunctions, site_pairs
from ubmd.potentials.force_constants.regression import Posterior
from ubmd.potentials.force_constants.shells import WALL
from ubmd.uncertainty.posterior import deviation


class PairedCrystalModel(CrystalModule):
    """`CrystalModel` with pair functions, their core and a wall; the methods have the meanings of that class.

    Relative sites reach as far as atoms within the displacement limit can come closer than the cutoff of the pair
    functions. So the pairs need no list of neighbours: true distances are those of sites plus displacements.

    The tape is (species, first, displacement, edge of each near pair [E], edge of its centre to itself [E], centre [E],
    vector [E, 3], kind of pair [E]).
    """

    theta: Tensor
    centres: Tensor
    used: Tensor
    combinations: Tensor
    core: Tensor
    weights: Tensor
    ideal: Tensor
    ideal_strain: Tensor
    site_counts: Tensor
    site_places: Tensor
    site_kinds: Tensor
    wall_counts: Tensor
    wall_columns: Tensor
    wall_limits: Tensor

    def __init__(
        self,
        basis: ClusterBasis,
        posterior: Posterior,
        *,
        energy_scale: float = 1.0,
        force_scale: float = 1.0,
        max_displacement: float,
        energy: float = 0.0,
    ) -> None:
        super().__init__()
        assert basis.pairs is not None
        pairs = basis.pairs
        core = pairs.ideal_core() if posterior.core is None else posterior.core
        self.operators = available()
        self.cutoff, self.width, self.strength = float(pairs.cutoff), WIDTH, CORE
        self.tiny = TINY
        self.energy_scale, self.force_scale = float(energy_scale), float(force_scale)
        self.n_features = basis.n_parameters
        self.n_clusters = basis.n_parameters - pairs.n_parameters
        self.clusters = _clusters(basis, posterior, pairs.cutoff + 2.0 * max_displacement, max_displacement, energy)
        self.triangular = not np.tril(posterior.factor, -1).any()
        self.register_buffer("theta", _numbers(posterior.mean))
        self.register_buffer("factor", _numbers(posterior.factor))
        self._take_functions(pairs)
        self.register_buffer("core", _numbers(core))
        self.register_buffer("weights", self.table(self.theta[self.n_clusters :]))
        self._take_sites(basis, pairs)
        self._take_wall(basis, posterior)
        record = json.loads(self.clusters.metadata())
        record["uncertainty"]["projections"] = basis.n_parameters
        record["pairs"] = {"cutoff": pairs.cutoff, "core": core.tolist(), "parameters": pairs.n_parameters}
        if posterior.limits is not None:
            shells = {"distances": basis.shells.distance.tolist(), "limits": posterior.limits.tolist()}
            record["pairs"]["wall"] = {"power": basis.wall_power, **shells}
        self.description = json.dumps(record | {"format": 3})

    def _take_functions(self, pairs: PairFunctions) -> None:
        """Centres by kind [T, K], padded; which of these T K are functions [R]; their combinations [R, P]."""
        kinds = len(pairs.species)
        most = int(np.bincount(pairs.kinds, minlength=kinds).max())
        place = np.concatenate([np.arange(int((pairs.kinds == kind).sum())) for kind in range(kinds)])
        centres = np.zeros((kinds, most))
        centres[pairs.kinds, place] = pairs.centres
        self.register_buffer("centres", _numbers(centres))
        self.register_buffer("used", torch.from_numpy(pairs.kinds * most + place))
        self.register_buffer("combinations", _numbers(pairs.parameters))

    def _take_sites(self, basis: ClusterBasis, pairs: PairFunctions) -> None:
        """Kind of pair of each relative site, and what the pairs are in the ideal crystal."""
        lattice = basis.lattice
        self.kinds: list[Tensor] = []
        ideal, strain = [], []
        for s, sites in enumerate(np.array(part) for part in json.loads(self.clusters.metadata())["lattice"]["sites"]):
            kind = pairs.kind_of(np.full(len(sites), lattice.numbers[s]), lattice.numbers[sites[:, 3]])
            kind[0] = -1  # the centre itself
            self.kinds.append(torch.from_numpy(kind))
            _, vectors, near = site_pairs(pairs, s, pairs.cutoff)
            vector, kinds = _numbers(vectors), torch.from_numpy(near)
            values, slopes = self.radial(vector.square().sum(1).sqrt(), kinds)
            sums = values.new_zeros([self.centres.size(0), self.centres.size(1)]).index_add_(0, kinds, 0.5 * values)
            ideal.append(sums.flatten())
            slope = 0.5 * (slopes * self.weights[kinds]).sum(1) / vector.square().sum(1).sqrt()
            strain.append(vector.t() @ (slope.unsqueeze(1) * vector))
        self.register_buffer("site_counts", torch.tensor([len(kind) for kind in self.kinds]))
        self.register_buffer("site_places", torch.cat(self.clusters.places))
        self.register_buffer("site_kinds", torch.cat(self.kinds))
        self.register_buffer("ideal", torch.stack(ideal))
        self.register_buffer("ideal_strain", torch.stack(strain))

    def _take_wall(self, basis: ClusterBasis, posterior: Posterior) -> None:
        """For each sublattice, columns of its neighbours among the relative sites [N], and their limits D [N], Å."""
        self.power, self.height = basis.wall_power, WALL
        self.columns: list[Tensor] = []
        self.limits: list[Tensor] = []
        for s, sites in enumerate(json.loads(self.clusters.metadata())["lattice"]["sites"]):
            place = {tuple(site): k for k, site in enumerate(sites)}
            near = [] if posterior.limits is None else [place[tuple(site)] for site in basis.shells.sites[s].tolist()]
            limits = np.zeros(0) if posterior.limits is None else posterior.limits[basis.shells.shell[s]]
            self.columns.append(torch.tensor(near, dtype=torch.int64))
            self.limits.append(_numbers(limits))
        self.register_buffer("wall_counts", torch.tensor([len(near) for near in self.columns]))
        self.register_buffer("wall_columns", torch.cat(self.columns))
        self.register_buffer("wall_limits", torch.cat(self.limits))

    @torch.jit.export
    def evaluate(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(E [n] eV, d sum(E)/d displacement [P, 3], tape)."""
        with torch.no_grad():
            energy, gradient, _ = self.clusters.evaluate(species, first, neighbours, edge_vector, False)
            tape = self.near(species, first, edge_vector.to(torch.float64).contiguous())
            self.add_pairs(tape, self.weights, True, energy, gradient)
            self.add_wall(tape, energy, gradient)
            energy -= torch.mv(self.ideal, self.weights.flatten()).index_select(0, species)
            if not keep:
                tape = tape[:0]
            return energy, gradient, tape

    @torch.jit.export
    def features(self, tape: list[Tensor], by_structure: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """(sums, phi without rows, no factors); the second sum is that of the pair functions [T K]."""
        with torch.no_grad():
            factors: list[Tensor] = []
            species, first, displacement = tape[0], tape[1], tape[2]
            sums = self.pair_sums(tape[6], tape[7]).flatten()
            sums = sums - self.ideal.index_select(0, species).sum(0)
            moments = [self.clusters.moments(species, first, displacement), sums]
            return moments, displacement.new_zeros([0, self.n_features]), factors

    @torch.jit.export
    def feature_sum(self, sums: list[Tensor]) -> Tensor:
        """phi [p] of all atoms from the sums of all chunks."""
        with torch.no_grad():
            of_pairs = torch.mv(self.combinations.t(), sums[1].index_select(0, self.used))
            return torch.cat([self.clusters.reduce(sums[0]), of_pairs])

    @torch.jit.export
    def directions(self, w: Tensor, by_structure: bool) -> list[Tensor]:
        """Coefficients [C] and weights of pair functions [T, K] of parameters w [p]."""
        with torch.no_grad():
            values = w.to(torch.float64)
            return [self.clusters.expand(values[: self.n_clusters]), self.table(values[self.n_clusters :])]

    @torch.jit.export
    def feature_gradient(
        self, tape: list[Tensor], factors: list[Tensor], directions: list[Tensor], w: Tensor
    ) -> Tensor:
        """d(sum_i w·phi_i)/d displacement [P, 3]: the gradient of the energy for parameters w, without the core."""
        if len(directions) == 0:
            raise RuntimeError("A crystal has no features of single atoms: bias the structure's uncertainty instead.")
        with torch.no_grad():
            energy, gradient = self.clusters.contract(tape[0], tape[1], tape[2], directions[0])
            self.add_pairs(tape, directions[1], False, energy, gradient)
            return gradient

    @torch.jit.export
    def site_uncertainties(self, tape: list[Tensor]) -> Tensor:
        """Largest standard deviation u_i [n] of each centre's force components, eV/Å, calibrated."""
        with torch.no_grad():
            species, first, displacement = tape[0], tape[1], tape[2]
            rows = self.pair_rows(tape)
            if self.operators:
                sigma: Tensor = torch.ops.ubmd.crystal_deviations(
                    species, first, displacement, self.factor, self.triangular, self.clusters.tables(), rows
                )
                return self.force_scale * sigma
            result = displacement.new_zeros([species.size(0)])
            for s in range(len(self.kinds)):
                for some in torch.nonzero(species == s).squeeze(1).split(64):
                    u = displacement[self.clusters.edges(some, first, s)]
                    all_rows = torch.cat([self.clusters.project(self.clusters.site_moments(u, s)), rows[some]], -1)
                    result[some] = self.force_scale * deviation(torch.matmul(all_rows, self.factor), 0.0).amax(1)
            return result

    @torch.jit.export
    def strain_derivative(self, tape: list[Tensor]) -> Tensor:
        """See `CrystalModel`; that of the ideal crystal's pairs is left out."""
        with torch.no_grad():
            species, displacement = tape[0], tape[2]
            energy = displacement.new_zeros([species.size(0)])
            gradient = torch.zeros_like(displacement)
            self.add_pairs(tape, self.weights, True, energy, gradient)
            self.add_wall(tape, energy, gradient)
            result = self.clusters.strain_derivative(tape[:3]) - self.ideal_strain.index_select(0, species).sum(0)
            for s in range(len(self.kinds)):
                centres = torch.nonzero(species == s).squeeze(1)
                result += self.clusters.places[s].t() @ gradient[self.clusters.edges(centres, tape[1], s)].sum(0)
            return result

    # Pairs

    def near(self, species: Tensor, first: Tensor, displacement: Tensor) -> list[Tensor]:
        """The tape: all pairs within the cutoff, seen from each of the two atoms."""
        if self.operators:
            found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.ubmd.crystal_near(
                species, first, displacement, self.site_counts, self.site_places, self.site_kinds, self.cutoff
            )
            return [species, first, displacement, found[0], found[1], found[2], found[3], found[4]]
        edges: list[Tensor] = []
        own: list[Tensor] = []
        atoms: list[Tensor] = []
        vectors: list[Tensor] = []
        kinds: list[Tensor] = []
        for s in range(len(self.kinds)):
            centres = torch.nonzero(species == s).squeeze(1)
            sites = self.clusters.edges(centres, first, s)
            u = displacement[sites]
            vector = self.clusters.places[s] + (u - u[:, :1])
            inside = (vector.square().sum(2) < self.cutoff * self.cutoff) & (self.kinds[s] >= 0)
            row, column = torch.nonzero(inside).unbind(1)
            edges.append(sites[row, column])
            own.append(sites[row, torch.zeros_like(row)])
            atoms.append(centres[row])
            vectors.append(vector[row, column])
            kinds.append(self.kinds[s][column])
        tape = [species, first, displacement, torch.cat(edges), torch.cat(own), torch.cat(atoms)]
        return tape + [torch.cat(vectors), torch.cat(kinds)]  # noqa: RUF005 (TorchScript)

    def radial(self, distance: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        """Functions of each pair's kind [E, K] and their derivatives at distances [E] below the cutoff."""
        wave = math.pi / self.cutoff
        x = (distance.unsqueeze(1) - self.centres.index_select(0, kind)) / self.width
        gauss = torch.exp(-0.5 * x.square())
        f = (0.5 + 0.5 * torch.cos(wave * distance)).unsqueeze(1)
        slope = (-0.5 * wave * torch.sin(wave * distance)).unsqueeze(1)
        return gauss * f, gauss * (slope - x / self.width * f)

    def pair_sums(self, vector: Tensor, kind: Tensor) -> Tensor:
        """Sums [T, K] of the functions over pairs, each half."""
        if self.operators:
            sums: Tensor = torch.ops.ubmd.crystal_pair_sums(vector, kind, self.centres, self.cutoff, self.width)
            return sums
        values, _ = self.radial(vector.square().sum(1).sqrt(), kind)
        return torch.zeros_like(self.centres).index_add_(0, kind, 0.5 * values)

    def add_pairs(self, tape: list[Tensor], weights: Tensor, core: bool, energy: Tensor, gradient: Tensor) -> None:
        """Add the pairs' energies [n] and gradient [P, 3] for weights [T, K]."""
        vector, kind = tape[6], tape[7]
        if self.operators:
            radii = self.core if core else torch.zeros_like(self.core)
            torch.ops.ubmd.crystal_pair_energies(
                tape[3],
                tape[4],
                tape[5],
                vector,
                kind,
                self.centres,
                weights,
                radii,
                self.cutoff,
                self.width,
                self.strength,
                energy,
                gradient,
            )
            return
        distance = vector.square().sum(1).sqrt()
        values, slopes = self.radial(distance, kind)
        chosen = weights.index_select(0, kind)
        value, slope = (values * chosen).sum(1), (slopes * chosen).sum(1)
        if core:
            radius = self.core.index_select(0, kind)
            excess = (radius / distance - 1.0).clamp(min=0.0)
            value = value + self.strength * excess.pow(3)
            slope = slope - 3.0 * self.strength * excess.square() * radius / distance.square()
        energy.index_add_(0, tape[5], 0.5 * value)
        force = (0.5 * slope / distance).unsqueeze(1) * vector
        gradient.index_add_(0, tape[3], force)
        gradient.index_add_(0, tape[4], -force)

    def add_wall(self, tape: list[Tensor], energy: Tensor, gradient: Tensor) -> None:
        """Add the wall's energies [n] and gradient [P, 3]; no labels reach it (`shells`)."""
        species, first, displacement = tape[0], tape[1], tape[2]
        if self.operators:
            sites = self.wall_counts, self.wall_columns, self.wall_limits
            torch.ops.ubmd.crystal_wall(
                species, first, displacement, sites[0], sites[1], sites[2], self.power, self.height, energy, gradient
            )
            return
        for s in range(len(self.columns)):
            if self.columns[s].size(0) > 0:
                centres = torch.nonzero(species == s).squeeze(1)
                edges = self.clusters.edges(centres, first, s)
                near = edges.index_select(1, self.columns[s])
                vector = displacement[near] - displacement[edges[:, :1]]
                size = vector.square().sum(2).sqrt()
                excess = size / self.limits[s] - 1.0
                row, column = torch.nonzero(excess > 0.0).unbind(1)
                over, limit = excess[row, column], self.limits[s][column]
                energy.index_add_(0, centres[row], 0.5 * self.height * over.pow(self.power))
                slope = 0.5 * self.height * float(self.power) * over.pow(self.power - 1) / limit / size[row, column]
                force = slope.unsqueeze(1) * vector[row, column]
                gradient.index_add_(0, near[row, column], force)
                gradient.index_add_(0, edges[row, torch.zeros_like(row)], -force)

    def pair_rows(self, tape: list[Tensor]) -> Tensor:
        """Derivatives [n, 3, P] of the energy by each centre's displacement and the parameters of the pairs."""
        vector, kind, n = tape[6], tape[7], tape[0].size(0)
        if self.operators:
            rows: Tensor = torch.ops.ubmd.crystal_pair_rows(
                tape[5], vector, kind, self.centres, self.cutoff, self.width, n
            )
            return torch.matmul(rows.index_select(2, self.used), self.combinations)
        distance = vector.square().sum(1).sqrt()
        slopes = self.radial(distance, kind)[1]
        each = -(vector / distance.unsqueeze(1)).unsqueeze(2) * slopes.unsqueeze(1)  # [E, 3, K]
        kinds = self.centres.size(0)
        sums = each.new_zeros([n * kinds, 3, self.centres.size(1)]).index_add_(0, tape[5] * kinds + kind, each)
        flat = sums.view([n, kinds, 3, self.centres.size(1)]).transpose(1, 2).flatten(2)
        return torch.matmul(flat.index_select(2, self.used), self.combinations)

    def table(self, parameters: Tensor) -> Tensor:
        """Weights [T, K] of parameters [P]."""
        flat = parameters.new_zeros([self.centres.numel()])
        flat.index_copy_(0, self.used, torch.mv(self.combinations, parameters))
        return flat.view(self.centres.size())


def _clusters(
    basis: ClusterBasis, posterior: Posterior, reach: float, max_displacement: float, energy: float
) -> CrystalModel:
    """The force constants alone; uncertainties are not asked of it, so it has no factor."""
    clusters = basis.without_pairs()
    alone = Posterior(
        clusters.parameter_orders,
        posterior.mean[: clusters.n_parameters],
        np.zeros((0, 0)),
        {order: value for order, value in posterior.alpha.items() if order != PAIRS},
        posterior.beta,
        posterior.log_evidence,
    )
    return CrystalModel(clusters, alone, max_displacement=max_displacement, energy=energy, reach=reach)


def _numbers(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))
