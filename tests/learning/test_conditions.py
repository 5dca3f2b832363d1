"""Conditions of replicas; small loops at constant pressure, without a bias, and with labels that only calibrate."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from system import cluster, make_settings

from ubmd.analysis.trajectory import read_traces
from ubmd.calculator import Model
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError
from ubmd.lammps.replica import ReplicaTask
from ubmd.learning import RunFolder, run
from ubmd.learning.dataset import fresh_sides, split_batch
from ubmd.learning.loop.replicas import ramped, replica_tasks, threshold_of
from ubmd.references import label
from ubmd.runs.records import IterationEntry
from ubmd.settings import RunSettings, load_settings


def tasks_of(iteration: int = 0, **tables: dict[str, Any]) -> list[ReplicaTask]:
    settings = make_settings(Path("run"), **tables)
    return replica_tasks(settings, iteration, Path("iter/model.pt"), [Path("start.extxyz")])


# ------------------------------------------------------------------------------------------ what lands in the tasks


def test_replicas_take_turns_at_conditions() -> None:
    md = {"ensemble": "npt", "replicas": 5, "pressures": [250.0, -250.0], "temperatures": [300.0, 600.0, 900.0]}
    tasks = tasks_of(md=md)
    assert [task.pressure for task in tasks] == [250.0, -250.0, 250.0, -250.0, 250.0]
    assert [task.temperature for task in tasks] == [300.0, 600.0, 900.0, 300.0, 600.0]
    assert {task.ensemble for task in tasks} == {"npt"}


def test_barostat_and_bias_land_in_the_tasks() -> None:
    md = {
        "ensemble": "npt",
        "pressure": 100.0,
        "pressure_damping": 2.0,
        "coupling": "aniso",
        "damping": 0.1,
        "cell_limit": 1.5,
    }
    (task, *_) = tasks_of(md=md, bias={"force": 0.1, "stress": 0.4, "uncertainty": "atomic"})
    assert {name: getattr(task, name) for name in md} == md
    assert (task.force, task.stress, task.uncertainty) == (0.1, 0.4, "atomic")
    (task, *_) = tasks_of()
    assert (task.ensemble, task.stress, task.uncertainty, task.temperature) == ("nvt", 0.0, "energy", 300.0)


def test_ramps_are_linear_and_then_stay() -> None:
    bias = {"ramp": {"force": [0.1, 0.25], "stress": [0.0, 0.4], "iterations": 4}}
    md = {"ensemble": "npt", "ramp": {"temperature": [300.0, 600.0], "pressure": [0.0, -100.0], "iterations": 2}}
    rows = []
    for iteration in (0, 1, 2, 4, 50):
        tasks = tasks_of(iteration, bias=bias, md=md)
        rows.append((tasks[0].force, tasks[0].stress, tasks[0].temperature, tasks[0].pressure))
        assert len({(t.force, t.stress, t.temperature, t.pressure) for t in tasks}) == 1
    expected = [(0.1, 0.0, 300.0, 0.0), (0.1375, 0.1, 450.0, -50.0), (0.175, 0.2, 600.0, -100.0)]
    expected += [(0.25, 0.4, 600.0, -100.0)] * 2
    np.testing.assert_allclose(rows, expected, rtol=1e-14)


def test_the_end_of_a_ramp_is_exact() -> None:
    assert ramped((0.1, 0.3), 3, 3, 9.0) == ramped((0.1, 0.3), 3, 99, 9.0) == 0.3
    assert ramped((0.1, 0.3), 3, 0, 9.0) == 0.1
    assert ramped(None, 3, 1, 9.0) == 9.0


EXAMPLES = Path(__file__).parents[2] / "lammps_examples"


@pytest.mark.parametrize("readme", ["alanine_dipeptide/README.md", "inp_npt/README.md"])
def test_run_lines_of_the_examples_are_valid_settings(readme: str) -> None:
    lines = [line for line in (EXAMPLES / readme).read_text().splitlines() if line.startswith("ubmd run ")]
    assert lines
    folders = set()
    for line in lines:
        words = shlex.split(line, comments=True)
        overrides = [value for option, value in itertools.pairwise(words) if option == "--set"]
        settings = load_settings((EXAMPLES / readme).with_name(words[2]), RunSettings, overrides)
        assert (EXAMPLES / readme).with_name(str(settings.start.file)).exists()
        folders.add((words[2], settings.run_dir))
    assert len(folders) == len(lines)


# ------------------------------------------------------------------------------------------ above the threshold at once


def test_replicas_that_cannot_begin_get_a_higher_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start structure is known; without this, every model would say the same of it, and the run would fail."""
    write_structures(tmp_path / "start.extxyz", [cluster()])
    settings = make_settings(
        tmp_path / "run",
        loop={"labels": 9, "threshold": 1e-6},
        start={"count": 5},
        training={"epochs": 1},
        md={"replicas": 2, "steps": 400, "frames_every": 100},
        bias={"force": 0.0},
        test=None,
    )
    folder = RunFolder(run(settings, tmp_path))
    history = folder.read_history()
    steps = [[replica["steps"] for replica in entry["replicas"]] for entry in history[:4]]
    assert [entry["labels"] for entry in history[:3]] == [5, 6, 6]  # the start itself is the one that was new
    assert steps[:2] == [[0, 0], [0, 0]]
    assert all(number > 0 for number in steps[2])
    raised = 1.25 * max(replica["max_u"] for replica in history[1]["replicas"])
    assert all(replica["max_u"] >= raised for replica in history[2]["replicas"] if replica["stopped"] == "threshold")
    assert history[3]["labels"] > 6
    assert steps[3] == [0, 0]  # there was a new label
    remarks = [event["text"] for event in folder.read_events() if event["event"] == "remark"]
    assert any(f"They stop at {raised:.3g} eV/Å until there is a new label." in text for text in remarks)
    before, done = folder.history.read_text(), len(folder.read_events())
    run(settings, tmp_path)
    monkeypatch.setattr("ubmd.learning.loop.loop.threshold_of", lambda history, labels, threshold: threshold)
    run(settings, tmp_path)  # keys are those of a version without it: labels of older runs stay as they are
    assert folder.history.read_text() == before
    assert "stage_started" not in {event["event"] for event in folder.read_events()[done:]}
    entries = [IterationEntry.model_validate(entry) for entry in history]
    assert threshold_of(entries[:2], 6, 1e-6) == pytest.approx(raised)
    assert threshold_of(entries[:2], 6, 2.0 * raised) == 2.0 * raised
    assert threshold_of(entries[:1], 6, 1e-6) == threshold_of([], 5, 1e-6) == 1e-6


