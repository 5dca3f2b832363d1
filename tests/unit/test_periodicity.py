"""Slabs and wires: where stresses act, boxes for LAMMPS, start structures, fixed atoms."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from ubmd.data.constraints import is_fixed
from ubmd.data.extxyz import write_structures
from ubmd.data.geometry import count_parts, neighbours
from ubmd.data.graph import build_graph, collate
from ubmd.data.periodicity import describe_periodicity, perpendicular_cell, projector, stress_components, stress_within
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, SettingsError
from ubmd.lammps.box import Box, deformation
from ubmd.learning.start import check_start, perturb
from ubmd.measure.errors import parity_data
from ubmd.potentials.gmnn.gradient import _by_autograd, loss_and_gradients
from ubmd.potentials.gmnn.loss import ErrorSums, differences
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.interface import Prediction
from ubmd.references import label
from ubmd.settings import ModelSettings, ReferenceSettings, RunSettings, StartSettings, TrainingSettings

PERIODICITIES = [pbc for pbc in product((True, False), repeat=3) if any(pbc)]
PARTLY = [pbc for pbc in PERIODICITIES if not all(pbc)]
CELL = np.array([[5.1, 0.3, 0.2], [1.1, 5.6, -0.4], [-0.8, 0.9, 6.3]])
EMT = ReferenceSettings(calculator="ase.calculators.emt:EMT")


def cluster(pbc: tuple[bool, ...], cell: np.ndarray = CELL) -> Atoms:
    """Eight atoms that reach over the boundaries of a skewed cell."""
    places = np.random.default_rng(3).uniform(-0.2, 1.1, (8, 3))
    grid = np.array(list(product((0.0, 0.5), repeat=3))) + 0.05 * places
    return Atoms("Cu4Au4", positions=grid @ CELL, cell=cell, pbc=pbc)


def ids(pbc: tuple[bool, ...]) -> str:
    return "".join("FT"[p] for p in pbc)


def network(**settings: object) -> GaussianMomentNetwork:
    model = GaussianMomentNetwork(["Cu", "Au"], ModelSettings(hidden=(8, 8), cutoff=3.5, **settings), seed=1)
    return model.to_network_dtype(__import__("torch").float64)


@pytest.mark.parametrize("pbc", PERIODICITIES, ids=ids)
def test_a_projector_keeps_the_periodic_vectors_and_nothing_else(pbc: tuple[bool, ...]) -> None:
    atoms = cluster(pbc)
    projection = projector(atoms)
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-12)
    np.testing.assert_allclose(atoms.cell[:][list(pbc)] @ projection, atoms.cell[:][list(pbc)], atol=1e-12)
    assert np.trace(projection) == pytest.approx(sum(pbc))


def test_components_of_an_upright_slab_are_those_in_plane() -> None:
    slab = Atoms("Cu", cell=[4.0, 5.0, 20.0], pbc=(True, True, False))
    stress = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # xx yy zz yz xz xy
    np.testing.assert_array_equal(stress_within(stress, slab), [1.0, 2.0, 0.0, 0.0, 0.0, 6.0])
    np.testing.assert_allclose(stress_components(stress, slab), [1.0, 2.0, 6.0])
    wire = Atoms("Cu", cell=[20.0, 20.0, 4.0], pbc=(False, False, True))
    np.testing.assert_allclose(stress_components(stress, wire), [3.0])
    assert describe_periodicity(slab) == "periodic along cell vectors 1 and 2"


@pytest.mark.parametrize("pbc", PARTLY, ids=ids)
def test_components_do_not_depend_on_the_orientation(pbc: tuple[bool, ...]) -> None:
    atoms = cluster(pbc)
    turned = atoms.copy()
    turned.rotate(50.0, (1.0, 2.0, 3.0), rotate_cell=True)
    rotation = np.linalg.solve(atoms.cell[:], turned.cell[:])
    stress = np.diag([1.0, 2.0, 3.0]) + 0.3
    rows, columns = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)
    after = (rotation.T @ stress @ rotation)[rows, columns]
    np.testing.assert_allclose(stress_components(after, turned), stress_components(stress[rows, columns], atoms))


@pytest.mark.parametrize("pbc", PERIODICITIES, ids=ids)
def test_stress_is_the_derivative_by_strain_along_the_periodic_directions(pbc: tuple[bool, ...]) -> None:
    model, atoms, h = network(), cluster(pbc), 1e-5

    def energy(strain: np.ndarray) -> float:
        copy = atoms.copy()
        stretch = np.eye(3) + strain
        copy.set_cell(np.where(atoms.pbc[:, None], atoms.cell[:] @ stretch, atoms.cell[:]))
        copy.positions = atoms.positions @ stretch
        return model.energy_forces_virial(collate([build_graph(copy, model.elements, model.cutoff)]))[0].item()

    batch = collate([build_graph(atoms, model.elements, model.cutoff)])
    virial = model.energy_forces_virial(batch)[2].detach()
    rows, columns = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)
    stress = batch.stress_within(virial[:, rows, columns])[0].numpy() / atoms.get_volume()
    within = projector(atoms)
    expected = np.zeros(6)
    for k, (a, b) in enumerate(zip(rows, columns, strict=True)):
        strain = np.zeros((3, 3))
        strain[a, b] += 0.5 * h
        strain[b, a] += 0.5 * h
        strain = within @ strain @ within
        expected[k] = (energy(strain) - energy(-strain)) / (2 * h) / atoms.get_volume()
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(stress, expected, atol=1e-4 * np.abs(expected).max())


def with_stress(pbc: tuple[bool, ...], along_free: float) -> Atoms:
    """Random labels; the stress has a component along the free directions as well."""
    atoms, rng = cluster(pbc), np.random.default_rng(5)
    labels = {"energy": rng.normal(), "forces": rng.normal(size=(8, 3)), "stress": 0.01 * rng.normal(size=6)}
    free = np.eye(3) - projector(atoms)
    labels["stress"] = labels["stress"] + along_free * free[(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


@pytest.mark.parametrize("pbc", [(True, True, False), (False, True, False)], ids=ids)
def test_training_uses_no_stress_along_free_directions(pbc: tuple[bool, ...]) -> None:
    """Loss and gradients do not see it; both ways to compute them agree; a crystal beside it keeps all components."""
    results = []
    for along_free, way in ((0.0, loss_and_gradients), (7.0, loss_and_gradients), (7.0, _by_autograd)):
        model = network()
        structures = [with_stress(pbc, along_free), with_stress((True, True, True), 0.0)]
        batch = collate([build_graph(atoms, model.elements, model.cutoff) for atoms in structures])
        errors, loss = way(model, batch, TrainingSettings(stress_weight=10.0))
        sums = ErrorSums()
        sums.add(batch, errors)
        assert sums.counts["stress"] == 6 + {2: 3, 1: 1}[sum(pbc)]
        gradients = np.concatenate([parameter.grad.numpy().ravel() for parameter in model.parameters()])
        results.append((loss, gradients, errors.virial.detach().numpy()))
    for loss, gradients, virial in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-10)
        np.testing.assert_allclose(gradients, results[0][1], rtol=1e-6, atol=1e-8 * np.abs(gradients).max())
        assert np.abs(virial).max() > 0.1


def test_forces_of_fixed_atoms_can_be_left_out_of_the_loss() -> None:
    model, atoms = network(), with_stress((True, True, False), 0.0)
    free = differences(*evaluated(model, atoms)).forces
    atoms.set_array("fixed", np.arange(8) < 3)
    batch, *rest = evaluated(model, atoms)
    errors = differences(batch, *rest)
    assert not errors.forces[:3].any()
    np.testing.assert_array_equal(errors.forces[3:].detach(), free[3:].detach())
    sums = ErrorSums()
    sums.add(batch, errors)
    assert sums.counts["force"] == 3 * 5


def evaluated(model: GaussianMomentNetwork, atoms: Atoms) -> tuple:
    batch = collate([build_graph(atoms, model.elements, model.cutoff)])
    return batch, *model.energy_forces_virial(batch)


def test_errors_of_stresses_are_those_of_their_components() -> None:
    atoms = with_stress((True, True, False), 7.0)
    prediction = Prediction(0.0, np.zeros((8, 3)), np.zeros(6), 0.1, np.ones(8), np.zeros(4))
    parity = parity_data([atoms], [prediction])
    assert len(parity.stress) == len(parity.stress_label) == 3
    assert np.abs(parity.stress_label).max() < 0.1 * 160_000


# ---- boxes


@pytest.mark.parametrize("turned", [False, True], ids=["as built", "turned"])
@pytest.mark.parametrize("pbc", PERIODICITIES, ids=ids)
def test_a_box_has_the_pairs_of_the_structure(pbc: tuple[bool, ...], turned: bool) -> None:
    atoms = cluster(pbc)
    if turned:
        atoms.rotate(130.0, (1.0, -2.0, 0.5), rotate_cell=True)
        atoms.set_cell(np.where(atoms.pbc[:, None], atoms.cell[:], 0.0))  # free vectors of no length
    box = Box(atoms)
    inside = Atoms(atoms.numbers, box.positions, cell=box.cell(np.array(atoms.cell[:]) @ box.rotation), pbc=pbc)
    before, after = (np.sort(np.linalg.norm(neighbours(a, 4.0)[2], axis=1)) for a in (atoms, inside))
    np.testing.assert_allclose(after, before, atol=1e-10)
    np.testing.assert_allclose(box.rotation @ box.rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(box.rotation) == pytest.approx(1.0)


def test_free_vectors_are_replaced_by_perpendicular_ones() -> None:
    for pbc in PARTLY:
        cell = perpendicular_cell(CELL, pbc)
        kept = np.array(pbc)
        np.testing.assert_array_equal(cell[kept], CELL[kept])
        products = cell @ cell.T
        assert np.abs(products[~kept][:, kept]).max() < 1e-12
        assert np.linalg.det(cell) > 0.0


def test_barostat_words() -> None:
    """Only periodic directions; a pressure is that of the structure's own volume."""
    crystal = Box(cluster((True, True, True)))
    assert crystal.barostat("iso", 10.0, 1.0) == "iso 10 10 1"
    slab = Box(Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 3.0]], cell=[4.0, 5.0, 46.0], pbc=(True, True, False)))
    words = slab.barostat("iso", 10.0, 1.0).split()
    assert [word for word in words if word.isalpha()] == ["x", "y", "couple", "xy"]
    np.testing.assert_allclose([float(word) for word in words if not word.isalpha()], [20, 20, 1] * 2)  # 46 Å to 23 Å
    assert slab.barostat("tri", 0.0, 0.5) == "x 0 0 0.5 y 0 0 0.5 xy 0.0 0.0 0.5"
    wire = Box(Atoms("Cu2", positions=[[0, 0, 0], [0, 2.0, 0]], cell=[0.0, 4.0, 0.0], pbc=(False, True, False)))
    assert wire.barostat("aniso", 0.0, 1.0) == "y 0 0 1"
    with pytest.raises(ValueError, match="needs a cell with a volume"):
        wire.barostat("aniso", 1.0, 1.0)


