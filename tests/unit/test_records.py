"""What runs write down is what `ubmd schema` says: on runs of an earlier version, killed or finished."""

from __future__ import annotations

import ast
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import ubmd
from ubmd.cli.main import app
from ubmd.runs.event_records import EVENTS, AnyEvent
from ubmd.runs.records import IterationEntry, Record, RoundEntry

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


@pytest.mark.parametrize(("name", "words"), [("history", ["IterationEntry", "eV/Å"]), ("events", ["task_lost", "UTC"])])
def test_schemas_are_printed(name: str, words: list[str]) -> None:
    result = CliRunner().invoke(app, ["schema", name])
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert all(word in json.dumps(schema, ensure_ascii=False) for word in words)
