"""Replicas that share a process: each has the trajectory of its own single run, whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from replicas import crash_with_company, crystal, make_task
from system import cluster

from ubmd.attempts import Attempt
from ubmd.data.structures import read_structures
from ubmd.errors import SimulationError, UbmdError
from ubmd.lammps import replica
from ubmd.lammps.engine import Company, ReplicaResult, ReplicaTask
from ubmd.lammps.group import most_at_once, run_at_once
from ubmd.lammps.replica import REPLICAS, run_replica
from ubmd.learning.work.groups import TaskGroup
from ubmd.learning.work.inside import Reply, guarded
from ubmd.learning.work.tasks import MDJob, run_together
from ubmd.learning.work.workers import TaskCrashed, TaskFailed, Workers, opened


def tasks_of(folder: Path, model: Path, starts: list[Atoms], **changes: object) -> list[ReplicaTask]:
    """Replicas with their own folders, starts and seeds."""
    found = []
    for k, start in enumerate(starts):
        own = {"replica": k, "velocity_seed": 11 + k, "langevin_seed": 50 + k}
        (folder / f"{k}").mkdir(parents=True)
        found.append(make_task(folder / f"{k}", model, start, **own | changes))
    return found


def at_once(tasks: list[ReplicaTask]) -> list[Reply]:
    """Replies of replicas that share this process."""

    def work(task: ReplicaTask, company: Company) -> ReplicaResult:
        return run_replica(task, None, company)

    return run_at_once(tasks[0].model, [partial(guarded, partial(work, task)) for task in tasks])


def compare(shared: ReplicaTask, single: ReplicaTask, tolerance: float) -> float:
    """Frames of two trajectories with their uncertainties; returns the largest distance that an atom has gone."""
    found, expected = read_structures(shared.frames), read_structures(single.frames)
    assert [a.info["step"] for a in found] == [a.info["step"] for a in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.positions, b.positions, rtol=0.0, atol=tolerance)
        np.testing.assert_allclose(a.cell[:], b.cell[:], rtol=0.0, atol=tolerance)
        np.testing.assert_allclose(a.arrays["atomic_uncertainty"], b.arrays["atomic_uncertainty"], rtol=tolerance)
        assert a.info["uncertainty"] == pytest.approx(b.info["uncertainty"], rel=tolerance)
    return float(np.abs(found[-1].positions - found[0].positions).max())


def pieces_of_the_cluster() -> list[Atoms]:
    """Three structures of different sizes."""
    return [cluster(), cluster()[:-2], cluster()[:-3]]


@pytest.mark.parametrize(
    "changes",
    [
        {"every": 1},
        {"every": 3, "window": 2},
        {"uncertainty": "atomic", "every": 1},
        {"uncertainty": "atomic", "every": 2},
        {"force": 0.0},
    ],
    ids=["every step", "every 3 steps", "atomic", "atomic every 2", "no bias"],
)
def test_each_has_the_trajectory_of_its_single_run(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"steps": 100, **changes}
    shared = tasks_of(tmp_path / "shared", model, pieces_of_the_cluster(), **changes)
    single = tasks_of(tmp_path / "single", model, pieces_of_the_cluster(), **changes)
    results = [opened(reply) for reply in at_once(shared)]
    for task, other, result in zip(shared, single, results, strict=True):
        expected = run_replica(other)
        assert (result.stopped, result.steps, result.frames) == ("step limit", 100, expected.frames)
        assert result.bias_share == pytest.approx(expected.bias_share, rel=1e-9)
        assert (result.bias_share > 0.05) == (changes.get("force") != 0.0)
        assert compare(task, other, 1e-10) > 0.1


def test_boxes_that_move_and_a_bias_stress(crystal_model: Path, tmp_path: Path) -> None:
    changes = {"ensemble": "npt", "stress": 0.5, "steps": 100, "every": 1, "temperature": 600.0, "timestep": 1.0}
    starts = [crystal(), crystal()]
    starts[1].rattle(0.05, seed=3)
    shared = tasks_of(tmp_path / "shared", crystal_model, starts, **changes)
    single = tasks_of(tmp_path / "single", crystal_model, starts, **changes)
    for reply in at_once(shared):
        assert opened(reply).stopped == "step limit"
    for task, other in zip(shared, single, strict=True):
        run_replica(other)
        compare(task, other, 1e-10)
        frames = read_structures(task.frames)
        assert np.abs(frames[-1].cell[:] - frames[0].cell[:]).max() > 1e-4


@pytest.mark.parametrize("precision", ["mixed", "double"])
def test_no_bit_depends_on_the_company(model: Path, tmp_path: Path, precision: str) -> None:
    """So that a run which is interrupted and resumed with the replicas that are left ends as any other."""
    changes = {"steps": 60, "precision": precision, "every": 1}
    contents = []
    for name, chosen in {"all": [0, 1, 2], "two": [1, 2], "one": [2]}.items():
        tasks = tasks_of(tmp_path / name, model, pieces_of_the_cluster(), **changes)
        for reply in at_once([tasks[k] for k in chosen]):
            opened(reply)
        contents.append(tasks[2].frames.read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_one_stops_one_fails_and_one_goes_on(model: Path, tmp_path: Path) -> None:
    unknown = cluster()
    unknown.symbols[0] = "Ni"
    starts = [cluster(), unknown, cluster(), cluster()]
    tasks = tasks_of(tmp_path / "shared", model, starts, steps=100, every=1)
    alone = tasks_of(tmp_path / "alone", model, starts, steps=100, every=1)
    limit = run_replica(alone[0]).max_u
    tasks[0] = tasks[0].model_copy(update={"threshold": 0.9 * limit})
    tasks[3] = tasks[3].model_copy(update={"timestep": 500.0})  # explodes
    stopped, failed, whole, exploded = at_once(tasks)
    assert opened(stopped).stopped == "threshold"
    assert opened(stopped).steps < 100
    with pytest.raises(SimulationError, match="Ni"):
        opened(failed)
    assert (opened(exploded).stopped, opened(exploded).steps < 100) == ("failed", True)
    assert opened(whole).stopped == "step limit"
    run_replica(alone[2])
    compare(tasks[2], alone[2], 1e-10)


def test_molecules_that_need_another_neighbour_list_begin_again_in_company(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dimer that turns parallel to an axis starts anew in the middle of the other's run."""
    begun: list[tuple[int, str]] = []
    original = replica._run_once

    def note(task: ReplicaTask, attempt: Attempt, neighbours: replica.Neighbours, *rest: Any) -> Any:
        begun.append((task.replica, neighbours))
        return original(task, attempt, neighbours, *rest)

    monkeypatch.setattr(replica, "_run_once", note)
    dimer = Atoms("Cu2", [[0.0, 0.0, 0.0], [2.2, 0.2, 0.4]])
    changes = {"steps": 4000, "temperature": 600.0, "force": 0.0, "langevin_seed": 12}
    shared = tasks_of(tmp_path / "shared", model, [dimer, dimer], **changes)
    single = tasks_of(tmp_path / "single", model, [dimer, dimer], **changes)
    for reply in at_once(shared):
        assert opened(reply).stopped == "step limit"
    together = begun.copy()
    assert together[:2] == [(0, "bin"), (1, "bin")]
    assert (0, "nsq") in together
    for task, other in zip(shared, single, strict=True):
        run_replica(other)
        frames, others = read_structures(task.frames), read_structures(other.frames)
        assert len(frames) == len(others) == 401
        np.testing.assert_allclose(frames[5].positions, others[5].positions, atol=1e-10)


