"""What orphans do: processes that work on at a task which is somebody else's by now. Also tasks that end badly."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from ubmd.lammps.engine import ReplicaResult, ReplicaTask
from ubmd.lammps.replica import REPLICAS
from ubmd.learning.work.tasks import MDJob, run_md, train_member
from ubmd.learning.work.workers import WorkersLost
from ubmd.settings import ModelSettings, TrainingSettings

KEY = "key"


def finished_file(task: ReplicaTask) -> Path:
    return task.frames.with_name(f"replica_{task.replica:03d}.json")


def replica_job(task: ReplicaTask, key: str = KEY) -> MDJob[ReplicaTask, ReplicaResult]:
    return MDJob(REPLICAS, task, key, finished_file(task))


def run_and_die(job: MDJob[ReplicaTask, ReplicaResult]) -> ReplicaResult:
    """Finish the replica; the answer is lost."""
    run_md(job)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def train(folder: Path, epochs: int) -> None:
    """One member of an ensemble."""
    sets = folder / "training.extxyz", folder / "validation.extxyz"
    model, options = ModelSettings(hidden=(8, 8), n_radial=2), TrainingSettings(checkpoint_every=10**6, threads=1)
    train_member(*sets, folder / "member_1", KEY, model, options, 0, None, epochs, folder)


def main(kind: str, argument: str) -> None:
    """Print why the task was given up."""
    try:
        if kind == "replica":
            task = ReplicaTask.model_validate_json(Path(argument).read_text())
            run_md(replica_job(task))
        elif kind == "train":
            train(Path(argument), 10**6)
        print("finished")
    except WorkersLost as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
