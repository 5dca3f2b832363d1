"""What worker processes do for a dynamic run, besides labels: pieces of trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ubmd.learning.run_folder import file_hash, read_json, write_json

if TYPE_CHECKING:
    from ubmd.lammps.trajectory import PieceResult, PieceTask


def piece_file(task: PieceTask, key: str) -> PieceResult:
    """Run a piece, and note beside its file how it ended.

    Raises:
        SimulationError: it could not be started.
    """
    from ubmd.lammps.trajectory import run_piece

    result = run_piece(task)
    note_piece(task, key, result)
    return result


def note_piece(task: PieceTask, key: str, result: PieceResult) -> None:
    """Write the result of a piece, the key of its task, and the hash of its file."""
    write_json(_note(task.result), {"task": key, "sha256": file_hash(task.result), "result": result.model_dump()})


def read_finished(task: PieceTask, key: str) -> PieceResult | None:
    """The kept result of a piece, or None if there is none for this very task, or its file is damaged."""
    from ubmd.lammps.trajectory import PieceResult

    try:
        kept = read_json(_note(task.result))
        whole = kept["task"] == key and kept["sha256"] == file_hash(task.result)
        return PieceResult.model_validate(kept["result"]) if whole else None
    except (OSError, ValueError, KeyError):
        return None


def _note(result: Path) -> Path:
    return result.with_suffix(".json")
