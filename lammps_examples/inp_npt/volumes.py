"""Which volumes does NPT reach, with and without a bias stress?
python volumes.py [--seeds 0 1 2] [--rounds 3] [--steps 3000] [--bias 0.25] [--pressure 10] [--folder volumes_run]

Needs inp.data and inp_run of make_model.py in the current folder. Both arms, biased and unbiased, start from the same
model and go through the same rounds: in.npt for every seed, with the same limit of steps and the same `stop`; then the
reference labels frames of these runs, chosen by max_det, and training goes on with them. Nothing else is labelled.
Finished parts are found in the folder and not repeated. Writes into the folder:

  volumes.txt, volumes.json   mean ± standard deviation over the seeds; the most compressed frames, labelled
  volumes.png                 volume against time
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.io import read
from make_model import POTENTIAL, REFERENCE

from ubmd.calculator import Model
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.split import split
from ubmd.data.structures import read_structures
from ubmd.errors import LabelError
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.trainer import train
from ubmd.references import label
from ubmd.selection import select
from ubmd.settings import TrainSettings

HERE = Path(__file__).resolve().parent
DATASET = Path("inp_run/dataset.extxyz").resolve()
TIMESTEP = 0.002  # ps, as in in.npt
TEMPERATURE = 600.0  # K, as in in.npt
COLOURS = {"biased": "tab:red", "unbiased": "tab:blue"}


@dataclass(frozen=True)
class Plan:
    """What all runs have in common; bias is that of the biased arm, pressure in GPa."""

    seeds: list[int]
    rounds: int
    steps: int
    bias: float
    pressure: float
    limit: float  # eV/Å, `stop` of both arms
    labels: int  # per round
    epochs: int  # of a warm start


# ------------------------------------------------------------------------------------------------ LAMMPS


def lammps(script: str, folder: Path, **variables: Any) -> None:
    """Run a script of this example in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).with_name("lmp")), "-in", str(HERE / script), "-log", "none", "-screen", "none"]
    for name, value in {"data": DATASET.parents[1] / "inp.data", **variables}.items():
        command += ["-var", name, str(value)]
    subprocess.run(command, cwd=folder, check=True)


def run_seeds(folder: Path, model: Path, bias: float, plan: Plan) -> None:
    """in.npt for every seed, unless it is there."""
    for seed in plan.seeds:
        if not (folder / f"seed{seed}.done").exists():
            options = {"bias": bias, "pressure": plan.pressure, "steps": plan.steps, "limit": plan.limit}
            lammps("in.npt", folder, model=model.resolve(), seed=seed + 1, name=f"seed{seed}", **options)
            (folder / f"seed{seed}.done").touch()


def volumes(path: Path) -> np.ndarray:
    """[time in ps, volume in Å^3/atom] of a record of `fix print`, one row per 10 steps."""
    rows = np.loadtxt(path, ndmin=2)
    return np.column_stack([rows[:, 0] * TIMESTEP, rows[:, 1]])


def reference_path(folder: Path) -> tuple[np.ndarray, list[Atoms]]:
    """Volumes and labelled frames of in.reference: through the collapse and back."""
    if not (folder / "reference.extxyz").exists():
        lammps("in.reference", folder, potential=POTENTIAL)
        frames = read(folder / "reference.dump", ":", format="lammps-dump-text")
        write_structures(folder / "reference.extxyz", [label(atoms, REFERENCE, Path()) for atoms in frames])
    return volumes(folder / "reference.txt"), read_structures(folder / "reference.extxyz")


# ------------------------------------------------------------------------------------------------ one arm


