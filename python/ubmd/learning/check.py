"""A run in miniature: every stage once, to find mistakes in a minute instead of at night."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ubmd.data.structures import read_structures
from ubmd.learning.loop import run
from ubmd.learning.run_folder import Listener, RunFolder
from ubmd.settings import RunSettings


def miniature(settings: RunSettings, run_dir: Path) -> RunSettings:
    """The same settings, but two start labels, two epochs, ten biased MD steps, one more label, no test set."""
    return settings.model_copy(
        update={
            "run_dir": run_dir,
            "start": settings.start.model_copy(update={"count": 2}),
            "training": settings.training.model_copy(update={"epochs": 2}),
            "md": settings.md.model_copy(update={"replicas": 1, "steps": 10, "frames_every": 5}),
            # A window that fills within the ten steps, so that the bias is really applied.
            "bias": settings.bias.model_copy(update={"window": 2, "every": 1}),
            "selection": settings.selection.model_copy(update={"batch": 1, "duplicate_tolerance": 0.0}),
            "loop": settings.loop.model_copy(update={"labels": 3, "warm_epochs": 2, "stop_when_quiet": False}),
            "test": None,
        }
    )


def check(settings: RunSettings, base: Path, listener: Listener | None = None) -> list[str]:
    """Run the miniature in a temporary folder; sentences that say what each stage costs.

    Raises:
        UbmdError: the first mistake.
    """
    with tempfile.TemporaryDirectory(prefix="ubmd_check_") as name:
        folder = RunFolder(run(miniature(settings, Path(name)), base, listener))
        return _findings(folder)


def _findings(folder: RunFolder) -> list[str]:
    history, start = folder.read_history(), len(read_structures(folder.dataset))
    replica = history[0]["replicas"][0]
    seconds = history[0]["seconds"]
    dynamics = f"MD: {replica['steps']} steps, {replica['stopped']}"
    if replica["reason"]:
        dynamics += f" ({replica['reason']})"
    return [
        f"Reference: {start} structures labelled.",
        f"Training: 2 epochs of one structure in {seconds['train']:.1f} s.",
        f"Export: {seconds['export']:.1f} s.",
        f"{dynamics}; largest uncertainty {replica['max_u']:.3g} eV/Å; bias {replica['bias_share']:.3g} of the forces.",
    ]
