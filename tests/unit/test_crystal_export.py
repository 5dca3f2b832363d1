"""Model files of crystals: what the file says in Python against the basis's own numpy formulas and differences."""

import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.calculator import PropertyNotImplementedError
from ase.geometry import find_mic
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress
from ase.units import fs
from scipy.spatial.transform import Rotation

import ubmd
from ubmd.calculator import Calculator, Model
from ubmd.errors import DataError, ModelError
from ubmd.operators import available
from ubmd.potentials.file import load_model
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.export import GUARD, export_crystal
from ubmd.potentials.force_constants.lattice import Supercell
from ubmd.potentials.force_constants.regression import Posterior
from ubmd.uncertainty.conformal import ConformalScale

pytest.importorskip("spglib")

ENERGY, FORCE = ConformalScale(1.7, 0.1, 0.9, 40), ConformalScale(0.6, 0.1, 0.9, 1000)
BOND = 4.777 * 3**0.5 / 4
E0 = -11.25


@dataclass
class Case:
    basis: ClusterBasis
    posterior: Posterior
    path: Path
    metadata: dict
    atoms: Atoms
    box: Supercell

    def evaluator(self) -> Model:
        return Model(self.path)

    def displaced(self, seed: int, size: float = 0.1) -> Atoms:
        atoms = self.atoms.copy()
        atoms.positions += size * np.random.default_rng(seed).standard_normal((len(atoms), 3))
        return atoms


AXIAL, ISOTROPIC = 4.0, 1.0  # springs between neighbours, eV/Å^2: E = sum AXIAL (along the bond)^2 + ISOTROPIC |d|^2


def springs(box: Supercell, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forces [n, 3] at displacements [n, 3], and the energy's derivative by the strain of all positions [3, 3]."""
    n = len(box)
    bonds = find_mic((box.ideal[None] - box.ideal[:, None]).reshape(-1, 3), box.cell)[0].reshape(n, n, 3)
    pairs = np.argwhere(np.triu(np.linalg.norm(bonds, axis=-1) < 1.1 * BOND, 1))
    assert len(pairs) == 2 * n
    bonds, stretch = bonds[pairs[:, 0], pairs[:, 1]], u[pairs[:, 1]] - u[pairs[:, 0]]
    along = np.einsum("ij,ij->i", stretch, bonds) / BOND
    pull = 2 * AXIAL * along[:, None] * bonds / BOND + 2 * ISOTROPIC * stretch
    forces = np.zeros((n, 3))
    np.add.at(forces, pairs[:, 0], pull)
    np.subtract.at(forces, pairs[:, 1], pull)
    strain = pull.T @ (bonds + stretch)
    return forces, 0.5 * (strain + strain.T)


def stable_posterior(basis: ClusterBasis) -> Posterior:
    """Random parameters whose second order is that of springs between neighbours, so that dynamics are bound."""
    rng = np.random.default_rng(0)
    p = basis.n_parameters
    box = basis.supercell(make_supercell(bulk("BAs", "zincblende", 4.777), 2 * np.eye(3)))
    second = basis.parameter_orders == 2
    u = 0.1 * rng.standard_normal((2, len(box), 3))
    matrix = basis.force_matrix(u, box)[:, second]
    mean = 0.3 * rng.standard_normal(p)
    mean[second] = np.linalg.lstsq(matrix, np.ravel([springs(box, frame)[0] for frame in u]), rcond=None)[0]
    factor = 0.2 * rng.standard_normal((p, p)) / np.sqrt(p)
    alpha = dict.fromkeys(basis.orders, 1.0)
    return Posterior(basis.parameter_orders, mean, factor, alpha, {"forces": 1e4}, -12.5)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "operators"])
