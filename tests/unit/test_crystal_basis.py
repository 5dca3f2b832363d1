"""Cluster basis of force-constant potentials: counts, sum rules, symmetry, forces, boxes, other programs' bases."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from known_crystals import boron_arsenide, displaced, silicon, tin_selenide

from ubmd.errors import DataError, ModelError, SettingsError
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.clusters import decode, encode
from ubmd.potentials.force_constants.regression import NormalEquations, fit

pytest.importorskip("spglib")


def triclinic() -> Atoms:
    """Three atoms of two species without any symmetry but the identity."""
    cell = [[3.1, 0.0, 0.0], [0.7, 3.4, 0.0], [-0.5, 0.9, 3.7]]
    places = [[0.02, 0.1, 0.0], [0.52, 0.43, 0.61], [0.31, 0.77, 0.25]]
    return Atoms("NaClNa", scaled_positions=places, cell=cell, pbc=True)


COUNTS = [
    pytest.param(silicon, (5.4, 4.0, 4.0), (10, 27, 90), id="Si 127"),
    pytest.param(silicon, (7.5, 5.0, 5.0), (27, 82, 581), id="Si 690"),
    pytest.param(boron_arsenide, (5.5, 4.5, 4.5, 3.5), (24, 155, 1131, 495), id="c-BAs 1805"),
    pytest.param(
        boron_arsenide, (8.35, 3.5, 3.5, 3.5, 3.5), (79, 51, 176, 495, 1363), id="c-BAs 2164", marks=pytest.mark.slow
    ),
    pytest.param(tin_selenide, (5.7, 3.53, 3.53, 3.53, 3.53), (117, 32, 48, 66, 88), id="SnSe 351"),
]


def rock_salt() -> Atoms:
    """Every site is a centre of inversion: symmetry forbids the third order of single sites."""
    return bulk("NaCl", "rocksalt", 5.6)


# name: crystal, cutoffs, supercell matrix with negative and off-diagonal elements
CASES = {
    "silicon": (silicon, {2: 5.4, 3: 4.0, 4: 4.0}, [[-2, 2, 2], [2, -2, 2], [2, 2, -2]]),
    "tin selenide": (tin_selenide, {2: 4.2, 3: 3.53, 4: 3.0, 5: 2.9, 6: 2.9}, [[1, 0, 0], [0, 2, 1], [0, -1, 2]]),
    "rock salt": (rock_salt, {2: 4.0, 3: 4.0, 4: 2.9}, [[3, 0, 0], [0, 2, 0], [0, 1, 2]]),
    "triclinic": (triclinic, {2: 3.5, 3: 2.9, 4: 2.6}, [[2, 1, 0], [0, 2, 0], [1, 0, -3]]),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    crystal, cutoffs, matrix = CASES[request.param]
    basis = ClusterBasis.build(crystal(), cutoffs)
    atoms = make_supercell(crystal(), matrix)
    return basis, atoms, basis.supercell(atoms)


@pytest.mark.parametrize(("crystal", "cutoffs", "counts"), COUNTS)
def test_counts(crystal, cutoffs, counts):
    basis = ClusterBasis.build(crystal(), dict(enumerate(cutoffs, start=2)))
    assert [int((basis.parameter_orders == order).sum()) for order in basis.orders] == list(counts)
    assert basis.n_parameters == sum(counts)
    for part in basis.parts:
        np.testing.assert_allclose(part.parameters.T @ part.parameters, np.eye(part.parameters.shape[1]), atol=1e-10)


def test_any_cell_of_the_crystal_gives_the_same_count():
    cutoffs = {2: 4.0, 3: 2.5}
    cubic = bulk("Si", "diamond", 5.43, cubic=True).repeat((2, 1, 1))
    skewed = make_supercell(silicon(), [[1, 0, 0], [7, 1, 0], [-3, 4, 1]])
    skewed.rotate(33.0, (1, 2, 3), rotate_cell=True)
    counts = [ClusterBasis.build(a, cutoffs).parameter_orders.tolist() for a in (silicon(), cubic, skewed)]
    assert counts[0] == counts[1] == counts[2]


def test_keys_of_sites_round_trip_and_are_linear():
    sites = np.array([[0, 0, 0, 3], [-5, 7, -1, 0], [4, -1000, 1000, 65535]])
    np.testing.assert_array_equal(decode(encode(sites)), sites)
    shift = np.array([2, -3, 5, 0])
    np.testing.assert_array_equal(encode(sites + shift) - encode(sites), encode(shift))


def test_forces_are_minus_the_derivatives_of_the_energy_features(case):
    basis, atoms, box = case
    u, step = displaced(len(atoms)), 1e-3
    matrix = basis.force_matrix(u, box).reshape(len(atoms), 3, -1)
    for atom, axis in ((0, 0), (len(atoms) // 2, 1), (len(atoms) - 1, 2)):
        shift = np.zeros_like(u)
        shift[atom, axis] = step
        f = [basis.energy_features(u + k * shift, box) for k in (-2, -1, 1, 2)]
        numeric = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)
        np.testing.assert_allclose(-matrix[atom, axis], numeric, atol=1e-9 * np.abs(matrix).max())


def test_forces_are_the_matrix_times_the_parameters(case):
    basis, atoms, box = case
    u = displaced(len(atoms))
    parameters = np.random.default_rng(5).normal(size=(basis.n_parameters, 2))
    expected = (basis.force_matrix(u, box) @ parameters).T.reshape(2, len(atoms), 3)
    tolerance = 1e-12 * np.abs(expected).max()
    np.testing.assert_allclose(basis.forces(parameters, u, box), expected, atol=tolerance)
    np.testing.assert_allclose(basis.forces(parameters[:, 1], u, box), expected[1], atol=tolerance)


def test_force_constants_give_the_same_forces():
    basis = ClusterBasis.build(boron_arsenide(), {2: 5.5, 3: 3.5})
    atoms = boron_arsenide().repeat((2, 2, 3))  # shorter than two cutoffs: images add up
    box, u = basis.supercell(atoms), displaced(24)
    parameters = np.random.default_rng(6).normal(size=basis.n_parameters)
    second, third = (basis.force_constants(parameters, order, box) for order in (2, 3))
    forces = -np.einsum("ijab,jb->ia", second, u) - 0.5 * np.einsum("ijkabc,jb,kc->ia", third, u, u)
    expected = basis.forces(parameters, u, box)
    np.testing.assert_allclose(forces, expected, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_allclose(third, third.transpose(1, 0, 2, 4, 3, 5), atol=1e-12)
    with pytest.raises(SettingsError, match="no order 4"):
        basis.force_constants(parameters, 4, box)


def test_each_order_is_homogeneous(case):
    basis, atoms, box = case
    u = displaced(len(atoms))
    expected = basis.energy_features(u, box) * 2.0**basis.parameter_orders
    np.testing.assert_allclose(basis.energy_features(2 * u, box), expected, atol=1e-12 * np.abs(expected).max())


def test_translation_sum_rules(case):
    basis, atoms, box = case
    u = displaced(len(atoms))
    features, matrix = basis.energy_features(u, box), basis.force_matrix(u, box)
    moved = basis.energy_features(u + np.array([0.3, -0.2, 0.1]), box)
    np.testing.assert_allclose(moved, features, atol=1e-11 * np.abs(features).max())
    total = matrix.reshape(len(atoms), 3, -1).sum(axis=0)
    np.testing.assert_allclose(total, 0.0, atol=1e-11 * np.abs(matrix).max())


def test_space_group_and_permutations_keep_energies():
    basis = ClusterBasis.build(silicon(), {2: 5.4, 3: 4.0, 4: 3.0})
    atoms = silicon().repeat(3)
    box = basis.supercell(atoms)
    u = displaced(len(atoms))
    features = basis.energy_features(u, box)
    sites = np.concatenate([box.offset, box.sublattice[:, None]], axis=1)
    for g in range(0, 48, 5):
        image = basis.lattice.images(np.full(len(sites), g), sites)
        turned = np.empty_like(u)
        turned[box.index(image[:, 3], image[:, :3])] = u @ basis.lattice.cartesian_rotations[g].T
        np.testing.assert_allclose(basis.energy_features(turned, box), features, atol=1e-12 * np.abs(features).max())
    order = np.random.default_rng(1).permutation(len(atoms))
    shuffled = basis.energy_features(u[order], basis.supercell(atoms[order]))
    np.testing.assert_allclose(shuffled, features, atol=1e-12 * np.abs(features).max())
    # a turned crystal that is no image of itself has other energies: the test above can fail
    assert np.abs(basis.energy_features(np.roll(u, 1, axis=1) * [1, 1, -1], box) - features).max() > 1e-3


def test_repeated_displacements_in_a_larger_box(case):
    basis, atoms, box = case
    u = displaced(len(atoms))
    large = atoms.repeat((2, 1, 2))
    big = basis.supercell(large)
    repeated = np.tile(u, (4, 1))
    features = basis.energy_features(u, box)
    np.testing.assert_allclose(basis.energy_features(repeated, big), 4 * features, atol=1e-11 * np.abs(features).max())
    matrix = basis.force_matrix(u, box)
    np.testing.assert_allclose(
        basis.force_matrix(repeated, big)[: len(matrix)], matrix, atol=1e-11 * np.abs(matrix).max()
    )


def test_atoms_are_assigned_to_sites_through_the_boundary(case):
    basis, atoms, box = case
    u = displaced(len(atoms), size=0.1)
    moved = atoms.copy()
    moved.positions += u
    moved.wrap()
    np.testing.assert_allclose(box.displacements(moved), u, atol=1e-10)
    expected = basis.energy_features(u, box)
    np.testing.assert_allclose(basis.energy_features(moved), expected, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_allclose(basis.force_matrix(moved), basis.force_matrix(u, box), atol=1e-9)


def test_many_structures_at_once(case):
    basis, atoms, box = case
    many = np.stack([displaced(len(atoms), seed) for seed in range(2)])
    np.testing.assert_array_equal(basis.energy_features(many, box)[1], basis.energy_features(many[1], box))
    np.testing.assert_array_equal(basis.force_matrix(many, box)[3 * len(atoms) :], basis.force_matrix(many[1], box))


@pytest.mark.parametrize("name", ["silicon", "triclinic"])
def test_decay_keeps_the_space_and_scales_the_prior(name, tmp_path):
    """Independent parameters of equal variance: force constants over exp(-d/decay) have the basis' old metric."""
    crystal, cutoffs, matrix = CASES[name]
    plain, decaying = (ClusterBasis.build(crystal(), cutoffs, decay) for decay in (None, 0.8))
    atoms = make_supercell(crystal(), matrix)
    u = displaced(len(atoms), 3)
    decaying.save(tmp_path / "basis.npz")
    assert ClusterBasis.load(tmp_path / "basis.npz").decay == pickle.loads(pickle.dumps(decaying)).decay == 0.8
    a, b = (basis.force_matrix(u, basis.supercell(atoms)) for basis in (plain, decaying))
    assert a.shape == b.shape
    for old, new in zip(plain.parts, decaying.parts, strict=True):
        mixing = np.linalg.lstsq(old.parameters, new.parameters, rcond=None)[0]
        np.testing.assert_allclose(old.parameters @ mixing, new.parameters, atol=1e-12)
        chosen = plain.parameter_orders == old.order
        np.testing.assert_allclose(b[:, chosen], a[:, chosen] @ mixing, atol=1e-10 * np.abs(b).max())
        diameters = []
        for orbit in new.orbits:
            places = orbit.sites[:, :3] @ decaying.lattice.cell + decaying.lattice.positions[orbit.sites[:, 3]]
            diameters.append(max(np.linalg.norm(p - q) for p in places for q in places))
        shortest = min(d for d in diameters if d > 0.0)
        scale = np.repeat(np.exp(-np.maximum(np.array(diameters) - shortest, 0.0) / 0.8), [r.shape[1] for r in new.raw])
        weighted = new.parameters / scale[:, None]
        np.testing.assert_allclose(weighted.T @ weighted, np.eye(weighted.shape[1]), atol=1e-10)
        assert scale.min() < 0.5 < 1.0 == scale.max()


