"""The whole loop, small but real: what it leaves behind, kills in every stage, failing references, changed settings."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from killed_driver import start_driver, tear
from processes import is_alive, wait_for
from system import cluster, make_settings, without_times, write_inputs

from ubmd.analysis import predictions
from ubmd.analysis.report import make_report
from ubmd.calculator import Model
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import LabelError, SettingsError
from ubmd.learning import RunFolder, run
from ubmd.references import label
from ubmd.settings import ReferenceSettings


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_structures(folder / "start.extxyz", [cluster()])
    return folder


@pytest.fixture(scope="module")
def finished(inputs: Path) -> RunFolder:
    """An uninterrupted run."""
    return RunFolder(run(make_settings(inputs / "run"), inputs))


# ------------------------------------------------------------------------------------------ a finished run


def test_labels_are_those_of_the_reference(finished: RunFolder) -> None:
    dataset = read_structures(finished.dataset, labelled=True)
    assert [atoms.info["label"] for atoms in dataset] == list(range(8))
    assert [atoms.info["iteration"] for atoms in dataset] == [-1] * 4 + [0, 0, 1, 1]
    reference = ReferenceSettings(calculator="ase.calculators.emt:EMT")
    for atoms in dataset:
        np.testing.assert_array_equal(label(atoms, reference, Path()).get_forces(), atoms.get_forces())


def test_split_has_validation_from_the_start_and_its_share(finished: RunFolder) -> None:
    sides = [atoms.info["split"] for atoms in read_structures(finished.dataset)]
    assert sides[:4].count("valid") == 1
    assert sides.count("valid") == 1  # round(0.1 * 8)


def test_selected_structures_are_frames_of_the_replicas(finished: RunFolder) -> None:
    for atoms in read_structures(finished.dataset)[4:]:
        folder = finished.iteration(atoms.info["iteration"])
        frames = read_structures(folder / f"frames_{atoms.info['replica']:03d}.extxyz")
        (frame,) = [f for f in frames if f.info["step"] == atoms.info["step"]]
        np.testing.assert_array_equal(frame.positions, atoms.positions)


def test_history_and_model_agree(finished: RunFolder) -> None:
    history = finished.read_history()
    assert [entry["labels"] for entry in history] == [4, 6, 8]
    assert [entry["md_steps"] for entry in history] == [120, 240, 240]
    evaluator = Model(finished.model)
    test = read_structures(finished.test)
    assert len(test) == 3
    differences = [p.forces - a.get_forces() for p, a in zip(evaluator.predict(test), test, strict=True)]
    assert history[-1]["test"]["force_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(differences))), rel=1e-12)
    assert (finished.report / "report.md").exists()


def check_kept(folder: RunFolder, iteration: int, structures: list[Atoms], name: str = predictions.FILE) -> None:
    """The run has kept what the model of an iteration says about these structures."""
    where = folder.iteration(iteration)
    kept = predictions.kept_predictions(where / name, structures)
    evaluator = Model(where / "model.pt")
    assert kept.promise["forces"]["n_calibration"] == evaluator.metadata["uncertainty"]["forces"]["n_calibration"]
    for a, b in zip(kept.each, evaluator.predict(structures), strict=True):
        assert (a.energy, a.u) == (b.energy, b.u)
        np.testing.assert_array_equal(a.forces, b.forces)
        np.testing.assert_array_equal(a.atomic_u, b.atomic_u)


def test_the_run_keeps_what_its_models_say(finished: RunFolder, tmp_path: Path) -> None:
    """So its report needs no model: it is the same without one that can be run."""
    test = read_structures(finished.test, labelled=True)
    for iteration in range(3):
        check_kept(finished, iteration, test)
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    for model in folder.rglob("model.pt"):
        model.write_text("no model")
    make_report(folder)
    texts = [(path / "report" / "report.md").read_text().splitlines() for path in (folder, finished.path)]
    one, other = ([line for line in text if "SHA-256 of model.pt" not in line] for text in texts)
    assert one == other


def test_replicas_are_biased_and_differ(finished: RunFolder) -> None:
    for entry in finished.read_history()[:2]:
        assert all(replica["stopped"] == "step limit" for replica in entry["replicas"])
        assert all(0.1 < replica["bias_share"] < 1.0 for replica in entry["replicas"])
    ends = [read_structures(finished.iteration(0) / f"frames_{r:03d}.extxyz")[-1].positions for r in range(3)]
    assert np.abs(ends[0] - ends[1]).max() > 0.01
    assert np.abs(ends[0] - ends[2]).max() > 0.01


def test_a_finished_run_stays_as_it_is(finished: RunFolder, inputs: Path) -> None:
    before = finished.dataset.read_bytes(), finished.history.read_bytes()
    stages = [e for e in finished.read_events() if e["event"] == "stage_started"]
    run(make_settings(inputs / "run"), inputs)
    assert (finished.dataset.read_bytes(), finished.history.read_bytes()) == before
    assert [e for e in finished.read_events() if e["event"] == "stage_started"] == stages


def test_more_labels_continue_a_finished_run(inputs: Path) -> None:
    few = {"labels": 4, "warm_epochs": 2}
    folder = RunFolder(run(make_settings(inputs / "grown", loop=few, test=None), inputs))
    assert len(read_structures(folder.dataset)) == 4
    before = folder.dataset.read_bytes()
    run(make_settings(inputs / "grown", loop=few | {"labels": 5}, test=None), inputs)
    assert folder.dataset.read_bytes().startswith(before)
    assert len(read_structures(folder.dataset)) == 5


@pytest.mark.parametrize(("kind", "method"), [("distance", "max_dist"), ("ensemble", "max_diag")])
def test_loop_with_other_uncertainties(inputs: Path, kind: str, method: str) -> None:
    """Trained, exported, biased, selected and labelled with this kind; an ensemble's members start warm one by one."""
    tables = {"uncertainty": {"kind": kind, "members": 2, "references": 20}, "selection": {"method": method}}
    folder = RunFolder(run(make_settings(inputs / kind, **tables, loop={"labels": 6}, test=None), inputs))
    assert len(read_structures(folder.dataset, labelled=True)) == 6
    assert Model(folder.model).metadata["uncertainty"]["kind"] == kind
    labels = read_structures(folder.dataset)
    chosen = [atoms for atoms in labels if atoms.info["iteration"] == 0]
    check_kept(folder, 0, chosen, predictions.NEW_LABELS)  # in place of a test set
    assert "Instead, these are 2 labels of the newest iterations" in (folder.report / "report.md").read_text()
    assert all(0.1 < replica["bias_share"] < 1.0 for replica in folder.read_history()[0]["replicas"])
    for iteration in (0, 1):
        weights = sorted(path.parent.name for path in folder.iteration(iteration).rglob("weights.pt"))
        assert weights == (["member_0", "member_1"] if kind == "ensemble" else ["train"])


