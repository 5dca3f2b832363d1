"""A force-constant potential from labelled structures: frames, fit, calibration, model file, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ubmd.data.labels import labels_of
from ubmd.errors import DataError, ModelError
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.curvature import boxes_of, stabilised, wave_vectors
from ubmd.potentials.force_constants.lattice import Lattice, Placer, Supercell
from ubmd.potentials.force_constants.regression import NormalEquations, Posterior, Sums, fit
from ubmd.potentials.force_constants.seen import Seen
from ubmd.potentials.force_constants.symmetry import SYMMETRY_TOLERANCE
from ubmd.settings import CrystalSettings, UncertaintySettings
from ubmd.uncertainty.conformal import ConformalScale, conformal_scale

Progress = Callable[[str, int, int], None]
"""(name of the step, number done, number of all)"""


@dataclass(frozen=True, eq=False)
class Frame:
    """A labelled structure in the crystal's frame.

    Attributes:
        supercell: its box.
        displacements: [n, 3], Å, their mean zero.
        forces: [n, 3], eV/Å.
        energy: eV, None without a label.
    """

    supercell: Supercell
    displacements: np.ndarray
    forces: np.ndarray
    energy: float | None

    @property
    def cells(self) -> int:
        """Primitive cells in the box."""
        return self.supercell.determinant


def frames(lattice: Lattice, structures: Iterable[Atoms], what: str = "structure") -> Iterator[Frame]:
    """Labelled structures in boxes of any orientation as frames.

    Raises:
        DataError: names the structure that has no forces or doesn't hold the crystal.
    """
    placer = Placer(lattice)
    for number, atoms in enumerate(structures):
        labels = labels_of(atoms)
        if "forces" not in labels:
            raise DataError(f"{what} {number}: no forces; label it or remove it.")
        try:
            placement, displacements = placer(atoms)
        except DataError as error:
            raise DataError(f"{what} {number}: {error}") from None
        forces = labels["forces"] @ placement.rotation
        yield Frame(placement.supercell, displacements, forces, labels.get("energy"))


def cached_basis(
    crystal: Atoms,
    cutoffs: dict[int, float],
    path: Path,
    decay: float | None = None,
    tolerance: float = SYMMETRY_TOLERANCE,
    pairs: float | None = None,
) -> ClusterBasis:
    """The basis in a file, or a new one that is kept there if the file has none of this crystal and these options.

    The arguments are those of `ClusterBasis.build`.
    """
    lattice = Lattice.from_atoms(crystal, tolerance)
    if path.exists():
        try:
            basis = ClusterBasis.load(path)
        except ModelError:
            pass  # damaged: it is built again
        else:
            found = None if basis.pairs is None else basis.pairs.cutoff
            same = basis.cutoffs == cutoffs and basis.decay == decay and found == pairs
            if same and basis.lattice.is_same(lattice):
                return basis
    basis = ClusterBasis.build(crystal, cutoffs, decay, tolerance, pairs)
    path.parent.mkdir(parents=True, exist_ok=True)
    basis.save(path)
    return basis


@dataclass(frozen=True, eq=False)
class Errors:
    """Errors and Bayesian deviations of a potential on S frames with A atoms together.

    Attributes:
        forces, deviations: error and standard deviation of each force component [A, 3], eV/Å, not calibrated.
        rms_force: root mean square of the force labels, eV/Å.
        sizes: atoms of each frame [S].
        energies, energy_deviations: error and standard deviation of the energies of frames that have one, eV.
        energy_sizes: their atoms.
    """

    forces: np.ndarray
    deviations: np.ndarray
    rms_force: float
    sizes: np.ndarray
    energies: np.ndarray
    energy_deviations: np.ndarray
    energy_sizes: np.ndarray

    @property
    def force_rmse(self) -> float:
        """RMSE of the force components, eV/Å."""
        return float(np.sqrt(np.mean(self.forces**2)))

    @property
    def energy_rmse(self) -> float | None:
        """RMSE of the energy, eV/atom; None without energies."""
        return float(np.sqrt(np.mean((self.energies / self.energy_sizes) ** 2))) if len(self.energies) else None

    @property
    def atom_error(self) -> np.ndarray:
        """Root mean square error of each atom's force over x, y, z [A], eV/Å, as for every kind of model."""
        error: np.ndarray = np.sqrt(np.mean(self.forces**2, axis=1))
        return error

    @property
    def atom_deviation(self) -> np.ndarray:
        """Largest standard deviation of each atom's force components [A], eV/Å."""
        deviation: np.ndarray = self.deviations.max(axis=1)
        return deviation

    def z_score(self, noise: float) -> float:
        """Root mean square of error over sqrt(deviation^2 + noise^2); 1 for correct deviations."""
        return float(np.sqrt(np.mean(self.forces**2 / (self.deviations**2 + noise**2))))

    def largest(self, values: np.ndarray) -> np.ndarray:
        """Largest of the atoms' values [A] in each frame [S]."""
        return np.maximum.reduceat(values, np.concatenate([[0], np.cumsum(self.sizes)[:-1]]))