def test_decay_tells_pairs_from_their_images():
    """A box of eight atoms folds pairs up to 7.5 Å. The prior decides what a box of 64 atoms gets."""
    teacher = ClusterBasis.build(silicon(), {2: 4.0})
    rng = np.random.default_rng(0)
    truth = rng.normal(size=teacher.n_parameters)
    small, large = bulk("Si", "diamond", 5.43, cubic=True), bulk("Si", "diamond", 5.43, cubic=True).repeat(2)
    errors = {}
    for decay in (None, 0.7):
        basis = ClusterBasis.build(silicon(), {2: 7.5}, decay)
        equations = NormalEquations(basis.parameter_orders)
        for seed in range(4):
            u = displaced(8, seed, 0.03)
            equations.add(
                basis.force_matrix(u, basis.supercell(small)), teacher.forces(truth, u, teacher.supercell(small))
            )
        posterior = fit(equations)
        for box in (small, large):
            u = displaced(len(box), 9, 0.03)
            expected = teacher.forces(truth, u, teacher.supercell(box))
            found = basis.forces(posterior.mean, u, basis.supercell(box))
            errors[decay, len(box)] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert max(errors[None, 8], errors[0.7, 8]) < 1e-4
    assert errors[None, 64] > 0.2
    assert errors[0.7, 64] < 0.6 * errors[None, 64]


