"""What worker processes do for a dynamic run, besides labels: pieces of trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ubmd.attempts import Attempt
from ubmd.files import file_hash, json_text, read_json, write_text
from ubmd.learning.work.tasks import lost_if_taken_over

if TYPE_CHECKING:
    from ubmd.lammps.trajectory import PieceResult, PieceTask


def piece_file(task: PieceTask, key: str) -> PieceResult:
    """Run a piece, and note beside its file how it ended; one that has ended is not run again.

    Raises:
        SimulationError: it could not be started.
        WorkersLost: another process has begun the same piece.
    """
    from ubmd.lammps.trajectory import run_piece

    def note(attempt: Attempt, result: PieceResult) -> None:
        attempt.put_text(_note(task, key, result), _note_file(task))

    with lost_if_taken_over():
        return read_finished(task, key) or run_piece(task, note)


def note_piece(task: PieceTask, key: str, result: PieceResult) -> None:
    """Write the result of a piece, the key of its task, and the hash of its file."""
    write_text(_note_file(task), _note(task, key, result))


def _note(task: PieceTask, key: str, result: PieceResult) -> str:
    return json_text({"task": key, "sha256": file_hash(task.result), "result": result.model_dump()})


def read_finished(task: PieceTask, key: str) -> PieceResult | None:
    """The kept result of a piece, or None if there is none for this very task, or its file is damaged."""
    from ubmd.lammps.trajectory import PieceResult

    try:
        kept = read_json(_note_file(task))
        whole = kept["task"] == key and kept["sha256"] == file_hash(task.result)
        return PieceResult.model_validate(kept["result"]) if whole else None
    except (OSError, ValueError, KeyError):
        return None


def _note_file(task: PieceTask) -> Path:
    return task.result.with_suffix(".json")