def case(request, tmp_path_factory) -> Case:
    if request.param and not available():
        pytest.skip("the compiled operators are not installed")
    crystal = bulk("BAs", "zincblende", 4.777)
    basis = ClusterBasis.build(crystal, {2: 3.6, 3: 3.5, 4: 2.2})
    posterior = stable_posterior(basis)
    path = tmp_path_factory.mktemp("crystal") / "model.pt"
    provenance = {"training_set_hash": "abc", "n_training": 7}
    metadata = export_crystal(
        basis,
        posterior,
        path,
        energy_scale=ENERGY,
        force_scale=FORCE,
        energy=E0,
        provenance=provenance,
        operators=request.param,
    )
    atoms = make_supercell(crystal, np.array([[2, 0, 0], [0, 2, 1], [1, 0, 2]]))
    return Case(basis, posterior, path, metadata, atoms, basis.supercell(atoms))


def turned(atoms: Atoms, seed: int) -> tuple[Atoms, np.ndarray]:
    rotation = Rotation.random(random_state=seed).as_matrix()
    moved = Atoms(
        atoms.numbers, atoms.positions @ rotation.T + [3.0, -1.0, 40.0], cell=atoms.cell @ rotation.T, pbc=True
    )
    return moved, rotation


def test_the_file_is_basis_and_posterior(case):
    structures = [case.displaced(seed) for seed in range(3)]
    for prediction, atoms in zip(case.evaluator().predict(structures), structures, strict=True):
        u = case.box.displacements(atoms)
        phi, matrix = case.basis.energy_features(u, case.box), case.basis.force_matrix(u, case.box)
        n = len(atoms)
        energy = phi @ case.posterior.mean + E0 * n / 2
        assert prediction.energy == pytest.approx(energy, rel=1e-13)
        np.testing.assert_allclose(prediction.forces.ravel(), matrix @ case.posterior.mean, atol=1e-12)
        sigma = case.posterior.energy_deviation(phi)
        assert prediction.u == pytest.approx(ENERGY.scale * sigma / n, rel=1e-10)
        deviations = case.posterior.force_deviations(matrix).reshape(n, 3).max(1)
        np.testing.assert_allclose(prediction.atomic_u, FORCE.scale * deviations, rtol=1e-11)
        assert np.linalg.norm(prediction.feature) == pytest.approx(sigma / n, rel=1e-10)


def test_turned_boxes_give_turned_forces(case):
    evaluator = case.evaluator()
    for seed in range(3):
        atoms = case.displaced(seed)
        moved, rotation = turned(atoms, seed)
        (here, there) = evaluator.predict([atoms, moved])
        assert there.energy == pytest.approx(here.energy, abs=1e-11)
        assert there.u == pytest.approx(here.u, rel=1e-10)
        np.testing.assert_allclose(there.forces, here.forces @ rotation.T, atol=1e-11)
        np.testing.assert_allclose(there.atomic_u, here.atomic_u, rtol=1e-9)
        bias = evaluator.uncertainty_gradient(moved)[1]
        np.testing.assert_allclose(bias, evaluator.uncertainty_gradient(atoms)[1] @ rotation.T, atol=1e-12)


