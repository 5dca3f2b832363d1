"""Random numbers of a run: one seed for each stage of each iteration."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stage(IntEnum):
    """Stages that draw random numbers: part of the seed, so never renumber them."""

    START = 0
    SPLIT = 1
    TRAIN = 2
    MD = 3
    SELECT = 4


def random_generator(seed: int, iteration: int, stage: Stage, replica: int = 0) -> np.random.Generator:
    """The random numbers of one stage: independent of all others, the same whenever a run is repeated or resumed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(iteration, int(stage), replica)))
