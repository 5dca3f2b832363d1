"""The schedules of learning: each has all its parts, and files and folders are of one."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from ubmd.errors import DataError
from ubmd.imports import load
from ubmd.runs.folder import RunFolder
from ubmd.runs.schedules import LOOP, SCHEDULES, Schedule, schedule_of_file, schedule_of_run, schedule_of_tables

# How many arguments the command line calls each part with.
CALLS = {
    "verify": 3,
    "check": 2,
    "run": 3,
    "timeline": 2,
    "report": 2,
    "progress": 2,
    "status": 1,
    "status_row": 1,
    "template": 2,
    "short_template": 2,
    "propose": 3,
}
each = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)


@each
def test_every_part_is_there_and_takes_what_it_is_called_with(schedule: Schedule) -> None:
    parts = {name: getattr(schedule, name) for name in CALLS}
    for name, part in parts.items():
        inspect.signature(load(part.path)).bind(*range(CALLS[name]))
    assert ("from_iteration" in inspect.signature(load(schedule.run.path)).parameters) == schedule.takes_back


@each
def test_what_its_settings_need_tells_the_schedule(schedule: Schedule, tmp_path: Path) -> None:
    assert schedule_of_tables(schedule.settings.model_fields) is schedule
    (tmp_path / "settings.toml").write_text(schedule.template("settings.toml"))
    assert schedule_of_file(tmp_path / "settings.toml") is schedule


def test_names_are_those_of_one_schedule() -> None:
    for name in ("name", "schema", "table", "settings"):
        assert len({getattr(schedule, name) for schedule in SCHEDULES}) == len(SCHEDULES), name


def test_files_and_folders_without_a_run_are_left_to_who_reads_them(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[dynamic\n")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "bad.toml", tmp_path / "binary.toml", tmp_path / "missing.toml", tmp_path):
        assert schedule_of_file(path) is LOOP
    assert schedule_of_run(RunFolder(tmp_path)) is LOOP
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json"):
        schedule_of_run(RunFolder(tmp_path))
