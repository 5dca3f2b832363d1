"""The cluster basis at full size against hiPhive and symfc: counts, and one column space of the force matrices.

Smaller cases of the same kind run with every test (test_crystal_basis.py). Times are those of one core; nearly all of
it is the other program's.
"""

import numpy as np
import pytest
from ase import Atoms
from known_crystals import boron_arsenide, displaced, silicon, tin_selenide

from ubmd.potentials.force_constants.basis import ClusterBasis

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("spglib")


def largest_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far unit vectors of their column space lie outside of ours; both must have the same rank."""
    left, right = (np.linalg.svd(a / np.linalg.norm(a, axis=0), full_matrices=False) for a in (ours, theirs))
    ranks = [int((s > 1e-9 * s[0]).sum()) for _, s, _ in (left, right)]
    assert ranks[0] == ranks[1] == ours.shape[1]
    inside, vectors = left[0][:, : ranks[0]], right[0][:, : ranks[1]]
    return float(np.linalg.norm(vectors - inside @ (inside.T @ vectors), ord=2))


HIPHIVE = [
    # 15 s
    pytest.param(silicon, (5.4, 4.0, 4.0), [10, 27, 90], 3, 3, id="Si 127"),
    # 45 s. The whole first row of the table (5.5, 4.5, 4.5 and 3.5 Å: 24 + 155 + 1131 + 495) costs hiPhive six minutes
    # for the counts, which are the same, and far more for the matrices.
    pytest.param(boron_arsenide, (4.9, 4.5, 3.5, 2.5), [19, 155, 176, 5], 3, 4, id="c-BAs 355"),
    # 75 s
    pytest.param(tin_selenide, (5.7, 3.53, 3.53, 3.53, 3.53), [117, 32, 48, 66, 88], (1, 3, 3), 5, id="SnSe 351"),
]


@pytest.mark.parametrize(("crystal", "cutoffs", "counts", "repeat", "structures"), HIPHIVE)
def test_same_space_as_hiphive(crystal, cutoffs, counts, repeat, structures):
    hiphive = pytest.importorskip("hiphive")
    space = hiphive.ClusterSpace(crystal(), list(cutoffs))
    basis = ClusterBasis.build(crystal(), dict(enumerate(cutoffs, start=2)))
    assert [int((basis.parameter_orders == order).sum()) for order in basis.orders] == counts
    assert [space.get_n_dofs_by_order(order) for order in basis.orders] == counts
    atoms = crystal().repeat(repeat)
    container = hiphive.StructureContainer(space)
    many = np.stack([displaced(len(atoms), seed) for seed in range(structures)])
    for u in many:
        one = atoms.copy()
        one.new_array("displacements", u)
        one.new_array("forces", np.zeros_like(u))
        container.add_structure(one)
    theirs, _ = container.get_fit_data()
    ours = basis.force_matrix(many, basis.supercell(atoms))
    assert len(ours) > basis.n_parameters
    assert largest_distance(ours, theirs) < 1e-9


SYMFC = [
    pytest.param(silicon, 2, 5.4, 5, 10, id="Si order 2"),  # 2 s
    pytest.param(tin_selenide, 2, 5.7, (2, 5, 4), 117, id="SnSe order 2"),
    pytest.param(silicon, 3, 4.0, 4, 27, id="Si order 3"),  # 25 s, 3 GB
    pytest.param(boron_arsenide, 3, 2.5, 3, 3, id="c-BAs order 3"),
    # To 4.0 Å symfc would need 128 atoms for this order, and more memory than 12 GB.
    pytest.param(silicon, 4, 2.5, 2, 4, id="Si order 4"),
]


@pytest.mark.parametrize(("crystal", "order", "cutoff", "repeat", "count"), SYMFC)
def test_same_space_as_symfc_in_cells_longer_than_three_cutoffs(crystal, order, cutoff, repeat, count):
    """In shorter cells symfc's clusters wrap around the cell, and it has parameters that the crystal hasn't."""
    pytest.importorskip("symfc")
    atoms = crystal().repeat(repeat)
    basis = ClusterBasis.build(crystal(), {order: cutoff})
    assert basis.n_parameters == count
    u = displaced(len(atoms))
    theirs = symfc_forces(atoms, order, cutoff, u)
    assert theirs.shape[1] == count
    assert largest_distance(basis.force_matrix(u, basis.supercell(atoms)), theirs) < 1e-9


def symfc_forces(atoms: Atoms, order: int, cutoff: float, u: np.ndarray) -> np.ndarray:
    """Forces [3n, P] of symfc's basis vectors up to a factor, from the non-zero elements only."""
    import symfc
    from scipy.sparse import coo_array
    from symfc.utils.utils import SymfcAtoms

    n = len(atoms)
    ideal = SymfcAtoms(numbers=atoms.numbers, scaled_positions=atoms.get_scaled_positions(), cell=np.array(atoms.cell))
    found = symfc.Symfc(ideal, cutoff={order: cutoff}).compute_basis_set(orders=[order]).basis_set[order]
    elements = coo_array(found.compression_matrix)
    # rows are in the order of atoms, then components
    places = np.unravel_index(elements.row.astype(np.int64), [n] * order + [3] * order)
    weights = elements.data.copy()
    for k in range(1, order):
        weights *= u[places[k], places[order + k]]
    rows = 3 * places[0] + places[order]
    forces = coo_array((weights, (rows, elements.col)), shape=(3 * n, elements.shape[1])).tocsr()
    return np.asarray(forces @ found.basis_set)
