"""A crystal in a potential: whether it is one, what the potential says about it, and its relaxation.

The functions here, and those of `ubmd.measure.phonons` and `ubmd.measure.elastic`, take any ASE calculator. One of
ubmd's own evaluates structures in batches, and its uncertainties are reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.stress import voigt_6_to_full_3x3_stress
from ase.units import GPa
from numpy.typing import NDArray

from ubmd.calculator import Calculator
from ubmd.data.periodicity import describe_periodicity
from ubmd.errors import DataError

Array = NDArray[np.float64]

EMPTY = 6.0
"""Å without atoms between two planes; more is not a crystal. Potentials with a shorter cutoff: more than that."""


@dataclass(frozen=True, eq=False)
class Response:
    """What a potential says about a structure of n atoms.

    Attributes:
        energy: eV.
        forces: eV/Å [n, 3].
        stress: eV/Å^3 [6], ASE's order, tension positive; None where it was not asked for.
        u: calibrated uncertainty of the structure, eV/atom; None of calculators without one.
        atomic_u: the largest of its atoms, eV/Å; likewise.
    """

    energy: float
    forces: Array
    stress: Array | None
    u: float | None = None
    atomic_u: float | None = None

    @property
    def largest_force(self) -> float:
        """Length of the largest force, eV/Å."""
        return float(np.linalg.norm(self.forces, axis=1).max())

    @property
    def largest_stress(self) -> float:
        """Largest component of the stress in absolute value, GPa."""
        assert self.stress is not None
        return float(np.abs(self.stress).max() / GPa)


def respond(calculator: AseCalculator, structures: Sequence[Atoms], stress: bool = True) -> list[Response]:
    """Energy, forces, stress and uncertainties of each structure; those of a ubmd model in batches."""
    if isinstance(calculator, Calculator) and not calculator.bias_force:
        found = calculator.evaluator.predict(structures)
        return [Response(p.energy, p.forces, p.stress, p.u, float(p.atomic_u.max())) for p in found]
    return [_response(calculator, atoms, stress) for atoms in structures]


def _response(calculator: AseCalculator, atoms: Atoms, stress: bool) -> Response:
    copy = atoms.copy()
    copy.calc = calculator
    forces = copy.get_forces()
    u, each = calculator.results.get("uncertainty"), calculator.results.get("atomic_uncertainties")
    return Response(
        energy=float(copy.get_potential_energy()),
        forces=forces,
        stress=copy.get_stress() if stress else None,
        u=None if u is None else float(u),
        atomic_u=None if each is None else float(np.max(each)),
    )


@dataclass(frozen=True)
class LargestUncertainty:
    """The largest calibrated uncertainties among some structures.

    Attributes:
        structures: how many.
        u: of a structure, eV/atom.
        atomic_u: of the force on an atom, eV/Å.
    """

    structures: int
    u: float
    atomic_u: float


def largest_uncertainty(responses: Sequence[Response]) -> LargestUncertainty | None:
    """The largest among these structures; None if the calculator has none."""
    both = [(r.u, r.atomic_u) for r in responses if r.u is not None and r.atomic_u is not None]
    if not both:
        return None
    return LargestUncertainty(len(both), max(u for u, _ in both), max(each for _, each in both))


def check_crystal(atoms: Atoms, cutoff: float | None = None) -> None:
    """See that a structure is a crystal: periodic in three directions, without empty space.

    Args:
        atoms: the structure.
        cutoff: of the potential, Å; None if it is not known.

    Raises:
        DataError: it is a slab, a wire or a molecule.
    """
    if not atoms.pbc.all() or atoms.cell.rank < 3:
        found = describe_periodicity(atoms) if atoms.cell.rank == 3 or not atoms.pbc.any() else "without a whole cell"
        raise DataError(
            f"The structure is {found}: phonons, elastic constants and equations of state are those of a crystal, "
            "periodic in three directions."
        )
    gap, direction = _largest_gap(atoms)
    if gap > min(EMPTY, cutoff or EMPTY):
        raise DataError(
            f"The structure has {gap:.1f} Å of empty space along cell vector {direction + 1}, as a slab, a wire or a "
            "molecule has: phonons, elastic constants and equations of state here are those of a crystal without."
        )


def _largest_gap(atoms: Atoms) -> tuple[float, int]:
    """Largest distance between neighbouring planes of atoms, Å, and the cell vector it lies along."""
    scaled = np.sort(atoms.get_scaled_positions(wrap=True), axis=0)
    gaps = np.diff(np.vstack([scaled, scaled[:1] + 1.0]), axis=0).max(axis=0) * heights(atoms)
    return float(gaps.max()), int(gaps.argmax())


def heights(atoms: Atoms) -> Array:
    """Distances [3] between opposite faces of the cell, Å."""
    found: Array = 1.0 / np.linalg.norm(np.linalg.inv(np.array(atoms.cell)), axis=0)
    return found


def relaxed(
    calculator: AseCalculator,
    atoms: Atoms,
    cell: str = "fixed",
    force: float = 1e-4,
    steps: int = 500,
) -> Atoms:
    """The structure at its energy minimum, by ASE's BFGS.

    ::

        crystal = relaxed(ubmd.Calculator("model.pt"), ase.io.read("crystal.cif"), cell="free")

    Args:
        calculator: any of ASE's.
        atoms: start; it is not changed.
        cell: "fixed" (positions alone relax), "shape" (the cell too, at fixed volume) or "free".
        force: every force on an atom is below this in the end, eV/Å. With a cell that relaxes, so is the virial
            (eV) per atom.
        steps: at most.

    Raises:
        DataError: they were not enough.
    """
    copy: Atoms = atoms.copy()
    copy.calc = calculator
    target: Any = copy
    if cell != "fixed":
        target = FrechetCellFilter(copy, exp_cell_factor=float(len(copy)), constant_volume=cell == "shape")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "logm result may be inaccurate", RuntimeWarning)  # by 1e-12, for scaled cells
        converged = BFGS(target, logfile=None).run(fmax=force, steps=steps)
    if not converged:
        left = np.linalg.norm(copy.get_forces(), axis=1).max()
        raise DataError(
            f"The structure is not relaxed after {steps} steps (largest force {left:.2g} eV/Å): start from one that is "
            "closer to a minimum of this model."
        )
    copy.calc = None
    return copy


def strained(atoms: Atoms, strain: Array) -> Atoms:
    """The structure after a strain [6] (Voigt's order xx yy zz yz xz xy, shears as engineers count them: twice ε)."""
    half = np.asarray(strain, dtype=float) * np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
    copy: Atoms = atoms.copy()
    copy.set_cell(np.array(atoms.cell) @ (np.eye(3) + voigt_6_to_full_3x3_stress(half)), scale_atoms=True)
    return copy
