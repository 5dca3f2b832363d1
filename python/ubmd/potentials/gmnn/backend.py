"""The Gaussian-moment neural network as a back end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ubmd.potentials.interface import Labels, RawModule, Report, Summary, TrainingTable
from ubmd.settings import UncertaintySettings

if TYPE_CHECKING:
    from ase import Atoms


class GaussianMoments:
    """See `ubmd.potentials.interface.Backend`. Its parts need torch, and are loaded when they are used."""

    name = "gmnn"
    checkpoint = "weights.pt"
    uncertainties = ("posterior", "last-layer", "distance", "ensemble")
    logs = ("log.csv", "learning_curve.png")

    def __init__(self, operators: bool | None = None) -> None:
        """``operators``: whether model files call the compiled operators (None: if they can be loaded here)."""
        self.operators = operators

    def train(
        self, labels: Labels, table: TrainingTable, folder: Path, start: Path | None, seed: int, report: Report | None
    ) -> Path:
        """See `trainer.train`."""
        from ubmd.potentials.gmnn.trainer import train

        sets = labels.training, labels.validation
        train(
            table.model,
            table.training,
            *sets,
            folder,
            seed,
            initial=start,
            epochs=table.epochs,
            progress=report,
            fresh=table.fresh,
            prolong=table.prolong,
        )
        return folder / self.checkpoint

    def adapt(self, source: Path, labels: Sequence[Atoms], targets: Sequence[Path]) -> dict[str, float]:
        """See `starting.adapt`."""
        from ubmd.potentials.gmnn.starting import adapt

        return adapt(source, labels, targets)

    def raw_module(self, checkpoints: Sequence[Path], features: UncertaintySettings) -> RawModule:
        """See `export.raw_module`."""
        import torch

        from ubmd.operators import chosen
        from ubmd.potentials.gmnn.checkpoint import load_weights
        from ubmd.potentials.gmnn.export import raw_module

        operators = chosen(self.operators)
        networks = [load_weights(path) for path in checkpoints]
        dtype = networks[0].radial.dtype
        for network in networks:
            network.to_network_dtype(torch.float64)
        return raw_module(networks, features, operators, dtype)

    def prolongation(self, folder: Path, epochs: int) -> str:
        """See `trainer.prolongation`."""
        from ubmd.potentials.gmnn.trainer import prolongation

        return prolongation(folder, epochs)

    def summary(self, folder: Path) -> Summary:
        """From the finished checkpoint, which keeps all rows."""
        from ubmd.potentials.gmnn.checkpoint import load

        saved = load(folder / "checkpoint.pt", "checkpoint")
        history = saved["history"]
        return Summary(history[saved["best"]["epoch"] - 1], len(history), sum(r["seconds"] for r in history))
