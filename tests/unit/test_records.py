"""What runs write down is what `ubmd schema` says: on runs of an earlier version, killed or finished."""

from __future__ import annotations

import ast
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import ubmd
from ubmd.cli.main import app
from ubmd.errors import DataError
from ubmd.runs.event_records import EVENTS, AnyEvent, Epoch, Event, MDSteps, read_event
from ubmd.runs.records import IterationEntry, Piece, Record, RoundEntry

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS: dict[str, type[Record]] = {"loop": IterationEntry, "force_constants": RoundEntry, "network": RoundEntry}


def members(archive: str, name: str) -> Iterator[str]:
    """Contents of all files of a name in the archive of golden runs."""
    with tarfile.open(GOLDEN / f"{archive}.tar.xz") as file:
        for member in file:
            if member.isfile() and Path(member.name).name == name:
                content = file.extractfile(member)
                assert content is not None
                yield content.read().decode()


@pytest.mark.parametrize("archive", KINDS)
def test_histories_are_of_the_schema(archive: str) -> None:
    entries = [entry for text in members(archive, "history.json") for entry in json.loads(text)]
    assert len(entries) > 3
    for entry in entries:
        assert KINDS[archive].model_validate(entry).as_json().keys() == entry.keys()
    assert any("ended" in entry for entry in entries)


@pytest.mark.parametrize("archive", KINDS)
def test_events_are_of_the_schema(archive: str) -> None:
    lines = [line for text in members(archive, "events.jsonl") for line in text.splitlines()]
    seen = {EVENTS.validate_json(line).event for line in lines if line.endswith("}")}
    assert {"run_started", "stage_started", "stage_done", "label_done", "label_appended", "run_done"} <= seen
    assert seen & {"iteration_done", "round_done"}


@pytest.mark.parametrize("archive", KINDS)
def test_events_are_read_as_they_are_in_the_file(archive: str) -> None:
    """The same values as by the strict way, also those that only a listener gets and those of a later version."""
    lines = [line for text in members(archive, "events.jsonl") for line in text.splitlines() if line.endswith("}")]
    for values in map(json.loads, lines):
        event = read_event(values)
        assert type(event) is type(EVENTS.validate_python(values))
        assert json.dumps(event.as_json()) == json.dumps(values)
        assert event.turn == values.get("iteration", values.get("round", -1))
    unknown = read_event({"event": "unheard", "time": "2026-01-01T00:00:00+00:00", "round": 4, "more": 1})
    assert type(unknown) is Event
    assert (unknown.time, unknown.turn) == ("2026-01-01T00:00:00+00:00", 4)
    epoch, steps = read_event({"event": "epoch", "epoch": 3}), read_event({"event": "md_steps", "steps": [1, 2]})
    assert isinstance(epoch, Epoch)
    assert isinstance(steps, MDSteps)
    assert (epoch.epoch, epoch.time, steps.steps, steps.limit) == (3, None, [1, 2], None)


def test_all_events_of_the_sources_are_known() -> None:
    """Every call that writes an event names one of the schema, with keys that it has."""
    known: dict[str, type[Record]] = {
        name: kind
        for kind in get_args(get_args(AnyEvent)[0])
        for name in get_args(kind.model_fields["event"].annotation)
    }
    found = set()
    for path in Path(ubmd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_write = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("events.write")
            if is_write and isinstance(node.args[0], ast.Constant):
                name = node.args[0].value
                found.add(name)
                assert {word.arg for word in node.keywords if word.arg} <= known[name].model_fields.keys(), name
    assert known.keys() - found == {"label_done", "label_rejected"}  # the name is worked out there


@pytest.mark.parametrize(
    "change", [{"labels": "many"}, {"unknown": 1}, {"replicas": [{"replica": 0}]}, {"md_steps": None}]
)
def test_other_entries_are_refused(change: dict[str, Any]) -> None:
    (entry, *_) = json.loads(next(members("loop", "history.json")))
    with pytest.raises(ValidationError):
        IterationEntry.model_validate(entry | change)


@pytest.mark.parametrize("archive", KINDS)
def test_a_history_is_read_as_it_is_in_the_file(archive: str) -> None:
    """The same values as by the strict way, and nothing changes when it is written again."""
    entries = [entry for text in members(archive, "history.json") for entry in json.loads(text)]
    for entry in entries:
        read = KINDS[archive].read(entry)
        assert read == KINDS[archive].model_validate(entry)
        assert json.dumps(read.as_json()) == json.dumps(entry)


def test_a_history_of_another_version_is_read() -> None:
    """Unknown keys are passed over, missing ones are nothing, also within an entry; null stays null, NaN stays NaN."""
    replica = {"stopped": "a new ending", "max_u": math.nan, "more": 1, "temperature": None}
    entry = {"iteration": 3, "test": None, "valid": {"force_rmse": 0.5, "more": 1}, "replicas": [replica], "more": {}}
    read = IterationEntry.read(entry)
    assert read.iteration == 3
    assert (read.train, read.test, read.calibration, read.coverage, read.ended) == (None,) * 5
    assert read.seconds == {}
    assert read.rmse_on("valid") == (None, 0.5, None)
    assert read.rmse_on("train") == (None, None, None)
    assert read.replicas[0].stopped == "a new ending"
    assert math.isnan(read.replicas[0].max_u)
    assert read.replicas[0].ensemble == "nvt"
    written = read.as_json()
    assert written.keys() == entry.keys() - {"more"}
    assert written["test"] is None
    assert written["replicas"][0].keys() == replica.keys() - {"more"}
    assert IterationEntry.read({}).replicas == []
    piece = Piece.read({"replica": 0})
    assert (piece.max_displacement, piece.ms_per_step) == (0.0, 0.0)
    assert RoundEntry.read({"model": {"noise": 0.1}, "seconds": None}).model.gamma == {}


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (lambda: IterationEntry.read({"iteration": 0}).labels, "A record 'IterationEntry' of a file has no 'labels'"),
        (lambda: IterationEntry.read({"labels": None}).labels, "A record 'IterationEntry' of a file has no 'labels'"),
        (lambda: RoundEntry.read({"model": {}}).model.noise, "A record 'Fit' of a file has no 'noise'"),
        (lambda: IterationEntry.read([]), "A record 'IterationEntry' of a file is damaged"),
        (lambda: IterationEntry.read({"test": 0.5}), "A record 'Errors' of a file is damaged"),
        (lambda: IterationEntry.read({"replicas": {}}), "A record 'Replica' of a file is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_said(look: Callable[[], Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        look()


def test_a_name_that_is_in_no_record_is_a_mistake_of_ours() -> None:
    with pytest.raises(AttributeError):
        _ = IterationEntry.read({}).lables  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change", [{"train": None}, {"valid": {"force_rmse": None}}, {"calibration": {"force_factor": None}}]
)
def test_what_files_may_lack_is_written_all_the_same(change: dict[str, Any]) -> None:
    (entry, *_) = json.loads(next(members("loop", "history.json")))
    changed = {name: {**entry[name], **value} if value else value for name, value in change.items()}
    with pytest.raises(ValidationError, match="null is not allowed"):
        IterationEntry.model_validate(entry | changed)


@pytest.mark.parametrize(("name", "words"), [("history", ["IterationEntry", "eV/Å"]), ("events", ["task_lost", "UTC"])])
def test_schemas_are_printed(name: str, words: list[str]) -> None:
    result = CliRunner().invoke(app, ["schema", name])
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert all(word in json.dumps(schema, ensure_ascii=False) for word in words)
