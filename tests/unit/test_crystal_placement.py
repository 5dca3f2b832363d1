"""Boxes that hold a crystal turned, mirrored, shifted or drifting, against displacements that are known."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.lammps import Prism
from ase.geometry import find_mic
from scipy.spatial.transform import Rotation

from ubmd.errors import DataError
from ubmd.potentials.force_constants.lattice import Lattice, Placement

SILICON = bulk("Si", "diamond", 5.431)
ZINC_BLENDE = bulk("BAs", "zincblende", 4.777)
SNSE = Atoms(
    "Sn4Se4",
    scaled_positions=[
        *([0.118, 0.25, 0.103], [0.618, 0.25, 0.397], [0.382, 0.75, 0.603], [0.882, 0.75, 0.897]),
        *([0.855, 0.25, 0.482], [0.355, 0.25, 0.018], [0.645, 0.75, 0.982], [0.145, 0.75, 0.518]),
    ],
    cell=[11.5, 4.15, 4.44],
    pbc=True,
)
CRYSTALS = {"Si": SILICON, "BAs": ZINC_BLENDE, "SnSe": SNSE}
BOXES = {"diagonal": np.diag([2, 2, 3]), "skewed": np.array([[2, 1, 0], [0, 2, -1], [1, 0, 2]])}


def displaced(crystal: Atoms, matrix: np.ndarray, seed: int = 0, size: float = 0.1) -> tuple[Atoms, np.ndarray]:
    """A supercell, and its displacements [n, 3] with the mean zero."""
    box = make_supercell(crystal, matrix)
    rng = np.random.default_rng(seed)
    box = box[rng.permutation(len(box))]
    displacements = size * rng.standard_normal((len(box), 3))
    displacements -= displacements.mean(0)
    box.positions += displacements
    return box, displacements


def turned(atoms: Atoms, rotation: np.ndarray, shift: np.ndarray) -> Atoms:
    return Atoms(atoms.numbers, atoms.positions @ rotation.T + shift, cell=atoms.cell.array @ rotation.T, pbc=True)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("name", CRYSTALS)
def test_turned_and_shifted_boxes(name, box):
    """Up to an operation of the space group the displacements are those put in: lengths and sites agree."""
    crystal = CRYSTALS[name]
    lattice = Lattice.from_atoms(crystal)
    atoms, expected = displaced(crystal, BOXES[box])
    for k in range(3):
        rotation = Rotation.random(random_state=k).as_matrix() * (-1.0 if k == 2 else 1.0)
        moved = turned(atoms, rotation, np.array([0.7, -3.1, 12.3]))
        placement = Placement.fit(lattice, moved)
        assert placement.fits(moved)
        assert not placement.fits(atoms)
        found = placement.displacements(moved)
        np.testing.assert_allclose(placement.turn(found), expected @ rotation.T, atol=1e-10)
        # the sites are those of the crystal: the distances of ideal positions are, too
        ideal, true = placement.supercell.ideal, turned(atoms, rotation, np.zeros(3)).positions - expected @ rotation.T
        mine, _ = find_mic(placement.turn(ideal - ideal[0]), moved.cell, True)
        theirs, _ = find_mic(true - true[0], moved.cell, True)
        np.testing.assert_allclose(np.linalg.norm(mine, axis=1), np.linalg.norm(theirs, axis=1), atol=1e-6)


@pytest.mark.parametrize("name", CRYSTALS)
def test_boxes_of_lammps(name):
    """LAMMPS turns a skewed box and wraps its atoms."""
    lattice = Lattice.from_atoms(CRYSTALS[name])
    atoms, expected = displaced(CRYSTALS[name], BOXES["skewed"])
    prism = Prism(atoms.cell.array, pbc=True)
    box = Atoms(atoms.numbers, prism.vector_to_lammps(atoms.positions, wrap=True), cell=prism.lammps_cell, pbc=True)
    placement = Placement.fit(lattice, box)
    found = placement.turn(placement.displacements(box))
    np.testing.assert_allclose(prism.vector_to_ase(found), expected, atol=1e-10)


def test_a_box_that_is_not_turned_stays_so():
    atoms, expected = displaced(ZINC_BLENDE, BOXES["skewed"])
    placement = Placement.fit(Lattice.from_atoms(ZINC_BLENDE), atoms)
    np.testing.assert_array_equal(placement.rotation, np.eye(3))
    np.testing.assert_allclose(placement.displacements(atoms), expected, atol=1e-12)


def test_drift_and_wrapping_change_nothing():
    atoms, expected = displaced(SILICON, BOXES["diagonal"])
    placement = Placement.fit(Lattice.from_atoms(SILICON), atoms)
    rng = np.random.default_rng(1)
    for shift in ([0.1, 0.2, 0.3], [17.0, -40.0, 3.0]):
        moved = atoms.copy()
        moved.positions += np.array(shift) + rng.integers(-2, 3, (len(atoms), 3)) @ atoms.cell.array
        np.testing.assert_allclose(placement.displacements(moved), expected, atol=1e-10)
        again = Placement.fit(placement.supercell.lattice, moved)
        np.testing.assert_allclose(again.displacements(moved), expected, atol=1e-10)


def test_hot_crystals_find_their_sites():
    """Displacements of 0.25 Å rms in each direction, where a first guess of the origin may be wrong."""
    lattice = Lattice.from_atoms(SILICON)
    for seed in range(5):
        atoms, expected = displaced(SILICON, BOXES["diagonal"], seed, size=0.19)
        moved = turned(atoms, Rotation.random(random_state=seed).as_matrix(), np.array([1.0, 0.4, -0.2]))
        found = Placement.fit(lattice, moved).displacements(moved)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), atol=1e-10)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.set_cell(a.cell.array * 1.01, scale_atoms=True), "not an integer multiple of the primitive cell"),
        (lambda a: a.set_pbc([True, True, False]), "must be periodic in three directions"),
        (lambda a: a.__delitem__(0), "has 23 atoms but the ideal crystal has 24 sites"),
        (lambda a: a.positions.__setitem__((1, 1), np.nan), "not finite numbers"),
        (lambda a: a.numbers.__setitem__(0, 6), "holds a species that the ideal crystal lacks"),
    ],
)
def test_other_boxes_are_refused(change, sentence):
    atoms, _ = displaced(SILICON, BOXES["diagonal"])
    change(atoms)
    with pytest.raises(DataError, match=sentence):
        Placement.fit(Lattice.from_atoms(SILICON), atoms)


@pytest.mark.parametrize(("name", "distance"), [("Si", 5.431 * 3**0.5 / 4), ("BAs", 4.777 * 3**0.5 / 4)])
def test_shortest_distance(name, distance):
    assert Lattice.from_atoms(CRYSTALS[name]).shortest_distance == pytest.approx(distance, rel=1e-12)
