"""What is on disk when a write returns: the order of writing, syncing and renaming, as the system is asked for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ase import Atoms

from ubmd.data.extxyz import append_structures, write_structures
from ubmd.files import append_text, write_text
from ubmd.runs.folder import EventLog, RunFolder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """('sync' or 'rename', path, size of the file at that moment), in order."""
    calls: list[tuple[str, str, int]] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        calls.append(("sync", path.name, path.stat().st_size if path.is_file() else -1))
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        calls.append(("rename", target.name, path.stat().st_size))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    return calls


def test_appended_text_is_on_disk(tmp_path: Path, asked: list[tuple[str, str, int]]) -> None:
    append_text(tmp_path / "labels", "one\n")
    assert asked == [("sync", "labels", 4), ("sync", tmp_path.name, -1)]  # a new name is in its folder
    asked.clear()
    append_text(tmp_path / "labels", "two\n")
    assert asked == [("sync", "labels", 8)]


def test_a_whole_file_is_on_disk_before_it_takes_its_name(tmp_path: Path, asked: list[tuple[str, str, int]]) -> None:
    write_text(tmp_path / "mark.json", "12345")
    assert [(what, size) for what, _, size in asked] == [("sync", 5), ("rename", 5)]
    assert asked[-1][1] == "mark.json"


def test_events_and_labels_are_written_so(tmp_path: Path, asked: list[tuple[str, str, int]]) -> None:
    folder = RunFolder(tmp_path)
    EventLog(folder.events).write("run_started")
    size = folder.events.stat().st_size
    assert ("sync", "events.jsonl", size) in asked
    append_structures(folder.dataset, [Atoms("H")])
    assert ("sync", folder.dataset.name, folder.dataset.stat().st_size) in asked
    write_structures(tmp_path / "test.extxyz", [Atoms("H")])
    assert asked[-2][:2] == ("rename", "test.extxyz")
    assert asked[-1][:2] == ("sync", tmp_path.name)
