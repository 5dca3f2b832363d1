"""Stages of a run: each is done once per key, the hash of everything that determines its result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ubmd.files import (
    file_hash,
    move_aside,
    read_json,
    read_json_if_whole,
    write_json,
    write_text,
)
from ubmd.runs.folder import EventLog


class Stages:
    """The stages of one folder: each runs once per key.

    A key is the hash of everything that determines the result: settings, data, and the keys of earlier stages. It holds
    no path, no time-out and no hash of an earlier stage's output: a run that moves to another folder or machine keeps
    its keys, and an output that had to be made again (a damaged model, say, on a machine that rounds differently) makes
    nothing else stale. A stage's mark (``.stages/<name>.json``) is written after its outputs and has their hashes.
    """

    def __init__(self, folder: Path, events: EventLog, context: dict[str, Any]) -> None:
        """``context`` (such as the iteration's number) goes into every event of these stages."""
        self.folder = folder
        self.events = events
        self.context = context

    def run(
        self, name: str, key: str, outputs: Iterable[Path] | Callable[[], Iterable[Path]], function: Callable[[], None]
    ) -> None:
        """Call ``function`` unless its outputs are there, undamaged, and made with the same key.

        ``outputs`` may be a function, for a stage whose files are known only afterwards.
        """
        if self.is_done(name, key):
            return
        self.events.write("stage_started", stage=name, **self.context)
        begin = time.monotonic()
        function()
        seconds = round(time.monotonic() - begin, 3)
        written = outputs() if callable(outputs) else outputs
        files = {os.path.relpath(p, self.folder): file_hash(p) for p in written}
        write_json(self._mark(name), {"key": key, "outputs": files, "seconds": seconds})
        self.events.write("stage_done", stage=name, seconds=seconds, **self.context)

    def is_done(self, name: str, key: str) -> bool:
        """Whether a stage has ended with this key, and its outputs are as it left them."""
        mark = read_json_if_whole(self._mark(name))
        if mark is None or mark["key"] != key:
            return False
        paths = {self.folder / path: value for path, value in mark["outputs"].items()}
        return all(path.exists() and file_hash(path) == value for path, value in paths.items())

    def note(self, name: str, key: str) -> None:
        """Mark something without outputs as done, for `is_done`."""
        write_json(self._mark(name), {"key": key, "outputs": {}})

    def seconds(self) -> dict[str, float]:
        """Wall time of each finished stage (of the part that finished it, if it was interrupted), s."""
        marks = {mark.stem: read_json(mark) for mark in sorted((self.folder / ".stages").glob("*.json"))}
        return {name: mark["seconds"] for name, mark in marks.items() if "seconds" in mark}

    def _mark(self, name: str) -> Path:
        return self.folder / ".stages" / f"{name}.json"


def prepare_folder(folder: Path, key: str) -> None:
    """Keep what an interrupted stage with the same inputs left in its folder; move anything else aside."""
    mark = folder / "key"
    if mark.exists() and mark.read_text() == key:
        return
    move_aside(folder, folder.parent / "aside")
    write_text(mark, key)
