"""The files that a run depends on: their hashes tell whether it can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ubmd.files import file_hash
from ubmd.potentials.kinds import kind_of_settings
from ubmd.settings import RunSettings
from ubmd.settings.dynamic import DynamicRunSettings, box_file


def input_hashes(settings: RunSettings | DynamicRunSettings, base: Path) -> dict[str, str]:
    """Hashes of the files that the settings and arguments of the reference name, by key.

    Raises:
        SettingsError: a file of a dynamic run is not there.
        OSError: a file of a loop is not there.
    """
    files = _dynamic_files(settings, base) if isinstance(settings, DynamicRunSettings) else _loop_files(settings, base)
    hashes = {key: file_hash(path) for key, path in files.items()}
    return hashes | _argument_hashes("reference.arguments", settings.reference.arguments, base)


def _loop_files(settings: RunSettings, base: Path) -> dict[str, Path]:
    colvars = settings.md.colvars
    return {"start.file": base / settings.start.file} | ({} if colvars is None else {"md.colvars": base / colvars})


def _dynamic_files(settings: DynamicRunSettings, base: Path) -> dict[str, Path]:
    return {"start.file": box_file(settings, base)} | kind_of_settings(settings).learner_class().inputs(settings, base)


def _argument_hashes(key: str, value: Any, base: Path) -> dict[str, str]:
    """Hashes of the files that arguments name, however nested, by key."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in _argument_hashes(f"{key}.{name}", item, base).items()}
    if isinstance(value, list | tuple):
        return {k: v for n, item in enumerate(value) for k, v in _argument_hashes(f"{key}.{n}", item, base).items()}
    if isinstance(value, str) and value and (base / value).is_file():
        return {key: file_hash(base / value)}
    return {}
