"""What the models of a run predict for structures that they were not trained on.

A model file is a program. The run stores the predictions of its models (``predictions.npz`` and ``new_labels.npz`` of
an iteration), so that a report need not run them: the folder may come from someone who is not trusted.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ubmd.calculator import Model, Prediction
from ubmd.data.labels import dataset_hash
from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.files import replacing
from ubmd.measure.isomers import amide_torsions, count_cis
from ubmd.runs.folder import RunFolder
from ubmd.runs.records import IterationEntry
from ubmd.valid_json import parse_json

FILE = "predictions.npz"
"""about the test set; in runs of earlier versions without one, about the labels that the iteration selected"""
NEW_LABELS = "new_labels.npz"
"""about the labels that the iteration selected"""
_NEWEST = 8  # iterations whose new labels stand in for a test set


class NotKept(DataError):
    """A run folder lacks the predictions of its models: an earlier version of ubmd made it."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model for some structures."""

    each: list[Prediction]
    """without features"""
    promise: dict[str, Any]
    """calibration record of the model"""


@dataclass(frozen=True)
class Unseen:
    """Labelled structures, predictions for them, and where both come from."""

    structures: list[Atoms]
    predictions: list[Prediction]
    promise: dict[str, Any]
    """calibration record of the newest model"""
    what: str
    """what the structures are, as the beginning of a sentence"""


# ------------------------------------------------------------------------------------------ kept by the run


def keep_predictions(
    path: Path, structures: Sequence[Atoms], predictions: Sequence[Prediction], record: Mapping[str, Any]
) -> None:
    """Write the predictions of a model with this record for labelled structures."""
    none, promise = np.full(6, np.nan), dict(record["uncertainty"])
    if "atom_scale" in record:
        promise["atom_scale"] = dict(zip(record["elements"], record["atom_scale"], strict=True))
    with replacing(path) as handle:
        np.savez_compressed(
            handle,
            structures=dataset_hash(structures),
            promise=json.dumps(promise),
            energy=np.array([p.energy for p in predictions]),
            u=np.array([p.u for p in predictions]),
            stress=np.array([none if p.stress is None else p.stress for p in predictions]),
            forces=np.concatenate([p.forces for p in predictions]),
            atomic_u=np.concatenate([p.atomic_u for p in predictions]),
        )


def kept_predictions(path: Path, structures: Sequence[Atoms]) -> Predictions | None:
    """The file's predictions for these structures; None if it is damaged, missing, or about other structures."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as data:
            if str(data["structures"]) != dataset_hash(structures):
                return None
            found = {name: data[name].astype(np.float64) for name in ("energy", "u", "stress", "forces", "atomic_u")}
            promise = _checked(parse_json(str(data["promise"])))
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, RecursionError, zipfile.BadZipFile):
        return None
    shapes = _shapes(structures)
    if any(found[name].shape != shape for name, shape in shapes.items()):
        return None
    ends = np.cumsum([len(atoms) for atoms in structures])[:-1]
    forces, atomic_u = np.split(found["forces"], ends), np.split(found["atomic_u"], ends)
    return Predictions(
        [
            Prediction(
                energy=float(found["energy"][k]),
                forces=forces[k],
                stress=None if np.isnan(found["stress"][k]).any() else found["stress"][k],
                u=float(found["u"][k]),
                atomic_u=atomic_u[k],
                feature=np.empty(0),
            )
            for k in range(len(structures))
        ],
        promise,
    )


def _shapes(structures: Sequence[Atoms]) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays about these structures."""
    number, atoms = len(structures), sum(len(atoms) for atoms in structures)
    return {"energy": (number,), "u": (number,), "stress": (number, 6), "forces": (atoms, 3), "atomic_u": (atoms,)}


