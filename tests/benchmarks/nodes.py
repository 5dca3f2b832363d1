"""A model, not a measurement: time per step of N atoms on P ranks, for clusters that nobody measured.

python tests/benchmarks/nodes.py [--times scale.json ...] [--latency 2e-6] [--bandwidth 1e10] [--check]

T(N, P) = T_1(N / P) + communication. T_1 is the measured time of one rank (of `scale.py --json`, else measured first:
two minutes). A periodic box on one rank has as many ghost atoms as a subdomain of its size, so that T_1 contains the
work for them. Messages and bytes are counted from the code of LAMMPS and ubmd; latency (s) and bandwidth (bytes/s, of
each rank) are assumptions. Left out: rebuilds of the neighbour list, output, and unequal numbers of atoms on ranks.

`--check` runs LAMMPS on 1, 2 and 4 ranks and prints what is predicted beside what is counted (needs a C compiler).
Times can be compared for as many ranks as there are cores.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and LAMMPS start

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import lammps_runs
import numpy as np
import run
import scale
import systems

DENSITY = 8 / 4.21**3  # atoms/Å^3 of MgO
REACH = systems.CUTOFF + 2.0  # Å, of ghost atoms: cutoff and skin
PROJECTIONS = 128
DOUBLE, INT = 8, 4  # bytes
Edges = tuple[float, float, float]
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Network:
    """Of a cluster, as each rank sees it: latency of a message, s, and bandwidth, bytes/s."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Traffic:
    """What the busiest rank sends in an average step: messages to neighbours, and reductions over all ranks."""

    messages: float
    bytes: float
    reductions: float
    reduced_bytes: float

    def seconds(self, network: Network, ranks: int) -> float:
        """Messages go one after the other; a reduction takes log2(ranks) messages."""
        rounds = math.ceil(math.log2(ranks))
        latencies = self.messages + rounds * self.reductions
        return latencies * network.latency + (self.bytes + rounds * self.reduced_bytes) / network.bandwidth


def processor_grid(box: Edges, ranks: int) -> Grid:
    """LAMMPS's division of an orthogonal box [3] (Å): that with the smallest surface."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    grids = [grid for grid in product(divisors, repeat=3) if math.prod(grid) == ranks]

    def surface(grid: Grid) -> float:
        x, y, z = subdomain(box, grid)
        return x * y + y * z + z * x

    return min(grids, key=surface)


def subdomain(box: Edges, grid: Grid) -> Edges:
    """Edges of one rank's part of a box."""
    x, y, z = (edge / n for edge, n in zip(box, grid, strict=True))
    return x, y, z


def ghosts(edges: Edges, reach: float, density: float) -> float:
    """Ghost atoms of a subdomain (edges, Å) in a periodic box: those within `reach` (Å) of it along every axis.

    The density is in atoms/Å^3.
    """
    return density * (math.prod(edge + 2 * reach for edge in edges) - math.prod(edges))


def exchange(edges: Edges, grid: Grid, reach: float, density: float) -> tuple[int, float]:
    """One exchange of ghost atoms in a periodic box: messages that a rank sends, and atoms in them.

    LAMMPS exchanges along x, then y, then z, in both directions, as often as `reach` needs subdomains; what came along
    the axes before is sent on. Along an axis with one rank, it is copied without a message.
    """
    messages, atoms, lengths = 0, 0.0, list(edges)
    for axis, ranks in enumerate(grid):
        face = math.prod(lengths) / lengths[axis]
        if ranks > 1:
            messages += 2 * (int(reach / edges[axis]) + 1)
            atoms += 2 * density * reach * face
        lengths[axis] += 2 * reach
    return messages, atoms


def traffic(box: Edges, ranks: int, every: int, projections: int = PROJECTIONS) -> Traffic:
    """Per step without a rebuild of the list; with a bias in each step number `every` (0: none).

    Each step: positions to ghosts and forces from them, 3 numbers each; and one integer, whether an atom has moved far
    enough for a rebuild. Each bias: forces and uncertainty forces from ghosts, 6 numbers; and five reductions: feature
    sum and number of atoms, largest u_i, sum of u_i, two norms, norm of the bias.
    """
    grid = processor_grid(box, ranks)
    messages, atoms = exchange(subdomain(box, grid), grid, REACH, DENSITY)
    share = 1 / every if every else 0.0
    return Traffic(
        messages=messages * (2 + share),
        bytes=DOUBLE * atoms * (6 + 6 * share),
        reductions=1 + 5 * share,
        reduced_bytes=INT + DOUBLE * share * (projections + 1 + 1 + 1 + 2 + 1),
    )


def seconds_per_step(
    n_atoms: int, ranks: int, every: int, times: Sequence[tuple[int, float]], network: Network
) -> float:
    """T(N, P) of a cube of atoms; times are (atoms, seconds per step) of one rank, from few to many atoms."""
    own = one_rank(n_atoms / ranks, times)
    return own + traffic(cube(n_atoms), ranks, every).seconds(network, ranks) if ranks > 1 else own


