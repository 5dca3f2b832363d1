"""How far displacements of neighbours differ in the labels of a crystal: what a trajectory is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ubmd.files import replacing

Array = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LabelledRange:
    """How far displacements of neighbours in one box differ in the labels.

    Attributes:
        ideal: positions of the ideal box [n, 3], Å.
        first, second: atoms of ordered pairs of neighbours [E].
        limit: largest difference in the labels of each pair's shell [E], Å.
    """

    ideal: Array
    first: Integers
    second: Integers
    limit: Array

    def reach(self, positions: Array) -> float:
        """Largest difference over its limit, for unwrapped positions [n, 3], Å; a common shift doesn't count."""
        displacements = positions - self.ideal
        size = np.linalg.norm(displacements[self.second] - displacements[self.first], axis=1)
        return float((size / self.limit).max())

    def save(self, path: Path) -> None:
        """Write an npz file."""
        with replacing(path) as handle:
            np.savez(handle, **vars(self))

    @classmethod
    def load(cls, path: Path) -> LabelledRange:
        """Read it."""
        with np.load(path, allow_pickle=False) as data:
            return cls(**{name: data[name] for name in cls.__dataclass_fields__})