# ------------------------------------------------------------------------------------------ kills

KILLS = [
    ({"event": "label_done", "iteration": -1}, 1),
    ({"event": "label_appended", "iteration": -1}, 2),
    ({"event": "epoch", "iteration": 0, "epoch": 8}, 0),
    ({"event": "stage_started", "stage": "export", "iteration": 0}, 0),
    ({"event": "stage_started", "stage": "test_set"}, 0),
    ({"event": "replica_done", "iteration": 0}, 0),
    ({"event": "stage_started", "stage": "select", "iteration": 0}, 0),
    ({"event": "label_done", "iteration": 0}, 0),
    ({"event": "label_appended", "iteration": 0}, 0),
    ({"event": "epoch", "iteration": 1, "epoch": 4}, 0),
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_kill_9_in_every_stage_changes_nothing(finished: RunFolder, tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for wanted, passes in KILLS:
        assert start_driver(settings, wanted, passes) == -signal.SIGKILL, wanted
        workers = [int(number) for number in (tmp_path / "children").read_text().split()]
        assert wait_for(lambda: not any(is_alive(worker) for worker in workers), 60.0), "orphans"  # noqa: B023
        tear(folder)
    assert start_driver(settings, {"event": "never"}, 0) == 0
    assert folder.dataset.read_bytes() == finished.dataset.read_bytes()
    assert folder.test.read_bytes() == finished.test.read_bytes()
    assert without_times(folder) == without_times(finished)


# ------------------------------------------------------------------------------------------ things that go wrong


def test_a_failing_reference_costs_only_the_guilty_structures(tmp_path: Path) -> None:
    starts = [cluster() for _ in range(6)]
    for atoms, x in zip(starts, (0.0, 101.0, 102.0, 103.0, 0.0, 0.0), strict=True):
        atoms.positions[:, 0] += x - atoms.positions[0, 0]
    write_structures(tmp_path / "start.extxyz", starts)
    settings = make_settings(
        tmp_path / "run",
        start={"count": 6},
        reference={"calculator": "unkind:UnkindEMT", "timeout": 5.0},
        loop={"labels": 6},
        selection={"batch": 3},
        test=None,
    )
    folder = RunFolder(run(settings, tmp_path))
    dataset = read_structures(folder.dataset)
    assert [atoms.info["replica"] for atoms in dataset if atoms.info["iteration"] == -1] == [0, 4, 5]
    assert len(dataset) == 6
    rejected = ase.io.read(folder.rejected, ":")
    assert [atoms.info["replica"] for atoms in rejected] == [1, 2, 3]
    disk, slow, crash = (atoms.info["reason"] for atoms in rejected)
    assert "the scratch disk is full" in disk
    assert slow == "It took longer than the limit of 5 s."
    assert crash == "The worker process was killed by SIGSEGV (a crash in compiled code)."


def test_a_reference_that_always_fails_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    atoms = cluster()
    atoms.positions[:, 0] += 101.0 - atoms.positions[0, 0]
    write_structures(tmp_path / "start.extxyz", [atoms])
    settings = make_settings(tmp_path / "run", reference={"calculator": "unkind:UnkindEMT"}, test=None)
    with pytest.raises(LabelError, match=r"Only 0 of 4 start structures .*the scratch disk is full"):
        run(settings, tmp_path)


def test_a_calculator_that_does_not_exist_is_one_sentence(inputs: Path, tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "run", reference={"calculator": "no_such_package:Calculator"}, test=None)
    with pytest.raises(SettingsError, match=r"no_such_package.* cannot be imported"):
        run(settings, inputs)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"md": {"steps": 50}}, r"md.steps = 40, now it is 50"),
        ({"bias": {"species": {}}}, r"bias.species.Au = 0.0, now it is not set"),
        ({"loop": {"labels": 6}}, r"loop.labels may only grow"),
    ],
)
def test_changed_settings_are_refused(finished: RunFolder, inputs: Path, tables: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        run(make_settings(finished.path, **tables), inputs)


def test_a_changed_start_file_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    atoms = cluster()
    atoms.positions[3] += 0.1
    write_structures(tmp_path / "start.extxyz", [atoms])
    with pytest.raises(SettingsError, match=r"content of start.file has changed"):
        run(make_settings(finished.path), tmp_path)


def test_two_drivers_cannot_work_on_one_run(finished: RunFolder, inputs: Path) -> None:
    with finished.locked(), pytest.raises(SettingsError, match="Another process is working on"):
        run(make_settings(finished.path), inputs)


# ------------------------------------------------------------------------------------------ variants


def test_unbiased_run_from_scratch_from_labelled_structures(inputs: Path, tmp_path: Path) -> None:
    settings = make_settings(
        tmp_path / "run",
        bias={"force": 0.0},
        md={"start_from": "labelled"},
        loop={"warm_start": False, "labels": 7},
        training={"epochs": 4},
        reference={"force_limit": 1000.0},
        test=None,
    )
    folder = RunFolder(run(settings, inputs))
    history = folder.read_history()
    assert [entry["labels"] for entry in history] == [4, 6, 7]
    assert all(replica["bias_share"] == 0.0 for entry in history for replica in entry["replicas"])
    assert all(replica["max_u"] > 0.0 for entry in history for replica in entry["replicas"])
    dataset = read_structures(folder.dataset)
    first = read_structures(folder.iteration(1) / "frames_001.extxyz")[0]
    np.testing.assert_array_equal(first.positions, dataset[5].positions)


def test_test_set_file_is_made_once_and_shared(inputs: Path, tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    test = {"file": "held_out.extxyz"}
    loop = {"labels": 4}
    folders = []
    for name in ("one", "two"):
        settings = make_settings(tmp_path / name, test=test, loop=loop, training={"epochs": 1})
        folders.append(RunFolder(run(settings, tmp_path)))
    assert folders[0].test.read_bytes() == folders[1].test.read_bytes() == (tmp_path / "held_out.extxyz").read_bytes()
    made = [[e for e in folder.read_events() if e["event"] == "trajectory_done"] for folder in folders]
    assert len(made[0]) == 2
    assert made[1] == []
    other = make_settings(tmp_path / "three", test=test, reference={"force_limit": 10.0})
    with pytest.raises(SettingsError, match=r"held_out.extxyz was made with other"):
        run(other, tmp_path)


def test_events_are_written_as_they_happen(finished: RunFolder) -> None:
    times = [event["time"] for event in finished.read_events()]
    assert times == sorted(times)
    assert time.gmtime().tm_year >= int(times[0][:4])
    names = [event["event"] for event in finished.read_events()]
    assert names.count("label_appended") == 8
    assert names.count("iteration_done") == 3


def test_quiet_iterations_end_the_run(tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    loop = {"labels": 100, "stop_when_quiet": True, "quiet_iterations": 2}
    settings = make_settings(tmp_path / "run", loop=loop, training={"epochs": 1}, selection={"batch": 1}, test=None)
    folder = RunFolder(run(settings, tmp_path))
    history = folder.read_history()
    assert [bool(entry["replicas"]) for entry in history] == [True, True, False]
    assert len(read_structures(folder.dataset)) == history[-1]["labels"] < 100
    assert folder.read_events()[-1]["reason"] == "Every replica reached the step limit in 2 successive iterations."
