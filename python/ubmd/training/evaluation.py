"""How good a model file is on labelled structures, in the units of reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms

from ubmd.data.structures import EV_PER_A3_IN_MPA, labels_of

if TYPE_CHECKING:
    from ubmd.calculator import Prediction


def accuracy(predictions: Sequence[Prediction], structures: Sequence[Atoms]) -> dict[str, float | int | None]:
    """Errors of predictions against the labels of the structures (energy and forces; stress where there is one).

    Returns:
        ``structures``, ``atoms``, then RMSE and MAE of energy (meV/atom), force components (eV/Å) and stress
        components (MPa; None without stress labels), and the shares of errors that are at most the calibrated
        uncertainty: ``energy_share_below_u`` (|ΔE|/n against u), ``force_share_below_u`` (every atom's RMSE over xyz
        against u_i) and ``max_force_share_below_u`` (largest error against largest u_i of each structure).
    """
    labels = [labels_of(atoms) for atoms in structures]
    pairs = list(zip(predictions, labels, strict=True))
    energy = np.array([(p.energy - found["energy"]) / len(found["forces"]) for p, found in pairs])
    force = [p.forces - found["forces"] for p, found in pairs]
    stress = [p.stress - found["stress"] for p, found in pairs if p.stress is not None and "stress" in found]
    atomic = [np.sqrt((error**2).mean(axis=1)) for error in force]
    below = [error <= p.atomic_u for error, p in zip(atomic, predictions, strict=True)]
    below_max = [error.max() <= p.atomic_u.max() for error, p in zip(atomic, predictions, strict=True)]
    return {
        "structures": len(structures),
        "atoms": sum(len(error) for error in force),
        **_errors("energy", "meV_per_atom", 1000 * energy),
        **_errors("force", "eV_per_A", np.concatenate(force)),
        **_errors("stress", "MPa", EV_PER_A3_IN_MPA * np.array(stress)),
        "energy_share_below_u": float(np.mean(np.abs(energy) <= [p.u for p in predictions])),
        "force_share_below_u": float(np.mean(np.concatenate(below))),
        "max_force_share_below_u": float(np.mean(below_max)),
    }


def _errors(name: str, unit: str, errors: np.ndarray) -> dict[str, float | None]:
    rmse, mae = (float(np.sqrt(np.mean(errors**2))), float(np.mean(np.abs(errors)))) if errors.size else (None, None)
    return {f"{name}_rmse_{unit}": rmse, f"{name}_mae_{unit}": mae}
