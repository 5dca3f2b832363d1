"""The plain functions of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from replicas import make_task
from system import cluster, make_settings

from ubmd.data.extxyz import write_structures
from ubmd.errors import DataError
from ubmd.lammps.box import Box
from ubmd.lammps.replica import _npt
from ubmd.learning.dataset import append_once, fresh_split, split_batch
from ubmd.learning.loop import models
from ubmd.learning.loop.replicas import replica_tasks
from ubmd.learning.loop.selecting import make_pool
from ubmd.learning.loop.turn import Turn
from ubmd.learning.start import perturb
from ubmd.runs.folder import EventLog
from ubmd.runs.seeds import Stage, random_generator
from ubmd.runs.stages import Stages
from ubmd.settings import StartSettings

pytestmark = pytest.mark.quick


def test_random_numbers_of_stages_are_their_own() -> None:
    draws = {
        (i, s, r): random_generator(5, i, s, r).random()
        for i in range(3)
        for s in (Stage.MD, Stage.SELECT)
        for r in range(3)
    }
    assert len(set(draws.values())) == len(draws)
    assert random_generator(5, 1, Stage.MD, 2).random() == draws[1, Stage.MD, 2]
    assert random_generator(6, 1, Stage.MD, 2).random() != draws[1, Stage.MD, 2]


def test_perturbed_molecules_move_by_at_most_the_displacement() -> None:
    settings = StartSettings(file="x", count=50, displacement=0.02)
    copies = perturb([cluster()], settings, np.random.default_rng(0))
    shifts = np.array([copy.positions - cluster().positions for copy in copies])
    assert shifts.shape == (50, 13, 3)
    assert 0.0199 < np.abs(shifts).max() <= 0.02
    assert np.std(shifts) == pytest.approx(0.02 / np.sqrt(3.0), rel=0.05)


def test_perturbed_cells_are_strained_with_their_atoms() -> None:
    cell = bulk("Cu", cubic=True) * (2, 2, 2)
    settings = StartSettings(file="x", count=30, displacement=0.0, strain=0.05)
    copies = perturb([cell], settings, np.random.default_rng(0))
    strains = np.array([np.linalg.solve(cell.cell[:], copy.cell[:]) - np.eye(3) for copy in copies])
    np.testing.assert_allclose(strains, strains.transpose(0, 2, 1), atol=1e-12)
    assert 0.04 < np.abs(strains[:, [0, 1, 2], [0, 1, 2]]).max() <= 0.05
    for copy in copies:
        np.testing.assert_allclose(copy.get_scaled_positions(), cell.get_scaled_positions(), atol=1e-12)


def test_copies_take_turns_at_the_start_structures() -> None:
    other = cluster()
    other.positions += 50.0
    settings = StartSettings(file="x", count=5, displacement=0.0)
    copies = perturb([cluster(), other], settings, np.random.default_rng(0))
    assert [round(copy.positions[0, 0] - cluster().positions[0, 0]) for copy in copies] == [0, 50, 0, 50, 0]


@pytest.mark.parametrize(("batches", "share"), [([8] * 20, 0.1), ([2, 1, 1, 1, 5], 0.1), ([4, 4, 4], 0.5)])
def test_the_sticky_split_keeps_the_share(batches: list[int], share: float) -> None:
    rng = np.random.default_rng(1)
    sides: list[str] = []
    for new in batches:
        sides += split_batch(sides.count("train"), sides.count("valid"), new, share, rng)
        assert sides.count("valid") == max(1, round(share * len(sides)))
        assert sides.count("train") >= 1


def test_a_fresh_split_is_random() -> None:
    sides = [fresh_split(40, 0.1, np.random.default_rng(k)) for k in range(2)]
    assert [s.count("valid") for s in sides] == [4, 4]
    assert sides[0] != sides[1]


def test_append_once_repairs_and_repeats(tmp_path: Path) -> None:
    path, structures = tmp_path / "d.extxyz", perturb([cluster()], StartSettings(file="x", count=4), random(0))
    appended: list[int] = []
    end = append_once(path, 0, structures[:2], appended.append)
    assert append_once(path, 0, structures[:2], appended.append) == end == path.stat().st_size
    assert appended == [0, 1]
    whole_end = append_once(path, end, structures[2:], appended.append)
    content = path.read_bytes()
    for cut in (end, end + 1, end + 100, whole_end - 1):
        path.write_bytes(content[:cut])
        assert append_once(path, end, structures[2:], appended.append) == whole_end
        assert path.read_bytes() == content
    for cut in (0, end - 5, whole_end - 1):  # several at once: the same bytes, from wherever they were cut
        path.write_bytes(content[:cut])
        reported: list[int] = []
        assert append_once(path, 0, structures, reported.append, at_once=3) == whole_end
        assert path.read_bytes() == content
        assert reported[-1] == 3
    path.write_bytes(content[: end - 5])
    with pytest.raises(DataError, match=r"is shorter than the labels that were written to it"):
        append_once(path, end, structures[2:], appended.append)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_pool_has_shared_start_frames_once(tmp_path: Path) -> None:
    frames = perturb([cluster()], StartSettings(file="x", count=3), random(0))
    write_structures(tmp_path / "a.extxyz", [cluster(), frames[0]])
    write_structures(tmp_path / "b.extxyz", [cluster(), frames[1], frames[2]])
    (tmp_path / "c.extxyz").write_text("")
    pool = make_pool([tmp_path / f"{name}.extxyz" for name in "abc"])
    assert len(pool) == 4
    np.testing.assert_array_equal(pool[3].positions, frames[2].positions)


def test_replicas_share_starts_in_turn_but_no_seeds(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, md={"replicas": 5})
    starts = [tmp_path / "0.extxyz", tmp_path / "1.extxyz"]
    tasks = [t for k in range(2) for t in replica_tasks(settings, k, tmp_path / f"iter_{k}" / "model.pt", starts)]
    assert [task.start for task in tasks[:5]] == [starts[0], starts[1], starts[0], starts[1], starts[0]]
    seeds = [seed for task in tasks for seed in (task.velocity_seed, task.langevin_seed)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 < seed <= 900_000_000 for seed in seeds)
    assert tasks[7].frames == tmp_path / "iter_1" / "frames_002.extxyz"


def test_a_stage_runs_again_only_for_other_inputs_or_damaged_outputs(tmp_path: Path) -> None:
    calls: list[str] = []
    stages = Stages(tmp_path, EventLog(tmp_path / "events.jsonl"), {})
    output = tmp_path / "out"

    def work() -> None:
        calls.append("run")
        output.write_text("result")

    for key in ("1", "1", "2", "2"):
        stages.run("stage", key, [output], work)
    assert len(calls) == 2
    output.write_text("damaged")
    stages.run("stage", "2", [output], work)
    assert len(calls) == 3
    output.unlink()
    stages.run("stage", "2", [output], work)
    assert len(calls) == 4


@pytest.mark.parametrize("own", [False, True], ids=["validation", "labels of their own"])
def test_no_label_both_trains_and_calibrates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    labels = []
    for k in range(3):
        atoms = cluster()
        atoms.calc = SinglePointCalculator(atoms, energy=float(k), forces=np.zeros((len(atoms), 3)))
        labels.append(atoms)
    asked: list[tuple[Any, ...]] = []

    def export(*given: Any) -> dict[str, Any]:
        asked.append(given)
        given[6].touch()
        return {"uncertainty": {name: {"attainable": 0.95} for name in ("energy", "forces")}}

    monkeypatch.setattr(models, "export_checkpoints", export)
    events = EventLog(tmp_path / "events.jsonl")
    training, validation, calibration = labels[:1], labels[1:2], labels[2:] if own else []
    settings, once = make_settings(tmp_path), Stages(tmp_path, events, {})
    turn = Turn(0, settings, once, training, validation, calibration, {}, {}, {"export": "key"}, 1)
    models.Models(cast(Any, None), tmp_path, cast(Any, None), 1, events).export(turn, [])
    assert asked[0][3] is training
    assert asked[0][4] is (calibration if own else validation)


def test_pressures_of_replicas_are_in_bar_for_lammps(tmp_path: Path) -> None:
    task = make_task(tmp_path, tmp_path / "model.pt", bulk("Cu", cubic=True), ensemble="npt", pressure=100.0)
    (line,) = _npt(task, Box(bulk("Cu", cubic=True)))
    assert "tri 1000 1000 1 " in line  # 100 MPa