@pytest.mark.parametrize("is_turned", [False, True])
def test_forces_and_bias_forces_are_derivatives(case, is_turned):
    calculator = Calculator(case.path)
    atoms = case.displaced(5)
    if is_turned:
        atoms = turned(atoms, 5)[0]
    forces, bias = calculator.get_forces(atoms), calculator.get_bias_forces(atoms)
    step = 1e-4
    for atom, axis in [(0, 0), (3, 1), (7, 2), (10, 0)]:
        values = []
        for sign in (-1, 1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            values.append((calculator.get_potential_energy(moved), calculator.get_property("uncertainty", moved)))
        (low, low_u), (high, high_u) = values
        assert forces[atom, axis] == pytest.approx(-(high - low) / (2 * step), rel=1e-6, abs=1e-7)
        assert bias[atom, axis] == pytest.approx((high_u - low_u) / (2 * step), rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(forces.sum(0), 0.0, atol=1e-11)
    np.testing.assert_allclose(bias.sum(0), 0.0, atol=1e-12)


def stress(calculator: Calculator, atoms: Atoms) -> np.ndarray:
    return voigt_6_to_full_3x3_stress(calculator.get_stress(atoms))


def test_stress_of_springs(case, tmp_path):
    """A harmonic crystal whose stress is known bond by bond, in its own frame and turned."""
    mean = np.where(case.basis.parameter_orders == 2, case.posterior.mean, 0.0)
    operators = bool(case.metadata["operators"])
    export_crystal(case.basis, replace(case.posterior, mean=mean), tmp_path / "springs.pt", operators=operators)
    calculator = Calculator(tmp_path / "springs.pt")
    for seed in range(3):
        atoms = case.displaced(seed)
        forces, strain = springs(case.box, case.box.displacements(atoms))
        np.testing.assert_allclose(calculator.get_forces(atoms), forces, atol=1e-10)
        expected = strain / atoms.get_volume()
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(stress(calculator, atoms), expected, atol=1e-11)
        moved, rotation = turned(atoms, seed)
        np.testing.assert_allclose(stress(calculator, moved), rotation @ expected @ rotation.T, atol=1e-11)


def test_biased_calculator(case):
    atoms = case.displaced(6)
    plain, biased = Calculator(case.path), Calculator(case.path, bias_force=2.5)
    u, gradient, strain = plain.evaluator.uncertainty_gradient(atoms)
    assert biased.get_potential_energy(atoms) == pytest.approx(plain.get_potential_energy(atoms) - 2.5 * u, rel=1e-13)
    np.testing.assert_allclose(biased.get_forces(atoms), plain.get_forces(atoms) + 2.5 * gradient, atol=1e-13)
    assert plain.results["uncertainty"] == u
    assert strain is None


def test_the_ideal_crystal(case):
    prediction = case.evaluator().predict_one(case.atoms)
    assert prediction.energy == pytest.approx(E0 * len(case.atoms) / 2, rel=1e-14)
    np.testing.assert_allclose(prediction.forces, 0.0, atol=1e-13)
    assert 0.0 <= prediction.u < 1e-7
    u, gradient, _ = case.evaluator().uncertainty_gradient(case.atoms)
    assert np.isfinite(gradient).all()
    assert u == prediction.u


def test_boxes_and_orders_of_atoms_may_change_between_structures(case):
    evaluator = case.evaluator()
    atoms = case.displaced(1)
    order = np.random.default_rng(0).permutation(len(atoms))
    here, there = evaluator.predict([atoms, atoms[order]])
    np.testing.assert_allclose(there.forces, here.forces[order], atol=1e-12)
    twice = evaluator.predict_one(atoms.repeat((1, 2, 1)))
    assert twice.energy == pytest.approx(2 * here.energy, rel=1e-13)
    np.testing.assert_allclose(twice.forces, np.tile(here.forces, (2, 1)), atol=1e-12)
    assert twice.u == pytest.approx(here.u, rel=1e-11)


def test_dynamics_keep_their_energy(case):
    """In a turned box that drifts through its boundaries."""
    atoms, _ = turned(case.displaced(3, 0.03), 3)
    atoms.calc = Calculator(case.path)
    rng = np.random.default_rng(0)
    atoms.set_momenta(rng.standard_normal((len(atoms), 3)) + 1.4 * atoms.get_masses()[:, None])
    start = atoms.get_total_energy()
    potential = atoms.get_potential_energy()
    VelocityVerlet(atoms, 0.5 * fs).run(60)
    assert np.linalg.norm(atoms.positions - turned(case.atoms, 3)[0].positions, axis=1).min() > 3.0
    assert abs(atoms.get_potential_energy() - potential) > 0.02
    assert atoms.get_total_energy() == pytest.approx(start, abs=2e-3)


def test_metadata(case):
    record = json.loads(load_model(case.path).metadata())
    assert record == json.loads(json.dumps(case.metadata))
    assert record["format"] == 1
    assert record["kind"] == record["model"] == "force constants"
    assert (record["elements"], record["cutoff"]) == (["B", "As"], 3.6)
    assert record["cutoffs"] == {"2": 3.6, "3": 3.5, "4": 2.2}
    p = case.basis.n_parameters
    counts = {str(order): int((case.basis.parameter_orders == order).sum()) for order in (2, 3, 4)}
    assert record["parameters"] == counts
    uncertainty = record["uncertainty"]
    assert (uncertainty["kind"], uncertainty["projections"], uncertainty["alpha"]) == ("posterior", p, 0.1)
    assert uncertainty["energy"] == {"scale": 1.7, "attainable": 0.9, "n_calibration": 40, "feature_scale": 1.0}
    regression = record["regression"]
    assert regression["noise"] == {"forces": pytest.approx(0.01)}
    variances = np.diag(case.posterior.covariance())
    gamma = {order: (1.0 - variances[case.basis.parameter_orders == order]).sum() for order in (2, 3, 4)}
    assert regression["gamma"] == {str(order): pytest.approx(value) for order, value in gamma.items()}
    assert regression["determined"] == pytest.approx(sum(gamma.values()) / p)
    assert record["lattice"]["max_displacement"] == pytest.approx(GUARD * BOND)
    assert record["lattice"]["energy"] == E0
    assert (record["training_set_hash"], record["n_training"]) == ("abc", 7)
    assert record["package_version"] == ubmd.__version__


def test_precisions_change_nothing(case):
    atoms = case.displaced(2)
    double, single = (Model(case.path, precision).predict_one(atoms) for precision in ("double", "single"))
    assert double.energy == single.energy
    np.testing.assert_array_equal(double.forces, single.forces)


def test_mistakes(case, tmp_path):
    evaluator = case.evaluator()
    far = case.displaced(1, 0.01)
    far.positions[4, 1] += 1.0
    with pytest.raises(DataError, match=r"Atom 4 is 0\.9\d* Å from its lattice site, .* up to 0.827 Å"):
        evaluator.predict_one(far)
    with pytest.raises(DataError, match="not an integer multiple"):
        evaluator.predict_one(bulk("BAs", "zincblende", 4.9))
    with pytest.raises(DataError, match="species that the ideal crystal lacks"):
        evaluator.predict_one(bulk("GaAs", "zincblende", 4.777))
    with pytest.raises(DataError, match="periodic"):
        evaluator.predict_one(Atoms("BAs", positions=[[0, 0, 0], [1, 1, 1]]))
    broken = case.displaced(1)
    broken.positions[2, 2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        evaluator.predict_one(broken)
    with pytest.raises(ModelError, match="no gradient of atomic uncertainties"):
        evaluator.atomic_uncertainty_gradient(case.atoms)
    with pytest.raises(PropertyNotImplementedError, match="bias of a force-constant potential has no stress"):
        Calculator(case.path, bias_force=1.0).get_stress(case.atoms)
    other = ClusterBasis.build(bulk("BAs", "zincblende", 4.777), {2: 3.6})
    with pytest.raises(ModelError, match="are not those of the cluster basis"):
        export_crystal(other, case.posterior, tmp_path / "other.pt")
    assert not (tmp_path / "other.pt").exists()


def test_a_file_without_calibration_promises_nothing(case, tmp_path):
    metadata = export_crystal(
        case.basis, case.posterior, tmp_path / "bare.pt", force_scale=2.0, max_displacement=0.3, operators=False
    )
    assert metadata["uncertainty"]["alpha"] is None
    record = {"scale": 2.0, "attainable": 0.0, "n_calibration": 0, "feature_scale": 1.0}
    assert metadata["uncertainty"]["forces"] == record
    assert metadata["lattice"]["max_displacement"] == 0.3
    atoms = case.displaced(1, 0.05)
    ratio = Model(tmp_path / "bare.pt").predict_one(atoms).atomic_u / case.evaluator().predict_one(atoms).atomic_u
    np.testing.assert_allclose(ratio, 2.0 / FORCE.scale, rtol=1e-11)


def test_pickled_evaluators_are_the_same(case: Case) -> None:
    evaluator = case.evaluator()
    again = pickle.loads(pickle.dumps(evaluator))
    for seed in range(2):
        here, there = (e.predict_one(case.displaced(seed)) for e in (evaluator, again))
        assert (here.energy, here.u) == (there.energy, there.u)
        np.testing.assert_array_equal(here.forces, there.forces)
        np.testing.assert_array_equal(here.atomic_u, there.atomic_u)
