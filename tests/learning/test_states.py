"""Charges, moments, tags, masses and named info of the start structure reach every label, and LAMMPS its masses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import silicon
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from replicas import make_task
from system import cluster, make_settings

from ubmd.data.extxyz import write_structures
from ubmd.data.state import state_hash
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError
from ubmd.files import content_hash, write_text
from ubmd.lammps.replica import _session, run_replica
from ubmd.lammps.session import types_of
from ubmd.lammps.trajectory import TrajectoryState
from ubmd.learning import RunFolder, run
from ubmd.learning.dynamic.check import ideal_box
from ubmd.learning.dynamic.engine import run as run_dynamic
from ubmd.learning.labels import reference_key
from ubmd.learning.loop.check import plan
from ubmd.learning.loop.verify import verify

INFO = ("charge", "spin", "multiplicity")
SHIFT = 12.0  # eV, of the energy of the state below

CALCULATOR = """
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

class Seen(Calculator):
    implemented_properties = ["energy", "forces"]
    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        plain = atoms.copy()
        plain.calc = EMT()
        shift = atoms.get_initial_charges().sum() + 2 * atoms.get_initial_magnetic_moments().sum()
        shift += 3 * atoms.get_tags().sum() + 4 * atoms.info.get("charge", 0) + (2 if atoms.has("masses") else 0)
        self.results = {"energy": plain.get_potential_energy() + shift, "forces": plain.get_forces()}
