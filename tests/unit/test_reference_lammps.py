"""The LAMMPS reference against ASE, against sums by hand and against published numbers; repetition of cells."""

from pathlib import Path

import numpy as np
import openmm
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.data import atomic_masses, atomic_numbers
from ase.io import read
from ase.optimize import BFGS
from openmm import app, unit

from ubmd.data.periodicity import stress_within
from ubmd.errors import LabelError, SettingsError
from ubmd.references import label, make_calculator
from ubmd.references.lammps import LAMMPS
from ubmd.settings import ReferenceSettings

HERE = Path(__file__).parent
ALANINE = HERE.parents[1] / "lammps_examples" / "alanine_dipeptide"
# Independent of ase.units: CODATA 2018.
EV_PER_KCAL_PER_MOL = 0.0433641153
GPA = 1.0 / 160.2176634  # eV/Å^3
EPSILON, SIGMA, CUTOFF = 0.0103, 3.4, 6.0
ARGON = ["pair_style lj/cut 6.0", "pair_coeff 1 1 0.0103 3.4", "pair_modify shift yes"]
COULOMB = ["set type 1 charge 1.0", "set type 2 charge -1.0", "pair_style coul/long 8.0", "pair_coeff * *"]
SILICON = ReferenceSettings(
    calculator="lammps",
    arguments={"elements": ["Si"], "commands": ["pair_style sw", "pair_coeff * * Si.sw Si"]},
    force_limit=100.0,
)


@pytest.fixture(scope="module")
def argon():
    return LAMMPS(ARGON, ["Ar"])


