"""Replicas of a small system in one process: one after the other, at once, and the one large system of their atoms.

python tests/benchmarks/replicas.py

Wall-clock time of the dynamics alone (no start, no files of other stages), one core, in turn; medians of three rounds.
The replicas are those of the active-learning loop, with all that it does between steps. Models have random weights;
the atoms are cold, so that they stay where they are.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts

import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import systems
import torch
from ase import Atoms

from ubmd.data.extxyz import write_structures
from ubmd.lammps.engine import ReplicaResult, ReplicaTask
from ubmd.lammps.group import run_at_once
from ubmd.lammps.replica import run_replica

REPLICAS, STEPS, ROUNDS = 8, 400, 3
CASES = {
    "22 atoms, no bias, u every 4 steps": ("alanine", "light128", 0.0, 4),
    "22 atoms, default bias (p = 128, every 4 steps)": ("alanine", "light128", 0.25, 4),
    "22 atoms, p = 512, bias in every step": ("alanine", "light512", 0.25, 1),
    "76 atoms, default bias": ("framework", "light128", 0.25, 4),
}


def many_in_one_box(atoms: Atoms) -> Atoms:
    """Copies of a molecule far from each other, or a longer cell: as many atoms as all replicas have."""
    if atoms.pbc.any():
        return atoms.repeat((1, 1, REPLICAS))
    far = np.ptp(atoms.positions, axis=0) + 15.0
    both = Atoms()
    for k in range(REPLICAS):
        copy = atoms.copy()
        copy.positions += far * [k % 2, k // 2 % 2, k // 4]
        both += copy
    return both


def tasks(folder: Path, case: tuple[str, str, float, int], name: str, starts: list[Atoms]) -> list[ReplicaTask]:
    """A replica of each structure."""
    system, model, force, every = case
    for k, start in enumerate(starts):
        write_structures(folder / f"{name}_{k}.extxyz", [start])
    return [
        ReplicaTask(
            replica=k,
            model=systems.model_file(folder, system, model),
            start=folder / f"{name}_{k}.extxyz",
            frames=folder / f"{name}_frames_{k}.extxyz",
            steps=STEPS,
            timestep=0.5,
            temperature=5.0,
            damping=0.51,
            frames_every=200,
            precision="mixed",
            force=force,
            species={},
            window=4,
            every=every,
            threshold=float("inf"),
            velocity_seed=1 + k,
            langevin_seed=11 + k,
            min_distance=0.1,
        )
        for k in range(len(starts))
    ]


def one_by_one(given: list[ReplicaTask]) -> list[ReplicaResult]:
    """Each alone."""
    return [run_replica(task) for task in given]


def together(given: list[ReplicaTask]) -> list[ReplicaResult]:
    """All in threads of this process."""
    return run_at_once(given[0].model, [partial(run_replica, task, None) for task in given])


def seconds(results: list[ReplicaResult]) -> float:
    """Time of the dynamics; of replicas at once, the parts of all."""
    assert all(result.stopped == "step limit" for result in results), [result.reason for result in results]
    return sum(result.seconds for result in results)


def row(folder: Path, name: str) -> str:
    """One line of the table."""
    case = CASES[name]
    start = systems.SYSTEMS[case[0]].make()
    small = tasks(folder, case, "small", [start] * REPLICAS)
    large = tasks(folder, case, "large", [many_in_one_box(start)])
    times = [(seconds(one_by_one(small)), seconds(together(small)), seconds(one_by_one(large))) for _ in range(ROUNDS)]
    alone, at_once, box = (1000.0 * statistics.median(t) / STEPS for t in zip(*times, strict=True))
    return f"| {name} | {alone:.2f} | {at_once:.2f} | {box:.2f} | {alone / at_once:.2f} | {at_once / box:.2f} |"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for system, model in dict.fromkeys(case[:2] for case in CASES.values()):
            systems.write_model(folder, system, model)
        print(f"{REPLICAS} replicas, one core; ms for a step of all, median of {ROUNDS}")
        print("| | one by one | at once | one large system | one by one / at once | at once / large |\n|" + "---|" * 6)
        for name in CASES:
            print(row(folder, name), flush=True)


if __name__ == "__main__":
    main()
