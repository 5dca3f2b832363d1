"""The pool of frames that replicas have left, and the batch that is selected from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ubmd.calculator import Prediction
from ubmd.data.state import bare, state_hash
from ubmd.data.structures import (
    read_structures,
)
from ubmd.learning.loop.models import evaluator_of
from ubmd.runs.seeds import Stage, random_generator
from ubmd.selection import select
from ubmd.settings import RunSettings

_LARGE_BATCH = 8  # from which on frames can be drawn at random: of fewer they would be a large part


def read_frames(path: Path) -> list[Atoms]:
    """Frames of a replica; none if it failed before its first."""
    return read_structures(path) if path.stat().st_size else []


def make_pool(frame_files: Iterable[Path]) -> list[Atoms]:
    """All frames of all replicas; start structures that several replicas share come once."""
    pool: list[Atoms] = []
    seen: set[bytes] = set()
    for path in frame_files:
        for frame in read_frames(path):
            key = frame.positions.tobytes() + frame.cell[:].tobytes() + state_hash(frame, ()).encode()
            if key not in seen:
                seen.add(key)
                pool.append(frame)
    return pool


def select_batch(
    pool: Sequence[Atoms], training: Sequence[Atoms], model: Path, count: int, settings: RunSettings, iteration: int
) -> tuple[list[Atoms], dict[str, Any]]:
    """(chosen frames with where they come from in ``info``, what selected.json holds)."""
    evaluator = evaluator_of(model, settings)
    candidates, known = evaluator.predict(pool), evaluator.predict(training)
    rng = random_generator(settings.seed, iteration, Stage.SELECT)
    drawn = min(settings.selection.random, count - 1) if settings.selection.batch >= _LARGE_BATCH else 0
    chosen = select(
        settings.selection.method,
        np.array([p.feature for p in candidates]),
        np.array([p.feature for p in known]),
        np.array([p.u for p in candidates]),
        count - drawn,
        settings.uncertainty.lambda2,
        settings.selection.noise,
        settings.selection.duplicate_tolerance,
        rng,
    )
    rest = np.setdiff1d(np.arange(len(pool)), chosen)
    at_random = rng.choice(rest, min(drawn, len(rest)), replace=False).tolist() if drawn > 0 else []
    records = [_selection_record(pool[k], candidates[k]) for k in chosen]
    records += [_selection_record(pool[k], candidates[k]) | {"random": True} for k in at_random]
    chosen += at_random
    info = settings.reference.info
    structures = [_selected_structure(pool[k], iteration, r, info) for k, r in zip(chosen, records, strict=True)]
    return structures, {"pool": len(pool), "wanted": count, "selected": records}


def _selection_record(frame: Atoms, prediction: Prediction) -> dict[str, Any]:
    return {
        "replica": int(frame.info["replica"]),
        "step": int(frame.info["step"]),
        "u": prediction.u,
        "max_u": float(prediction.atomic_u.max()),
    }


def _selected_structure(frame: Atoms, iteration: int, record: dict[str, Any], info: Sequence[str]) -> Atoms:
    copy = bare(frame, info)
    copy.info |= {"iteration": iteration, "replica": record["replica"], "step": record["step"]}
    copy.info |= {"random": True} if record.get("random") else {}
    return copy
