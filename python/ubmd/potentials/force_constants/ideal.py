"""What a user should know of an ideal crystal before a fit: its symmetry, and whether it nearly has more."""

from __future__ import annotations

from collections.abc import Iterator

from ase import Atoms

from ubmd.errors import UbmdError
from ubmd.potentials.force_constants.lattice import Lattice
from ubmd.potentials.force_constants.symmetry import SYMMETRY_TOLERANCE, largest_change, symmetrised

_LOOSER = (1e-3, 1e-2)  # Å; rounding to four and three digits


def describe_symmetry(crystal: Atoms, lattice: Lattice, tolerance: float) -> Iterator[str]:
    """Sentences on space group and operations, on what was moved to have them, and on a looser tolerance if it helps.

    Args:
        crystal: as in its file.
        lattice: of it, within the tolerance.
        tolerance: of the symmetry, Å.
    """
    yield f"Space group {_group(lattice)}."
    if tolerance > SYMMETRY_TOLERANCE:
        yield f"To make that exact, {_change(crystal, tolerance, 'was', 'were')} (crystal.tolerance = {tolerance:g} Å)."
    yield from _better(crystal, lattice, tolerance)


def _better(crystal: Atoms, lattice: Lattice, tolerance: float) -> Iterator[str]:
    """Higher symmetries that looser tolerances find."""
    for looser in (value for value in _LOOSER if value > tolerance):
        try:
            other = Lattice.from_atoms(crystal, looser)
        except UbmdError:  # so loose that atoms merge, or no symmetry is consistent
            return
        if _order(other) <= _order(lattice):
            continue
        lattice = other
        yield (
            f"With crystal.tolerance = {looser:g} (Å) it is {_group(other)}, and there are far fewer parameters; "
            f"{_change(crystal, looser, 'is', 'are')}. Set it if the file has rounded numbers."
        )


def _group(lattice: Lattice) -> str:
    atoms = len(lattice.numbers)
    return f"{lattice.space_group or 'unknown'}, {atoms} atom{'s' if atoms > 1 else ''} in the primitive cell"


def _order(lattice: Lattice) -> float:
    """Operations per atom, whatever the cell that the operations refer to."""
    return len(lattice.rotations) / len(lattice.numbers)


def _change(crystal: Atoms, tolerance: float, one: str, many: str) -> str:
    shift, cell = largest_change(crystal, symmetrised(crystal, tolerance))
    return f"atoms {many} moved by at most {shift:.1e} Å and the cell {one} changed by at most {cell:.1e} Å"
