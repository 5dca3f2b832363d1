"""Symmetry of crystals whose files hold rounded numbers: what is found, what is made exact, what is said."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.spacegroup import crystal
from known_crystals import silicon, tin_selenide

from ubmd.data.structures import read_structures
from ubmd.errors import DataError, SettingsError
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.fit import cached_basis
from ubmd.potentials.force_constants.ideal import describe_symmetry
from ubmd.potentials.force_constants.lattice import Lattice, Placement, Supercell
from ubmd.potentials.force_constants.symmetry import SYMMETRY_TOLERANCE, largest_change, symmetrised
from ubmd.settings import load_settings
from ubmd.settings.dynamic import DynamicRunSettings

pytest.importorskip("spglib")

EXAMPLES = Path(__file__).parents[2] / "lammps_examples"


def magnesium() -> Atoms:
    return bulk("Mg", "hcp", a=3.21, c=5.21)


def zinc_oxide() -> Atoms:
    return bulk("ZnO", "wurtzite", a=3.25, c=5.207, u=0.3819)


def quartz() -> Atoms:
    places = [(0.4697, 0.0, 0.0), (0.4135, 0.2669, 0.1191)]
    atoms = crystal(["Si", "O"], places, spacegroup=152, cellpar=[4.916, 4.916, 5.4054, 90, 90, 120])
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)


def zirconia() -> Atoms:
    places = [(0.2754, 0.0395, 0.2083), (0.0700, 0.3317, 0.3447), (0.4496, 0.7569, 0.4792)]
    cell = [5.1505, 5.2116, 5.3173, 90, 99.230, 90]
    atoms = crystal(["Zr", "O", "O"], places, spacegroup=14, cellpar=cell)
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)


def bismuth() -> Atoms:
    """Rhombohedral, given as the hexagonal cell of three primitive ones."""
    atoms = crystal(["Bi"], [(0, 0, 0.2339)], spacegroup=166, cellpar=[4.546, 4.546, 11.862, 90, 90, 120])
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)


def without_symmetry() -> Atoms:
    places = [(0, 0, 0), (0.31, 0.13, 0.22), (0.55, 0.61, 0.17), (0.2, 0.7, 0.8)]
    return Atoms("HCNO", scaled_positions=places, cell=[4.1, 4.6, 5.2, 81, 97, 105], pbc=True)


# function, space group, number of operations and of atoms in the primitive cell
CRYSTALS = [
    (magnesium, 194, 24, 2),
    (zinc_oxide, 186, 12, 4),
    (quartz, 152, 6, 12),
    (zirconia, 14, 4, 12),
    (tin_selenide, 62, 8, 8),
    (bismuth, 166, 12, 2),
    (silicon, 227, 48, 2),
    (without_symmetry, 1, 1, 4),
]


def turned(atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.rotate(40.0, (1.0, 2.0, 3.0), rotate_cell=True)
    return atoms


def left_handed(atoms: Atoms) -> Atoms:
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell[:][[1, 0, 2]], pbc=True)


def doubled(atoms: Atoms) -> Atoms:
    return atoms.repeat((2, 1, 2))


def skewed(atoms: Atoms) -> Atoms:
    return make_supercell(atoms, [[1, 1, 0], [0, 1, 1], [0, 0, 2]])


FORMS = [lambda atoms: atoms, turned, left_handed, doubled, skewed]


def rounded(atoms: Atoms, places: int, cell: int) -> Atoms:
    """As a file has it that holds so many decimals of the fractional positions and of the cell."""
    scaled = np.round(atoms.get_scaled_positions(wrap=False), places)
    return Atoms(atoms.numbers, scaled_positions=scaled, cell=np.round(atoms.cell[:], cell), pbc=True)


def largest_mismatch(lattice: Lattice) -> tuple[float, float]:
    """By brute force: how far an operation takes a site from the next of its kind, and R Rᵀ from 1."""
    worst = 0.0
    for rotation, translation in zip(lattice.rotations, lattice.translations, strict=True):
        for place, number in zip(lattice.scaled, lattice.numbers, strict=True):
            gaps = rotation @ place + translation - lattice.scaled[lattice.numbers == number]
            worst = max(worst, np.linalg.norm((gaps - np.round(gaps)) @ lattice.cell, axis=1).min())
    turns = lattice.cartesian_rotations
    return worst, float(np.abs(turns @ turns.transpose(0, 2, 1) - np.eye(3)).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("make", "number", "operations", "atoms"), CRYSTALS)
def test_rounded_crystals_have_their_symmetry_within_a_tolerance(make, number, operations, atoms, form) -> None:
    for places, cell, tolerance in ((5, 4, 1e-3), (4, 3, 1e-2), (12, 12, 1e-3)):
        lattice = Lattice.from_atoms(rounded(form(make()), places, cell), tolerance)
        assert (len(lattice.rotations), len(lattice.numbers)) == (operations, atoms)
        assert lattice.space_group is not None
        assert (lattice.space_group.number, lattice.space_group.operations) == (number, operations)
        mismatch, turn = largest_mismatch(lattice)
        assert mismatch < 1e-10
        assert turn < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [magnesium, zinc_oxide, quartz, bismuth])
def test_the_crystal_is_moved_no_more_than_it_takes(make, form) -> None:
    """By about the rounding, without a turn, a shift of all atoms, other vectors or another order."""
    before = rounded(form(make()), 5, 4)
    after = symmetrised(before, 1e-3)
    shift, cell = largest_change(before, after)
    assert 1e-7 < shift < 0.5e-5 * np.linalg.norm(before.cell[:].sum(axis=0)) * 3.0
    assert 1e-7 < cell < 3e-4
    assert after.symbols.get_chemical_formula(mode="reduce") == before.symbols.get_chemical_formula(mode="reduce")
    moved = after.get_scaled_positions(wrap=False) - before.get_scaled_positions(wrap=False)
    assert np.abs(moved.mean(axis=0)).max() < 1e-12
    stretch = np.linalg.solve(before.cell[:], after.cell[:])
    np.testing.assert_allclose(stretch, stretch.T, atol=1e-12)
    again = symmetrised(after, 1e-3)
    np.testing.assert_allclose(again.positions, after.positions, atol=1e-12)


def test_the_default_takes_crystals_as_they_are() -> None:
    atoms = rounded(magnesium(), 5, 4)
    assert symmetrised(atoms, SYMMETRY_TOLERANCE) is atoms
    assert len(Lattice.from_atoms(atoms).rotations) < 24


@pytest.mark.parametrize(
    ("make", "cutoffs", "count", "lost"),
    [(magnesium, {2: 6.0, 3: 4.0}, 53, 263), (quartz, {2: 4.0}, 225, 1290)],
)
def test_a_tolerance_gives_the_parameters_of_the_exact_crystal(make, cutoffs, count, lost) -> None:
    """The counts of exact positions; rounded ones lose the group without a tolerance."""
    assert ClusterBasis.build(make(), cutoffs).n_parameters == count
    assert ClusterBasis.build(rounded(make(), 5, 4), cutoffs, tolerance=1e-3).n_parameters == count
    assert ClusterBasis.build(rounded(make(), 5, 4), cutoffs).n_parameters == lost


def test_an_exact_crystal_has_the_same_force_constants_with_any_tolerance() -> None:
    """Both bases span the same forces."""
    bases = [ClusterBasis.build(magnesium(), {2: 5.0, 3: 3.5}, tolerance=t) for t in (SYMMETRY_TOLERANCE, 1e-2)]
    box = magnesium().repeat((3, 3, 2))
    box.positions += np.random.default_rng(0).normal(0.0, 0.05, box.positions.shape)
    one, other = (basis.force_matrix(box) for basis in bases)
    assert one.shape == other.shape
    for a, b in ((one, other), (other, one)):
        solution = np.linalg.lstsq(a, b, rcond=None)[0]
        np.testing.assert_allclose(a @ solution, b, atol=1e-9 * np.abs(b).max())


@pytest.mark.parametrize(("name", "count"), [("snse", 424), ("bas", 285), ("silicon", 127)])
def test_the_examples_keep_their_parameters(name: str, count: int) -> None:
    settings = load_settings(EXAMPLES / name / "dynamic.toml", DynamicRunSettings).crystal
    assert settings is not None
    assert settings.tolerance == SYMMETRY_TOLERANCE
    atoms = read_structures(settings.structure_file(EXAMPLES / name))[0]
    basis = ClusterBasis.build(atoms, settings.cutoffs, settings.decay, settings.tolerance)
    assert basis.n_parameters == count


def test_boxes_of_the_rounded_file_still_map() -> None:
    """5 x 5 x 5 cells, with the error of each vector five times; atoms are displaced by about the rounding."""
    atoms = rounded(magnesium(), 5, 4)
    lattice = Lattice.from_atoms(atoms, 1e-3)
    box = atoms.repeat(5)
    for displacements in (Supercell(lattice, box).displacements(box), Placement.fit(lattice, box).displacements(box)):
        assert 1e-6 < np.abs(displacements).max() < 5e-4
    exact = symmetrised(atoms, 1e-3).repeat(5)
    assert np.abs(Supercell(lattice, exact).displacements(exact)).max() < 1e-12


def test_too_loose_tolerances_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"tolerance = 0\.5 Å is too loose for atoms that are 2\.35 Å apart"):
        Lattice.from_atoms(silicon(), 0.5)
    with pytest.raises(SettingsError, match=r"too loose for atoms that are 2\.5"):  # images of one atom
        Lattice.from_atoms(bulk("Cu", a=3.6), 0.3)
    molecule = Atoms("H2", [[0, 0, 0], [0, 0, 1e-3]], cell=[4, 4, 4], pbc=True)
    with pytest.raises(DataError, match="overlapping atoms or a flat cell"):
        Lattice.from_atoms(molecule, 1e-3)
    molecule.positions[1, 2] = np.nan  # spglib crashes on it
    for tolerance in (SYMMETRY_TOLERANCE, 1e-3):
        with pytest.raises(DataError, match="not finite numbers"):
            Lattice.from_atoms(molecule, tolerance)
    slab = silicon()
    slab.pbc = (True, True, False)
    with pytest.raises(DataError, match="must be periodic in three directions"):
        Lattice.from_atoms(slab, 1e-3)


def test_distortions_are_no_rounding() -> None:
    """A tolerance below a real distortion keeps it."""
    atoms = magnesium()
    atoms.positions[1, 2] += 0.02
    assert len(Lattice.from_atoms(atoms, 1e-3).rotations) == len(Lattice.from_atoms(atoms).rotations) == 12
    assert len(Lattice.from_atoms(atoms, 5e-2).rotations) == 24
    assert largest_change(atoms, symmetrised(atoms, 5e-2))[0] == pytest.approx(0.01, rel=1e-6)  # half for each atom


def test_the_space_group_is_that_of_the_crystal_in_any_cell() -> None:
    """Chiral crystals have two; a left-handed cell is no mirror."""
    for form, make in product(FORMS, (quartz, lambda: left_handed(quartz()))):
        assert str(Lattice.from_atoms(form(make())).space_group) == "P3_121 (152), 6 operations"
    mirrored = quartz()
    mirrored.set_cell(mirrored.cell[:] * [1.0, 1.0, -1.0], scale_atoms=True)
    assert str(Lattice.from_atoms(mirrored).space_group) == "P3_221 (154), 6 operations"
    assert str(Lattice.from_atoms(without_symmetry()).space_group) == "P1 (1), 1 operation"


def sentences(atoms: Atoms, tolerance: float = SYMMETRY_TOLERANCE) -> list[str]:
    return list(describe_symmetry(atoms, Lattice.from_atoms(atoms, tolerance), tolerance))


def test_what_is_said_of_the_symmetry() -> None:
    exact = "Space group P6_3/mmc (194), 24 operations, 2 atoms in the primitive cell."
    assert sentences(magnesium()) == [exact]
    lost, remark = sentences(rounded(magnesium(), 5, 4))
    assert lost == "Space group P2_1/m (11), 4 operations, 2 atoms in the primitive cell."
    assert remark.startswith("With crystal.tolerance = 0.001 (Å) it is P6_3/mmc (194), 24 operations, 2 atoms in the")
    assert "atoms are moved by at most 9.3e-06 Å and the cell is changed by at most 2.4e-05 Å." in remark
    found, change = sentences(rounded(magnesium(), 5, 4), 1e-3)
    assert found == exact
    assert change == (
        "To make that exact, atoms were moved by at most 9.3e-06 Å and the cell was changed by at most 2.4e-05 Å "
        "(crystal.tolerance = 0.001 Å)."
    )
    # a cell that is primitive only within the looser of both
    _, first, second = sentences(rounded(bismuth(), 4, 3))
    assert "crystal.tolerance = 0.001 (Å) it is P-3m1 (164), 12 operations, 6 atoms" in first
    assert "crystal.tolerance = 0.01 (Å) it is R-3m (166), 12 operations, 2 atoms" in second
    # in a supercell whose copies differ
    assert "P6_3/mmc (194), 24 operations, 2 atoms" in sentences(rounded(magnesium().repeat((3, 1, 1)), 5, 6))[1]
    # atoms so close that the remark's tolerance would merge them
    assert len(sentences(Atoms("Si2", [[0, 0, 0], [0, 0, 5e-3]], cell=[4, 4, 4], pbc=True))) == 1


def test_a_kept_basis_goes_with_its_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[float] = []
    original = ClusterBasis.build

    def build(*arguments) -> ClusterBasis:
        built.append(arguments[3])
        return original(*arguments)

    monkeypatch.setattr(ClusterBasis, "build", build)
    atoms, path = rounded(magnesium(), 5, 4), tmp_path / "basis.npz"
    counts = [cached_basis(atoms, {2: 3.3}, path, None, t).n_parameters for t in (1e-5, 1e-5, 1e-3, 1e-2, 1e-5)]
    assert built == [1e-5, 1e-3, 1e-5]  # 1e-2 finds the very crystal that 1e-3 finds
    assert counts[0] == counts[1] == counts[4] > counts[2] == counts[3]


def test_one_crystal_in_other_primitive_vectors_is_the_same() -> None:
    lattice = Lattice.from_atoms(silicon())
    cell = silicon().cell[:]
    other = Atoms("Si2", positions=silicon().positions, cell=[cell[0], cell[1], cell[2] - cell[0]], pbc=True)
    assert lattice.is_same(Lattice.from_atoms(other))
    shifted = silicon()
    shifted.positions += 0.1
    for different in (shifted, bulk("Si", "diamond", 5.4301), bulk("Ge", "diamond", 5.43), silicon().repeat(1)):
        same = different.symbols[0] == "Si" and np.allclose(different.positions, silicon().positions)
        assert lattice.is_same(Lattice.from_atoms(different)) == same
