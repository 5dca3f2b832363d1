"""The compiled operators of force-constant potentials against the formulas in torch, for every instruction set."""

import json
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from known_crystals import boron_arsenide, silicon, tin_selenide

from ubmd import operators
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.model import CrystalModel
from ubmd.potentials.force_constants.regression import Posterior

pytest.importorskip("spglib")


def turned(atoms: Atoms) -> Atoms:
    """The crystal in a frame where matrices of rotations have no zeros."""
    atoms.rotate(33.0, (1, 2, 3), rotate_cell=True)
    return atoms


def two_atoms() -> Atoms:
    """No symmetry but the identity, two species."""
    return Atoms("NaCl", [[0.0, 0.0, 0.0], [1.7, 1.6, 2.1]], cell=[[3.4, 0, 0], [0.4, 3.9, 0], [-0.3, 0.2, 4.3]], pbc=1)


# all numbers of bodies up to 5, all degrees up to 6
CASES = {
    "silicon": (lambda: bulk("Si", "diamond", 5.43), {2: 5.4, 3: 4.0, 4: 4.0}),
    "turned silicon": (lambda: turned(bulk("Si", "diamond", 5.43)), {2: 4.0, 4: 2.4, 6: 2.4}),
    "boron arsenide": (lambda: bulk("BAs", "zincblende", 4.777), {2: 4.0, 3: 2.2, 5: 3.5}),
    "triclinic": (two_atoms, {2: 4.4, 3: 3.6, 4: 3.3, 5: 3.3, 6: 3.3}),
}


@cache
def models(name: str) -> tuple[CrystalModel, CrystalModel]:
    """The same model with operators and without."""
    operators.load()
    crystal, cutoffs = CASES[name]
    basis = ClusterBasis.build(crystal(), cutoffs)
    rng = np.random.default_rng(7)
    p = basis.n_parameters
    posterior = Posterior(basis.parameter_orders, rng.normal(size=p), rng.normal(size=(p, p)), {}, {}, 0.0)
    fast, slow = (CrystalModel(basis, posterior, max_displacement=1.0) for _ in range(2))
    fast.use_operators(True)
    slow.use_operators(False)
    return fast, slow


