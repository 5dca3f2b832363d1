"""Time and memory per atom from 10^2 to 10^6 atoms of MgO, plain and biased, on one and two MPI ranks.

python tests/benchmarks/scale.py [--largest 1e6] [--ranks 1 2] [--kinds plain biased] [--json out.json]

Biased runs have the defaults of the learning loop: light network, p = 128, u, u_i and bias every 4 steps. Memory is the
peak of all ranks together, less that of the smallest run of the same kind. A run that would not fit into the memory
that is free is skipped. All of it takes 10 minutes and 16 GB; up to 10^5 atoms, 3 minutes and 2 GB.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and LAMMPS start

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lammps_runs
import report
import run
import systems

MODEL, EVERY = "light128", 4
CELLS = ((2, 2, 3), (5, 5, 5), (11, 11, 11), (23, 23, 23), (50, 50, 50))  # 96, 1000, 10,648, 97,336 and 10^6 atoms
LONG = 200_000  # atoms of a run that is timed once, for as many steps as there are between two biases
KINDS = {"plain": ("", 1), "biased": (run.DEFAULT, EVERY)}
RESERVE = 1.15  # free memory needed, over what is expected


def prepared(folder: Path) -> run.Suite:
    """A suite whose crystal and model file are there."""
    systems.write_data(folder, "mgo")
    run.in_fresh_process(systems.write_model, folder, "mgo", MODEL)
    return run.Suite(folder, quick=False)


def crystal(suite: run.Suite, cells: tuple[int, int, int], kind: str) -> lammps_runs.Case:
    """A run of one size, plain or biased."""
    return suite.mgo(f"{kind} {cells}", cells, MODEL, *KINDS[kind])


def steps_of(n_atoms: int) -> int:
    """Steps of one measurement: a multiple of those between two biases."""
    return EVERY * max(1, min(250, 25_000 // n_atoms))


def measure(suite: run.Suite, sizes: Sequence[tuple[int, int, int]], ranks: int, kind: str) -> list[dict[str, Any]]:
    """Runs of growing size: atoms, seconds per step, memory in bytes, and bytes per atom (of the first one: None).

    Ends before the first size that would not fit into the memory.
    """
    rows: list[dict[str, Any]] = []
    for cells in sizes:
        case = crystal(suite, cells, kind)
        if not fits(rows, case.n_atoms):
            print(f"{kind} {case.n_atoms} atoms on {ranks} ranks: skipped, too little memory is free", flush=True)
            break
        repeats = 1 if case.n_atoms > LONG else 3
        result = lammps_runs.on_ranks(case, ranks, steps_of(case.n_atoms), repeats)
        row = {"kind": kind, "ranks": ranks, "atoms": case.n_atoms, "seconds": result["seconds"]}
        rows.append(row | {"bytes": sum(result["bytes"]), "ghosts": result["ghosts"]})
        rows[-1]["bytes_per_atom"] = bytes_per_atom(rows)
        print_row(rows[-1])
    return rows


def bytes_per_atom(rows: list[dict[str, Any]]) -> float | None:
    """Memory that the last run needs more than the first one, per atom."""
    if len(rows) == 1:
        return None
    return float((rows[-1]["bytes"] - rows[0]["bytes"]) / (rows[-1]["atoms"] - rows[0]["atoms"]))


def fits(rows: list[dict[str, Any]], n_atoms: int) -> bool:
    """Whether as many atoms fit into the free memory if each needs as much as in the last run."""
    if len(rows) < 2:
        return True
    needed: float = rows[0]["bytes"] + rows[-1]["bytes_per_atom"] * n_atoms
    return RESERVE * needed < lammps_runs.available_bytes()


def print_row(row: dict[str, Any]) -> None:
    memory = "-" if row["bytes_per_atom"] is None else f"{row['bytes_per_atom']:.0f}"
    print(
        f"{row['kind']:6} {row['atoms']:8} atoms  {row['ranks']} ranks  {1e6 * row['seconds'] / row['atoms']:7.2f} "
        f"µs/atom/step  {memory:>6} bytes/atom  peak {row['bytes'] / 1e9:.2f} GB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=1e6, help="largest number of atoms (default 10^6)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of MPI ranks (default 1 2)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: both")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    sizes = [cells for cells in CELLS if 8 * cells[0] * cells[1] * cells[2] <= arguments.largest]
    with tempfile.TemporaryDirectory(prefix="ubmd_benchmarks_") as folder:
        suite = prepared(Path(folder))
        rows = [
            row for kind in arguments.kinds for ranks in arguments.ranks for row in measure(suite, sizes, ranks, kind)
        ]
    if arguments.json:
        report.write_json(arguments.json, {"rows": rows, "circumstances": run.circumstances(quick=False)})


if __name__ == "__main__":
    main()
