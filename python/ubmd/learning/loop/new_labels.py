"""New labels, as the model that selected them had predicted them: what later models are calibrated on, too.

The errors of a model on structures that it has not been trained on, drawn as those on which a replica stops: that is
what the factor of the threshold is about (prequential, or predictive sequential, evaluation: Dawid, J. R. Stat. Soc. A
147, 278 (1984)). A label's weight in the calibration halves with every ``loop.half_life`` iterations, because the model
changes; why that is allowed: `ubmd.uncertainty.conformal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ubmd.analysis.predictions import NEW_LABELS, Predictions, keep_predictions, kept_predictions, labels_of_iteration
from ubmd.data.constraints import is_fixed
from ubmd.learning.loop.models import evaluator_of
from ubmd.learning.loop.turn import Turn
from ubmd.learning.walk import START
from ubmd.measure.errors import calibration_data
from ubmd.uncertainty.calibration import Outcome


def judge(turn: Turn, dataset: Sequence[Atoms]) -> None:
    """Keep the predictions of an iteration's model for the labels that it has selected, before it learns them."""
    labels, target = labels_of_iteration(dataset, turn.iteration), turn.once.folder / NEW_LABELS
    if not labels:
        return

    def work() -> None:
        model = turn.once.folder / "model.pt"
        evaluator = evaluator_of(model, turn.settings)
        keep_predictions(target, labels, evaluator.predict(labels), evaluator.metadata)

    turn.once.run("judge", turn.keys["label"], [target], work)


def is_judged(turn: Turn, dataset: Sequence[Atoms]) -> bool:
    """Whether `judge` has nothing left to do."""
    return not labels_of_iteration(dataset, turn.iteration) or turn.once.is_done("judge", turn.keys["label"])


def outcomes(folder: Path, labels: Sequence[Atoms], weight: float) -> list[Outcome]:
    """What calibrates of an iteration's folder: the labels that its model has chosen."""
    found = kept_predictions(folder / NEW_LABELS, labels) if labels else None
    if found is None:
        return []
    return [_outcome(atoms, found, k, weight) for k, atoms in enumerate(labels) if is_chosen(atoms)]


def is_chosen(atoms: Atoms) -> bool:
    """Whether the model of a label's iteration has chosen it.

    Start labels, frames that were drawn at random (``selection.random``), and structures that an earlier iteration had
    chosen and the machine lost, were not.
    """
    info = atoms.info
    return info["iteration"] > START and not info.get("random", False) and "first_iteration" not in info


def _outcome(atoms: Atoms, found: Predictions, k: int, weight: float) -> Outcome:
    prediction, free = found.each[k], ~is_fixed(atoms)
    data, scale = calibration_data([atoms], [prediction]), found.promise
    factors = np.array([scale["atom_scale"].get(symbol, 1.0) for symbol in atoms.symbols])
    return Outcome(
        energy_error=float(data.energy_error[0]),
        energy_u=prediction.u / scale["energy"]["scale"],
        numbers=atoms.numbers[free],
        errors=data.atom_error[free],
        u=(prediction.atomic_u / (scale["forces"]["scale"] * factors))[free],
        weight=weight,
    )


def summaries(folder: Path, labels: Sequence[Atoms]) -> dict[str, Any]:
    """Entries of the history: what was promised of the labels that were chosen and those drawn, and what was found."""
    found = kept_predictions(folder / NEW_LABELS, labels) if labels else None
    if found is None:
        return {}
    parts: dict[str, list[int]] = {"chosen": [], "drawn": []}
    for k, atoms in enumerate(labels):
        if is_chosen(atoms):
            parts["chosen"].append(k)
        elif atoms.info.get("random", False):
            parts["drawn"].append(k)
    return {name: _summary(labels, found, indices) for name, indices in parts.items() if indices}


def _summary(labels: Sequence[Atoms], found: Predictions, indices: Sequence[int]) -> dict[str, Any]:
    errors, u, inside, atoms = [], [], 0, 0
    for k in indices:
        free = ~is_fixed(labels[k])
        error = calibration_data([labels[k]], [found.each[k]]).atom_error[free]
        own = found.each[k].atomic_u[free]
        errors.append(error.max(initial=0.0))
        u.append(own.max(initial=0.0))
        inside, atoms = inside + int((error <= own).sum()), atoms + len(own)
    return {
        "structures": len(indices),
        "covered": int(np.sum(np.array(errors) <= np.array(u))),
        "promised": min(found.promise["forces"]["attainable"], 1.0 - found.promise["alpha"]),
        "share_of_atoms": inside / max(atoms, 1),
        "max_error": float(np.median(errors)),
        "max_u": float(np.median(u)),
    }
