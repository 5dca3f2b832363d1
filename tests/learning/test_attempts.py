"""Several processes at one task: an orphan on another machine and its successor, or an answer that was lost."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from orphan import KEY, finished_file, replica_job, run_and_die, train
from processes import HELPERS, wait_for
from replicas import labelled, make_task, shaken
from system import cluster

from ubmd.attempts import Attempt, TakenOver, attempts, steps_so_far
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.files import file_hash, write_json
from ubmd.lammps import replica, trajectory
from ubmd.lammps.replica import ReplicaTask, run_replica, salvage
from ubmd.lammps.trajectory import PieceTask, TrajectoryState, run_piece, write_state
from ubmd.lammps.triggers import AbsoluteTrigger
from ubmd.learning.loop.replicas import run_replicas
from ubmd.learning.work.groups import TaskGroup
from ubmd.learning.work.tasks import MDJob, label_file, run_md
from ubmd.learning.work.workers import Workers
from ubmd.runs.folder import RunFolder
from ubmd.settings import ReferenceSettings

ENDLESS = 10**7  # steps, for many minutes


def start_orphan(kind: str, argument: Path) -> subprocess.Popen[str]:
    script = HELPERS / "orphan.py"
    command = [sys.executable, str(script), kind, str(argument)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_piece(folder: Path, model: Path) -> PieceTask:
    state = TrajectoryState.begin(cluster(), 300.0, AbsoluteTrigger(1e9), np.random.default_rng(1))
    write_state(folder / "start.npz", state)
    fixed = {"replica": 0, "timestep": 2.0, "temperature": 300.0, "damping": 0.1, "precision": "double", "noise": 0.0}
    bias = {"force": 0.0, "species": {}, "window": 4, "lattice": False, "langevin_seed": 3, "check_every": 5}
    files = {"model": model, "start": folder / "start.npz", "result": folder / "piece_000.npz"}
    return PieceTask(**fixed, **bias, **files, steps=20, frames=2)


def numbered(folder: Path, model: Path, **changes: object) -> ReplicaTask:
    folder.mkdir(exist_ok=True)
    return make_task(folder, model, frames=folder / "frames_003.extxyz", **changes)


# ------------------------------------------------------------------------------------------ replicas


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_orphan_ends_and_harms_nothing(model: Path, tmp_path: Path, ranks: int) -> None:
    """It runs when the next driver starts the same replica, and would run for ever."""
    alone = numbered(tmp_path / "alone", model, trace_every=10, ranks=ranks)
    task = numbered(tmp_path / "both", model, trace_every=10, ranks=ranks)
    expected = run_md(replica_job(alone))
    given = tmp_path / "task.json"
    endless = {"steps": ENDLESS, "frames_every": ENDLESS, "trace_every": None}
    given.write_text(task.model_copy(update=endless).model_dump_json())
    orphan = start_orphan("replica", given)
    try:
        assert wait_for(lambda: steps_so_far(task.frames) is not None, 120.0)
        result = run_md(replica_job(task))
        said, errors = orphan.communicate(timeout=120)
    finally:
        orphan.kill()
    assert said == "frames_003.extxyz was taken over by another process with the same task.\n", errors
    assert (result.stopped, result.frames) == (expected.stopped, expected.frames) == ("step limit", 5)
    here, there = files_of(task.frames.parent), files_of(alone.frames.parent)
    assert here.keys() == there.keys()
    assert here.keys() == {"start.extxyz", "frames_003.extxyz", "frames_003.log", "trace_003.npz", "replica_003.json"}
    assert here["frames_003.extxyz"] == there["frames_003.extxyz"]
    note = json.loads(here["replica_003.json"])
    assert (note["sha256"], note["result"]["frames"]) == (file_hash(task.frames), 5)


def test_an_orphan_that_finishes_later_harms_nothing(model: Path, tmp_path: Path) -> None:
    task = numbered(tmp_path / "run", model, trace_every=10)
    orphan = Attempt.begin(task.frames)
    (orphan.folder / "frames.extxyz").write_bytes(task.start.read_bytes())
    run_md(replica_job(task))
    before = files_of(tmp_path)
    for finish in (
        lambda: orphan.report(500),
        lambda: replica._finish(task, orphan, "step limit", "", 40, 0.0, 0.0),
        lambda: orphan.put("frames.extxyz", task.frames),
        lambda: orphan.put_text("{}", finished_file(task)),
        lambda: orphan.remove(replica.trace_file(task)),
    ):
        with pytest.raises(TakenOver, match=r"frames_003\.extxyz was taken over by another process"):
            finish()
    orphan.end()
    assert files_of(tmp_path) == before
    assert attempts(task.frames) == []


def test_of_two_attempts_that_with_most_frames_is_salvaged(model: Path, tmp_path: Path) -> None:
    task = numbered(tmp_path / "run", model)
    run_replica(task)
    frames = read_structures(task.frames)
    for count in (2, 4, 3):  # as if none had noticed the others
        folder = task.frames.with_name(f"frames_003.{count:012x}.attempt")
        folder.mkdir()
        write_structures(folder / "frames.extxyz", frames[:count])
        (folder / "log.lammps").write_text(f"log of {count}")
    result = salvage(task, "The worker process was killed by SIGSEGV.")
    assert (result.stopped, result.frames, result.steps) == ("failed", 4, 30)
    assert [frame.info["step"] for frame in read_structures(task.frames)] == [0, 10, 20, 30]
    names = {path.name for path in task.frames.parent.iterdir()}
    assert names == {"start.extxyz", "frames_003.extxyz", "frames_003.log"}
    assert task.frames.with_suffix(".log").read_text() == "log of 4"


def test_a_replica_without_any_attempt_is_salvaged_empty(model: Path, tmp_path: Path) -> None:
    task = numbered(tmp_path / "run", model)
    assert salvage(task, "It never began.").frames == 0
    assert {path.name for path in task.frames.parent.iterdir()} == {"start.extxyz", "frames_003.extxyz"}


def test_what_cannot_start_keeps_its_log_and_nothing_else(model: Path, tmp_path: Path) -> None:
    unknown = cluster()
    unknown.symbols[0] = "Ni"
    with pytest.raises(replica.SimulationError):
        run_replica(numbered(tmp_path / "run", model, start=unknown))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"start.extxyz", "frames_003.log"}


def test_files_of_earlier_versions_go(model: Path, tmp_path: Path) -> None:
    task = numbered(tmp_path / "run", model)
    for name in ("frames_003.extxyz.tmp", "frames_003.progress", "frames_003.task", "frames_003.colvars/out"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("17")
    run_replica(task)
    names = {path.name for path in task.frames.parent.iterdir()}
    assert names == {"start.extxyz", "frames_003.extxyz", "frames_003.log"}


def test_an_answer_that_was_lost_is_read_again(model: Path, tmp_path: Path) -> None:
    task = numbered(tmp_path / "run", model)
    with Workers(1) as workers:
        group = TaskGroup(workers, run_and_die, 300.0)
        results = run_replicas({(0, 3): task}, group, {0: "model"}, lambda result: None, lambda steps: None)
    assert (results[0, 3].stopped, results[0, 3].reason, results[0, 3].frames) == ("step limit", "", 5)
    assert len(read_structures(task.frames)) == 5


def test_a_replica_that_has_ended_is_not_run_again(model: Path, tmp_path: Path) -> None:
    task = numbered(tmp_path / "run", model)
    first = run_md(replica_job(task))
    absent = task.model_copy(update={"model": tmp_path / "nowhere.pt"})
    assert run_md(replica_job(absent)) == first
    with pytest.raises(replica.SimulationError, match=r"nowhere\.pt"):
        run_md(replica_job(absent, "another key"))


# ------------------------------------------------------------------------------------------ both kinds of MD


@pytest.mark.parametrize("kind", ["replica", "piece"])
def test_results_are_noted_and_lost_tasks_recovered(model: Path, tmp_path: Path, kind: str) -> None:
    task, engine, ended, other = (
        (make_task(tmp_path, model), replica.REPLICAS, "stopped", "threshold")
        if kind == "replica"
        else (make_piece(tmp_path, model), trajectory.PIECES, "ended", "segment")
    )
    job = pickle.loads(pickle.dumps(MDJob(engine, task, KEY, tmp_path / "note.json")))
    assert job.kept() is None
    result = run_md(job)
    assert (job.kept(), type(result)) == (result, engine.result_type)
    assert replace(job, key="another key").kept() is None
    output = engine.output(task)
    whole = output.read_bytes()
    output.write_bytes(whole[:-1])
    assert job.kept() is None
    lost = job.salvage("The node is gone.")
    assert (getattr(lost, ended), lost.reason, job.kept()) == ("failed", "The node is gone.", lost)
    assert output.read_bytes() not in (whole, whole[:-1])
    waiting = job.salvage("The node is gone.", **{ended: other})
    assert (getattr(waiting, ended), job.kept()) == (other, waiting)


# ------------------------------------------------------------------------------------------ everything else


def test_a_piece_of_a_trajectory_that_was_taken_over(model: Path, tmp_path: Path) -> None:
    """The second process begins, and ends, while the first is at its first check."""
    task = make_piece(tmp_path, model)
    run_piece(task)
    whole = task.result.read_bytes()
    task.result.unlink()

    def begin_another(attempt: Attempt, _: object) -> None:
        assert not attempts(task.result)[1:]
        run_piece(task)
        attempt.put_text("{}", tmp_path / "piece_000.json")

    with pytest.raises(TakenOver, match=r"piece_000\.npz was taken over"):
        run_piece(task, begin_another)
    assert task.result.read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"start.npz", "piece_000.npz"}


def test_a_training_that_was_taken_over_ends(tmp_path: Path) -> None:
    for name in ("training", "validation"):
        write_structures(tmp_path / f"{name}.extxyz", [labelled(shaken(cluster(), k)) for k in range(2)])
    log = tmp_path / "member_1" / "log.csv"
    orphan = start_orphan("train", tmp_path)
    try:
        assert wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, 120.0)
        train(tmp_path, 5)
        said, errors = orphan.communicate(timeout=120)
    finally:
        orphan.kill()
    assert said == "weights.pt was taken over by another process with the same task.\n", errors
    assert [line.split(",")[0] for line in log.read_text().splitlines()] == ["epoch", "1", "2", "3", "4", "5"]
    assert not [path for path in log.parent.iterdir() if path.name.endswith((".attempt", ".tmp"))]


def test_the_first_of_two_labels_stays(tmp_path: Path) -> None:
    """The driver may have read it: an orphan that comes later must not change it."""
    write_structures(tmp_path / "candidate.extxyz", [cluster()])
    target = tmp_path / "label.extxyz"
    for calculator in ("ase.calculators.emt:EMT", "ase.calculators.lj:LennardJones"):
        reference = ReferenceSettings(calculator=calculator)
        label_file(tmp_path / "candidate.extxyz", target, KEY, reference, tmp_path)
    energy = labelled(cluster()).get_potential_energy()
    assert read_structures(target, labelled=True)[0].get_potential_energy() == pytest.approx(energy)


WRITER = """
import sys, time
from pathlib import Path
from ubmd.files import write_json
Path(sys.argv[1]).touch()
while not all(Path(name).exists() for name in "ab"):
    time.sleep(0.01)
for k in range(100):
    write_json(Path("note.json"), sys.argv[1] * (1 + 10**6 * (k % 2)))
"""


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, letter], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for letter in "ab"
    ]
    said = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    assert len(set(json.loads((tmp_path / "note.json").read_text()))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "note.json"}


def test_a_driver_removes_what_killed_processes_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    iteration = folder.iteration(0)
    kept = [iteration / "frames_000.extxyz", iteration / "notes.tmp", tmp_path / ".hidden"]
    for path in kept:
        write_json(path, 1)

    def leave() -> None:
        (iteration / ".label_000.extxyz.0123456789ab.tmp").write_text("half")
        (Attempt.begin(iteration / "frames_000.extxyz").folder / "frames.extxyz").write_text("half")
        (tmp_path / ".frames_000.0123456789ab.attempt.0123456789ab.tmp").mkdir()

    leave()
    with folder.locked():
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*kept, tmp_path / ".lock"}
        leave()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*kept, tmp_path / ".lock"}
    assert not attempts(iteration / "frames_000.extxyz")
