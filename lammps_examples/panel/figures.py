"""Figures of one run of the panel, from its folder: all that the tables need, small enough to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from judge import ceilings, largest, worst_found
from numpy.typing import NDArray

from ubmd.analysis.predictions import Predictions, labels_of_iteration, predict
from ubmd.data.constraints import is_fixed
from ubmd.data.structures import read_structures
from ubmd.measure.errors import share_covered, spearman
from ubmd.runs.folder import RunFolder
from ubmd.settings import RunSettings, load_settings

Array = NDArray[np.float64]


def figures_of(path: Path) -> dict[str, Any]:
    """Figures of a finished run, as JSON takes them; what they mean: README.md.

    Raises:
        DataError: the folder is damaged.
        NotKept: predictions are missing, and so are the models that would make them.
    """
    folder = RunFolder(path)
    settings = load_settings(folder.settings, RunSettings)
    history = folder.read_history()
    labels = read_structures(folder.dataset, labelled=True)
    test = read_structures(folder.test, labelled=True, compare=False)
    moving = ~is_fixed(labels[0])
    models = []
    for entry in history:
        on_test = predict(folder, entry["iteration"], test, run_models=True)
        models.append(
            {
                "labels": entry["labels"],
                "md_steps": entry["md_steps"],
                "minutes": sum(entry["seconds"].values()) / 60.0,
                "factors": factors_of(on_test),
                "energy_rmse_mev_per_atom": entry["test"]["energy_rmse_mev_per_atom"],
                "force_rmse": entry["test"]["force_rmse"],
                "stopped": [replica["stopped"] for replica in entry["replicas"]],
                "test": on_test_set(test, on_test, moving),
                "chosen": chosen_labels(folder, entry["iteration"], labels),
            }
        )
    return {
        "threshold": settings.loop.threshold,
        "limit": settings.loop.labels,
        "ubmd": folder.read_manifest()["ubmd"],
        "models": models,
    }


def factors_of(found: Predictions) -> dict[str, float]:
    """Calibration factors of atomic uncertainties: element -> factor, or '' -> that of all."""
    scale = found.promise["forces"]["scale"]
    return {name: scale * factor for name, factor in (found.promise.get("atom_scale") or {"": 1.0}).items()}


def promised(found: Predictions) -> float:
    """The share that the calibration promises to cover."""
    return float(min(found.promise["forces"]["attainable"], 1.0 - found.promise["alpha"]))


def of_atoms(
    structures: Sequence[Atoms], found: Predictions, moving: NDArray[np.bool_]
) -> tuple[list[Array], list[Array]]:
    """Errors (RMSE over x, y, z) and u_i of the atoms that move, eV/Å; one array [n] per structure."""
    errors = [
        np.sqrt(np.mean((p.forces - atoms.get_forces(apply_constraint=False)) ** 2, axis=1))[moving]
        for atoms, p in zip(structures, found.each, strict=True)
    ]
    return errors, [p.atomic_u[moving] for p in found.each]


def on_test_set(structures: Sequence[Atoms], found: Predictions, moving: NDArray[np.bool_]) -> dict[str, float]:
    """How well uncertainties and errors go together on the test set; fixed atoms are left out."""
    errors, us = of_atoms(structures, found, moving)
    counts = [len(error) for error in errors]
    error, u = np.concatenate(errors), np.concatenate(us)
    largest_error, largest_u = largest(error, counts), largest(u, counts)
    atoms, maxima = ceilings(u, counts)
    return {
        "promised": promised(found),
        "atoms_covered": share_covered(error, u),
        "structures_covered": share_covered(largest_error, largest_u),
        "spearman_atoms": spearman(u, error),
        "spearman_atoms_ceiling": atoms,
        "spearman_maxima": spearman(largest_u, largest_error),
        "spearman_maxima_ceiling": maxima,
        "worst_found": worst_found(error, u),
    }


def chosen_labels(folder: RunFolder, iteration: int, labels: Sequence[Atoms]) -> dict[str, Any]:
    """The labels that an iteration has chosen, under the model that chose them; lists have one entry per label.

    Fixed atoms are left out, and so are labels that a fault had postponed: an earlier model chose them.
    """
    figures: dict[str, Any] = {"promised": None, "error": [], "u": [], "atoms": [], "atoms_covered": [], "random": []}
    structures = labels_of_iteration(labels, iteration)
    if not structures:
        return figures
    found = predict(folder, iteration, structures, run_models=True)
    figures["promised"] = promised(found)
    for atoms, error, u in zip(structures, *of_atoms(structures, found, ~is_fixed(labels[0])), strict=True):
        if "first_iteration" in atoms.info:
            continue
        figures["error"].append(float(error.max()))
        figures["u"].append(float(u.max()))
        figures["atoms"].append(len(error))
        figures["atoms_covered"].append(int(np.sum(error <= u)))
        figures["random"].append(bool(atoms.info.get("random", False)))
    return figures
