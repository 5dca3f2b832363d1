"""Pair functions of the true distance beside force constants, their core, and the wall beyond the labels.

Against plain sums over atoms and differences of these.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from crystals import ENERGY, Crystal, tin_selenide

from ubmd.calculator import Model
from ubmd.data.structures import read_structures
from ubmd.errors import ModelError, SettingsError
from ubmd.operators import available
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.export import export_crystal
from ubmd.potentials.force_constants.fit import cached_basis, fit_crystal
from ubmd.potentials.force_constants.phonons import HarmonicCrystal
from ubmd.potentials.force_constants.potential import Potential, anharmonicity, forces_by_order, load_potential
from ubmd.potentials.record import parse_record
from ubmd.settings import CrystalSettings, UncertaintySettings

pytest.importorskip("spglib")

CUTOFF = 5.2
LIMIT = 0.3  # Å, of differences of displacements
RADII = np.array([3.35, 2.7, 3.1])  # of the core: Se-Se, Se-Sn, Sn-Sn


def plain(crystal: Crystal, positions: np.ndarray, cell: np.ndarray, numbers: np.ndarray) -> np.longdouble:
    """Energy of the pair functions and their core: a sum over all atoms and images in extended precision."""
    pairs, theta = crystal.basis.pairs, crystal.posterior.mean[crystal.basis.parameter_orders == 0]
    weights = pairs.parameters @ theta
    x, images = np.asarray(positions, np.longdouble), np.array(np.meshgrid(*[np.arange(-2, 3)] * 3)).reshape(3, -1).T
    r = x[None, :] - x[:, None] + (images @ np.asarray(cell, np.longdouble))[:, None, None]
    r = np.sqrt((r**2).sum(3))
    total = np.longdouble(0.0)
    for kind, elements in enumerate([(34, 34), (34, 50), (50, 50)]):
        of_kind = (np.sort([[(a, b) for a in numbers] for b in numbers], axis=2) == elements).all(2)
        d = r[:, of_kind]
        d = d[(d > 1e-9) & (d < CUTOFF)]
        f = 0.5 * (1.0 + np.cos(PI * d / np.longdouble(CUTOFF)))
        for k in np.nonzero(pairs.kinds == kind)[0]:
            total += 0.5 * weights[k] * np.sum(np.exp(-0.5 * ((d - pairs.centres[k]) / np.longdouble(0.3)) ** 2) * f)
        total += 0.5 * 100.0 * np.sum(np.maximum(RADII[kind] / d - 1.0, 0.0) ** 3)
    return total


PI = np.longdouble(4.0) * np.arctan(np.longdouble(1.0))
STEPS = np.longdouble(1e-5) * np.array([-2, -1, 1, 2])
WEIGHTS = np.array([1, -8, 8, -1]) / (12 * np.longdouble(1e-5))  # error of the fourth order


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "operators"])
def crystal(request, tmp_path_factory) -> Crystal:
    if request.param and not available():
        pytest.skip("the compiled operators are not installed")
    return Crystal.make(
        tmp_path_factory.mktemp("pairs"),
        tin_selenide(),
        {2: 3.6, 3: 3.0},
        operators=request.param,
        pairs=CUTOFF,
        core=RADII,
        limit=LIMIT,
    )


@pytest.fixture(scope="module")
def only_pairs(crystal, tmp_path_factory) -> Crystal:
    """Its pair functions alone."""
    mean = np.where(crystal.basis.parameter_orders == 0, crystal.posterior.mean, 0.0)
    options = {"mean": mean, "pairs": CUTOFF, "core": RADII}
    return Crystal.make(tmp_path_factory.mktemp("only"), tin_selenide(), {2: 3.6, 3: 3.0}, **options)


@pytest.fixture(scope="module")
def only_wall(crystal, tmp_path_factory) -> Crystal:
    """Its wall alone."""
    options = {"mean": 0.0 * crystal.posterior.mean, "pairs": CUTOFF, "core": 0.0 * RADII, "limit": LIMIT}
    return Crystal.make(tmp_path_factory.mktemp("wall"), tin_selenide(), {2: 3.6, 3: 3.0}, **options)


def test_energies_and_forces_are_plain_sums(only_pairs):
    atoms, box = only_pairs.shaken((1, 2, 2), 0.35)
    cell, numbers = atoms.cell.array, atoms.numbers
    found = only_pairs.expected(atoms, box)
    rest = plain(only_pairs, box.ideal, cell, numbers)
    energy = plain(only_pairs, atoms.positions, cell, numbers) - rest
    assert only_pairs.basis.fixed(RADII, None, atoms, box)[0] > 0.05
    assert found.energy - ENERGY * box.determinant == pytest.approx(float(energy), rel=1e-10)
    rng = np.random.default_rng(0)
    for _ in range(2):
        direction = rng.standard_normal(atoms.positions.shape)
        direction /= np.linalg.norm(direction)
        values = [plain(only_pairs, atoms.positions + h * direction, cell, numbers) for h in STEPS]
        slope = float(np.dot(WEIGHTS, values))
        assert abs(-np.sum(found.forces * direction) - slope) < 1e-10 * np.linalg.norm(found.forces)


def plain_wall(ideal: np.ndarray, u: np.ndarray, cell: np.ndarray) -> np.longdouble:
    """Energy of the wall: pairs of sites within 3 Å in extended precision, images and all."""
    u = np.asarray(u, np.longdouble)
    images = np.array(np.meshgrid(*[np.arange(-1, 2)] * 3)).reshape(3, -1).T
    sites = np.linalg.norm(ideal[None, :] - ideal[:, None] + (images @ cell)[:, None, None], axis=3)
    apart = np.sqrt(((u[None, :] - u[:, None]) ** 2).sum(2))
    many = ((sites > 1e-6) & (sites < 3.0)).sum(0)
    return 0.5 * 20.0 * np.sum(many * np.maximum(apart / np.longdouble(LIMIT) - 1.0, 0.0) ** 4)


def test_the_wall_is_a_plain_sum(only_wall):
    atoms, box = only_wall.shaken((1, 2, 2), 0.35)
    u = box.displacements(atoms)
    found = Model(only_wall.path).predict([atoms])[0]
    energy = plain_wall(box.ideal, u, box.cell)
    assert found.energy - ENERGY * box.determinant == pytest.approx(float(energy), rel=1e-10)
    assert energy > 0.1
    direction = np.random.default_rng(0).standard_normal(u.shape)
    direction /= np.linalg.norm(direction)
    slope = float(np.dot(WEIGHTS, [plain_wall(box.ideal, u + h * direction, box.cell) for h in STEPS]))
    assert abs(-np.sum(found.forces * direction) - slope) < 1e-9 * np.linalg.norm(found.forces)
    small = only_wall.shaken((1, 2, 2), 0.08)[0]  # no two atoms are further apart than 0.28 Å
    assert np.abs(Model(only_wall.path).predict([small])[0].forces).max() == 0.0


def test_no_large_displacement_lowers_the_energy(crystal):
    """The third order alone falls without bound; the wall is of the fourth."""
    atoms, box = crystal.shaken((1, 2, 2), 0.3)
    u = box.displacements(atoms)
    theta = np.where(crystal.basis.parameter_orders == 3, crystal.posterior.mean, 0.0)
    sign = -np.sign(crystal.basis.energy_features(u, box) @ theta)
    energies = {}
    for t in (10.0 * sign, 100.0 * sign, 1000.0 * sign):
        cubic = float(crystal.basis.energy_features(t * u, box) @ theta)
        assert cubic < 0.0
        energies[abs(t)] = cubic + crystal.basis.fixed(None, crystal.posterior.limits, t * u, box)[0]
    assert energies[1000.0] > energies[100.0] > energies[10.0] > 0.0


def test_the_file_is_basis_posterior_core_and_wall(crystal):
    atoms, box = crystal.shaken((1, 2, 2), 0.3)
    assert crystal.basis.fixed(None, crystal.posterior.limits, atoms, box)[0] > 0.05
    found = Model(crystal.path).predict([atoms])[0]
    expected = crystal.expected(atoms, box)
    size = np.abs(expected.forces).max()
    assert found.energy == pytest.approx(expected.energy, rel=1e-10)
    np.testing.assert_allclose(found.forces, expected.forces, rtol=0.0, atol=1e-10 * size)
    np.testing.assert_allclose(found.atomic_u, expected.atomic, rtol=1e-10)
    assert found.u == pytest.approx(expected.sigma / len(atoms), rel=1e-10)
    u, gradient, _ = Model(crystal.path).uncertainty_gradient(atoms)
    assert u == found.u
    np.testing.assert_allclose(gradient, expected.sigma_gradient / len(atoms), atol=1e-10 * np.abs(gradient).max())


def test_a_larger_box_of_the_same_displacements_has_the_same_forces(crystal):
    atoms, _ = crystal.shaken((1, 2, 2), 0.3)
    large = atoms.repeat((2, 1, 2))
    one, many = (Model(crystal.path).predict([a])[0] for a in (atoms, large))
    assert many.energy == pytest.approx(4 * one.energy, rel=1e-12)
    np.testing.assert_allclose(many.forces.reshape(4, -1, 3).mean(0), one.forces, atol=1e-10)
    np.testing.assert_allclose(many.forces.reshape(4, -1, 3).std(0), 0.0, atol=1e-10)


def test_the_stress_is_the_derivative_by_strain_beyond_that_of_the_ideal_crystal(only_pairs):
    atoms, box = only_pairs.shaken((1, 2, 2), 0.3)
    u = box.displacements(atoms)
    found = Model(only_pairs.path).predict([atoms])[0].stress
    expected = np.zeros((3, 3))
    for a in range(3):
        for b in range(3):
            for positions, sign in ((box.ideal + u, 1.0), (box.ideal, -1.0)):
                values = []
                for h in STEPS:
                    strain = np.eye(3, dtype=np.longdouble)
                    strain[a, b] += h
                    values.append(plain(only_pairs, positions @ strain.T, box.cell @ strain.T, atoms.numbers))
                expected[a, b] += sign * float(np.dot(WEIGHTS, values))
    expected = 0.5 * (expected + expected.T) / abs(np.linalg.det(box.cell))
    np.testing.assert_allclose(
        found, expected.ravel()[[0, 4, 8, 5, 2, 1]], rtol=0.0, atol=1e-10 * np.abs(expected).max()
    )


def test_the_ideal_crystal_is_at_rest(crystal):
    ideal = tin_selenide().repeat((1, 2, 2))
    box = crystal.basis.supercell(ideal)
    none = np.zeros((len(ideal), 3))
    assert np.abs(crystal.basis.force_matrix(none, box)).max() < 1e-12
    assert np.abs(crystal.basis.energy_features(none, box)).max() == 0.0
    functions = crystal.basis.pairs
    assert functions.n_parameters == len(functions.kinds) - 4  # x and z of tin and of selenium
    bare = replace(functions, parameters=np.eye(len(functions.kinds)))
    assert np.abs(bare.force_matrix(none, box)).max() > 1e-3


def test_second_derivatives_are_differences_of_forces(only_pairs):
    ideal = tin_selenide().repeat((1, 2, 2))
    box = only_pairs.basis.supercell(ideal)
    theta = only_pairs.posterior.mean
    constants = only_pairs.basis.force_constants(theta, 2, box)
    h = 1e-4
    for atom, axis in ((0, 0), (5, 2), (20, 1)):
        u = np.zeros((len(ideal), 3))
        u[atom, axis] = h
        difference = (only_pairs.basis.forces(theta, -u, box) - only_pairs.basis.forces(theta, u, box)) / (2.0 * h)
        np.testing.assert_allclose(constants[:, atom, :, axis], difference, atol=1e-6 * np.abs(constants).max())
    with pytest.raises(SettingsError, match=r"crystal\.pairs"):
        only_pairs.basis.force_constants(theta, 3, box)


def test_phonons_are_those_of_the_whole_energy(crystal):
    """At wave vectors of the box the dynamical matrix is the second derivative of the energy by the wave."""
    box = crystal.basis.supercell(tin_selenide().repeat((1, 2, 2)))
    theta = crystal.posterior.mean
    harmonic = HarmonicCrystal.from_basis(crystal.basis, theta, np.ones(8))
    constants = crystal.basis.force_constants(theta, 2, box).transpose(0, 2, 1, 3).reshape(96, 96)
    q = np.array([[0, i, j] for i in (0, 0.5) for j in (0, 0.5)])
    found = np.sort(np.linalg.eigvalsh(harmonic.dynamical_matrices(q)).ravel())
    np.testing.assert_allclose(found, np.linalg.eigvalsh(constants), atol=1e-9 * np.abs(found).max())


def test_the_core_is_smooth_and_has_no_bound(crystal):
    """Two atoms: energy and two derivatives vanish at the radius; it grows without bound below."""
    functions = crystal.basis.pairs
    far = Atoms("SnSe", [[0, 0, 0], [2.7, 0, 0]], cell=[30, 30, 30], pbc=True)

    class Box:
        ideal, cell = far.positions, far.cell.array
        sublattice = np.array([0, 4])

    def energy(r: float) -> float:
        return functions.core(RADII, np.array([[0, 0, 0], [r - 2.7, 0, 0]]), Box)[0]

    h = 1e-3
    assert energy(2.7) == energy(3.0) == 0.0
    assert energy(2.7 - h) == pytest.approx(100.0 * (h / 2.7) ** 3, rel=1e-2)
    assert energy(0.85 * 2.7) == pytest.approx(0.55, abs=0.01)
    assert energy(0.27) == pytest.approx(100.0 * 9**3)


def test_files_keep_the_functions(crystal, tmp_path):
    crystal.basis.save(tmp_path / "basis.npz")
    crystal.posterior.save(tmp_path / "posterior.npz")
    basis, parameters = load_potential(tmp_path)
    atoms, box = crystal.shaken((1, 2, 2), 0.2)
    np.testing.assert_array_equal(
        basis.force_matrix(atoms, box) @ parameters, crystal.basis.force_matrix(atoms, box) @ parameters
    )
    posterior = type(crystal.posterior).load(tmp_path / "posterior.npz")
    assert posterior.core.tolist() == RADII.tolist()
    assert posterior.limits.tolist() == crystal.posterior.limits.tolist()


def test_earlier_versions_refuse_the_file(crystal):
    """They read formats up to 2."""
    record = Model(crystal.path).metadata
    assert record["format"] == 3
    assert record["pairs"]["core"] == RADII.tolist()
    wall = record["pairs"]["wall"]
    assert (wall["power"], set(wall["limits"]), len(wall["distances"])) == (4, {LIMIT}, len(wall["limits"]))
    with pytest.raises(ModelError, match="format 5"):
        parse_record(str(record | {"format": 5}).replace("'", '"').replace("None", "null"), Path("model.pt"))


def test_what_pairs_add_beyond_their_second_derivatives_is_anharmonic(only_pairs):
    box = only_pairs.basis.supercell(tin_selenide().repeat((1, 2, 2)))
    potential = Potential(only_pairs.basis, only_pairs.posterior.mean)
    small, large = (
        Atoms(only_pairs.shaken((1, 2, 2))[0].numbers, box.ideal + size * DIRECTION, cell=box.cell, pbc=True)
        for size in (1e-4, 0.3)
    )
    assert anharmonicity(potential, [small]) < 1e-2 < 0.05 < anharmonicity(potential, [large])
    assert forces_by_order(potential, [large]).shape == (3, 1, 32, 3)


DIRECTION = np.random.default_rng(8).uniform(-1.0, 1.0, (32, 3))


@pytest.mark.parametrize("cutoff", [1.0, -1.0, math.nan])
def test_cutoffs_without_functions_are_refused(cutoff):
    with pytest.raises(SettingsError, match=r"crystal\.pairs"):
        ClusterBasis.build(tin_selenide(), {2: 3.6}, pairs=cutoff)


def test_a_fit_without_the_new_parts_is_that_of_earlier_versions(tmp_path):
    """Cubic boron arsenide, labels of the repository; numbers of the version before crystal.pairs."""
    folder = Path(__file__).parents[2] / "lammps_examples" / "bas"
    ideal = read_structures(folder / "bas.extxyz", compare=False)[0]
    training = read_structures(folder / "labels" / "dynamic_seed0.extxyz.xz")[:6]
    validation = read_structures(folder / "labels" / "test_300K.extxyz.xz")[:2]
    settings = CrystalSettings(structure=folder / "bas.extxyz", cutoffs={2: 5.0, 3: 3.5, 4: 2.2})
    basis = cached_basis(ideal, settings.cutoffs, tmp_path / "basis.npz")
    fitted = fit_crystal(basis, training, validation, settings, UncertaintySettings())
    posterior = fitted.posterior
    assert posterior.iterations == 9
    assert posterior.core is None
    assert fitted.constraint is None
    assert posterior.log_evidence == pytest.approx(1724.609277805591, rel=1e-9)
    assert posterior.alpha[4] == pytest.approx(1.8511996140526141e-06, rel=1e-7)
    assert np.linalg.norm(posterior.mean) == pytest.approx(1296.3112909662946, rel=1e-9)
    record = export_crystal(
        basis,
        posterior,
        tmp_path / "model.pt",
        energy_scale=fitted.energy_scale,
        force_scale=fitted.force_scale,
        energy=fitted.energy,
    )
    assert record["format"] == 1
    assert record["lattice"]["max_displacement"] == pytest.approx(0.8197796472223496, rel=1e-12)
    assert "pairs" not in record
    found = Model(tmp_path / "model.pt").predict(validation[:1])[0]
    assert found.energy == pytest.approx(-8021.804019450326, rel=1e-12)
    assert np.linalg.norm(found.forces) == pytest.approx(10.508975087411597, rel=1e-9)
    assert found.u == pytest.approx(0.0004547358321713769, rel=1e-7)
    assert found.atomic_u.max() == pytest.approx(0.10495459405447148, rel=1e-7)


def test_the_guard_is_wider_with_pair_functions(crystal, tmp_path):
    """0.55 of the shortest distance of sites instead of 0.4."""
    shortest = crystal.basis.lattice.shortest_distance
    record = export_crystal(crystal.basis, crystal.posterior, tmp_path / "model.pt")
    assert record["lattice"]["max_displacement"] == pytest.approx(0.55 * shortest)
    assert record["cutoff"] == pytest.approx(CUTOFF + 1.1 * shortest)
    assert record["cutoffs"] == {"2": 3.6, "3": 3.0, "0": CUTOFF}