# ------------------------------------------------------------------------------------------ calibration labels


@pytest.mark.parametrize("batches", [[8] * 12, [3, 1, 1, 1, 5, 2], [4, 4, 4]])
def test_the_calibration_share_is_sticky_and_its_own(batches: list[int]) -> None:
    rng = np.random.default_rng(1)
    sides: list[str] = []
    for new in batches:
        counts = [sides.count(side) for side in ("train", "valid", "calib")]
        sides += split_batch(counts[0], counts[1], new, 0.1, rng, counts[2], 0.2)
        assert sides.count("train") >= 1
        assert sides.count("valid") == max(1, round(0.1 * len(sides)))
        assert sides.count("calib") == max(1, round(0.2 * len(sides)))


def test_a_split_without_calibration_is_what_it_was() -> None:
    plain = split_batch(10, 1, 20, 0.3, np.random.default_rng(5))
    shared = split_batch(10, 1, 20, 0.3, np.random.default_rng(5), 0, 0.2)
    assert [side == "valid" for side in plain] == [side == "valid" for side in shared]
    assert plain.count("calib") == 0 < shared.count("calib")


def test_two_start_labels_go_to_training_and_validation_first() -> None:
    assert sorted(split_batch(0, 0, 2, 0.1, np.random.default_rng(0), 0, 0.2)) == ["train", "valid"]


def test_calibration_labels_stay_aside_when_models_start_from_scratch() -> None:
    sides = ["calib" if k % 5 == 0 else "train" for k in range(40)]
    first, second = (fresh_sides(sides, 0.1, np.random.default_rng(k)) for k in range(2))
    for new in (first, second):
        assert [side == "calib" for side in new] == [side == "calib" for side in sides]
        assert new.count("valid") == 4  # of all 40
    assert first != second


