"""lammps_examples/production as its README tells to run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

EXAMPLE = Path(__file__).parents[2] / "lammps_examples" / "production"


@pytest.mark.slow
@pytest.mark.slow_ci
def test_vacancy_is_found(tmp_path):
    """At step 0 the uncertain atoms are the twelve neighbours of the vacancy, in the dump and in the saved frame."""
    programs = Path(sys.executable).parent
    shutil.copy(EXAMPLE / "in.production", tmp_path)
    for command in (
        [sys.executable, str(EXAMPLE / "make_model.py")],
        [str(programs / "mpiexec"), "-n", "2", str(programs / "lmp"), "-in", "in.production", "-var", "steps", "20"],
    ):
        process = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    frame = read(tmp_path / "uncertain.extxyz", 0)
    uncertain = frame.arrays["id"][frame.arrays["atomic_uncertainty"] > 0.15]
    assert len(frame) == 863
    assert len(uncertain) == 12
    dumped = (tmp_path / "uncertain.dump").read_text().split("ITEM: TIMESTEP")[1].split("ITEM: ATOMS")[1]
    assert [int(line.split()[0]) for line in dumped.splitlines()[1:]] == uncertain.tolist()
    neighbours = frame[np.isin(frame.arrays["id"], uncertain)]
    offsets = neighbours.get_distances(0, range(12), mic=True, vector=True)
    centre = neighbours.positions[0] + offsets.mean(0)
    neighbours.append("X")
    neighbours.positions[-1] = centre
    assert neighbours.get_distances(12, range(12), mic=True) == pytest.approx(3.59 / np.sqrt(2), abs=1e-3)
