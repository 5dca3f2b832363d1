"""Water from a model against its reference: density, distributions of distances and self-diffusion of in.liquid.

Usage: python liquid.py [-o liquid.png] [FOLDER]

Errors are standard errors of the means of blocks.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

NAMES = {"spcfw": "reference", "ubmd": "model"}
PAIRS = ("O-O", "O-H", "H-H")
WITHIN = (0.0, 1.3, 1.9)  # Å; shorter distances are those within a molecule
BLOCKS = 4
SPACING = 0.05  # ps between the frames of the dump
FIT = (1.0, 2.5)  # ps; where the mean square displacement is a straight line


def blocks(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, from the means of blocks."""
    means = [part.mean() for part in np.array_split(values, BLOCKS)]
    return float(np.mean(means)), float(np.std(means, ddof=1) / np.sqrt(BLOCKS))


def distributions(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(r [bins] in Å, g [3, bins]) of the only average in a file of fix ave/time."""
    rows = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    table = np.array(rows[1:], dtype=float)  # after the step and the number of rows
    return table[:, 1], table[:, 2::2].T


def first_peak(r: np.ndarray, g: np.ndarray, start: float) -> tuple[float, float]:
    """(position in Å, height) of the first maximum between molecules, of a parabola through three points."""
    inside = np.flatnonzero((r > start) & (g > 1.0))
    top = next(k for k in inside if g[k] >= g[k - 1] and g[k] > g[k + 1])
    a, b, c = np.polyfit(r[top - 1 : top + 2] - r[top], g[top - 1 : top + 2], 2)
    return float(r[top] - b / (2 * a)), float(c - b * b / (4 * a))


def read_positions(path: Path) -> np.ndarray:
    """Unwrapped positions [frames, n, 3] of a dump of id, xu, yu, zu, without the drift of their centre."""
    frames, lines = [], path.read_text().splitlines()
    count = int(lines[3])
    for first in range(9, len(lines), 9 + count):
        frames.append(np.array([line.split()[1:] for line in lines[first : first + count]], dtype=float))
    positions = np.array(frames)
    return positions - positions.mean(axis=1, keepdims=True)


def mean_square(positions: np.ndarray) -> np.ndarray:
    """Mean square displacement [lags], Å^2, over all origins and atoms; lags up to half of the frames."""
    lags = range(len(positions) // 2 + 1)
    return np.array([((positions[lag:] - positions[: len(positions) - lag]) ** 2).sum(-1).mean() for lag in lags])


def diffusion(positions: np.ndarray) -> tuple[float, float]:
    """Self-diffusion in 1e-9 m^2/s and its standard error, from a sixth of the slope in blocks."""
    slopes = []
    for part in np.array_split(positions, BLOCKS):
        values = mean_square(part)
        time = np.arange(len(values)) * SPACING
        chosen = (time >= FIT[0]) & (time <= FIT[1])
        if chosen.sum() < 2:
            raise SystemExit(f"The run at constant energy is too short: {BLOCKS} blocks of {2 * FIT[1]} ps are needed.")
        slopes.append(np.polyfit(time[chosen], values[chosen], 1)[0] / 6.0)
    return 10.0 * float(np.mean(slopes)), 10.0 * float(np.std(slopes, ddof=1) / np.sqrt(BLOCKS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    parser.add_argument("-o", "--out", type=Path, default=Path("liquid.png"))
    arguments = parser.parse_args()
    figure, axes = plt.subplots(2, 2, figsize=(8.0, 6.0), layout="constrained")
    rows: dict[str, dict[str, str]] = {}
    for key, name in NAMES.items():
        r, g = distributions(arguments.folder / f"{key}_rdf.txt")
        style = {"color": "black", "ls": "--"} if key == "spcfw" else {"color": "tab:orange"}
        density = np.loadtxt(arguments.folder / f"{key}_density.txt")
        positions = read_positions(arguments.folder / f"{key}_oxygen.dump")
        energy = np.loadtxt(arguments.folder / f"{key}_nve.txt")
        found = {
            "density, g/cm^3": "{:.4f} ± {:.4f}".format(*blocks(density[:, 1])),
            "self-diffusion, 1e-9 m^2/s": "{:.2f} ± {:.2f}".format(*diffusion(positions)),
            "its temperature, K": f"{energy[:, 1].mean():.1f}",
        }
        for axis, pair, values, start in zip(axes.flat, PAIRS, g, WITHIN, strict=False):
            place, height = first_peak(r, values, start)
            found[f"{pair} first peak"] = f"{height:.2f} at {place:.3f} Å"
            axis.plot(r, values, label=name, **style)
            axis.set(xlabel=f"{pair} distance (Å)", ylabel="g(r)", ylim=(0.0, 1.3 * values[r > start].max()))
        values = mean_square(positions)
        axes[1, 1].plot(np.arange(len(values)) * SPACING, values, label=name, **style)
        rows[name] = found
    axes[1, 1].set(xlabel="Time (ps)", ylabel="Mean square displacement of O (Å$^2$)")
    axes[0, 0].legend(frameon=False)
    print(f"{'':28}" + "".join(f"{name:>22}" for name in rows))
    for quantity in next(iter(rows.values())):
        print(f"{quantity:28}" + "".join(f"{found[quantity]:>22}" for found in rows.values()))
    figure.savefig(arguments.out, dpi=150)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
