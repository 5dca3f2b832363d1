"""What float32 in the network costs: mixed precision against double."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms

from ubmd.calculator import Model


def mixed_against_double(file: Path, structures: list[Atoms], device: str = "cpu") -> dict[str, float]:
    """Errors over a few structures, each relative to the root mean square of its quantity: forces, u, u_i, du/dr.

    ``device``: where mixed precision runs; double precision runs on the CPU.
    """
    mixed, double = Model(file, "mixed", device), Model(file, "double")
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"force": [], "u": [], "ui": [], "bias": []}
    for atoms in structures:
        rough, exact = mixed.predict_one(atoms), double.predict_one(atoms)
        pairs["force"].append((rough.forces, exact.forces))
        pairs["u"].append((np.array([rough.u]), np.array([exact.u])))
        pairs["ui"].append((rough.atomic_u, exact.atomic_u))
        pairs["bias"].append((mixed.uncertainty_gradient(atoms)[1], double.uncertainty_gradient(atoms)[1]))
    return {name: _relative_error(*map(np.concatenate, zip(*values, strict=True))) for name, values in pairs.items()}


def _relative_error(rough: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((rough - exact) ** 2) / np.mean(exact**2)))