def test_deformation_of_a_slab_leaves_its_free_direction_out() -> None:
    slab = cluster((True, True, False))
    stretched = np.where(slab.pbc[:, None], 1.1 * slab.cell[:], 3.0 * slab.cell[:])
    assert np.linalg.det(deformation(stretched, slab)) == pytest.approx(1.21)


# ---- start structures


def slab_with_fixed_layers() -> Atoms:
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
    add_adsorbate(slab, "Au", 2.0, "fcc")
    slab.pbc = (True, True, False)
    return slab


def settings(**tables: dict) -> RunSettings:
    start = {"file": "slab.extxyz", "count": 3} | tables.pop("start", {})
    return RunSettings.model_validate(
        {
            "run_dir": "run",
            "start": start,
            "reference": {"calculator": "ase.calculators.emt:EMT"},
            "loop": {"labels": 9},
            **tables,
        }
    )


def test_perturbed_copies_keep_fixed_atoms_in_place_and_say_which(tmp_path) -> None:
    slab = slab_with_fixed_layers()
    rng = np.random.default_rng(0)
    copies = perturb([slab], StartSettings(file="x", count=3, displacement=0.2), rng)
    fixed = is_fixed(slab)
    assert fixed.sum() == 8
    for copy in copies:
        moved = np.abs(copy.positions - slab.positions).max(axis=1)
        assert (moved[fixed] == 0.0).all()
        assert (moved[~fixed] > 0.0).all()
        assert not copy.constraints
    labelled = label(copies[0], EMT, tmp_path)
    write_structures(tmp_path / "labels.extxyz", [labelled])
    (again,) = read_structures(tmp_path / "labels.extxyz")
    np.testing.assert_array_equal(is_fixed(again), fixed)
    assert np.abs(again.get_forces()[fixed]).max() > 0.1  # the reference's own, no constraint hides them


