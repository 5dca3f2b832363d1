"""A loop that calibrates on its new labels, as predicted by the models that selected them: against plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from system import cluster, make_settings, without_times

from ubmd.analysis.predictions import NEW_LABELS, kept_predictions
from ubmd.calculator import Model
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.learning import RunFolder, run

TABLES = {
    "uncertainty": {"projections": 16, "alpha": 0.2, "by_element": True, "atoms_by": "structure"},
    "selection": {"batch": 8, "random": 1},
    "loop": {"calibrate_on_new": True, "half_life": 2.0},
    "md": {"precision": "double"},
    "test": None,
}


def tables(labels: int, **loop: float) -> dict:
    return TABLES | {"loop": TABLES["loop"] | {"labels": labels} | loop}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new_labels")
    write_structures(folder / "start.extxyz", [cluster()])
    return folder


@pytest.fixture(scope="module")
def finished(base: Path) -> RunFolder:
    """4 + 8 + 8 labels, models of iterations 0, 1, 2."""
    return RunFolder(run(make_settings(base / "run", **tables(20)), base))


def labels_of(folder: RunFolder, iteration: int) -> list[Atoms]:
    return [atoms for atoms in read_structures(folder.dataset) if atoms.info["iteration"] == iteration]


def largest(model: Path, structures: list[Atoms], factors: dict[str, float] | None = None) -> list[tuple[float, float]]:
    """(largest error, largest u_i) of structures; u_i before calibration, times these factors (None: calibrated)."""
    evaluator, found = Model(model, "double"), []
    raw = evaluator.metadata["uncertainty"]["forces"]["scale"] * np.array(evaluator.metadata["atom_scale"])
    for atoms, p in zip(structures, evaluator.predict(structures), strict=True):
        error = np.sqrt(np.mean((p.forces - atoms.get_forces()) ** 2, axis=1))
        index = [evaluator.elements.index(symbol) for symbol in atoms.symbols]
        u = p.atomic_u
        if factors is not None:
            u = u / raw[index] * [factors[symbol] for symbol in atoms.symbols]
        found.append((error.max(), u.max()))
    return found


@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_the_factor_is_that_of_held_out_and_new_labels(finished: RunFolder, iteration: int) -> None:
    record = Model(finished.iteration(iteration) / "model.pt").metadata
    factors = dict(zip(record["elements"], record["atom_scale"], strict=True))
    seen = [atoms for atoms in read_structures(finished.dataset) if atoms.info["iteration"] < iteration]
    held_out = [atoms for atoms in seen if atoms.info["split"] == "valid"]
    rows = [(*pair, 1.0) for pair in largest(finished.iteration(iteration) / "model.pt", held_out, factors)]
    for k in range(iteration):
        chosen = [atoms for atoms in labels_of(finished, k) if not atoms.info.get("random")]
        assert len(chosen) == 7
        weight = 0.5 ** ((iteration - 1 - k) / 2.0)
        rows += [(*pair, weight) for pair in largest(finished.iteration(k) / "model.pt", chosen, factors)]
    ratios = sorted(((error + 1e-8) / (u + 1e-8), weight) for error, u, weight in rows)
    total, below, wanted = sum(weight for _, weight in ratios), 0.0, ratios[-1][0]
    for ratio, weight in ratios:
        below += weight
        if below >= 0.8 * (total + 1.0):
            wanted = ratio
            break
    forces = record["uncertainty"]["forces"]
    assert forces["scale"] == pytest.approx(wanted, rel=1e-6)
    assert forces["attainable"] == pytest.approx(min(0.8, total / (total + 1.0)))
    assert forces["n_calibration"] == len(rows)
    assert ("held_out" in record["uncertainty"]) == (iteration > 0)
    if iteration:
        assert record["uncertainty"]["held_out"]["forces"]["n_calibration"] == len(held_out)


def test_the_history_says_what_was_promised_and_found(finished: RunFolder) -> None:
    history = finished.read_history()
    assert "chosen" not in history[-1]  # has selected nothing
    for k, entry in enumerate(history[:-1]):
        model = finished.iteration(k) / "model.pt"
        for name, count in (("chosen", 7), ("drawn", 1)):
            structures = [a for a in labels_of(finished, k) if bool(a.info.get("random")) == (name == "drawn")]
            pairs = largest(model, structures)
            said = entry[name]
            assert said["structures"] == len(structures) == count
            assert said["covered"] == sum(error <= u for error, u in pairs)
            assert said["max_error"] == pytest.approx(np.median([error for error, _ in pairs]), rel=1e-6)
            assert said["max_u"] == pytest.approx(np.median([u for _, u in pairs]), rel=1e-6)
            attainable = Model(model).metadata["uncertainty"]["forces"]["attainable"]
            assert said["promised"] == pytest.approx(min(attainable, 0.8))
    text = (finished.report / "report.md").read_text()
    covered = sum(entry["chosen"]["covered"] for entry in history[:-1])
    assert f"{covered} of 14" in text


def test_lost_predictions_are_made_again(finished: RunFolder, base: Path) -> None:
    """Neither deleted models nor deleted or damaged predictions change what follows."""
    longer = RunFolder(run(make_settings(base / "longer", **tables(24)), base))
    few = make_settings(base / "run", **tables(24, keep_models=1))
    for name in (NEW_LABELS, "model.pt"):
        (finished.iteration(0) / name).unlink()
    spoiled = finished.iteration(1) / NEW_LABELS
    spoiled.write_bytes(spoiled.read_bytes()[:-100])
    run(few, base)
    assert finished.dataset.read_bytes() == longer.dataset.read_bytes()
    assert without_times(finished) == without_times(longer)
    for k in range(2):
        assert kept_predictions(finished.iteration(k) / NEW_LABELS, labels_of(finished, k)) is not None


def test_labels_are_no_longer_held_back_for_calibration_once_there_are_enough(base: Path) -> None:
    """80 % needs four labels that were chosen: the first batch has seven."""
    loop = {"calibration_share": 0.2, "validation_share": 0.1}
    folder = RunFolder(run(make_settings(base / "share", **tables(20, **loop)), base))
    sides = [[atoms.info["split"] for atoms in labels_of(folder, k)].count("calib") for k in (-1, 0, 1)]
    assert sides[:2] == [1, 1]  # 0.2 of 4, of 12
    assert sides[2] == 0
