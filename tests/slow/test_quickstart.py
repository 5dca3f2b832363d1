"""The README's main job and the scripts of its example, for real: OpenMM labels, training, biased LAMMPS replicas."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

import ubmd
from ubmd.data.structures import read_structures
from ubmd.settings import RunSettings, load_settings

EXAMPLE = Path(__file__).resolve().parents[2] / "lammps_examples" / "alanine_dipeptide"
BIN = Path(sys.executable).parent
LABELS = 40  # of 56: four models or five, as labels may be rejected

pytestmark = [pytest.mark.slow, pytest.mark.slow_ci]


def call(*command: str, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=cwd, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    call("ubmd", "run", str(EXAMPLE / "quickstart.toml"), "--set", f"loop.labels={LABELS}", cwd=folder)
    return folder / "quickstart_run"


def test_errors_on_the_hot_test_set_fall_along_the_loop(run_dir: Path) -> None:
    history = json.loads((run_dir / "history.json").read_text())
    labels = [entry["labels"] for entry in history]
    assert labels[0] == 16
    assert labels[-1] == LABELS
    assert all(1 <= new <= 8 for new in np.diff(labels))
    errors = [entry["test"]["force_rmse"] for entry in history]
    assert errors[-1] < 0.85 * errors[0], errors
    assert history[-1]["coverage"] > history[0]["coverage"]


def test_replicas_were_biased_and_stopped_where_the_model_was_unsure(run_dir: Path) -> None:
    threshold = load_settings(EXAMPLE / "quickstart.toml", RunSettings).loop.threshold
    replicas = [r for entry in json.loads((run_dir / "history.json").read_text()) for r in entry["replicas"]]
    assert max(replica["bias_share"] for replica in replicas) > 0.05
    stopped = [replica for replica in replicas if replica["stopped"] == "threshold"]
    assert stopped
    assert all(replica["max_u"] > threshold for replica in stopped)


def test_no_label_is_lost_and_the_test_set_is_never_trained_on(run_dir: Path) -> None:
    dataset, test = read_structures(run_dir / "dataset.extxyz"), read_structures(run_dir / "test.extxyz")
    assert [atoms.info["label"] for atoms in dataset] == list(range(LABELS))
    trained = {atoms.positions.tobytes() for atoms in dataset}
    assert len(trained) == LABELS
    assert not trained & {atoms.positions.tobytes() for atoms in test}


def test_the_report_has_its_pictures(run_dir: Path) -> None:
    text = (run_dir / "report" / "report.md").read_text()
    for name in ("learning_curve", "calibration", "ramachandran", "coverage", "uncertainty"):
        assert f"({name}.png)" in text
        assert (run_dir / "report" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_scripts_of_the_example_run_with_the_model(run_dir: Path, tmp_path: Path) -> None:
    for name in ("in.biased_nvt", "in.production", "alanine.data"):
        shutil.copy(EXAMPLE / name, tmp_path)
    model = str(run_dir / "model.pt")
    for script in ("in.biased_nvt", "in.production"):
        call("lmp", "-in", script, "-var", "model", model, "-var", "steps", "1000", cwd=tmp_path)
    frames = read(tmp_path / "biased.extxyz", ":")
    atoms = frames[-1]
    atoms.calc = ubmd.Calculator(run_dir / "model.pt", precision="mixed")
    atoms.get_potential_energy()
    assert atoms.calc.results["uncertainty"] == pytest.approx(atoms.info["uncertainty"], rel=1e-3)
    in_lammps = atoms.arrays["atomic_uncertainty"]
    assert atoms.calc.results["atomic_uncertainties"] == pytest.approx(in_lammps, rel=1e-3, abs=1e-3)