def centres(model: CrystalModel, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Species, first and displacements of random centres; every edge has a displacement of its own."""
    generator = torch.Generator().manual_seed(seed)
    species = torch.randint(len(model.n_sites), (n,), generator=generator)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), model.site_counts[species].cumsum(0)])
    displacement = 0.7 * torch.randn(int(first[-1]), 3, generator=generator, dtype=torch.float64)
    return species, first, displacement


def evaluate(model: CrystalModel, some: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, list]:
    species, first, displacement = some
    return model.evaluate(species, first, first, displacement, True)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    largest = float(expected.detach().abs().max()) if expected.numel() > 0 else 0.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=relative * largest)


def check_everything(name: str, n: int) -> None:
    """All methods of a file, with operators and without."""
    fast, slow = models(name)
    some = centres(fast, n, seed=n)
    energy, gradient, tape = evaluate(fast, some)
    expected_energy, expected_gradient, _ = evaluate(slow, some)
    assert_close(energy, expected_energy)
    assert_close(gradient, expected_gradient)
    sums = fast.features(tape, True)[0]
    assert_close(sums[0], slow.features(tape, True)[0][0])
    assert_close(fast.feature_sum(sums), slow.feature_sum(sums))
    w = torch.randn(fast.n_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(fast.directions(w, True)[0], slow.directions(w, True)[0])
    assert_close(fast.site_uncertainties(tape), slow.site_uncertainties(tape))


@pytest.mark.parametrize("n", [0, 1, 7, 19])
@pytest.mark.parametrize("name", CASES)
def test_operators_agree_with_torch(name, n):
    check_everything(name, n)


@pytest.mark.long
@pytest.mark.parametrize("isa", ["v3", "base"])
def test_every_instruction_set(isa):
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("test", {__file__!r})
test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)
for name in ("silicon", "triclinic"):
    for n in (3, 13):
        test.check_everything(name, n)
test.check_uncertainty(True)
test.check_uncertainty(False)
"""
    environment = {**os.environ, "UBMD_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if "is not an instruction set of this processor" in result.stderr:
        assert isa != "base"
        pytest.skip(f"this processor doesn't run {isa}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", CASES)
def test_energy_is_linear_in_the_coefficients(name):
    model, _ = models(name)
    some = centres(model, 11)
    energy = model.contract(*some, model.coefficients)[0]
    assert_close(torch.dot(model.moments(*some), model.coefficients), energy.sum(), 1e-11)


@pytest.mark.parametrize("name", CASES)
def test_map_to_the_parameters_is_the_transpose_of_that_to_the_coefficients(name):
    model, _ = models(name)
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(model.n_features, generator=generator, dtype=torch.float64)
    c = torch.randn(len(model.components), generator=generator, dtype=torch.float64)
    assert_close(torch.dot(model.expand(w), c), torch.dot(model.reduce(c), w), 1e-11)


def test_a_centre_does_not_see_its_neighbours_in_the_block():
    model, _ = models("boron arsenide")
    species, first, displacement = centres(model, 12)
    energy, gradient, tape = evaluate(model, (species, first, displacement))
    u = model.site_uncertainties(tape)
    displacement[first[5] + 2, 1] = torch.nan  # a site that several clusters share
    broken, broken_gradient, tape = evaluate(model, (species, first, displacement))
    others = torch.arange(12) != 5
    assert torch.isnan(broken[5])
    torch.testing.assert_close(broken[others], energy[others], rtol=0.0, atol=0.0)
    edges = torch.ones(len(gradient), dtype=torch.bool)
    edges[first[5] : first[6]] = False
    torch.testing.assert_close(broken_gradient[edges], gradient[edges], rtol=0.0, atol=0.0)
    torch.testing.assert_close(model.site_uncertainties(tape)[others], u[others], rtol=1e-12, atol=0.0)


def test_threads_change_nothing():
    model, _ = models("silicon")
    some, before = centres(model, 70), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            energy, gradient, tape = evaluate(model, some)
            results.append([energy, gradient, *model.features(tape, True)[0], model.site_uncertainties(tape)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-14, atol=0.0)


def check_uncertainty(triangular: bool) -> None:
    """The deviation of the energy and its gradient against torch."""
    operators.load()
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(53, 53, generator=generator, dtype=torch.float64)
    factor = factor.triu() if triangular else factor
    phi = torch.randn(53, generator=generator, dtype=torch.float64).requires_grad_(True)
    value = torch.ops.ubmd.crystal_deviation(phi, factor, triangular, 0.3)
    expected = ((factor.T @ phi).square().sum() + 0.09).sqrt()
    assert_close(value, expected, 1e-14)
    assert_close(*(torch.autograd.grad(2.5 * v, phi)[0] for v in (value, expected)), 1e-14)


@pytest.mark.parametrize("triangular", [True, False])
def test_uncertainty(triangular):
    check_uncertainty(triangular)


def test_a_second_derivative_of_the_uncertainty_is_refused():
    phi = torch.ones(3, dtype=torch.float64, requires_grad=True)
    value = torch.ops.ubmd.crystal_deviation(phi, torch.eye(3, dtype=torch.float64), True, 0.1)
    (gradient,) = torch.autograd.grad(value, phi, create_graph=True)
    with pytest.raises(RuntimeError, match="crystal_deviation only first ones"):
        gradient.sum().backward()


def test_arguments_that_do_not_fit_are_refused():
    model, _ = models("silicon")
    species, first, displacement = centres(model, 4)
    with pytest.raises((RuntimeError, IndexError), match="one edge for each of its relative sites"):
        evaluate(model, (species, first, displacement[:-1]))
    with pytest.raises((RuntimeError, IndexError), match="one edge for each of its relative sites"):
        evaluate(model, (species + 2, first, displacement))
    with pytest.raises(RuntimeError, match="coefficients"):
        model.contract(species, first, displacement, model.coefficients[1:])
    with pytest.raises(RuntimeError, match="parameters"):
        model.directions(torch.zeros(3, dtype=torch.float64), True)
    with pytest.raises(RuntimeError, match="17 tables"):
        torch.ops.ubmd.crystal_expand(model.theta, model.tables()[1:])
    with pytest.raises(RuntimeError, match="bias the structure's uncertainty"):
        model.feature_gradient([species, first, displacement], [], [], model.theta)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("crystal", "cutoffs"),
    [
        (silicon, (7.5, 5.0, 5.0)),
        (boron_arsenide, (5.5, 4.5, 4.5, 3.5)),
        (boron_arsenide, (8.35, 3.5, 3.5, 3.5, 3.5)),
        (tin_selenide, (5.7, 3.53, 3.53, 3.53, 3.53)),
    ],
)
def test_large_models_against_numpy(crystal, cutoffs):
    """Potentials of the usual sizes (690, 1805, 2164 and 351 parameters)."""
    operators.load()
    basis = ClusterBasis.build(crystal(), dict(enumerate(cutoffs, start=2)))
    rng = np.random.default_rng(0)
    p, scale = basis.n_parameters, 3.0 ** (basis.parameter_orders - 2.0)
    factor = np.triu(rng.normal(size=(p, p))) * scale[:, None]
    posterior = Posterior(basis.parameter_orders, rng.normal(size=p) * scale, factor, {}, {}, 0.0)
    model = CrystalModel(basis, posterior, max_displacement=1.0)
    box = basis.supercell(crystal().repeat(2))
    n, sites = len(box), json.loads(model.metadata())["lattice"]["sites"]
    edges = [np.add(sites[s], [*offset, 0]) for s, offset in zip(box.sublattice, box.offset, strict=True)]
    first = torch.tensor(np.cumsum([0, *[len(rows) for rows in edges]]))
    joined = np.concatenate(edges)
    atoms, u = box.index(joined[:, 3], joined[:, :3]), rng.normal(scale=0.1, size=(n, 3))
    energy, gradient, tape = evaluate(model, (torch.from_numpy(box.sublattice), first, torch.from_numpy(u[atoms])))
    matrix, forces = basis.force_matrix(u, box), np.zeros((n, 3))
    np.subtract.at(forces, atoms, gradient.numpy())
    expected = torch.from_numpy((matrix @ posterior.mean).reshape(n, 3))
    assert_close(torch.from_numpy(forces), expected, 1e-11)
    phi = basis.energy_features(u, box)
    features = model.feature_sum(model.features(tape, True)[0])
    assert_close(features * torch.from_numpy(scale), torch.from_numpy(phi * scale), 1e-11)
    assert float(energy.sum()) == pytest.approx(phi @ posterior.mean, abs=1e-11 * np.abs(phi * posterior.mean).sum())
    deviations = torch.from_numpy(np.linalg.norm(matrix @ factor, axis=1).reshape(n, 3).max(1))
    assert_close(model.site_uncertainties(tape), deviations, 1e-11)
