"""Has a potential of a crystal minima below the crystal that are not there? Frames of a run, quenched in LAMMPS.
python minima.py MODEL FRAMES.dump ... [--second MODEL] [--frames 20] [--threshold 5] [--out minima] [--help]

FRAMES.dump is that of a run of stability.py, whose box.data beside it is the ideal crystal. Evenly chosen frames are
relaxed in MODEL, in the same box; the energy of a minimum is that per atom above the unrelaxed ideal crystal in the
same model. If it is more than --threshold meV/atom below the crystal, or if the relaxation goes down until the
displacement limit of a force-constant potential ends it, the structure is relaxed further in the model --second, e.g. a
network trained on the same labels. The minimum is false unless the second one is that far below the crystal, too.

Only minima that the run came near to are found. Writes into --out: minima.md (table), minima.json, and the files of
LAMMPS for each relaxation.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from ase.io import read
from stability import GUARD, data_file, error_of, run_lammps

from ubmd.potentials.file import load_model
from ubmd.potentials.record import precision_for

EVERY = 10  # iterations between rows of the log, and between frames
SAME_CELL = 0.01  # Å
LIMIT = "displacement limit"
FALSE, BOTH = "false", "in both models"

SCRIPT = """\
units metal
atom_style atomic
read_data box.data
pair_style ubmd precision {precision}
pair_coeff * * {model} {elements}
thermo {every}
thermo_style custom step pe fnorm
thermo_modify flush yes lost error
thermo_modify format float %.12g
dump way all custom {every} way.dump id type x y z
dump_modify way sort id format float %.10g
min_style cg
minimize 0 {force} {steps} {evaluations}
"""


@dataclass(frozen=True, eq=False)
class Quench:
    """A relaxation: eV before and after, where it ended, and why it ended early (empty if it did not)."""

    before: float
    after: float
    end: Atoms
    stopped: str


@dataclass(frozen=True, eq=False)
class Potential:
    """A model file, and the energy of the ideal crystal in it before and after relaxation, eV."""

    path: Path
    elements: list[str]
    ideal: float
    relaxed: float

    def above(self, energy: float, atoms: int) -> float:
        """Energy above the ideal crystal, meV/atom."""
        return 1000.0 * (energy - self.ideal) / atoms


def quench(atoms: Atoms, model: Path, elements: Sequence[str], folder: Path, arguments: argparse.Namespace) -> Quench:
    """Relax the positions in LAMMPS; at an error, the last state before it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("way.dump", "log.lammps"):
        (folder / name).unlink(missing_ok=True)
    (folder / "box.data").write_text(data_file(atoms, elements), encoding="utf-8")
    text = SCRIPT.format(
        precision=precision_for(model, "double"),
        model=model.resolve(),
        elements=" ".join(elements),
        every=EVERY,
        force=arguments.force,
        steps=arguments.steps,
        evaluations=10 * arguments.steps,
    )
    (folder / "in.run").write_text(text, encoding="utf-8")
    said = run_lammps(folder)
    log = (folder / "log.lammps").read_text(encoding="utf-8") if (folder / "log.lammps").exists() else ""
    energies = re.findall(r"^\s*\d+\s+(-?\d\S*)\s+\d\S*\s*$", log, re.MULTILINE)
    stopped = error_of(log) or said
    if not energies:
        return Quench(float("nan"), float("nan"), atoms, stopped or "LAMMPS wrote no energy")
    if not stopped and re.search(r"Stopping criterion = max", log):
        stopped = "not converged"
    end = read(folder / "way.dump", index=-1, format="lammps-dump-text", specorder=elements)
    return Quench(float(energies[0]), float(energies[-1]), placed(end.positions, atoms), stopped)


def placed(positions: np.ndarray, ideal: Atoms) -> Atoms:
    """The structure with these positions, each atom in the image that is nearest to where ``ideal`` has it."""
    atoms = ideal.copy()
    atoms.positions += find_mic(positions - ideal.positions, ideal.cell)[0]
    return atoms


def displacement(atoms: Atoms, ideal: Atoms) -> float:
    """Largest distance of an atom from its place in the ideal crystal, without shift of the whole, Å."""
    moved = find_mic(atoms.positions - ideal.positions, ideal.cell)[0]
    return float(np.linalg.norm(moved - moved.mean(axis=0), axis=1).max())


def prepare(path: Path, ideal: Atoms, folder: Path, arguments: argparse.Namespace) -> Potential:
    """A model, and the ideal crystal in it."""
    elements = json.loads(load_model(path).metadata())["elements"]
    missing = sorted(set(ideal.symbols) - set(elements))
    if missing:
        sys.exit(f"{path} does not know {', '.join(missing)}, which the crystal contains.")
    found = quench(ideal, path, elements, folder, arguments)
    if np.isnan(found.before):
        sys.exit(f"{path}: the ideal crystal has no energy: {found.stopped}")
    return Potential(path, elements, found.before, found.after)


def frames_of(dump: Path, ideal: Atoms, count: int) -> list[tuple[int, Atoms]]:
    """Evenly chosen frames (number from 0, structure) of a run; the first one, the ideal crystal, is not among them."""
    frames = read(dump, index=":", format="lammps-dump-text", specorder=sorted(set(ideal.symbols)))
    if len(frames) < 2:
        sys.exit(f"{dump} has {len(frames)} frames; at least 2 are needed, the first of which is the ideal crystal.")
    if any(len(frame) != len(ideal) or np.abs(frame.cell - ideal.cell).max() > SAME_CELL for frame in frames):
        sys.exit(f"{dump}: number of atoms or cell differ from those of box.data beside it.")
    chosen = np.unique(np.linspace(1, len(frames) - 1, count).round().astype(int))
    return [(int(k), placed(frames[k].positions, ideal)) for k in chosen]


