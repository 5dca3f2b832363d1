"""Molecular dynamics with the reference itself: independent test sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from ase import Atoms, units
from ase.calculators.abc import GetPropertiesMixin
from ase.calculators.calculator import Calculator, all_changes
from ase.md.langevin import Langevin

from ubmd.data.constraints import check_free
from ubmd.data.state import bare, state_hash
from ubmd.errors import DataError, LabelError, SettingsError, UbmdError, describe
from ubmd.references.labels import cached_calculator, label, raise_if_not_its_own, surroundings
from ubmd.references.results import read_forces
from ubmd.settings import ReferenceSettings, SamplingSettings


def sample(atoms: Atoms, reference: ReferenceSettings, sampling: SamplingSettings, base: Path) -> list[Atoms]:
    """Labelled frames of reference MD: the frames of all trajectories, one after the other.

    The frames depend only on ``atoms`` and the settings: same seed, same frames. Atoms that FixAtoms fixes stay where
    they are; the frames have no constraint, and their labels the reference's own forces on all atoms.

    Raises:
        LabelError: the reference fails, or rejects most frames.
        SettingsError: the calculator cannot be made, or ``atoms`` has a constraint other than FixAtoms, or one that
            holds every atom.
    """
    frames: list[Atoms] = []
    for index in range(sampling.trajectories):
        frames += sample_trajectory(atoms, reference, sampling, base, index)
    return frames


def sample_trajectory(
    atoms: Atoms, reference: ReferenceSettings, sampling: SamplingSettings, base: Path, index: int
) -> list[Atoms]:
    """The share of trajectory ``index`` in a test set (its own random numbers: trajectories can run in parallel).

    Frames whose label is rejected are dropped and replaced by later ones. ``info`` of a frame has 'trajectory'
    and 'step'. Errors as for `sample`.
    """
    share = len(range(index, sampling.frames, sampling.trajectories))
    try:
        check_free(atoms)
    except DataError as error:
        raise SettingsError(f"Reference MD: {error}") from None
    dynamics = _start(atoms, reference, sampling, base, index)
    _advance(dynamics, sampling.equilibration, reference)
    frames: list[Atoms] = []
    reason = ""
    for _ in range(2 * share):
        if len(frames) == share:
            break
        _advance(dynamics, sampling.stride, reference)
        try:
            frames.append(_frame(dynamics, reference, base, index))
        except LabelError as error:
            reason = str(error)
    if len(frames) < share:
        raise LabelError(f"More than half of the sampled frames were rejected; sample at a lower temperature. {reason}")
    return frames


def _start(atoms: Atoms, reference: ReferenceSettings, sampling: SamplingSettings, base: Path, index: int) -> Langevin:
    """Langevin dynamics at the first step, with Maxwell-Boltzmann velocities."""
    rng = np.random.default_rng([sampling.seed, index])
    copy = atoms.copy()
    copy.calc = _OnCopies(cached_calculator(reference, base, state_hash(atoms, reference.info)), reference.info)
    width = np.sqrt(copy.get_masses() * units.kB * sampling.temperature)
    copy.set_momenta(width[:, None] * rng.standard_normal((len(copy), 3)))
    return Langevin(
        copy,
        timestep=sampling.timestep * units.fs,
        temperature_K=sampling.temperature,
        friction=sampling.friction / (1000.0 * units.fs),
        fixcm=False,  # ASE's fixed centre does not sample NVT exactly
        rng=rng,
    )


class _OnCopies(Calculator):
    """Forces of another calculator, which gets what it gets for labels: bare copies, and never the atoms that move."""

    implemented_properties = ["forces"]  # noqa: RUF012 (ASE declares it so)

    def __init__(self, calculator: GetPropertiesMixin, info: Sequence[str]) -> None:
        super().__init__()
        self.calculator = calculator
        self.info = info

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("forces",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results`` with forces."""
        super().calculate(atoms, properties, system_changes)
        self.results = {"forces": read_forces(bare(cast(Atoms, self.atoms), self.info), self.calculator)}


def _advance(dynamics: Langevin, steps: int, reference: ReferenceSettings) -> None:
    """Run; whatever a foreign code raises becomes a LabelError."""
    try:
        with surroundings(dynamics.atoms.calc.calculator, reference):
            dynamics.run(steps)
    except UbmdError:
        raise
    except BaseException as error:
        raise_if_not_its_own(error)
        raise LabelError(f"The reference failed during MD ({describe(error)}).") from error


def _frame(dynamics: Langevin, reference: ReferenceSettings, base: Path, index: int) -> Atoms:
    """The labelled current frame without velocities."""
    atoms: Atoms = dynamics.atoms.copy()
    atoms.set_constraint()
    del atoms.arrays["momenta"]
    atoms.info |= {"trajectory": index, "step": dynamics.get_number_of_steps()}
    return label(atoms, reference, base)
