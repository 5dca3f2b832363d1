"""The scripts of the silicon example, in miniature: training sets compared, and stability in LAMMPS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from ase.build import bulk

from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.regression import NormalEquations, fit

pytest.importorskip("spglib")
EXAMPLE = Path(__file__).resolve().parents[2] / "lammps_examples" / "silicon"
CUTOFFS = {"2": 4.0, "3": 2.6}
COMPARISON = ["--no-dynamic", "--seeds", "0", "1", "--counts", "1", "3", "--amplitudes", "0.02", "0.1"]
COMPARISON += ["--test-temperatures", "300"]


def script(name: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLE / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings, and the comparison of training sets without dynamic runs."""
    path = tmp_path_factory.mktemp("silicon")
    write_structures(path / "silicon.extxyz", [bulk("Si", a=5.431, cubic=True)])
    settings = {
        "run_dir": "run",
        "crystal": {"structure": "silicon.extxyz", "cutoffs": CUTOFFS},
        "reference": {
            "calculator": "lammps",
            "arguments": {"elements": ["Si"], "commands": ["pair_style sw", "pair_coeff * * Si.sw Si"]},
            "noise": 0.001,
        },
        "dynamic": {"temperatures": [600.0]},
    }
    (path / "dynamic.toml").write_text(tomli_w.dumps(settings))
    done = script("training_sets.py", "dynamic.toml", *COMPARISON, "--test-frames", "4", "--models", "3", cwd=path)
    assert done.returncode == 0, done.stderr
    return path


def test_errors_are_those_of_the_regression(folder: Path) -> None:
    out = folder / "training_sets"
    rows = json.loads((out / "training_sets.json").read_text())["rows"]
    assert {(r["set"], r["seed"], r["labels"]) for r in rows} == {
        (name, seed, count)
        for name in ("rattled 0.02 Å", "rattled 0.1 Å", "MD frames")
        for seed in (0, 1)
        for count in (1, 3)
    }
    ideal = read_structures(folder / "silicon.extxyz")[0]
    basis = ClusterBasis.build(ideal, {int(order): cutoff for order, cutoff in CUTOFFS.items()})
    box = basis.supercell(ideal)
    equations = NormalEquations(basis.parameter_orders)
    for atoms in read_structures(out / "labels" / "rattled_0.1_seed1.extxyz")[:3]:
        equations.add(basis.force_matrix(atoms, box), atoms.get_forces())
    parameters = fit(equations, tolerance=1e-6).mean
    test = read_structures(out / "labels" / "test_600K.extxyz")
    forces = np.array([atoms.get_forces() for atoms in test])
    found = np.array([basis.forces(parameters, atoms, box) for atoms in test])
    expected = 100 * np.linalg.norm(found - forces) / np.linalg.norm(forces)
    row = next(r for r in rows if r["set"] == "rattled 0.1 Å" and r["seed"] == 1 and r["labels"] == 3)
    assert row["errors"]["600"] == pytest.approx(expected, rel=0.02)
    table = (out / "training_sets.md").read_text()
    assert "| 3 |" in table
    assert "| trained on | 300 K | 600 K |" in table
    assert (out / "training_sets.png").exists()


def test_a_second_call_computes_nothing(folder: Path) -> None:
    out = folder / "training_sets"
    before = {path: path.stat().st_mtime_ns for path in (out / "labels").iterdir()}
    rows = json.loads((out / "training_sets.json").read_text())["rows"]
    again = script("training_sets.py", "dynamic.toml", *COMPARISON, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (out / "labels").iterdir()} == before
    assert json.loads((out / "training_sets.json").read_text())["rows"] == rows


def test_stability_of_good_and_bad_potentials(folder: Path) -> None:
    models = [f"good={folder}/training_sets/rattled_0.1_3.pt", f"wild={folder}/training_sets/rattled_0.1_3.pt"]
    options = ["--picoseconds", "0.2", "--nve", "0.1", "--repeat", "2", "1", "1", "--timestep", "1"]
    done = script("stability.py", "dynamic.toml", models[0], "--temperatures", "300", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    (good,) = json.loads((folder / "stability" / "stability.json").read_text())
    assert good["error"] == ""
    assert good["reached"] == pytest.approx(0.3)
    assert 100 < good["mean_temperature"] < 600
    assert 0.0 < good["largest"] < good["guard"]
    assert abs(good["drift"]) < 20.0  # meV/atom/ps, over 0.1 ps
    # far above the temperatures that it knows, an atom leaves its site
    done = script("stability.py", "dynamic.toml", models[1], "--temperatures", "20000", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    (wild,) = json.loads((folder / "stability" / "stability.json").read_text())
    assert "away from its site" in wild["error"]
    assert wild["reached"] < 0.2
    assert wild["drift"] is None
    (row,) = [r for r in (folder / "stability" / "stability.md").read_text().splitlines() if "| wild | 20000 |" in r]
    assert "| yes |" in row