"""


def charged_cluster() -> Atoms:
    """In a state whose energy is that of EMT plus SHIFT; half of the copper is heavy."""
    atoms = cluster()
    atoms.set_initial_charges([1.0] + [0.0] * 12)
    atoms.set_initial_magnetic_moments([0.0] * 12 + [1.0])
    atoms.set_tags([0] * 12 + [1])
    masses = atoms.get_masses()
    masses[2:7] = 500.0
    atoms.set_masses(masses)
    atoms.info |= {"charge": 1, "name": "left behind"}
    return atoms


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    (folder / "seen_in_states.py").write_text(CALCULATOR, encoding="utf-8")
    write_structures(folder / "start.extxyz", [charged_cluster()])
    return folder


def settings_of(folder: Path, **tables: Any) -> Any:
    return make_settings(folder / "run", reference={"calculator": "seen_in_states:Seen"}, **tables)


@pytest.fixture(scope="module")
def finished(inputs: Path) -> RunFolder:
    return RunFolder(run(settings_of(inputs, md={"start_from": "labelled"}), inputs))


def test_training_and_test_labels_are_of_the_state_of_the_start(finished: RunFolder) -> None:
    expected = state_hash(charged_cluster(), INFO)
    for path, count in ((finished.dataset, 8), (finished.test, 3)):
        structures = read_structures(path, labelled=True)
        assert len(structures) == count
        for atoms in structures:
            assert state_hash(atoms, INFO) == expected
            plain = Atoms(atoms.numbers, atoms.positions, calculator=EMT())
            assert atoms.get_potential_energy() == pytest.approx(plain.get_potential_energy() + SHIFT, abs=1e-9)
            np.testing.assert_allclose(atoms.get_forces(), plain.get_forces(), rtol=0, atol=1e-9)
            assert "name" not in atoms.info


def test_frames_of_replicas_have_it_too(finished: RunFolder) -> None:
    expected = state_hash(charged_cluster(), INFO)
    for path in finished.path.glob("iterations/*/frames_*.extxyz"):
        frames = read_structures(path)
        assert frames
        assert {state_hash(frame, INFO) for frame in frames} == {expected}


def test_a_run_of_an_earlier_version_that_ignored_the_state_is_refused(inputs: Path, tmp_path: Path) -> None:
    """Its labels are those of another state."""
    settings = settings_of(tmp_path)
    run(settings, inputs)
    folder = RunFolder(tmp_path / "run")
    # An earlier version's mark of the start labels: its candidates had elements, positions, cell and pbc only.
    from ubmd.data.labels import dataset_hash

    bare = [read_structures(path)[0] for path in sorted((folder.path / "start").glob("candidate_*.extxyz"))]
    write_text(folder.path / "start" / "key", content_hash([dataset_hash(bare), reference_key(settings.reference)]))
    with pytest.raises(SettingsError, match=r"earlier version .* \(charge = 1, initial charges, .*start again"):
        run(settings, inputs)


def test_two_states_of_one_composition_are_refused_by_the_loop(inputs: Path, tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster(), charged_cluster()])
    with pytest.raises(SettingsError, match=r"start\.mixed_states"):
        run(make_settings(tmp_path / "run"), tmp_path)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_the_plan_says_what_the_calculator_sees_and_which_atoms_are_fixed(inputs: Path) -> None:
    held = charged_cluster()
    held.set_constraint(FixAtoms([0]))
    said = "\n".join(plan(settings_of(inputs), inputs, [held]))
    assert "charge = 1, initial charges, initial magnetic moments, tags, masses" in said
    assert "Fixed atoms (FixAtoms): 1 of 13. They stay where they are in all MD" in said
    assert "does not see these keys of info: name (" in said
    said = "\n".join(plan(settings_of(inputs), inputs, [cluster()]))
    assert "calculator sees" not in said
    assert "does not see" not in said


def test_a_given_test_set_in_another_state_is_remarked_on(inputs: Path, finished: RunFolder, tmp_path: Path) -> None:
    frames = read_structures(finished.test, labelled=True)
    said: list[str] = []
    for charge in (1, 0):
        for frame in frames:
            frame.info["charge"] = charge
        write_structures(tmp_path / "test.extxyz", frames)
        settings = settings_of(tmp_path, test={"file": tmp_path / "test.extxyz"})
        assert not said
        verify(settings, inputs, said.append)
    assert said == [
        "test.file: frame 0 has the composition of frame 0 of start.extxyz but charge = 1 and 0; labels of two states "
        "cannot be compared."
    ]


# ---------------------------------------------------------------------------------------------- masses in LAMMPS


def test_atoms_of_one_element_and_several_masses_are_several_types() -> None:
    assert [symbol for symbol, _ in types_of(cluster())] == ["Cu", "Au"]
    kinds = types_of(charged_cluster())
    assert [symbol for symbol, _ in kinds] == ["Cu", "Cu", "Au"]
    assert kinds[1][1] == 500.0


def test_lammps_moves_every_atom_with_its_own_mass(tmp_path: Path, model: Path) -> None:
    atoms = charged_cluster()
    task = make_task(tmp_path, model, start=atoms)
    with _session(task, tmp_path, atoms) as session:
        numbers = np.array(session.lammps.gather_atoms("type", 0, 1))
        masses = np.array(session.lammps.extract_atom("mass")[0 : numbers.max() + 1])[numbers]
        np.testing.assert_array_equal(masses, atoms.get_masses())
        session.run(0, first=True)
        kinetic = 0.5 * (masses[:, None] * session.velocities() ** 2).sum() * (1000.0 * units.fs) ** -2
        assert session.temperature() == pytest.approx(2.0 * kinetic / (3 * 13 - 3) / units.kB, rel=1e-5)


def test_heavy_atoms_hardly_move(tmp_path: Path, model: Path) -> None:
    atoms = cluster()
    atoms.set_masses([1e12] * 7 + atoms.get_masses()[7:].tolist())
    result = run_replica(make_task(tmp_path, model, start=atoms, force=0.0))
    assert result.stopped == "step limit"
    moved = np.abs(read_structures(tmp_path / "frames.extxyz")[-1].positions - atoms.positions).max(axis=1)
    assert moved[:7].max() < 1e-4
    assert moved[7:].min() > 1e-3


def test_usual_masses_leave_the_commands_as_they_were(tmp_path: Path, model: Path) -> None:
    """So that trajectories of earlier versions repeat bit for bit: one type per element, in the order of Z."""
    atoms = cluster()
    with _session(make_task(tmp_path, model, start=atoms), tmp_path, atoms) as session:
        types = np.array(session.lammps.gather_atoms("type", 0, 1)).tolist()
        assert types == [2, 2] + [1] * 11
        assert session.lammps.extract_setting("ntypes") == 2


# ---------------------------------------------------------------------------------------------- dynamic runs


def test_a_dynamic_run_labels_in_the_state_of_its_box(tmp_path: Path) -> None:
    silicon.write_inputs(tmp_path, tmp_path / "run")
    box = read_structures(tmp_path / "silicon.extxyz")[0]
    box.set_masses([27.0, 29.0] * 4)
    box.set_initial_magnetic_moments([0.5] * 8)
    box.info["charge"] = 1
    write_structures(tmp_path / "box.extxyz", [box])
    settings = silicon.make_settings(tmp_path / "run", start={"file": "box.extxyz"}, test=None)
    folder = RunFolder(run_dynamic(settings, tmp_path))
    dataset = read_structures(folder.dataset)
    assert len(dataset) > 1
    assert {state_hash(atoms, INFO) for atoms in dataset} == {state_hash(box, INFO)}


def test_a_charge_is_not_repeated_with_the_box(tmp_path: Path) -> None:
    silicon.write_inputs(tmp_path, tmp_path / "run")
    box = read_structures(tmp_path / "silicon.extxyz")[0]
    box.set_initial_magnetic_moments([0.5] * 8)
    write_structures(tmp_path / "box.extxyz", [box])
    settings = silicon.make_settings(tmp_path / "run", start={"file": "box.extxyz", "repeat": [2, 1, 1]})
    assert ideal_box(settings, tmp_path).get_initial_magnetic_moments().sum() == 8.0
    box.info["charge"] = 1
    write_structures(tmp_path / "box.extxyz", [box])
    with pytest.raises(SettingsError, match=r"start\.repeat: .* has charge = 1, which is that of the unrepeated box"):
        ideal_box(settings, tmp_path)


def test_masses_of_a_trajectory_survive_its_file() -> None:
    atoms = charged_cluster()
    state = TrajectoryState(
        np.array(atoms.numbers), np.eye(3), np.zeros(3, dtype=bool), atoms.positions, atoms.positions, 3, {}
    )
    assert "masses" not in state.arrays()  # files of structures with the usual masses are what they were
    with_masses = TrajectoryState(**(vars(state) | {"masses": atoms.get_masses()}))
    back = TrajectoryState.from_arrays(with_masses.arrays())
    np.testing.assert_array_equal(back.atoms().get_masses(), atoms.get_masses())
