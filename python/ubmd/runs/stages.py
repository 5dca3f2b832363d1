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
    report/               pictures and tables
    start/, test/         first labels, and parts of the test set
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
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

import tomli_w
from pydantic import ValidationError

import ubmd
from ubmd.attempts import remove_leftovers
from ubmd.errors import DataError, SettingsError, StorageError
from ubmd.faults import FULL
from ubmd.files import (
    append_text,
    check_name,
    check_space,
    file_hash,
    full_disk,
    move_aside,
    read_json,
    read_json_if_whole,
    why,
    write_json,
    write_text,
)
from ubmd.settings import RunSettings, Table

S = TypeVar("S", bound=Table)  # RunSettings or DynamicRunSettings
Event = dict[str, Any]
Listener = Callable[[Event], None]

_FORMAT = 2  # of the run folder
_MANIFEST = {
    **dict.fromkeys(("inputs", "settings", "packages", "machine"), dict),
    **dict.fromkeys(("created", "ubmd", "python"), str),
    "seed": int,
    "threads": int,
    "phases": list,
}
_FROM = "--from ITERATION"
_PACKAGES = ("torch", "lammps", "numpy", "ase", "vesin", "pebble")
# Keys that may differ between a run and its continuation: no label depends on them, or only how many there will be.
_HARMLESS = (
    "run_dir",
    "workers",
    "loop.labels",
    "loop.stop_when_quiet",
    "loop.quiet_iterations",
    "loop.label_budget",
    "loop.stop_at_plateau",
    "loop.plateau_iterations",
    "loop.plateau_tolerance",
    "training.checkpoint_every",
    "start.file",
    "start.labels",
    "reference.timeout",
    "reference.cache",
    "reference.environment",
    "md.timeout",
    "md.trace_every",
    "test",
    "variables",
)
# Keys that not even --from may change, since the labels that are kept were made with them.
_FIXED = ("start", "reference.calculator", "reference.arguments")


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
        """Keep other drivers off; the kernel releases the lock when this process ends, also by ``kill -9``.

        Where the file system has no such locks, only processes of this machine are kept off, as far as the note of the
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
        if isinstance(manifest, dict) and manifest.get("format") != _FORMAT and "settings" in manifest:
            return manifest  # of another version
        if isinstance(manifest, dict) and all(isinstance(manifest.get(k), v) for k, v in _MANIFEST.items()):
            return manifest
        raise DataError(
            f"{self.manifest} is damaged, and without it the run cannot go on: restore it from a copy, or set another "
            f"run_dir and start from the labels in {self.dataset.name}, which are kept."
        )

    def read_history(self) -> list[dict[str, Any]]:
        """Entries of the finished iterations.

        Raises:
            DataError: the file is damaged.
        """
        if not self.history.exists():
            return []
        entries = read_json_if_whole(self.history)
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise DataError(f"{self.history} is damaged; 'ubmd run' makes it again from the results of the iterations.")
        return entries

    def mend_history(self) -> None:
        """Move a damaged file of the history aside: walking through the run makes it again."""
        try:
            self.read_history()
        except DataError:
            move_aside(self.history, self.path / "aside")

    def read_events(self) -> list[Event]:
        """All events; what a kill or a damage left of others is left out."""
        if not self.events.exists():
            return []
        events = []
        for line in self.events.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
                dated = "time" not in event or datetime.fromisoformat(event["time"]).tzinfo is not None
                whole = isinstance(event["event"], str) and dated
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if whole:
                events.append(event)
        return events


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


class Stages:
    """The stages of one folder: each runs once per key.

    A key is the hash of everything that decides the result: settings, data, and the keys of earlier stages. It holds no
    path, no time-out and no hash of an earlier stage's output: a run that moves to another folder or machine keeps its
    keys, and an output that had to be made again (a damaged model, say, on a machine that rounds differently) makes
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

        ``outputs`` may be a function, for a stage that only knows afterwards which files it wrote.
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


def _is_entry(value: Any) -> bool:
    """Whether this is an entry of a history, of an iteration or of a round."""
    if not isinstance(value, dict):
        return False
    numbers = (value.get("iteration", value.get("round")), value.get("labels"), value.get("md_steps"))
    replicas = value.get("replicas", [])
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    return whole and isinstance(replicas, list) and all(isinstance(replica, dict) for replica in replicas)


