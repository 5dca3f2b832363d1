"""What the uncertainties of a run's newest model promise, where it is less than was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ubmd.measure.confidence import shortfall
from ubmd.runs.records import IterationEntry
from ubmd.settings import RunSettings


def confidence(history: Sequence[IterationEntry], settings: RunSettings) -> Iterator[str]:
    """One sentence if the newest model has too few calibration structures, none otherwise."""
    known = history[-1].calibration if history else None
    if known is None or known.energy_attainable is None or known.force_attainable is None:
        return
    sentence = shortfall(known.energy_attainable, known.force_attainable, settings.uncertainty.alpha)
    if sentence:
        yield sentence
