"""Errors along the trajectories of dynamic training, as they grow round by round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ubmd.lammps.trajectory import read_piece
from ubmd.learning.dynamic.rounds import Round
from ubmd.learning.dynamic.trajectories import asks, piece_file
from ubmd.runs.dynamic_history import ErrorSeries, error_file
from ubmd.runs.records import Piece


class Series:
    """The error series of all replicas so far."""

    def __init__(self, trajectories: int) -> None:
        """``trajectories``: their number."""
        self._parts: dict[int, list[ErrorSeries]] = {r: [] for r in range(trajectories)}

    def add(self, now: Round, results: Sequence[Piece]) -> None:
        """Add the errors along the segments of a round."""
        for result in results:
            path = piece_file(now, result.replica)
            if not path.exists():
                continue
            _, data = read_piece(path)
            calls = [result.end] if asks(result) else []
            self._parts[result.replica].append(
                ErrorSeries(
                    data.steps,
                    data.errors,
                    data.thresholds,
                    data.means,
                    np.full(len(data.steps), now.labels),
                    np.array(calls, dtype=np.int64),
                )
            )

    def save(self, run: Path) -> None:
        """Write the files of a run folder."""
        for replica, parts in self._parts.items():
            if parts:
                _joined(parts).save(error_file(run, replica))


def _joined(parts: Sequence[ErrorSeries]) -> ErrorSeries:
    return ErrorSeries(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))
