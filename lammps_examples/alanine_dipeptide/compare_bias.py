"""Does the bias help? python compare_bias.py [--seeds 0 1 2] [--folder compare_run] [--set KEY=VALUE ...]

Runs quickstart.toml (biased) and quickstart_unbiased.toml for each seed, one after the other, with one common test
set; runs that are there already are not repeated, and an interrupted one goes on where it was. Then compares, at equal
numbers of MD steps (of all replicas and iterations together), how much of the (phi, psi) square the stored frames
cover, and at the end of the runs the errors on the test set. Writes into the folder:

  comparison.txt, comparison.json   mean ± standard deviation over the seeds
  coverage.png                      coverage against MD steps
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ubmd.analysis import coverage_figure, read_frames
from ubmd.settings import RunSettings, load_settings

HERE = Path(__file__).resolve().parent
SETTINGS = {"biased": HERE / "quickstart.toml", "unbiased": HERE / "quickstart_unbiased.toml"}
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the steps that every run reached


def run(name: str, seed: int, folder: Path, changes: list[str]) -> Path:
    """One run, unless it is finished; returns its folder."""
    run_dir = folder / f"{name}_seed{seed}"
    overrides = [
        f"seed={seed}",
        f"run_dir={json.dumps(str(run_dir))}",
        f"test.file={json.dumps(str(folder / 'test_1200K.extxyz'))}",
        *changes,
    ]
    if not is_finished(run_dir, load_settings(SETTINGS[name], RunSettings, overrides)):
        print(f"--- {name}, seed {seed}", flush=True)
        ubmd = Path(sys.executable).with_name("ubmd")
        options = [word for override in overrides for word in ("--set", override)]
        subprocess.run([str(ubmd), "run", str(SETTINGS[name]), *options], check=True)
    return run_dir


def is_finished(run_dir: Path, settings: RunSettings) -> bool:
    """Whether the last model of the run has seen all labels."""
    path = run_dir / "history.json"
    return path.exists() and json.loads(path.read_text())[-1]["labels"] >= settings.loop.labels


def summarise(runs: dict[str, list[Path]]) -> dict[str, Any]:
    """Coverage at equal MD steps and final errors, each as {name: [value per seed]}."""
    torsions = load_settings(SETTINGS["biased"], RunSettings).variables.torsions.values()
    curves = {
        name: [read_frames(path).coverage_curve(list(torsions)) for path in paths] for name, paths in runs.items()
    }
    common = min(int(steps[-1]) for group in curves.values() for steps, _ in group)
    marks = [round(share * common) for share in SHARES]
    last = {
        name: [json.loads((path / "history.json").read_text())[-1] for path in paths] for name, paths in runs.items()
    }
    return {
        "curves": curves,
        "md_steps": marks,
        "coverage": {
            name: [[float(np.interp(mark, [0, *x], [0.0, *y])) for mark in marks] for x, y in group]
            for name, group in curves.items()
        },
        "final": {
            title: {name: [float(value(entry)) for entry in entries] for name, entries in last.items()}
            for title, value in {
                "labels": lambda entry: entry["labels"],
                "MD steps": lambda entry: entry["md_steps"],
                "coverage at the end": lambda entry: entry["coverage"],
                "energy RMSE, meV/atom": lambda entry: entry["test"]["energy_rmse_mev_per_atom"],
                "force RMSE, eV/Å": lambda entry: entry["test"]["force_rmse"],
            }.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The comparison as text: mean ± standard deviation over the seeds."""
    names = list(result["coverage"])
    lines = ["mean ± standard deviation over the seeds", "", _row("", names)]
    for k, mark in enumerate(result["md_steps"]):
        cells = [_mean([row[k] for row in result["coverage"][name]]) for name in names]
        lines.append(_row(f"coverage after {mark:,} MD steps", cells))
    lines += [_row(title, [_mean(values[name]) for name in names]) for title, values in result["final"].items()]
    return "\n".join([*lines, ""])


def _row(title: str, cells: list[str]) -> str:
    return f"{title:36s}" + "".join(f"{cell:>22s}" for cell in cells)


def _mean(values: list[float]) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    digits = 0 if np.mean(values) >= 100 else 3
    return f"{np.mean(values):,.{digits}f} ± {deviation:,.{digits}f}"


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("compare_run"))
    parser.add_argument("--set", dest="changes", action="append", default=[], help="change a setting in all runs")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = {name: [run(name, seed, folder, options.changes) for seed in options.seeds] for name in SETTINGS}
    result = summarise(runs)
    coverage_figure(result.pop("curves"), folder / "coverage.png", "Alanine dipeptide, 300 K")
    text = table(result)
    (folder / "comparison.txt").write_text(text)
    (folder / "comparison.json").write_text(json.dumps({"seeds": options.seeds, **result}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
