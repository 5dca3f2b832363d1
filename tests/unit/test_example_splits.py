"""The examples' script that counts what a calibrated model file covers on random splits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from alloy import alloy, trained_alloy

from ubmd.data.extxyz import write_structures

SCRIPT = Path(__file__).parents[2] / "lammps_examples" / "calibration" / "splits.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("example_splits", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def drawn(count: int, size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors of random sizes, in units of uncertainties that differ by an order of magnitude."""
    rng = np.random.default_rng(seed)
    u = 10.0 ** rng.uniform(-1.0, 0.0, count)
    return np.abs(rng.standard_t(3, count)) * u * size, u


def test_splits_of_one_kind_keep_the_promise_and_others_need_not(script: ModuleType) -> None:
    found = script.shares(drawn(300, 1.0, 1), [drawn(300, 3.0, 2)], splits=20, n=39, alpha=0.05)
    centre, low, high = script.interval(20, 39, 261, 0.05)
    assert centre == pytest.approx(0.95)
    assert 0.9 < low < centre < high < 0.99
    assert low <= found[:, 0].mean() <= high
    assert found[:, 1].mean() < low  # errors three times as large


def test_calibration_structures_that_are_not_random_break_it(script: ModuleType) -> None:
    error, u = drawn(300, 1.0, 1)
    error[150:] *= 3.0  # a model that was trained on the first half
    found = script.shares((error[:150], u[:150]), [(error[150:], u[150:])], splits=20, n=39, alpha=0.05)
    assert found[:, 1].mean() < script.interval(20, 39, 150, 0.05)[1]


def test_it_reads_a_model_file_and_labelled_structures(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained_alloy(tmp_path)
    write_structures(folder / "near.xyz", [alloy(seed) for seed in range(60, 72)])
    write_structures(folder / "far.xyz", [alloy(seed, 2) for seed in range(4)])
    words = [str(folder / name) for name in ("model.pt", "near.xyz")] + ["--apart", str(folder / "far.xyz")]
    monkeypatch.setattr("sys.argv", ["splits.py", *words, "--calibrating", "9", "--confidence", "0.9", "--splits", "5"])
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if "xyz |" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| near.xyz", "| far.xyz"] * 2
    assert [row.endswith("nothing |") for row in rows] == [False, True] * 2

    monkeypatch.setattr("sys.argv", ["splits.py", *words])
    with pytest.raises(SystemExit, match="needs at least 19"):
        script.main()
