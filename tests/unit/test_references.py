"""References: OpenMM labels against OpenMM itself and finite differences, rejections, reference MD."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import openmm
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import FileIOCalculator, SCFError
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from openmm import app, unit

from ubmd.errors import LabelError, SettingsError
from ubmd.references import energy_jumps, label, make_calculator, sample, sample_trajectory
from ubmd.references.labels import force_jumps
from ubmd.references.networks import network_calculator, weights_file
from ubmd.references.programs import command_line, scratch_folder, scratch_folders, sweep_scratch
from ubmd.references.results import read_results
from ubmd.settings import ReferenceSettings, SamplingSettings

EXAMPLE = Path(__file__).parents[2] / "lammps_examples" / "alanine_dipeptide"
ALANINE = ReferenceSettings(calculator="openmm", arguments={"pdb": "alanine_dipeptide.pdb"})
NO_CMAP = ReferenceSettings(calculator="openmm", arguments={"pdb": "alanine_dipeptide.pdb", "cmap": False})
EMT_SETTINGS = ReferenceSettings(calculator="ase.calculators.emt:EMT", force_limit=1000.0)
# Energies of OpenMM are in kJ/mol; 1 eV = 96.485332 kJ/mol (CODATA), independent of ase.units.
KJ_PER_MOL = 1.0 / 96.48533212


@pytest.fixture
def calculator_module(monkeypatch, request):
    """Function that makes a calculator class importable and returns its import path."""

    def register(kind: type) -> str:
        module = ModuleType(f"calculators_of_{request.node.name.partition('[')[0]}_{kind.__name__}")
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return f"{module.__name__}:{kind.__name__}"

    return register


def alanine(seed: int = 0, shift: float = 0.05) -> Atoms:
    atoms = read(EXAMPLE / "c7eq.extxyz")
    atoms.positions += np.random.default_rng(seed).uniform(-shift, shift, size=(22, 3))
    return atoms


def test_openmm_labels_equal_a_context_built_by_hand():
    pdb = app.PDBFile(str(EXAMPLE / "alanine_dipeptide.pdb"))
    system = app.ForceField("amber19/protein.ff19SB.xml").createSystem(pdb.topology, nonbondedMethod=app.NoCutoff)
    assert system.getNumConstraints() == 0
    simulation = app.Simulation(
        pdb.topology, system, openmm.VerletIntegrator(1e-3), openmm.Platform.getPlatformByName("Reference")
    )
    for seed in range(3):
        atoms = alanine(seed)
        simulation.context.setPositions(atoms.positions * unit.angstrom)
        state = simulation.context.getState(getEnergy=True, getForces=True)
        energy = state.getPotentialEnergy() / unit.kilojoule_per_mole * KJ_PER_MOL
        force_unit = unit.kilojoule_per_mole / unit.angstrom
        forces = np.array(state.getForces().value_in_unit(force_unit)) * KJ_PER_MOL
        labelled = label(atoms, ALANINE, EXAMPLE)
        assert labelled.get_potential_energy() == pytest.approx(energy, rel=1e-6)
        np.testing.assert_allclose(labelled.get_forces(), forces, rtol=1e-6, atol=1e-8)


def test_openmm_forces_are_derivatives_of_the_energy():
    atoms = alanine()
    atoms.calc = make_calculator(ALANINE, EXAMPLE)
    forces = atoms.get_forces()
    step = 1e-4
    for index, axis in [(0, 0), (4, 1), (8, 2), (14, 0), (16, 1), (21, 2)]:
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[index, axis] += sign * step
            moved.calc = atoms.calc
            energies.append(moved.get_potential_energy())
        assert forces[index, axis] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=1e-6)


def test_start_structure_is_a_labelled_minimum_in_the_c7eq_basin():
    atoms = read(EXAMPLE / "c7eq.extxyz")
    assert np.abs(atoms.get_forces()).max() < 1e-3
    # the file was written by make_inputs.py; the reference of today must still agree with it
    fresh = label(atoms, ALANINE, EXAMPLE)
    assert fresh.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    phi, psi = ((atoms.get_dihedral(*four) + 180) % 360 - 180 for four in ([4, 6, 8, 14], [6, 8, 14, 16]))
    assert phi == pytest.approx(-80, abs=15)
    assert psi == pytest.approx(70, abs=15)
    # L-alanine: seen from HA, the substituents CO, R (CB), N run clockwise
    ha, cb, c = (atoms.positions[i] - atoms.positions[8] for i in (9, 10, 14))
    assert ha @ np.cross(c, cb) < -1.0


def test_cmap_can_be_switched_off():
    atoms = alanine()
    with_cmap, without = label(atoms, ALANINE, EXAMPLE), label(atoms, NO_CMAP, EXAMPLE)
    difference = with_cmap.get_forces() - without.get_forces()
    assert abs(with_cmap.get_potential_energy() - without.get_potential_energy()) > 1e-2
    moved = np.flatnonzero(np.abs(difference).max(axis=1) > 1e-9)
    assert set(moved) == {4, 6, 8, 14, 16}  # CMAP acts on the backbone atoms of phi and psi only


def test_label_leaves_its_argument_alone_and_keeps_info():
    atoms = alanine()
    atoms.info["step"] = 40
    positions = atoms.positions.copy()
    labelled = label(atoms, ALANINE, EXAMPLE)
    assert atoms.calc.name != "openmm"
    np.testing.assert_array_equal(atoms.positions, positions)
    assert labelled is not atoms
    assert labelled.info["step"] == 40
    assert set(labelled.calc.results) == {"energy", "forces"}


def test_any_ase_calculator_and_stress_of_periodic_structures():
    cell = bulk("Cu", cubic=True) * (2, 1, 1)
    cell.rattle(0.1, seed=1)
    labelled = label(cell, EMT_SETTINGS, Path())
    cell.calc = EMT()
    assert labelled.get_potential_energy() == pytest.approx(cell.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(labelled.get_stress(), cell.get_stress(), rtol=1e-12)
    molecule = cell.copy()
    molecule.pbc = False
    assert "stress" not in label(molecule, EMT_SETTINGS, Path()).calc.results


def test_noise_of_labels_has_its_width_and_belongs_to_the_structure():
    atoms = bulk("Cu", cubic=True).repeat(3)
    noisy = EMT_SETTINGS.model_copy(update={"noise": 0.002})
    exact, first = label(atoms, EMT_SETTINGS, Path()), label(atoms, noisy, Path())
    noise = first.get_forces() - exact.get_forces()
    assert noise.std() == pytest.approx(0.002, rel=0.15)  # of 324 numbers: 4 %
    assert np.array_equal(label(atoms, noisy, Path()).get_forces(), first.get_forces())
    moved = atoms.copy()
    moved.positions[0, 0] += 1e-9
    assert not np.allclose(label(moved, noisy, Path()).get_forces(), first.get_forces(), atol=1e-6)


def test_calculator_is_made_once_per_process(calculator_module):
    """Building ff19SB takes 0.1 s and a label less than 1 ms, so labels must not rebuild it."""
    made = []

    class Counting(EMT):
        def __init__(self):
            made.append(1)
            super().__init__()

    settings = ReferenceSettings(calculator=calculator_module(Counting))
    for _ in range(3):
        label(bulk("Cu", cubic=True), settings, Path())
    assert len(made) == 1


# --- rejections -------------------------------------------------------------------------------------------------


def test_rejects_atoms_that_are_too_close():
    atoms = alanine()
    atoms.positions[1] = atoms.positions[4] + [0.6, 0.0, 0.0]
    with pytest.raises(LabelError, match=r"Atoms 1 \(C\) and 4 \(C\) are too close: 0.600 Å, limit 0.760 Å"):
        label(atoms, ALANINE, EXAMPLE)


def test_rejects_atoms_at_one_place_whatever_the_limit():
    atoms = bulk("Cu", cubic=True)
    atoms.positions[1] = atoms.positions[0] + atoms.cell[2]
    settings = EMT_SETTINGS.model_copy(update={"min_distance": 0.0})
    with pytest.raises(LabelError, match=r"atoms 0 \(Cu\) and 1 \(Cu\), counted from 0, are at the same place"):
        label(atoms, settings, Path())


def test_rejects_atoms_too_close_through_the_periodic_boundary():
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [9.5, 0, 0]], cell=[10, 10, 10], pbc=True)
    with pytest.raises(LabelError, match=r"too close: 0\.500 Å"):
        label(atoms, EMT_SETTINGS, Path())
    atoms.pbc = False
    label(atoms, EMT_SETTINGS, Path())


def test_rejects_large_forces():
    settings = ALANINE.model_copy(update={"force_limit": 2.0})
    with pytest.raises(LabelError, match=r"force on atom \d+ .* above the limit 2 eV/Å"):
        label(alanine(), settings, EXAMPLE)


def test_rejects_positions_that_are_not_finite():
    atoms = alanine()
    atoms.positions[3, 1] = np.nan
    with pytest.raises(LabelError, match=r"position of atom 3 \(from 0\) is not finite"):
        label(atoms, ALANINE, EXAMPLE)


@pytest.mark.parametrize(
    ("cell", "pbc", "message"),
    [
        (
            [[5, 0, 0], [5, 0, 0], [0, 0, 9]],
            [True, True, False],
            "vectors a and b, but these cell vectors are parallel",
        ),
        ([[5, 0, 0], [0, 5, 0], [5, 5, 0]], True, "the cell is flat"),
        ([[5, 0, 0], [0, np.nan, 0], [0, 0, 5]], True, "NaN or infinity"),
    ],
)
def test_rejects_cells_that_are_no_lattice(cell, pbc, message):
    atoms = Atoms("Cu2", [[0, 0, 0], [2.5, 0, 0]], cell=cell, pbc=pbc)
    with pytest.raises(LabelError, match=message):
        label(atoms, ReferenceSettings(calculator="ase.calculators.emt:EMT"), EXAMPLE)


def test_rejects_wrong_composition_and_order():
    with pytest.raises(LabelError, match="has 3 atoms but the PDB file 22"):
        label(molecule("H2O"), ALANINE, EXAMPLE)
    with pytest.raises(LabelError, match=r"Atom 0 \(from 0\) is C in the structure but H"):
        label(alanine()[[1, 0, *range(2, 22)]], ALANINE, EXAMPLE)
    periodic = alanine()
    periodic.set_cell([20, 20, 20])
    periodic.pbc = True
    with pytest.raises(LabelError, match="vacuum"):
        label(periodic, ALANINE, EXAMPLE)


class BadEMT(EMT):
    """A real calculator with one fault."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def calculate(self, *args, **kwargs):
        if self.fault == "crash":
            raise RuntimeError("segment lost")
        if self.fault == "scf":
            raise SCFError("energy oscillates")
        super().calculate(*args, **kwargs)
        if self.fault == "nan":
            self.results["forces"][0, 0] = np.nan
        if self.fault == "shape":
            self.results["forces"] = self.results["forces"][:1]
        if self.fault == "unconverged":
            self.converged = False


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", r"failed \(RuntimeError: segment lost\)"),
        ("scf", "did not converge"),
        ("unconverged", "did not converge"),
        ("nan", r"not finite \(forces\)"),
        ("shape", "forces of shape"),
    ],
)
def test_rejects_failed_calculations(fault, message, calculator_module):
    settings = ReferenceSettings(calculator=calculator_module(BadEMT), arguments={"fault": fault})
    cell = bulk("Cu", cubic=True)
    with pytest.raises(LabelError, match=message):
        label(cell, settings, Path())