@pytest.mark.parametrize("warm", [True, False])
def test_calibration_labels_of_a_loop_neither_train_nor_validate(tmp_path: Path, warm: bool) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    loop = {"labels": 14, "warm_start": warm, "validation_share": 0.2, "calibration_share": 0.2}
    loop["calibrate_on_new"] = False  # these labels alone
    settings = make_settings(
        tmp_path / "run",
        loop=loop | {"warm_epochs": 15, "warm_visits": 30},
        selection={"batch": 4},
        start={"count": 6},
        training={"epochs": 1},
        md={"replicas": 2, "steps": 20},
        test=None,
    )
    folder = RunFolder(run(settings, tmp_path))
    dataset, history = read_structures(folder.dataset), folder.read_history()
    sides = {
        iteration: [a.info["split"] for a in dataset if a.info["iteration"] <= iteration] for iteration in (-1, 0, 1)
    }
    for k, entry in enumerate(history):
        seen = sides[k - 1]
        calibrating = [a for a, side in zip(dataset, seen, strict=False) if side == "calib"]
        assert entry["calib"]["structures"] == len(calibrating) == max(1, round(0.2 * len(seen)))
        assert entry["valid"]["structures"] == max(1, round(0.2 * len(seen)))
        assert entry["train"]["structures"] == len(seen) - entry["valid"]["structures"] - len(calibrating)
        evaluator = Model(folder.iteration(k) / "model.pt")
        known = evaluator.metadata
        assert known["n_training"] == entry["train"]["structures"]
        assert known["uncertainty"]["energy"]["n_calibration"] == len(calibrating)
        assert known["uncertainty"]["forces"]["n_calibration"] == 13 * len(calibrating)
        assert entry["calibration"]["force_factor"] == known["uncertainty"]["forces"]["scale"]
        # The factor is that of these labels and of no others: 95 % needs all of a set that is so small.
        predictions = evaluator.predict(calibrating)
        ratios = [
            (np.abs(p.energy - a.get_potential_energy()) / 13 + 1e-8)
            / (p.u / entry["calibration"]["energy_factor"] + 1e-8)
            for p, a in zip(predictions, calibrating, strict=True)
        ]
        assert max(ratios) == pytest.approx(entry["calibration"]["energy_factor"], rel=1e-4)
    # Warm starts: 30 epochs times the share of new labels, 4 of 10 and 4 of 14, but at least 10.
    epochs = [len((folder.iteration(k) / "train" / "log.csv").read_text().splitlines()) - 1 for k in range(3)]
    assert epochs == ([1, 12, 10] if warm else [1, 1, 1])
    assert history[-1]["ended"]["rule"] == "labels"
    assert folder.read_events()[-1]["evidence"] == {"labels": 14, "limit": 14}


# ------------------------------------------------------------------------------------------ loops


def silicon_settings(run_dir: Path, **tables: dict[str, Any] | None) -> Any:
    """Eight atoms of silicon, Stillinger-Weber, half of the replicas at another pressure, a bias stress."""
    defaults: dict[str, Any] = {
        "start": {"count": 8, "displacement": 0.15, "strain": 0.04},
        "reference": {
            "calculator": "lammps",
            "arguments": {"elements": ["Si"], "commands": ["pair_style sw", "pair_coeff * * Si.sw Si"]},
            "force_limit": 1000.0,  # small models, and no threshold
        },
        "training": {"epochs": 30},
        "md": {
            "ensemble": "npt",
            "replicas": 2,
            "temperature": 600.0,
            "damping": 0.1,
            "pressures": [1000.0, -1000.0],
            "pressure_damping": 0.5,
        },
        "bias": {"force": 0.25, "species": {}, "ramp": {"stress": [0.2, 0.4], "iterations": 1}},
        "loop": {"labels": 12, "threshold": float("inf"), "warm_epochs": 10},
        "test": None,
    }
    for name, table in tables.items():
        defaults[name] = table if table is None else (defaults.get(name) or {}) | table
    return make_settings(run_dir, **defaults)


@pytest.fixture
def silicon(tmp_path: Path) -> Path:
    write_structures(tmp_path / "start.extxyz", [bulk("Si", cubic=True)])
    return tmp_path


