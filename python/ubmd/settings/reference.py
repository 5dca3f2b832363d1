"""Settings of the reference calculator, of reference MD and of the test set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from ubmd.settings.marks import ELSEWHERE, FIRST_LABELS, LATE, NOTHING
from ubmd.settings.table import Table

USUAL_INFO = ("charge", "spin", "multiplicity")
"""Usual keys of atoms.info that a calculator reads."""

_TAKEN = {
    *("Lattice", "Properties", "pbc"),
    *("iteration", "replica", "step", "rule", "trajectory", "label", "split", "given", "reason", "unconstrained"),
    *("temperature", "predicted_error", "uncertainty", "max_uncertainty"),
}
"""Keys of atoms.info that the frames of a run have."""
_LABELS = {"energy", "total_energy", "totenergy", "free_energy", "forces", "force", "stress", "virial", "virials"}
"""Names of labels in small letters, without a prefix."""


class ReferenceSettings(Table):
    """The reference calculator: a ready-made reference or any ASE calculator by import path."""

    calculator: Annotated[str, FIRST_LABELS] = Field(
        description="'openmm', 'lammps', 'tblite', 'sevennet', 'chgnet', 'cp2k', 'espresso', or the import path of an "
        "ASE calculator, e.g. 'ase.calculators.emt:EMT'"
    )
    arguments: Annotated[dict[str, Any], FIRST_LABELS] = Field(
        default_factory=dict,
        description="keyword arguments of the calculator, e.g. 'openmm': pdb, forcefield, cmap; 'lammps': commands, "
        "elements, units; 'tblite': method; 'sevennet', 'chgnet': model, device; 'cp2k', 'espresso': launcher, threads "
        "and the program's settings; misspelt names are refused",
    )
    info: Annotated[tuple[str, ...], ELSEWHERE] = Field(
        USUAL_INFO,
        description="keys of atoms.info that the calculator reads: they are copied from the start structures to every "
        "structure that is labelled, as initial charges, initial magnetic moments, tags and masses always do",
    )
    environment: Annotated[dict[str, str], NOTHING] = Field(
        default_factory=dict,
        description='environment variables while the reference runs, e.g. {OMP_NUM_THREADS = "4"} (else 1 per worker)',
    )
    cache: Annotated[str | None, NOTHING] = Field(
        None,
        description="folder (relative to the settings file) that stores every label and is searched before a new one "
        "is computed; runs may share it",
    )
    timeout: Annotated[float, NOTHING] = Field(600.0, gt=0, description="time limit of one label, s")
    force_limit: float = Field(20.0, gt=0, description="labels with a larger |F| are rejected, eV/Å")
    energy_limit: float = Field(
        5.0,
        gt=0,
        description="labels whose energy is further than this from the median of those before it (of the same "
        "composition) are rejected, eV per atom",
    )
    min_distance: float = Field(
        0.5, ge=0, description="reject structures with atoms closer than this share of their covalent radii (no unit)"
    )
    noise: Annotated[float, LATE] = Field(
        0.0,
        ge=0,
        description="standard deviation of Gaussian noise that is added to the forces, eV/Å, to study how a method "
        "copes with it (the same structure always gets the same noise)",
    )

    @field_validator("info")
    @classmethod
    def _info_is_free(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name.removeprefix("REF_") in _TAKEN or re.sub("^(ref|dft)_", "", name.lower()) in _LABELS:
                raise ValueError(
                    f"reference.info names {name!r}, a key that ubmd uses for something else; rename it in the "
                    "structures and in the code that reads it"
                )
        return value


class SamplingSettings(Table):
    """Reference MD (ASE Langevin) that makes a test set."""

    temperature: float = Field(1200.0, gt=0, description="temperature of the thermostat, K")
    frames: int = Field(200, ge=1, description="frames in the test set")
    stride: int = Field(500, ge=1, description="steps between frames")
    equilibration: int = Field(2000, ge=0, description="steps before the first frame")
    timestep: float = Field(0.5, gt=0, description="time step of the dynamics, fs")
    friction: float = Field(1.96, gt=0, description="Langevin friction, 1/ps")
    trajectories: int = Field(2, ge=1, description="independent trajectories that share the frames")
    seed: int = Field(12345, ge=0, description="fixed seed: the test set does not depend on the run's seed")


class TestSettings(Table):
    """A held-out test set: a file, or reference MD; never trained on."""

    __test__: ClassVar[bool] = False  # pytest would collect it by its name

    file: Path | None = Field(
        None,
        description="structures with labels (extxyz, any file that ASE reads, or a folder of deepmd/npy); made by "
        "'sampling' there if it does not exist",
    )
    sampling: SamplingSettings = Field(default_factory=SamplingSettings, description="how to make the file")
