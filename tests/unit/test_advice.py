"""The sentence on replicas of the first model that stop too soon."""

from __future__ import annotations

from pathlib import Path

import pytest
from ase.build import bulk, molecule
from system import make_settings

from ubmd.lammps.engine import ReplicaResult
from ubmd.learning.loop.advice import after_first_replicas, rare_impulses


def results(*steps: int, stopped: str = "threshold") -> list[ReplicaResult]:
    rest = {"reason": "", "frames": 1, "max_u": 2.0, "bias_share": 0.0, "seconds": 1.0, "ms_per_step": 1.0}
    values = [{"replica": k, "steps": number, "stopped": stopped, **rest} for k, number in enumerate(steps)]
    return [ReplicaResult.model_validate(value) for value in values]


def test_small_displacements_are_to_blame_first() -> None:
    settings = make_settings(Path("run"), start={"displacement": 0.02}, loop={"threshold": 1.5})
    assert after_first_replicas(results(8, 12, 12, 400), settings, [bulk("Cu") * (2, 2, 2)]) == (
        "4 of 4 replicas of the first model passed loop.threshold = 1.5 eV/Å, half of all within 12 steps, and "
        "explored little. Try start.displacement = 0.13 instead of 0.02 Å (in a new run_dir) or loop.threshold = 3 "
        "(ubmd run --from 0)."
    )


def test_large_displacements_are_to_blame_too() -> None:
    """They stretch stiff bonds."""
    settings = make_settings(Path("run"), start={"displacement": 0.15}, loop={"threshold": 1.5})
    assert "Try start.displacement = 0.05 instead of 0.15 Å" in after_first_replicas(
        results(8, 12, 12), settings, [molecule("CH3OH")]
    )


def test_displacements_that_fit_are_kept() -> None:
    settings = make_settings(Path("run"), start={"displacement": 0.05, "count": 8}, loop={"threshold": 1.5})
    sentence = after_first_replicas(results(8, 12, 12), settings, [molecule("CH3OH")])
    assert "start.displacement" not in sentence
    assert "Try loop.threshold = 3 (ubmd run --from 0) or start.count = 16 (in a new run_dir)." in sentence


@pytest.mark.parametrize(
    "found",
    [
        results(8, 49, 51, 400),  # a median of 50
        results(2000, 2000, 2000),
        results(8, 9, 10, stopped="failed"),
        results(20, 20, 20, stopped="step limit"),  # short replicas on purpose
        results(8) + results(20, stopped="step limit"),  # not most of them
    ],
)
def test_nothing_is_said_otherwise(found: list[ReplicaResult]) -> None:
    assert after_first_replicas(found, make_settings(Path("run"), start={"displacement": 0.02}), [bulk("Cu")]) == ""


@pytest.mark.parametrize(
    ("structure", "bias", "timestep", "every"),
    [
        (molecule("H2O"), {"every": 4}, 0.5, None),
        (molecule("H2O"), {"every": 4}, 1.0, 2),
        (molecule("H2O"), {"every": 10}, 0.5, 5),
        (molecule("H2O"), {"every": 4, "species": {"H": 0.0}}, 1.0, None),
        (molecule("H2O"), {"every": 4, "force": 0.0}, 2.0, None),
        (bulk("Cu"), {"every": 4}, 2.0, None),
        (bulk("Cu"), {"every": 10}, 2.0, 5),
        (molecule("CO"), {"every": 10}, 0.5, None),
        (molecule("CO"), {"every": 10}, 0.6, 8),
    ],
)
def test_impulses_that_come_too_rarely_are_told(structure, bias, timestep, every) -> None:
    settings = make_settings(Path("run"), bias=bias, md={"timestep": timestep})
    found = rare_impulses([structure], settings)
    assert bool(found) is (every is not None)
    if found:
        assert found[0].endswith(f"which they may heat: set bias.every = {every}.")
