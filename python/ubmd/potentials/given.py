"""``model.kind = "file"``: an energy module of another program, whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ubmd.errors import SettingsError
from ubmd.potentials.interface import Labels, RawModule, Report, TrainingTable
from ubmd.settings import ModelSettings, UncertaintySettings


class GivenModule:
    """See `ubmd.potentials.interface.Backend`. Only constants of the elements are fitted, and the uncertainty."""

    name = "file"
    checkpoint = "module.pt"
    uncertainties = ("posterior", "distance")

    def __init__(self) -> None:
        self.source: Path | None = None

    def configure(self, model: ModelSettings, base: Path) -> None:
        """See `ubmd.potentials.interface.Configured`."""
        if model.checkpoint is None:
            raise SettingsError("model.kind = 'file' needs model.checkpoint, the TorchScript file of the module.")
        if model.arguments:
            raise SettingsError("model.arguments are not for model.kind = 'file', which trains nothing; remove them.")
        self.source = base / model.checkpoint
        if not self.source.is_file():
            raise SettingsError(f"model.checkpoint: there is no file {self.source}.")

    def check(self) -> None:
        """See `ubmd.potentials.interface.Configured`."""
        from ubmd.potentials.raw import read_raw

        assert self.source is not None
        read_raw(self.source)

    def files(self) -> Sequence[Path]:
        """The module."""
        return [] if self.source is None else [self.source]

    def train(
        self, labels: Labels, table: TrainingTable, folder: Path, start: Path | None, seed: int, report: Report | None
    ) -> Path:
        """Fit the constants of the elements to the training labels (``training.mode = "none"``: nothing).

        Always from ``model.checkpoint``: a ``start`` differs from it by constants only.
        """
        from ubmd.potentials.raw import fitted_constants, read_raw, write_shifted

        assert self.source is not None
        raw = read_raw(self.source)
        constants = {} if table.training.mode == "none" else fitted_constants(raw, labels.training)
        folder.mkdir(parents=True, exist_ok=True)
        write_shifted(raw, constants, folder / self.checkpoint)
        if report is not None:
            report({"epoch": 1, "epochs": 1})
        return folder / self.checkpoint

    def raw_module(self, checkpoints: Sequence[Path], features: UncertaintySettings) -> RawModule:
        """The module with its constants."""
        from ubmd.potentials.raw import read_raw

        (path,) = checkpoints
        return read_raw(path)
