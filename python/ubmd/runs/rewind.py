"""Taking a run back to an earlier iteration; and the files that a run depends on."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError
from ubmd.files import copy_file, file_hash, move_aside, write_json
from ubmd.runs.folder import RunFolder
from ubmd.settings import RunSettings


def take_back(folder: RunFolder, iteration: int) -> Path:
    """Move all of an iteration and of the later ones into a dated folder, which is returned; earlier labels stay.

    May be interrupted at any point and called again: what is moved first is what came last.

    Raises:
        SettingsError: there is no such iteration.
    """
    last = len(folder.iterations()) - 1
    if not folder.manifest.exists() or not 0 <= iteration <= last:
        has = f"its last one is {last}" if last >= 0 else "it has none yet"
        raise SettingsError(f"The run in {folder.path} has no iteration {iteration} to go on from; {has}.")
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    aside = folder.path / "aside" / f"{stamp}_from_{iteration}"
    for path in reversed(folder.iterations()[iteration:]):
        move_aside(path, aside / "iterations", path.name)
    for path in (folder.dataset, folder.history, folder.rejected, folder.settings):
        if path.exists():
            copy_file(path, aside / path.name)
    move_aside(folder.model, aside, folder.model.name)
    for path in (folder.dataset, folder.rejected):
        _cut(path, iteration)
    write_json(folder.history, folder.read_history()[:iteration])
    return aside


def _cut(path: Path, iteration: int) -> None:
    """Keep the structures of earlier iterations."""
    if not path.exists() or not path.stat().st_size:
        return
    kept = [atoms for atoms in read_structures(path) if atoms.info["iteration"] < iteration]
    if kept:
        write_structures(path, kept)
    else:
        path.unlink()


def input_hashes(settings: RunSettings, base: Path) -> dict[str, str]:
    """Hashes of the start file, of md.colvars, and of the files that arguments of the reference name, by key."""
    hashes = {"start.file": file_hash(base / settings.start.file)}
    if settings.md.colvars is not None:
        hashes["md.colvars"] = file_hash(base / settings.md.colvars)
    return hashes | argument_hashes("reference.arguments", settings.reference.arguments, base)


def argument_hashes(key: str, value: Any, base: Path) -> dict[str, str]:
    """Hashes of the files that arguments of a reference name, however nested, by key."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in argument_hashes(f"{key}.{name}", item, base).items()}
    if isinstance(value, list | tuple):
        return {k: v for n, item in enumerate(value) for k, v in argument_hashes(f"{key}.{n}", item, base).items()}
    if isinstance(value, str) and value and (base / value).is_file():
        return {key: file_hash(base / value)}
    return {}