def test_save_and_load(case, tmp_path: Path):
    basis, atoms, box = case
    basis.save(tmp_path / "basis.npz")
    loaded = ClusterBasis.load(tmp_path / "basis.npz")
    u = displaced(len(atoms))
    assert loaded.cutoffs == basis.cutoffs
    copied = pickle.loads(pickle.dumps(basis))  # worker processes get the basis this way
    np.testing.assert_array_equal(copied.energy_features(u, copied.supercell(atoms)), basis.energy_features(u, box))
    np.testing.assert_array_equal(loaded.parameter_orders, basis.parameter_orders)
    np.testing.assert_array_equal(loaded.force_matrix(u, loaded.supercell(atoms)), basis.force_matrix(u, box))


def test_errors_say_what_to_do(tmp_path: Path):
    basis = ClusterBasis.build(silicon(), {2: 4.0})
    with pytest.raises(SettingsError, match="orders 2 to 6"):
        ClusterBasis.build(silicon(), {1: 3.0})
    with pytest.raises(SettingsError, match="positive length"):
        ClusterBasis.build(silicon(), {2: -3.0})
    with pytest.raises(SettingsError, match="raise its cutoff"):
        ClusterBasis.build(silicon(), {2: 2.0})
    with pytest.raises(SettingsError, match="raise its cutoff"):
        ClusterBasis.build(rock_salt(), {3: 1.0})
    with pytest.raises(DataError, match="periodic"):
        ClusterBasis.build(Atoms("Si", cell=np.eye(3)), {2: 3.0})
    with pytest.raises(DataError, match="integer multiple"):
        basis.supercell(bulk("Si", "diamond", 5.6, cubic=True).repeat(2))
    with pytest.raises(DataError, match="vacancies"):
        basis.supercell(silicon().repeat(2)[1:])
    with pytest.raises(DataError, match="species"):
        basis.supercell(bulk("Ge", "diamond", 5.43))
    crowded = silicon().repeat(2)
    crowded.positions[1] = crowded.positions[0] + 0.1
    with pytest.raises(DataError, match="one lattice site"):
        basis.supercell(crowded)
    with pytest.raises(DataError, match="box"):
        basis.force_matrix(np.zeros((16, 3)))
    with pytest.raises(DataError, match="shape"):
        basis.force_matrix(np.zeros((3, 3)), basis.supercell(silicon()))
    (tmp_path / "no.npz").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not a cluster basis"):
        ClusterBasis.load(tmp_path / "no.npz")


