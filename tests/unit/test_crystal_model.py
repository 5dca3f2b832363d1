"""CrystalModel, the module of a force-constant potential's file, against the basis's own numpy formulas."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, make_supercell
from known_crystals import tin_selenide

from ubmd.operators import load
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.lattice import Supercell
from ubmd.potentials.force_constants.model import TINY, CrystalModel
from ubmd.potentials.force_constants.regression import Posterior

pytest.importorskip("spglib")


def turned_silicon() -> Atoms:
    """Axes of the crystal that are not those of the frame: matrices of rotations have no zeros."""
    atoms = bulk("Si", "diamond", 5.43)
    atoms.rotate(33.0, (1, 2, 3), rotate_cell=True)
    return atoms


# crystal, cutoffs, supercell; in the tiny boxes a centre sees one atom on several of its sites
SMALL = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
CASES = {
    "silicon": (lambda: bulk("Si", "diamond", 5.43), {2: 5.4, 3: 4.0, 4: 4.0}, [[-2, 2, 2], [2, -2, 2], [2, 2, -2]]),
    "silicon, tiny": (lambda: bulk("Si", "diamond", 5.43), {2: 5.4, 3: 4.0, 4: 4.0}, [[1, 0, 0], [0, 1, 0], [1, 0, 2]]),
    "turned silicon": (turned_silicon, {2: 4.0, 3: 4.0, 4: 2.4}, [[2, 0, 0], [0, 2, 0], [0, 0, 2]]),
    "boron arsenide": (lambda: bulk("BAs", "zincblende", 4.777), {2: 5.5, 3: 3.5, 4: 3.5, 5: 2.2}, 2 * np.eye(3)),
    "tin selenide": (tin_selenide, {2: 4.2, 3: 3.53, 4: 3.0, 5: 2.9, 6: 2.9}, SMALL),
}


@dataclass
class Case:
    basis: ClusterBasis
    posterior: Posterior
    box: Supercell
    model: torch.jit.ScriptModule
    lattice: dict

    @property
    def n(self) -> int:
        return len(self.box)

    def edges(self, centres: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Species, first and the atom of every edge of some centres."""
        sites = [np.array(s) for s in self.lattice["sites"]]
        rows = [sites[s] + [*self.box.offset[i], 0] for i, s in zip(centres, self.box.sublattice[centres], strict=True)]
        first = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        joined = np.concatenate([*rows, np.zeros((0, 4), dtype=np.int64)])
        atoms = self.box.index(joined[:, 3], joined[:, :3])
        return torch.from_numpy(self.box.sublattice[centres]), torch.from_numpy(first), atoms

    def evaluate(self, u: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray, list, np.ndarray]:
        """Energies of the centres, forces on all atoms [n, 3] from them, tape, atoms of the edges."""
        species, first, atoms = self.edges(centres)
        none = torch.zeros(0, dtype=torch.int64)
        energy, gradient, tape = self.model.evaluate(species, first, none, torch.from_numpy(u[atoms]), True)
        return energy.numpy(), self.forces(gradient, atoms), tape, atoms

    def forces(self, gradient: torch.Tensor, atoms: np.ndarray) -> np.ndarray:
        result = np.zeros((self.n, 3))
        np.subtract.at(result, atoms, gradient.numpy())
        return result

    def features(self, tapes: list) -> np.ndarray:
        sums = [self.model.features(tape, True)[0] for tape in tapes]
        return self.model.feature_sum([sum(parts) for parts in zip(*sums, strict=True)]).numpy()


def random_posterior(basis: ClusterBasis, seed: int = 3) -> Posterior:
    rng = np.random.default_rng(seed)
    orders = basis.parameter_orders
    scale = 3.0 ** (orders - 2.0)
    factor = rng.normal(size=(len(orders), len(orders))) * scale[:, None] * 0.01
    return Posterior(
        parameter_orders=orders,
        mean=rng.normal(size=len(orders)) * scale,
        factor=factor,
        alpha={int(order): 1.0 for order in np.unique(orders)},
        beta={"forces": 1e4},
        log_evidence=0.0,
    )


@pytest.fixture(scope="module", params=[(name, operators) for operators in (False, True) for name in CASES], ids=str)
def case(request) -> Case:
    name, operators = request.param
    if operators:
        load()
    crystal, cutoffs, matrix = CASES[name]
    basis = ClusterBasis.build(crystal(), cutoffs)
    box = basis.supercell(make_supercell(crystal(), np.array(matrix, dtype=int)))
    posterior = random_posterior(basis)
    model = CrystalModel(
        basis,
        posterior,
        energy_scale=1.3,
        force_scale=0.7,
        max_displacement=0.9,
        energy=-4.0 * len(basis.lattice.numbers),
    )
    model.use_operators(operators)
    scripted = torch.jit.script(model)
    return Case(basis, posterior, box, scripted, json.loads(scripted.metadata())["lattice"])


def displaced(n: int, seed: int = 0, size: float = 0.2) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=size, size=(n, 3))


def assert_close(actual, expected, relative: float = 1e-12) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


def test_energy_and_forces(case):
    u = displaced(case.n)
    energy, forces, _, _ = case.evaluate(u, np.arange(case.n))
    expected = case.basis.energy_features(u, case.box) @ case.posterior.mean
    assert energy.shape == (case.n,)
    assert float(np.sum(energy + 4.0)) == pytest.approx(expected, rel=1e-11)
    assert_close(forces, case.basis.forces(case.posterior.mean, u, case.box))