# --- folders, environment, programs -------------------------------------------------------------------------------


class Copying(FileIOCalculator):
    """A file-based calculator as ASE makes them: a program runs in its directory, and what it leaves is read."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def write_input(self, atoms, properties=None, system_changes=None):
        super().write_input(atoms, properties, system_changes)
        (Path(self.directory) / "in.txt").write_text(f"{atoms.positions[0, 0]}\n")

    def read_results(self):
        with Path(os.environ["UBMD_TEST_LOG"]).open("a") as log:
            log.write(f"{Path(self.directory).resolve()}\n")
        energy = float((Path(self.directory) / "out.txt").read_text())
        self.results = {"energy": energy, "forces": np.zeros((1, 3))}


def test_file_based_calculators_get_a_folder_per_label(calculator_module, tmp_path, monkeypatch):
    """Otherwise workers overwrite each other's files in the working directory."""
    monkeypatch.setenv("UBMD_TEST_LOG", str(tmp_path / "folders"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = "cp in.txt out.txt"
    settings = ReferenceSettings(calculator=calculator_module(Copying), arguments={"command": command})
    for x in (1.0, 2.0):
        assert label(Atoms("H", [[x, 0, 0]]), settings, tmp_path).get_potential_energy() == x
    first, second = (Path(line) for line in (tmp_path / "folders").read_text().split())
    assert first != second
    assert first.parent == second.parent == tmp_path
    failing = settings.model_copy(update={"arguments": {"command": "touch rubbish && exit 3"}})
    with pytest.raises(LabelError, match=r"failed .*code 3"):
        label(Atoms("H", [[0, 0, 0]]), failing, tmp_path)
    own = settings.model_copy(update={"arguments": {"command": command, "directory": "mine"}})
    label(Atoms("H", [[3.0, 0, 0]]), own, tmp_path)
    # nothing is left but what was asked for
    assert {path.name for path in tmp_path.iterdir()} == {"folders", "mine"}


def test_calculators_in_memory_get_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    label(alanine(), ALANINE, EXAMPLE)


def test_file_based_calculators_sample_in_a_folder_of_their_own(calculator_module, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMD_TEST_LOG", str(tmp_path / "folders"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = ReferenceSettings(calculator=calculator_module(Copying), arguments={"command": "cp in.txt out.txt"})
    short = SamplingSettings(frames=2, stride=3, equilibration=2, trajectories=1)
    assert len(sample(Atoms("H", [[0, 0, 0]]), settings, short, tmp_path)) == 2
    assert len(set((tmp_path / "folders").read_text().split())) >= 3
    assert {path.name for path in tmp_path.iterdir()} == {"folders"}


def test_folders_of_killed_processes_are_removed_and_those_of_living_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = (
        "import os, signal, tempfile; from ubmd.references.programs import scratch_folder\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'wave').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert len(scratch_folders()) == 1
    with scratch_folder() as ours, scratch_folder() as another:
        assert scratch_folders() == sorted([ours, another])
        sweep_scratch()
        assert ours.is_dir()
        assert another.is_dir()
    assert scratch_folders() == []


def test_environment_holds_while_the_reference_runs(calculator_module, monkeypatch):
    monkeypatch.setenv("UBMD_TEST_CHANGED", "before")
    monkeypatch.delenv("UBMD_TEST_NEW", raising=False)
    seen = []

    class Looking(EMT):
        def __init__(self):
            seen.append((os.environ["UBMD_TEST_CHANGED"], os.environ["UBMD_TEST_NEW"]))
            super().__init__()

        def calculate(self, *args, **kwargs):
            seen.append((os.environ["UBMD_TEST_CHANGED"], os.environ["UBMD_TEST_NEW"]))
            super().calculate(*args, **kwargs)

    settings = ReferenceSettings(
        calculator=calculator_module(Looking), environment={"UBMD_TEST_CHANGED": "during", "UBMD_TEST_NEW": "4"}
    )
    label(bulk("Cu", cubic=True), settings, Path())
    assert set(seen) == {("during", "4")}
    assert os.environ["UBMD_TEST_CHANGED"] == "before"
    assert "UBMD_TEST_NEW" not in os.environ


def test_a_full_disk_is_no_fault_of_the_structure(calculator_module):
    class Full(EMT):
        def calculate(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        label(bulk("Cu", cubic=True), ReferenceSettings(calculator=calculator_module(Full)), Path())


def test_command_line_of_a_program():
    line = command_line("sh -e", "nice -n 5", 3, "dash")
    assert line[line.index("env") :] == ["env", "OMP_NUM_THREADS=3", "nice", "-n", "5", "sh", "-e"]
    done = subprocess.run([*line, "-c", "echo $OMP_NUM_THREADS"], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
    with pytest.raises(SettingsError, match=r"'no_such_program -s' is not installed .* apt-get install thing"):
        command_line("no_such_program -s", "", 1, "thing")
    with pytest.raises(SettingsError, match="launcher: there is no program 'no_mpiexec'"):
        command_line("sh", "no_mpiexec -n 2", 1, "dash")


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_programs_end_with_the_process_that_has_started_them(tmp_path):
    script = (
        "import subprocess; from ubmd.references.programs import command_line\n"
        f"words = command_line('sh -c \"echo $$ > {tmp_path}/pid; sleep 60; true\"', '', 1, 'dash')\n"
        "subprocess.run(words)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    os.kill(child, 0)  # it runs
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not Path(f"/proc/{child}/stat").exists() or ") Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the program is still running")


# --- energies that jump -------------------------------------------------------------------------------------------


def with_energy(atoms: Atoms, energy_per_atom: float) -> Atoms:
    copy = atoms.copy()
    copy.calc = SinglePointCalculator(copy, energy=energy_per_atom * len(atoms))
    return copy


def test_energies_far_from_those_before_are_found():
    copper, gold = bulk("Cu", cubic=True), bulk("Au", cubic=True)
    known = [with_energy(copper, -3.5 + 0.1 * k) for k in range(5)]
    new = [with_energy(copper, e) for e in (-3.0, -8.4, 1.6, -3.3 - 4.9)]
    new.append(with_energy(copper * (2, 1, 1), -20.0))  # the same composition
    new.append(with_energy(gold, -3000.0))  # nothing to compare with
    reasons = energy_jumps(new, known, 5.0)
    assert set(reasons) == {1, 4}
    assert reasons[1].startswith("The energy is -5.10 eV/atom away from the median of 5 labels of the same composition")


def test_a_first_batch_is_compared_with_itself():
    copper = bulk("Cu", cubic=True)
    new = [with_energy(copper, e) for e in (-3.0, -3.1, 200.0, -3.2)]
    assert set(energy_jumps(new, [], 5.0)) == {2}
    assert energy_jumps(new[1:3], [], 5.0) == {}  # which of two is wrong?
    assert energy_jumps([], [], 5.0) == {}


def with_force(size: float) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    forces = np.zeros((4, 3))
    forces[2] = (0.6 * size, 0.0, -0.8 * size)
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=forces)
    return atoms


def test_forces_out_of_proportion_are_found():
    known = [with_force(size) for size in (0.1, 0.5, 1.0, 2.0, 1.5)]
    new = [with_force(size) for size in (9.9, 10.1, 1.0, 800.0)]
    reasons = force_jumps(new, known)
    assert set(reasons) == {1, 3}
    assert reasons[1].startswith("The largest force is 10.1 eV/Å, that of all 5 labels before 2 eV/Å")
    assert force_jumps(new, known[:4]) == {}  # too few to know what is usual


# --- settings that cannot work ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calculator", "message"),
    [
        ("emt", r"neither a ready-made reference \(chgnet, .*openmm.*\) nor an import path"),
        ("ase.calculators.emt:EMTT", "has no 'EMTT'"),
        ("no_such_code.ase:Code", "pip install no_such_code"),
    ],
)
def test_calculators_that_do_not_exist(calculator, message):
    with pytest.raises(SettingsError, match=message):
        make_calculator(ReferenceSettings(calculator=calculator), Path())


def test_missing_openmm_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmm", None)  # what an environment without OpenMM looks like to import
    monkeypatch.delitem(sys.modules, "ubmd.references.openmm", raising=False)
    with pytest.raises(SettingsError, match=r"pip install 'ubmd\[openmm\]'"):
        make_calculator(ALANINE, EXAMPLE)


def test_missing_tblite_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tblite", None)
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    with pytest.raises(SettingsError, match=r"pip install 'ubmd\[tblite\]'"):
        make_calculator(ReferenceSettings(calculator="tblite"), EXAMPLE)


def test_tblite_refuses_slabs():
    """It would repeat them along their free vectors as well: another structure."""
    pytest.importorskip("tblite")
    water = molecule("H2O")
    water.cell, water.pbc = [6.0, 6.0, 9.0], (True, True, False)
    with pytest.raises(LabelError, match="periodic in some directions as periodic in all"):
        label(water, ReferenceSettings(calculator="tblite"), Path())


@pytest.mark.parametrize(("calculator", "package"), [("sevennet", "sevenn"), ("chgnet", "chgnet")])
def test_missing_foundation_models_name_the_pip_command(monkeypatch, calculator, package):
    monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SettingsError, match=rf"pip install 'ubmd\[{calculator}\]'"):
        make_calculator(ReferenceSettings(calculator=calculator), EXAMPLE)


def emt_as_a_network(cutoff: float = 7.0):
    """EMT in the place of a network: it knows a cutoff and free directions by itself, so that there is an answer."""
    return network_calculator("EMT", "of ASE", EMT(), {13, 29, 47, 79}, cutoff)


# The same slab with its free direction as the third, first, and a tilted third vector; a wire, a cluster, a crystal.
SHAPES = {
    "slab": ([[5.1, 0, 0], [0, 5.1, 0], [0, 0, 30.0]], [True, True, False]),
    "free first": ([[0, 0, 30.0], [5.1, 0, 0], [0, 5.1, 0]], [False, True, True]),
    "tilted": ([[5.1, 0, 0], [0, 5.1, 0], [3.0, 2.0, 9.0]], [True, True, False]),
    "wire": ([[20.0, 0, 0], [0, 5.1, 0], [0, 0, 30.0]], [False, True, False]),
    "cluster": ([[0, 0, 0], [0, 0, 0], [0, 0, 0]], [False, False, False]),
    "crystal": ([[5.1, 0.2, 0], [0, 5.1, 0], [0.3, 0, 5.3]], [True, True, True]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_networks_see_free_directions_as_far_gaps(shape):
    cell, pbc = SHAPES[shape]
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=3)
    atoms.set_cell(cell)
    atoms.pbc = pbc
    atoms.positions += [40.0, -7.0, 3.0]
    atoms.calc = emt_as_a_network()
    expected = atoms.copy()
    expected.calc = EMT()
    assert atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-10)
    np.testing.assert_allclose(atoms.get_forces(), expected.get_forces(), atol=1e-10)
    if any(pbc):
        labelled = read_results(atoms, emt_as_a_network())["stress"]
        np.testing.assert_allclose(labelled, read_results(expected, EMT())["stress"], atol=1e-12)
        assert np.abs(labelled).max() > 1e-4
    else:
        assert "stress" not in read_results(atoms, emt_as_a_network())


def test_networks_refuse_what_they_do_not_know():
    def refused(atoms: Atoms, kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match):
            emt_as_a_network(4.0).calculate(atoms)

    refused(bulk("NaCl", "rocksalt", a=5.6), SettingsError, r"EMT \(of ASE\) was not trained on Na, Cl:")
    charged = bulk("Cu")
    charged.info["charge"] = 1
    refused(charged, LabelError, "has a charge, but EMT knows neutral structures only")
    charged = bulk("Cu", cubic=True)
    charged.set_initial_charges([0.5, 0.5, 0.0, 0.0])
    refused(charged, LabelError, "has a charge")
    charged.set_initial_charges([0.5, -0.5, 0.0, 0.0])
    emt_as_a_network().calculate(charged)
    apart = Atoms("Cu3", [[0, 0, 0], [0, 0, 2.5], [0, 0, 7.0]])
    refused(apart, LabelError, r"Atom 2 \(from 0\) has no neighbour within 4 Å")


def test_weights_are_a_name_in_the_package_or_a_file(tmp_path):
    assert weights_file("small", ("small", "large"), "package") is None
    (tmp_path / "own.pth").touch()
    assert weights_file(str(tmp_path / "own.pth"), ("small",), "package") == tmp_path / "own.pth"
    with pytest.raises(SettingsError, match=r"neither a file nor weights .* did you mean 'small'\?"):
        weights_file("smal", ("small", "large"), "package")
    with pytest.raises(SettingsError, match=r"downloads none\); there are 'small', 'large'\."):
        weights_file("https://example.org/other.pth", ("small", "large"), "package")


def test_bad_arguments(tmp_path):
    with pytest.raises(SettingsError, match=r"reference.arguments don't suit the calculator 'openmm': .*'cutof'"):
        make_calculator(ALANINE.model_copy(update={"arguments": {"cutof": 5.0}}), tmp_path)
    with pytest.raises(SettingsError, match=r"There is no PDB file alanine_dipeptide.pdb"):
        make_calculator(ALANINE, tmp_path)
    (tmp_path / "gas.pdb").write_text(
        "ATOM      1  XE  XXX A   1       0.000   0.000   0.000  1.00  0.00          XE\nEND\n"
    )
    with pytest.raises(SettingsError, match="does not cover the PDB file"):
        make_calculator(ALANINE.model_copy(update={"arguments": {"pdb": "gas.pdb"}}), tmp_path)


# --- reference MD -------------------------------------------------------------------------------------------------

SHORT = SamplingSettings(temperature=300.0, frames=5, stride=10, equilibration=20, trajectories=2, seed=3)


def test_sampling_repeats_and_its_trajectories_are_independent():
    atoms = read(EXAMPLE / "c7eq.extxyz")
    first, again = (sample(atoms, ALANINE, SHORT, EXAMPLE) for _ in range(2))
    assert [frame.info["trajectory"] for frame in first] == [0, 0, 0, 1, 1]
    assert [frame.info["step"] for frame in first] == [30, 40, 50, 30, 40]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
    assert np.abs(first[0].positions - first[3].positions).max() > 1e-3
    other = sample_trajectory(atoms, ALANINE, SHORT.model_copy(update={"seed": 4}), EXAMPLE, 0)
    assert np.abs(first[0].positions - other[0].positions).max() > 1e-3
    alone = sample_trajectory(atoms, ALANINE, SHORT, EXAMPLE, 1)
    np.testing.assert_array_equal(alone[0].positions, first[3].positions)
    for frame in first:
        labelled = label(frame, ALANINE, EXAMPLE)
        np.testing.assert_array_equal(labelled.get_forces(), frame.get_forces())


@pytest.mark.long
def test_sampling_reaches_its_temperature(calculator_module):
    """Harmonic wells hold the mean potential energy at (3N/2) kT above the minimum."""
    settings = ReferenceSettings(calculator=calculator_module(Wells))
    atoms = Atoms("H40", positions=10.0 * np.arange(120).reshape(40, 3))
    sampling = SamplingSettings(
        temperature=500.0, frames=200, stride=20, equilibration=2000, trajectories=1, friction=20.0
    )
    frames = sample(atoms, settings, sampling, Path())
    mean = np.mean([frame.get_potential_energy() for frame in frames])
    assert mean == pytest.approx(1.5 * 40 * 8.617333e-5 * 500.0, rel=0.05)


class Wells(EMT):
    """Independent harmonic wells of 2 eV/Å^2 at the starting positions."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        shift = atoms.positions - 10.0 * np.arange(120).reshape(40, 3)
        self.results = {"energy": float(np.sum(shift**2)), "forces": -2.0 * shift}
        self.atoms = atoms.copy()


def test_sampling_drops_rejected_frames_and_gives_up_if_most_are():
    atoms = read(EXAMPLE / "c7eq.extxyz")
    hot = SHORT.model_copy(update={"temperature": 1200.0, "equilibration": 200, "stride": 20, "frames": 20})
    largest = [np.linalg.norm(f.get_forces(), axis=1).max() for f in sample(atoms, ALANINE, hot, EXAMPLE)]
    limit = float(np.quantile(largest, 0.85))
    strict = sample(atoms, ALANINE.model_copy(update={"force_limit": limit}), hot, EXAMPLE)
    assert len(strict) == 20
    assert max(np.linalg.norm(f.get_forces(), axis=1).max() for f in strict) <= limit
    with pytest.raises(LabelError, match=r"More than half .* force on atom"):
        sample(atoms, ALANINE.model_copy(update={"force_limit": 1.0}), hot, EXAMPLE)
