"""Hollow sites that the adsorbate visits, hops between them, and desorptions, of several runs at equal MD steps.

Usage: python sites.py RUN_DIR [RUN_DIR ...] [-o sites.png]

The adsorbate is the highest atom. Its site is the nearest hollow; far from all (more than a third of their distance) it
keeps the last one. A change of sites is a hop, a change of the highest atom an exchange with the surface.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from ubmd.learning import RunFolder
from ubmd.settings import RunSettings, load_settings

CELLS = 3  # along either side


@dataclass
class Walk:
    """What the replicas of a run did, one after another."""

    step: np.ndarray
    """MD steps of all replicas so far, at each record"""
    site: np.ndarray
    """number of the site, 0 to 8"""
    hop: np.ndarray
    exchange: np.ndarray
    desorbed: int


def site_of(place: np.ndarray, cell: np.ndarray, origin: np.ndarray) -> tuple[int, float]:
    """(number of the nearest hollow, lateral distance to it in lengths of a surface cell)."""
    reduced = np.linalg.solve(cell[:2, :2].T, (place - origin)[:2]) * CELLS
    nearest = np.round(reduced)
    return int(nearest[0] % CELLS * CELLS + nearest[1] % CELLS), float(np.abs(reduced - nearest).max())


def walk_of(folder: RunFolder) -> Walk:
    """All traces of a run, iteration by iteration."""
    steps, sites, hops, exchanges, total, desorbed = [], [], [], [], 0, 0
    for entry in folder.read_history():
        desorbed += sum(replica["stopped"] == "desorbed" for replica in entry["replicas"])
        for path in sorted(folder.iteration(entry["iteration"]).glob("trace_*.npz")):
            trace = np.load(path)
            last = atom = None
            for step, positions, cell in zip(trace["step"], trace["positions"], trace["cell"], strict=True):
                highest = int(np.argmax(positions[:, 2]))
                site, distance = site_of(
                    positions[highest], cell, positions[0]
                )  # atoms of the lowest layer are below hollows
                site = site if last is None or distance < 1.0 / 3.0 else last
                steps.append(total + step)
                sites.append(site)
                hops.append(last is not None and site != last)
                exchanges.append(atom is not None and highest != atom)
                last, atom = site, highest
            total += int(trace["step"][-1])
    return Walk(np.array(steps), np.array(sites), np.array(hops), np.array(exchanges), desorbed)


def visited(walk: Walk) -> np.ndarray:
    """Number of different sites up to each record."""
    first = [np.argmax(walk.site == site) for site in np.unique(walk.site)]
    new = np.zeros(len(walk.site), dtype=int)
    new[first] = 1
    return np.cumsum(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("sites.png"))
    arguments = parser.parse_args()
    walks = {path: walk_of(RunFolder(path)) for path in arguments.runs}
    biased = {path: load_settings(path / "settings.toml", RunSettings).bias.force > 0.0 for path in walks}
    shared = min(int(walk.step[-1]) for walk in walks.values())
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharex=True, layout="constrained")
    print(f"{'run':24} {'bias':>5} {'steps':>9} {'sites of 9':>10} {'hops':>6} {'exchanges':>9} {'desorbed':>8}")
    for path, walk in walks.items():
        within = walk.step <= shared
        seen = visited(walk)
        counts = int(seen[within][-1]), int(walk.hop[within].sum()), int(walk.exchange[within].sum())
        print(
            f"{path.name:24} {'yes' if biased[path] else 'no':>5} {shared:>9,} {counts[0]:>10} {counts[1]:>6} "
            f"{counts[2]:>9} {walk.desorbed:>8}"
        )
        colour, style = ("tab:orange", "-") if biased[path] else ("tab:blue", "--")
        for axis, values in zip(axes, (seen, np.cumsum(walk.hop)), strict=True):
            axis.plot(walk.step[within] / 1000.0, values[within], style, color=colour, lw=1.5)
    for axis, label in zip(axes, ("Hollow sites visited (of 9)", "Hops"), strict=True):
        axis.set(xlabel="MD steps of all replicas (thousands)", ylabel=label, ylim=(0.0, axis.get_ylim()[1] + 1.0))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].plot([], [], "-", color="tab:orange", label="biased")
    axes[0].plot([], [], "--", color="tab:blue", label="not biased")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(arguments.out, dpi=150)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
