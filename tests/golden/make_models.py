"""Make tests/golden/models.tar.xz: model files of every kind, what they say, and a training with a checkpoint.

python tests/golden/make_models.py --folder SCRATCH
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.emt import EMT
from ase.cluster import Octahedron
from ase.io import read, write
from make import HERE, UBMD, Kind, Stop, View, environment, pack, run_until
from said import by_calculator, by_lammps

WITHOUT_OPERATORS = "import ubmd.operators as o; o.available = lambda: False; from ubmd.cli.entry import main; main()"
TRAIN = """training_file = "alloy.extxyz"
validation_file = "valid.extxyz"
output_dir = "alloy"
seed = 2

[model]
cutoff = 4.0
hidden = [16, 16]
n_radial = 2

[training]
epochs = 24
checkpoint_every = 4
threads = 1

[uncertainty]
projections = 16
members = 2
references = 20
"""
CRYSTAL = """training_file = "hot.extxyz"
output_dir = "force_constants"

[crystal]
structure = "copper.extxyz"
cutoffs = {2 = 3.7, 3 = 2.6}
"""
KINDS = ("posterior", "last-layer", "distance", "ensemble")
BOXES = {"networks": ("cell", "cluster"), "force_constants": ("crystal",)}


def labelled(atoms: Atoms, rng: np.random.Generator, width: float, strain: float = 0.0) -> Atoms:
    """A displaced copy with EMT labels."""
    copy = atoms.copy()
    if strain:
        change = rng.uniform(-strain, strain, (3, 3))
        copy.set_cell(copy.cell.array @ (np.eye(3) + (change + change.T) / 2), scale_atoms=True)
    copy.positions += rng.normal(0.0, width, copy.positions.shape)
    copy.calc = EMT()
    copy.get_forces()
    if copy.pbc.all() and strain:
        copy.get_stress()
    return copy


def write_inputs(folder: Path) -> None:
    """Training sets, settings, structures to predict."""
    rng = np.random.default_rng(8)
    alloy = make_supercell(bulk("Cu", a=3.75), [[-1, 1, 1], [1, -1, 1], [2, 2, -2]])
    alloy.symbols[::3] = "Au"
    cluster = Octahedron("Cu", 3, cutoff=1)
    cluster.symbols[:2] = "Au"
    copper, box = bulk("Cu", a=3.61, cubic=True), bulk("Cu", a=3.61, cubic=True).repeat((2, 2, 1))
    write(folder / "alloy.extxyz", [labelled(alloy, rng, 0.1, 0.03) for _ in range(10)])
    write(folder / "valid.extxyz", [labelled(alloy, rng, 0.1, 0.03) for _ in range(4)])
    write(folder / "copper.extxyz", copper)
    write(folder / "hot.extxyz", [labelled(box, rng, 0.05) for _ in range(6)])
    (folder / "train.toml").write_text(TRAIN)
    (folder / "crystal.toml").write_text(CRYSTAL)
    shapes = {"cell": labelled(alloy, rng, 0.1, 0.04), "cluster": labelled(cluster, rng, 0.1)}
    shapes["crystal"] = labelled(box, rng, 0.05)
    for name, atoms in shapes.items():
        atoms.calc = None
        write(folder / f"{name}.extxyz", atoms)
        atoms = read(folder / f"{name}.extxyz")  # with the digits of the file
        elements = ["Cu"] if name == "crystal" else ["Cu", "Au"]
        if name == "cluster":
            atoms.center(vacuum=6.0)
        write(folder / f"{name}.data", atoms, format="lammps-data", masses=True, specorder=elements, force_skew=True)


def call(folder: Path, *words: str, code: str = UBMD[-1]) -> None:
    """The ``ubmd`` command."""
    subprocess.run([*UBMD[:-1], code, *words], cwd=folder, env=environment(0.0), check=True, capture_output=True)


def make_files(folder: Path, target: Path) -> None:
    """Every kind, with the compiled operators and without."""
    for kind in KINDS:
        call(folder, "train", "train.toml", "--set", f"uncertainty.kind='{kind}'", "--set", f"output_dir='{kind}'")
        shutil.copy(folder / kind / "model.pt", target / f"{kind}.pt")
        weights = [str(path.relative_to(folder)) for path in sorted((folder / kind).rglob("weights.pt"))]
        members = [word for path in weights[1:] for word in ("--member", path)]
        changes = [f"kind='{kind}'", "projections=16", "members=2", "references=20"]
        options = [*(word for change in changes for word in ("--set", change)), "--no-operators"]
        files = ("alloy.extxyz", "valid.extxyz", "--out", f"{kind}_plain.pt")
        call(folder, "export", weights[0], *files, *members, *options)
        shutil.copy(folder / f"{kind}_plain.pt", target)
    call(folder, "train", "crystal.toml")
    shutil.copy(folder / "force_constants" / "model.pt", target / "force_constants.pt")
    call(folder, "train", "crystal.toml", "--set", "output_dir='plain'", code=WITHOUT_OPERATORS)
    shutil.copy(folder / "plain" / "model.pt", target / "force_constants_plain.pt")


def note_what_they_say(target: Path, scratch: Path) -> None:
    """said.json: model file -> structure -> who says it -> numbers."""
    said: dict[str, dict[str, dict[str, object]]] = {}
    for model in sorted(target.glob("*.pt")):
        crystal = model.name.startswith("force_constants")
        for name in BOXES["force_constants" if crystal else "networks"]:
            elements = "Cu" if crystal else "Cu Au"
            bias = "force 0.25 stress 0.25" if name == "cell" else "force 0.25"
            said.setdefault(model.name, {})[name] = {
                "elements": elements,
                "bias": bias,
                "calculator": by_calculator(model, read(target / f"{name}.extxyz")),
                "lammps": by_lammps(model, target / f"{name}.data", elements, bias, scratch),
            }
    (target / "said.json").write_text(json.dumps(said, indent=1) + "\n")


def make_checkpoint(folder: Path) -> None:
    """A training that was killed in the middle: ``training`` beside its settings and labels."""

    def midway(_: View) -> bool:
        log = folder / "alloy" / "log.csv"
        return (folder / "alloy" / "checkpoint.pt").exists() and len(log.read_text().splitlines()) > 6

    stop = Stop("training", midway)
    for _ in range(20):
        shutil.rmtree(folder / "alloy", ignore_errors=True)
        there = run_until(Kind("iteration", write_inputs, []), folder, stop, ["train", "train.toml"])
        if there and not (folder / "alloy" / "weights.pt").exists():
            return
    raise SystemExit("The training was too fast.")


def main() -> None:
    """Make the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder.absolute()
    target = folder / "models"
    target.mkdir(parents=True)
    write_inputs(folder)
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    make_checkpoint(folder)
    shutil.copytree(folder / "alloy", target / "alloy")
    make_files(folder, target)
    note_what_they_say(target, folder)
    pack(target, HERE / "models.tar.xz")


if __name__ == "__main__":
    main()
