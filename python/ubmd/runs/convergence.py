"""When the loop stops: rules as functions of its history, each with the evidence that it saw.

A rule returns a `Verdict` or None. It sees entries of the history, the last of which may be of an iteration that has
been trained and measured, but has not explored yet. Nothing here reads the test set: it decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ubmd.runs.records import IterationEntry, SetName
from ubmd.settings import LoopSettings


@dataclass(frozen=True)
class Verdict:
    """A stop rule that holds."""

    rule: str
    """'labels', 'label budget', 'quiet' or 'plateau'"""
    reason: str
    """one sentence"""
    evidence: dict[str, Any]
    """the numbers that the rule saw, as JSON values"""

    def as_json(self) -> dict[str, Any]:
        """For events and history."""
        return asdict(self)


def stop_rule(history: Sequence[IterationEntry], labels: int, calls: int, settings: LoopSettings) -> Verdict | None:
    """The first rule that holds, or None: the loop continues.

    Args:
        history: entries of all iterations so far.
        labels: in the data set.
        calls: reference calculations requested in this run, the rejected ones too.
        settings: limits; rules that are off are not evaluated.
    """
    verdict = size_limit(labels, settings.labels) or label_budget(labels, calls, settings.label_budget)
    if verdict is None and settings.stop_when_quiet:
        verdict = quiet(history, settings.quiet_iterations)
    if verdict is None and settings.stop_at_plateau:
        verdict = plateau(history, settings.plateau_iterations, settings.plateau_tolerance)
    return verdict


def size_limit(labels: int, limit: int) -> Verdict | None:
    """The data set has reached its requested size."""
    if labels < limit:
        return None
    reason = f"The data set has {labels} labels (loop.labels = {limit})."
    return Verdict("labels", reason, {"labels": labels, "limit": limit})


def label_budget(labels: int, calls: int, budget: int | None) -> Verdict | None:
    """All allowed reference calculations are used; rejected labels have cost as much as the others."""
    if budget is None or calls < budget:
        return None
    reason = (
        f"The reference was asked for {calls} structures, {calls - labels} of which were rejected "
        f"(loop.label_budget = {budget})."
    )
    return Verdict(
        "label budget", reason, {"calls": calls, "labels": labels, "rejected": calls - labels, "budget": budget}
    )


def quiet(history: Sequence[IterationEntry], iterations: int) -> Verdict | None:
    """Every replica of the last iterations reached the step limit: none became uncertain, none failed.

    Iterations that have not run their replicas yet don't count.
    """
    last = [entry for entry in history if entry.replicas][-iterations:]
    if len(last) < iterations or any(r.stopped != "step limit" for entry in last for r in entry.replicas):
        return None
    return Verdict(
        "quiet",
        f"Every replica reached the step limit in {iterations} successive iterations.",
        {
            "iterations": [entry.iteration for entry in last],
            "replicas": [len(entry.replicas) for entry in last],
            "max_u": [max(r.max_u for r in entry.replicas) for entry in last],
        },
    )


def plateau(history: Sequence[IterationEntry], iterations: int, tolerance: float) -> Verdict | None:
    """New labels no longer change the calibrated errors.

    Over the last ``iterations`` steps from model to model, neither the force error on held-out labels nor the factor
    that calibrates force uncertainties spreads (largest minus smallest, relative to the mean) by more than the
    tolerance. The labels are those of the calibration share, or else those of the validation. Iterations that brought
    no new label say nothing, and don't count.
    """
    models = _with_new_labels(history)[-iterations - 1 :]
    if len(models) < iterations + 1:
        return None
    held_out: SetName = "calib" if all(entry.calib for entry in models) else "valid"
    errors = [entry.rmse_on(held_out)[1] for entry in models]
    factors = [entry.calibration.force_factor if entry.calibration else None for entry in models]
    spreads = {"force_rmse": _spread(errors), "force_factor": _spread(factors)}
    if not all(spread is not None and spread <= tolerance for spread in spreads.values()):
        return None
    reason = (
        f"In {iterations} successive iterations with new labels the force error ({errors[-1]:.3g} eV/Å) and the "
        f"calibration factor ({factors[-1]:.3g}) of held-out labels stayed within {100 * tolerance:g} %."
    )
    evidence = {
        "iterations": [entry.iteration for entry in models],
        "labels": [entry.labels for entry in models],
        "set": held_out,
        "force_rmse": errors,
        "force_factor": factors,
        "spread": spreads,
        "tolerance": tolerance,
    }
    return Verdict("plateau", reason, evidence)


def _with_new_labels(history: Sequence[IterationEntry]) -> list[IterationEntry]:
    """The last entry for each size of the data set."""
    return list({entry.labels: entry for entry in history}.values())


def _spread(values: Sequence[float | None]) -> float | None:
    """(max - min) / mean; None if a value is missing, not finite, or the mean is not positive."""
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    if not np.isfinite(numbers).all() or not numbers.mean() > 0.0:
        return None
    return float(np.ptp(numbers) / numbers.mean())
