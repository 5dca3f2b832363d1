"""The folder of a run: where everything is, and how it is written so that a kill at any point loses nothing.

    settings.toml         resolved settings (every key, defaults included)
    manifest.json         versions, what labels, seed, hashes of the inputs, threads of the training
    events.jsonl          what happened, one JSON object per line, only ever appended
    history.json          one entry per finished iteration (errors, coverage, MD steps, seconds)
    dataset.extxyz        all labels; info has the label's id, iteration, replica, step and split (and
                          first_iteration, for one that was postponed)
    rejected.extxyz       structures without a label; info has the reason
    test.extxyz           test set, if there is one
    model.pt              the newest model
    start_model.pt        a copy of the model that the first training started from (start.model)
    report/               pictures and tables
    inputs/               structures and calculator that `ubmd.run` was given as objects
    start/, test/         first labels, and parts of the test set
    given/                labels of the user (start.labels) that were made again, to compare them
    iterations/iter_NNN/  train/, model.pt, frames_RRR.extxyz, replicas.json, selected.json, labels/ of one iteration;
                          predictions.npz: what its model says about the test set, or about the labels it selected;
                          frames_RRR.<token>.attempt/: a replica that is running, with LAMMPS's log

Files are written under a temporary name, flushed to disk and renamed; a finished stage leaves a mark with the hash of
its inputs (`Stages`), so that a resumed run does what is missing, and again what has other inputs. Nothing in the
folder needs to know where the folder is.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from ubmd.attempts import remove_leftovers
from ubmd.errors import DataError, SettingsError, StorageError
from ubmd.faults import FULL
from ubmd.files import (
    append_text,
    check_name,
    check_space,
    full_disk,
    move_aside,
    read_json_if_whole,
    why,
)
from ubmd.valid_json import parse_json

Listener = Callable[[dict[str, Any]], None]

FORMAT = 2  # of the run folder
_MANIFEST = {
    **dict.fromkeys(("inputs", "settings", "packages", "machine"), dict),
    **dict.fromkeys(("created", "ubmd", "python"), str),
    "seed": int,
    "threads": int,
    "phases": list,
}


class RunFolder:
    """Paths and durable writes of one run; see the module's text for the layout."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.settings = self.path / "settings.toml"
        self.manifest = self.path / "manifest.json"
        self.events = self.path / "events.jsonl"
        self.history = self.path / "history.json"
        self.dataset = self.path / "dataset.extxyz"
        self.rejected = self.path / "rejected.extxyz"
        self.test = self.path / "test.extxyz"
        self.model = self.path / "model.pt"
        self.start_model = self.path / "start_model.pt"
        self.report = self.path / "report"

    def iteration(self, index: int) -> Path:
        """Folder of one iteration."""
        return self.path / "iterations" / f"iter_{index:03d}"

    def iterations(self) -> list[Path]:
        """Folders of all iterations that have begun, in order."""
        return sorted((self.path / "iterations").glob("iter_*"), key=lambda path: int(path.name[5:]))

    def has_labels(self) -> bool:
        """Whether any label was made for this run (also if it was moved aside): then its settings are settled."""
        if self.dataset.exists() and self.dataset.stat().st_size:
            return True
        labels = ("start/label_*", "test/trajectory_*", "iterations/*/labels/label_*", "rounds/*/labels/label_*")
        aside = ("aside/**/label_*", "aside/**/dataset*", "aside/**/trajectory_*")
        return any(
            True for pattern in (*(f"{name}.extxyz" for name in labels), *aside) for _ in self.path.glob(pattern)
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other drivers out; the kernel releases the lock when this process ends, also by ``kill -9``.

        Where the file system has no such locks, only processes of this machine are kept out, as far as the note of the
        last one tells. What earlier processes have left of unfinished work is removed, in the end that of this one's
        workers, too.

        Raises:
            SettingsError: another process works on this run, or the folder cannot be made or written.
            StorageError: the disk is full.
        """
        with self._open_lock() as handle:
            if _is_taken(handle, fcntl.LOCK_EX):
                raise SettingsError(f"Another process is working on {self.path}; wait for it, or set another run_dir.")
            _leave_note(handle, _this_process())
            remove_leftovers(self.path)
            try:
                yield
            finally:
                remove_leftovers(self.path)
                _leave_note(handle, "")

    def is_locked(self) -> bool:
        """Whether a process holds the lock."""
        lock = self.path / ".lock"
        try:
            with lock.open(errors="replace") as handle:
                return _is_taken(handle, fcntl.LOCK_SH)
        except OSError:
            return False

    def _open_lock(self) -> TextIO:
        """The file of the lock; the folder is made, and can be written to."""
        check_name(self.path, "run_dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return (self.path / ".lock").open("a+", errors="replace")
        except OSError as error:
            if error.errno in FULL:
                raise full_disk(self.path) from error
            raise SettingsError(
                f"run_dir = {self.path} cannot be made or written ({why(error)}); set another run_dir."
            ) from None

    def is_full(self) -> bool:
        """Whether not even a small file can be written."""
        try:
            check_space(self.path)
        except StorageError:
            return True
        except OSError:
            return False
        return False

    def read_manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            DataError: it is damaged.
        """
        manifest = read_json_if_whole(self.manifest)
        if isinstance(manifest, dict) and manifest.get("format") != FORMAT and "settings" in manifest:
            return manifest  # of another version
        if isinstance(manifest, dict) and all(isinstance(manifest.get(k), v) for k, v in _MANIFEST.items()):
            return manifest
        raise DataError(
            f"{self.manifest} is damaged, and without it the run cannot be resumed: restore it from a copy, or set "
            f"another run_dir and start from the labels in {self.dataset.name}, which are kept."
        )

    def read_history(self) -> list[dict[str, Any]]:
        """Entries of the finished iterations as the file has them; `ubmd.runs.reading` makes records of them.

        Raises:
            DataError: the file is damaged.
        """
        if not self.history.exists():
            return []
        entries = read_json_if_whole(self.history)
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise self.damaged_history()
        return entries

    def damaged_history(self, reason: str = "") -> DataError:
        """What to do about a history that cannot be read."""
        what = f"{self.history} is damaged; 'ubmd run' recreates it from the results of the iterations."
        return DataError(f"{what} {reason}".rstrip())

    def mend_history(self, read: Callable[[dict[str, Any]], object]) -> None:
        """Move a damaged file of the history aside: executing the run recreates it.

        Args:
            read: makes a record of an entry; DataError if it cannot.
        """
        try:
            for entry in self.read_history():
                read(entry)
        except DataError:
            move_aside(self.history, self.path / "aside")

    def read_events(self) -> list[dict[str, Any]]:
        """All events as the file has them; what a kill or a damage left of others is left out."""
        return list(self.each_event())

    def each_event(self) -> Iterator[dict[str, Any]]:
        """`read_events`, one at a time; `ubmd.runs.reading` makes records of them."""
        if not self.events.exists():
            return
        for line in self.events.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = parse_json(line)
                dated = "time" not in event or datetime.fromisoformat(event["time"]).tzinfo is not None
                whole = isinstance(event["event"], str) and dated
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if whole:
                yield event


class EventLog:
    """Appends events to events.jsonl and passes them on to a listener (live progress, or a test)."""

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        self._path = path
        self._listener = listener
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            append_text(path, "\n")  # a kill cut the last line short

    def write(self, event: str, **values: Any) -> None:
        """One event: kept on disk, then shown."""
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
        append_text(self._path, json.dumps(record) + "\n")
        self.show(**record)

    def show(self, event: str, **values: Any) -> None:
        """An event that is only shown (epochs, MD steps): too many to keep."""
        if self._listener is not None:
            self._listener({"event": event, **values})


def _is_entry(value: Any) -> bool:
    """Whether this is an entry of a history, of an iteration or of a round."""
    if not isinstance(value, dict):
        return False
    numbers = (value.get("iteration", value.get("round")), value.get("labels"), value.get("md_steps"))
    replicas = value.get("replicas", [])
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    return whole and isinstance(replicas, list) and all(isinstance(replica, dict) for replica in replicas)


def _is_taken(handle: TextIO, kind: int) -> bool:
    """Take a lock, unless another process has it: of the file system, or else as the last process noted."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # this file system has none (some network file systems)
        handle.seek(0)
        host, _, process = handle.read().partition(" ")
        return host == platform.node() and process == _process(process.partition(" ")[0])


def _leave_note(handle: TextIO, text: str) -> None:
    """Replace the content of a lock's file, if the disk has space for it."""
    with suppress(OSError):
        os.ftruncate(handle.fileno(), 0)
        os.write(handle.fileno(), text.encode())


def _this_process() -> str:
    return f"{platform.node()} {_process(str(os.getpid()))}"


def _process(number: str) -> str:
    """Number and start of a process of this machine: other ones of its number differ; empty if there is none."""
    try:
        return f"{number} {Path(f'/proc/{number}/stat').read_text().rsplit(')', 1)[1].split()[19]}"
    except (OSError, IndexError):
        return ""