def test_another_model_is_evaluated_by_itself(model: Path, crystal_model: Path, tmp_path: Path) -> None:
    copper = Atoms("Cu4", [[0, 0, 0], [2.5, 0, 0.3], [0, 2.5, 0], [0.3, 0, 2.5]])
    shared = tasks_of(tmp_path / "shared", model, [copper, copper], steps=30)
    single = tasks_of(tmp_path / "single", model, [copper, copper], steps=30)
    shared[1], single[1] = (t[1].model_copy(update={"model": crystal_model}) for t in (shared, single))
    for reply, task, other in zip(at_once(shared), shared, single, strict=True):
        assert opened(reply).stopped == "step limit"
        run_replica(other)
        compare(task, other, 1e-10)


def test_nobody_waits_for_a_thread_that_could_not_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tasks_of(tmp_path, model, pieces_of_the_cluster())
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "ubmd_replica_2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        at_once(tasks)
    assert [len(read_structures(task.frames)) for task in tasks[:2]] == [5, 5]


def test_the_seconds_are_divided(model: Path, tmp_path: Path) -> None:
    results = [opened(r) for r in at_once(tasks_of(tmp_path, model, [cluster()] * 3, steps=200))]
    seconds = [result.seconds for result in results]
    assert max(seconds) < 2.0 * min(seconds)