def crystal(seed: int, strain: float = 0.3) -> Atoms:
    """A distorted argon crystal in a skewed cell, turned and moved out of it."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Ar", "fcc", a=5.3, cubic=True) * (2, 2, 2)
    atoms.rattle(0.2, rng=rng)
    atoms.set_cell(atoms.cell[:] @ (np.eye(3) + rng.uniform(-strain, strain, (3, 3))), scale_atoms=True)
    atoms.rotate(rng.uniform(0, 180), rng.normal(size=3), rotate_cell=True)
    atoms.positions += rng.uniform(-50, 50, 3)
    return atoms


def assert_agree(atoms: Atoms, calculator: LAMMPS) -> None:
    """Energy, forces and stress are those of ASE's own Lennard-Jones calculator."""
    ours, ase = atoms.copy(), atoms.copy()
    ours.calc, ase.calc = calculator, LennardJones(epsilon=EPSILON, sigma=SIGMA, rc=CUTOFF)
    scale = np.abs(ase.get_forces()).max()
    assert ours.get_potential_energy() == pytest.approx(ase.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(ours.get_forces(), ase.get_forces(), rtol=0, atol=1e-11 * scale)
    if atoms.pbc.any() and atoms.cell.rank == 3:
        np.testing.assert_allclose(ours.get_stress(), stress_within(ase.get_stress(), atoms), rtol=0, atol=1e-12)


def test_one_instance_labels_any_cell(argon):
    for seed in range(4):
        assert_agree(crystal(seed), argon)
    left_handed = crystal(4)
    left_handed.set_cell(left_handed.cell[[1, 0, 2]])
    assert np.linalg.det(left_handed.cell[:]) < 0
    assert_agree(left_handed, argon)
    long_tilt = crystal(5)
    long_tilt.set_cell(np.array([[1, 3, 0], [0, 1, 0], [-4, 0, 1]]) @ long_tilt.cell[:])
    assert_agree(long_tilt, argon)


@pytest.mark.parametrize("pbc", [(1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 0), (0, 0, 0)])
def test_directions_that_are_not_periodic(argon, pbc):
    for seed in range(2):
        atoms = crystal(seed, strain=0.2)
        atoms.pbc = pbc
        assert_agree(atoms, argon)
    atoms.positions += 200.0  # far outside the box of the last structure
    assert_agree(atoms, argon)
    flat = Atoms("Ar3", [[0, 0, 0], [3.6, 0, 0], [0, 3.9, 0]])
    assert_agree(flat, argon)


def test_a_label_does_not_depend_on_the_labels_before_it(argon):
    """Bit for bit: otherwise which worker labels what would change a run."""
    atoms, other = crystal(0), crystal(1)
    results = []
    for calculator in (argon, LAMMPS(ARGON, ["Ar"])):
        for structure in (other, atoms):
            copy = structure.copy()
            copy.calc = calculator
            results.append((copy.get_potential_energy(), copy.get_forces(), copy.get_stress()))
    for first, second in zip(results[:2], results[2:], strict=True):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def test_stillinger_weber_silicon_has_its_published_properties():
    """Stillinger and Weber, PRB 31, 5262 (1985): a = 5.431 Å, E = -4.3366 eV; elastic constants
    C11 = 151.4, C12 = 76.4, C44 = 56.4 GPa (Cowley, PRL 60, 2379 (1988))."""
    cell = bulk("Si", cubic=True, a=5.431)
    at_rest = label(cell, SILICON, HERE)
    assert at_rest.get_potential_energy() / 8 == pytest.approx(-4.3366, abs=2e-4)
    assert np.abs(at_rest.get_stress()).max() < 0.02 * GPA
    h = 1e-3

    def stiffness(strain: np.ndarray) -> np.ndarray:
        """d stress / d strain with relaxed atoms, GPa."""
        stresses = []
        for sign in (1, -1):
            strained = cell.copy()
            strained.set_cell(cell.cell[:] @ (np.eye(3) + sign * h * strain), scale_atoms=True)
            strained.calc = make_calculator(SILICON, __file__)
            BFGS(strained, logfile=None).run(fmax=1e-6)
            stresses.append(strained.get_stress())
        return (stresses[0] - stresses[1]) / (2 * h) / GPA

    along = stiffness(np.diag([1.0, 0, 0]))
    assert along[0] == pytest.approx(151.4, abs=0.3)
    assert along[1] == pytest.approx(76.4, abs=0.3)
    shear = stiffness(np.array([[0, 0, 0], [0, 0, 0.5], [0, 0.5, 0]]))
    assert shear[3] == pytest.approx(56.4, abs=0.3)
    np.testing.assert_allclose(shear[[0, 1, 2, 4, 5]], 0, atol=1e-2)


def test_forces_and_stress_are_derivatives_of_the_energy():
    rng = np.random.default_rng(3)
    cell = bulk("Si", cubic=True)
    cell.rattle(0.2, rng=rng)
    cell.set_cell(cell.cell[:] @ (np.eye(3) + rng.uniform(-0.1, 0.1, (3, 3))), scale_atoms=True)
    cell.calc = make_calculator(SILICON, __file__)
    assert_derivatives(cell, [(0, 0), (3, 1), (7, 2)], 1e-6)


def assert_derivatives(atoms: Atoms, components: list[tuple[int, int]], tolerance: float, h: float = 1e-4) -> None:
    """Some forces (eV/Å) and all stresses (eV/Å^3) against central differences of the energy."""
    forces, stress, volume = atoms.get_forces(), atoms.get_stress(), atoms.get_volume()

    def slope(moved_by) -> float:
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved_by(moved, sign * h)
            moved.calc = atoms.calc
            energies.append(moved.get_potential_energy())
        return (energies[0] - energies[1]) / (2 * h)

    for atom, axis in components:

        def shift(moved, step, atom=atom, axis=axis):
            moved.positions[atom, axis] += step

        assert forces[atom, axis] == pytest.approx(-slope(shift), abs=tolerance)
    for component, (i, j) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):

        def strain(moved, step, i=i, j=j):
            change = np.eye(3)
            change[i, j] += step / 2
            change[j, i] += step / 2
            moved.set_cell(moved.cell[:] @ change, scale_atoms=True)

        assert stress[component] == pytest.approx(slope(strain) / volume, abs=tolerance)


@pytest.mark.parametrize("unit_system", ["metal", "real"])
def test_rock_salt_has_its_madelung_energy(unit_system):
    """-1.747565 e^2 / (4 pi eps0 r) per ion pair, whatever the units of LAMMPS; e^2/(4 pi eps0) = 14.399645 eV Å."""
    salt = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    salt.calc = LAMMPS(
        [*COULOMB, "kspace_style ewald 1e-8"],
        ["Na", "Cl"],
        units=unit_system,
        atom_style="charge",
    )
    energy = -4 * 1.747564595 * 14.39964548 / 2.82
    assert salt.get_potential_energy() == pytest.approx(energy, rel=2e-6)
    # a Coulomb crystal: 3 P V = E
    np.testing.assert_allclose(salt.get_stress()[:3] * salt.get_volume() * 3, -energy, rtol=1e-5)


# --- bonded force fields from a data file -------------------------------------------------------------------------

