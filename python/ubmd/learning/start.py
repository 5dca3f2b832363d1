"""Start structures: whether a run can begin with them, and the perturbed copies that are labelled first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ubmd.data.constraints import fixed_atoms
from ubmd.data.geometry import check_apart, check_geometry
from ubmd.data.state import bare, check_state, mixed_states
from ubmd.errors import DataError, LabelError, SettingsError
from ubmd.settings import RunSettings, StartSettings


def check_start(structures: Sequence[Atoms], settings: RunSettings) -> None:
    """Check the start structures before anything is labelled or written.

    Raises:
        SettingsError: they don't fit the ensemble, one that replicas start from cannot be moved, or one has two atoms
            at the same place.
    """
    if settings.md.ensemble == "npt" and not all(atoms.pbc.all() for atoms in structures):
        raise SettingsError(
            f"md.ensemble = 'npt' needs start structures that are periodic in all directions, but "
            f"{settings.start.file} has one that is not; use 'nvt' for molecules."
        )
    for k, atoms in enumerate(structures):
        name = f"{settings.start.file}, structure {k}," if len(structures) > 1 else str(settings.start.file)
        if k == 0 or settings.md.start_from == "labelled":
            check_periodicity(atoms, name)
        if k == 0:
            check_movable(atoms, name, settings.reference.min_distance)
        try:
            check_apart(atoms)
        except DataError as error:
            raise SettingsError(f"{name} cannot be labelled: {error}") from None


def check_periodicity(atoms: Atoms, name: str) -> None:
    """SettingsError if a structure is periodic in one or two directions; ``name`` is what the sentence calls it."""
    if atoms.pbc.any() and not atoms.pbc.all():
        flags = " ".join("T" if periodic else "F" for periodic in atoms.pbc)
        raise SettingsError(
            f'{name} is periodic in some directions only (pbc = "{flags}"), but MD needs all three or none: make a '
            "slab or a wire periodic in all three, with an empty gap between the copies that is wider than the cutoff."
        )


def check_movable(atoms: Atoms, name: str, min_distance: float) -> None:
    """SettingsError if MD cannot even begin with a structure; ``name`` is what the sentence calls it."""
    if len(atoms) == 1:
        raise SettingsError(f"{name} has a single atom, so that nothing can move relative to it; repeat its cell.")
    try:
        check_geometry(atoms, min_distance)
    except LabelError as error:
        raise SettingsError(f"{name}: {error}") from None


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
            raise SettingsError(f"{settings.start.file}, frame {number}: {error}") from None
    mixed = next(mixed_states(structures, settings.reference.info), None)
    if mixed is not None and not settings.start.mixed_states:
        first, second, difference = mixed
        raise SettingsError(
            f"{settings.start.file}: frames {first} and {second} have the same composition but {difference}, which a "
            "model cannot tell apart: start from one state, or set start.mixed_states = true."
        )


def perturb(
    structures: Sequence[Atoms], settings: StartSettings, rng: np.random.Generator, info: Sequence[str] = ()
) -> list[Atoms]:
    """``settings.count`` copies, uniformly strained (fully periodic ones) and then uniformly displaced.

    Copy k comes from structure k modulo their number, in the state of that structure (``info``: the keys of
    ``atoms.info`` that belong to it); constraints are left behind. The strain is symmetric, with six independent
    components; positions are rescaled with the cell.
    """
    copies = []
    for k in range(settings.count):
        copy = bare(structures[k % len(structures)], info)
        if settings.strain > 0.0 and copy.pbc.all():
            upper = np.triu(rng.uniform(-settings.strain, settings.strain, (3, 3)))
            copy.set_cell(copy.cell[:] @ (np.eye(3) + (upper + upper.T) / 2.0), scale_atoms=True)
        copy.positions += rng.uniform(-settings.displacement, settings.displacement, copy.positions.shape)
        copies.append(copy)
    return copies