# ------------------------------------------------------------------------------------------ which, and how many


def test_how_many_pay(model: Path, tmp_path: Path) -> None:
    assert most_at_once(model, "", 1, 22) == 23
    assert most_at_once(model, "", 1, 64) == 8
    assert most_at_once(model, "", 1, 65) == 1
    assert most_at_once(model, "colvar {}", 1, 22) == 1
    assert most_at_once(model, "", 2, 22) == 1


# ------------------------------------------------------------------------------------------ workers


def jobs_of(tasks: list[ReplicaTask]) -> dict[int, tuple[MDJob[ReplicaTask, ReplicaResult]]]:
    return {
        k: (MDJob(REPLICAS, task, f"key {k}", task.frames.with_name("note.json"), True),)
        for k, task in enumerate(tasks)
    }


def collect(group: TaskGroup) -> tuple[dict[int, ReplicaResult], dict[int, UbmdError]]:
    results: dict[int, ReplicaResult] = {}
    errors: dict[int, UbmdError] = {}

    def done(key: int, result: ReplicaResult | None, error: UbmdError | None) -> None:
        if result is None:
            assert error is not None
            errors[key] = error
        else:
            results[key] = result

    group.wait(done)
    return results, errors


def group_of(workers: Workers, many: Callable[..., Any], lost: list[Any]) -> TaskGroup:
    return TaskGroup(workers, many, 300.0, lost=lambda key, error, again: lost.append((key, again)), many=True)


def test_workers_share_the_replicas(model: Path, tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, model, [cluster()] * 5)
    with Workers(2) as workers:
        group = group_of(workers, run_together, [])
        group.add(jobs_of(tasks), together=8)
        assert sorted(len(keys) for keys in group._running.values()) == [2, 3]
        results, errors = collect(group)
    assert (sorted(results), errors) == ([0, 1, 2, 3, 4], {})
    assert all(result.frames == 5 for result in results.values())


def test_one_that_crashes_takes_nobody_along(model: Path, tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, model, [cluster()] * 3)
    lost: list[tuple[int, bool]] = []
    with Workers(1) as workers:
        group = group_of(workers, crash_with_company, lost)
        group.add(jobs_of(tasks), together=8)
        results, errors = collect(group)
    assert sorted(results) == [0, 2]
    assert isinstance(errors[1], TaskCrashed)
    assert lost == [(0, True), (1, True), (2, True), (1, False)]


def test_one_that_fails_is_the_only_one(model: Path, tmp_path: Path) -> None:
    unknown = cluster()
    unknown.symbols[0] = "Ni"
    tasks = tasks_of(tmp_path, model, [cluster(), unknown, cluster()])
    with Workers(1) as workers:
        group = group_of(workers, run_together, [])
        group.add(jobs_of(tasks), together=8)
        results, errors = collect(group)
    assert sorted(results) == [0, 2]
    assert isinstance(errors[1], SimulationError)
    assert not isinstance(errors[1], TaskFailed)
