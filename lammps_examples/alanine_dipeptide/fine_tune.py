"""Fine-tuning against starting anew: a model of one level of theory learns another one from few labels.

Usage: python fine_tune.py RUN_DIR [--labels 8 16 32] [--seeds 3] [--folder fine_tune]

RUN_DIR is a finished run of quickstart.toml (ff19SB). Its test frames (1200 K) are labelled by GFN2-xTB (pip install
'ubmd[tblite]'): half of them are a test set, from the others each training draws its labels. `ubmd train` and
`ubmd train --from RUN_DIR` then train on the same labels for the same number of epochs.
"""

import argparse
import json
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import tomli_w
from ase import Atoms

from ubmd.data.extxyz import write_structures
from ubmd.data.state import bare
from ubmd.data.structures import read_structures
from ubmd.references import label
from ubmd.settings import ReferenceSettings

EPOCHS = 400
REFERENCE = ReferenceSettings(calculator="tblite", arguments={"method": "GFN2-xTB"}, force_limit=50.0)


def labels(run_dir: Path, folder: Path) -> list[Atoms]:
    """The test frames of the run with labels of GFN2-xTB, kept in a file."""
    path = folder / "gfn2.extxyz"
    if not path.exists():
        frames = read_structures(run_dir / "test.extxyz")
        write_structures(path, [label(bare(atoms), REFERENCE, Path()) for atoms in frames])
    return read_structures(path, labelled=True)


def errors(settings: Path, test: Path, *options: str) -> tuple[float, float]:
    """RMSE of energies (meV/atom) and forces (eV/Å) after `ubmd train`."""
    subprocess.run(["ubmd", "train", str(settings), *options], check=True, stdout=subprocess.DEVNULL)
    model = Path(tomllib.loads(settings.read_text())["output_dir"]) / "model.pt"
    done = subprocess.run(["ubmd", "eval", str(model), str(test), "--json"], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return found["energy_rmse_meV_per_atom"], found["force_rmse_eV_per_A"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--labels", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("fine_tune"))
    arguments = parser.parse_args()
    folder, run_dir = arguments.folder.absolute(), arguments.run_dir.absolute()
    folder.mkdir(exist_ok=True)
    structures = labels(run_dir, folder)
    write_structures(folder / "test.extxyz", structures[1::2])
    model = tomllib.loads((run_dir / "settings.toml").read_text())["model"]
    ways = {"anew": (), "fine-tuned": ("--from", str(run_dir))}
    print(f"{'labels':>6} {'training':>12} {'energy, meV/atom':>18} {'forces, eV/Å':>16}   ({arguments.seeds} seeds)")
    for count in arguments.labels:
        for way, options in ways.items():
            found = []
            for seed in range(arguments.seeds):
                chosen = np.random.default_rng(seed).choice(len(structures) // 2, count, replace=False)
                path = folder / f"{count}_{seed}_{way}"
                path.mkdir(exist_ok=True)
                write_structures(path / "train.extxyz", [structures[2 * k] for k in chosen])
                table = {"training_file": "train.extxyz", "output_dir": str(path / "out"), "seed": seed, "model": model}
                table |= {"training": {"epochs": EPOCHS, "threads": 1}, "validation_share": 0.125}
                (path / "train.toml").write_text(tomli_w.dumps(table))
                found.append(errors(path / "train.toml", folder / "test.extxyz", *options))
            (energy, force), (spread_e, spread_f) = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)
            print(f"{count:6} {way:>12} {energy:10.1f} ± {spread_e:5.1f} {force:8.3f} ± {spread_f:.3f}", flush=True)


if __name__ == "__main__":
    main()
