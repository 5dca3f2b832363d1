"""The example of a slab, in little: a loop with fixed layers, biased replicas, and the script that counts sites."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.geometry import find_mic

from ubmd.data.constraints import is_fixed
from ubmd.data.structures import read_structures

EXAMPLE = Path(__file__).resolve().parents[2] / "lammps_examples" / "surface"
BIN = Path(sys.executable).parent
SMALL = ("md.steps=480", "loop.labels=18", "training.epochs=100", "test.sampling.frames=10", "md.replicas=4")

pytestmark = [pytest.mark.slow]


def call(*command: str, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_slab_is_learnt_with_its_lowest_layers_fixed(tmp_path: Path) -> None:
    changes = [word for change in SMALL for word in ("--set", change)]
    call("ubmd", "run", str(EXAMPLE / "biased.toml"), *changes, cwd=tmp_path)
    run_dir = tmp_path / "biased_run"
    (start,) = read_structures(EXAMPLE / "slab.extxyz")
    fixed = is_fixed(start)
    assert fixed.sum() == 18
    dataset = read_structures(run_dir / "dataset.extxyz", labelled=True)
    assert len(dataset) == 18
    for atoms in dataset:
        assert atoms.pbc.tolist() == [True, True, False]
        np.testing.assert_allclose(atoms.cell[:], start.cell[:], atol=1e-10)
        np.testing.assert_allclose(
            find_mic((atoms.positions - start.positions)[fixed], start.cell, start.pbc)[1], 0, atol=1e-9
        )
        np.testing.assert_array_equal(is_fixed(atoms), fixed)
    history = json.loads((run_dir / "history.json").read_text())
    assert history[-1]["test"]["force_rmse"] < history[0]["test"]["force_rmse"] < 0.5
    assert max(replica["bias_share"] for entry in history for replica in entry["replicas"]) > 0.05
    out = call("python", str(EXAMPLE / "sites.py"), "biased_run", cwd=tmp_path)
    name, biased, _, sites, *_ = out.splitlines()[1].split()
    assert (name, biased) == ("biased_run", "yes")
    assert 1 <= int(sites) <= 9
    assert (tmp_path / "sites.png").stat().st_size > 5000
