"""Large systems: a biased run of 10^5 and an unbiased run of 10^6 atoms of MgO, a few steps on two ranks.

python tests/benchmarks/large.py [--ranks 2] [--steps 4] [--json out.json]

Prints time and memory per atom (the peak of all ranks together, less that of a small run). The biased run has the
defaults of the learning loop: light network, p = 128, every 4 steps, with atomic uncertainties. 10^6 atoms take a
minute and 1.4 GB, the biased run 3.6 GB; a run that doesn't fit into the memory fails.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and LAMMPS start

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lammps_runs
import report
import run

SMALL, BIASED, UNBIASED = 5, 23, 50  # cells along each edge: 10^3, 97,336 and 10^6 atoms


def measure(suite: run.Suite, ranks: int, steps: int) -> report.Figures:
    """Both runs, and a small one that all memory is compared with."""
    biased = (run.DEFAULT, 4)
    base = lammps_runs.on_ranks(suite.mgo("small", SMALL, "light128", *biased), ranks, steps, 1)
    figures: report.Figures = {"ranks": ranks, "steps": steps}
    for name, case in (
        ("biased_1e5", suite.mgo("biased 10^5", BIASED, "light128", *biased)),
        ("unbiased_1e6", suite.mgo("unbiased 10^6", UNBIASED, "light128")),
    ):
        start = time.perf_counter()
        result = lammps_runs.on_ranks(case, ranks, steps, 1)
        figures[name] = summary(case, result, base, ranks) | {"total_seconds": time.perf_counter() - start}
        print_line(case.name, figures[name])
    return figures


def summary(case: lammps_runs.Case, result: dict[str, Any], base: dict[str, Any], ranks: int) -> dict[str, float]:
    """Time per atom and step on one rank's share, and memory per atom."""
    peak = sum(result["bytes"])
    return {
        "n_atoms": case.n_atoms,
        "us_per_atom_step": 1e6 * result["seconds"] / case.n_atoms,
        "us_per_atom_step_core": 1e6 * ranks * result["seconds"] / case.n_atoms,
        "peak_gigabytes": peak / 1e9,
        "bytes_per_atom": (peak - sum(base["bytes"])) / case.n_atoms,
    }


def print_line(name: str, result: dict[str, float]) -> None:
    print(
        f"{name:14} {result['n_atoms']:8.0f} atoms  {result['us_per_atom_step']:7.1f} µs/atom/step "
        f"({result['us_per_atom_step_core']:.1f} per core)  {result['bytes_per_atom']:8.0f} bytes/atom  "
        f"peak {result['peak_gigabytes']:.2f} GB, {result['total_seconds']:.0f} s in all",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="MPI ranks (default 2)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps (default 4)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ubmd_benchmarks_") as folder:
        suite = run.Suite(Path(folder), quick=False)
        suite.prepare()
        figures = measure(suite, arguments.ranks, arguments.steps)
    if arguments.json:
        report.write_json(arguments.json, figures | {"circumstances": run.circumstances(quick=False)})


if __name__ == "__main__":
    main()
