"""References against the programs themselves: skipped where a program or its data is not installed.

Debian: apt-get install lammps-examples quantum-espresso quantum-espresso-data cp2k; PyPI: tblite,
sevenn, chgnet.
"""

import gzip
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read, write

from ubmd.errors import LabelError, SettingsError
from ubmd.learning.work.workers import TaskFailed, Workers, outcome
from ubmd.references import label, make_calculator
from ubmd.references.origin import inspect_reference
from ubmd.references.programs import scratch_folders
from ubmd.references.quickff import DEBIAN_EXAMPLES, EXAMPLE, quickff_mil53
from ubmd.settings import ReferenceSettings

pytestmark = [pytest.mark.slow, pytest.mark.slow_ci]

HERE = Path(__file__).parent
PSEUDOPOTENTIAL = Path("/usr/share/doc/quantum-espresso/examples/atomic/pseudo-LDA-0.5/Si.pz-vbc.UPF.gz")

needs_quickff = pytest.mark.skipif(
    not (DEBIAN_EXAMPLES / EXAMPLE / "lammps.data").exists(), reason="lammps-examples is not installed"
)
needs_espresso = pytest.mark.skipif(
    shutil.which("pw.x") is None or not PSEUDOPOTENTIAL.exists(), reason="quantum-espresso(-data) is not installed"
)
needs_cp2k = pytest.mark.skipif(shutil.which("cp2k_shell") is None, reason="cp2k is not installed")


def settings(calculator: str, **arguments) -> ReferenceSettings:
    return ReferenceSettings(calculator=calculator, arguments=arguments)


def slope(atoms: Atoms, change, h: float) -> float:
    """Central difference of the energy; ``change(atoms, step)`` moves something."""
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        change(moved, sign * h)
        moved.calc = atoms.calc
        energies.append(_energy(moved))
    return (energies[0] - energies[1]) / (2 * h)


def _energy(atoms: Atoms) -> float:
    """The free energy where the program tells it apart."""
    try:
        return atoms.get_potential_energy(force_consistent=True)
    except PropertyNotImplementedError:
        return atoms.get_potential_energy()


def assert_derivatives(atoms: Atoms, moves, strains, tolerance: float, h: float = 1e-3) -> None:
    """Forces (eV/Å) of the moves (atom, axis) and stresses (eV/Å^3) of the strains (Voigt index) against energies."""
    forces = atoms.get_forces()
    stress = atoms.get_stress() if strains else None
    for atom, axis in moves:

        def shift(moved, step, atom=atom, axis=axis):
            moved.positions[atom, axis] += step

        assert forces[atom, axis] == pytest.approx(-slope(atoms, shift, h), abs=tolerance)
    for component in strains:
        i, j = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)][component]

        def strain(moved, step, i=i, j=j):
            change = np.eye(3)
            change[i, j] += step / 2
            change[j, i] += step / 2
            moved.set_cell(moved.cell[:] @ change, scale_atoms=True)

        assert stress[component] == pytest.approx(slope(atoms, strain, h) / atoms.get_volume(), abs=tolerance)


def assert_nothing_left(program: str) -> None:
    """No scratch folder of this process and no process of the program."""
    assert scratch_folders() == []
    for _ in range(50):
        found = subprocess.run(["pgrep", "-x", program], capture_output=True, text=True, check=False).stdout.split()
        if not any(_is_ours(int(process)) for process in found):
            return
        time.sleep(0.1)
    pytest.fail(f"{program} is still running: {found}")


def _is_ours(process: int) -> bool:
    """Whether the process was started by this test (others may use the same program on this machine)."""
    try:
        words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"UBMD_TEST={os.getpid()}".encode() in words


@pytest.fixture(autouse=True)
def marked(monkeypatch, tmp_path):
    """Children inherit a mark; scratch folders are in a place of this test's own."""
    monkeypatch.setenv("UBMD_TEST", str(os.getpid()))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


# --- QuickFF through LAMMPS ---------------------------------------------------------------------------------------


