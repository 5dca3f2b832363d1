"""What loops and dynamic runs share: their timelines, what status says of them, hashes of their inputs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import silicon
import system
from rich.console import Console

from ubmd.cli import dynamic_progress, loop_progress
from ubmd.cli.run_status import make_table, page
from ubmd.errors import DataError
from ubmd.files import file_hash
from ubmd.learning.dynamic.check import input_files as dynamic_files
from ubmd.learning.dynamic.timeline import DynamicTimeline
from ubmd.learning.loop.timeline import Timeline
from ubmd.learning.loop.verify import input_files as loop_files
from ubmd.runs.event_records import Event, read_event
from ubmd.runs.folder import RunFolder
from ubmd.runs.inputs import input_hashes
from ubmd.runs.timeline import RunTimeline

TIMELINES: dict[str, Callable[[list[Event]], RunTimeline]] = {
    "loop": lambda events: Timeline(system.make_settings(Path("run")), events),
    "dynamic": lambda events: DynamicTimeline(silicon.make_settings(Path("run")), events),
}
both = pytest.mark.parametrize("kind", TIMELINES)


def at(second: int, event: str, **values: Any) -> Event:
    return read_event({"time": f"2026-01-01T00:00:{second:02d}+00:00", "event": event, **values})


STARTED = at(0, "run_started", process=7, labels_wanted=30, steps_wanted=500)
STOPPED = at(2, "run_stopped", why="Bad.", kind="DataError")


@both
def test_a_run_from_its_start_to_its_end(kind: str) -> None:
    follow = TIMELINES[kind]
    run = follow([STARTED, at(1, "stage_started", stage="label"), at(2, "stage_started", stage="measure")])
    assert (run.process, run.wanted, run.finished, run.stopped) == (7, 30, "", "")
    assert {stage: begin.second for stage, begin in run.running.items()} == {"label": 1, "measure": 2}
    run.add(at(3, "stage_done", stage="label", seconds=2.0))
    assert list(run.running) == ["measure"]
    run.add(STOPPED)
    assert (run.stopped, run.error) == ("Bad.", "DataError")
    run.add(STARTED.model_copy(update={"process": 8}))  # resumed: nothing runs yet
    assert (run.process, run.stopped, run.running) == (8, "", {})
    run.add(at(4, "stage_started", stage="label"))
    run.add(at(5, "run_done", reason="Enough.", labels=3))
    assert (run.finished, run.running) == ("Enough.", {})
    assert run.last_event is not None
    assert run.last_event.second == 5


@both
def test_damaged_events_of_a_file_are_passed_over_those_of_now_are_not(kind: str) -> None:
    run = TIMELINES[kind]([read_event({"event": name}) for name in ("stage_started", "md_steps")] + [STARTED])
    assert run.process == 7
    with pytest.raises(DataError, match="has no 'stage'"):
        run.add(read_event({"event": "stage_started"}))


@pytest.mark.parametrize(
    ("describe", "number"), [(loop_progress.describe_event, "iteration"), (dynamic_progress.describe_event, "round")]
)
def test_lines_that_both_kinds_print(describe: Callable[[Event], str], number: str) -> None:
    rejected = {"event": "label_rejected", "index": 2, "why": "No."}
    assert describe(read_event(rejected | {number: 3})) == "[  3] label 2 rejected: No."
    assert describe(read_event(rejected)) == "[start] label 2 rejected: No."
    assert describe(read_event({"event": "remark", "text": "Well."})) == "Remark: Well."
    lost = {"event": "task_lost", "what": "label", "index": 1, "why": "Gone.", "again": True, "crashed": False}
    assert describe(read_event(lost | {number: 12})) == "[ 12] label 1: Gone. It is tried again."
    assert describe(read_event({"event": "unheard"})) == ""


def test_a_page_of_status(tmp_path: Path) -> None:
    lost = {"event": "task_lost", "what": "label", "index": 1, "why": "Gone.", "again": True, "crashed": False}
    half = read_event({"event": "task_lost", "what": "label"})
    table = make_table({"all": ["1", "2"], "some": ["-", "5"], "none": ["-", ""]})
    console = Console(file=io.StringIO(), width=100)
    console.print(page(RunFolder(Path("run")), "running", ["3 labels."], [read_event(lost), half], [table]))
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert lines[:2] == ["run: running", "3 labels."]
    assert lines[2] == "Processes lost since its last start: 1; the last was that of label 1: Gone. It is tried again."
    assert [line.split() for line in lines[3:] if line and "─" not in line] == [["all", "some"], ["1", "-"], ["2", "5"]]


def _hashes(files: Any, settings: Any, base: Path) -> dict[str, str]:
    return input_hashes(files(settings, base), settings.reference.arguments, base)


def test_hashes_of_the_inputs(tmp_path: Path) -> None:
    for name in ("start.extxyz", "colvars.dat", "deep.txt", "silicon.extxyz"):
        (tmp_path / name).write_text(name)
    known = {name: file_hash(tmp_path / name) for name in ("start.extxyz", "colvars.dat", "deep.txt", "silicon.extxyz")}
    loop = system.make_settings(tmp_path / "run")
    loop = loop.model_copy(
        update={
            "md": loop.md.model_copy(update={"colvars": Path("colvars.dat")}),
            "reference": loop.reference.model_copy(update={"arguments": {"a": {"b": ["no file", "deep.txt"]}}}),
        }
    )
    assert _hashes(loop_files, loop, tmp_path) == {
        "start.file": known["start.extxyz"],
        "md.colvars": known["colvars.dat"],
        "reference.arguments.a.b.1": known["deep.txt"],
    }
    dynamic = silicon.make_settings(tmp_path / "run")
    assert _hashes(dynamic_files, dynamic, tmp_path) == dict.fromkeys(
        ("start.file", "crystal.structure"), known["silicon.extxyz"]
    )
    apart = silicon.make_settings(tmp_path / "run", start={"file": "start.extxyz"})
    assert _hashes(dynamic_files, apart, tmp_path)["start.file"] == known["start.extxyz"]
