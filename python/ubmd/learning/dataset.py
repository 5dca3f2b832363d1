"""The data set of a run: which labels train, validate and calibrate, and how the file grows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from ubmd.data.extxyz import append_structures, as_extxyz, repair_structures
from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.files import (
    keep_copy,
    move_aside,
)


def split_batch(
    n_training: int,
    n_validation: int,
    n_new: int,
    share: float,
    rng: np.random.Generator,
    n_calibration: int = 0,
    calibration_share: float = 0.0,
) -> list[str]:
    """'train', 'valid' or 'calib' for each of ``n_new`` labels.

    ``share`` of all labels (at least 1) is validation, ``calibration_share`` (at least 1, or none at 0) calibration.

    Labels that were split earlier keep their split (sticky split): what a model was trained on never calibrates a
    model that starts from it.
    """
    total = n_training + n_validation + n_calibration + n_new
    target = max(1, round(share * total))
    # Something must be left to train on.
    free = n_new if n_training else n_new - 1
    count = min(max(target - n_validation, 0), free)
    calibrating = max(1, round(calibration_share * total)) if calibration_share else 0
    order = rng.permutation(n_new).tolist()
    sides = ["train"] * n_new
    for k in order[:count]:
        sides[k] = "valid"
    for k in order[count : min(count + max(calibrating - n_calibration, 0), free)]:
        sides[k] = "calib"
    return sides


def fresh_split(n_labels: int, share: float, rng: np.random.Generator) -> list[str]:
    """A random split of all labels, for models trained from scratch."""
    return split_batch(0, 0, n_labels, share, rng)


def fresh_sides(sides: Sequence[str], share: float, rng: np.random.Generator) -> list[str]:
    """Splits for a model from scratch: calibration labels stay what they are, `fresh_split` divides the others."""
    others = [k for k, side in enumerate(sides) if side != "calib"]
    new = list(sides)
    for k, side in zip(others, fresh_split(len(others), share * len(sides) / len(others), rng), strict=True):
        new[k] = side
    return new


def append_once(
    path: Path, offset: int, labels: Sequence[Atoms], report: Callable[[int], None], at_once: int = 1
) -> int:
    """Make bytes from ``offset`` on in an extxyz file begin with these structures; returns where they end.

    Appends one by one, each on disk before the next. What is already there stays; an unfinished frame of an earlier
    attempt is cut off first. Only the newest batch may be unfinished, so later batches are never touched. A file that
    continues differently is copied aside before it is cut: no label is ever lost.

    Args:
        path: the file.
        offset: where these labels begin.
        labels: one batch.
        report: called with the number of the last label that is on disk.
        at_once: labels that are written together; more than one only if they are in another file, too.
    """
    frames = [as_extxyz([atoms]).encode() for atoms in labels]
    content = b"".join(frames)
    present = path.read_bytes() if path.exists() else b""
    if len(present) < offset:
        raise DataError(f"{path} is shorter than the labels that were written to it; restore it from a copy.")
    rest = present[offset:]
    if rest.startswith(content):
        return offset + len(content)
    complete = 0  # frames of an interrupted attempt
    if content.startswith(rest):
        complete = sum(len(rest) >= end for end in itertools.accumulate(map(len, frames)))
    else:
        keep_copy(path, path.parent / "aside")
    if path.exists():
        with path.open("r+b") as handle:
            handle.truncate(offset + sum(map(len, frames[:complete])))
    for first in range(complete, len(labels), at_once):
        some = labels[first : first + at_once]
        append_structures(path, some)
        report(first + len(some) - 1)
    return offset + len(content)


def read_dataset(path: Path) -> list[Atoms]:
    """The labels in a data set, without an unfinished last one; a damaged file is moved aside, to be written again."""
    try:
        repair_structures(path)
        return read_structures(path, labelled=True) if path.exists() and path.stat().st_size else []
    except DataError:
        move_aside(path, path.parent / "aside")
        return []
