"""Which uncertainty ranks the errors of atoms best? Many kinds, one set of networks, judged inside and outside.
python ranking.py [SYSTEM ...] [--labels 16 64] [--seeds 0 1 2] [--epochs 200] [--folder ranking_run] [--help]

Per system, molecular dynamics of the reference gives four sets of labels: training, validation, 'inside' (like the
training, from trajectories of its own) and 'outside' (hotter; crystals also compressed). Small networks are trained on
the first 16, 64 ... training labels, and all kinds of uncertainty are computed for the same networks, in float64:

  posterior        of sketched gradient features, as in model files (p = 512 unless said otherwise, lambda^2 = 1e-4)
  exact            the same without a sketch (kernel of all gradients of the layers)
  last layer       posterior of the last layer's gradients
  distance         to the nearest training atom in sketched features
  ... + B          with the derivatives with respect to the radial coefficients among the features
  unit norm        phi/|phi| and |phi| instead of phi
  neighbours       posterior averaged over the neighbours and the atom itself; weighted: by the cutoff function
  heads            spread of forces of 16 last layers on one trunk, fitted to bootstrap samples from random starts
  forces ...       posterior of forces with forces observed (p = 256); last layer: of its weights;
                   draws: their spread over random draws from that posterior
  networks         spread of forces of the networks of all seeds (what three times the cost gives)
  |F|              no uncertainty at all: the size of the predicted force

Labels, networks and values are kept in the folder, and found again. The tables go to ranking.md there: Spearman's rank
correlation of u with the error per atom and of the maxima per structure, each also as a share of what errors reach that
are Gaussian with that u; share of the largest 1 % of errors among the largest 10 % of u; coverage outside at 95 %
calibrated inside. Differences from the posterior have 95 % intervals by bootstrap over structures and networks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: more threads are slower

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from torch import Tensor

from ubmd.data.extxyz import write_structures
from ubmd.data.graph import Graph, build_graph
from ubmd.data.structures import read_structures
from ubmd.measure.errors import spearman
from ubmd.operators import use_operators
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.sketch import GradientSketch, make_sketch
from ubmd.potentials.gmnn.trainer import train
from ubmd.references import sample
from ubmd.settings import ModelSettings, ReferenceSettings, SamplingSettings, TrainingSettings
from ubmd.uncertainty import PosteriorUncertainty
from ubmd.uncertainty.conformal import conformal_scale

HERE = Path(__file__).parent
EXAMPLES = HERE.parent


# ---------------------------------------------------------------------------------------------------- systems, labels


@dataclass(frozen=True)
class System:
    """What is sampled: temperatures inside and outside (K), and the edge of the cell outside relative to inside."""

    start: Callable[[], Atoms]
    reference: ReferenceSettings
    temperatures: tuple[float, float]
    edge: float
    timestep: float
    """fs"""
    stride: int
    cutoff: float
    """of the network, Å"""


def ethanol() -> Atoms:
    return molecule("CH3CH2OH")


def slab() -> Atoms:
    """Of the example surface, its two lowest layers fixed."""
    return read_structures(EXAMPLES / "surface" / "slab.extxyz")[0]


def silicon() -> Atoms:
    """32 atoms."""
    return bulk("Si", "diamond", 5.43, cubic=True) * (2, 2, 1)


def alanine() -> Atoms:
    return read_structures(EXAMPLES / "alanine_dipeptide" / "c7eq.extxyz")[0]


def copper() -> Atoms:
    """32 atoms."""
    return bulk("Cu", "fcc", 3.59, cubic=True) * (2, 2, 2)


def reference(calculator: str, **arguments: object) -> ReferenceSettings:
    """No limits: a test set holds what the trajectory holds."""
    return ReferenceSettings(calculator=calculator, arguments=arguments, force_limit=1e3, energy_limit=1e3)


EMT = reference("ase.calculators.emt:EMT")
SILICON = reference("lammps", elements=["Si"], commands=["pair_style sw", "pair_coeff * * Si.sw Si"])
ALANINE = reference("openmm", pdb=str(EXAMPLES / "alanine_dipeptide" / "alanine_dipeptide.pdb"))

SYSTEMS = {
    "ethanol": System(ethanol, reference("tblite", method="GFN2-xTB"), (300.0, 1000.0), 1.0, 0.5, 50, 4.0),
    "slab": System(slab, EMT, (400.0, 1000.0), 1.0, 3.0, 15, 5.0),
    "silicon": System(silicon, SILICON, (600.0, 1200.0), 0.95, 1.0, 50, 4.5),
    "alanine": System(alanine, ALANINE, (300.0, 1000.0), 1.0, 0.5, 100, 4.0),
    "copper": System(copper, EMT, (500.0, 1200.0), 0.95, 3.0, 15, 5.0),
}
"""The first three are for the choice of a kind, the others judge that choice."""

SETS = {"pool": (0, 64), "valid": (0, 12), "inside": (0, 48), "outside": (1, 48)}
"""name -> (which temperature, frames)"""


def labels(name: str, system: System, folder: Path) -> dict[str, list[Atoms]]:
    """All sets; each is from trajectories of its own, and is made if its file is not there."""
    found = {}
    for seed, (which, (kind, count)) in enumerate(SETS.items()):
        path = folder / name / f"{which}.extxyz"
        if not path.exists():
            start = system.start()
            if kind:
                start.set_cell(start.cell * system.edge, scale_atoms=True)
            sampling = SamplingSettings(
                temperature=system.temperatures[kind],
                frames=count,
                stride=system.stride,
                equilibration=10 * system.stride,
                timestep=system.timestep,
                friction=10.0,
                trajectories=2,
                seed=seed,
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_structures(path, sample(start, system.reference, sampling, HERE))
        found[which] = read_structures(path, labelled=True)
        for atoms in found[which]:
            atoms.set_constraint([c for c in system.start().constraints if isinstance(c, FixAtoms)])
    order = np.random.default_rng(0).permutation(len(found["pool"]))
    found["pool"] = [found["pool"][k] for k in order]
    return found


# ---------------------------------------------------------------------------------------------------- features


PROJECTIONS = 512
FORCE_PROJECTIONS = 256
"""of the posterior of forces, whose cost grows with them"""
RADIAL_DEVIATION = 3**-0.5
"""of the random start of the radial coefficients, U(-1, 1); that of the layers' weights is 1"""