def explore(name: str, plan: Plan, folder: Path) -> Path:
    """All rounds of one arm; returns the last model."""
    model, weights = DATASET.with_name("model.pt"), DATASET.with_name("weights.pt")
    settings = TrainSettings.model_validate(Model(model).metadata["settings"])  # those that make_model.py used
    training, calibration = split(read_structures(DATASET), settings.validation_share, settings.seed)
    for number in range(plan.rounds):
        here = folder / name / f"round{number}"
        run_seeds(here, model, plan.bias if name == "biased" else 0.0, plan)
        if not (here / "labelled.extxyz").exists():
            write_structures(here / "labelled.extxyz", label_frames(here, model, training, plan))
        new = read_structures(here / "labelled.extxyz")
        held_out = len(new) // 6  # once training, always training: only new frames are split
        training, calibration = training + new[held_out:], calibration + new[:held_out]
        if not (here / "model.pt").exists():
            result = train(
                settings.model, settings.training, training, calibration, here, number, weights, plan.epochs, fresh=True
            )
            provenance = {"training_set_hash": dataset_hash(training)}
            export_model(result.model, training, calibration, settings.uncertainty, here / "model.pt", provenance)
        model, weights = here / "model.pt", here / "weights.pt"
        print(f"{name}, round {number}: {len(training)} training structures", flush=True)
    return model


def label_frames(folder: Path, model: Path, training: list[Atoms], plan: Plan) -> list[Atoms]:
    """Labels for the saved frames that together say most (those that the reference rejects are dropped)."""
    pool = [atoms for seed in plan.seeds for atoms in read(folder / f"seed{seed}.extxyz", ":")]
    evaluator = Model(model)
    candidates, known = evaluator.predict(pool), evaluator.predict(training)
    features, u = np.array([p.feature for p in candidates]), np.array([p.u for p in candidates])
    rng = np.random.default_rng(0)
    chosen = select("max_det", features, [p.feature for p in known], u, plan.labels, 1e-4, 0.0, 1e-3, rng)
    rng.shuffle(chosen)  # the first ones are held back for the calibration: not the most telling ones
    labelled = []
    for index in chosen:
        try:
            labelled.append(label(pool[index], REFERENCE, Path()))
        except LabelError as error:
            print(f"{folder}: {error}", flush=True)
    return labelled


def mean_pressure(path: Path, model: Path) -> float:
    """Mean of the model's own pressure over the saved frames, GPa: without the bias stress, which the barostat adds."""
    frames = read(path, ":")
    stress = np.array([p.stress for p in Model(model).predict(frames)])
    kinetic = np.array([len(atoms) * units.kB * TEMPERATURE / atoms.get_volume() for atoms in frames])
    return float((kinetic - stress[:, :3].mean(axis=1)).mean() / units.GPa)


def most_compressed(path: Path, model: Path) -> dict[str, float]:
    """The saved frame with the smallest volume: what the reference and the model say about it."""
    atoms = min(read(path, ":"), key=lambda frame: frame.get_volume())
    predicted = Model(model).predict_one(atoms)
    result = {"volume": atoms.get_volume() / len(atoms), "max_u": float(predicted.atomic_u.max())}
    try:
        labelled = label(atoms, REFERENCE, Path())
    except LabelError as error:
        print(f"{path}: {error}", flush=True)
        return result
    return result | {
        "pressure": -labelled.get_stress()[:3].mean() / units.GPa,
        "largest_force": float(np.linalg.norm(labelled.get_forces(), axis=1).max()),
        "energy_error": 1000 * (predicted.energy - labelled.get_potential_energy()) / len(atoms),
        "force_error": float(np.sqrt(np.mean((predicted.forces - labelled.get_forces()) ** 2))),
        "pressure_error": -(predicted.stress - labelled.get_stress())[:3].mean() / units.GPa,
    }


# ------------------------------------------------------------------------------------------------ comparison


def summarise(folder: Path, plan: Plan) -> dict[str, Any]:
    """Everything that the table and the picture show."""
    path, test = reference_path(folder / "reference")
    known = [atoms.get_volume() / len(atoms) for atoms in read_structures(DATASET)]
    dense = float(path[path[:, 0] >= path[-1, 0] - 6.0, 1].mean())  # of the last 6 ps
    arms = {name: [arm_round(folder, name, n, plan, min(known), dense) for n in range(plan.rounds)] for name in COLOURS}
    return {
        "plan": asdict(plan),
        "known": [min(known), max(known)],
        "dense": dense,
        "arms": arms,
        "test": {name: errors(model, test) for name, model in last_models(folder, plan).items()},
    }


