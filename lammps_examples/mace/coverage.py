"""How much of (phi, psi) does MD of alanine dipeptide visit, biased and unbiased, after equal numbers of steps?

python coverage.py NAME=model.pt [NAME=other.pt ...] [--steps 10000] [--seeds 0 1 2] [--out coverage_run]

Every row is MD at 300 K in LAMMPS from the C7eq minimum, which begins there again as soon as the uncertainty of an atom
exceeds 1.5 eV/Å, as the replicas of the loop do. Coverage is that of the paper. What is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ase.io
import matplotlib.pyplot as plt
import numpy as np

import ubmd
from ubmd.files import write_json
from ubmd.measure.coverage import coverage, coverage_growth
from ubmd.measure.torsions import torsions

START = Path(__file__).resolve().parent.parent / "alanine_dipeptide" / "c7eq.extxyz"
PHI_PSI = [(4, 6, 8, 14), (6, 8, 14, 16)]
EVERY = 20  # steps between frames
MD = {"temperature": 300.0, "timestep": 0.5, "damping": 0.51, "frames_every": EVERY}
BIAS = {
    "unbiased": {"force": 0.0},
    "biased": {"force": 0.25, "species": {"H": 0.0}, "window": 25, "every": 4},
}
THRESHOLD = 1.5  # eV/Å


def visited(model: Path, bias: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    """Angles of all frames of ``steps`` steps, rad, largest uncertainties, and how often MD had to begin again."""
    start = ase.io.read(START)
    found: dict[str, Any] = {"angles": [], "max_u": [], "begun": 0, "ms": []}
    while steps > 0:
        trajectory = ubmd.biased_md(
            model, start, MD | {"steps": steps}, bias, threshold=THRESHOLD, seed=1000 * seed + found["begun"]
        )
        found["angles"] += torsions(trajectory.frames, PHI_PSI).tolist()
        found["max_u"] += trajectory.max_u.tolist()
        found["begun"] += 1
        found["ms"].append(trajectory.result.ms_per_step)
        steps -= max(trajectory.result.steps, EVERY)
    return found


def table(rows: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """One row for each model and kind of MD."""
    lines = ["| MD | coverage | median of max u_i, eV/Å | times begun | ms per step |", "|---|---|---|---|---|"]
    for name, runs in rows.items():
        covered = [coverage(run["angles"]) for run in runs]
        median = np.median(np.concatenate([run["max_u"] for run in runs]))
        begun = ", ".join(str(run["begun"]) for run in runs)
        ms = np.median(np.concatenate([run["ms"] for run in runs]))
        spread = f"{np.mean(covered):.3f} ± {np.std(covered, ddof=min(1, len(runs) - 1)):.3f}"
        lines.append(f"| {name} | {spread} | {median:.2f} | {begun} | {ms:.1f} |")
    return "\n".join([*lines, f"{steps} steps each; ±: standard deviation over seeds."])


def figure(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Coverage against steps, and the frames of all seeds in the (phi, psi) square."""
    fig, axes = plt.subplots(1, 1 + len(rows), figsize=(3.6 * (1 + len(rows)), 3.6), layout="constrained")
    for number, (name, runs) in enumerate(rows.items()):
        for seed, run in enumerate(runs):
            growth = coverage_growth(run["angles"])
            label = name if seed == 0 else None
            axes[0].plot(0.001 * EVERY * np.arange(1, len(growth) + 1), growth, color=f"C{number}", label=label)
        angles = np.degrees(np.concatenate([run["angles"] for run in runs]))
        axes[number + 1].plot(*angles.T, ".", markersize=2, color=f"C{number}")
        axes[number + 1].set(title=name, xlabel="φ, degrees", ylabel="ψ, degrees", xlim=(-180, 180), ylim=(-180, 180))
        axes[number + 1].set(xticks=[-180, 0, 180], yticks=[-180, 0, 180], aspect="equal")
    axes[0].set(xlabel="MD steps / 1000", ylabel="coverage of (φ, ψ)", ylim=(0, None))
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=model.pt")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("coverage_run"))
    given = parser.parse_args()
    models = dict(words.split("=", 1) for words in given.models)
    given.out.mkdir(exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {f"{name}, {way}": [] for name in models for way in BIAS}
    for seed in given.seeds:
        for name, model in models.items():
            for way, bias in BIAS.items():
                file = given.out / f"{name}_{way}_{given.steps}_seed{seed}.json"
                if not file.exists():
                    write_json(file, visited(Path(model), bias, given.steps, seed))
                rows[f"{name}, {way}"].append(json.loads(file.read_text()))
                print(f"{file.name}: {coverage(rows[f'{name}, {way}'][-1]['angles']):.3f}", flush=True)
    print(table(rows, given.steps))
    figure(rows, given.out / "coverage.png")


if __name__ == "__main__":
    main()
