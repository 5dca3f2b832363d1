"""Elastic constants from finite strains, and the equation of state, of a crystal in any potential.

Birch, Phys. Rev. 71, 809 (1947); the fit is ASE's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.eos import EquationOfState, birchmurnaghan
from ase.units import GPa
from numpy.typing import ArrayLike

from ubmd.errors import DataError
from ubmd.measure.crystal import (
    Array,
    LargestUncertainty,
    check_crystal,
    largest_uncertainty,
    relaxed,
    respond,
    strained,
)
from ubmd.potentials.force_constants.elastic import ElasticConstants


def strained_constants(
    calculator: AseCalculator, crystal: Atoms, strain: float = 0.005, force: float = 1e-5
) -> tuple[ElasticConstants, LargestUncertainty | None]:
    """Elastic constants by central differences of the stress, the atoms relaxed in each of the twelve strained cells.

    ::

        constants, uncertainty = strained_constants(ubmd.Calculator("model.pt"), crystal)
        print(constants.matrix, constants.cubic(), constants.bulk_modulus)  # GPa

    They are those of small strains if the crystal is relaxed in the potential, cell and atoms; else they depend on the
    definition of strain.

    Args:
        calculator: with stresses.
        crystal: the crystal; its primitive cell is enough.
        strain: of each kind, with both signs; no unit.
        force: the atoms are relaxed until all forces are below, eV/Å.

    Returns:
        The constants, of which ``misfit`` is how far C_ij and C_ji differ before their mean is taken, and the largest
        uncertainty among the strained cells (None if the calculator has none).

    Raises:
        DataError: the structure is no crystal, or the atoms of a strained cell find no minimum.
    """
    check_crystal(crystal)
    cells = [
        relaxed(calculator, strained(crystal, sign * strain * np.eye(6)[k]), force=force)
        for k in range(6)
        for sign in (1.0, -1.0)
    ]
    responses = respond(calculator, cells)
    stresses = np.array([response.stress for response in responses])
    matrix = (stresses[::2] - stresses[1::2]).T / (2.0 * strain * GPa)
    constants = ElasticConstants(0.5 * (matrix + matrix.T), float(np.abs(matrix - matrix.T).max()))
    return constants, largest_uncertainty(responses)


@dataclass(frozen=True, eq=False)
class StateEquation:
    """Energy against volume, and the Birch-Murnaghan equation through it. Everything is per cell.

    Attributes:
        volumes: Å^3 [K].
        energies: eV [K].
        atomic_u: largest uncertainty of a force, eV/Å [K]; None if the calculator has none.
        atoms: in the cell.
        volume: V0, Å^3.
        energy: E0, eV.
        modulus: bulk modulus B at V0, GPa.
        derivative: B' = dB/dp at V0, no unit.
        uncertainty: the largest among the cells; None if the calculator has none.
    """

    volumes: Array
    energies: Array
    atomic_u: Array | None
    atoms: int
    volume: float
    energy: float
    modulus: float
    derivative: float
    uncertainty: LargestUncertainty | None

    def energy_at(self, volumes: ArrayLike) -> Array:
        """Energies of the fit at these volumes [K] (Å^3), eV."""
        found: Array = birchmurnaghan(
            np.asarray(volumes, dtype=float), self.energy, self.modulus * GPa, self.derivative, self.volume
        )
        return found

    @property
    def misfit(self) -> float:
        """Root mean square difference of the fit from the energies, eV/atom."""
        return float(np.sqrt(np.mean((self.energy_at(self.volumes) - self.energies) ** 2)) / self.atoms)


def equation_of_state(
    calculator: AseCalculator, crystal: Atoms, span: float = 0.06, points: int = 9, force: float = 1e-3
) -> StateEquation:
    """Energies of a crystal at volumes around its own, atoms and shape of the cell relaxed, and their fit.

    ::

        state = equation_of_state(ubmd.Calculator("model.pt"), crystal)
        print(state.volume / state.atoms, state.modulus)  # Å^3/atom, GPa

    Args:
        calculator: with stresses.
        crystal: the crystal; its primitive cell is enough.
        span: volumes from (1 - span) to (1 + span) times that of the crystal.
        points: number of volumes, five or more.
        force: relaxed until all forces (eV/Å) and virials per atom (eV) are below.

    Raises:
        DataError: the structure is no crystal, a relaxation finds no minimum, or the energy has none between the
            volumes.
    """
    check_crystal(crystal)
    factors = np.cbrt(np.linspace(1.0 - span, 1.0 + span, points)) - 1.0
    starts = [strained(crystal, factor * np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])) for factor in factors]
    cells = [relaxed(calculator, start, cell="shape", force=force) for start in starts]
    responses = respond(calculator, cells)
    volumes = np.array([atoms.get_volume() for atoms in cells])
    energies = np.array([response.energy for response in responses])
    each = [response.atomic_u for response in responses if response.atomic_u is not None]
    volume, energy, modulus, derivative = _fit(volumes, energies)
    return StateEquation(
        volumes=volumes,
        energies=energies,
        atomic_u=np.array(each) if each else None,
        atoms=len(crystal),
        volume=volume,
        energy=energy,
        modulus=modulus / GPa,
        derivative=derivative,
        uncertainty=largest_uncertainty(responses),
    )


def _fit(volumes: Array, energies: Array) -> tuple[float, float, float, float]:
    """(V0, E0, B in eV/Å^3, B')."""
    lowest = int(energies.argmin())
    if lowest in (0, len(energies) - 1):
        raise DataError(
            f"The energy has no minimum between {volumes[0]:.1f} and {volumes[-1]:.1f} Å^3: it is lowest at "
            f"{volumes[lowest]:.1f} Å^3; relax the crystal in this potential first, or widen the span."
        )
    fit = EquationOfState(volumes, energies - energies[lowest], eos="birchmurnaghan")
    volume, energy, modulus = fit.fit(warn=False)
    return float(volume), float(energy + energies[lowest]), float(modulus), float(fit.eos_parameters[2])
