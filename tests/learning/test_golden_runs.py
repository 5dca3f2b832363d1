"""Run folders and model files of an earlier version (tests/golden) still work: no label is asked for again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from counted import place
from said import by_calculator, by_lammps
from typer.testing import CliRunner

from ubmd.cli.main import app
from ubmd.runs.event_records import EVENTS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

UNITS = {"loop": "iteration", "force_constants": "round", "network": "round"}
CHECKPOINT_EVERY = 3  # epochs, in the settings of the golden runs
QUICK = {
    "loop": "start_append train export test_set measure md select label append record report",
    "force_constants": "start_append learn test_set measure move signals label append judge record report",
    "network": "learn move learn_late",
}
SLOW = {
    "loop": "start_label train_warm label_late",
    "force_constants": "start_label learn_late",
    "network": "label judge",
}


def cases() -> list[Any]:
    """(kind, state) of all golden runs."""
    quick = [pytest.param(kind, state) for kind, states in QUICK.items() for state in states.split()]
    slow = [pytest.param(k, s, marks=pytest.mark.slow) for k, states in SLOW.items() for s in states.split()]
    return quick + slow


def unpack(archive: str, part: str, folder: Path) -> Path:
    """One folder of an archive; returns where it is."""
    with tarfile.open(GOLDEN / f"{archive}.tar.xz") as file:
        members = [member for member in file if member.name == part or member.name.startswith(f"{part}/")]
        file.extractall(folder, members, filter="data")
    return folder / part


def ubmd(*words: str) -> str:
    """What the command prints; it has to succeed."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def frames_of(path: Path) -> list[str]:
    """Whole frames of an extxyz file: a kill may have cut the last one short."""
    lines, frames = path.read_text().splitlines(keepends=True) if path.exists() else [], []
    while lines and len(lines) >= (size := int(lines[0]) + 2) and lines[size - 1].endswith("\n"):
        frames.append("".join(lines[:size]))
        lines = lines[size:]
    return frames


def structures(path: Path) -> list[Atoms]:
    """Whole frames of an extxyz file."""
    return [ase.io.read(io.StringIO(frame), format="extxyz") for frame in frames_of(path)]


