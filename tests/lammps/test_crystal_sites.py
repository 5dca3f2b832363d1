"""The plugin's search for the sites of a crystal, called directly."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.geometry import find_mic
from crystals import boron_arsenide, tin_selenide, triclinic
from scipy.spatial.transform import Rotation

from ubmd import _cpp
from ubmd.potentials.force_constants.symmetry import symmetrised


def record(primitive, max_displacement=0.8):
    elements = list(dict.fromkeys(primitive.symbols))
    return json.dumps(
        {
            "format": 1,
            "elements": elements,
            "cutoff": 4.0,
            "lattice": {
                "cell": primitive.cell.array.tolist(),
                "scaled": primitive.get_scaled_positions(wrap=False).tolist(),
                "species": [elements.index(s) for s in primitive.symbols],
                "sites": [[[0, 0, 0, s]] for s in range(len(primitive))],
                "max_displacement": max_displacement,
            },
        }
    )


def map_atoms(primitive, atoms, max_displacement=0.8):
    """The plugin's crystal after mapping; tags are 10, 11, ..."""
    crystal = _cpp.Crystal(record(primitive, max_displacement))
    elements = list(dict.fromkeys(primitive.symbols))
    species = [elements.index(s) for s in atoms.symbols]
    crystal.map(atoms.cell.array.tolist(), [10 + k for k in range(len(atoms))], species, atoms.positions)
    return crystal


def ideal_positions(crystal, primitive, n):
    """Where the sites that were found lie in the box [n, 3], and their sublattices."""
    sites = np.array([crystal.site_of(10 + k) for k in range(n)])
    cell = np.array(crystal.cell)
    scaled = primitive.get_scaled_positions(wrap=False)
    return (sites[:, :3] + scaled[sites[:, 3]]) @ cell + crystal.drift, sites[:, 3]


def check(primitive, atoms, amplitude):
    """Right species and distances, each site once; the cell in the box is the turned primitive cell."""
    crystal = map_atoms(primitive, atoms)
    ideal, sublattices = ideal_positions(crystal, primitive, len(atoms))
    u = find_mic(atoms.positions - ideal, atoms.cell.array)[0]
    assert (primitive.numbers[sublattices] == atoms.numbers).all()
    assert np.abs(u.mean(0)).max() < 1e-9
    assert np.abs(u).max() < 2 * amplitude
    distances = find_mic((ideal[:, None] - ideal).reshape(-1, 3), atoms.cell.array)[1].reshape(len(ideal), -1)
    assert (distances + 9.0 * np.eye(len(ideal))).min() > 1.0
    rotation = np.array(crystal.rotation)
    assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.allclose(np.array(crystal.multiple) @ crystal.cell, atoms.cell.array, atol=1e-10)
    assert np.allclose(primitive.cell.array @ rotation, crystal.cell, atol=1e-5)
    return crystal


CRYSTALS = {"zincblende": boron_arsenide, "orthorhombic": tin_selenide, "triclinic": triclinic}


@pytest.mark.parametrize("kind", CRYSTALS)
@pytest.mark.parametrize("seed", range(6))
def test_any_box_turn_mirror_and_shift(kind, seed):
    """Random supercells, rotations (also with a mirror), origins and orders of the atoms."""
    rng = np.random.default_rng(seed)
    primitive = CRYSTALS[kind]()
    while True:
        multiple = rng.integers(-2, 3, (3, 3))
        if 1 <= abs(round(np.linalg.det(multiple))) <= 8:
            break
    atoms = make_supercell(primitive, multiple)
    matrix = Rotation.random(rng=seed).as_matrix() * (-1.0 if seed % 2 else 1.0)
    atoms.set_cell(atoms.cell.array @ matrix, scale_atoms=False)
    atoms.positions = atoms.positions @ matrix + rng.uniform(-20, 20, 3)
    amplitude = 0.1
    atoms.positions += rng.uniform(-amplitude, amplitude, (len(atoms), 3))
    atoms.wrap()
    check(primitive, atoms[rng.permutation(len(atoms))], amplitude)


def test_ideal_crystal_keeps_its_own_frame():
    atoms = tin_selenide().repeat((1, 2, 3))
    crystal = check(tin_selenide(), atoms, 1e-6)
    assert np.array_equal(crystal.rotation, np.eye(3))
    assert np.allclose(crystal.drift, 0.0, atol=1e-12)
    assert np.array_equal(crystal.multiple, np.diag([1, 2, 3]))


def test_hot_crystal():
    """Displacements up to a third of the distance of neighbours, from an origin that is unknown."""
    rng = np.random.default_rng(0)
    atoms = bulk("Si", "diamond", 5.43).repeat((4, 4, 4))
    atoms.positions += rng.uniform(-0.4, 0.4, (len(atoms), 3))
    atoms.positions += [1.1, 0.3, 2.2]
    check(bulk("Si", "diamond", 5.43), atoms, 0.4)


