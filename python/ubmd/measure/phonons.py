"""Phonons of a crystal in any potential, from forces at small displacements in a supercell, by phonopy.

Togo, Chaput, Tadano and Tanaka, J. Phys. Condens. Matter 35, 353001 (2023). Charges are not treated: the splitting of
longitudinal and transverse optical branches of polar crystals at the zone centre is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.data import chemical_symbols

from ubmd.errors import DataError, SettingsError
from ubmd.measure.crystal import Array, LargestUncertainty, check_crystal, heights, largest_uncertainty, respond
from ubmd.potentials.force_constants.phonons import Dispersion, dispersion

_SYMMETRY = 1e-3  # Å, within which phonopy looks for it: files have rounded numbers, relaxations a tolerance
LENGTH = 12.0
"""Å between opposite faces of a supercell, at least."""


@dataclass(frozen=True, eq=False)
class Phonons:
    """Phonons of a crystal with S atoms in the primitive cell.

    Attributes:
        bands: along the path.
        density: frequency [N] THz, states per THz and primitive cell [N].
        repeats: supercell in which the atoms were displaced, [3].
        supercell: number of its atoms.
        displacements: number of displaced supercells.
        uncertainty: the largest among them; None if the calculator has none.
        program: phonopy.Phonopy with the force constants, for whatever else phonopy can do (group velocities, thermal
            properties, modes, ...).
    """

    bands: Dispersion
    density: tuple[Array, Array]
    repeats: tuple[int, int, int]
    supercell: int
    displacements: int
    uncertainty: LargestUncertainty | None
    program: Any


def enough_repeats(crystal: Atoms, length: float = LENGTH) -> tuple[int, int, int]:
    """Repetitions of a cell until opposite faces are at least this far apart (Å)."""
    a, b, c = (max(1, int(np.ceil(length / height - 1e-6))) for height in heights(crystal))
    return a, b, c


def phonons(
    calculator: AseCalculator,
    crystal: Atoms,
    repeats: Sequence[int] | None = None,
    displacement: float = 0.01,
    points: int = 200,
    path: str | None = None,
    fineness: float = 60.0,
) -> Phonons:
    """Phonons by central differences of the forces, those displacements that differ by symmetry.

    ::

        found = phonons(ubmd.Calculator("model.pt"), crystal, repeats=(4, 4, 4))
        print(found.bands.frequencies.max())  # THz
        found.program.save("phonopy.yaml")  # to go on with phonopy itself

    The crystal must be relaxed in the potential. Natural masses, unless the structure has its own, one per element.

    Args:
        calculator: any of ASE's.
        crystal: the crystal; its primitive cell is enough.
        repeats: supercell, [3]; the default is `enough_repeats`. Force constants reach half its length.
        displacement: of an atom, Å.
        points: along the path.
        path: through the Brillouin zone, such as 'GXWKGL'; the default is ASE's for the lattice.
        fineness: Å times the length of a reciprocal vector (without 2π) are the points along it, for the density of
            states (phonopy's tetrahedron method).

    Raises:
        DataError: the structure is no crystal, or atoms of one element have several masses.
        SettingsError: phonopy isn't installed, or the path is none of this lattice.
    """
    check_crystal(crystal)
    _check_masses(crystal)
    chosen = enough_repeats(crystal) if repeats is None else (int(repeats[0]), int(repeats[1]), int(repeats[2]))
    program = _program(crystal, chosen)
    program.generate_displacements(distance=displacement)
    structures = [_atoms(cell) for cell in program.supercells_with_displacements]
    responses = respond(calculator, structures, stress=False)
    program.forces = np.array([response.forces for response in responses])
    program.produce_force_constants(show_drift=False)
    program.symmetrize_force_constants(show_drift=False)

    def frequencies(q: Array) -> Array:
        program.run_qpoints(q)
        found: Array = np.asarray(program.qpoints.frequencies)
        return found

    bands = dispersion(program.primitive.cell, frequencies, points, path)
    program.run_mesh(fineness, is_gamma_center=True)
    program.run_total_dos()
    density = np.asarray(program.total_dos.frequency_points), np.asarray(program.total_dos.dos)
    uncertainty = largest_uncertainty(responses)
    return Phonons(bands, density, chosen, len(program.supercell), len(structures), uncertainty, program)


def _check_masses(crystal: Atoms) -> None:
    """DataError if an element has several masses: phonopy's symmetry would not see them."""
    masses = crystal.get_masses()
    for number in np.unique(crystal.numbers):
        if np.ptp(masses[crystal.numbers == number]) > 0.0:
            raise DataError(f"Atoms of {chemical_symbols[number]} have several masses: give one to all of them.")


def _program(crystal: Atoms, repeats: tuple[int, int, int]) -> Any:
    """phonopy with a crystal and its supercell."""
    try:
        from phonopy import Phonopy
        from phonopy.structure.atoms import PhonopyAtoms
    except ImportError:
        raise SettingsError("Phonons of a network need phonopy: pip install 'ubmd[phonons]'.") from None
    vectors = np.array(crystal.cell)
    hand = np.sign(np.linalg.det(vectors))  # phonopy takes right-handed cells only: all vectors reversed are one
    cell = PhonopyAtoms(
        numbers=crystal.numbers,
        scaled_positions=hand * crystal.get_scaled_positions(),
        cell=hand * vectors,
        masses=crystal.get_masses(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # phonopy 4 tells that it has found a smaller cell: as wanted
        return Phonopy(cell, np.diag(repeats), primitive_matrix="auto", symprec=_SYMMETRY)


def _atoms(cell: Any) -> Atoms:
    """A structure of phonopy's as one of ASE's."""
    return Atoms(numbers=cell.numbers, scaled_positions=cell.scaled_positions, cell=cell.cell, pbc=True)
