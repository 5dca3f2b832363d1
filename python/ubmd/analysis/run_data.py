"""What a run folder says about its replicas: frames in the order in which the MD reached them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.analysis.coverage import coverage_growth
from ubmd.analysis.torsions import torsions


@dataclass(frozen=True)
class Frames:
    """All stored MD frames of a run, sorted by iteration, then by step (the replicas run side by side)."""

    structures: list[Atoms] = field(repr=False)
    iteration: NDArray[np.int64]
    """[N]"""
    replica: NDArray[np.int64]
    """[N]"""
    step: NDArray[np.int64]
    """[N] step of the frame's replica"""
    md_steps: NDArray[np.int64]
    """[N] MD steps of all replicas and iterations up to the moment of the frame"""
    max_u: NDArray[np.float64]
    """[N] max_i u_i, eV/Å"""

    def __len__(self) -> int:
        return len(self.structures)

    def coverage_curve(self, indices: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(MD steps [M], coverage [M]) of these torsions, one point per distinct number of MD steps."""
        grown = coverage_growth(torsions(self.structures, indices))
        last = np.append(np.flatnonzero(np.diff(self.md_steps)), len(self) - 1) if len(self) else np.zeros(0, int)
        return self.md_steps[last], grown[last]


def read_history(run: Path) -> list[dict[str, Any]]:
    """Entries of the finished iterations; empty for a run without any."""
    path = Path(run) / "history.json"
    return json.loads(path.read_text()) if path.exists() else []


def read_frames(run: Path) -> Frames:
    """Frames of all finished iterations of a run folder."""
    structures: list[Atoms] = []
    rows: list[tuple[int, int, int, int, float]] = []
    before = 0
    for entry in read_history(run):
        folder = Path(run) / "iterations" / f"iter_{entry['iteration']:03d}"
        found = [atoms for path in sorted(folder.glob("frames_*.extxyz")) for atoms in _read(path)]
        found.sort(key=lambda atoms: (int(atoms.info["step"]), int(atoms.info["replica"])))
        last = _last_steps(found)
        for atoms in found:
            step, replica = int(atoms.info["step"]), int(atoms.info["replica"])
            total = before + sum(min(step, end) for end in last.values())
            rows.append((entry["iteration"], replica, step, total, float(atoms.info.get("max_uncertainty", np.nan))))
        structures += found
        before = int(entry["md_steps"])
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    whole = table[:, :4].astype(np.int64)
    return Frames(structures, whole[:, 0], whole[:, 1], whole[:, 2], whole[:, 3], table[:, 4])


def _read(path: Path) -> list[Atoms]:
    """Frames of a file; replicas that failed at once leave empty files."""
    if path.stat().st_size == 0:
        return []
    return list(ase.io.iread(path, index=":", format="extxyz"))


def _last_steps(frames: list[Atoms]) -> dict[int, int]:
    """Replica -> step of its last frame."""
    last: dict[int, int] = {}
    for atoms in frames:
        replica, step = int(atoms.info["replica"]), int(atoms.info["step"])
        last[replica] = max(step, last.get(replica, 0))
    return last
