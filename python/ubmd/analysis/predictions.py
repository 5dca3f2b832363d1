"""What the models of a run say about structures that they were not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ase import Atoms

from ubmd.analysis.isomers import amide_torsions, count_cis
from ubmd.calculator import Evaluator, Prediction
from ubmd.data.structures import read_structures
from ubmd.learning.run_folder import RunFolder

_NEWEST = 8  # iterations whose new labels stand in for a test set


@dataclass(frozen=True)
class Unseen:
    """Labelled structures, predictions for them, and where both come from."""

    structures: list[Atoms]
    predictions: list[Prediction]
    promise: dict[str, Any]
    """calibration record of the newest model"""
    what: str
    """what the structures are, as the beginning of a sentence"""


def predict_unseen(folder: RunFolder, history: Sequence[Mapping[str, Any]]) -> Unseen | None:
    """The newest model on the test set; without one, earlier models on the labels that they selected.

    The latter are the hardest structures that the replicas found. None if there is no model or no such label yet.
    """
    if not folder.model.exists():
        return None
    newest = Evaluator(folder.model)
    promise = newest.metadata["uncertainty"]
    if folder.test.exists():
        structures = read_structures(folder.test, labelled=True, compare=False)
        amides = amide_torsions(structures[0])
        note = f" ({count_cis(structures, amides)} of them with a cis amide bond)" if amides else ""
        what = f"Newest model on the {len(structures)} structures of the test set{note}"
        return Unseen(structures, newest.predict(structures), promise, what)
    structures, predictions = _new_labels(folder, history)
    if not structures:
        return None
    what = (
        f"The run has no test set. So these are {len(structures)} labels of the newest iterations, as predicted by the "
        "models that selected them and had not been trained on them (so the hardest of the replicas)"
    )
    return Unseen(structures, predictions, promise, what)


def _new_labels(folder: RunFolder, history: Sequence[Mapping[str, Any]]) -> tuple[list[Atoms], list[Prediction]]:
    """Labels of the newest iterations, and what the models that selected them say."""
    labels = read_structures(folder.dataset, labelled=True)
    structures: list[Atoms] = []
    predictions: list[Prediction] = []
    for entry in history[-_NEWEST:]:
        chosen = [atoms for atoms in labels if atoms.info.get("iteration") == entry["iteration"]]
        model = folder.iteration(entry["iteration"]) / "model.pt"
        if chosen and model.exists():
            structures += chosen
            predictions += Evaluator(model).predict(chosen)
    return structures, predictions
