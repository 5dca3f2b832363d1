"""What the loop needs from an MD engine: to run a task in a worker, and to recover what a killed worker has done.

There are two kinds of tasks: replicas of the active-learning loop and segments of the trajectories of a dynamic run.
LAMMPS runs both (`ubmd.lammps.replica.REPLICAS`, `ubmd.lammps.trajectory.PIECES`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from ubmd.attempts import Attempt

Task = TypeVar("Task", contravariant=True)
Result = TypeVar("Result", bound=BaseModel, covariant=True)


class Company(Protocol):
    """The other tasks in this process, from the view of one of them."""

    def seconds(self) -> float:
        """Wall time that counts for this task, from any point in time."""

    def run(self, lammps: Any, line: str) -> None:
        """Run steps of LAMMPS: a command ``run``; its errors as LAMMPS's Python module raises them."""


class Alone:
    """There are no others."""

    def seconds(self) -> float:
        """All wall time counts."""
        return time.monotonic()

    def run(self, lammps: Any, line: str) -> None:
        """At once."""
        lammps.command(line)


ALONE = Alone()


class MDEngine(Protocol[Task, Result]):
    """MD of one kind of tasks. It travels to the workers with its tasks, so it can be pickled."""

    @property
    def result_type(self) -> type[Result]:
        """Class of the results."""

    def output(self, task: Task) -> Path:
        """The file that a task leaves behind, whether it was run to its end or recovered."""

    def run(
        self,
        task: Task,
        note: Callable[[Attempt, Result], None] | None = None,
        company: Company = ALONE,
    ) -> Result:
        """Run a task to its end and write its output. Failures of the dynamics are part of the result.

        Args:
            task: what to run.
            note: called when the output is in its place and the attempt is not yet over; its end must not become
                visible before what this writes (through the attempt) is there.
            company: tasks that it shares this process with.

        Raises:
            TakenOver: another process has begun the same task; nothing of what that one writes is touched.
            SimulationError: the run could not be started.
        """

    def salvage(self, task: Task, reason: str) -> Result:
        """The result 'failed' of a task whose process was lost, and why; writes the output with what there is of it.

        All attempts at the task are over, also if their processes live on.
        """


class ReplicaTask(BaseModel):
    """Everything that determines a replica's trajectory: the same task repeats it bit for bit on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    replica: int
    model: Path
    start: Path
    """extxyz; the first structure is the start."""
    frames: Path
    """extxyz that is written."""
    steps: int
    timestep: float
    """fs"""
    temperature: float
    """K"""
    damping: float
    """damping time of the thermostat, ps"""
    ensemble: Literal["nvt", "npt"] = "nvt"
    pressure: float = 0.0
    """of the barostat (npt), MPa"""
    pressure_damping: float = 1.0
    """damping time of the barostat (npt), ps"""
    coupling: Literal["iso", "aniso", "tri"] = "tri"
    """what the barostat moves (npt)"""
    cell_limit: float = 2.5
    """largest factor by which volume and lengths may grow or shrink (npt)"""
    frames_every: int
    precision: Literal["mixed", "single", "double"]
    device: str = "cpu"
    """of pair_style ubmd; like all processors, it decides last digits only"""
    force: float
    """bias strength tau; with stress 0, too: a monitor only"""
    stress: float = 0.0
    """bias strength tau_S of the stress (npt)"""
    uncertainty: Literal["energy", "atomic"] = "energy"
    """what the bias raises"""
    species: dict[str, float]
    window: int
    every: int
    threshold: float
    """the run stops when max_i u_i passes this, eV/Å; inf: never"""
    velocity_seed: int
    langevin_seed: int
    min_distance: float
    """share of the covalent radii; closer atoms end the replica"""
    ranks: int = 1
    """MPI processes that share the replica's atoms"""
    trace_every: int | None = None
    """steps between records of the trace, a multiple of ``every``; None: no trace"""
    colvars: str = ""
    """configuration of a fix colvars that joins the dynamics; empty: none"""


Ending = Literal["threshold", "step limit", "desorbed", "failed"]
"""how a replica ends; desorbed: a part of a slab or a wire has left it, beyond the model's cutoff"""


class ReplicaResult(BaseModel):
    """How a replica ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: int
    steps: int
    """MD steps run (valid ones)"""
    stopped: Ending
    reason: str
    """one sentence if it failed or something was desorbed, else empty"""
    frames: int
    """frames in the file"""
    max_u: float
    """largest max_i u_i of the frames, eV/Å"""
    bias_share: float
    """|F_bias| / |F| at the end (0 without bias)"""
    seconds: float
    """wall time of the dynamics; of replicas that share a process, each one's part of it"""
    ms_per_step: float
    ensemble: Literal["nvt", "npt"] = "nvt"
    temperature: float | None = None
    """of the thermostat, K"""
    pressure: float | None = None
    """of the barostat, MPa (npt)"""
    force: float | None = None
    """bias strength tau"""
    stress: float | None = None
    """bias strength tau_S"""


def trace_file(task: ReplicaTask) -> Path:
    """File of the trace of a replica that did not fail: frames_003.extxyz has trace_003.npz."""
    return task.frames.with_name(task.frames.stem.replace("frames", "trace") + ".npz")


class PieceTask(BaseModel):
    """Everything that determines a segment: the same task repeats it bit for bit on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: int
    model: Path
    start: Path
    """state (npz)"""
    result: Path
    """npz that is written"""
    steps: int
    """maximum steps; a multiple of check_every"""
    timestep: float
    """fs"""
    temperature: float
    """K"""
    damping: float
    """damping time of the thermostat, ps"""
    check_every: int
    """steps"""
    frames: int
    """maximum number of frames that are kept, evenly spaced"""
    precision: Literal["mixed", "single", "double"]
    device: str = "cpu"
    """of pair_style ubmd; like all processors, it decides last digits only"""
    force: float
    """bias strength tau; 0: none"""
    species: dict[str, float]
    window: int
    """checks in the window of the bias scale"""
    noise: float
    """of the model's labels, eV/Å: for the trigger's floor"""
    lattice: bool
    """whether the model is one of a crystal (fix ubmd then gives the largest displacement)"""
    langevin_seed: int
    labelled_range: Path | None = None
    """npz (`ubmd.data.labelled_range.LabelledRange`), for the trigger's extrapolation"""


class PieceResult(BaseModel):
    """How a segment ended; the rest is in its npz file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: int
    temperature: float
    begin: int
    """step of the trajectory"""
    end: int
    ended: Literal["asked", "segment", "guard", "failed"]
    reason: str
    """one sentence for guard (displacement limit) and failed, else empty"""
    rule: str
    """of the trigger that requested a label ('extrapolation': displacements beyond the labels'); 'guard'; else empty"""
    error: float | None
    """at the last check, eV/Å"""
    threshold: float | None
    """that was passed, eV/Å; None without a request for the error"""
    max_error: float | None
    """of all checks, eV/Å; None without a check"""
    mean_error: float | None
    max_displacement: float
    """largest |u| of all checks, Å; 0 for models without a lattice"""
    bias_share: float
    """|F_bias| / |F| at the last check"""
    ms_per_step: float
