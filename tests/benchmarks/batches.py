"""Many small structures: `ubmd.evaluate` beside one structure after the other, on one core.

python tests/benchmarks/batches.py [--model model.pt]

Wall-clock times of whole calls, measured in turn; medians of several. Without a model file, one of random weights.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import systems
import torch
from ase import Atoms
from ase.build import molecule

import ubmd

COUNT, REPEATS = 200, 7


def ethanols() -> list[Atoms]:
    """Shaken molecules."""
    rng = np.random.default_rng(0)
    frames = [molecule("CH3CH2OH") for _ in range(COUNT)]
    for atoms in frames:
        atoms.rattle(0.05, rng=rng)
    return frames


def with_calculator(calculator: ubmd.Calculator, frames: list[Atoms]) -> None:
    """As with any calculator of ASE."""
    for atoms in frames:
        atoms.calc = calculator
        atoms.get_potential_energy()
        atoms.get_forces()
        atoms.calc = None


def seconds(function: Callable[[], object]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def row(model: ubmd.Model, precision: str, frames: list[Atoms]) -> str:
    """One line of the table."""
    calculator = ubmd.Calculator(model)
    ubmd.evaluate(model, frames)
    together, alone = [], []
    for _ in range(REPEATS):
        together.append(seconds(lambda: ubmd.evaluate(model, frames)))
        alone.append(seconds(lambda: with_calculator(calculator, frames)))
    first, second = (1000.0 * statistics.median(values) / COUNT for values in (together, alone))
    return f"| {precision} | {first:.3f} | {second:.3f} | {second / first:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model file that knows C, H and O")
    given = parser.parse_args().model
    torch.set_num_threads(1)
    frames = ethanols()
    with tempfile.TemporaryDirectory() as name:
        if given is None:
            systems.write_model(Path(name), "alanine", "light128")
        path = given or systems.model_file(Path(name), "alanine", "light128")
        print(f"{COUNT} ethanol molecules, one core; ms per molecule, median of {REPEATS}")
        print("| precision | evaluate | Calculator, one by one | ratio |\n|---|---|---|---|")
        for precision in ("mixed", "double"):
            print(row(ubmd.Model(path, precision), precision, frames))


if __name__ == "__main__":
    main()
