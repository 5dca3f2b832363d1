"""The example of a liquid, in little: both loops, LAMMPS on two ranks with model and force field, and the analysis."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ubmd.data.structures import read_structures

EXAMPLE = Path(__file__).resolve().parents[2] / "lammps_examples" / "water"
BIN = Path(sys.executable).parent
SMALL = (
    *("model.hidden=[16,16]", "training.epochs=20", "loop.warm_epochs=5", "uncertainty.projections=16"),
    *("md.replicas=2", "md.steps=20", "md.frames_every=5", "selection.batch=2", "loop.threshold=1e3"),
    "reference.force_limit=1e3",
)
TEST = ("test.sampling.frames=2", "test.sampling.stride=2", "test.sampling.equilibration=2", "loop.labels=10")
SHORT = {"replicate": 1, "mix": 50, "npt": 100, "nvt": 50}

pytestmark = [pytest.mark.slow]


def call(*command: object, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    words = [str(BIN / str(command[0])), *map(str, command[1:])]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def liquid(folder: Path, potential: str, nve: int) -> None:
    """in.liquid on two ranks."""
    variables = {"potential": potential, "nve": nve, **SHORT}
    words = [word for name, value in variables.items() for word in ("-var", name, value)]
    call("mpirun", "-np", 2, BIN / "lmp", "-in", "in.liquid", *words, cwd=folder)


def test_water_is_learnt_refined_and_compared(tmp_path: Path) -> None:
    folder = tmp_path / "water"
    shutil.copytree(EXAMPLE, folder)
    sets = [word for change in SMALL for word in ("--set", change)]
    call("ubmd", "run", "loop.toml", *sets, *(word for change in TEST for word in ("--set", change)), cwd=folder)
    call("ubmd", "run", "refine.toml", *sets, "--set", "loop.labels=12", cwd=folder)
    dataset = read_structures(folder / "water_refined" / "dataset.extxyz", labelled=True)
    assert [bool(atoms.info.get("given")) for atoms in dataset] == [True] * 10 + [False] * 2
    assert all(len(atoms) == 192 and "stress" in atoms.calc.results for atoms in dataset)
    history = json.loads((folder / "water_refined" / "history.json").read_text())
    assert [entry["labels"] for entry in history] == [10, 12]
    liquid(folder, "ubmd", 100)
    assert len((folder / "ubmd_oxygen.dump").read_text().splitlines()) == 3 * (9 + 64)
    liquid(folder, "spcfw", 8600)
    density = np.loadtxt(folder / "spcfw_density.txt")[:, 1]
    assert 0.9 < density.mean() < 1.1  # g/cm^3
    for path in folder.glob("spcfw_*"):  # the force field against itself: nothing may differ
        shutil.copy(path, folder / path.name.replace("spcfw", "ubmd"))
    rows = [line.split("  ") for line in call("python", "liquid.py", cwd=folder).splitlines()[1:-1]]
    for row in rows:
        reference, model = [cell for cell in row if cell][1:]
        assert reference.strip() == model.strip(), row
    assert {row[0] for row in rows} >= {"density, g/cm^3", "O-O first peak"}
    assert (folder / "liquid.png").stat().st_size > 10000
