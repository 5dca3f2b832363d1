"""Figures of one run of the panel, from its folder: all that the tables need, small enough to keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from judge import ceilings, worst_found

from ubmd.analysis.predictions import Predictions, kept_predictions, labels_of_iteration, predict
from ubmd.data.structures import read_structures
from ubmd.measure.errors import calibration_data, share_covered, spearman
from ubmd.runs.folder import RunFolder
from ubmd.settings import RunSettings, load_settings

NEW_LABELS = "new_labels.npz"


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
    models = [
        {
            "labels": entry["labels"],
            "md_steps": entry["md_steps"],
            "minutes": sum(entry["seconds"].values()) / 60.0,
            "force_factor": entry["calibration"]["force_factor"],
            "energy_rmse_mev_per_atom": entry["test"]["energy_rmse_mev_per_atom"],
            "force_rmse": entry["test"]["force_rmse"],
            "stopped": [replica["stopped"] for replica in entry["replicas"]],
            "test": on_test_set(test, predict(folder, entry["iteration"], test, run_models=True)),
            "chosen": chosen_labels(folder, entry["iteration"], labels),
        }
        for entry in history
    ]
    return {
        "threshold": settings.loop.threshold,
        "limit": settings.loop.labels,
        "ubmd": folder.read_manifest()["ubmd"],
        "models": models,
    }


def on_test_set(structures: Sequence[Atoms], found: Predictions) -> dict[str, float]:
    """How well uncertainties and errors go together on the test set."""
    data = calibration_data(structures, found.each)
    counts = [len(atoms) for atoms in structures]
    atoms, maxima = ceilings(data.atom_u, counts)
    return {
        "promised": found.promise["forces"]["attainable"],
        "atoms_covered": share_covered(data.atom_error, data.atom_u),
        "structures_covered": share_covered(data.largest_error, data.largest_u),
        "spearman_atoms": spearman(data.atom_u, data.atom_error),
        "spearman_atoms_ceiling": atoms,
        "spearman_maxima": spearman(data.largest_u, data.largest_error),
        "spearman_maxima_ceiling": maxima,
        "worst_found": worst_found(data.atom_error, data.atom_u),
    }


def chosen_labels(folder: RunFolder, iteration: int, labels: Sequence[Atoms]) -> dict[str, Any]:
    """The labels that an iteration has chosen, under the model that chose them; lists have one entry per label.

    Labels that a fault had postponed are left out: an earlier model chose them.
    """
    figures: dict[str, Any] = {"promised": None, "error": [], "u": [], "atoms": [], "atoms_covered": [], "random": []}
    structures = labels_of_iteration(labels, iteration)
    if not structures:
        return figures
    where = folder.iteration(iteration)
    found = kept_predictions(where / NEW_LABELS, structures) or predict(folder, iteration, structures, run_models=True)
    figures["promised"] = found.promise["forces"]["attainable"]
    picks = json.loads((where / "selected.json").read_text())["selected"]
    random = {(pick["replica"], pick["step"]): bool(pick.get("random", False)) for pick in picks}
    for prediction, atoms in zip(found.each, structures, strict=True):
        if "first_iteration" in atoms.info:
            continue
        error, u = np.sqrt(np.mean((prediction.forces - atoms.get_forces()) ** 2, axis=1)), prediction.atomic_u
        figures["error"].append(float(error.max()))
        figures["u"].append(float(u.max()))
        figures["atoms"].append(len(atoms))
        figures["atoms_covered"].append(int(np.sum(error <= u)))
        figures["random"].append(random[atoms.info["replica"], atoms.info["step"]])
    return figures
