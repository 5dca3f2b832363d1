"""Tasks that the machine or cluster loses: tried again, left for later, never rejected."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import silicon
from rich.console import Console, RenderableType
from system import cluster, make_settings

from ubmd.cli.dynamic_status import status as dynamic_status
from ubmd.cli.loop_progress import describe_event
from ubmd.cli.loop_status import status
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import MachineError
from ubmd.files import read_json, write_json
from ubmd.learning import RunFolder, run
from ubmd.learning.dynamic.engine import run as run_dynamic
from ubmd.learning.work.tasks import MDJob
from ubmd.runs.event_records import read_event

SHORT = {
    "loop": {"labels": 8, "threshold": 1000.0, "warm_epochs": 2},
    "training": {"epochs": 4},
    "md": {"replicas": 2, "steps": 20},
    "test": None,
    "workers": {"processes": 2, "retries": 1},
}
Lost = Callable[[str, str], bool]
"""(name of the task's function, name of its file) -> whether its node is gone"""


class Nodes(ThreadPoolExecutor):
    """A real executor, some of whose nodes are gone: what runs there ends without a result."""

    def __init__(self, lost: Lost) -> None:
        super().__init__(2)
        self._lost = lost

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        task, (first, *_) = pickle.loads(arguments[3])
        if task.__name__ == "run_together":  # the arguments of several tasks
            (first,) = first
        path = first.engine.output(first.task) if isinstance(first, MDJob) else first
        if self._lost(task.__name__, str(path) if isinstance(path, Path) else ""):
            return super().submit(self._lose)
        return super().submit(function, *arguments, **keywords)

    @staticmethod
    def _lose() -> None:
        raise RuntimeError("node n7 does not answer")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    return tmp_path


def go(base: Path, lost: Lost = lambda function, file: False, name: str = "run", **tables: Any) -> RunFolder:
    with Nodes(lost) as nodes:
        return RunFolder(run(make_settings(base / name, **SHORT | tables), base, executor=nodes))


def losses(folder: RunFolder) -> list[tuple[str, int, bool]]:
    return [(e["what"], e["index"], e["again"]) for e in folder.read_events() if e["event"] == "task_lost"]


def shown(folder: RunFolder, describe: Callable[[Path], RenderableType] = status) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(describe(folder.path))
    return console.export_text()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An undisturbed run."""
    base = tmp_path_factory.mktemp("calm")
    write_structures(base / "start.extxyz", [cluster()])
    return go(base)


def test_a_task_that_is_lost_once_changes_nothing(base: Path, calm: RunFolder) -> None:
    seen: set[str] = set()

    def lost(function: str, file: str) -> bool:
        first = file not in seen
        seen.add(file)
        return first and function in ("label_file", "run_together")

    folder = go(base, lost)
    assert folder.dataset.read_bytes() == calm.dataset.read_bytes()
    found = losses(folder)
    assert len(found) == 12  # 4 + 2 + 2 labels, 2 replicas twice
    assert all(again for _, _, again in found)
    lines = [describe_event(read_event(e)) for e in folder.read_events() if e["event"] == "task_lost"]
    assert (
        "[  0] replica 0: The executor lost the task (RuntimeError: node n7 does not answer). It is tried again."
        in (lines)
    )
    assert not folder.rejected.exists()
    assert "Processes lost since its last start: 12; the last was that of label" in shown(folder)


def test_what_is_lost_again_and_again_is_asked_later(base: Path, calm: RunFolder) -> None:
    mended = False

    def lost(function: str, file: str) -> bool:
        return not mended and (file.endswith("start/candidate_001.extxyz") or "iter_000/labels/candidate_000" in file)

    folder = go(base, lost)
    assert losses(folder)[:2] == [("label", 1, True), ("label", 1, False)]
    assert not folder.rejected.exists()
    dataset = read_structures(folder.dataset, labelled=True)
    assert [atoms.info["label"] for atoms in dataset] == list(range(8))
    late = [atoms for atoms in dataset if "first_iteration" in atoms.info]
    assert [late[0].info[key] for key in ("first_iteration", "iteration", "replica")] == [-1, 0, 1]
    assert {atoms.info["first_iteration"] for atoms in late} == {-1, 0}
    asked = [read_structures(path)[0] for path in sorted(folder.path.glob("**/candidate_*.extxyz"))]
    known = {atoms.positions.tobytes() for atoms in dataset}
    assert all(atoms.positions.tobytes() in known for atoms in asked)
    # A resumed run comes to the same.
    before, events = folder.dataset.read_bytes(), len(folder.read_events())
    mended = True
    go(base, lost, loop=SHORT["loop"] | {"labels": 9})
    assert folder.dataset.read_bytes().startswith(before)
    assert [e["label"] for e in folder.read_events()[events:] if e["event"] == "label_appended"] == [8]


def test_a_structure_that_is_always_lost_does_not_hold_up_the_run(base: Path) -> None:
    bad: list[bytes] = []

    def lost(function: str, file: str) -> bool:
        if function != "label_file":
            return False
        place = read_structures(file)[0].positions.tobytes()
        if not bad:
            bad.append(place)
        return place == bad[0]

    folder = go(base, lost)
    assert len(read_structures(folder.dataset, labelled=True)) == 8
    assert not folder.rejected.exists()
    remarks = [e["text"] for e in folder.read_events() if e["event"] == "remark"]
    assert any(text.startswith("One structure was lost by a fault of the machine and not labelled") for text in remarks)


def test_if_nothing_comes_to_an_end_the_run_does_and_is_resumed_when_that_is_fixed(base: Path, calm: RunFolder) -> None:
    names = {"reference_record": "task", "label_file": "label", "run_together": "replica"}
    for function, what in names.items():
        with pytest.raises(MachineError, match=f"^No {what} could be run because of .* node n7 does not answer"):
            go(base, lambda name, file, wanted=function: name == wanted)
    folder = go(base)
    assert folder.dataset.read_bytes() == calm.dataset.read_bytes()
    assert not folder.rejected.exists()


def test_too_few_start_labels_for_a_fault_of_the_machine(base: Path, calm: RunFolder) -> None:
    with pytest.raises(MachineError, match=r"^Only 1 of 4 start structures could be labelled, 3 were lost by a fault"):
        go(base, lambda name, file: "start/candidate" in file and "000" not in file)
    assert go(base).dataset.read_bytes() == calm.dataset.read_bytes()


def test_a_lost_replica_keeps_nobody_waiting(base: Path) -> None:
    folder = go(base, lambda name, file: file.endswith("iter_000/frames_001.extxyz"))
    assert len(read_structures(folder.dataset, labelled=True)) == 8
    replica = folder.read_history()[0]["replicas"][1]
    assert replica["stopped"] == "failed"
    assert "node n7" in replica["reason"]


def test_what_an_earlier_version_rejected_for_the_machine_is_asked_again(base: Path, calm: RunFolder) -> None:
    folder = go(base, loop=SHORT["loop"] | {"labels": 6})
    labels = folder.iteration(0) / "labels"
    key = (labels / "label_001.extxyz.json").read_text() if (labels / "label_001.extxyz.json").exists() else ""
    for path in labels.glob("*label_001*"):
        path.unlink()
    reason = "The executor lost the task (ManagerLost: Task failure due to loss of manager)."
    write_json(labels / "rejected_001.json", {"reason": reason, "key": key})
    dataset = read_structures(folder.dataset)
    rejected = dataset.pop()
    write_structures(folder.dataset, dataset)
    rejected.calc = None
    rejected.info["reason"] = reason
    write_structures(folder.rejected, [rejected])
    for path in [*folder.path.glob("iterations/iter_001*"), folder.history]:
        path.rename(base / path.name)
    write_json(folder.history, read_json(base / "history.json")[:1])
    go(base)
    assert folder.dataset.read_bytes() == calm.dataset.read_bytes()
    assert not folder.rejected.exists()


# ------------------------------------------------------------------------------------------ dynamic runs


def go_dynamic(base: Path, lost: Lost = lambda function, file: False, name: str = "run") -> RunFolder:
    silicon.write_inputs(base, base / name)
    settings = silicon.make_settings(base / name, test=None)
    with Nodes(lost) as nodes:
        return RunFolder(run_dynamic(settings, base, executor=nodes))


def test_a_trajectory_whose_piece_is_lost_goes_on_in_the_next_round(tmp_path: Path) -> None:
    folder = go_dynamic(tmp_path, lambda name, file: file.endswith("round_0001/piece_001.npz"))
    assert losses(folder) == [("piece of replica", 1, True), ("piece of replica", 1, False)]
    assert "since its last start: 2; the last was that of piece of replica 1: The exec" in shown(folder, dynamic_status)
    before, gone, after = ({r["replica"]: r for r in e["replicas"]}[1] for e in folder.read_history()[:3])
    assert gone["ended"] == "segment"
    assert "node n7" in gone["reason"]
    assert before["end"] == gone["begin"] == gone["end"] == after["begin"] < after["end"]


def test_a_dynamic_run_that_the_machine_ends_goes_on(tmp_path: Path) -> None:
    for function in ("run_md", "label_file"):
        with pytest.raises(MachineError, match="could be run because of a fault of the machine"):
            go_dynamic(tmp_path, lambda name, file, wanted=function: name == wanted)
    calm, folder = go_dynamic(tmp_path, name="calm"), go_dynamic(tmp_path)
    assert folder.dataset.read_bytes() == calm.dataset.read_bytes()
    assert not folder.rejected.exists()