def test_wrong_domain_is_not_chosen():
    """A pseudo-cubic box of a crystal whose axes are in another order: the better orientation wins, not the first."""
    primitive = Atoms("CaO", scaled_positions=[(0, 0, 0), (0.5, 0.5, 0.42)], cell=[4.0, 4.0, 4.0], pbc=True)
    atoms = primitive.repeat((2, 2, 2))
    turn = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    atoms.positions = atoms.positions @ turn
    crystal = map_atoms(primitive, atoms)
    ideal, _ = ideal_positions(crystal, primitive, len(atoms))
    assert np.abs(find_mic(atoms.positions - ideal, atoms.cell.array)[0]).max() < 1e-9


def test_large_box_is_mapped_quickly():
    """10^5 atoms with an unknown origin, in a box that is turned."""
    primitive = bulk("Si", "diamond", 5.43)
    cubic = make_supercell(primitive, [[-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    atoms = cubic.repeat((23, 23, 24))
    atoms.positions += np.random.default_rng(0).normal(0.0, 0.1, (len(atoms), 3))
    atoms.positions += [0.9, 1.9, 0.1]
    matrix = Rotation.from_euler("x", 90, degrees=True).as_matrix()
    atoms.set_cell(atoms.cell.array @ matrix, scale_atoms=False)
    atoms.positions = atoms.positions @ matrix
    assert len(atoms) > 100_000
    start = time.process_time()
    map_atoms(primitive, atoms)
    assert time.process_time() - start < 5.0


def test_nearest_translation_in_skewed_cells():
    """Against a search over thousands of translations."""
    rng = np.random.default_rng(1)
    steps = np.stack(np.meshgrid(*[np.arange(-12, 13)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for _ in range(10):
        basis = rng.normal(size=(3, 3)) * 0.7 + 4.0 * np.eye(3)
        skewed = np.array([[1, 0, 0], [2, 1, 0], [-2, 1, 1]]) @ basis
        for vector in rng.normal(size=(10, 3)) * 5.0:
            cell, rest = _cpp.nearest_translation(skewed.tolist(), vector.tolist())
            assert np.allclose(vector - np.array(cell) @ skewed, rest, atol=1e-10)
            shortest = np.linalg.norm(vector - steps @ basis, axis=1).min()
            assert np.linalg.norm(rest) == pytest.approx(shortest, abs=1e-9)


ERRORS = {
    "strained": (lambda a: a.set_cell(a.cell.array * 1.01, scale_atoms=True), "not an integer multiple"),
    "vacancy": (lambda a: a.__delitem__(3), "the box has 15 atoms of the crystal but the crystal has 16 sites in it"),
    "wrong species": (lambda a: a.symbols.__setitem__(0, "As"), "differ from those of the crystal's sites"),
    "two on a site": (
        lambda a: a.positions.__setitem__(3, a.positions[1] + 0.2),
        r"atoms 11 and 13 are nearest to the same site\): start from the ideal crystal",
    ),
    "far": (
        lambda a: a.positions.__setitem__(4, a.positions[4] + [0.0, 1.2, 0.0]),
        r"atom 14 is 1\.\d+ A away from its site, more than the model's 0.8 A",
    ),
}


@pytest.mark.parametrize("problem", ERRORS)
def test_errors(problem):
    change, message = ERRORS[problem]
    atoms = boron_arsenide().repeat((2, 2, 2))
    change(atoms)
    with pytest.raises(_cpp.Error, match=message):
        map_atoms(boron_arsenide(), atoms)


@pytest.mark.parametrize("turned", [False, True])
def test_boxes_of_a_rounded_crystal_are_mapped(turned):
    """The model has the crystal with its symmetry made exact, the box 5 x 5 x 5 of the file's cells with 4 decimals."""
    exact = bulk("Mg", "hcp", a=3.21, c=5.21)
    rounded = Atoms("Mg2", scaled_positions=np.round(exact.get_scaled_positions(), 5), cell=exact.cell, pbc=True)
    rounded.set_cell(np.round(exact.cell.array, 4), scale_atoms=True)
    model, box = symmetrised(rounded, 1e-3), rounded.repeat(5)
    if turned:
        box.rotate(50.0, (1, 2, 3), rotate_cell=True)
    crystal = map_atoms(model, box)
    ideal, _ = ideal_positions(crystal, model, len(box))
    assert 1e-8 < np.abs(find_mic(box.positions - ideal, box.cell.array)[0]).max() < 5e-4