def last_models(folder: Path, plan: Plan) -> dict[str, Path]:
    """The first model and the last one of each arm."""
    first = {"first model": DATASET.with_name("model.pt")}
    return first | {name: folder / name / f"round{plan.rounds - 1}" / "model.pt" for name in COLOURS}


def arm_round(folder: Path, name: str, number: int, plan: Plan, known: float, dense: float) -> list[dict[str, Any]]:
    """One entry per seed. `reached`: how far it went from the smallest known volume (0) to the dense phase (1)."""
    here = folder / name / f"round{number}"
    model = DATASET.with_name("model.pt") if number == 0 else folder / name / f"round{number - 1}" / "model.pt"
    entries = []
    for seed in plan.seeds:
        curve = volumes(here / f"seed{seed}.txt")
        smallest, largest = float(curve[:, 1].min()), float(curve[:, 1].max())
        entries.append(
            {
                "seed": seed,
                "steps": round(float(curve[-1, 0]) / TIMESTEP),
                "smallest": smallest,
                "largest": largest,
                "reached": float(np.clip((known - smallest) / (known - dense), 0, 1)),
                "pressure": mean_pressure(here / f"seed{seed}.extxyz", model),
                "frame": most_compressed(here / f"seed{seed}.extxyz", model),
            }
        )
    return entries


def errors(model: Path, test: list[Atoms]) -> dict[str, list[float]]:
    """RMSE of energy (meV/atom), forces (eV/Å) and pressure (GPa) on the zinc-blende and the dense part of the path."""
    predictions = Model(model).predict(test)
    dense = np.array([atoms.get_volume() / len(atoms) for atoms in test]) < 21.0
    energy = [1000 * (p.energy - a.get_potential_energy()) / len(a) for p, a in zip(predictions, test, strict=True)]
    force = [np.mean((p.forces - a.get_forces()) ** 2) ** 0.5 for p, a in zip(predictions, test, strict=True)]
    stress = [(p.stress - a.get_stress())[:3].mean() / units.GPa for p, a in zip(predictions, test, strict=True)]
    rows = np.array([energy, force, stress])
    parts = {"zinc blende": ~dense, "dense": dense}
    return {part: np.sqrt((rows[:, mask] ** 2).mean(axis=1)).tolist() for part, mask in parts.items()}


def table(result: dict[str, Any]) -> str:
    """The comparison as text: mean ± standard deviation over the seeds."""
    plan, known = result["plan"], result["known"]
    lines = [
        f"InP, 64 atoms, NPT at 600 K and {plan['pressure']:g} GPa, at most {plan['steps']} steps of 2 fs, ends when",
        f"an atom's uncertainty passes {plan['limit']:g} eV/Å; bias stress {plan['bias']:g} or none; "
        f"seeds {', '.join(map(str, plan['seeds']))}; mean ± standard deviation",
        f"volumes in the first training set: {known[0]:.2f} to {known[1]:.2f} Å^3/atom (zinc blende); "
        f"dense phase of the reference at 10 GPa: {result['dense']:.2f}",
        "",
        f"{'round':6s}{'arm':10s}{'steps':>12s}{'smallest V':>15s}{'largest V':>15s}{'new range':>15s}{'mean p':>13s}",
        f"{'':28s}{'Å^3/atom':>15s}{'Å^3/atom':>15s}{'share':>15s}{'GPa':>13s}",
    ]
    for number in range(plan["rounds"]):
        for name, rounds in result["arms"].items():
            cells = [mean(rounds[number], key, digits) for key, digits in FIELDS]
            lines.append(
                f"{number:<6d}{name:10s}{cells[0]:>12s}{cells[1]:>15s}{cells[2]:>15s}{cells[3]:>15s}{cells[4]:>13s}"
            )
    lines += ["", *frame_table(result), "", *test_table(result), ""]
    return "\n".join(lines)


FIELDS = (("steps", 0), ("smallest", 2), ("largest", 2), ("reached", 2), ("pressure", 1))