STIFFNESS = 100.0  # kcal/mol/Å^2; LAMMPS's harmonic bond has no factor 1/2
CHAIN = """A chain C-N-C-N-O along x, bonded to itself through the boundary; the copy of each atom comes next to it.

10 atoms
10 bonds
2 bond types
4 atom types

0.0 12.0 xlo xhi
0.0 7.0 ylo yhi
0.0 8.0 zlo zhi
0.5 -0.4 0.3 xy xz yz

Masses

1 12.0
2 14.0
3 12.0
4 16.0

Bond Coeffs

1 100.0 1.3
2 100.0 1.1

Atoms

1 1 1 0.0 0.2 3.0 3.0
2 1 1 0.0 6.2 3.0 3.0
3 1 2 0.0 1.4 3.2 3.0
4 1 2 0.0 7.4 3.2 3.0
5 1 3 0.0 2.6 3.0 3.1
6 1 3 0.0 8.6 3.0 3.1
7 1 2 0.0 3.8 2.9 3.0
8 1 2 0.0 9.8 2.9 3.0
9 1 4 0.0 5.0 3.0 2.9
10 1 4 0.0 11.0 3.0 2.9

Bonds

1 1 1 3
2 1 2 4
3 1 3 5
4 1 4 6
5 2 5 7
6 2 6 8
7 1 7 9
8 1 8 10
9 2 9 2
10 2 10 1
"""
REST = {(0, 1): 1.3, (1, 2): 1.3, (2, 3): 1.1, (3, 4): 1.3, (4, 0): 1.1}


def chain(folder, **changes) -> LAMMPS:
    (folder / "chain.data").write_text(CHAIN)
    arguments = {
        "commands": ["pair_style zero 4.0", "pair_coeff * *"],
        "elements": ["C", "N", "C", "O"],
        "units": "real",
        "atom_style": "full",
        "data": "chain.data",
        "styles": ["bond_style harmonic"],
        "repeat": [2, 1, 1],
    } | changes
    return make_calculator(ReferenceSettings(calculator="lammps", arguments=arguments), folder)


def energy_by_hand(atoms: Atoms) -> float:
    """eV; every bond is the shortest image."""
    energy = 0.0
    for (i, j), rest in REST.items():
        energy += STIFFNESS * (atoms.get_distance(i, j, mic=True) - rest) ** 2
    return energy * EV_PER_KCAL_PER_MOL


def test_labels_of_a_small_cell_whose_repetition_has_the_topology(tmp_path):
    calculator = chain(tmp_path)
    start = calculator.structure()
    assert start.get_chemical_formula(mode="reduce") == "CNCNO"
    np.testing.assert_allclose(start.cell[0], [6.0, 0, 0])
    rng = np.random.default_rng(0)
    for _ in range(5):
        atoms = start.copy()
        atoms.rattle(0.1, rng=rng)
        atoms.set_cell(atoms.cell[:] @ (np.eye(3) + rng.uniform(-0.05, 0.05, (3, 3))), scale_atoms=True)
        # any periodic images, as MD with wrapping leaves them: the naive copy tears bonds here
        atoms.positions += rng.integers(-3, 4, (5, 3)) @ atoms.cell[:]
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(energy_by_hand(atoms), rel=1e-6)
        assert_derivatives(atoms, [(0, 0), (4, 1), (2, 2)], 1e-6)


