"""Phonons of a force-constant potential: dynamical matrices, dispersion, density of states, heat conductivity.

Only the orders 2 and 3 enter, so everything here belongs to small vibrations of the ideal lattice (harmonic phonons at
zero temperature; with the third order their lowest-order decay). Charges are not treated: the splitting of longitudinal
and transverse optical branches of polar crystals at the zone centre is missing.

Born and Huang, Dynamical Theory of Crystal Lattices (Clarendon Press, 1954); paths through the Brillouin zone (ASE's):
Setyawan and Curtarolo, Comput. Mater. Sci. 49, 299 (2010); heat conductivity (phono3py's): Togo, Chaput and Tanaka,
Phys. Rev. B 91, 094306 (2015).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.cell import Cell
from ase.data import atomic_masses, chemical_symbols
from ase.geometry import minkowski_reduce
from numpy.typing import ArrayLike, NDArray

from ubmd.errors import DataError, SettingsError
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.lattice import Lattice
from ubmd.potentials.force_constants.second_order import second_order

Array = NDArray[np.float64]

# sqrt(eV/(Å^2 u)) / (2 pi), in THz
THZ = float(np.sqrt(1.602176634e-19 / 1e-20 / 1.66053906660e-27) / (2.0 * np.pi * 1e12))


@dataclass(frozen=True, eq=False)
class HarmonicCrystal:
    """Second-order force constants of the infinite lattice, one per ordered pair of sites modulo translations.

    Attributes:
        lattice: primitive cell.
        first, second: sublattices of the two sites [N].
        offset: cell of the second site; the first lies in cell 0 [N, 3].
        constants: eV/Å^2 [N, 3, 3].
        masses: atomic mass units [S].
    """

    lattice: Lattice
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    offset: NDArray[np.int64]
    constants: Array
    masses: Array

    @classmethod
    def from_basis(cls, basis: ClusterBasis, parameters: ArrayLike, masses: ArrayLike | None = None) -> HarmonicCrystal:
        """Second order of a potential with these parameters [P]; natural masses unless given for each sublattice.

        Raises:
            SettingsError: the basis has no second order.
            DataError: the parameters don't fit the basis.
        """
        lattice = basis.lattice
        first, second, offset, constants = second_order(basis, _checked(basis, parameters)[:, None])
        found = atomic_masses[lattice.numbers] if masses is None else np.asarray(masses, dtype=float)
        return cls(lattice, first, second, offset, constants[..., 0], found)

    @cached_property
    def vectors(self) -> Array:
        """From the first site to the second [N, 3], Å."""
        scaled = self.lattice.scaled
        return (self.offset + scaled[self.second] - scaled[self.first]) @ self.lattice.cell

    def dynamical_matrices(self, q: ArrayLike) -> NDArray[np.complex128]:
        """D [K, 3S, 3S] (eV/Å^2 per mass unit) at wave vectors [K, 3] in units of the reciprocal cell (without 2π).

        Phases run from atom to atom: D(q) = sum over j of Φ_ij exp(2πi q·(x_j - x_i))/sqrt(m_i m_j).
        """
        points = np.asarray(q, dtype=float).reshape(-1, 3)
        s = len(self.masses)
        scaled = self.vectors @ np.linalg.inv(self.lattice.cell)
        phases = np.exp(2j * np.pi * (points @ scaled.T))
        result = np.zeros((len(points), s, s, 3, 3), dtype=np.complex128)
        for i, j in np.unique(np.column_stack([self.first, self.second]), axis=0):
            chosen = (self.first == i) & (self.second == j)
            block = phases[:, chosen] @ self.constants[chosen].reshape(-1, 9)
            result[:, i, j] = block.reshape(-1, 3, 3) / np.sqrt(self.masses[i] * self.masses[j])
        matrices = result.transpose(0, 1, 3, 2, 4).reshape(len(points), 3 * s, 3 * s)
        return 0.5 * (matrices + matrices.conj().transpose(0, 2, 1))

    def frequencies(self, q: ArrayLike) -> Array:
        """Frequencies [K, 3S] in THz, ascending; negative ones stand for imaginary ones (an unstable lattice)."""
        squares = np.linalg.eigvalsh(self.dynamical_matrices(q))
        frequencies: Array = np.sign(squares) * np.sqrt(np.abs(squares)) * THZ
        return frequencies

    def dispersion(self, points: int = 200, path: str | None = None) -> Dispersion:
        """Frequencies along ASE's standard path through the Brillouin zone, or along one such as 'GXWKGL'."""
        return dispersion(self.lattice.cell, self.frequencies, points, path)

    def density_of_states(self, mesh: int = 20, bins: int = 200) -> tuple[Array, Array]:
        """(frequency [bins] THz, states per THz and primitive cell [bins]) from an even mesh³, Gaussian smearing.

        The width is 1.5 bins; the integral over all frequencies is 3S.
        """
        axis = (np.arange(mesh) + 0.5) / mesh
        q = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
        found = np.concatenate([self.frequencies(part).ravel() for part in np.array_split(q, -(-len(q) // 500))])
        low, high = min(float(found.min()), 0.0), float(found.max())
        margin = 0.05 * (high - low)
        edges = np.linspace(low - (margin if low < 0.0 else 0.0), high + margin, bins + 1)
        counts, _ = np.histogram(found, edges)
        width = edges[1] - edges[0]
        kernel = np.exp(-0.5 * (np.arange(-6, 7) / 1.5) ** 2)
        smooth = np.convolve(counts, kernel / kernel.sum(), mode="same")
        return 0.5 * (edges[1:] + edges[:-1]), smooth / (width * len(q))


@dataclass(frozen=True)
class Dispersion:
    """Phonon branches along a path.

    Attributes:
        distance: along the path [K], 1/Å.
        frequencies: THz [K, 3S].
        places, labels: of the special points.
    """

    distance: Array
    frequencies: Array
    places: Array
    labels: list[str]


def dispersion(
    cell: ArrayLike, frequencies: Callable[[Array], Array], points: int = 200, path: str | None = None
) -> Dispersion:
    """Frequencies along ASE's standard path through the Brillouin zone, or along one such as 'GXWKGL'.

    Args:
        cell: primitive cell [3, 3], Å.
        frequencies: THz [K, 3S] at wave vectors [K, 3] in units of the reciprocal cell (without 2π).
        points: K.
        path: names of special points.

    Raises:
        SettingsError: the path is none of this lattice.
    """
    try:
        band = Cell(np.asarray(cell)).bandpath(path, npoints=points)
    except (KeyError, ValueError, AssertionError) as error:
        raise SettingsError(
            f"{path!r} is not a path of this lattice ({error}): name its points with --path, as in 'GXWKGL'."
        ) from error
    distance, places, labels = band.get_linear_kpoint_axis()
    # ASE knows the lattice up to its tolerance: the points are the same in units of either reciprocal cell.
    return Dispersion(distance, frequencies(band.kpts), places, list(labels))


def _checked(basis: ClusterBasis, parameters: ArrayLike) -> Array:
    values = np.asarray(parameters, dtype=float)
    if values.shape != (basis.n_parameters,):
        raise DataError(f"The cluster basis has {basis.n_parameters} parameters, got an array {values.shape}.")
    return values


# Heat conductivity through phono3py


@dataclass(frozen=True)
class Conductivity:
    """Lattice heat conductivity in the relaxation time approximation.

    Attributes:
        temperatures: K [T].
        tensor: W/(m K) [T, 3, 3].
        mesh: points along each reciprocal vector.
    """

    temperatures: Array
    tensor: Array
    mesh: tuple[int, int, int]

    @property
    def mean(self) -> Array:
        """A third of the trace [T], W/(m K)."""
        traces: Array = np.trace(self.tensor, axis1=1, axis2=2)
        return traces / 3.0


def supercell_repeats(lattice: Lattice, cutoff: float) -> tuple[int, int, int]:
    """Repetitions of the primitive cell with no lattice vector as short as two cutoffs: images never overlap there."""
    repeats = [1, 1, 1]
    heights = 1.0 / np.linalg.norm(np.linalg.inv(lattice.cell), axis=0)
    while True:
        cell, _ = minkowski_reduce(np.array(repeats)[:, None] * lattice.cell)
        if np.linalg.norm(cell, axis=1).min() > 2.0 * cutoff:
            return repeats[0], repeats[1], repeats[2]
        repeats[int(np.argmin(np.array(repeats) * heights))] += 1


def make_phono3py(
    basis: ClusterBasis,
    parameters: ArrayLike,
    repeats: Sequence[int] | ArrayLike | None = None,
    masses: ArrayLike | None = None,
) -> Any:
    """A Phono3py object with the second and third order force constants of a potential.

    Args:
        basis, parameters: potential, [P].
        repeats: supercell of the primitive cell, [3] or [3, 3]; the default avoids overlapping images for either order.
        masses: [S], natural ones unless given.

    Raises:
        SettingsError: phono3py isn't installed, or the basis lacks one of the orders.
    """
    values = _checked(basis, parameters)
    if not {2, 3} <= set(basis.orders):
        raise SettingsError("Heat conductivity needs the orders 2 and 3: add both to crystal.cutoffs.")
    try:
        from phono3py import Phono3py
        from phonopy.structure.atoms import PhonopyAtoms
    except ImportError:
        raise SettingsError("Heat conductivity needs phono3py: pip install 'ubmd[phonons]'.") from None
    lattice = basis.lattice
    natural = atomic_masses[lattice.numbers] if masses is None else np.asarray(masses, dtype=float)
    cell = PhonopyAtoms(
        symbols=[chemical_symbols[n] for n in lattice.numbers],
        scaled_positions=lattice.scaled,
        cell=lattice.cell,
        masses=natural,
    )
    own = {order: supercell_repeats(lattice, basis.cutoffs[order]) if repeats is None else repeats for order in (2, 3)}
    program = Phono3py(
        cell,
        supercell_matrix=_matrix(own[3]),
        phonon_supercell_matrix=_matrix(own[2]),
        primitive_matrix=np.eye(3),
    )
    program.fc2 = _constants(basis, values, 2, program.phonon_supercell)
    program.fc3 = _constants(basis, values, 3, program.supercell)
    return program


def conductivity(
    basis: ClusterBasis,
    parameters: ArrayLike,
    temperatures: Sequence[float] = (300.0,),
    mesh: int | Sequence[int] = 11,
    repeats: Sequence[int] | ArrayLike | None = None,
    isotopes: bool = False,
    folder: Path | None = None,
) -> Conductivity:
    """Heat conductivity in the relaxation time approximation, by phono3py's tetrahedron method.

    Args:
        basis, parameters: potential, [P].
        temperatures: K.
        mesh: points along the reciprocal vectors; results need a series of meshes to converge.
        repeats: see `make_phono3py`.
        isotopes: scattering by the natural isotopes as well.
        folder: write phono3py.yaml, fc2.hdf5 and fc3.hdf5 there, which phono3py itself reads.
    """
    program = make_phono3py(basis, parameters, repeats)
    points = (mesh,) * 3 if isinstance(mesh, int) else tuple(mesh)
    if folder is not None:
        _write(program, folder)
    program.mesh_numbers = list(points)
    program.init_phph_interaction()
    program.run_thermal_conductivity(temperatures=list(temperatures), is_isotope=isotopes)
    xx, yy, zz, yz, xz, xy = np.moveaxis(np.asarray(program.thermal_conductivity.kappa)[0], -1, 0)
    tensor = np.stack([np.stack(row, axis=-1) for row in ((xx, xy, xz), (xy, yy, yz), (xz, yz, zz))], axis=-2)
    return Conductivity(np.asarray(temperatures, dtype=float), tensor, (points[0], points[1], points[2]))


def _matrix(repeats: Sequence[int] | ArrayLike) -> NDArray[np.int64]:
    """phonopy's supercell matrix: its columns are ours' rows."""
    values = np.asarray(repeats, dtype=np.int64)
    return np.diag(values) if values.ndim == 1 else values


def _constants(basis: ClusterBasis, parameters: Array, order: int, supercell: Any) -> Array:
    """Force constants in the order of atoms of phonopy's supercell."""
    atoms = Atoms(supercell.symbols, scaled_positions=supercell.scaled_positions, cell=supercell.cell, pbc=True)
    return basis.force_constants(parameters, order, basis.supercell(atoms))


def _write(program: Any, folder: Path) -> None:
    from phono3py.file_IO import write_fc2_to_hdf5, write_fc3_to_hdf5

    folder.mkdir(parents=True, exist_ok=True)
    program.save(str(folder / "phono3py.yaml"), settings={"force_sets": False, "displacements": False})
    write_fc2_to_hdf5(program.fc2, filename=str(folder / "fc2.hdf5"))
    write_fc3_to_hdf5(program.fc3, filename=str(folder / "fc3.hdf5"))