def same_column_space(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Both sets of columns span one space: same rank, nothing left outside."""
    a, b = (np.linalg.svd(x, full_matrices=False) for x in (ours, theirs))
    ranks = [int((s > 1e-8 * s[0]).sum()) for _, s, _ in (a, b)]
    assert ranks[0] == ranks[1] == ours.shape[1]
    q = a[0][:, : ranks[0]]
    p = b[0][:, : ranks[1]]
    np.testing.assert_allclose(q @ (q.T @ p), p, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("crystal", "cutoffs", "repeat"),
    [
        (silicon, {2: 4.6, 3: 4.0, 4: 2.5}, 3),
        (boron_arsenide, {2: 3.6, 3: 3.5, 4: 2.2, 5: 2.2, 6: 2.2}, 3),
        (tin_selenide, {2: 4.2, 3: 3.0, 4: 2.9}, (1, 3, 3)),
        (triclinic, {2: 3.5, 3: 2.9}, 3),
        (rock_salt, {2: 4.0, 3: 3.0}, 3),
    ],
)
def test_same_space_as_hiphive(crystal, cutoffs, repeat):
    hiphive = pytest.importorskip("hiphive")
    atoms = crystal().repeat(repeat)
    space = hiphive.ClusterSpace(crystal(), [c for _, c in sorted(cutoffs.items())])
    basis = ClusterBasis.build(crystal(), cutoffs)
    assert basis.n_parameters == space.n_dofs
    rattled = []
    for seed in range(3):
        one = atoms.copy()
        one.new_array("displacements", displaced(len(atoms), seed))
        one.new_array("forces", np.zeros((len(atoms), 3)))
        rattled.append(one)
    container = hiphive.StructureContainer(space)
    for one in rattled:
        container.add_structure(one)
    theirs, _ = container.get_fit_data()
    box = basis.supercell(atoms)
    ours = np.concatenate([basis.force_matrix(one.arrays["displacements"], box) for one in rattled])
    same_column_space(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("order", "cutoff", "repeat"), [(2, 3.9, 4), (3, 2.5, 2), (4, 2.5, 2)])
def test_same_space_as_symfc_in_cells_longer_than_three_cutoffs(order, cutoff, repeat):
    symfc = pytest.importorskip("symfc")
    from symfc.utils.utils import SymfcAtoms

    atoms = silicon().repeat(repeat)
    n = len(atoms)
    ideal = SymfcAtoms(numbers=atoms.numbers, scaled_positions=atoms.get_scaled_positions(), cell=np.array(atoms.cell))
    program = symfc.Symfc(ideal, cutoff={order: cutoff}).compute_basis_set(orders=[order])
    found = program.basis_set[order]
    basis = ClusterBasis.build(silicon(), {order: cutoff})
    assert found.basis_set.shape[1] == basis.n_parameters
    # force constants in the order of atoms, then components: contract all but the first atom with the displacements
    constants = np.asarray(found.compression_matrix @ found.basis_set).T.reshape(-1, *[n] * order, *[3] * order)
    u = displaced(n)
    for k in range(order, 1, -1):
        constants = np.einsum(
            constants, [0, *range(1, 2 * k + 1)], u, [k, 2 * k], [0, *(i for i in range(1, 2 * k) if i != k)]
        )
    theirs = constants.reshape(len(constants), -1).T
    same_column_space(basis.force_matrix(u, basis.supercell(atoms)), theirs)
