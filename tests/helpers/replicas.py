"""Models of copper and gold for replicas (EMT, 16 neurons), and replicas of 40 steps."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from system import cluster

from ubmd.data.extxyz import write_structures
from ubmd.lammps.engine import ReplicaResult
from ubmd.lammps.replica import ReplicaTask
from ubmd.learning.start import perturb
from ubmd.learning.work.inside import Reply
from ubmd.learning.work.tasks import MDJob, run_together
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.trainer import train
from ubmd.references import label
from ubmd.settings import ModelSettings, ReferenceSettings, StartSettings, TrainingSettings, UncertaintySettings


def labelled(atoms: Atoms) -> Atoms:
    """A copy with EMT energy and forces."""
    copy = atoms.copy()
    copy.calc = EMT()
    copy.calc = SinglePointCalculator(copy, energy=copy.get_potential_energy(), forces=copy.get_forces())
    return copy


def shaken(atoms: Atoms, seed: int) -> Atoms:
    """A copy whose atoms are displaced by up to 0.15 Å along each axis."""
    copy = atoms.copy()
    copy.positions += np.random.default_rng(seed).uniform(-0.15, 0.15, copy.positions.shape)
    return copy


def crystal() -> Atoms:
    """32 atoms of copper, nearly cubic, turned against LAMMPS's axes."""
    atoms = bulk("Cu", a=3.65, cubic=True) * (2, 2, 2)
    atoms.set_cell(atoms.cell[:] @ np.array([[1.0, 0.02, 0.0], [0.0, 1.0, 0.03], [0.01, 0.0, 1.0]]), scale_atoms=True)
    atoms.rotate(40.0, (1.0, 2.0, 3.0), rotate_cell=True)
    return atoms


def train_cluster_model(folder: Path) -> Path:
    """A model file of the cluster."""
    structures = [labelled(shaken(cluster(), k)) for k in range(8)]
    settings = ModelSettings(hidden=(16, 16), n_radial=2)
    trained = train(settings, TrainingSettings(epochs=30, threads=1), structures[:6], structures[6:], folder, 0)
    export_model(
        trained.model, structures[:6], structures[6:], UncertaintySettings(projections=16), folder / "model.pt"
    )
    return folder / "model.pt"


def train_crystal_model(folder: Path) -> Path:
    """A model file of strained and shaken copper that knows stresses."""
    rng = np.random.default_rng(0)
    copies = perturb([crystal()], StartSettings(file="x", count=20, displacement=0.25, strain=0.06), rng)
    structures = [label(atoms, ReferenceSettings(calculator="ase.calculators.emt:EMT"), Path()) for atoms in copies]
    network, training = ModelSettings(hidden=(16, 16), n_radial=2), TrainingSettings(epochs=80, batch_size=4, threads=1)
    trained = train(network, training, structures[:16], structures[16:], folder, 0)
    uncertainty = UncertaintySettings(projections=16)
    export_model(trained.model, structures[:16], structures[16:], uncertainty, folder / "model.pt")
    return folder / "model.pt"


def make_task(folder: Path, model: Path, start: Atoms | None = None, **changes: object) -> ReplicaTask:
    """A biased replica of the cluster, or of another start structure; writes the start file."""
    write_structures(folder / "start.extxyz", [cluster() if start is None else start])
    values = {
        "replica": 3,
        "model": model,
        "start": folder / "start.extxyz",
        "frames": folder / "frames.extxyz",
        "steps": 40,
        "timestep": 2.0,
        "temperature": 300.0,
        "damping": 0.5,
        "frames_every": 10,
        "precision": "double",
        "force": 0.5,
        "species": {"Au": 0.0},
        "window": 4,
        "every": 2,
        "threshold": 1000.0,
        "velocity_seed": 11,
        "langevin_seed": 12,
        "min_distance": 0.5,
    }
    return ReplicaTask.model_validate(values | changes)


def crash_with_company(*jobs: tuple[MDJob[ReplicaTask, ReplicaResult]]) -> list[Reply]:
    """`run_together`, where replica 1 kills the process (in a worker)."""
    if any(job.task.replica == 1 for (job,) in jobs):
        os.kill(os.getpid(), signal.SIGSEGV)
    return run_together(*jobs)
