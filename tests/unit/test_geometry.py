"""Pairs against brute force, and cells and positions that no neighbour search can work with."""

import itertools

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from ubmd.data.geometry import check_apart, check_cell, neighbours
from ubmd.data.graph import build_graph
from ubmd.data.labels import check_labelled
from ubmd.errors import DataError


def brute_force(atoms: Atoms, cutoff: float, images: int = 4) -> np.ndarray:
    """Vectors [P, 5] of i, j, x, y, z: every image of every atom."""
    ranges = [range(-images, images + 1) if periodic else (0,) for periodic in atoms.pbc]
    rows = []
    for i, j in np.ndindex(len(atoms), len(atoms)):
        for shift in itertools.product(*ranges):
            if i == j and not any(shift):
                continue
            vector = atoms.positions[j] - atoms.positions[i] + np.array(shift) @ np.asarray(atoms.cell)
            if np.linalg.norm(vector) < cutoff:
                rows.append([i, j, *vector])
    return np.array(rows).reshape(-1, 5)


def sheet(width: float) -> Atoms:
    """A few atoms in each corner of a wide flat square."""
    rng = np.random.default_rng(3)
    corners = np.array(list(itertools.product((0.0, width), (0.0, width), (0.0,))))
    positions = np.concatenate([corner + rng.uniform(0.0, 2.0, (4, 3)) for corner in corners])
    return Atoms("Cu16", positions=positions)


SMALL = np.random.default_rng(5).uniform(0.0, 3.0, (5, 3))


@pytest.mark.parametrize(
    ("atoms", "cutoff"),
    [
        (Atoms("Cu5", SMALL, cell=[[3.1, 0.2, 0], [0.7, 3.3, 0.1], [-0.4, 0.5, 2.9]], pbc=True), 4.0),
        (Atoms("Cu5", SMALL, cell=[[4, 0, 0], [1, 4, 0], [8, 0, 0]], pbc=[True, True, False]), 4.0),
        (Atoms("Cu5", SMALL, cell=[[4, 0, 0], [4, 0, 0], [0, 0, 0]], pbc=[True, False, False]), 4.0),
        (Atoms("Cu5", SMALL), 2.0),
        (sheet(1000.0), 2.0),  # these ended the process
        (sheet(20_000.0), 5.0),
        (Atoms("Cu5", SMALL + np.outer([0, 0, 0, 1, 1], [0, 0, 2e5]), cell=np.eye(3) * 4, pbc=[1, 1, 0]), 3.0),
        (Atoms("Cu5", SMALL, cell=np.diag([5e5, 5, 5]), pbc=True), 4.0),
    ],
    ids=["triclinic", "slab", "wire", "molecule", "sheet", "large sheet", "desorbed", "long cell"],
)
def test_pairs_are_those_of_brute_force(atoms, cutoff):
    i, j, vectors = neighbours(atoms, cutoff)
    found = np.column_stack([i, j, vectors])
    expected = brute_force(atoms, cutoff)
    assert (np.diff(i) >= 0).all(), "sorted by centre"
    assert len(found) == len(expected) > 0
    for rows in zip(*(a[np.lexsort(np.round(a, 6).T[::-1])] for a in (found, expected)), strict=True):
        np.testing.assert_allclose(*rows, atol=1e-9)


@pytest.mark.parametrize(
    ("cell", "pbc", "message"),
    [
        ([[4, 0, 0], [8, 0, 0], [0, 0, 20]], "TTF", "vectors a and b, but these cell vectors are parallel"),
        ([[4, 0, 0], [8, 0, 0], [0, 0, 0]], "TTF", "vectors a and b, but these cell vectors are parallel"),
        ([[0, 4, 0], [0, 0, 9], [0, -4, 0]], "TFT", "vectors a and c, but these cell vectors are parallel"),
        ([[4, 0, 0], [8, 1e-3, 0], [0, 0, 20]], "TTF", "only 0.0005 Å thick along vector a"),
        ([[4, 0, 0], [0, 4, 0], [0, 0, 0.01]], "TTT", "only 0.01 Å thick along vector c"),
        ([[4, 0, 0], [0, 4, 0], [4, 4, 0]], "TTT", "its three vectors lie in a plane"),
        ([[4, 0, 0], [0, 0, 0], [0, 0, 4]], "TTF", "periodic along vector b, but that cell vector is zero"),
        ([[4, 0, 0], [0, 1e10, 0], [0, 0, 4]], "TTF", r"cell vector b is 1e\+10 Å long"),
        ([[4, 0, 0], [0, np.nan, 0], [0, 0, 4]], "TFF", "the cell contains NaN or infinity"),
    ],
)
def test_cells_that_are_no_lattice_are_refused(cell, pbc, message):
    atoms = Atoms("H2", [[0, 0, 0], [2, 0, 1]], cell=cell, pbc=[letter == "T" for letter in pbc])
    with pytest.raises(DataError, match=message):
        check_cell(atoms)
    with pytest.raises(DataError, match=message):
        build_graph(atoms, ["H"], 4.0)


@pytest.mark.parametrize("pbc", [False, True])
@pytest.mark.parametrize("gap", [0.0, 1e-9, 5e-4])
@pytest.mark.parametrize("through_boundary", [False, True])
def test_atoms_at_one_place_are_named(pbc, gap, through_boundary):
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.pbc = pbc
    atoms.positions[6] = atoms.positions[1] + [0.0, gap, 0.0]
    if through_boundary:
        atoms.positions[6] += atoms.cell[0] - atoms.cell[2]
    if through_boundary and not pbc:
        check_apart(atoms)
        return
    pattern = r"atoms 1 \(Cl\) and 6 \(Na\), counted from 0, are at the same place"
    for check in (check_apart, lambda a: build_graph(a, ["Na", "Cl"], 4.0), lambda a: check_labelled([a], "set")):
        with pytest.raises(DataError, match=pattern) as caught:
            check(atoms)
        assert ("through the periodic boundary" in str(caught.value)) == through_boundary


def test_atoms_that_are_merely_close_are_no_mistake_of_the_file():
    for distance in (2e-3, 0.1):
        build_graph(Atoms("H2", [[0, 0, 0], [0, 0, distance]]), ["H"], 4.0)
    build_graph(Atoms("H", [[0, 0, 0]], cell=[0.5, 0.5, 0.5], pbc=True), ["H"], 2.0)  # its own images
    build_graph(Atoms("H"), ["H"], 4.0)


def test_atoms_beyond_reason_are_refused():
    atoms = molecule("H2O")
    atoms.positions[2, 0] = 1e12
    with pytest.raises(DataError, match=r"the atoms are up to 1e\+12 Å apart; positions are in Å"):
        build_graph(atoms, ["H", "O"], 4.0)
    atoms.set_cell(np.eye(3) * 8.0)
    atoms.pbc = True  # only another image of the atom
    assert build_graph(atoms, ["H", "O"], 4.0).n_atoms == 3
