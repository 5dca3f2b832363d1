"""Figures of lammps_examples/panel from a real run, against its models and labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ase.io import read
from system import make_settings, write_inputs

from ubmd.calculator import Model
from ubmd.learning import RunFolder, run

PANEL = Path(__file__).parents[2] / "lammps_examples" / "panel"


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    """The script that makes them."""
    sys.path.insert(0, str(PANEL))
    try:
        yield import_module("figures")
    finally:
        sys.path.remove(str(PANEL))
        for name in ("figures", "judge"):
            del sys.modules[name]


def test_figures_are_those_of_models_and_labels(figures: ModuleType, tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    settings = make_settings(
        tmp_path / "run",
        workers={"processes": 1},
        selection={"batch": 8, "random": 2},
        loop={"labels": 20},
        uncertainty={"by_element": True},
    )
    folder = RunFolder(run(settings, tmp_path))
    found = json.loads(json.dumps(figures.figures_of(folder.path)))
    assert (found["threshold"], found["limit"]) == (1000.0, 20)
    assert [model["labels"] for model in found["models"]] == [4, 12, 20]
    history = folder.read_history()
    assert [model["force_rmse"] for model in found["models"]] == [entry["test"]["force_rmse"] for entry in history]
    labels = read(folder.dataset, ":")
    for number in (0, 1):
        model = Model(folder.iteration(number) / "model.pt")
        for which, structures in (
            ("chosen", [atoms for atoms in labels if atoms.info["iteration"] == number]),
            ("test", read(folder.test, ":")),
        ):
            errors, us = [], []
            for atoms, prediction in zip(structures, model.predict(structures), strict=True):
                errors.append(np.sqrt(((prediction.forces - atoms.get_forces()) ** 2).mean(axis=1)))
                us.append(prediction.atomic_u)
            figure = found["models"][number][which]
            if which == "chosen":
                assert len(structures) == 8
                assert figure["error"] == pytest.approx([error.max() for error in errors], rel=1e-4)
                assert figure["u"] == pytest.approx([u.max() for u in us], rel=1e-4)
                assert figure["atoms_covered"] == [(e <= u).sum() for e, u in zip(errors, us, strict=True)]
                picks = json.loads((folder.iteration(number) / "selected.json").read_text())["selected"]
                drawn = {(pick["replica"], pick["step"]) for pick in picks if pick.get("random")}
                places = [(atoms.info["replica"], atoms.info["step"]) for atoms in structures]
                assert len(drawn) == 2
                assert figure["random"] == [place in drawn for place in places]
            else:
                covered = np.mean([e.max() <= u.max() for e, u in zip(errors, us, strict=True)])
                assert figure["structures_covered"] == pytest.approx(covered)
                assert figure["atoms_covered"] == pytest.approx(np.mean(np.concatenate(errors) <= np.concatenate(us)))
            forces = model.metadata["uncertainty"]["forces"]
            assert figure["promised"] == min(forces["attainable"], 0.95)
        factors = dict(zip(model.metadata["elements"], model.metadata["atom_scale"], strict=True))
        assert found["models"][number]["factors"] == pytest.approx(
            {element: forces["scale"] * factor for element, factor in factors.items()}
        )
    assert found["models"][-1]["chosen"]["error"] == []
