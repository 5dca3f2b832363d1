"""Random split of structures into those that train and those that validate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ubmd.errors import DataError


def split(structures: Sequence[Atoms], share: float, seed: int) -> tuple[list[Atoms], list[Atoms]]:
    """Random split into training and validation, each with at least one structure.

    Raises:
        DataError: fewer than two structures.
    """
    if len(structures) < 2:
        raise DataError("One structure cannot be split into training and validation; add more, or a validation_file.")
    count = min(max(1, round(share * len(structures))), len(structures) - 1)
    order = np.random.default_rng(np.random.SeedSequence([seed, 2])).permutation(len(structures))
    held_out = set(order[:count].tolist())
    return (
        [atoms for k, atoms in enumerate(structures) if k not in held_out],
        [atoms for k, atoms in enumerate(structures) if k in held_out],
    )
