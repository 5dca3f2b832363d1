"""Both networks from scratch on the same 64 labels: python same_labels.py [--labels mace] [--python FILE]

Trains each network longer than a loop does, as one would for a final potential, on the labels of a run
(results/NAME_labels.extxyz.gz), and measures it on test_gfn2.extxyz. The models stay in same_labels_run. Adds to
results/same_labels.json, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import resource
import tomllib
from pathlib import Path

import ase.io

import ubmd
from ubmd.settings import RunSettings, load_settings

HERE = Path(__file__).resolve().parent
EPOCHS = {"gmnn": 1000, "mace": 250}  # the loop's first trainings: 300 and 200


def tables(row: str, python: Path) -> dict[str, object]:
    """[model], [training] and [uncertainty] of a row of rows.toml."""
    changes = tomllib.loads((HERE / "rows.toml").read_text())["rows"][row].get("set", [])
    values = load_settings(HERE / "loop.toml", RunSettings, changes).model_dump(mode="json", exclude_defaults=True)
    if row == "mace":
        values["model"]["python"] = str(python.absolute())
    return {name: values[name] for name in ("model", "training", "uncertainty") if name in values}


def seconds() -> float:
    """Processor time of this process and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def main() -> None:
    """Train and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", default="mace", help="of the run that selected them: mace or gmnn")
    parser.add_argument("--python", type=Path, default=HERE / "mace-env/bin/python", help="that has MACE")
    options = parser.parse_args()
    target = HERE / "results/same_labels.json"
    rows = json.loads(target.read_text()) if target.exists() else []
    print("| network | labels selected by | energy, meV/atom | forces, eV/Å | largest | minutes |\n" + "|---" * 6 + "|")
    for row, epochs in EPOCHS.items():
        frames = ase.io.read(HERE / f"results/{options.labels}_labels.extxyz.gz", index=":")
        settings = tables(row, options.python) | {"output_dir": f"same_labels_run/{row}_on_{options.labels}"}
        settings["training"]["epochs"] = epochs
        settings["validation_share"] = 0.2
        begin = seconds()
        model = ubmd.train(frames, settings, progress=False)
        used = (seconds() - begin) / 60.0
        errors = ubmd.evaluate(model, HERE / "test_gfn2.extxyz").errors()
        rows.append({"network": row, "labels_of": options.labels, "minutes": used, "errors": errors})
        print(
            f"| {row} | {options.labels} | {errors['energy_rmse_meV_per_atom']:.2f} | "
            f"{errors['force_rmse_eV_per_A']:.3f} | {errors['max_force_error_eV_per_A']:.2f} | {used:.1f} |",
            flush=True,
        )
        target.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