@needs_quickff
def test_quickff_small_and_double_cell_agree_and_are_derivatives():
    single, double = quickff_mil53(), quickff_mil53(cell="double")
    atoms = single.structure()
    assert atoms.get_chemical_formula() == "C32H20Al4O20"
    assert 1410 < atoms.get_volume() < 1450  # large pore
    rng = np.random.default_rng(0)
    atoms.positions += rng.uniform(-0.1, 0.1, (76, 3))
    atoms.set_cell(atoms.cell[:] @ (np.eye(3) + rng.uniform(-0.05, 0.05, (3, 3))), scale_atoms=True)
    atoms.calc = single
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    assert_derivatives(atoms, [(0, 0), (30, 2), (40, 1), (75, 1)], [0, 2, 4], 1e-5, h=1e-4)

    # The data file lists the two copies of an atom one after the other.
    whole = double.structure()
    fractions = np.linalg.solve(single.structure().cell[:].T, (whole.positions - whole.positions[0]).T).T
    copies = np.rint(fractions - np.repeat(fractions[::2], 2, axis=0))
    whole.set_cell(atoms.cell[:] * [[2], [1], [1]])
    whole.positions = np.repeat(atoms.positions, 2, axis=0) + copies @ atoms.cell[:]
    whole.calc = double
    assert whole.get_potential_energy() / 2 == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(whole.get_forces()[::2], forces, atol=1e-9)
    np.testing.assert_allclose(whole.get_stress(), stress, atol=1e-12)

    # as MD with wrapping leaves it
    wrapped = atoms.copy()
    wrapped.positions += rng.integers(-2, 3, (76, 3)) @ atoms.cell[:]
    wrapped.calc = single
    np.testing.assert_allclose(wrapped.get_forces(), forces, atol=1e-9)


@needs_quickff
def test_quickff_is_at_rest_where_its_authors_left_it():
    """The example's structure is that of its authors' minimisation or MD: near-equilibrium bonds, modest forces."""
    atoms = quickff_mil53().structure()
    labelled = label(atoms, settings("quickff_mil53"), HERE)
    assert np.abs(labelled.get_forces()).max() < 1.0
    assert np.abs(labelled.get_stress()).max() < 0.01


def test_quickff_without_the_examples_names_the_package(tmp_path):
    with pytest.raises(SettingsError, match="apt-get install lammps-examples"):
        make_calculator(settings("quickff_mil53", examples=str(tmp_path)), HERE)


# --- tblite -------------------------------------------------------------------------------------------------------


def test_tblite_water_has_the_numbers_of_tblites_documentation():
    pytest.importorskip("tblite")
    water = label(molecule("H2O"), settings("tblite"), HERE)
    assert water.get_potential_energy() == pytest.approx(-156.96750590276173, abs=1e-6)
    np.testing.assert_allclose(
        water.get_forces()[:, 1:],
        [[0, -0.784252969], [-0.228835628, 0.392126485], [0.228835628, 0.392126485]],
        atol=5e-5,
    )


def test_tblite_labels_are_derivatives_and_independent_of_each_other():
    pytest.importorskip("tblite")
    rng = np.random.default_rng(1)
    water = molecule("H2O").positions
    ice = Atoms("OH2OH2", np.vstack([water, water + np.array([2.8, 0.5, 0.3])]))
    ice.set_cell([[5.5, 0.2, 0], [0, 5.0, 0.3], [0.4, 0, 5.2]])
    ice.pbc = True
    ice.rattle(0.05, rng=rng)
    reference = settings("tblite", accuracy=0.001)
    ice.calc = make_calculator(reference, HERE)
    assert_derivatives(ice, [(0, 0), (4, 2)], range(6), 2e-5)
    first = label(ice, settings("tblite"), HERE)
    moved = ice.copy()
    moved.rattle(0.05, rng=rng)
    label(moved, settings("tblite"), HERE)
    # Started from the last structure's solution they would differ by 1e-5 eV/Å; sums may end in another last digit.
    again = label(ice, settings("tblite"), HERE)
    np.testing.assert_allclose(again.get_forces(), first.get_forces(), rtol=0, atol=1e-12)


def test_tblite_without_convergence_is_rejected_and_the_next_label_is_not():
    pytest.importorskip("tblite")
    with pytest.raises(LabelError, match=r"did not converge .*2 cycles"):
        label(molecule("H2O"), settings("tblite", max_iterations=2), HERE)
    label(molecule("H2O"), settings("tblite"), HERE)
    with pytest.raises(SettingsError, match="GFN9"):
        make_calculator(settings("tblite", method="GFN9"), HERE)


# --- foundation models --------------------------------------------------------------------------------------------


NETWORKS = {"sevennet": ("sevenn", "7net-0"), "chgnet": ("chgnet", "0.3.0")}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> str:
    """Name of the reference; its calculator is made once in this process."""
    if find_spec(NETWORKS[request.param][0]) is None:
        pytest.skip(f"the package {NETWORKS[request.param][0]} is not installed")
    return request.param