def _is_taken(handle: TextIO, kind: int) -> bool:
    """Take a lock, unless another process has it: of the file system, or else by what the last process noted."""
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


@dataclass(frozen=True)
class Plan(Generic[S]):
    """Which settings hold in which iteration: they may change where a run was taken back (`--from`)."""

    threads: int
    """of the training"""
    phases: list[tuple[int, S]]
    """(first iteration, settings) in order"""

    def at(self, iteration: int) -> S:
        """Settings of an iteration (-1: of the start)."""
        return [self.phases[0][1], *(settings for first, settings in self.phases[1:] if first <= iteration)][-1]


def open_run(
    folder: RunFolder,
    settings: S,
    inputs: dict[str, str],
    from_iteration: int | None = None,
    reference: dict[str, Any] | None = None,
) -> tuple[Plan[S], dict[str, list[Any]]]:
    """Start a run, or check that these settings continue the one in the folder.

    Args:
        folder: the run's folder (locked).
        settings: the settings of this start.
        inputs: content hashes of the files that the settings name.
        from_iteration: the run was taken back to this iteration: from there on, other settings are allowed.
        reference: what makes the labels, for the manifest of a new run.

    Returns:
        The plan, and the settings that have changed (key -> [old, new]): harmless ones, or any in a run without labels,
        which then begins anew.

    Raises:
        SettingsError: the settings differ from those of the run in keys that labels depend on.
    """
    changes = {} if folder.has_labels() else _begin_anew(folder, settings, inputs, reference or {})
    if folder.manifest.exists():
        manifest = folder.read_manifest()
        if manifest.get("format") != _FORMAT:
            raise SettingsError(
                f"The run in {folder.path} was made by another version of ubmd ({manifest.get('ubmd')}); "
                "finish it with that one, or set another run_dir."
            )
        changes = _check_same(folder, settings, inputs, manifest, from_iteration)
        if from_iteration is not None:
            kept = [phase for phase in manifest["phases"] if phase["from"] < from_iteration]
            manifest["phases"] = [*kept, {"from": from_iteration, "settings": settings.model_dump(mode="json")}]
            write_json(folder.manifest, manifest)
    else:
        manifest = _new_manifest(settings, inputs, reference or {})
        write_json(folder.manifest, manifest)
    write_text(folder.settings, tomli_w.dumps(_without_none(settings.model_dump(mode="json"))))
    phases = [(0, manifest["settings"]), *((phase["from"], phase["settings"]) for phase in manifest["phases"])]
    return Plan(int(manifest["threads"]), [(first, _updated(old, settings)) for first, old in phases]), changes


def _begin_anew(
    folder: RunFolder, settings: Table, inputs: dict[str, str], reference: dict[str, Any]
) -> dict[str, list[Any]]:
    """Move what a run without labels has written aside if it is damaged, or of other settings, files or software.

    Nothing depends on it yet: whoever mistyped the calculator must not need another folder. Returns what changed.
    """
    if not folder.manifest.exists():
        return {}
    try:
        manifest = folder.read_manifest()
    except DataError:
        manifest = {}
    is_ours = manifest.get("format") == _FORMAT
    changes = _changes(manifest["settings"], settings) if is_ours else {}
    same = is_ours and manifest["inputs"] == inputs and manifest.get("reference", reference) == reference
    if changes or not same:
        for path in (folder.manifest, folder.events, folder.rejected, folder.path / "basis.npz"):
            move_aside(path, folder.path / "aside")
    return changes


def _changes(latest: dict[str, Any], settings: Table) -> dict[str, list[Any]]:
    """Key -> [old, new] of all settings that differ; keys that this version has got since count with their defaults."""
    old, new = _flat(_with_defaults(latest, type(settings))), _flat(settings.model_dump(mode="json"))
    keys = sorted(old.keys() | new.keys())
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}


