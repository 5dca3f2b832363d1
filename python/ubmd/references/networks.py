"""Trained networks of other packages as references: what SevenNet and CHGNet have in common."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from ubmd.data.geometry import neighbours
from ubmd.data.periodicity import has_stress, perpendicular_cell
from ubmd.errors import LabelError, SettingsError
from ubmd.references.electrons import total_charge
from ubmd.references.programs import ProgramCalculator
from ubmd.spelling import nearest

_ROOM = 1.0  # Å, between copies along a free direction beyond the cutoff

Results = Mapping[str, Any]


def network_calculator(
    network: str,
    model: str,
    calculator: Calculator,
    elements: Collection[int],
    cutoff: float,
    **options: Any,
) -> ProgramCalculator:
    """A reference that asks a network's own ASE calculator.

    The network sees a structure that is periodic in all directions, with room beyond its cutoff along those that are
    not: the same neighbours, hence the same energy and forces. SevenNet (0.13) takes the first cell vector of a slab
    for the one along x, and CHGNet (0.4) needs a cell. Atoms are wrapped into it: CHGNet computes with fractional
    coordinates in float32.

    Args:
        network: its name, for messages.
        model: which weights, for messages and records.
        calculator: with energy (eV), forces (eV/Å) and stress (eV/Å^3, [6] or [3, 3]) in ``results``.
        elements: atomic numbers that it was trained on.
        cutoff: distance within which atoms are neighbours, Å.
        options: of the calculator's ``calculate``.
    """

    def run(atoms: Atoms, _: Path) -> dict[str, Any]:
        _check_elements(atoms, f"{network} ({model})", elements)
        if total_charge(atoms, None, whole=False):
            raise LabelError(
                f"The structure has a charge, but {network} knows neutral structures only: take the charge out of its "
                "info and its initial charges, or use another reference."
            )
        _check_neighbours(atoms, cutoff, network)
        box = fully_periodic(atoms, cutoff)
        with quiet():
            calculator.calculate(box, **options)
        return _plain(calculator.results, atoms, box)

    made = ProgramCalculator(run)
    made.model = model
    return made


def _check_elements(atoms: Atoms, network: str, elements: Collection[int]) -> None:
    """SettingsError: all structures of a run have the element, so that no label could be made."""
    unknown = sorted(set(atoms.numbers.tolist()) - set(elements))
    if unknown:
        names = ", ".join(chemical_symbols[number] for number in unknown)
        raise SettingsError(
            f"{network} was not trained on {names}: use another model (reference.arguments.model) or reference."
        )


def _check_neighbours(atoms: Atoms, cutoff: float, network: str) -> None:
    alone = np.setdiff1d(np.arange(len(atoms)), neighbours(atoms, cutoff)[0])
    if alone.size:
        raise LabelError(
            f"Atom {alone[0]} (from 0) has no neighbour within {cutoff:g} Å: {network} was not trained on such atoms."
        )


def fully_periodic(atoms: Atoms, cutoff: float) -> Atoms:
    """A copy that is periodic in all directions, with room along those that were free, and its atoms in the cell.

    Args:
        atoms: any structure.
        cutoff: interaction range, Å: copies along free directions are further apart.
    """
    box: Atoms = atoms.copy()
    cell = perpendicular_cell(atoms.cell, atoms.pbc)
    free = ~atoms.pbc
    heights = atoms.positions @ np.linalg.inv(cell)  # Å along the free ones, whose vectors have length 1
    cell[free] *= (np.ptp(heights, axis=0)[free] + cutoff + _ROOM)[:, None]
    box.set_cell(cell)
    box.pbc = True
    box.wrap()
    return box


def _plain(found: Results, atoms: Atoms, box: Atoms) -> dict[str, Any]:
    """Energy, forces and, where there is one, the stress with respect to the structure's own cell, in float64."""
    results: dict[str, Any] = {
        "energy": float(found["energy"]),
        "forces": np.array(found["forces"], dtype=np.float64),
    }
    results["free_energy"] = results["energy"]
    if has_stress(atoms):
        stress = np.array(found["stress"], dtype=np.float64)
        stress = full_3x3_to_voigt_6_stress(stress) if stress.shape == (3, 3) else stress
        results["stress"] = stress * (box.get_volume() / atoms.get_volume())
    return results


def weights_file(argument: str, shipped: Collection[str], package: str) -> Path | None:
    """The file of weights that the user names, or None if it is one of those that a package contains.

    Args:
        argument: value of ``reference.arguments.model``.
        shipped: names of the weights in the package.
        package: its name.

    Raises:
        SettingsError: neither a file nor such a name. Nothing is ever downloaded.
    """
    if argument in shipped:
        return None
    path = Path(str(argument)).expanduser()
    if path.is_file():
        return path
    meant = nearest(argument, shipped)
    hint = f"did you mean {meant!r}?" if meant else f"there are {', '.join(map(repr, shipped))}."
    raise SettingsError(
        f"reference.arguments.model = {argument!r} is neither a file nor weights that the package {package} contains "
        f"(ubmd downloads none); {hint}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what a package prints and warns of out of our output."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
