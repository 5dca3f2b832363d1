"""MACE and a Gaussian-moment network side by side: python compare.py [NAME=RUN_DIR,TIMES.json ...]

With runs: measures the model file of every iteration on test_gfn2.extxyz and writes results/NAME.json. TIMES.json is
what processor_time.py has written. Without: prints the table of results/*.json and draws compare.png.
Minutes are processor time until the model of that row existed, without the time in which it was measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import ubmd
from ubmd.analysis.style import BLUE, ORANGE, new_figure, save

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TITLES = {"gmnn": "Gaussian-moment network", "mace": "MACE"}
PARTS = {"train": "training", "md": "MD", "rest": "rest"}  # a label takes 0.03 s: in the rest


def minutes(times: dict[str, dict[str, float]], iteration: int) -> dict[str, float]:
    """Part -> minutes of processor time until the model of this iteration existed."""
    found = dict.fromkeys(PARTS, 0.0)
    for stage, rows in times.items():
        # what an iteration does before its model exists; MD, selection and labels come afterwards
        last = iteration if stage in ("train", "export", "other") else iteration - 1
        seconds = sum(value for number, value in rows.items() if int(number) <= last)
        if stage != "measure":
            found[stage if stage in PARTS else "rest"] += seconds / 60.0
    return found


def measure(folder: Path, times: Path) -> list[dict[str, object]]:
    """One row per iteration: labels, steps, minutes, errors on the test set."""
    rows = []
    for row in json.loads((folder / "history.json").read_text()):
        number = row["iteration"]
        model = folder / "iterations" / f"iter_{number:03d}" / "model.pt"
        errors = ubmd.evaluate(model, HERE / "test_gfn2.extxyz").errors()
        rows.append(
            {
                "iteration": number,
                "labels": row["labels"],
                "md_steps": row["md_steps"],
                "minutes": minutes(json.loads(times.read_text()), number),
                "errors": errors,
            }
        )
        print(folder.name, row["labels"], errors["force_rmse_eV_per_A"], flush=True)
    return rows


def print_table(results: dict[str, list[dict]]) -> None:
    """A Markdown table of all rows."""
    print("| | labels | MD steps | " + " | ".join(PARTS.values()) + " | minutes | E | F | largest | u_i | u |")
    print("|---" * (len(PARTS) + 9) + "|")
    for name, rows in results.items():
        for row in rows:
            errors, parts = row["errors"], row["minutes"]
            values = [
                TITLES.get(name, name),
                f"{row['labels']}",
                f"{row['md_steps']}",
                *(f"{parts[part]:.1f}" for part in PARTS),
                f"{sum(parts.values()):.1f}",
                f"{errors['energy_rmse_meV_per_atom']:.2f}",
                f"{errors['force_rmse_eV_per_A']:.3f}",
                f"{errors['max_force_error_eV_per_A']:.2f}",
                f"{100 * errors['force_share_below_u']:.0f} %",
                f"{100 * errors['energy_share_below_u']:.0f} %",
            ]
            print("| " + " | ".join(values) + " |")


def draw(results: dict[str, list[dict]]) -> None:
    """Errors against labels and against minutes."""
    figure = new_figure(8.0, 5.6)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    columns = {
        "labels": lambda row: row["labels"],
        "processor time (min)": lambda row: sum(row["minutes"].values()),
    }
    errors = {
        "force RMSE (eV/Å)": "force_rmse_eV_per_A",
        "energy RMSE (meV/atom)": "energy_rmse_meV_per_atom",
    }
    ticks = {"labels": (16, 32, 64, 128, 256), "processor time (min)": (0.5, 1, 2, 5, 10, 20)}
    levels = {"force RMSE (eV/Å)": (0.05, 0.1, 0.2), "energy RMSE (meV/atom)": (1, 2, 5, 10)}
    for line, (text, key) in zip(panels, errors.items(), strict=True):
        for axes, (name, column) in zip(line, columns.items(), strict=True):
            for (run, rows), colour, marker in zip(results.items(), (BLUE, ORANGE), "os", strict=False):
                x, y = [column(row) for row in rows], [row["errors"][key] for row in rows]
                axes.plot(x, y, marker + "-", color=colour, ms=4, label=TITLES.get(run, run))
            axes.set(xscale="log", yscale="log")
            for axis, marks in ((axes.xaxis, ticks[name]), (axes.yaxis, levels[text])):
                axis.set_major_locator(FixedLocator(marks))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_locator(NullLocator())
        line[0].set_ylabel(text)
    for axes, name in zip(panels[-1], columns, strict=True):
        axes.set_xlabel(name)
    panels[0, 0].legend(frameon=False)
    save(figure, HERE / "compare.png")


def main() -> None:
    """Measure the given runs, or show what was measured."""
    for word in sys.argv[1:]:
        name, _, files = word.partition("=")
        folder, _, times = files.partition(",")
        if not times:
            raise SystemExit(__doc__)
        RESULTS.mkdir(exist_ok=True)
        rows = measure(Path(folder), Path(times))
        (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    if len(sys.argv) == 1:
        results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in TITLES}
        print_table(results)
        draw(results)


if __name__ == "__main__":
    main()