def errors_of(basis: ClusterBasis, posterior: Posterior, data: Iterable[Frame], energy: float) -> Errors:
    """Errors on labelled frames; ``energy`` is that of the ideal crystal per primitive cell, eV."""
    squares = 0.0
    forces: list[np.ndarray] = []
    deviations: list[np.ndarray] = []
    sizes: list[int] = []
    energies: list[tuple[float, float, int]] = []
    for frame in data:
        matrix = basis.force_matrix(frame.displacements, frame.supercell)
        fixed, repulsion = basis.fixed(posterior.core, posterior.limits, frame.displacements, frame.supercell)
        forces.append(posterior.forces(matrix).reshape(-1, 3) + repulsion - frame.forces)
        deviations.append(posterior.force_deviations(matrix).reshape(-1, 3))
        squares += float(np.sum(frame.forces**2))
        sizes.append(len(frame.forces))
        if frame.energy is not None:
            phi = basis.energy_features(frame.displacements, frame.supercell)
            error = float(posterior.energy(phi)) + fixed + energy * frame.cells - frame.energy
            energies.append((error, float(posterior.energy_deviation(phi)), len(frame.forces)))
    columns = np.array(energies).reshape(-1, 3).T
    return Errors(
        np.concatenate(forces),
        np.concatenate(deviations),
        float(np.sqrt(squares / (3 * sum(sizes)))),
        np.array(sizes),
        *columns,
    )


@dataclass(frozen=True, eq=False)
class Constraint:
    """What it cost that no wave has a negative curvature.

    Attributes:
        rows: inequalities that were needed.
        lowest: curvature of the plain fit, eV/Å^2.
        training_force_rmse, validation_force_rmse: of the plain fit, eV/Å.
    """

    rows: int
    lowest: float
    training_force_rmse: float
    validation_force_rmse: float


@dataclass(frozen=True, eq=False)
class CrystalFit:
    """A fitted and calibrated force-constant potential.

    Attributes:
        basis, equations, posterior: see there.
        energy: of the ideal crystal per primitive cell, eV (0 without energies).
        training_force_rmse, training_rms_force: of the training frames' force components, eV/Å.
        validation: errors on the frames that calibrated.
        energy_scale, force_scale: conformal factors; without energies the first is a bare number, that of the forces.
        boxes: the different boxes of the training set, integer matrices of primitive vectors.
        constraint: what crystal.stable changed; None without it.
    """

    basis: ClusterBasis
    equations: NormalEquations
    posterior: Posterior
    energy: float
    training_force_rmse: float
    training_rms_force: float
    validation: Errors
    energy_scale: ConformalScale | float
    force_scale: ConformalScale
    boxes: Sequence[np.ndarray] = ()
    constraint: Constraint | None = None

    @property
    def order_shares(self) -> dict[int, float]:
        """Root mean square force of each order alone over that of all labels, on the training frames."""
        sums, orders = self.equations.sums["forces"], self.equations.parameter_orders
        shares = {}
        for order in self.basis.all_orders:
            theta = np.where(orders == order, self.posterior.mean, 0.0)
            shares[order] = float(np.sqrt(max(float(theta @ sums.gram @ theta), 0.0) / sums.square))
        return shares

    def summary(self) -> dict[str, Any]:
        """The main numbers as JSON values."""
        posterior, validation = self.posterior, self.validation
        coverage = validation.atom_error <= self.force_scale.scale * validation.atom_deviation
        return {
            "parameters": {str(order): count for order, count in posterior.counts.items()},
            "gamma": {str(order): value for order, value in posterior.gamma.items()},
            "prior_precision": {str(order): value for order, value in posterior.alpha.items()},
            "order_shares": {str(order): value for order, value in self.order_shares.items()},
            "noise_eV_per_A": posterior.noise,
            "noise_limited": list(posterior.noise_limited),
            "converged": posterior.converged,
            "log_evidence": posterior.log_evidence,
            "ideal_energy_eV_per_cell": self.energy,
            "training_structures": self.equations.sums["forces"].structures,
            "training_force_rmse_eV_per_A": self.training_force_rmse,
            "training_rms_force_eV_per_A": self.training_rms_force,
            "validation_structures": len(validation.sizes),
            "validation_force_rmse_eV_per_A": validation.force_rmse,
            "validation_rms_force_eV_per_A": validation.rms_force,
            "validation_energy_rmse_eV_per_atom": validation.energy_rmse,
            "z_score": validation.z_score(posterior.noise),
            "force_scale": self.force_scale.scale,
            "force_attainable": self.force_scale.attainable,
            "force_coverage": float(np.mean(coverage)),
            **({} if self.constraint is None else {"constraint": asdict(self.constraint)}),
        }


