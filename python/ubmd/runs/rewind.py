"""Taking a run back to an earlier iteration."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError
from ubmd.files import copy_file, move_aside, write_json
from ubmd.runs.folder import RunFolder


def take_back(folder: RunFolder, iteration: int) -> Path:
    """Move all of an iteration and of the later ones into a dated folder, which is returned; earlier labels stay.

    May be interrupted at any point and called again: what is moved first is what came last.

    Raises:
        SettingsError: there is no such iteration.
    """
    last = len(folder.iterations()) - 1
    if not folder.manifest.exists() or not 0 <= iteration <= last:
        has = f"its last one is {last}" if last >= 0 else "it has none yet"
        raise SettingsError(f"The run in {folder.path} has no iteration {iteration} to continue from; {has}.")
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
