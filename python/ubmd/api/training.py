"""`ubmd.train`: a training on structures that are Python objects."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ase import Atoms

from ubmd.api.tables import Given, as_list, base_of, fill, source_of, stem_of, tables_of
from ubmd.calculator import Model
from ubmd.cli.train import train_model
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError
from ubmd.learning.proposal import propose_training
from ubmd.settings import TrainSettings, make_settings

Frames = Iterable[Atoms] | Path | str


def train(
    frames: Frames,
    settings: Given = None,
    *,
    validation: Frames | None = None,
    start: Path | str | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Model:
    """Train a model on labelled structures, as `ubmd train` does; a training that was interrupted is resumed.

    >>> import ubmd
    >>> settings = {"output_dir": "my_model", "training": {"epochs": 20}}
    >>> model = ubmd.train("copper/dataset.extxyz", settings, progress=False)
    >>> model.path
    PosixPath('my_model/model.pt')
    >>> model.elements
    ['Cu']

    Args:
        frames: structures whose calculators hold energy (eV), forces (eV/Å) and perhaps stress (eV/Å^3), or a file of
            labelled structures. Labels may be under any of the usual names (``REF_energy``, ...).
        settings: tables and keys as in a settings file (``ubmd schema train`` lists them), or the path of such a
            file. Values that are not given are those that ``ubmd init --train`` proposes; ``output_dir`` is named
            after the first formula.
        validation: further structures, for early stopping and calibration. Default: a share of the frames.
        start: an earlier model to start from: model.pt, weights.pt, checkpoint.pt, or the folder of a run or training.
        fresh: start again, even if the folder has a checkpoint.
        progress: print how it goes, as the command does.

    Returns:
        The model, for `ubmd.evaluate` and `ubmd.Calculator`; its ``path`` is the file for LAMMPS.

    Raises:
        SettingsError: the settings cannot work. DataError: a structure or label cannot be used.
        TrainingError: the training diverged.
    """
    values = tables_of(settings)
    for key, argument in (("training_file", "frames"), ("validation_file", "validation")):
        if key in values:
            raise SettingsError(f"Give the argument {argument} instead of the setting {key}.")
    structures = _structures(frames, "frames")
    values.setdefault("output_dir", f"{stem_of(structures)}_model")
    folder = Path(values["output_dir"])
    if "crystal" not in values:
        fill(values, propose_training(structures, Path("frames"), stem_of(structures)))
    values["training_file"] = _file(frames, structures, folder / "training.extxyz")
    if validation is not None:
        held_out = _structures(validation, "validation")
        values["validation_file"] = _file(validation, held_out, folder / "validation.extxyz")
    made = make_settings(TrainSettings, values, source=source_of(settings))
    train_model(made, base_of(settings), fresh, None if start is None else Path(start), quiet=not progress)
    return Model(folder / "model.pt")


def _structures(frames: Frames, name: str) -> list[Atoms]:
    """The structures; those of a file without a look at their labels, which the training checks."""
    return read_structures(frames, compare=False) if isinstance(frames, Path | str) else as_list(frames, name)


def _file(frames: Frames, structures: list[Atoms], target: Path) -> Path:
    """The file of the structures, which is written if they were given as objects; absolute."""
    if isinstance(frames, Path | str):
        return Path(frames).absolute()
    write_structures(target, structures)
    return target.absolute()