@dataclass(frozen=True)
class Values:
    """Of N atoms in structures one after the other; all float64.

    With p and q projections, d = 1 + neurons of the last hidden layer: phi [N, p], small_phi [N, q] sketched features
    of the layers, radial [N, p] of the radial coefficients, last [N, d] gradients of the last layer; forces and
    error [N, 3] (error: predicted minus label), eV/Å; jacobian [N, q, 3] and jacobian_last [N, d, 3],
    d(sum of all small_phi, last)/d(position); factors: pairs of matrices whose kernels multiply to a layer's, for the
    exact posterior; gradient_radial [N, ...] exact; pairs: centre, neighbour and cutoff function; structure [N] and
    free [N] (False: kept fixed).
    """

    phi: Tensor
    small_phi: Tensor
    radial: Tensor
    last: Tensor
    jacobian: Tensor
    jacobian_last: Tensor
    factors: list[tuple[Tensor, Tensor]]
    gradient_radial: Tensor
    forces: Tensor
    error: Tensor
    pairs: tuple[Tensor, Tensor, Tensor]
    structure: Tensor
    free: Tensor


class Probe:
    """A trained network in float64, and everything that one may want to know of it."""

    def __init__(self, model: GaussianMomentNetwork) -> None:
        self.model = model.to_network_dtype(torch.float64)
        use_operators(model, False)
        self.scales = (model.constant * model.scale).detach()
        self.sketch: GradientSketch = make_sketch(model.network, PROJECTIONS, 0).double()
        self.small_sketch: GradientSketch = make_sketch(model.network, FORCE_PROJECTIONS, 0).double()
        generator = torch.Generator().manual_seed(1)
        elements, _, radial, basis = model.radial.shape
        self.radial_sketch = torch.randn(
            elements, PROJECTIONS, radial * elements * basis, generator=generator, dtype=torch.float64
        )

    def layers(self, moments: Tensor, species: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(x~^{l-1}, delta^l) of the three layers, from moments [n, N_r, 20]."""
        network = self.model.network
        x0 = self.model.descriptor.invariants(moments)
        _, x1, x2, s1, s2 = network(x0)
        delta3 = self.scales[species].unsqueeze(1)
        delta1, delta2 = network.gradient_factors(s1, s2, delta3)
        return [(x0, delta1), (x1, delta2), (x2, delta3)]

    def columns(self, moments: Tensor, species: Tensor) -> Tensor:
        """[n, q + d + 1]: q features phi, gradient of the last layer, atomic energy without its shift (eV)."""
        (x0, delta1), (x1, delta2), (x2, delta3) = self.layers(moments, species)
        phi = self.small_sketch(x0, x1, x2, delta1, delta2, delta3)
        return torch.cat([phi, delta3 * extended(x2), delta3 * self.model.network.output(x2).unsqueeze(1)], 1)

    def values(self, graph: Graph) -> Values:
        """Of one structure."""
        sums, slopes = self.neighbourhood(graph)
        moments = self.moments(graph.species, sums)
        with torch.no_grad():
            columns = self.columns(moments, graph.species)
            by_moment = self.slopes(moments, graph.species)
            jacobian = position_gradients(graph, by_moment, slopes)
            gradient = by_moment[:, -1].view(len(sums), -1, 20)
            radial = RADIAL_DEVIATION * torch.einsum("nsc,nebc->nseb", gradient, sums).flatten(1)
            (x0, delta1), (x1, delta2), (x2, delta3) = self.layers(moments, graph.species)
            phi = self.sketch(x0, x1, x2, delta1, delta2, delta3)
        q, forces = FORCE_PROJECTIONS, -jacobian[:, -1]
        one_hot = torch.nn.functional.one_hot(graph.species, len(self.scales)).double()
        return Values(
            phi=phi,
            small_phi=columns[:, :q],
            radial=torch.einsum("npk,nk->np", self.radial_sketch[graph.species], radial),
            last=columns[:, q:-1],
            jacobian=jacobian[:, :q],
            jacobian_last=jacobian[:, q:-1],
            factors=[(extended(x0), delta1), (extended(x1), delta2), (extended(x2), delta3)],
            gradient_radial=(one_hot.unsqueeze(2) * radial.unsqueeze(1)).flatten(1),
            forces=forces,
            error=forces - graph.forces,
            pairs=(*graph.edge_index, self.cutoff_function(graph)),
            structure=torch.zeros(len(sums), dtype=torch.int64),
            free=torch.ones(len(sums), dtype=torch.bool) if graph.fixed is None else ~graph.fixed,
        )

    def cutoff_function(self, graph: Graph) -> Tensor:
        """Of each pair, 1 at distance 0 and 0 at the cutoff."""
        return 0.5 + 0.5 * torch.cos(torch.pi / self.model.cutoff * graph.edge_vector.norm(dim=1))

    def neighbourhood(self, graph: Graph) -> tuple[Tensor, Tensor]:
        """(sums over neighbours [n, elements, N_b, 20] of basis times monomials, d(moments)/d(vector) [P, 100, 3])."""
        descriptor, n = self.model.descriptor, graph.n_atoms
        centre, elements = graph.edge_index[0], descriptor.n_elements

        def products(vector: Tensor) -> Tensor:
            distance = vector.norm(dim=1, keepdim=True)
            return descriptor.basis(distance).unsqueeze(2) * descriptor.monomials(vector / distance).unsqueeze(1)

        slot = centre * elements + graph.neighbours
        value = products(graph.edge_vector)
        sums = torch.zeros(n * elements, *value.shape[1:], dtype=torch.float64).index_add(0, slot, value)
        coefficients = descriptor.radial.detach()[graph.species[centre], graph.neighbours]
        slopes = []
        for axis in torch.eye(3, dtype=torch.float64):
            change = torch.func.jvp(products, (graph.edge_vector,), (axis.expand_as(graph.edge_vector),))[1]
            slopes.append(torch.bmm(coefficients, change).flatten(1))
        return sums.view(n, elements, *value.shape[1:]), torch.stack(slopes, 2)

    def moments(self, species: Tensor, sums: Tensor) -> Tensor:
        """[n, N_r, 20]."""
        return torch.einsum("nesb,nebc->nsc", self.model.radial.detach()[species].double(), sums)

    def slopes(self, moments: Tensor, species: Tensor) -> Tensor:
        """d(columns)/d(moments) of each atom [n, columns, 100]."""
        unit = torch.eye(moments[0].numel(), dtype=torch.float64).view(-1, 1, *moments.shape[1:])

        def along(direction: Tensor) -> Tensor:
            tangent = direction.expand_as(moments)
            return torch.func.jvp(lambda m: self.columns(m, species), (moments,), (tangent,))[1]

        return torch.func.vmap(along)(unit).permute(1, 2, 0)


def extended(x: Tensor) -> Tensor:
    """x~ = (d^(-1/2) x, 0.1)."""
    return torch.cat([x / x.size(1) ** 0.5, 0.1 * torch.ones_like(x[:, :1])], 1)


def position_gradients(graph: Graph, by_moment: Tensor, slopes: Tensor) -> Tensor:
    """d(sum of the columns of all atoms)/d(position) [n, columns, 3]; slopes [P, 100, 3]: d(moments)/d(vector)."""
    total = torch.zeros(graph.n_atoms, by_moment.size(1), 3, dtype=torch.float64)
    for atom, (begin, end) in enumerate(zip(graph.first[:-1].tolist(), graph.first[1:].tolist(), strict=True)):
        moved = torch.tensordot(by_moment[atom], slopes[begin:end], dims=([1], [1])).transpose(0, 1)
        total[atom] -= moved.sum(0)
        total.index_add_(0, graph.edge_index[1, begin:end], moved)
    return total


def together(parts: Sequence[Values]) -> Values:
    """Several structures one after the other."""

    def rows(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    counts = torch.tensor([len(part.phi) for part in parts])
    before = (torch.cumsum(counts, 0) - counts).tolist()
    shifted = [[*(index + b for index in part.pairs[:2]), part.pairs[2]] for b, part in zip(before, parts, strict=True)]
    plain = (
        "phi",
        "small_phi",
        "radial",
        "last",
        "jacobian",
        "jacobian_last",
        "gradient_radial",
        "forces",
        "error",
        "free",
    )
    return Values(
        **{name: rows(name) for name in plain},
        factors=[
            (torch.cat([part.factors[k][0] for part in parts]), torch.cat([part.factors[k][1] for part in parts]))
            for k in range(3)
        ],
        pairs=tuple(torch.cat(column) for column in zip(*shifted, strict=True)),
        structure=torch.repeat_interleave(torch.arange(len(parts)), counts),
    )


# ---------------------------------------------------------------------------------------------------- uncertainties


LAMBDA2 = 1e-4
HEADS = 16
Array = np.ndarray


def posterior(training: Tensor, features: Tensor, lambda2: float = LAMBDA2, more: Tensor | None = None) -> Tensor:
    """u of ``features`` [N, p] after observing ``training`` [M, p] (and ``more``, not counted in the rescaling)."""
    uncertainty = PosteriorUncertainty(training.size(1))
    gram = training.T @ training
    uncertainty.fit(gram, len(training), lambda2)
    if more is not None:
        # The same rescaling for all: `fit` would take the mean over other rows.
        scale2 = torch.trace(gram) / len(training)
        values, vectors = torch.linalg.eigh((gram + more.T @ more) / scale2)
        weights = torch.sqrt(lambda2 / (values.clamp(min=0.0) + lambda2) / scale2)
        uncertainty.factor.copy_(weights.unsqueeze(1) * vectors.T)
    return uncertainty(features)


def of_forces(
    training: Tensor, jacobian: Tensor, observed: Tensor, lambda2: float = LAMBDA2, more: Tensor | None = None
) -> Tensor:
    """sqrt(tr J_i^T A^-1 J_i), A from the Jacobians [n, p, 3] of the training atoms that are observed."""
    observed_rows, rows = (part.transpose(1, 2).flatten(0, 1) for part in (training[observed], jacobian))
    return posterior(observed_rows, rows, lambda2, more).view(-1, 3).square().sum(1).sqrt()


def sampled(training: Values, judged: Values, seed: int) -> Tensor:
    """`of_forces` of the last layer from the forces of 16 random draws of its weights."""
    rows = training.jacobian_last[training.free].transpose(1, 2).flatten(0, 1)
    uncertainty = PosteriorUncertainty(rows.size(1))
    uncertainty.fit(rows.T @ rows, len(rows), LAMBDA2)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(HEADS, rows.size(1), generator=generator, dtype=torch.float64) @ uncertainty.factor
    forces = torch.einsum("npa,mp->mna", judged.jacobian_last, draws)
    return forces.square().mean(0).sum(1).sqrt()


def exact(training: Values, judged: Values, radial: bool) -> Tensor:
    """The posterior without a sketch."""

    def kernel(left: Values, right: Values) -> Tensor:
        pairs = zip(left.factors, right.factors, strict=True)
        total = sum((x @ other_x.T) * (d @ other_d.T) for (x, d), (other_x, other_d) in pairs)
        return total + left.gradient_radial @ right.gradient_radial.T if radial else total

    def own(values: Values) -> Tensor:
        total = sum(x.square().sum(1) * d.square().sum(1) for x, d in values.factors)
        return total + values.gradient_radial.square().sum(1) if radial else total

    matrix, scale2 = kernel(training, training), own(training).mean()
    factor = torch.linalg.cholesky(matrix / scale2 + LAMBDA2 * torch.eye(len(matrix), dtype=torch.float64))
    projected = torch.linalg.solve_triangular(factor, kernel(training, judged) / scale2, upper=False)
    return (own(judged) / scale2 - projected.square().sum(0)).clamp(min=1e-12).sqrt()


def unit_norm(training: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """phi/|phi| and, as one feature more, |phi| over its root mean square in training."""
    scale = training.square().sum(1).mean().sqrt()
    return tuple(
        torch.cat([f / f.norm(dim=1, keepdim=True), f.norm(dim=1, keepdim=True) / scale], 1)
        for f in (training, features)
    )


def averaged(u: Tensor, values: Values, weighted: bool) -> Tensor:
    """Mean of u over the neighbours and the atom itself, with weights 1 or the cutoff function."""
    centre, neighbour, cutoff_function = values.pairs
    weight = cutoff_function if weighted else torch.ones_like(cutoff_function)
    total = u.index_add(0, centre, weight * u[neighbour])
    return total / torch.ones_like(u).index_add(0, centre, weight)


def heads(training: Values, judged: Values, seed: int) -> Tensor:
    """Spread of the forces of last layers: each fitted to a bootstrap sample of structures, from a random start.

    A fit is the most probable change of the weights with a prior N(start, 1) and the noise of the training's errors.
    """
    generator = torch.Generator().manual_seed(seed)
    n_structures, size = int(training.structure[-1]) + 1, training.last.size(1)
    precision = 1.0 / training.error[training.free].square().mean()
    found = []
    for _ in range(HEADS):
        drawn = torch.randint(n_structures, (n_structures,), generator=generator)
        weight = torch.bincount(drawn, minlength=n_structures)[training.structure] * training.free * precision
        rows = training.jacobian_last
        matrix = torch.einsum("n,npa,nqa->pq", weight, rows, rows) + torch.eye(size, dtype=torch.float64)
        start = torch.randn(size, generator=generator, dtype=torch.float64)
        # the forces are -J theta, and should change by minus their errors
        right = torch.einsum("n,npa,na->p", weight, rows, training.error) + start
        found.append(torch.linalg.solve(matrix, right))
    forces = torch.einsum("npa,mp->mna", judged.jacobian_last, torch.stack(found))
    return forces.var(0, correction=0).mean(1).sqrt()


def kinds(training: Values, judged: Values, spread: Tensor, seed: int) -> dict[str, Tensor]:
    """u [N] of every kind, uncalibrated."""
    t, j = training, judged
    today = posterior(t.phi, j.phi)
    few = slice(0, 64)  # projections are independent: some of them are a smaller sketch
    energies = torch.zeros(int(t.structure[-1]) + 1, FORCE_PROJECTIONS, dtype=torch.float64)
    energies.index_add_(0, t.structure, t.small_phi)
    forces = of_forces(t.jacobian, j.jacobian, t.free)
    scale = t.phi.square().sum(1).mean().sqrt()
    return {
        BASELINE: today,
        "posterior, lambda2 1e-2": posterior(t.phi, j.phi, 1e-2),
        "posterior, lambda2 1": posterior(t.phi, j.phi, 1.0),
        "posterior, p = 128": posterior(t.phi[:, :128], j.phi[:, :128]),
        "exact": exact(t, j, radial=False),
        "last layer": posterior(t.last, j.last),
        "distance": torch.cdist(j.phi, t.phi).min(1).values / scale,
        "posterior + B": posterior(t.phi + t.radial, j.phi + j.radial),
        "exact + B": exact(t, j, radial=True),
        "unit norm": posterior(*unit_norm(t.phi, j.phi)),
        "neighbours": averaged(today, j, weighted=False),
        "neighbours, weighted": averaged(today, j, weighted=True),
        "forces, neighbours": averaged(forces, j, weighted=False),
        "heads": heads(t, j, seed),
        "forces, last layer": of_forces(t.jacobian_last, j.jacobian_last, t.free),
        "forces, last layer, 16 draws": sampled(t, j, seed),
        "forces": forces,
        "forces, lambda2 1e-2": of_forces(t.jacobian, j.jacobian, t.free, 1e-2),
        "forces, p = 64": of_forces(t.jacobian[:, few], j.jacobian[:, few], t.free),
        "forces and energies": of_forces(t.jacobian, j.jacobian, t.free, more=0.5 * energies),
        "networks": spread,
        "|F|": j.forces.norm(dim=1),
    }


BASELINE = "posterior"


# ---------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Judged:
    """One network on one set: error (RMSE of F_i over xyz, eV/Å) and u of every kind of N free atoms, structures."""

    error: Array
    u: dict[str, Array]
    structure: Array


def evaluate(name: str, count: int, options: argparse.Namespace) -> list[dict[str, Judged]]:
    """Per seed: sets 'inside' and 'outside', judged."""
    seeds = "_".join(map(str, options.seeds))
    path = options.folder / name / f"labels{count}_seeds{seeds}_epochs{options.epochs}_every{options.every}.npz"
    if path.exists():
        return read(path, len(options.seeds))
    system, sets = SYSTEMS[name], labels(name, SYSTEMS[name], options.folder)
    sets["training"] = sets["pool"][:count]
    networks = [trained(name, system, sets, seed, options) for seed in options.seeds]
    probes = [Probe(network) for network in networks]
    found: list[dict[str, Judged]] = [{} for _ in options.seeds]
    values = [
        {
            which: measured(probe, sets[which][:: options.every if which in JUDGED else 1])
            for which in ("training", *JUDGED)
        }
        for probe in probes
    ]
    for which in JUDGED:
        spread = torch.stack([v[which].forces for v in values]).var(0, correction=0).mean(1).sqrt()
        for seed, (each, result) in enumerate(zip(values, found, strict=True)):
            with torch.no_grad():
                result[which] = judged(each["training"], each[which], spread, seed)
    np.savez_compressed(path, **flat(found))
    return found


def flat(found: list[dict[str, Judged]]) -> dict[str, Array]:
    """One name per array."""
    arrays = {}
    for k, result in enumerate(found):
        for which, judged_set in result.items():
            arrays[f"{k}/{which}/error"] = judged_set.error
            arrays[f"{k}/{which}/structure"] = judged_set.structure
            arrays |= {f"{k}/{which}/u/{kind}": u for kind, u in judged_set.u.items()}
    return arrays


def read(path: Path, count: int) -> list[dict[str, Judged]]:
    """Inverse of `flat`."""
    with np.load(path) as arrays:
        return [
            {
                which: Judged(
                    arrays[f"{k}/{which}/error"],
                    {name.split("/u/")[1]: arrays[name] for name in arrays.files if name.startswith(f"{k}/{which}/u/")},
                    arrays[f"{k}/{which}/structure"],
                )
                for which in JUDGED
            }
            for k in range(count)
        ]


JUDGED = ("inside", "outside")


def trained(
    name: str, system: System, sets: dict[str, list[Atoms]], seed: int, options: argparse.Namespace
) -> GaussianMomentNetwork:
    """A light network with 64 neurons per hidden layer."""
    folder = options.folder / name / f"network_{len(sets['training'])}_{seed}_{options.epochs}"
    network = ModelSettings(cutoff=system.cutoff, hidden=(64, 64))
    training = TrainingSettings(epochs=options.epochs, threads=1)
    result = train(network, training, sets["training"], sets["valid"], folder, seed)
    print(f"{name}: {len(sets['training'])} labels, seed {seed}, trained", flush=True)
    return result.model


def measured(probe: Probe, structures: Sequence[Atoms]) -> Values:
    graphs = [build_graph(atoms, probe.model.elements, probe.model.cutoff) for atoms in structures]
    return together([probe.values(graph) for graph in graphs])


def judged(training: Values, values: Values, spread: Tensor, seed: int) -> Judged:
    """Only atoms that can move."""
    free = values.free.numpy()
    return Judged(
        error=values.error.square().mean(1).sqrt().numpy()[free],
        u={kind: u.numpy()[free] for kind, u in kinds(training, values, spread, seed).items()},
        structure=values.structure.numpy()[free],
    )


def largest(values: Array, structure: Array) -> Array:
    """Maximum of each structure (which follow one another)."""
    return np.maximum.reduceat(values, np.flatnonzero(np.diff(structure, prepend=-1)))


def worst_found(error: Array, u: Array) -> float:
    """Share of the largest 1 % of errors among the largest 10 % of u."""
    n = len(u)
    worst = np.argsort(error)[-max(1, round(0.01 * n)) :]
    return float(np.isin(worst, np.argsort(u)[-round(0.1 * n) :]).mean())


def ideal(u: Array, structure: Array, draws: int = 20) -> tuple[float, float]:
    """Spearman per atom and of maxima if the force errors were Gaussian with deviation u."""
    random = np.random.default_rng(0)
    errors = [u * np.sqrt(random.chisquare(3, len(u)) / 3.0) for _ in range(draws)]
    maximum = largest(u, structure)
    return (
        float(np.mean([spearman(u, e) for e in errors])),
        float(np.mean([spearman(maximum, largest(e, structure)) for e in errors])),
    )


def row_of(results: Sequence[dict[str, Judged]], kind: str) -> dict[str, float]:
    """Means over networks of all numbers of one kind."""
    rows = []
    for sets in results:
        row = {}
        for which, judged_set in sets.items():
            error, u, structure = judged_set.error, judged_set.u[kind], judged_set.structure
            atoms, maxima = ideal(u, structure)
            row[f"{which} atoms"] = spearman(u, error)
            row[f"{which} maxima"] = spearman(largest(u, structure), largest(error, structure))
            row[f"{which} atoms share"] = row[f"{which} atoms"] / atoms
            row[f"{which} maxima share"] = row[f"{which} maxima"] / maxima
            row[f"{which} worst"] = worst_found(error, u)
        row["coverage atoms"], row["coverage maxima"] = coverage(sets, kind)
        rows.append(row)
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def coverage(sets: dict[str, Judged], kind: str) -> tuple[float, float]:
    """Share of errors outside below 95 % uncertainties calibrated inside: of atoms, and of maxima by maxima."""
    inside, outside = (sets[which] for which in JUDGED)
    found = []
    for reduce in (lambda values, _: values, largest):
        pairs = [(reduce(s.error, s.structure), reduce(s.u[kind], s.structure)) for s in (inside, outside)]
        scale = conformal_scale(*pairs[0], 0.05).scale
        found.append(float(np.mean(pairs[1][0] <= scale * pairs[1][1])))
    return found[0], found[1]


def resampled(judged_set: Judged, chosen: Array) -> Judged:
    """The same with these structures."""
    places = [np.flatnonzero(judged_set.structure == k) for k in chosen]
    atoms = np.concatenate(places)
    return Judged(
        judged_set.error[atoms],
        {kind: u[atoms] for kind, u in judged_set.u.items()},
        np.repeat(np.arange(len(chosen)), [len(p) for p in places]),
    )


def differences(by_count: dict[int, list[dict[str, Judged]]], draws: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """kind -> 'outside atoms' ... -> 95 % interval of the difference from the posterior's Spearman.

    Mean over networks; structures (the same for all networks) and networks are drawn with replacement.
    """
    random = np.random.default_rng(1)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(draws):
        networks = [sets[random.integers(len(sets))] for sets in by_count.values() for _ in range(len(sets))]
        for which in JUDGED:
            n = int(networks[0][which].structure[-1]) + 1
            chosen = random.integers(n, size=n)
            drawn = [resampled(sets[which], chosen) for sets in networks]
            values = {kind: np.mean([rank_pair(d, kind) for d in drawn], axis=0) for kind in drawn[0].u}
            for kind, value in values.items():
                for label, number in zip(("atoms", "maxima"), value - values[BASELINE], strict=True):
                    found.setdefault(kind, {}).setdefault(f"{which} {label}", []).append(float(number))
    return {
        kind: {key: tuple(np.percentile(numbers, [2.5, 97.5])) for key, numbers in rows.items()}
        for kind, rows in found.items()
    }


def rank_pair(judged_set: Judged, kind: str) -> tuple[float, float]:
    """Spearman per atom, and of maxima."""
    error, u, structure = judged_set.error, judged_set.u[kind], judged_set.structure
    return spearman(u, error), spearman(largest(u, structure), largest(error, structure))


# ---------------------------------------------------------------------------------------------------- tables


def table(name: str, by_count: dict[int, list[dict[str, Judged]]], draws: int) -> str:
    """Markdown; numbers are means over all networks."""
    results = [sets for found in by_count.values() for sets in found]
    intervals = differences(by_count, draws)
    lines = [f"### {name}", "", errors_line(by_count), ""]
    head = ["kind", *(f"{w} {x}" for w in JUDGED for x in ("atoms", "maxima", "worst")), "covered atoms, maxima"]
    head += [f"Δ {w} {x}" for w in JUDGED for x in ("atoms", "maxima")]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in results[0]["inside"].u:
        row = row_of(results, kind)
        cells = [kind]
        for which in JUDGED:
            for what in ("atoms", "maxima"):
                cells.append(f"{row[f'{which} {what}']:.2f} ({row[f'{which} {what} share']:.2f})")
            cells.append(f"{row[f'{which} worst']:.2f}")
        cells.append(f"{row['coverage atoms']:.2f}, {row['coverage maxima']:.2f}")
        for which in JUDGED:
            cells += [interval(*intervals[kind][f"{which} {what}"]) for what in ("atoms", "maxima")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def interval(low: float, high: float) -> str:
    """Bold if it lies above 0."""
    text = f"{low:+.2f} … {high:+.2f}"
    return f"**{text}**" if low > 0 else text


def errors_line(by_count: dict[int, list[dict[str, Judged]]]) -> str:
    """Force errors of the networks."""
    parts = []
    for count, found in by_count.items():
        rmse = [np.mean([np.sqrt(np.mean(s[which].error ** 2)) for s in found]) for which in JUDGED]
        parts.append(f"{count} labels: {rmse[0]:.3f} inside, {rmse[1]:.3f} outside")
    return "RMSE of force components, eV/Å: " + "; ".join(parts) + "."


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"{', '.join(SYSTEMS)} (default: all)")
    parser.add_argument("--labels", type=int, nargs="+", default=[16, 64], help="training labels, at most 64")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the networks")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="judge every Nth structure (default: all)")
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--folder", type=Path, default=HERE / "ranking_run", help="for all files")
    options = parser.parse_args()
    unknown = [name for name in options.systems if name not in SYSTEMS]
    if unknown:
        parser.error(f"there is no system {unknown[0]!r}, only {', '.join(SYSTEMS)}")
    torch.set_num_threads(1)
    for name in options.systems or SYSTEMS:
        by_count = {count: evaluate(name, count, options) for count in options.labels}
        text = table(name, by_count, options.draws)
        (options.folder / name / "ranking.md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