def test_strain_of_a_slab_is_in_its_plane() -> None:
    slab = cluster((True, True, False))
    copies = perturb([slab], StartSettings(file="x", count=4, displacement=0.0, strain=0.1), np.random.default_rng(0))
    normal = perpendicular_cell(slab.cell, slab.pbc)[2]
    for copy in copies:
        np.testing.assert_array_equal(copy.cell[2], slab.cell[2])
        assert np.abs(copy.cell[:2] - slab.cell[:2]).max() > 0.01
        np.testing.assert_allclose(copy.positions @ normal, slab.positions @ normal, atol=1e-12)
        np.testing.assert_allclose(copy.cell[:2] @ normal, 0.0, atol=1e-12)


def test_start_structures_of_every_periodicity() -> None:
    for pbc in PERIODICITIES:
        check_start([cluster(pbc)], settings())
        check_start([cluster(pbc)], settings(md={"ensemble": "npt", "pressure": 100.0}))
    with pytest.raises(SettingsError, match="needs start structures that are periodic in some direction"):
        check_start([cluster((False, False, False))], settings(md={"ensemble": "npt"}))
    flat = cluster((True, True, False), np.where(np.array([[1], [1], [0]]), CELL, 0.0))
    check_start([flat], settings(md={"ensemble": "npt"}))
    with pytest.raises(SettingsError, match="refers to the volume of the cell"):
        check_start([flat], settings(md={"ensemble": "npt", "pressure": 1.0}))


