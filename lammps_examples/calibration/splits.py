"""Does a calibrated model file cover what it promises? Random splits of labelled structures into calibration and test.

python splits.py model.pt labelled.xyz [--apart other.xyz ...] [--splits 20] [--calibrating 39] [--confidence 0.95]

The labelled structures must not have been in the training, and be drawn like one another (from one MD, say). For
every split the uncertainties of model.pt are calibrated on some of them, per structure, and tested on the others: in
how many is the largest force error of an atom at most the largest u_i, and the error of the energy at most u? Their
number of m follows the beta-binomial distribution BB(m, k, n + 1 - k) with k = ceil((n + 1) confidence) and n
calibration structures (Vovk, PMLR 25, 475 (2012)), whatever the model. Structures of another kind (--apart) are not
drawn like them: nothing is promised there, and their share stands apart.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom

import ubmd
from ubmd.measure.confidence import structures_needed
from ubmd.measure.errors import CalibrationData, calibration_data, share_covered, spearman
from ubmd.uncertainty.conformal import conformal_scale

Pairs = tuple[NDArray[np.float64], NDArray[np.float64]]  # errors and uncertainties of structures
QUANTITIES = {"largest force error": ("largest_error", "largest_u"), "energy": ("energy_error", "energy_u")}


def pairs(data: CalibrationData, quantity: str) -> Pairs:
    """Errors and uncertainties [S]. Their calibration in the file is a factor, which a new calibration replaces."""
    error, u = QUANTITIES[quantity]
    return getattr(data, error), getattr(data, u)


def shares(near: Pairs, apart: Sequence[Pairs], splits: int, n: int, alpha: float) -> NDArray[np.float64]:
    """Shares covered [splits, 1 + number of sets apart]: of what a split has left, and of each set apart."""
    found = []
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(near[0]))
        scale = conformal_scale(near[0][order[:n]], near[1][order[:n]], alpha).scale
        tests = [(near[0][order[n:]], near[1][order[n:]]), *apart]
        found.append([share_covered(error, scale * u) for error, u in tests])
    return np.array(found)


def interval(splits: int, n: int, m: int, alpha: float) -> tuple[float, float, float]:
    """Expectation and 95 % interval of the mean share of ``splits`` splits, from 20,000 drawn means."""
    k = math.ceil(round((n + 1) * (1.0 - alpha), 9))
    drawn = betabinom.rvs(m, k, n + 1 - k, size=(20000, splits), random_state=1).mean(axis=1) / m
    low, high = np.quantile(drawn, [0.025, 0.975])
    return k / (n + 1), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("labelled", type=Path)
    parser.add_argument("--apart", type=Path, nargs="+", default=[])
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--calibrating", type=int, default=39)
    parser.add_argument("--confidence", type=float, default=0.95)
    given = parser.parse_args()
    alpha, n = 1.0 - given.confidence, given.calibrating
    files = [given.labelled, *given.apart]
    sets = [ase.io.read(file, ":") for file in files]
    m = len(sets[0]) - n
    if m < 1 or n < structures_needed(alpha):
        raise SystemExit(
            f"{len(sets[0])} structures cannot be split into {n} for calibration and the test: a confidence of "
            f"{given.confidence:g} needs at least {structures_needed(alpha)}, and one for the test."
        )
    model = ubmd.Model(given.model)
    data = [calibration_data(structures, model.predict(structures)) for structures in sets]
    centre, low, high = interval(given.splits, n, m, alpha)
    print(f"{given.model}: {given.splits} splits, {n} calibration structures, confidence {given.confidence:g}")
    print("| structures | force RMSE, eV/Å | error and u of | Spearman | share, mean ± deviation | promised |")
    print("|---|---|---|---|---|---|")
    for quantity in QUANTITIES:
        near, *apart = [pairs(part, quantity) for part in data]
        found = shares(near, apart, given.splits, n, alpha)
        for k, file in enumerate(files):
            promised = f"{centre:.3f}, mean in {low:.3f} to {high:.3f}" if k == 0 else "nothing"
            rank = spearman(*pairs(data[k], quantity))
            spread = f"{found[:, k].mean():.3f} ± {found[:, k].std(ddof=1):.3f}"
            print(f"| {file.name} | {data[k].force_rmse:.3f} | {quantity} | {rank:.2f} | {spread} | {promised} |")


if __name__ == "__main__":
    main()
