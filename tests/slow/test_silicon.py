"""The silicon example for real: dynamic training with Stillinger-Weber labels, from the ideal crystal to a file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

import ubmd
from ubmd.data.structures import read_structures
from ubmd.references.lammps import LAMMPS

EXAMPLE = Path(__file__).resolve().parents[2] / "lammps_examples" / "silicon"
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.slow_ci]


def call(*command: str, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=cwd, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silicon")
    call("ubmd", "run", str(EXAMPLE / "dynamic.toml"), cwd=folder)
    return folder / "silicon_run"


def test_ten_labels_give_forces_within_two_and_a_half_percent(run_dir: Path) -> None:
    """Of the root mean square force at 900 K; the potential keeps no more than fourth order within 4 Å."""
    last = json.loads((run_dir / "history.json").read_text())[-1]
    assert last["calls"] <= 10
    assert last["test"]["structures"] == 20
    assert last["test"]["relative"] < 0.025


def test_its_errors_are_those_of_the_model_file(run_dir: Path) -> None:
    """The test set again, by another way: model file, ASE calculator, Stillinger-Weber without noise."""
    calculator = ubmd.Calculator(run_dir / "model.pt")
    sw = LAMMPS(["pair_style sw", "pair_coeff * * Si.sw Si"], ["Si"])
    errors, forces = [], []
    for atoms in read_structures(run_dir / "test.extxyz"):
        structure = atoms.copy()
        structure.calc = sw
        forces.append(structure.get_forces().copy())
        assert np.std(atoms.get_forces() - forces[-1]) == pytest.approx(0.001, rel=0.2)  # the noise of labels
        structure.calc = calculator
        errors.append(structure.get_forces() - forces[-1])
    relative = np.sqrt(np.mean(np.square(errors)) / np.mean(np.square(forces)))
    last = json.loads((run_dir / "history.json").read_text())[-1]
    assert relative == pytest.approx(last["test"]["relative"], rel=1e-2)


def test_predicted_errors_fall_and_every_request_has_its_reason(run_dir: Path) -> None:
    history = json.loads((run_dir / "history.json").read_text())
    refits = [entry for entry in history if entry["refit"]]
    learnt = [row for entry in refits[1:] for row in entry["learnt"]]
    assert [row["label"] for row in learnt] == list(range(1, len(learnt) + 1))
    for row in learnt:
        assert row["error_before"] > row["threshold"] or row["rule"] == "guard"
        assert row["error_after"] < row["error_before"]
    assert learnt[0]["error_before"] > 3.0 * learnt[-1]["error_before"]
    assert refits[-1]["model"]["gamma"]["2"] > 9.0  # of 10 parameters
    dataset = read_structures(run_dir / "dataset.extxyz")
    assert len({atoms.positions.tobytes() for atoms in dataset}) == len(dataset) == history[-1]["labels"]


def test_the_model_keeps_the_energy_of_the_ideal_crystal(run_dir: Path) -> None:
    ideal = bulk("Si", a=5.431, cubic=True)
    ideal.calc = LAMMPS(["pair_style sw", "pair_coeff * * Si.sw Si"], ["Si"])
    energy = ideal.get_potential_energy()
    ideal.calc = ubmd.Calculator(run_dir / "model.pt")
    assert ideal.get_potential_energy() == pytest.approx(energy, abs=0.01)
    assert isinstance(read_structures(run_dir / "dataset.extxyz")[0].calc, SinglePointCalculator)
