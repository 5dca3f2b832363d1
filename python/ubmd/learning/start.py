"""Start structures: whether a run can begin with them, and the perturbed copies that are labelled first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from ubmd.data.constraints import fixed_atoms, is_fixed
from ubmd.data.geometry import check_apart, check_geometry
from ubmd.data.periodicity import has_stress, is_partly_periodic, projector
from ubmd.data.state import bare, check_state, mixed_states
from ubmd.data.structures import read_structures
from ubmd.devices import check_device
from ubmd.errors import DataError, LabelError, SettingsError
from ubmd.settings import RunSettings, StartSettings, WorkerSettings


def read_start(settings: RunSettings, base: Path, given: Sequence[Atoms]) -> list[Atoms]:
    """The structures that MD starts from: those of ``start.file``, without it those of the given labels.

    Raises:
        DataError, SettingsError: the file cannot be used, or is not there.
    """
    if settings.start.file is None:
        return [bare(atoms, settings.reference.info) for atoms in given]
    path = base / settings.start.file
    if not path.exists():
        raise SettingsError(f"start.file: there is no file {path} (the path is relative to the settings file).")
    return read_structures(path, settings.labels, missing_ok=True)  # they need no labels


def check_start(structures: Sequence[Atoms], settings: RunSettings) -> None:
    """Check the start structures before anything is labelled or written.

    Raises:
        SettingsError: they don't fit the ensemble, one that replicas start from cannot be moved, or one has two atoms
            at the same place.
    """
    if settings.md.ensemble == "npt":
        _check_barostat(structures, settings)
    for k, atoms in enumerate(structures):
        name = f"{settings.start.source}, structure {k}," if len(structures) > 1 else str(settings.start.source)
        if settings.start.strain > 0.0 and is_fixed(atoms).any():
            raise SettingsError(
                f"start.strain: {name} has fixed atoms, which a strain would move; set start.strain = 0, or fix none."
            )
        if k == 0:
            check_movable(atoms, name, settings.reference.min_distance)
        try:
            check_apart(atoms)
        except DataError as error:
            raise SettingsError(f"{name} cannot be labelled: {error}") from None


def _check_barostat(structures: Sequence[Atoms], settings: RunSettings) -> None:
    """SettingsError if a barostat could not move the cell of a structure."""
    file, md = settings.start.source, settings.md
    pressed = any(p != 0.0 for p in (md.pressures or [md.pressure])) or (
        md.ramp is not None and md.ramp.pressure is not None
    )
    for atoms in structures:
        if not atoms.pbc.any():
            raise SettingsError(
                f"md.ensemble = 'npt' needs start structures that are periodic in some direction, but {file} has one "
                "that is not; use 'nvt' for molecules."
            )
        if is_fixed(atoms).any():
            raise SettingsError(
                f"md.ensemble = 'npt' does not go with fixed atoms, but {file} has some (FixAtoms): a barostat moves "
                "all atoms with the cell. Use 'nvt', or fix none."
            )
        if pressed and not has_stress(atoms):
            raise SettingsError(
                f"md.pressure refers to the volume of the cell, but a structure of {file} has none: give every cell "
                "vector a length, or set md.pressure = 0."
            )


def check_movable(atoms: Atoms, name: str, min_distance: float) -> None:
    """SettingsError if MD cannot even begin with a structure; ``name`` is what the sentence calls it."""
    if is_fixed(atoms).all():
        raise SettingsError(f"{name}: all atoms are fixed, so that nothing would move: leave some of them free.")
    if len(atoms) == 1:
        raise SettingsError(f"{name} has a single atom, so that nothing can move relative to it; repeat its cell.")
    try:
        check_geometry(atoms, min_distance)
    except LabelError as error:
        raise SettingsError(f"{name}: {error}") from None


def check_md_device(device: str, key: str, workers: WorkerSettings) -> None:
    """SettingsError if the device of MD is not there, as far as MD runs on this machine; ``key``: its setting."""
    if workers.executor == "pebble":
        check_device(device, key)


def check_states(structures: Sequence[Atoms], settings: RunSettings) -> None:
    """Check that start structures can be labelled and learnt in their states (charge, spin, moments, masses).

    Raises:
        SettingsError: an invalid mass or moment, a constraint that is not FixAtoms, or structures of one
            composition in different states, unless start.mixed_states allows them.
    """
    for number, atoms in enumerate(structures):
        try:
            check_state(atoms, settings.reference.info)
            fixed_atoms(atoms)
        except DataError as error:
            raise SettingsError(f"{settings.start.source}, frame {number}: {error}") from None
    mixed = next(mixed_states(structures, settings.reference.info), None)
    if mixed is not None and not settings.start.mixed_states:
        first, second, difference = mixed
        raise SettingsError(
            f"{settings.start.source}: frames {first} and {second} have the same composition but {difference}, which a "
            "model cannot tell apart: start from one state, or set start.mixed_states = true."
        )


def perturb(
    structures: Sequence[Atoms], settings: StartSettings, rng: np.random.Generator, info: Sequence[str] = ()
) -> list[Atoms]:
    """``settings.count`` copies, uniformly strained (periodic ones) and then uniformly displaced.

    Copy k comes from structure k modulo their number, in the state of that structure (``info``: the keys of
    ``atoms.info`` that belong to it); fixed atoms stay where they are. The strain is symmetric, with six independent
    components, of slabs and wires those along their periodic directions; positions are rescaled with the cell.
    """
    copies = []
    for k in range(settings.count):
        copy = bare(structures[k % len(structures)], info)
        if settings.strain > 0.0 and copy.pbc.any():
            upper = np.triu(rng.uniform(-settings.strain, settings.strain, (3, 3)))
            _strain(copy, (upper + upper.T) / 2.0)
        displacement = rng.uniform(-settings.displacement, settings.displacement, copy.positions.shape)
        copy.positions += np.where(is_fixed(copy)[:, None], 0.0, displacement)
        copies.append(copy)
    return copies


def _strain(atoms: Atoms, strain: np.ndarray) -> None:
    """Strain [3, 3] a structure: its atoms and its periodic vectors, along the periodic directions."""
    if not is_partly_periodic(atoms):
        atoms.set_cell(atoms.cell[:] @ (np.eye(3) + strain), scale_atoms=True)
        return
    within = projector(atoms)
    stretch = np.eye(3) + within @ strain @ within
    atoms.set_cell(np.where(atoms.pbc[:, None], atoms.cell[:] @ stretch, atoms.cell[:]))
    atoms.positions = atoms.positions @ stretch