def _checked(promise: Any) -> dict[str, Any]:
    """The numbers of a calibration record that a report needs; errors as of dictionaries and ``float``.

    ``held_out``: structures that were held out, if others calibrate, too.
    """
    parts = {name: promise[name] for name in ("energy", "forces")}
    numbers = {
        name: {
            "scale": float(part["scale"]),
            "attainable": float(part["attainable"]),
            "n_calibration": int(part["n_calibration"]),
        }
        for name, part in parts.items()
    }
    scale = {str(element): float(factor) for element, factor in promise.get("atom_scale", {}).items()}
    held_out = promise["held_out"]["energy"]["n_calibration"] if "held_out" in promise else None
    return {
        "alpha": float(promise["alpha"]),
        "atom_scale": scale,
        "held_out": None if held_out is None else int(held_out),
        **numbers,
    }


# ------------------------------------------------------------------------------------------ read by reports


def predict(
    folder: RunFolder, iteration: int, structures: Sequence[Atoms], run_models: bool, model: Path | None = None
) -> Predictions:
    """Predictions of an iteration's model for labelled structures: stored by the run, or made now (``run_models``).

    Args:
        folder: of the run.
        iteration: number of the iteration.
        structures: with labels.
        run_models: whether files of the folder may be run.
        model: the file to run, if not that of the iteration.

    Raises:
        NotKept: the run has stored none, and the model may not be run, or is missing.
    """
    where = folder.iteration(iteration)
    found = kept_predictions(where / FILE, structures) or kept_predictions(where / NEW_LABELS, structures)
    model = model or where / "model.pt"
    if found is None and run_models and model.exists():
        evaluator = Model(model)
        return Predictions(evaluator.predict(structures), evaluator.metadata["uncertainty"])
    if found is None:
        cure = (
            f"{model} is missing, too."
            if run_models
            else "Give --run-models to make them; this runs the model files in the folder, so you must trust them."
        )
        raise NotKept(
            f"{folder.path} has no predictions of its models for these structures (an earlier version of ubmd made it, "
            f"or its test set has changed since). {cure}"
        )
    return found


def predict_unseen(folder: RunFolder, history: Sequence[IterationEntry], run_models: bool = False) -> Unseen | None:
    """The newest model on the test set; without one, earlier models on the labels that they selected.

    The latter are the most difficult structures of the replicas. None if there is no model or no such label yet.

    Raises:
        NotKept: the folder has a model, but not its predictions, and ``run_models`` is not set.
    """
    if not folder.model.exists() or not history:
        return None
    if folder.test.exists():
        structures = read_structures(folder.test, labelled=True, compare=False)
        amides = amide_torsions(structures[0])
        note = f" ({count_cis(structures, amides)} of them with a cis amide bond)" if amides else ""
        what = f"Newest model on the {len(structures)} structures of the test set{note}"
        found = predict(folder, history[-1].iteration, structures, run_models, folder.model)
        return Unseen(structures, found.each, found.promise, what)
    chosen, parts = _new_labels(folder, history, run_models)
    if not chosen:
        return None
    what = (
        f"The run has no test set. Instead, these are {len(chosen)} labels of the newest iterations, predicted by the "
        "models that selected them, before training on them (the most difficult structures of the replicas)"
    )
    return Unseen(chosen, [prediction for part in parts for prediction in part.each], parts[-1].promise, what)


def _new_labels(
    folder: RunFolder, history: Sequence[IterationEntry], run_models: bool
) -> tuple[list[Atoms], list[Predictions]]:
    """Labels of the newest iterations, and predictions of the models that selected them, where known."""
    labels = read_structures(folder.dataset, labelled=True)
    structures: list[Atoms] = []
    parts: list[Predictions] = []
    missing: NotKept | None = None
    for entry in history[-_NEWEST:]:
        chosen = labels_of_iteration(labels, entry.iteration)
        try:
            if chosen:
                parts.append(predict(folder, entry.iteration, chosen, run_models))
                structures += chosen
        except NotKept as error:
            missing = missing or error
    if missing is not None and not parts:
        raise missing
    return structures, parts


def labels_of_iteration(labels: Sequence[Atoms], iteration: int) -> list[Atoms]:
    """The labels that an iteration has added."""
    return [atoms for atoms in labels if atoms.info.get("iteration") == iteration]
