"""Frames that a running replica writes: the complete ones of a file that may be cut short."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ase import Atoms
from ase.io.extxyz import read_extxyz


def read_frames(path: Path) -> Iterator[Atoms]:
    """Frames of an extxyz file; ends quietly at one that a crash cut short."""
    if not path.exists() or path.stat().st_size == 0:
        return
    complete = count_frames(path)
    with path.open() as handle:
        yield from read_extxyz(handle, slice(0, complete))


def count_frames(path: Path) -> int:
    """Number of complete frames in an extxyz file."""
    if not path.exists():
        return 0
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    count = begin = 0
    while begin < len(lines) and begin + 2 + int(lines[begin]) <= len(lines):
        begin += 2 + int(lines[begin])
        count += 1
    return count