def test_a_loop_at_constant_pressure_with_a_bias_stress(silicon: Path) -> None:
    settings = silicon_settings(silicon / "run")
    folder = RunFolder(run(settings, silicon))
    history, dataset = folder.read_history(), read_structures(folder.dataset, labelled=True)
    assert [entry["labels"] for entry in history] == [8, 10, 12]
    for entry, stress in zip(history, (0.2, 0.4), strict=False):
        assert [replica["pressure"] for replica in entry["replicas"]] == [1000.0, -1000.0]
        assert [replica["stress"] for replica in entry["replicas"]] == [stress] * 2
        assert [replica["temperature"] for replica in entry["replicas"]] == [600.0] * 2
        assert {replica["stopped"] for replica in entry["replicas"]} == {"step limit"}
    # Labels carry the stress of the very cell that they are in.
    for atoms in dataset[8:]:
        again = label(atoms, settings.reference, silicon)
        np.testing.assert_allclose(atoms.get_stress(), again.get_stress(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(atoms.get_forces(), again.get_forces(), rtol=1e-9, atol=1e-9)
    frames = [read_structures(folder.iteration(0) / f"frames_{r:03d}.extxyz") for r in range(2)]
    volumes = [[frame.get_volume() for frame in trajectory] for trajectory in frames]
    assert volumes[0][0] == volumes[1][0] == pytest.approx(bulk("Si", cubic=True).get_volume(), rel=1e-12)
    assert np.ptp(volumes[0]) > 1e-3
    assert volumes[0][-1] != volumes[1][-1]
    # The same settings repeat the data set, and traces beside the frames change nothing.
    assert list(read_traces(folder.path)) == []
    again = RunFolder(run(silicon_settings(silicon / "again", md={"trace_every": 10}), silicon))
    assert again.dataset.read_bytes() == folder.dataset.read_bytes()
    traces = list(read_traces(again.path))
    assert len(traces) == 4
    assert {(len(trace), trace.spacing) for trace in traces} == {(4, 0.02)}
    for trace, found in zip(traces, volumes, strict=False):
        np.testing.assert_allclose(trace.volumes, found[1:], rtol=1e-12)
    assert (folder.report / "report.md").exists()


def test_plain_exploration_at_constant_pressure(silicon: Path) -> None:
    """The baseline: no bias of any kind, random selection, replicas that start from new labels."""
    settings = silicon_settings(
        silicon / "run",
        bias={"force": 0.0, "ramp": None},
        md={"start_from": "labelled", "coupling": "iso"},
        selection={"method": "random"},
        loop={"labels": 9, "label_budget": 10},
    )
    assert not settings.bias.is_biased
    folder = RunFolder(run(settings, silicon))
    entry = folder.read_history()[0]
    assert all(replica["bias_share"] == replica["force"] == replica["stress"] == 0.0 for replica in entry["replicas"])
    first = read_structures(folder.iteration(0) / "frames_001.extxyz")[0]
    start = read_structures(folder.dataset)[1]
    np.testing.assert_allclose(first.cell.cellpar(), start.cell.cellpar(), rtol=1e-12)
    np.testing.assert_allclose(first.get_all_distances(mic=True), start.get_all_distances(mic=True), atol=1e-9)


def test_the_label_budget_ends_a_run(tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    loop = {"labels": 100, "label_budget": 7}
    tables = {"training": {"epochs": 1}, "md": {"replicas": 2, "steps": 20}, "selection": {"batch": 2}, "test": None}
    folder = RunFolder(run(make_settings(tmp_path / "run", loop=loop | {"warm_epochs": 1}, **tables), tmp_path))
    assert len(read_structures(folder.dataset)) == 7
    ended = folder.read_history()[-1]["ended"]
    assert ended["rule"] == "label budget"
    assert ended["evidence"] == {"calls": 7, "labels": 7, "rejected": 0, "budget": 7}
    assert folder.read_events()[-1]["reason"] == ended["reason"]


def test_a_molecule_has_no_pressure(tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    with pytest.raises(SettingsError, match=r"md\.ensemble = 'npt' needs start structures that are periodic"):
        run(make_settings(tmp_path / "run", md={"ensemble": "npt"}), tmp_path)


@pytest.mark.slow
def test_the_indium_phosphide_example_in_small(tmp_path: Path) -> None:
    """lammps_examples/inp_npt/loop.toml with a smaller network, fewer steps and labels."""
    small = {"model.hidden": [16, 16], "training.epochs": 20, "loop.warm_epochs": 5, "loop.labels": 32, "md.steps": 200}
    small |= {"training.threads": 1}
    overrides = [f"{key}={value}" for key, value in small.items()] + [f"run_dir={tmp_path / 'run'}"]
    example = EXAMPLES / "inp_npt"
    folder = RunFolder(run(load_settings(example / "loop.toml", RunSettings, overrides), example))
    assert len(read_structures(folder.dataset, labelled=True)) == 32
    assert (folder.report / "volumes.png").exists()
    for replica in folder.read_history()[0]["replicas"]:
        assert (replica["ensemble"], replica["stress"], replica["pressure"]) == ("npt", 0.25, 10000.0)
