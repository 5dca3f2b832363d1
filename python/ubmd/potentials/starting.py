"""What a training starts from: the networks of an earlier run or training, with or without its labels."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ase import Atoms

from ubmd.errors import SettingsError
from ubmd.potentials.baseline import remainder
from ubmd.potentials.interface import Adapts, Backend
from ubmd.potentials.members import member_folders
from ubmd.settings import ModelSettings


def file_to_start_from(source: Path, backend: Backend, key: str) -> Path:
    """The file that a path names: itself, or in a folder of a run or of a training its model.

    Raises:
        SettingsError: there is none; ``key`` is what the sentence calls the path.
    """
    if source.is_dir():
        found = next((source / name for name in ("model.pt", backend.checkpoint) if (source / name).is_file()), None)
        if found is None:
            raise SettingsError(f"{key}: the folder {source} has no model.pt and no {backend.checkpoint}.")
        return found
    if not source.is_file():
        raise SettingsError(f"{key}: there is no file {source}.")
    return source


def start_from(
    source: Path, backend: Backend, count: int, model: ModelSettings, labels: Sequence[Atoms], folder: Path
) -> tuple[list[Path], dict[str, float]]:
    """Checkpoints in a folder that ``count`` networks start from, made of an earlier file.

    Args:
        source: checkpoint of the back end, or another file that it can read (see `Adapts`).
        backend: of the new networks.
        count: of the new networks.
        model: their settings.
        labels: that they will be trained on: constants of the elements are refitted to them.
        folder: for the checkpoints.

    Returns:
        The checkpoints; element -> constant that was added to the energy of an atom, eV (empty if the back end refits
        none).

    Raises:
        ModelError: the file does not fit.
    """
    targets = [path / backend.checkpoint for path in member_folders(folder, count)]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(backend, Adapts):
        return targets, backend.adapt(source, remainder(labels, model), targets)
    for target in targets:
        shutil.copyfile(source, target)
    return targets, {}


def constants_told(constants: dict[str, float]) -> str:
    """The refitted constants as a sentence; empty without any."""
    if not any(constants.values()):
        return ""
    table = ", ".join(f"{element} {value:+.4g}" for element, value in constants.items())
    return f"Constants that were added to the energies of the model that training starts from, eV per atom: {table}."