def test_forces_are_minus_the_derivatives_of_the_energy(case):
    u, step, everyone = displaced(case.n), 1e-3, np.arange(case.n)
    forces = case.evaluate(u, everyone)[1]
    for atom, axis in ((0, 0), (case.n // 2, 1), (case.n - 1, 2)):
        shift = np.zeros_like(u)
        shift[atom, axis] = step
        e = [case.evaluate(u + k * shift, everyone)[0].sum() for k in (-2, -1, 1, 2)]
        numeric = (e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * step)
        assert -forces[atom, axis] == pytest.approx(numeric, abs=1e-8 * np.abs(forces).max())


def test_features_and_their_gradient(case):
    u, everyone = displaced(case.n, seed=1), np.arange(case.n)
    _, _, tape, atoms = case.evaluate(u, everyone)
    phi = case.features([tape])
    expected = case.basis.energy_features(u, case.box)
    for order in case.basis.orders:
        chosen = case.basis.parameter_orders == order
        assert_close(phi[chosen], expected[chosen])
    w = np.random.default_rng(8).normal(size=case.basis.n_parameters)
    weight = torch.from_numpy(w)
    gradient = case.model.feature_gradient(tape, [], case.model.directions(weight, True), weight)
    assert_close(case.forces(gradient, atoms), case.basis.forces(w, u, case.box))


def test_blocks_of_any_size_and_mixture_add_up(case):
    u = displaced(case.n, seed=2)
    shuffled = np.random.default_rng(4).permutation(case.n)
    blocks = [shuffled[:1], shuffled[1:1], shuffled[1 : case.n // 3 + 1], shuffled[case.n // 3 + 1 :]]
    parts = [case.evaluate(u, block) for block in blocks]
    whole = case.evaluate(u, np.arange(case.n))
    assert_close(sum(part[1] for part in parts), whole[1])
    assert_close(case.features([part[2] for part in parts]), case.features([whole[2]]))
    for block, part in zip(blocks, parts, strict=True):
        np.testing.assert_allclose(part[0], whole[0][block], rtol=1e-12, atol=1e-12)
        assert part[0].shape == (len(block),)
        u_i = case.model.site_uncertainties(part[2]).numpy()
        np.testing.assert_allclose(u_i, case.model.site_uncertainties(whole[2]).numpy()[block], rtol=1e-11)


def test_uniform_shift_changes_nothing(case):
    u, everyone = displaced(case.n, seed=3, size=0.1), np.arange(case.n)
    energy, forces, tape, _ = case.evaluate(u, everyone)
    moved_energy, moved_forces, moved_tape, _ = case.evaluate(u + np.array([0.02, -0.03, 0.01]), everyone)
    assert float(moved_energy.sum()) == pytest.approx(float(energy.sum()), rel=1e-9)
    assert_close(moved_forces, forces, 1e-9)
    before, after = (case.model.site_uncertainties(t).numpy() for t in (tape, moved_tape))
    np.testing.assert_allclose(after, before, rtol=1e-8)


def test_uncertainties(case):
    u, everyone = displaced(case.n, seed=5), np.arange(case.n)
    tape = case.evaluate(u, everyone)[2]
    deviations = case.posterior.force_deviations(case.basis.force_matrix(u, case.box)).reshape(case.n, 3)
    np.testing.assert_allclose(case.model.site_uncertainties(tape).numpy(), 0.7 * deviations.max(1), rtol=1e-11)
    mean = torch.from_numpy(case.features([tape]) / case.n).requires_grad_(True)
    value = case.model.uncertainty(mean)
    expected = 1.3 * float(case.posterior.energy_deviation(case.basis.energy_features(u, case.box))) / case.n
    assert value.dtype == torch.float64
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9)  # the floor under the root
    (gradient,) = torch.autograd.grad(value, mean)
    assert_close(gradient.numpy(), 1.3**2 * case.posterior.covariance() @ mean.detach().numpy() / expected, 1e-9)


def test_the_ideal_lattice(case):
    energy, forces, tape, _ = case.evaluate(np.zeros((case.n, 3)), np.arange(case.n))
    np.testing.assert_array_equal(energy, -4.0)
    np.testing.assert_array_equal(forces, 0.0)
    np.testing.assert_array_equal(case.model.site_uncertainties(tape).numpy(), 0.0)
    mean = torch.from_numpy(case.features([tape])).requires_grad_(True)
    value = case.model.uncertainty(mean)
    (gradient,) = torch.autograd.grad(value, mean)
    assert float(value.detach()) == pytest.approx(1.3 * TINY)
    assert not gradient.any()


def test_metadata_and_file(case, tmp_path):
    path = tmp_path / "model.pt"
    case.model.save(str(path))
    loaded = torch.jit.load(str(path))
    record = json.loads(loaded.metadata())
    assert record["kind"] == "force constants"
    assert record["uncertainty"]["projections"] == case.basis.n_parameters
    for s, sites in enumerate(case.lattice["sites"]):
        assert sites[0] == [0, 0, 0, s]
    assert record["lattice"]["max_displacement"] == 0.9
    assert record["lattice"]["energy"] == -4.0 * len(case.basis.lattice.numbers)
    assert loaded.by_structure(5)


def test_edges_that_are_not_the_sites_are_refused(case):
    species, first, atoms = case.edges(np.arange(case.n))
    first = first.clone()
    first[1:-1] -= 1
    with pytest.raises((RuntimeError, torch.jit.Error), match="one edge for each of its relative sites"):
        case.model.evaluate(species, first, first, torch.zeros(len(atoms), 3, dtype=torch.float64), False)
