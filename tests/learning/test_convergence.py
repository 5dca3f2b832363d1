"""Stop rules on made-up histories: what they see, and what they must not be fooled by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from ubmd.runs.convergence import label_budget, plateau, quiet, size_limit, stop_rule
from ubmd.runs.records import Errors, IterationEntry
from ubmd.settings import LoopSettings

pytestmark = pytest.mark.quick


def entry(iteration: int, labels: int, endings: str = "", **more: Any) -> IterationEntry:
    """An iteration whose replicas ended as the letters say: l(imit), t(hreshold), f(ailed)."""
    names = {"l": "step limit", "t": "threshold", "f": "failed"}
    replicas = [{"stopped": names[letter], "max_u": 0.1 * (k + 1)} for k, letter in enumerate(endings)]
    return IterationEntry.read({"iteration": iteration, "labels": labels, "replicas": replicas, **more})


def explored(*endings: str) -> list[IterationEntry]:
    return [entry(k, 10 + k, text) for k, text in enumerate(endings)]


def measured(
    errors: Sequence[float | None], factors: Sequence[float | None], labels: Sequence[int] | None = None
) -> list[IterationEntry]:
    """One entry per force error and calibration factor."""
    sizes = labels or [10 + k for k in range(len(errors))]
    return [
        entry(k, size, "l", valid={"force_rmse": error}, calibration={"force_factor": factor})
        for k, (error, factor, size) in enumerate(zip(errors, factors, sizes, strict=True))
    ]


# ------------------------------------------------------------------------------------------ size and budget


def test_the_size_limit() -> None:
    assert size_limit(7, 8) is None
    verdict = size_limit(9, 8)
    assert verdict is not None
    assert verdict.as_json() == {
        "rule": "labels",
        "reason": "The data set has 9 labels (loop.labels = 8).",
        "evidence": {"labels": 9, "limit": 8},
    }


def test_the_budget_counts_rejected_labels() -> None:
    assert label_budget(5, 1000, None) is None
    assert label_budget(5, 9, 10) is None
    verdict = label_budget(5, 10, 10)
    assert verdict is not None
    assert verdict.evidence == {"calls": 10, "labels": 5, "rejected": 5, "budget": 10}
    assert "10 structures, 5 of which were rejected" in verdict.reason


# ------------------------------------------------------------------------------------------ quiet


@pytest.mark.parametrize(
    ("endings", "holds"),
    [
        ([], False),
        (["ll"], False),
        (["ll", "ll"], True),
        (["tt", "ll", "ll"], True),
        (["ll", "lt", "ll"], False),
        (["ll", "ll", "lt"], False),
        (["ll", "lf"], False),  # a failed replica is not at rest
        (["ll", "ll", ""], True),  # trained and measured, but not yet explored
        (["lt", "ll", ""], False),
        (["", ""], False),  # nothing has run: nothing is quiet
    ],
)
def test_quiet_needs_every_replica_of_the_last_iterations(endings: list[str], holds: bool) -> None:
    assert (quiet(explored(*endings), 2) is not None) == holds


def test_quiet_shows_what_it_saw() -> None:
    verdict = quiet(explored("t", "lll", "ll", ""), 2)
    assert verdict is not None
    assert verdict.evidence == {"iterations": [1, 2], "replicas": [3, 2], "max_u": [0.1 * 3, 0.2]}
    assert verdict.reason == "Every replica reached the step limit in 2 successive iterations."


# ------------------------------------------------------------------------------------------ plateau


@pytest.mark.parametrize(
    ("errors", "factors", "holds"),
    [
        ([0.1] * 4, [2.0] * 4, True),
        ([0.1] * 3, [2.0] * 3, False),  # three steps need four models
        ([9.0, 0.1, 0.1, 0.1, 0.1], [9.0, 2.0, 2.0, 2.0, 2.0], True),  # what was before is forgotten
        ([0.100, 0.102, 0.098, 0.101], [2.0, 2.1, 2.0, 2.05], True),
        ([0.100, 0.097, 0.094, 0.091], [2.0] * 4, True),  # 9.4 % from first to last
        ([0.100, 0.096, 0.092, 0.089], [2.0] * 4, False),  # slow, but 11.7 % in sum
        ([0.1] * 4, [2.0, 2.0, 2.0, 2.5], False),  # the calibration has not settled
        ([0.1, 0.3, 0.3, 0.1], [2.0] * 4, False),  # there and back
        ([0.1, None, 0.1, 0.1], [2.0] * 4, False),
        ([0.1] * 4, [2.0, 2.0, None, 2.0], False),
        ([0.1, float("nan"), 0.1, 0.1], [2.0] * 4, False),
        ([float("inf")] * 4, [2.0] * 4, False),
        ([0.0] * 4, [2.0] * 4, False),  # an error of nothing is a broken measurement
    ],
)
def test_plateau_of_error_and_factor(errors: list[float | None], factors: list[float | None], holds: bool) -> None:
    assert (plateau(measured(errors, factors), 3, 0.1) is not None) == holds


def test_iterations_without_new_labels_are_no_plateau() -> None:
    same = measured([0.1] * 6, [2.0] * 6, [10, 10, 10, 12, 12, 14])
    assert plateau(same, 3, 0.1) is None
    assert plateau(same, 2, 0.1) is not None


def test_plateau_prefers_the_calibration_share() -> None:
    history = measured([0.1, 0.2, 0.4], [2.0] * 3)
    for k, error in enumerate((0.30, 0.31, 0.30)):
        history[k] = history[k].model_copy(update={"calib": Errors.read({"force_rmse": error})})
    verdict = plateau(history, 2, 0.1)
    assert verdict is not None
    assert verdict.evidence["set"] == "calib"
    assert verdict.evidence["force_rmse"] == [0.30, 0.31, 0.30]
    assert verdict.evidence["spread"]["force_rmse"] == pytest.approx(0.01 / (0.91 / 3))
    assert verdict.evidence["labels"] == [10, 11, 12]
    history[0] = history[0].model_copy(update={"calib": None})  # the first models had too few labels for it
    assert plateau(history, 2, 0.1) is None  # 0.1, 0.2, 0.4 of the validation
    assert json.loads(json.dumps(verdict.as_json())) == verdict.as_json()


def test_entries_without_measurements_are_no_plateau() -> None:
    assert plateau([entry(k, 10 + k, "l") for k in range(5)], 3, 0.1) is None


# ------------------------------------------------------------------------------------------ all together


def test_rules_that_are_off_are_not_asked() -> None:
    history = [*explored("ll", "ll"), *measured([0.1] * 4, [2.0] * 4)]
    on = {"quiet_iterations": 2, "plateau_iterations": 3}
    assert stop_rule(history, 20, 20, LoopSettings.model_validate(on)) is None
    for switch, rule in (("stop_when_quiet", "quiet"), ("stop_at_plateau", "plateau")):
        verdict = stop_rule(history, 20, 20, LoopSettings.model_validate(on | {switch: True}))
        assert verdict is not None
        assert verdict.rule == rule


def test_the_size_limit_comes_first() -> None:
    settings = LoopSettings(labels=8, label_budget=8, stop_when_quiet=True, quiet_iterations=1)
    for labels, calls, rule in ((8, 8, "labels"), (7, 8, "label budget"), (7, 7, "quiet")):
        verdict = stop_rule(explored("l"), labels, calls, settings)
        assert verdict is not None
        assert verdict.rule == rule
