"""`ubmd.biased_md`: a trajectory in LAMMPS with a model, pushed towards what it does not know."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ubmd.calculator import Model
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError, SimulationError
from ubmd.lammps.engine import ReplicaResult
from ubmd.lammps.replica import run_replica
from ubmd.learning.loop.replicas import replica_tasks
from ubmd.learning.work.workers import Workers, outcome
from ubmd.settings import RunSettings, make_settings


@dataclass(frozen=True)
class Trajectory:
    """Frames of MD with a model, T of them."""

    frames: list[Atoms] = field(repr=False)
    """positions in Å; ``arrays["atomic_uncertainty"]`` are u_i, eV/Å. Cells are rotated as LAMMPS needs them"""
    time: np.ndarray = field(repr=False)
    """[T] ps"""
    u: np.ndarray = field(repr=False)
    """[T] uncertainty of the energy, eV/atom"""
    max_u: np.ndarray = field(repr=False)
    """[T] largest atomic uncertainty, eV/Å"""
    result: ReplicaResult
    """how it ended: ``stopped``, ``reason``, ``steps``, ``ms_per_step`` ..."""


def biased_md(
    model: Path | str | Model,
    structure: Atoms,
    md: Mapping[str, Any] | None = None,
    bias: Mapping[str, Any] | None = None,
    *,
    threshold: float = math.inf,
    seed: int = 0,
) -> Trajectory:
    """MD of one structure in LAMMPS, biased as the replicas of a run are.

    >>> import ubmd
    >>> from ase.build import bulk
    >>> trajectory = ubmd.biased_md("copper/model.pt", bulk("Cu", cubic=True), md={"steps": 400})
    >>> trajectory.result.stopped, trajectory.result.steps
    ('step limit', 400)
    >>> trajectory.max_u.shape
    (21,)

    It runs in a process of its own: a crash of LAMMPS is an ending like others (``result.reason``).

    Args:
        model: a model file, or a model.
        structure: where it starts; its charges, masses and fixed atoms are respected.
        md: the table ``md`` of the settings of a run (``ubmd schema run``): steps, temperature (K), timestep (fs),
            ensemble, pressure (MPa), frames_every and so on.
        bias: the table ``bias``: force (the strength tau; 0: no bias), stress, species, window, every and so on.
        threshold: largest atomic uncertainty at which it ends, eV/Å.
        seed: of velocities and thermostat.

    Raises:
        SettingsError: a setting is unknown or out of range. ModelError: the model file cannot be used.
        DataError: the structure cannot be used. SimulationError: MD could not be started.
    """
    path = Path(model.path if isinstance(model, Model) else model).absolute()
    if not path.is_file():
        raise SettingsError(f"There is no model file {path}.")
    with tempfile.TemporaryDirectory(prefix="ubmd_md_") as name, Workers(1) as worker:
        folder = Path(name)
        write_structures(folder / "start.extxyz", [structure])
        task = _task(folder, path, dict(md or {}), dict(bias or {}), threshold, seed)
        result = outcome(worker.submit(run_replica, task))
        frames = read_structures(task.frames, compare=False) if result.frames else []
    if not frames:
        raise SimulationError(f"There is not a single frame: {result.reason}")
    return Trajectory(
        frames,
        time=0.001 * task.timestep * np.array([int(atoms.info["step"]) for atoms in frames]),
        u=np.array([float(atoms.info["uncertainty"]) for atoms in frames]),
        max_u=np.array([float(atoms.info["max_uncertainty"]) for atoms in frames]),
        result=result,
    )


def _task(folder: Path, model: Path, md: dict[str, Any], bias: dict[str, Any], threshold: float, seed: int) -> Any:
    """The replica, by the settings of a run of which it is the only one."""
    values = {
        "run_dir": str(folder),
        "start": {"file": "start.extxyz"},
        "reference": {"calculator": ""},
        "md": {"frames_every": 20, **md, "replicas": 1},
        "bias": bias,
        "loop": {"threshold": threshold},
        "seed": seed,
    }
    settings = make_settings(RunSettings, values, source="biased_md")
    (task,) = replica_tasks(settings, 0, model, [folder / "start.extxyz"])
    return task.model_copy(update={"frames": folder / "frames.extxyz"})