def mean(entries: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [entry[key] for entry in entries]
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def frame_table(result: dict[str, Any]) -> list[str]:
    """The most compressed saved frame of every biased run, labelled: is it physical, is the model right?"""
    lines = [
        "most compressed saved frame of each biased run: the reference, and the model minus the reference",
        f"{'round':6s}{'seed':5s}{'V':>7s}{'p':>8s}{'max |F|':>9s}{'dE':>13s}{'RMSE F':>8s}{'dp':>7s}{'max u':>8s}",
        f"{'':11s}{'Å^3':>7s}{'GPa':>8s}{'eV/Å':>9s}{'meV/atom':>13s}{'eV/Å':>8s}{'GPa':>7s}{'eV/Å':>8s}",
    ]
    for number, entries in enumerate(result["arms"]["biased"]):
        for entry in entries:
            frame = entry["frame"]
            start = f"{number:<6d}{entry['seed']:<5d}{frame['volume']:7.2f}"
            if "pressure" not in frame:
                lines.append(f"{start}  rejected by the reference")
                continue
            lines.append(
                f"{start}{frame['pressure']:8.1f}{frame['largest_force']:9.1f}{frame['energy_error']:13.1f}"
                f"{frame['force_error']:8.2f}{frame['pressure_error']:7.1f}{frame['max_u']:8.2f}"
            )
    return lines


def test_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "RMSE on a reference trajectory through the collapse at 20 GPa and back to 10 GPa (in.reference)",
        f"{'':14s}{'V > 21: E':>12s}{'F':>8s}{'p':>8s}{'V < 21: E':>14s}{'F':>8s}{'p':>8s}   meV/atom, eV/Å, GPa",
    ]
    for name, parts in result["test"].items():
        (a, b, c), (d, e, f) = parts["zinc blende"], parts["dense"]
        lines.append(f"{name:14s}{a:12.1f}{b:8.3f}{c:8.2f}{d:14.1f}{e:8.3f}{f:8.2f}")
    return lines


def draw(folder: Path, result: dict[str, Any]) -> None:
    """Volume against time: one panel per round, both arms, all seeds."""
    from matplotlib.figure import Figure

    rounds = result["plan"]["rounds"]
    figure = Figure(figsize=(3.6 * rounds + 0.8, 3.6), layout="constrained")
    axes = figure.subplots(1, rounds, sharey=True, squeeze=False)[0]
    for number, axis in enumerate(axes):
        axis.axhspan(*result["known"], color="0.9", label="first training set")
        axis.axhline(result["dense"], color="0.4", linestyle="--", label="dense phase, reference")
        for name, colour in COLOURS.items():
            for k, seed in enumerate(result["plan"]["seeds"]):
                curve = volumes(folder / name / f"round{number}" / f"seed{seed}.txt")
                text = {"biased": "bias stress", "unbiased": "no bias"}[name] if k == 0 else None
                axis.plot(*curve.T, color=colour, linewidth=0.7, label=text)
                axis.plot(*curve[-1], "o", color=colour, markersize=3)
        axis.set(xlabel="time (ps)", title=f"round {number}")
    axes[0].set_ylabel("volume (Å³/atom)")
    axes[0].legend(fontsize=7, loc="lower left")
    figure.savefig(folder / "volumes.png", dpi=110)


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--bias", type=float, default=0.25, help="TAU_S of the biased arm")
    parser.add_argument("--pressure", type=float, default=10.0, help="GPa")
    parser.add_argument("--limit", type=float, default=3.0, help="eV/Å, `stop` of both arms")
    parser.add_argument("--labels", type=int, default=24, help="new labels per arm and round")
    parser.add_argument("--epochs", type=int, default=60, help="of each further training")
    parser.add_argument("--folder", type=Path, default=Path("volumes_run"))
    options = vars(parser.parse_args())
    folder = options.pop("folder").resolve()
    plan = Plan(**options)
    with ProcessPoolExecutor(len(COLOURS), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(explore, plan=plan, folder=folder), COLOURS))
    result = summarise(folder, plan)
    text = table(result)
    (folder / "volumes.txt").write_text(text)
    (folder / "volumes.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(folder, result)
    print(text)


if __name__ == "__main__":
    main()
