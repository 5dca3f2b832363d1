"""The scripts of the silicon example, in miniature: training sets compared, stability in LAMMPS, false minima."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from ase import Atoms
from ase.build import bulk
from ase.io import read

import ubmd
from ubmd.calculator import Calculator
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.export import export_crystal
from ubmd.potentials.force_constants.regression import NormalEquations, Posterior, fit

pytest.importorskip("spglib")
EXAMPLE = Path(__file__).resolve().parents[2] / "lammps_examples" / "silicon"
CUTOFFS = {"2": 4.0, "3": 2.6}
COMPARISON = ["--no-dynamic", "--seeds", "0", "1", "--counts", "1", "3", "--amplitudes", "0.02", "0.1"]
COMPARISON += ["--test-temperatures", "300"]
SHORT = ["--picoseconds", "0.2", "--nve", "0.1", "--repeat", "2", "1", "1", "--timestep", "1"]


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
    done = script("stability.py", "dynamic.toml", models[0], "--temperatures", "300", *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    (good,) = json.loads((folder / "stability" / "stability.json").read_text())
    assert good["error"] == ""
    assert good["reached"] == pytest.approx(0.3)
    assert 100 < good["mean_temperature"] < 600
    assert 0.0 < good["largest"] < good["guard"]
    assert abs(good["drift"]) < 20.0  # meV/atom/ps, over 0.1 ps
    # far above the temperatures that it knows, an atom leaves its site
    done = script("stability.py", "dynamic.toml", models[1], "--temperatures", "20000", *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    (wild,) = json.loads((folder / "stability" / "stability.json").read_text())
    assert "away from its site" in wild["error"]
    assert wild["reached"] < 0.2
    assert wild["drift"] is None
    (row,) = [r for r in (folder / "stability" / "stability.md").read_text().splitlines() if "| wild | 20000 |" in r]
    assert "| yes |" in row


def rattled_labels(folder: Path) -> list[Atoms]:
    return read_structures(folder / "training_sets" / "labels" / "rattled_0.1_seed0.extxyz")


def test_stability_of_a_network_with_two_seeds(folder: Path) -> None:
    labels = rattled_labels(folder)
    settings = {
        "output_dir": str(folder / "network"),
        "validation_share": 0.34,
        "model": {"cutoff": 4.0, "hidden": [32, 32]},
        "training": {"epochs": 60, "batch_size": 1},
        "uncertainty": {"projections": 16},
    }
    model = ubmd.train(labels, settings, progress=False).path
    asked = ["dynamic.toml", f"net={model}", f"crystal={folder}/training_sets/rattled_0.1_3.pt"]
    asked += ["--temperatures", "300", *SHORT, "--out", "two_seeds"]
    done = script("stability.py", *asked, "--seeds", "1", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    out = folder / "two_seeds"
    runs = json.loads((out / "stability.json").read_text())
    assert [(run["name"], run["seed"], run["error"]) for run in runs] == [
        (name, seed, "") for name in ("net", "crystal") for seed in (1, 2)
    ]
    assert [run["guard"] is None for run in runs] == [True, True, False, False]
    assert runs[0]["largest"] != runs[1]["largest"]
    # potential energies are those above the ideal crystal in the same model, the log's first row
    log = (out / "net_300K" / "log.lammps").read_text()
    first = re.search(r"^\s+0\s+(\S+)\s+(\S+)\s+0\s*$", log, re.MULTILINE)
    ideal = read(out / "net_300K" / "box.data", format="lammps-data", atom_style="atomic")
    ideal.calc = Calculator(model)
    kinetic = 1.5 * (len(ideal) - 1) * 8.617333e-5 * float(first[1])
    assert float(first[2]) - kinetic == pytest.approx(ideal.get_potential_energy(), abs=1e-3)
    table = (out / "stability.md").read_text()
    assert table.count("| no guard |") == 2
    assert table.count("| none |") == 2
    for name in ("net", "crystal"):
        assert f"| {name} | 300 | 2 of 2 | 0.3 |" in table
    assert (out / "stability.png").exists()

    # finished runs are found again, but not for another input
    before = (out / "crystal_300K" / "log.lammps").stat().st_mtime_ns
    again = script("stability.py", *asked, "--seed", "1", cwd=folder)
    assert "seed 1: ran" not in again.stdout
    assert (out / "crystal_300K" / "log.lammps").stat().st_mtime_ns == before
    again = script("stability.py", asked[0], *asked[2:], "--seed", "1", "--picoseconds", "0.1", cwd=folder)
    assert "crystal at 300 K, seed 1: ran to the end" in again.stdout
    assert json.loads((out / "stability.json").read_text())[0]["reached"] == pytest.approx(0.2)


def fitted(folder: Path) -> tuple[ClusterBasis, Posterior]:
    """Order 2 alone, whose energies are known: half of displacement times curvature times displacement."""
    ideal = read_structures(folder / "silicon.extxyz")[0]
    basis = ClusterBasis.build(ideal, {2: 4.0})
    box, equations = basis.supercell(ideal), NormalEquations(basis.parameter_orders)
    for atoms in rattled_labels(folder):
        equations.add(basis.force_matrix(atoms, box), atoms.get_forces())
    return basis, fit(equations)


def minima(folder: Path, *arguments: str | Path) -> tuple[dict, str]:
    """What minima.py found in one run, and its table."""
    done = script("minima.py", *arguments, "--frames", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((folder / "minima" / "minima.json").read_text())
    return run, done.stdout


@pytest.fixture(scope="module")
def harmonic(folder: Path) -> Path:
    """Models of order 2, one stiff, one half as stiff, one upside down, and a run with the first."""
    basis, posterior = fitted(folder)
    for name, factor in (("stiff", 1.0), ("half", 0.5), ("falling", -1.0)):
        scaled = replace(posterior, mean=factor * posterior.mean)
        export_crystal(basis, scaled, folder / f"{name}.pt", provenance={"training_set_hash": "0", "n_training": 3})
    asked = ["dynamic.toml", "stiff.pt", "--temperatures", "300", *SHORT, "--out", "harmonic"]
    done = script("stability.py", *asked, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "harmonic" / "stiff_300K" / "frames.dump"


def test_frames_of_a_crystal_relax_to_it(folder: Path, harmonic: Path) -> None:
    run, text = minima(folder, "stiff.pt", harmonic)
    assert run["atoms"] == 16
    assert [row["frame"] for row in run["minima"]] == [1]
    for row in run["minima"]:
        assert (row["verdict"], row["stopped"], row["second"]) == ("", "", None)
        assert row["energy"] == pytest.approx(0.0, abs=1e-2)
        assert row["displacement"] < 0.02
    assert "frames relaxed: 1; 1 to minima at most 5 meV/atom below the ideal crystal, 0 to false ones" in text


def test_a_fall_to_the_displacement_limit_is_false_if_the_second_model_has_the_crystal(
    folder: Path, harmonic: Path
) -> None:
    run, text = minima(folder, "falling.pt", harmonic, "--second", "stiff.pt")
    for row in run["minima"]:
        assert (row["verdict"], row["stopped"]) == ("false", "displacement limit")
        assert row["energy"] < 0.0
        assert row["second"] == pytest.approx(0.0, abs=1e-2)
    assert "1 to false ones" in text
    run, _ = minima(folder, "falling.pt", harmonic)
    assert {row["verdict"] for row in run["minima"]} == {"unknown (no second model)"}


def test_minima_below_the_crystal_have_the_energies_of_the_models(folder: Path, harmonic: Path) -> None:
    # what passes for the ideal crystal is a displaced one, which lies above the minimum by half u . H . u
    basis, posterior = fitted(folder)
    ideal = read(harmonic.with_name("box.data"), format="lammps-data", atom_style="atomic")
    displaced = ideal.copy()
    displaced.positions += np.random.default_rng(3).normal(0.0, 0.1, displaced.positions.shape)
    forces = basis.forces(posterior.mean, displaced, basis.supercell(ideal))
    moved = displaced.positions - ideal.positions
    height = -500.0 * np.sum(forces * moved) / len(ideal)  # meV/atom
    assert height > 20.0
    other = folder / "displaced"
    other.mkdir(exist_ok=True)
    shutil.copy(harmonic, other)
    displaced.write(other / "box.data", format="lammps-data", masses=True)
    asked = ["stiff.pt", other / "frames.dump", "--threshold", f"{0.75 * height:g}"]
    for second, verdict, energy in (("half.pt", "false", -height / 2), ("stiff.pt", "in both models", -height)):
        run, text = minima(folder, *asked, "--second", second)
        for row in run["minima"]:
            assert row["verdict"] == verdict
            assert row["energy"] == pytest.approx(-height, rel=1e-3)
            assert row["second"] == pytest.approx(energy, rel=1e-3)
        assert run["ideal_relaxes"] == pytest.approx([-height, energy], rel=1e-3)
        assert "It is no minimum there, so that the verdicts are uncertain." in text


def test_minima_of_other_files_are_refused_in_a_sentence(folder: Path, harmonic: Path, tmp_path: Path) -> None:
    shutil.copy(harmonic, tmp_path)
    done = script("minima.py", "stiff.pt", tmp_path / "frames.dump", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith(f"There is no file {tmp_path / 'box.data'}")
    bulk("Si", a=5.431, cubic=True).write(tmp_path / "box.data", format="lammps-data", masses=True)
    done = script("minima.py", "stiff.pt", tmp_path / "frames.dump", cwd=folder)
    assert done.returncode == 1
    assert "number of atoms or cell differ" in done.stderr


def test_data_files_have_the_types_of_the_model_that_they_are_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    stability = importlib.import_module("stability")
    crystal = bulk("SnSe", "rocksalt", a=6.0, cubic=True)
    (tmp_path / "a.data").write_text(stability.data_file(crystal, ["Sn", "Se"]))
    found = read(tmp_path / "a.data", format="lammps-data", atom_style="atomic")  # remembers the types of its file
    (tmp_path / "b.data").write_text(stability.data_file(found, ["Se", "Sn"]))
    again = read(tmp_path / "b.data", format="lammps-data", atom_style="atomic")
    assert again.get_chemical_symbols() == crystal.get_chemical_symbols()
    assert again.arrays["type"].tolist() == [2 if symbol == "Sn" else 1 for symbol in crystal.get_chemical_symbols()]
