"""Runs that move, are damaged, are taken back or repeated: no label is lost, nothing finished is done again."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from system import cluster, make_settings, without_times

from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError
from ubmd.files import file_hash
from ubmd.learning import RunFolder, run

LABELS = {"loop": {"labels": 8, "warm_epochs": 4}, "training": {"epochs": 6}, "test": None}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An uninterrupted run of three iterations: 4, 6 and 8 labels; its start structure lies beside it."""
    base = tmp_path_factory.mktemp("finished")
    write_structures(base / "start.extxyz", [cluster()])
    return RunFolder(run(make_settings(base / "run", **LABELS), base))


@pytest.fixture
def moved(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """The finished run in another folder."""
    shutil.copytree(finished.path.parent, tmp_path / "elsewhere")
    return RunFolder(tmp_path / "elsewhere" / "run")


def with_labels(folder: RunFolder, labels: int, **tables: dict) -> RunFolder:
    """Go on to this many labels."""
    settings = make_settings(folder.path, **LABELS | {"loop": LABELS["loop"] | {"labels": labels}} | tables)
    run(settings, folder.path.parent)
    return folder


def stages_since(folder: RunFolder, count: int) -> list[tuple[int, str]]:
    """(iteration, stage) of the stages that ran after the first ``count`` events."""
    return [(e["iteration"], e["stage"]) for e in folder.read_events()[count:] if e["event"] == "stage_started"]


@pytest.fixture(scope="module")
def longer(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run to 10 labels, in one go and with an executor of our own."""
    base = tmp_path_factory.mktemp("longer")
    write_structures(base / "start.extxyz", [cluster()])
    settings = make_settings(base / "run", **LABELS | {"loop": LABELS["loop"] | {"labels": 10}})
    with ThreadPoolExecutor(1) as executor:
        return RunFolder(run(settings, base, executor=executor))


def models_of(folder: RunFolder) -> list[int]:
    """Iterations that have a model file and weights."""
    found = [bool(list(path.glob("model.pt"))) for path in folder.iterations()]
    assert found == [bool(list(path.glob("train/**/*.pt"))) for path in folder.iterations()]
    return [number for number, there in enumerate(found) if there]


def test_a_run_that_keeps_few_models_has_the_same_labels_and_goes_on(
    finished: RunFolder, longer: RunFolder, tmp_path: Path
) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    loop = LABELS["loop"] | {"keep_models": 1}
    folder = RunFolder(run(make_settings(tmp_path / "run", **LABELS | {"loop": loop}), tmp_path))
    assert models_of(folder) == [2]
    assert folder.dataset.read_bytes() == finished.dataset.read_bytes()
    assert folder.model.read_bytes() == (folder.iteration(2) / "model.pt").read_bytes()
    assert (folder.iteration(0) / "train" / "log.csv").exists()
    text = (folder.report / "report.md").read_text()
    assert "Model files and weights of 2 iterations, 0 to 1, are not kept (loop.keep_models = 1)." in text
    before = len(folder.read_events())
    with_labels(folder, 10, loop=loop | {"labels": 10, "keep_models": 2})
    assert {iteration for iteration, _ in stages_since(folder, before)} == {2, 3}
    assert models_of(folder) == [2, 3]
    assert folder.dataset.read_bytes() == longer.dataset.read_bytes()
    assert without_times(folder) == without_times(longer)
    # Taken back to where the weights before it are gone: they are trained again, and are what they were.
    run(make_settings(folder.path, **LABELS | {"loop": loop | {"labels": 10}}), tmp_path, from_iteration=2)
    assert folder.dataset.read_bytes() == longer.dataset.read_bytes()
    assert models_of(folder) == [3]


def test_a_moved_run_goes_on_as_if_it_had_not_been_moved(moved: RunFolder, longer: RunFolder) -> None:
    before = len(moved.read_events())
    with_labels(moved, 10)
    assert {iteration for iteration, _ in stages_since(moved, before)} == {2, 3}
    assert (2, "train") not in stages_since(moved, before)
    assert moved.dataset.read_bytes() == longer.dataset.read_bytes()
    assert without_times(moved) == without_times(longer)
    absolute = str(moved.path.parent).encode()
    for path in moved.path.rglob("*.json"):
        assert absolute not in path.read_bytes(), path


def test_a_run_leaves_the_threads_of_its_process_as_they_were(moved: RunFolder) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # the run's is 1
        with_labels(moved, 8)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_damage_costs_what_is_damaged(moved: RunFolder, longer: RunFolder) -> None:
    first, second, last = (moved.iteration(k) for k in range(3))
    spoiled = [
        first / "labels" / "label_000.extxyz",  # the data set has this label, too
        first / "frames_001.extxyz",  # nobody needs it any more
        second / "model.pt",  # the report shows what it said about its labels
        last / "model.pt",
        last / "train" / "weights.pt",
        last / "train" / "checkpoint.pt",
    ]
    (first / "model.pt").unlink()  # nobody needs it either
    sound = [file_hash(path) for path in spoiled]
    for path in spoiled:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"damaged")
    moved.dataset.write_bytes(moved.dataset.read_bytes()[:-100])
    before = len(moved.read_events())
    with_labels(moved, 10)
    assert moved.dataset.read_bytes() == longer.dataset.read_bytes()
    events = moved.read_events()[before:]
    assert [e["label"] for e in events if e["event"] == "label_appended"] == [7, 8, 9]
    assert [e["iteration"] for e in events if e["event"] == "label_done"] == [2, 2]
    stages = stages_since(moved, before)
    assert (2, "train") in stages
    assert (0, "md") not in stages
    assert (1, "export") in stages
    assert (1, "train") not in stages
    assert file_hash(spoiled[0]) == sound[0]
    assert file_hash(last / "train" / "weights.pt") == sound[4]


def test_a_data_set_that_was_edited_is_kept_aside(moved: RunFolder, finished: RunFolder) -> None:
    edited = read_structures(moved.dataset)
    del edited[2]
    write_structures(moved.dataset, edited)
    content = moved.dataset.read_bytes()
    with_labels(moved, 8)
    assert moved.dataset.read_bytes() == finished.dataset.read_bytes()
    (copy,) = (moved.path / "aside").iterdir()
    assert copy.read_bytes() == content


def test_a_run_is_taken_back_and_goes_on_with_other_settings(moved: RunFolder, finished: RunFolder) -> None:
    old = moved.dataset.read_bytes()
    changed = make_settings(moved.path, **LABELS | {"md": {"steps": 60, "replicas": 2}})
    with pytest.raises(SettingsError, match=r"md.replicas = 3, now it is 2; md.steps = 40, now it is 60; .*--from"):
        run(changed, moved.path.parent)
    run(changed, moved.path.parent, from_iteration=1)
    dataset = read_structures(moved.dataset)
    assert len(dataset) == 8
    assert moved.dataset.read_bytes()[:3000] == old[:3000]
    assert [entry["replicas"][0]["steps"] for entry in moved.read_history()[:2]] == [40, 60]
    assert [len(entry["replicas"]) for entry in moved.read_history()] == [3, 2, 0]
    (aside,) = (moved.path / "aside").iterdir()
    assert (aside / "dataset.extxyz").read_bytes() == old
    assert sorted(path.name for path in (aside / "iterations").iterdir()) == ["iter_001", "iter_002"]
    # It resumes without the option, and refuses what it was before.
    before = len(moved.read_events())
    run(changed, moved.path.parent)
    assert stages_since(moved, before) == []
    with pytest.raises(SettingsError, match=r"md.steps = 60, now it is 40"):
        with_labels(moved, 8)
    # Taken back once more, to the old settings: the old data set.
    run(make_settings(moved.path, **LABELS), moved.path.parent, from_iteration=1)
    assert moved.dataset.read_bytes() == old == finished.dataset.read_bytes()


@pytest.mark.parametrize(
    ("iteration", "tables", "words"),
    [
        (3, {}, r"has no iteration 3 to continue from; its last one is 2"),
        (1, {"start": {"count": 3}}, r"start.count = 4, now it is 3; set it back, or set another"),
        (1, {"reference": {"arguments": {"asap_cutoff": True}}}, r"reference.arguments.asap_cutoff = not set"),
    ],
)
def test_what_cannot_be_taken_back(moved: RunFolder, iteration: int, tables: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        run(make_settings(moved.path, **LABELS | tables), moved.path.parent, from_iteration=iteration)


def test_settings_that_no_label_depends_on_may_change(moved: RunFolder, longer: RunFolder) -> None:
    before = len(moved.read_events())
    with_labels(moved, 10, reference={"timeout": 7.0}, md={"timeout": 100.0}, workers={"retries": 3})
    assert moved.dataset.read_bytes() == longer.dataset.read_bytes()
    (event,) = [e for e in moved.read_events()[before:] if e["event"] == "settings_changed"]
    assert event["changes"]["reference.timeout"] == [60.0, 7.0]
    assert set(event["changes"]) == {"loop.labels", "md.timeout", "reference.timeout", "run_dir", "workers.retries"}


def test_members_of_an_ensemble_are_the_same_side_by_side(tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    tables = {"uncertainty": {"kind": "ensemble", "members": 2}, "selection": {"method": "max_diag"}}
    tables |= {"loop": {"labels": 5, "warm_epochs": 2}, "training": {"epochs": 3}, "test": None}
    folders = [
        RunFolder(run(make_settings(tmp_path / f"run_{n}", **tables, workers={"processes": n}), tmp_path))
        for n in (1, 2)
    ]
    assert (folders[1].iteration(1) / "train" / "training.extxyz").exists()
    assert not (folders[0].iteration(1) / "train" / "training.extxyz").exists()
    assert folders[0].dataset.read_bytes() == folders[1].dataset.read_bytes()
    epochs: list[int] = []
    tables["loop"]["labels"] = 6
    settings = make_settings(folders[1].path, **tables, workers={"processes": 2})
    run(settings, tmp_path, lambda event: epochs.append(event["epoch"]) if event["event"] == "epoch" else None)
    assert max(epochs) <= 4


def test_an_asynchronous_loop_does_not_wait_for_the_slowest(tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    settings = make_settings(
        tmp_path / "run",
        loop={"labels": 10, "warm_epochs": 6, "async": True, "asynchronous_share": 0.25},
        md={"replicas": 4, "steps": 60},
        reference={"force_limit": 1e4, "min_distance": 0.1, "energy_limit": 1e3},
        workers={"processes": 3},
        test=None,
    )
    folder = RunFolder(run(settings, tmp_path))
    dataset = read_structures(folder.dataset, labelled=True)
    assert [atoms.info["label"] for atoms in dataset] == list(range(10))
    history = folder.read_history()
    ended = [(r.get("iteration", e["iteration"]), r["replica"], e["iteration"]) for e in history for r in e["replicas"]]
    assert len({(begun, replica) for begun, replica, _ in ended}) == len(ended)
    # One worker is kept for labels: two replicas run at once, and the loop waits for one of them.
    assert any(begun < iteration for begun, _, iteration in ended)
    run(settings, tmp_path)
    assert len(read_structures(folder.dataset)) == 10
