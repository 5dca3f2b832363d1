"""One iteration of the loop, as its stages see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ase import Atoms

from ubmd.lammps.engine import ReplicaTask
from ubmd.runs.stages import Stages
from ubmd.settings import RunSettings

Origin = tuple[int, int]
"""(iteration, replica) of a trajectory"""


@dataclass
class Turn:
    """One iteration: where it works, and the keys of its stages."""

    iteration: int
    settings: RunSettings
    """those of this iteration"""
    once: Stages
    training: list[Atoms]
    validation: list[Atoms]
    calibration: list[Atoms]
    """labels that only calibrate; empty: the validation does"""
    starts: dict[Path, Atoms]
    """file -> structure that replicas start from"""
    tasks: dict[Origin, ReplicaTask]
    keys: dict[str, str]
    epochs: int
    """of the training"""
