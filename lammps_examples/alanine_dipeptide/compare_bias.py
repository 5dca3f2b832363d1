"""Does the bias help? python compare_bias.py [--seeds 0 1 2] [--folder compare_run] [--set KEY=VALUE ...]

Runs quickstart.toml (biased) and quickstart_unbiased.toml for each seed, one after the other, with one common test
set; runs that are there already are not repeated, and an interrupted one goes on where it was. Then compares, at equal
numbers of MD steps (of all replicas and iterations together), how much of the (phi, psi) square the stored frames
cover, and at the end of the runs the errors on the test set. Writes into the folder:

  comparison.html, .md, .json            mean ± standard deviation over the seeds (as `ubmd compare` does it)
  coverage.png, learning_curves.png ...  the pictures in it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from ubmd.analysis import compare
from ubmd.settings import RunSettings, load_settings

HERE = Path(__file__).resolve().parent
SETTINGS = {"biased": HERE / "quickstart.toml", "unbiased": HERE / "quickstart_unbiased.toml"}


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


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("compare_run"))
    parser.add_argument("--set", dest="changes", action="append", default=[], help="change a setting in all runs")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = [run(name, seed, folder, options.changes) for name in SETTINGS for seed in options.seeds]
    compare(runs, folder, list(SETTINGS))
    print((folder / "comparison.md").read_text())


if __name__ == "__main__":
    main()
