"""Errors and uncertainties of a model on labelled structures, and how well they go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike, NDArray

from ubmd.calculator import Model, Prediction
from ubmd.data.labels import EV_PER_A3_IN_MPA, labels_of
from ubmd.data.periodicity import stress_components

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CalibrationData:
    """Errors and calibrated uncertainties on S structures with A atoms together."""

    energy_error: Array
    """|ΔE|/n [S], eV/atom"""
    energy_u: Array
    """structure uncertainty u [S], eV/atom"""
    atom_error: Array
    """RMSE(F_i) over x, y, z [A], eV/Å"""
    atom_u: Array
    """atomic uncertainty u_i [A], eV/Å"""
    largest_error: Array
    """max_i RMSE(F_i) [S], eV/Å"""
    largest_u: Array
    """max_i u_i [S], eV/Å"""

    @property
    def energy_rmse(self) -> float:
        """RMSE of the energy per atom, meV/atom."""
        return 1000.0 * float(np.sqrt(np.mean(self.energy_error**2)))

    @property
    def force_rmse(self) -> float:
        """RMSE of the force components, eV/Å."""
        return float(np.sqrt(np.mean(self.atom_error**2)))


def calibration_data(structures: Sequence[Atoms], predictions: Sequence[Prediction]) -> CalibrationData:
    """Compare labels with predictions of `ubmd.calculator.Model.predict` for the same structures."""
    atom_errors = [
        np.sqrt(np.mean((p.forces - atoms.get_forces()) ** 2, axis=1))
        for atoms, p in zip(structures, predictions, strict=True)
    ]
    energy_error = [
        abs(p.energy - atoms.get_potential_energy()) / len(atoms)
        for atoms, p in zip(structures, predictions, strict=True)
    ]
    return CalibrationData(
        energy_error=np.array(energy_error),
        energy_u=np.array([p.u for p in predictions]),
        atom_error=np.concatenate(atom_errors),
        atom_u=np.concatenate([p.atomic_u for p in predictions]),
        largest_error=np.array([errors.max() for errors in atom_errors]),
        largest_u=np.array([p.atomic_u.max() for p in predictions]),
    )


def error_summary(
    structures: Sequence[Atoms], predictions: Sequence[Prediction], chosen: Sequence[int] | None = None
) -> dict[str, float]:
    """Root mean square errors of predictions for the same structures; ``chosen``: indices of those that count.

    Returns:
        ``energy_rmse_mev_per_atom`` (meV/atom), ``force_rmse`` (components, eV/Å), ``stress_rmse_mpa`` (components,
        MPa, only where there are stress labels), and ``structures``, their number.
    """
    if chosen is not None:
        structures, predictions = [structures[k] for k in chosen], [predictions[k] for k in chosen]
    data = calibration_data(structures, predictions)
    errors = {"energy_rmse_mev_per_atom": data.energy_rmse, "force_rmse": data.force_rmse}
    parity = parity_data(structures, predictions)
    if len(parity.stress):
        errors["stress_rmse_mpa"] = float(np.sqrt(np.mean((parity.stress - parity.stress_label) ** 2)))
    return errors | {"structures": len(structures)}


def share_covered(error: ArrayLike, u: ArrayLike) -> float:
    """Share of errors that do not exceed their uncertainty: 1 - alpha for data like those of the calibration."""
    return float(np.mean(np.asarray(error) <= np.asarray(u)))


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson correlation; NaN if one of them is constant."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else float("nan")


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman rank correlation; ties get their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: ArrayLike) -> Array:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]


@dataclass(frozen=True)
class ParityData:
    """Predictions beside labels: per structure, per force component, per stress component (those with a label)."""

    energy_label: Array
    """[S] eV/atom"""
    energy: Array
    """[S] eV/atom"""
    force_label: Array
    """[3A] eV/Å"""
    force: Array
    """[3A] eV/Å"""
    stress_label: Array
    """[6T] MPa, empty without stress labels; of slabs and wires three or one component"""
    stress: Array
    """[6T] MPa"""


def parity_data(structures: Sequence[Atoms], predictions: Sequence[Prediction]) -> ParityData:
    """What `figures.parity_figure` draws, for predictions of the same structures, which may lack labels."""
    pairs = [(p, labels_of(atoms), len(atoms)) for p, atoms in zip(predictions, structures, strict=True)]
    stresses = [
        (stress_components(p.stress, atoms), stress_components(found["stress"], atoms))
        for (p, found, _), atoms in zip(pairs, structures, strict=True)
        if p.stress is not None and "stress" in found
    ]
    return ParityData(
        energy_label=np.array([float(found["energy"]) / n for _, found, n in pairs if "energy" in found]),
        energy=np.array([p.energy / n for p, found, n in pairs if "energy" in found]),
        force_label=np.concatenate([[], *(np.ravel(found["forces"]) for _, found, _ in pairs if "forces" in found)]),
        force=np.concatenate([[], *(p.forces.ravel() for p, found, _ in pairs if "forces" in found)]),
        stress_label=EV_PER_A3_IN_MPA * np.concatenate([[], *(label for _, label in stresses)]),
        stress=EV_PER_A3_IN_MPA * np.concatenate([[], *(value for value, _ in stresses)]),
    )


def calibration_of(evaluator: Model) -> dict[str, Any]:
    """Conformal factors of energy and force uncertainties (no unit), and the confidence that they reach."""
    energy, forces = (evaluator.metadata["uncertainty"][name] for name in ("energy", "forces"))
    return {
        "energy_factor": energy["scale"],
        "force_factor": forces["scale"],
        "energy_attainable": energy["attainable"],
        "force_attainable": forces["attainable"],
    }
