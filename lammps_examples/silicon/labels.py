"""The label sets of an example: which they are, whether they are whole, and how to make them anew.
python labels.py ../bas/dynamic.toml [--check] [--make] [--teacher FILE] [--join FILE [--without SET ...]] [--help]

Reads the reference, the box and the potential from the settings of a dynamic run; the sets lie in 'labels' beside it,
each a compressed extxyz file with energy (eV), forces (eV/Å) and stress (eV/Å^3), with their provenance in
labels/provenance.json:

  rattled_0.03.extxyz.xz   the ideal crystal with Gaussian displacements of all atoms (standard deviation 0.03 Å)
  md.extxyz.xz             equally spaced frames of one trajectory at the highest temperature
  test_300K.extxyz.xz      frames of an independent trajectory

The trajectories are those of a potential fitted to the rattled sets (and to the labels of --fit-also), not of the
reference itself, which only labels the frames (ab initio dynamics would take days).

Without options: a table of what there is. --check compares the files with their recorded hashes and, if the reference's
program is installed, labels the last structure of the smallest set once more. --make makes what is missing; it may be
killed and started again, since every label is kept in the reference's cache (reference.cache of the settings).
--teacher FILE fits a potential to all sets and writes its model file: a reference for machines without the program with

  [reference]
  calculator = "ubmd.calculator:Calculator"
  arguments = {path = "teacher.pt"}

--join FILE writes all sets to one extxyz file, for `ubmd train`. Structures that occur in several sets are written
once; those of the sets after --without, which are for tests, are not written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.langevin import Langevin
from scipy.optimize import nnls

from ubmd import __version__
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.structures import read_structures
from ubmd.errors import UbmdError
from ubmd.learning.dynamic.check import ideal_box
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.export import export_crystal
from ubmd.potentials.force_constants.lattice import Supercell
from ubmd.potentials.force_constants.regression import NormalEquations, Posterior, fit
from ubmd.references import label
from ubmd.settings import load_settings
from ubmd.settings.dynamic import DynamicRunSettings

EQUILIBRATION = 1000  # steps of the dynamics before the first frame
FRICTION = 0.01  # 1/fs
AGREEMENT = 2e-3  # eV/Å between a recorded force and one computed anew (other versions, other numerical libraries)


@dataclass
class Work:
    """What every part needs."""

    arguments: argparse.Namespace
    settings: DynamicRunSettings
    base: Path

    @property
    def folder(self) -> Path:
        return self.base / "labels"

    @property
    def provenance(self) -> Path:
        return self.folder / "provenance.json"

    def box(self) -> Atoms:
        return ideal_box(self.settings, self.base)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.extxyz.xz"


# ---------------------------------------------------------------------------------------------------- making


def make(work: Work) -> None:
    """All sets that are missing or have other numbers of structures."""
    arguments = work.arguments
    rattled = {f"rattled_{amplitude:g}": [] for amplitude in arguments.amplitudes}
    for number in range(arguments.rattled):  # all amplitudes side by side: a killed run leaves something of each
        for index, (name, structures) in enumerate(zip(rattled, rattled.values(), strict=True)):
            atoms = work.box()
            amplitude = arguments.amplitudes[index]
            atoms.positions += np.random.default_rng([index, number]).normal(0.0, amplitude, (len(atoms), 3))
            structures.append(labelled(work, atoms, f"{name} {number + 1}/{arguments.rattled}"))
    for name, structures in rattled.items():
        store(work, name, structures)
    wanted = {f"test_{t:g}K": (t, arguments.test, 2) for t in arguments.temperatures}
    wanted["md"] = max(arguments.temperatures), arguments.md, 1
    sampler: Potential | None = None
    for name, (temperature, count, seed) in wanted.items():
        if count == 0:
            continue
        frames = work.base / str(work.settings.reference.cache or "label_cache") / f"frames_{name}_{count}.extxyz"
        if not frames.exists():
            sampler = sampler or Potential(work, [*chain(*rattled.values()), *further(work)])
            print(f"{name}: molecular dynamics at {temperature:g} K", flush=True)
            write_structures(frames, trajectory(work, sampler, temperature, count, seed))
        structures = read_structures(frames)
        store(work, name, [labelled(work, a, f"{name} {k + 1}/{count}") for k, a in enumerate(structures)])


def further(work: Work) -> list[Atoms]:
    """Labels that the potential of the dynamics is fitted to besides the rattled sets."""
    return [*chain(*(read_structures(path, labelled=True) for path in work.arguments.fit_also))]


def labelled(work: Work, atoms: Atoms, what: str) -> Atoms:
    start = time.time()
    result = label(atoms, work.settings.reference, work.base)
    force = np.sqrt(np.mean(result.get_forces() ** 2))
    print(f"{what}: rms force {force:.3f} eV/Å, {time.time() - start:.0f} s", flush=True)
    return result


def store(work: Work, name: str, structures: list[Atoms]) -> None:
    """Write a set and what it comes from."""
    work.folder.mkdir(exist_ok=True)
    plain = work.folder / f".{name}.extxyz"
    for atoms in structures:
        atoms.info.clear()
    write_structures(plain, structures)
    temporary = plain.with_suffix(".tmp")
    temporary.write_bytes(lzma.compress(plain.read_bytes(), preset=9))
    plain.unlink()
    temporary.replace(work.path(name))
    also = " and to further labels" if work.arguments.fit_also else ""
    record = read_provenance(work)
    record |= {
        "ubmd": __version__,
        "program": program_version(work),
        "reference": work.settings.reference.model_dump(mode="json", include={"calculator", "arguments"}),
    }
    record.setdefault("sets", {})[name] = {
        "structures": len(structures),
        "hash": dataset_hash(structures),
        "date": datetime.date.today().isoformat(),
        "command": f"python labels.py {shlex.join(sys.argv[1:])}",
        "from": "ideal crystal, Gaussian displacements"
        if name.startswith("rattled")
        else f"Langevin dynamics of a potential fitted to the rattled sets{also}",
    }
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(work.provenance)


def fitted(work: Work, structures: list[Atoms]) -> tuple[ClusterBasis, Supercell, Posterior]:
    """The potential of the settings, or with other cutoffs, fitted to labels."""
    assert work.settings.crystal is not None
    cutoffs = work.settings.crystal.cutoffs | work.arguments.cutoffs
    wanted = {order: cutoff for order, cutoff in cutoffs.items() if cutoff > 0.0}
    basis = ClusterBasis.build(work.box(), wanted, work.settings.crystal.decay, work.settings.crystal.tolerance)
    supercell = Supercell(basis.lattice, work.box())
    equations = NormalEquations(basis.parameter_orders)
    for atoms in structures:
        equations.add(basis.force_matrix(atoms, supercell), atoms.get_forces())
    posterior = fit(equations)
    if work.arguments.stable is not None:
        posterior = replace(posterior, mean=stabilised(basis, supercell, posterior, work.arguments.stable))
    print(f"potential of {len(structures)} labels: {basis.n_parameters} parameters, noise {posterior.noise:.4f} eV/Å")
    return basis, supercell, posterior


def stabilised(basis: ClusterBasis, supercell: Supercell, posterior: Posterior, floor: float) -> np.ndarray:
    """The most probable parameters for which no displacement of the box has a curvature below ``floor`` (eV/Å^2).

    A least-distance problem in the posterior's metric (Lawson and Hanson, Solving Least Squares Problems, chapter 23),
    with one condition more for every direction that is still too soft.
    """
    n = 3 * len(supercell)
    unit = np.eye(n).reshape(n, -1, 3)
    second = posterior.parameter_orders == 2
    curvatures = np.array([-basis.force_matrix(u, supercell)[:, second] for u in unit])  # of unit displacements
    drift = np.tile(np.eye(3), (n // 3, 1)) / np.sqrt(n / 3)
    parameters = posterior.mean.copy()
    conditions = np.zeros((0, len(parameters)))
    for _ in range(100):
        hessian = curvatures @ parameters[second] + 1e3 * drift @ drift.T  # uniform shifts don't count
        values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
        soft = values < floor
        if not soft.any():
            print(f"lowest curvature in the box: {values[0]:.3f} eV/Å^2, {len(conditions)} conditions")
            break
        rows = np.zeros((int(soft.sum()), len(parameters)))
        rows[:, second] = np.einsum("ik,ijp,jk->kp", vectors[:, soft], curvatures, vectors[:, soft], optimize=True)
        conditions = np.concatenate([conditions, rows])
        lack = 1.01 * floor - conditions @ posterior.mean
        matrix = np.vstack([posterior.project(conditions).T, lack])
        target = np.eye(len(matrix))[-1]
        residual = matrix @ nnls(matrix, target)[0] - target
        parameters = posterior.mean - posterior.factor @ (residual[:-1] / residual[-1])
    else:
        sys.exit(f"No parameters were found for which all curvatures are above {floor:g} eV/Å^2.")
    return parameters


def teach(work: Work) -> None:
    """Model file of the potential that is fitted to all sets."""
    paths = sorted(work.folder.glob("*.extxyz.xz"))
    if not paths:
        sys.exit(f"There are no labels in {work.folder}: make them with --make.")
    structures = [atoms for path in paths for atoms in read_structures(path, labelled=True)]
    basis, _, posterior = fitted(work, structures)
    provenance = {"training_set_hash": dataset_hash(structures), "n_training": len(structures)}
    export_crystal(basis, posterior, work.arguments.teacher, provenance=provenance)
    print(f"wrote {work.arguments.teacher}")


def join(work: Work) -> None:
    """One file of all sets but those for tests: every structure once, and none that a test has."""
    found = {path.name.removesuffix(".extxyz.xz"): path for path in sorted(work.folder.glob("*.extxyz.xz"))}
    for name in work.arguments.without:
        if name not in found:
            sys.exit(f"--without {name}: there is no such set in {work.folder}, but {', '.join(found) or 'none'}.")
    sets = {name: read_structures(path, labelled=True) for name, path in found.items()}
    seen = {place(atoms) for name in work.arguments.without for atoms in sets[name]}
    structures = []
    for atoms in chain(*(sets[name] for name in sets if name not in work.arguments.without)):
        if place(atoms) not in seen:
            seen.add(place(atoms))
            structures.append(atoms)
    if not structures:
        sys.exit(f"--join: no structure is left; {work.folder} has {', '.join(found) or 'no sets'}.")
    write_structures(work.arguments.join, structures)
    print(f"wrote {len(structures)} structures to {work.arguments.join}")


def place(atoms: Atoms) -> bytes:
    """The same for the same atoms at the same places in the same cell, as text files hold them (1e-6 Å)."""
    numbers = np.concatenate([atoms.cell.array, atoms.positions]).round(6) + 0.0  # no -0
    return atoms.numbers.tobytes() + numbers.tobytes()


class Potential(Calculator):
    """Forces of a force-constant potential fitted to labels; it refuses to go far from the lattice."""

    implemented_properties = ["forces"]  # noqa: RUF012 (ASE declares it so)

    def __init__(self, work: Work, structures: list[Atoms]) -> None:
        super().__init__()
        self.basis, self.supercell, posterior = fitted(work, structures)
        self.parameters = posterior.mean
        self.guard = 0.4 * min(work.box().get_distances(0, range(1, len(work.box())), mic=True))

    def calculate(self, atoms: Any = None, properties: Any = ("forces",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        moved = self.supercell.displacements(self.atoms)
        far = np.linalg.norm(moved - moved.mean(axis=0), axis=1).max()
        if far > self.guard:
            sys.exit(f"An atom is {far:.2f} Å from its site: the potential of the dynamics needs more or other labels.")
        self.results = {"forces": self.basis.forces(self.parameters, self.atoms, self.supercell)}


def trajectory(work: Work, potential: Potential, temperature: float, count: int, seed: int) -> list[Atoms]:
    """Frames of Langevin dynamics from the ideal crystal."""
    rng = np.random.default_rng([seed, round(temperature)])
    atoms = work.box()
    atoms.calc = potential
    width = np.sqrt(2.0 * units.kB * temperature * atoms.get_masses())  # half goes into displacements
    atoms.set_momenta(width[:, None] * rng.standard_normal((len(atoms), 3)))
    step = work.settings.dynamic.timestep * units.fs
    friction = FRICTION / units.fs
    dynamics = Langevin(atoms, step, temperature_K=temperature, friction=friction, fixcm=False, rng=rng)
    dynamics.run(EQUILIBRATION)
    frames = []
    for _ in range(count):
        dynamics.run(work.arguments.spacing)
        frames.append(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True))
    return frames


# -------------------------------------------------------------------------------------------------- checking


def check(work: Work) -> int:
    """Number of sets that are not what their provenance says; one label is computed again if that is possible."""
    record = read_provenance(work)
    if not record:
        sys.exit(f"There are no labels in {work.folder}: make them with --make.")
    wrong = 0
    for name, entry in record["sets"].items():
        try:
            whole = dataset_hash(read_structures(work.path(name), labelled=True)) == entry["hash"]
        except UbmdError as error:
            print(error)
            whole = False
        wrong += not whole
        print(f"{name}: {entry['structures']} structures, {'as recorded' if whole else 'NOT as recorded'}")
    if work.settings.reference.calculator == "espresso" and shutil.which("pw.x") is None:
        print("Quantum ESPRESSO is not installed: no label was computed anew.")
        return wrong
    name = min(record["sets"], key=lambda name: record["sets"][name]["structures"])
    atoms = read_structures(work.path(name))[-1]
    print(f"computing the last label of {name} again ...", flush=True)
    settings = work.settings.reference.model_copy(update={"cache": None})
    difference = np.abs(label(atoms, settings, work.base).get_forces() - atoms.get_forces()).max()
    print(f"largest difference of a force: {difference:.1e} eV/Å")
    return wrong + int(difference > AGREEMENT)


def table(work: Work) -> None:
    """What there is."""
    for path in sorted(work.folder.glob("*.extxyz.xz")):
        structures = read_structures(path, labelled=True)
        forces = np.array([atoms.get_forces() for atoms in structures])
        print(
            f"{path.name}: {len(structures)} x {structures[0].symbols.formula:metal}, "
            f"rms force {np.sqrt(np.mean(forces**2)):.3f} eV/Å"
        )


def read_provenance(work: Work) -> dict[str, Any]:
    return json.loads(work.provenance.read_text(encoding="utf-8")) if work.provenance.exists() else {}


def program_version(work: Work) -> str:
    """Version line of pw.x; empty for other references."""
    if work.settings.reference.calculator != "espresso" or shutil.which("pw.x") is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:  # it leaves files
        said = subprocess.run(["pw.x"], input="", cwd=folder, capture_output=True, text=True, check=False).stdout
    return next((" ".join(line.split()[:3]) for line in said.splitlines() if "Program PWSCF" in line), "")


def cutoff(text: str) -> tuple[int, float]:
    order, _, length = text.partition("=")
    return int(order), float(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="of a dynamic run, e.g. ../bas/dynamic.toml")
    parser.add_argument("--check", action="store_true", help="compare the files with their hashes, repeat one label")
    parser.add_argument("--make", action="store_true", help="make the sets; minutes to hours")
    parser.add_argument("--amplitudes", type=float, nargs="+", default=[0.01, 0.03, 0.06], help="of rattled sets, Å")
    parser.add_argument("--rattled", type=int, default=15, help="structures of each amplitude")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 600.0, 900.0], help="of test sets, K")
    parser.add_argument("--test", type=int, default=4, help="structures per temperature")
    parser.add_argument("--md", type=int, default=15, help="equally spaced frames at the highest temperature; 0: none")
    parser.add_argument("--spacing", type=int, default=300, help="steps between frames")
    parser.add_argument(
        "--fit-also",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="labels that the potential of the dynamics is fitted to, too, e.g. a run's dataset.extxyz",
    )
    parser.add_argument(
        "--cutoffs", type=cutoff, nargs="+", default=[], help="other cutoffs for the dynamics, e.g. 4=3.5 5=0 (none)"
    )
    parser.add_argument(
        "--stable",
        type=float,
        metavar="CURVATURE",
        help="least curvature of those two potentials at the ideal "
        "crystal, in the box, eV/Å^2: for labels of a crystal that is no minimum of the reference",
    )
    parser.add_argument("--teacher", type=Path, help="fit a potential to all sets, write it to this model file")
    parser.add_argument("--join", type=Path, metavar="FILE", help="write all sets to this extxyz file")
    parser.add_argument("--without", nargs="+", default=[], metavar="SET", help="sets that --join leaves out")
    arguments = parser.parse_args()
    arguments.cutoffs = dict(arguments.cutoffs)
    work = Work(arguments, load_settings(arguments.settings, DynamicRunSettings), arguments.settings.resolve().parent)
    if arguments.make:
        make(work)
    if arguments.teacher:
        teach(work)
    if arguments.join:
        join(work)
    if arguments.check:
        sys.exit(min(check(work), 1))
    table(work)


if __name__ == "__main__":
    main()