def one_rank(n_atoms: float, times: Sequence[tuple[int, float]]) -> float:
    """Seconds per step of one rank: between two sizes on a line, above the largest one in proportion."""
    sizes, seconds = np.array(times, dtype=float).T
    if n_atoms > sizes[-1]:
        return float(seconds[-1] * n_atoms / sizes[-1])
    return float(np.interp(n_atoms, sizes, seconds))


def cube(n_atoms: int) -> Edges:
    """Box of MgO, Å."""
    edge = (n_atoms / DENSITY) ** (1 / 3)
    return edge, edge, edge


# ------------------------------------------------------------------------------------- program


def measured_times(suite: run.Suite, files: Sequence[Path]) -> dict[str, list[tuple[int, float]]]:
    """Seconds per step of one rank by kind of run: of files of `scale.py --json`, or measured."""
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    if not rows:
        rows = [row for kind in scale.KINDS for row in scale.measure(suite, scale.CELLS[:4], 1, kind)]
    return {
        kind: [(row["atoms"], row["seconds"]) for row in rows if (row["kind"], row["ranks"]) == (kind, 1)]
        for kind in scale.KINDS
    }


def predict(times: dict[str, list[tuple[int, float]]], network: Network) -> None:
    """Table of predicted times and parallel efficiencies."""
    print(f"\nModel: latency {network.latency:g} s, bandwidth {network.bandwidth:g} bytes/s of each rank")
    columns = [(n, kind) for n in (100_000, 1_000_000) for kind in scale.KINDS]
    print("ranks" + "".join(f"{f'{n} {kind}':>24}" for n, kind in columns))
    for ranks in (2**k for k in range(11)):
        cells = []
        for n, kind in columns:
            every = scale.KINDS[kind][1] if kind == "biased" else 0
            alone, together = (seconds_per_step(n, p, every, times[kind], network) for p in (1, ranks))
            cells.append(f"{1000 * together:12.2f} ms {100 * alone / together / ranks:6.0f} %")
        print(f"{ranks:5}" + "".join(f"{cell:>24}" for cell in cells))


def check(suite: run.Suite, folder: Path, times: dict[str, list[tuple[int, float]]], network: Network) -> None:
    """Predicted and counted, of a cube of 4096 atoms; numbers are those of the busiest rank, per step."""
    counter = lammps_runs.mpi_counter(folder)
    if counter is None:
        raise SystemExit("--check counts MPI calls with a small C library: install a C compiler (cc)")
    names = ("ghosts", *lammps_runs.TRAFFIC, "ms/step")
    print(f"\n{'predicted / counted':22}" + "".join(f"{name:>26}" for name in names))
    for kind, ranks in product(scale.KINDS, (1, 2, 4)):
        case = scale.crystal(suite, (8, 8, 8), kind)
        found = lammps_runs.on_ranks(case, ranks, 2 * scale.EVERY, 3, counter)
        box, every = cube(case.n_atoms), case.every if case.bias else 0
        expected = traffic(box, ranks, every)
        pairs = [(ghosts(subdomain(box, processor_grid(box, ranks)), REACH, DENSITY), max(found["ghosts"]))]
        pairs += [(getattr(expected, name), max(one[name] for one in found["traffic"])) for name in lammps_runs.TRAFFIC]
        texts = [f"{a:.4g} / {b:.4g}" for a, b in pairs]
        time = f"{1000 * seconds_per_step(case.n_atoms, ranks, every, times[kind], network):.3g} / "
        cores = len(os.sched_getaffinity(0))
        texts.append(time + (f"{1000 * found['seconds']:.3g}" if ranks <= cores else "too few cores"))
        print(f"{f'{kind}, {ranks} ranks':22}" + "".join(f"{text:>26}" for text in texts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--times", type=Path, nargs="+", default=[], help="figures of scale.py --json (default: measure)"
    )
    parser.add_argument("--latency", type=float, default=2e-6, help="of a message, s (default, assumed: 2e-6)")
    parser.add_argument("--bandwidth", type=float, default=1e10, help="of each rank, bytes/s (default, assumed: 1e10)")
    parser.add_argument("--check", action="store_true", help="compare with LAMMPS on 1, 2 and 4 ranks")
    arguments = parser.parse_args()
    network = Network(arguments.latency, arguments.bandwidth)
    with tempfile.TemporaryDirectory(prefix="ubmd_benchmarks_") as name:
        folder = Path(name)
        suite = run.Suite(folder, quick=False) if arguments.times and not arguments.check else scale.prepared(folder)
        times = measured_times(suite, arguments.times)
        predict(times, network)
        if arguments.check:
            check(suite, folder, times, network)


if __name__ == "__main__":
    main()