def fit_crystal(
    basis: ClusterBasis,
    training: Sequence[Atoms],
    validation: Sequence[Atoms],
    crystal: CrystalSettings,
    uncertainty: UncertaintySettings,
    ideal_energy: float | None = None,
    progress: Progress = lambda what, done, total: None,
) -> CrystalFit:
    """Fit the parameters to the training set, calibrate on the validation set.

    Args:
        basis: of the crystal.
        training: structures with forces; energies of all are needed to fit them.
        validation: structures with forces that aren't trained on.
        crystal: what to fit.
        uncertainty: its alpha and atoms_by say how to calibrate.
        ideal_energy: label of the ideal crystal, eV per primitive cell; None: the mean of the training energies minus
            those of the fit.
        progress: is told about every structure.

    Raises:
        DataError: a structure without the labels it needs, or that doesn't hold the crystal.
    """
    equations = NormalEquations(basis.parameter_orders)
    energies: list[tuple[np.ndarray, float, int]] = []
    boxes: list[np.ndarray] = []
    seen = Seen(basis)
    for number, frame in enumerate(frames(basis.lattice, training, "training structure")):
        seen.add(frame.displacements, frame.supercell)
        equations.add(basis.force_matrix(frame.displacements, frame.supercell), frame.forces)
        boxes.append(frame.supercell.matrix)
        if frame.energy is not None:
            phi = basis.energy_features(frame.displacements, frame.supercell)
            energies.append((phi, frame.energy, frame.cells))
        progress("training structures", number + 1, len(training))
    if crystal.energies and len(energies) < len(training):
        raise DataError(
            "A training structure has no energy; label it, or set crystal.energies = false to fit forces alone."
        )
    posterior = fit(equations, caution=crystal.caution)
    energy = _ideal_energy(posterior, energies) if ideal_energy is None else ideal_energy
    if crystal.energies:
        for phi, label, cells in energies:
            equations.add_energy(phi, label - cells * energy)
        posterior = fit(equations, caution=crystal.caution)
    posterior = seen.bounded(posterior, crystal.stable)
    sums, plain, rows, lowest = equations.sums["forces"], posterior, 0, 0.0
    if crystal.stable:
        found = stabilised(basis, plain, wave_vectors(basis.lattice, boxes_of(boxes)))
        posterior, rows, lowest = found.posterior, found.rows, found.lowest_before
        if ideal_energy is None and not crystal.energies:
            energy = _ideal_energy(posterior, energies)
    held_out = errors_of(basis, posterior, _reported(basis.lattice, validation, progress), energy)
    forces = calibrated_forces(held_out, uncertainty)
    return CrystalFit(
        basis=basis,
        equations=equations,
        posterior=posterior,
        energy=energy,
        training_force_rmse=_rmse(sums, posterior),
        training_rms_force=float(np.sqrt(sums.square / sums.rows)),
        validation=held_out,
        energy_scale=calibrated_energies(held_out, uncertainty) or forces.scale,
        force_scale=forces,
        boxes=boxes_of(boxes),
        constraint=Constraint(rows, lowest, _rmse(sums, plain), _plain_rmse(basis, plain, validation, held_out, rows))
        if crystal.stable
        else None,
    )


def _rmse(sums: Sums, posterior: Posterior) -> float:
    """Of the training forces, eV/Å."""
    return float(np.sqrt(sums.residual(posterior.mean) / sums.rows))


def _plain_rmse(
    basis: ClusterBasis, plain: Posterior, validation: Sequence[Atoms], held_out: Errors, rows: int
) -> float:
    """Of the validation forces with the plain fit, eV/Å; that of the final one if no inequality was needed."""
    if rows == 0:
        return held_out.force_rmse
    return errors_of(basis, plain, frames(basis.lattice, validation, "validation structure"), 0.0).force_rmse


def calibrated_forces(errors: Errors, settings: UncertaintySettings) -> ConformalScale:
    """Conformal factor of the largest force deviation of atoms, or of structures (settings' atoms_by)."""
    error, u = errors.atom_error, errors.atom_deviation
    if settings.atoms_by == "structure":
        error, u = errors.largest(error), errors.largest(u)
    return conformal_scale(error, u, settings.alpha)


def calibrated_energies(errors: Errors, settings: UncertaintySettings) -> ConformalScale | None:
    """Conformal factor of the energies' deviations per atom; None without energies."""
    if not len(errors.energies):
        return None
    sizes = errors.energy_sizes
    return conformal_scale(errors.energies / sizes, errors.energy_deviations / sizes, settings.alpha)


def _reported(lattice: Lattice, structures: Sequence[Atoms], progress: Progress) -> Iterator[Frame]:
    for number, frame in enumerate(frames(lattice, structures, "validation structure")):
        yield frame
        progress("validation structures", number + 1, len(structures))


def _ideal_energy(posterior: Posterior, energies: Sequence[tuple[np.ndarray, float, int]]) -> float:
    """Energy per primitive cell that makes the mean error of the energies zero; 0 without energies."""
    cells = sum(count for _, _, count in energies)
    return sum(label - float(posterior.energy(phi)) for phi, label, _ in energies) / cells if cells else 0.0