def amber_data(system: openmm.System, symbols: list[str], positions: np.ndarray) -> str:
    """A LAMMPS data file (units real) of an OpenMM system: one atom type per atom, one bonded type per term."""
    kcal = unit.kilocalorie_per_mole
    forces = {type(force).__name__: force for force in system.getForces()}
    bonds, angles = forces["HarmonicBondForce"], forces["HarmonicAngleForce"]
    torsions, nonbonded = forces["PeriodicTorsionForce"], forces["NonbondedForce"]
    lines: dict[str, list[str]] = {name: [] for name in ("Masses", "Pair Coeffs", "Atoms")}
    for k, (symbol, (x, y, z)) in enumerate(zip(symbols, positions, strict=True), start=1):
        charge, sigma, epsilon = nonbonded.getParticleParameters(k - 1)
        lines["Masses"].append(f"{k} {atomic_masses[atomic_numbers[symbol]]}")
        lines["Pair Coeffs"].append(f"{k} {epsilon.value_in_unit(kcal):.17g} {sigma.value_in_unit(unit.angstrom):.17g}")
        lines["Atoms"].append(f"{k} 1 {k} {charge.value_in_unit(unit.elementary_charge):.17g} {x} {y} {z}")
    terms: dict[str, list[tuple[list[int], str]]] = {"Bond": [], "Angle": [], "Dihedral": []}
    for b in range(bonds.getNumBonds()):
        i, j, length, k = bonds.getBondParameters(b)
        stiff = k.value_in_unit(kcal / unit.angstrom**2) / 2
        terms["Bond"].append(([i, j], f"{stiff:.17g} {length.value_in_unit(unit.angstrom):.17g}"))
    for a in range(angles.getNumAngles()):
        *atoms, angle, k = angles.getAngleParameters(a)
        stiff = k.value_in_unit(kcal / unit.radian**2) / 2
        terms["Angle"].append((atoms, f"{stiff:.17g} {angle.value_in_unit(unit.degree):.17g}"))
    for t in range(torsions.getNumTorsions()):
        *atoms, n, phase, k = torsions.getTorsionParameters(t)
        height = k.value_in_unit(kcal)
        terms["Dihedral"].append((atoms, f"1 {height:.17g} {n} {phase.value_in_unit(unit.degree):.17g}"))
    for name, listed in terms.items():
        lines[f"{name} Coeffs"] = [f"{t} {words}" for t, (_, words) in enumerate(listed, start=1)]
        lines[f"{name}s"] = [f"{t} {t} {' '.join(str(i + 1) for i in a)}" for t, (a, _) in enumerate(listed, start=1)]
    counts = [f"{len(symbols)} atoms", f"{len(symbols)} atom types"]
    for name, listed in terms.items():
        counts += [f"{len(listed)} {name.lower()}s", f"{len(listed)} {name.lower()} types"]
    box = [f"-40.0 40.0 {axis}lo {axis}hi" for axis in "xyz"]
    sections = [f"{name}\n\n" + "\n".join(listed) for name, listed in lines.items()]
    return "\n".join(["AMBER", "", *counts, *box, ""]) + "\n" + "\n\n".join(sections) + "\n"


def test_amber_in_lammps_is_amber_in_openmm(tmp_path):
    """ff19SB without its correction maps, computed by two programs: bonds, angles, torsions, 1-4 scaling, units."""
    openmm_settings = ReferenceSettings(calculator="openmm", arguments={"pdb": "alanine_dipeptide.pdb", "cmap": False})
    atoms = read(ALANINE / "c7eq.extxyz")
    pdb = app.PDBFile(str(ALANINE / "alanine_dipeptide.pdb"))
    system = app.ForceField("amber19/protein.ff19SB.xml").createSystem(pdb.topology, nonbondedMethod=app.NoCutoff)
    (tmp_path / "alanine.data").write_text(amber_data(system, atoms.get_chemical_symbols(), atoms.positions))
    lammps_settings = ReferenceSettings(
        calculator="lammps",
        arguments={
            "data": "alanine.data",
            "elements": atoms.get_chemical_symbols(),
            "units": "real",
            "atom_style": "full",
            "styles": [
                "special_bonds lj 0.0 0.0 0.5 coul 0.0 0.0 0.83333333333333333",
                "pair_style lj/cut/coul/cut 60.0",
                "pair_modify mix arithmetic",
                "bond_style harmonic",
                "angle_style harmonic",
                "dihedral_style fourier",
            ],
            "commands": [],
        },
    )
    for seed in range(3):
        moved = atoms.copy()
        moved.rattle(0.05, seed=seed)
        moved.positions += 30.0 * seed  # a molecule in vacuum is nowhere in particular
        ours, theirs = label(moved, lammps_settings, tmp_path), label(moved, openmm_settings, ALANINE)
        assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(ours.get_forces(), theirs.get_forces(), atol=1e-6)