def examine(dump: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The minima that a run's frames relax to, and the ideal crystal in the models."""
    data = dump.with_name("box.data")
    for path in (dump, data):
        if not path.is_file():
            sys.exit(f"There is no file {path}: minima.py takes frames.dump and box.data of a run of stability.py.")
    ideal = read(data, format="lammps-data", atom_style="atomic")
    name = dump.resolve().parent.name
    folder = arguments.out / name
    first = prepare(arguments.model, ideal, folder / "ideal", arguments)
    second = prepare(arguments.second, ideal, folder / "ideal_second", arguments) if arguments.second else None
    minima = []
    for number, atoms in frames_of(dump, ideal, arguments.frames):
        minima.append(minimum(atoms, ideal, (first, second), folder / f"frame_{number}", arguments) | {"frame": number})
    drops = [p.above(p.relaxed, len(ideal)) for p in (first, second) if p is not None]
    return {"name": name, "atoms": len(ideal), "ideal_relaxes": drops, "minima": minima}


def minimum(
    atoms: Atoms,
    ideal: Atoms,
    models: tuple[Potential, Potential | None],
    folder: Path,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Where a frame relaxes to, and whether a minimum below the crystal is there in the second model, too."""
    first, second = models
    found = quench(atoms, first.path, first.elements, folder, arguments)
    energy = first.above(found.after, len(ideal))
    row = {
        "energy": energy,
        "displacement": displacement(found.end, ideal),
        "stopped": short(found.stopped),
        "second": None,
        "verdict": "",
    }
    if not (energy < -arguments.threshold or row["stopped"] == LIMIT):  # nan, too
        row["energy"] = energy if np.isfinite(energy) else None
        return row | {"verdict": f"unknown ({row['stopped']})" if row["stopped"] else ""}
    if second is None:
        return row | {"verdict": "unknown (no second model)"}
    checked = quench(found.end, second.path, second.elements, folder / "second", arguments)
    other, reason = second.above(checked.after, len(ideal)), short(checked.stopped)
    if not np.isfinite(other):
        return row | {"verdict": f"unknown (second model: {reason})"}
    if other < -arguments.threshold:
        return row | {"second": other, "verdict": BOTH}
    return row | {"second": other, "verdict": f"unknown (second model: {reason})" if reason else FALSE}


def short(stopped: str) -> str:
    """Why a relaxation ended early, in the words of the table."""
    return LIMIT if GUARD in stopped else stopped


def table(run: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Markdown of one run: a row per frame, and a sentence."""
    lines = [
        f"**{run['name']}**: {run['atoms']} atoms, minima in {arguments.model.name}, energies above the ideal crystal.",
        "",
        "| frame | energy (meV/atom) | largest displacement (Å) | ended early | second model (meV/atom) | verdict |",
        "| --- " * 6 + "|",
    ]
    for row in run["minima"]:
        energy, second = (("-" if row[key] is None else f"{row[key]:z.2f}") for key in ("energy", "second"))
        lines.append(
            f"| {row['frame']} | {energy} | {row['displacement']:.2f} | {row['stopped'] or '-'} | {second} | "
            f"{row['verdict'] or '-'} |"
        )
    return "\n".join([*lines, "", summary(run, arguments), ""])


def summary(run: dict[str, Any], arguments: argparse.Namespace) -> str:
    """How many minima are below the crystal and how many of them are false; what to know of the ideal crystal."""
    verdicts = [row["verdict"] for row in run["minima"]]
    energies = [row["energy"] for row in run["minima"] if row["energy"] is not None]
    unknown = sum(verdict.startswith("unknown") for verdict in verdicts)
    text = (
        f"{run['name']}: frames relaxed: {len(verdicts)}; {verdicts.count('')} to minima at most "
        f"{arguments.threshold:g} meV/atom below the ideal crystal, {verdicts.count(FALSE)} to false ones, "
        f"{verdicts.count(BOTH)} to ones of both models, {unknown} unknown; lowest "
        f"{min(energies, default=float('nan')):z.2f} meV/atom."
    )
    for path, drop in zip((arguments.model, arguments.second), run["ideal_relaxes"], strict=False):
        text += f" The ideal crystal relaxes to {drop:z.2f} meV/atom in {path.name}."
        if drop < -arguments.threshold:
            text += " It is no minimum there, so that the verdicts are uncertain."
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model file of the run")
    parser.add_argument("dumps", type=Path, nargs="+", help="frames.dump of runs of stability.py")
    parser.add_argument("--second", type=Path, help="model file that minima below the crystal are looked at with")
    parser.add_argument("--frames", type=int, default=20, help="evenly chosen, of each run")
    parser.add_argument("--threshold", type=float, default=5.0, help="meV/atom below the ideal crystal")
    parser.add_argument("--force", type=float, default=0.01, help="a relaxation ends at this norm of all forces, eV/Å")
    parser.add_argument("--steps", type=int, default=5000, help="largest number of iterations of a relaxation")
    parser.add_argument("--out", type=Path, default=Path("minima"))
    arguments = parser.parse_args()
    runs = [examine(dump, arguments) for dump in arguments.dumps]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "minima.json").write_text(json.dumps(runs, indent=1), encoding="utf-8")
    text = "\n".join(table(run, arguments) for run in runs)
    (arguments.out / "minima.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