def oxide() -> Atoms:
    """Strained rock salt MgO with displaced atoms."""
    crystal = bulk("MgO", "rocksalt", a=4.25, cubic=True)
    crystal.set_cell(crystal.cell[:] @ [[1.01, 0.02, 0], [0, 0.99, 0.01], [0, 0, 1.015]], scale_atoms=True)
    crystal.rattle(0.1, seed=1)
    return crystal


def test_foundation_models_are_made_offline_in_silence_and_say_what_they_are(network, monkeypatch, capfd):
    def refused(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    record = inspect_reference(settings(network), HERE)
    label(oxide(), settings(network), HERE)
    package, model = NETWORKS[network]
    assert record["packages"] == {package: version(package)}
    assert record["model"] == model
    assert capfd.readouterr() == ("", "")


def test_labels_of_foundation_models_are_derivatives(network):
    atoms = oxide()
    atoms.calc = make_calculator(settings(network), HERE)
    # The energies have float32's noise: 4e-6 eV, which is 4e-4 eV/Å and 1e-5 eV/Å^3 after the division.
    assert_derivatives(atoms, [(0, 0), (5, 1)], [], 2e-3, h=5e-3)
    assert_derivatives(atoms, [], range(6), 1e-4, h=2e-3)
    assert np.abs(atoms.get_stress()).min() > 4e-4
    assert np.abs(atoms.get_forces()[[0, 5], [0, 1]]).min() > 0.02


IN_A_WORKER = """
import sys
from pathlib import Path
from ase.io import read, write
from ubmd.learning.work.workers import Workers, outcome
from ubmd.references import label
from ubmd.settings import ReferenceSettings

with Workers(1) as workers:
    reference = ReferenceSettings(calculator=sys.argv[1])
    write("labelled.traj", outcome(workers.submit(label, read("oxide.traj"), reference, Path(), timeout=300)))
"""


def test_labels_of_foundation_models_do_not_depend_on_each_other_or_on_the_worker(network, tmp_path):
    write(tmp_path / "oxide.traj", oxide())
    command = [sys.executable, "-c", IN_A_WORKER, network]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # no warning of what a killed worker leaves
    first = label(oxide(), settings(network), HERE)
    label(molecule("H2O"), settings(network), HERE)
    for other in (label(oxide(), settings(network), HERE), read(tmp_path / "labelled.traj")):
        assert other.get_potential_energy() == first.get_potential_energy()
        np.testing.assert_array_equal(other.get_forces(), first.get_forces())


def test_foundation_models_take_molecules_and_slabs_of_any_orientation(network):
    labelled = label(molecule("H2O"), settings(network), HERE)
    boxed = molecule("H2O")
    boxed.set_cell([20.0, 20.0, 20.0])
    boxed.center()
    boxed.pbc = True
    boxed = label(boxed, settings(network), HERE)
    assert labelled.get_potential_energy() == pytest.approx(boxed.get_potential_energy(), abs=2e-5)
    np.testing.assert_allclose(labelled.get_forces(), boxed.get_forces(), atol=2e-4)
    slab = bulk("MgO", "rocksalt", a=4.2, cubic=True)
    flat = Atoms(slab.symbols, slab.positions, cell=[4.2, 4.2, 25.0], pbc=[True, True, False])
    turned = Atoms(slab.symbols, slab.positions, cell=[[0, 0, 25.0], [4.2, 0, 0], [0, 4.2, 0]], pbc=[False, True, True])
    gap = Atoms(slab.symbols, slab.positions, cell=[4.2, 4.2, 25.0], pbc=True)
    flat, turned, gap = (label(atoms, settings(network), HERE) for atoms in (flat, turned, gap))
    for other in (turned, gap):
        assert other.get_potential_energy() == pytest.approx(flat.get_potential_energy(), abs=1e-4)
        np.testing.assert_allclose(other.get_forces(), flat.get_forces(), atol=2e-4)
        np.testing.assert_allclose(other.get_stress()[[0, 1]], flat.get_stress()[[0, 1]], atol=2e-6)
    assert not flat.get_stress()[2:5].any()


def test_foundation_models_refuse_what_they_were_not_trained_on(network):
    with pytest.raises(SettingsError, match="was not trained on Po:"):
        label(bulk("Po", "sc", a=3.3), settings(network), HERE)
    with pytest.raises(LabelError, match="has no neighbour within"):
        label(Atoms("Si"), settings(network), HERE)
    with pytest.raises(SettingsError, match=r"neither a file nor weights that the package .* contains"):
        make_calculator(settings(network, model="7net-omni"), HERE)
    with pytest.raises(SettingsError, match="did you mean 'device'"):
        make_calculator(settings(network, devise="cpu"), HERE)


# --- Quantum ESPRESSO ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def silicon(tmp_path_factory):
    """Function that makes settings for pw.x and Si; the pseudopotential is that of its examples."""
    folder = tmp_path_factory.mktemp("pseudo")
    if PSEUDOPOTENTIAL.exists():
        (folder / "Si.pz-vbc.UPF").write_bytes(gzip.decompress(PSEUDOPOTENTIAL.read_bytes()))

    def make(input_data: dict | None = None, **arguments) -> ReferenceSettings:
        given = {
            "pseudopotentials": {"Si": "Si.pz-vbc.UPF"},
            "pseudo_dir": str(folder),
            "input_data": {"ecutwfc": 16.0} | (input_data or {}),
            "kpts": [2, 2, 2],
        }
        return ReferenceSettings(calculator="espresso", arguments=given | arguments)

    return make


def distorted_silicon() -> Atoms:
    atoms = bulk("Si", a=5.4)
    atoms.rattle(0.05, seed=1)
    return atoms


@needs_espresso
def test_espresso_finds_the_lattice_constant_of_silicon(silicon):
    """LDA with this potential: 10.20 Bohr = 5.40 Å at 2 x 2 x 2 k points is near rest; 3 % away it is not."""
    tight = silicon({"ecutwfc": 24.0}, kpts=[4, 4, 4])
    stress = [label(bulk("Si", a=a), tight, HERE).get_stress()[:3].mean() for a in (5.24, 5.40, 5.56)]
    assert stress[0] < -0.02 < 0.02 < stress[2]
    assert abs(stress[1]) < 0.006  # 1 GPa
    # bulk modulus 96 GPa (LDA): dσ/dε of an isotropic strain is 3 B
    assert (stress[2] - stress[0]) / (0.32 / 5.40) / 3 * 160.2 == pytest.approx(96, abs=8)


@needs_espresso
@pytest.mark.parametrize("smeared", [False, True])
def test_espresso_forces_are_derivatives_of_its_energy(silicon, smeared):
    """Also with smeared electrons: the label's energy is the free energy then."""
    extra = {"occupations": "smearing", "smearing": "fermi-dirac", "degauss": 0.05} if smeared else {}
    atoms = distorted_silicon()
    reference = silicon({"conv_thr": 1e-11} | extra)
    atoms.calc = make_calculator(reference, HERE)
    assert_derivatives(atoms, [(0, 0), (1, 2)], [], 5e-4, h=0.01)
    labelled = label(atoms, reference, HERE)
    assert labelled.get_potential_energy() == pytest.approx(_energy(atoms))


@needs_espresso
def test_espresso_failures_are_rejected_with_a_reason_and_leave_nothing(silicon):
    for data in ({"electron_maxstep": 2}, {"electron_maxstep": 2, "scf_must_converge": False}):
        with pytest.raises(LabelError, match="SCF did not converge"):
            label(distorted_silicon(), silicon(data), HERE)
    with pytest.raises(LabelError, match=r"Quantum ESPRESSO stopped: .*occupations nope not implemented"):
        label(distorted_silicon(), silicon({"occupations": "nope"}), HERE)
    with pytest.raises(LabelError, match="no pseudopotential for O"):
        label(bulk("MgO", "rocksalt", a=4.2), silicon(pseudopotentials={"Mg": "Si.pz-vbc.UPF"}), HERE)
    with pytest.raises(LabelError, match="computes periodic cells"):
        label(molecule("Si2H6"), silicon(), HERE)
    with pytest.raises(SettingsError, match="apt-get install quantum-espresso"):
        make_calculator(silicon(command="pw.exe"), HERE)
    with pytest.raises(SettingsError, match=r"no file Ge\.UPF"):
        make_calculator(silicon(pseudopotentials={"Ge": "Ge.UPF"}), HERE)
    with pytest.raises(SettingsError, match="no folder"):
        make_calculator(silicon(pseudo_dir="nowhere"), HERE)
    assert_nothing_left("pw.x")


@needs_espresso
def test_espresso_with_an_mpi_launcher_gives_the_same_label(silicon):
    launcher = shutil.which("mpiexec.openmpi") or pytest.skip("OpenMPI's launcher is not installed")
    allow = " --allow-run-as-root --oversubscribe"
    one = label(distorted_silicon(), silicon(), HERE)
    two = label(distorted_silicon(), silicon(launcher=f"{launcher}{allow} -n 2"), HERE)
    np.testing.assert_allclose(two.get_forces(), one.get_forces(), atol=1e-4)


@needs_espresso
def test_espresso_in_workers_side_by_side_and_one_that_takes_too_long(silicon):
    """No file of one label gets in the way of another; a time-out ends the program, too."""
    rng = np.random.default_rng(5)
    structures = [bulk("Si", a=5.4) for _ in range(4)]
    for atoms in structures:
        atoms.rattle(0.1, rng=rng)
    minutes = silicon({"ecutwfc": 60.0, "nosym": True}, kpts=[8, 8, 8])
    with Workers(2) as workers:
        futures = [workers.submit(label, atoms, silicon(), HERE, timeout=120) for atoms in structures]
        late = workers.submit(label, structures[0], minutes, HERE, timeout=8)
        labelled = [outcome(future) for future in futures]
        with pytest.raises(TaskFailed, match="longer than the limit"):
            outcome(late)
    for atoms, ours in zip(structures, labelled, strict=True):
        np.testing.assert_allclose(label(atoms, silicon(), HERE).get_forces(), ours.get_forces())
    assert_nothing_left("pw.x")


# --- CP2K ---------------------------------------------------------------------------------------------------------


def water_cell() -> Atoms:
    water = molecule("H2O")
    water.set_cell([5, 5, 5])
    water.center()
    water.pbc = True
    water.rattle(0.05, seed=1)
    return water


CHEAP = {"cutoff": 280.0, "basis_set": "SZV-MOLOPT-SR-GTH"}


@needs_cp2k
def test_cp2k_forces_are_derivatives_of_its_energy():
    atoms = water_cell()
    atoms.calc = make_calculator(settings("cp2k", **CHEAP | {"eps_scf": 1e-7}), HERE)
    # the grid of this cutoff leaves some 1e-3 eV/Å
    assert_derivatives(atoms, [(1, 1)], [], 5e-3, h=0.01)
    labelled = label(atoms, settings("cp2k", **CHEAP), HERE)
    assert labelled.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
    assert labelled.get_stress().shape == (6,)
    assert_nothing_left("cp2k_shell")


@needs_cp2k
def test_cp2k_failures_are_rejected_with_a_reason_and_leave_nothing():
    with pytest.raises(LabelError, match="SCF did not converge"):
        label(water_cell(), settings("cp2k", max_scf=2, outer_scf=1, **CHEAP), HERE)
    with pytest.raises(LabelError, match=r"CP2K stopped: .*basis set <NOPE> for element <O>"):
        label(water_cell(), settings("cp2k", basis_set={"O": "NOPE", "H": "NOPE"}), HERE)
    with pytest.raises(LabelError, match="needs a cell"):
        label(molecule("H2O"), settings("cp2k", **CHEAP), HERE)
    with pytest.raises(SettingsError, match="apt-get install cp2k"):
        make_calculator(settings("cp2k", command="no_cp2k"), HERE)
    with pytest.raises(SettingsError, match="cutof is unknown to cp2k"):
        make_calculator(settings("cp2k", cutof=1.0), HERE)
    with pytest.raises(SettingsError, match="basis_set and the potential of Au"):
        make_calculator(settings("cp2k", preset="paper"), HERE).calculate(bulk("Au"))
    assert_nothing_left("cp2k_shell")


@needs_cp2k
def test_cp2k_with_an_input_of_ones_own(tmp_path):
    """A template for GFN1-xTB, far from the built-in input; tblite computes the same method, with other Ewald sums."""
    pytest.importorskip("tblite")
    (tmp_path / "xtb.inp").write_text(
        "&FORCE_EVAL\n &DFT\n  &QS\n   METHOD xTB\n   &XTB\n    DO_EWALD T\n   &END XTB\n  &END QS\n"
        "  &SCF\n   EPS_SCF 1E-7\n  &END SCF\n &END DFT\n&END FORCE_EVAL\n"
    )
    water = molecule("H2O")
    water.set_cell([12, 12, 12])
    water.center()
    water.pbc = True
    ours = label(water, settings("cp2k", template="xtb.inp"), tmp_path)
    other = label(water, settings("tblite"), tmp_path)
    assert ours.get_potential_energy() == pytest.approx(other.get_potential_energy(), abs=2e-3)
    np.testing.assert_allclose(ours.get_forces(), other.get_forces(), atol=0.02)
    (tmp_path / "named.inp").write_text("&GLOBAL\n PROJECT water\n&END GLOBAL\n")
    with pytest.raises(SettingsError, match=r"PROJECT already present .* leave that keyword out"):
        label(water, settings("cp2k", template="named.inp"), tmp_path)