def test_the_whole_cell_of_a_data_file(tmp_path):
    small, whole = chain(tmp_path), chain(tmp_path, repeat=[1, 1, 1])
    atoms = whole.structure()
    assert len(atoms) == 10
    atoms.calc = whole
    half = small.structure()
    half.calc = small
    assert atoms.get_potential_energy() / 2 == pytest.approx(half.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(atoms.get_forces()[::2], half.get_forces(), atol=1e-12)
    np.testing.assert_allclose(atoms.get_stress(), half.get_stress(), atol=1e-15)


def test_data_files_and_structures_that_do_not_fit(tmp_path):
    with pytest.raises(SettingsError, match="not an exact 1 x 2 x 1 repetition"):
        chain(tmp_path, repeat=[1, 2, 1])
    with pytest.raises(SettingsError, match="three whole numbers"):
        chain(tmp_path, repeat=[2, 1])
    with pytest.raises(SettingsError, match=r"no LAMMPS data file chain\.dat;"):
        chain(tmp_path, data="chain.dat")
    with pytest.raises(SettingsError, match="elements names 3 types but the data file has type 4"):
        chain(tmp_path, elements=["C", "N", "C"])
    with pytest.raises(SettingsError, match=r"LAMMPS refused 'read_data .*chain.data' .*[Bb]ond"):
        chain(tmp_path, styles=[])
    calculator = chain(tmp_path)
    atoms = calculator.structure()
    with pytest.raises(LabelError, match=r"Atom 0 .* is O in the structure but C"):
        calculator.calculate(atoms[::-1])
    with pytest.raises(LabelError, match="has 4 atoms but the reference's data file 5"):
        calculator.calculate(atoms[:4])
    torn = atoms.copy()
    torn.positions[1, 0] += 2.9
    torn.positions[2, 0] -= 2.9
    with pytest.raises(LabelError, match=r"bond between atoms . and . .* torn"):
        calculator.calculate(torn)
    atoms.pbc = (True, True, False)
    with pytest.raises(LabelError, match="periodic in all directions"):
        calculator.calculate(atoms)


# --- settings and failures ----------------------------------------------------------------------------------------


def test_settings_that_lammps_or_we_refuse():
    def make(**changes):
        arguments = {"commands": ARGON, "elements": ["Ar"]} | changes
        return make_calculator(ReferenceSettings(calculator="lammps", arguments=arguments), HERE)

    with pytest.raises(SettingsError, match="units = 'si' is not supported; use 'metal' or 'real'"):
        make(units="si")
    with pytest.raises(SettingsError, match="'Xx' is not an element"):
        make(elements=["Xx"])
    with pytest.raises(SettingsError, match="lists an element twice"):
        make(elements=["Ar", "Ar"])
    with pytest.raises(SettingsError, match="need a data file"):
        make(repeat=[2, 1, 1])
    wrong = make(commands=["pair_style lj/cut 6.0", "pair_coeff 1 1 0.0103"])
    with pytest.raises(SettingsError, match=r"LAMMPS refused 'pair_coeff 1 1 0.0103' .*arguments"):
        wrong.calculate(crystal(0))
    with pytest.raises(LabelError, match="no type for Cu"):
        make().calculate(bulk("Cu", cubic=True))


def test_files_in_commands_are_those_of_the_settings_folder_first(tmp_path):
    folder = tmp_path / "two words"
    folder.mkdir()
    source = make_calculator(SILICON, tmp_path)._commands[1].split()[3]
    text = Path(source).read_text().replace("2.1683", "4.3366")  # twice the well depth
    (folder / "Si.sw").write_text(text)
    (folder / "Si").write_text("not the element")
    cell = bulk("Si", cubic=True)
    assert label(cell, SILICON, folder).get_potential_energy() == pytest.approx(
        2 * label(cell, SILICON, tmp_path).get_potential_energy(), rel=1e-6
    )


def test_commands_as_text_and_from_a_file(argon, tmp_path):
    atoms = crystal(0)
    atoms.calc = argon
    text = "# argon\n\n" + "\n".join(ARGON).replace("6.0", "6.0  # Å") + "\n"
    (tmp_path / "argon.in").write_text(text)
    for commands in (text, ["include argon.in"]):
        settings = ReferenceSettings(calculator="lammps", arguments={"commands": commands, "elements": ["Ar"]})
        assert label(atoms, settings, tmp_path).get_potential_energy() == atoms.get_potential_energy()


def test_a_failed_label_costs_only_itself(argon):
    salt = LAMMPS(
        [*COULOMB, "kspace_style ewald 1e-6"],
        ["Na", "Cl"],
        atom_style="charge",
    )
    good = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    salt.calculate(good)
    energy = salt.results["energy"]
    bad = good.copy()
    bad.pbc = False
    with pytest.raises(LabelError, match=r"LAMMPS failed: .*[Ee]wald"):
        salt.calculate(bad)
    salt.calculate(good)
    assert salt.results["energy"] == energy