def test_fixed_atoms_go_with_neither_a_barostat_nor_a_strain() -> None:
    slab = slab_with_fixed_layers()
    check_start([slab], settings())
    with pytest.raises(SettingsError, match="does not go with fixed atoms"):
        check_start([slab], settings(md={"ensemble": "npt"}))
    with pytest.raises(SettingsError, match="which a strain would move"):
        check_start([slab], settings(start={"strain": 0.02}))
    slab.set_constraint(FixAtoms(range(len(slab))))
    with pytest.raises(SettingsError, match="all atoms are fixed"):
        check_start([slab], settings())


# ---- labels


def test_stress_of_slabs_in_files_and_from_references(tmp_path) -> None:
    """In plane, as volume times stress it does not depend on the empty space; molecules have none."""
    shares = []
    for height in (16.0, 32.0):
        slab = slab_with_fixed_layers()
        slab.set_constraint()
        slab.cell[2, 2] = height
        labelled = label(slab, EMT, tmp_path)
        stress = labelled.calc.results["stress"]
        assert np.abs(stress[:2]).max() > 1e-4
        assert not stress[2:5].any()
        shares.append(stress * slab.get_volume())
        write_structures(tmp_path / "slab.extxyz", [labelled])
        np.testing.assert_allclose(read_structures(tmp_path / "slab.extxyz")[0].calc.results["stress"], stress)
    np.testing.assert_allclose(*shares, atol=1e-10)
    molecule = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.4]], cell=[9.0, 9.0, 9.0])
    assert "stress" not in label(molecule, EMT, tmp_path).calc.results
    (tmp_path / "bad.extxyz").write_text(
        '1\nLattice="9 0 0 0 9 0 0 0 9" Properties=species:S:1:pos:R:3:forces:R:3 energy=1.0 '
        'stress="1 0 0 0 1 0 0 0 1" pbc="F F F"\nCu 0 0 0 0 0 0\n'
    )
    with pytest.raises(DataError, match="periodic in some direction"):
        read_structures(tmp_path / "bad.extxyz")


def test_parts_of_a_structure() -> None:
    slab = slab_with_fixed_layers()
    assert count_parts(slab, 4.0) == 1
    slab.positions[-1, 2] += 5.0
    assert count_parts(slab, 4.0) == 2
    slab.pbc = True
    slab.cell[2, 2] = 12.0  # now it meets the next copy of the slab
    assert count_parts(slab, 4.0) == 1