def is_sealed(path: Path) -> bool:
    """Whether a file is finished and undamaged."""
    seal = path.with_name(f".{path.name}.seal")
    return seal.exists() and json.loads(seal.read_text())["sha256"] == sha256(path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Run:
    """A golden run folder."""

    path: Path
    unit: str

    def events(self) -> list[dict[str, Any]]:
        """Whole lines of its events."""
        lines = (self.path / "events.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def labels(self) -> dict[str, Atoms]:
        """What it holds of labels: in the data set, and in sealed files that are not yet there."""
        files = [path for path in self.path.rglob("label_*.extxyz") if is_sealed(path)]
        return {place(atoms): atoms for path in [self.path / "dataset.extxyz", *files] for atoms in structures(path)}

    def tested(self) -> dict[str, Atoms]:
        """What it holds of its test set."""
        files = [path for path in self.path.glob("test/trajectory_*.extxyz") if is_sealed(path)]
        return {place(atoms): atoms for path in [self.path / "test.extxyz", *files] for atoms in structures(path)}

    def stages(self, since: int = 0, ended: bool = False) -> set[tuple[str, int | None]]:
        """(stage, turn) of the stages that have begun, or have ended."""
        name = "stage_done" if ended else "stage_started"
        return {(e["stage"], e.get(self.unit)) for e in self.events()[since:] if e["event"] == name}

    def finished_files(self) -> dict[Path, str]:
        """Hashes of what workers have finished: labels, frames of replicas, pieces of trajectories."""
        files = [path for path in self.path.rglob("label_*.extxyz") if is_sealed(path)]
        for note in self.notes():
            frames = note.with_name(note.name.replace("replica", "frames")).with_suffix(".extxyz")
            files += [note, frames if note.stem.startswith("replica") else note.with_suffix(".npz")]
        return {path: sha256(path) for path in files}

    def notes(self) -> list[Path]:
        """How replicas, or pieces of trajectories, have ended."""
        found = [*self.path.rglob("replica_*.json"), *self.path.rglob("piece_*.json")]
        return [path for path in found if ".attempt" not in path.parent.name]

    def replicas(self) -> set[tuple[int, int]]:
        """(turn, number) of the replicas that have ended."""
        return {(int(path.parent.name.split("_")[1]), int(path.stem.split("_")[1])) for path in self.notes()}

    def moved(self, since: int) -> set[tuple[int, int]]:
        """(turn, number) of the replicas that have run."""
        ends = ("replica_done", "piece_done")
        return {(e[self.unit], e["replica"]) for e in self.events()[since:] if e["event"] in ends}

    def logs(self) -> dict[Path, list[str]]:
        """Rows of training logs up to the last checkpoint; they hold times, so none is the same twice."""
        found = {}
        for log in self.path.rglob("log.csv"):
            rows = log.read_text().splitlines()[1:]
            found[log] = rows[: (len(rows) - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY]
        return found


@pytest.mark.parametrize(("kind", "state"), cases())
def test_a_killed_run_of_an_earlier_version_goes_on(
    kind: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpack(kind, state, tmp_path)
    run, unit = Run(folder / "run", UNITS[kind]), UNITS[kind]
    finished = Run(unpack(kind, "finished", tmp_path) / "run", unit)
    labels, tested, files, logs = run.labels(), run.tested(), run.finished_files(), run.logs()
    first = frames_of(run.path / "dataset.extxyz")
    replicas = run.replicas()
    count, started, done = len(run.events()), run.stages(), run.stages(ended=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COUNTED_LOG", str(tmp_path / "asked"))
    monkeypatch.setenv("COUNTED_SECONDS", "0")
    assert "run" in ubmd("status", "run")

    ubmd("run", "settings.toml", "--set", "workers.processes=1")

    check_labels(run, labels, tested, tmp_path / "asked")
    dataset = frames_of(run.path / "dataset.extxyz")
    assert dataset[: len(first)] == first
    assert len(dataset) == len(frames_of(finished.path / "dataset.extxyz"))
    assert run.events()[-1]["event"] == "run_done"
    again = run.stages(since=count)
    assert not again & done
    assert started - done <= again
    assert not run.moved(since=count) & replicas
    assert {path: sha256(path) for path in files} == files
    for log, rows in logs.items():
        assert log.read_text().splitlines()[1 : len(rows) + 1] == rows
    assert not (run.path / "aside").exists()
    assert not list(run.path.rglob("*.attempt"))
    assert str(len(dataset)) in ubmd("status", "run")
    for event in run.events():
        EVENTS.validate_python(event)


def check_labels(run: Run, labels: dict[str, Atoms], tested: dict[str, Atoms], log: Path) -> None:
    """What the folder held was not asked for, everything else once."""
    asked = Counter(log.read_text().split() if log.exists() else [])
    assert not asked.keys() & labels.keys()
    assert not asked.keys() & tested.keys()
    now = run.labels()
    for name, atoms in labels.items():
        assert now[name].get_potential_energy() == atoms.get_potential_energy()
        np.testing.assert_array_equal(now[name].get_forces(), atoms.get_forces())
    new = {*now, *map(place, structures(run.path / "rejected.extxyz"))} - labels.keys()
    assert all(asked[name] == 1 for name in new)
    if len(tested) == len(run.tested()):  # else the test set's steps were asked for, too
        assert asked.keys() == new
    test = structures(run.path / "test.extxyz")
    assert {place(atoms) for atoms in test} >= tested.keys()


# ------------------------------------------------------------------------------------------ model files

QUICK_MODELS = (
    "posterior",
    "posterior_plain",
    "ensemble",
    "ensemble_plain",
    "force_constants",
    "force_constants_plain",
)
SLOW_MODELS = ("distance", "distance_plain", "last-layer", "last-layer_plain")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model files, structures, and what the earlier version said of them."""
    folder = tmp_path_factory.mktemp("models")
    with tarfile.open(GOLDEN / "models.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder


def check_said(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Numbers are those of the earlier version, to 1e-8 of the largest of their kind."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-8 * largest, err_msg=name)


@pytest.mark.parametrize("name", [*QUICK_MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MODELS)])
def test_a_model_file_of_an_earlier_version_says_what_it_said(name: str, models: Path, tmp_path: Path) -> None:
    """With and without the compiled operators, in Python and in LAMMPS."""
    said = json.loads((models / "said.json").read_text())[f"{name}.pt"]
    model = models / f"{name}.pt"
    for box, wanted in said.items():
        check_said(by_calculator(model, ase.io.read(models / f"{box}.extxyz")), wanted["calculator"])
        found = by_lammps(model, models / f"{box}.data", wanted["elements"], wanted["bias"], tmp_path)
        check_said(found, wanted["lammps"])
    assert "Cu" in ubmd("info", str(model))


def test_a_killed_training_of_an_earlier_version_goes_on(models: Path) -> None:
    log = models / "alloy" / "log.csv"
    rows = log.read_text().splitlines()
    assert 6 < len(rows) < 25
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from ubmd.cli.entry import main; main()", "train", "train.toml"]
    done = subprocess.run(command, cwd=models, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text().splitlines()[:5] == rows[:5]
    assert len(log.read_text().splitlines()) == 25
    assert (models / "alloy" / "model.pt").exists()