def _updated(old: dict[str, Any], now: S) -> S:
    """Settings of a phase with the harmless keys as they are now."""
    values, new = json.loads(json.dumps(old)), now.model_dump(mode="json")
    for name in _harmless(now):
        table, _, key = name.partition(".")
        if not key:
            values[table] = new[table]
        elif new[table] is not None:  # else a table that these settings do without, now as before
            values[table][key] = new[table][key]
    return type(now).model_validate(values)


def _harmless(settings: Table) -> tuple[str, ...]:
    return getattr(settings, "HARMLESS", _HARMLESS)


def read_settings(folder: RunFolder) -> RunSettings:
    """Resolved settings of a run.

    Raises:
        DataError: the folder holds no run, or a damaged one.
    """
    return read_settings_of(folder, RunSettings)


def read_settings_of(folder: RunFolder, kind: type[S]) -> S:
    """Resolved settings of a run of this kind; errors as for `read_settings`."""
    if not folder.manifest.exists():  # written first; a settings.toml may be the user's own
        raise DataError(f"There is no run in {folder.path}: it has no manifest.json.")
    folder.read_manifest()
    try:
        return kind.model_validate(tomllib.loads(folder.settings.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # of TOML, of UTF-8, or of the settings
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{folder.settings} cannot be read ({reason}): 'ubmd run' with the settings of the run writes it again."
        ) from None


def is_dynamic_run(folder: RunFolder) -> bool:
    """Whether the folder holds a run of `ubmd.learning.dynamic`; DataError if it cannot be told."""
    return folder.manifest.exists() and "dynamic" in folder.read_manifest()["settings"]


def _new_manifest(settings: Any, inputs: dict[str, str], reference: dict[str, Any]) -> dict[str, Any]:
    training = settings.training  # None: there is no network
    return {
        "format": _FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "ubmd": ubmd.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "reference": reference,
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "seed": settings.seed,
        "seeds": "numpy SeedSequence([seed, iteration, stage, replica]); see ubmd.runs.seeds.random_generator",
        # Sums over threads round differently with another number of threads: a resumed run keeps this number.
        "threads": (training and training.threads) or os.cpu_count() or 1,
        "inputs": inputs,
        "settings": settings.model_dump(mode="json"),
        # settings that hold from a later iteration on, after the run was taken back to it
        "phases": [],
    }


def _check_same(
    folder: RunFolder,
    settings: Table,
    inputs: dict[str, str],
    manifest: dict[str, Any],
    from_iteration: int | None,
) -> dict[str, list[Any]]:
    """The harmless changes; SettingsError if a key that matters or an input file changed, or if labels shrank."""
    latest = manifest["phases"][-1]["settings"] if manifest["phases"] else manifest["settings"]
    if ("dynamic" in latest) != ("dynamic" in type(settings).model_fields):
        raise SettingsError(f"The run in {folder.path} is of another kind ([dynamic] or not): set another run_dir.")
    changed = _changes(latest, settings)
    bad = [key for key in changed if not _is_one_of(key, _harmless(settings))]
    if from_iteration is not None:
        bad = [key for key in bad if _is_one_of(key, _FIXED)]
    if bad:
        shown = "; ".join(f"{key} = {_shown(changed[key][0])}, now it is {_shown(changed[key][1])}" for key in bad)
        which = "set it back" if len(bad) == 1 else "set them back"
        others = "" if from_iteration is not None else f", go on with other settings from a later iteration ({_FROM})"
        raise SettingsError(
            f"The run in {folder.path} was started with {shown}; {which}{others}, or set another run_dir."
        )
    for name, value in manifest["inputs"].items():
        if inputs.get(name) != value:
            raise SettingsError(
                f"The content of {name} has changed since the run in {folder.path} was started; "
                "restore the file, or set another run_dir."
            )
    before, now = changed.get("loop.labels", (0, 0))
    if now < before:
        raise SettingsError(
            f"loop.labels may only grow: the run in {folder.path} was started with {before}, now it is {now}."
        )
    return {key: value for key, value in changed.items() if _is_one_of(key, _harmless(settings))}


def _with_defaults(values: dict[str, Any], kind: type[Table]) -> dict[str, Any]:
    try:
        return kind.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def _is_one_of(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _without_none(value: Any) -> Any:
    """TOML has no null: keys without a value are left out."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
