"""Structures of this example, made with the reference (QuickFF through LAMMPS): python make_inputs.py [--folder FOLDER]

Needs the force field's data file, which is under the GPL and not part of ubmd: apt-get install lammps-examples. Writes

  closed_pore.extxyz       start structure: the large pore of the data file, pressed together and relaxed at 0 MPa
  closed_300K.extxyz       256 frames of unbiased NPT at 300 K and 0 MPa from there, in random order
  test_600K.extxyz         test set: 16 frames at 600 K in each of 22 equal intervals of the volume, 780 to 1550 Å^3
  test_600K_reduced.extxyz eight frames of each of them

Eight minutes on one core. Files that are there already are kept.

The test set comes from NPT with a pressure that changes its sign whenever the volume passes one of its ends, so that
the cell opens and closes again and again; no pass gives more than two frames to an interval.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.md.nose_hoover_chain import MTKNPT
from ase.optimize import LBFGS

from ubmd.data.extxyz import write_structures
from ubmd.references import label, make_calculator
from ubmd.settings import ReferenceSettings

HERE = Path(__file__).resolve().parent
# A test set holds what the trajectory holds: no limit on forces.
REFERENCE = ReferenceSettings(calculator="quickff:quickff_mil53", force_limit=1e3, energy_limit=1e3)
LOW, HIGH, INTERVALS = 780.0, 1550.0, 22  # Å^3
CLOSED_BELOW = 1200.0  # Å^3
MPA = 1e6 * units.Pascal


def npt(atoms: Atoms, temperature: float, pressure: float, barostat: float, rng: np.random.Generator) -> MTKNPT:
    """Dynamics with new velocities in a flexible cell (K, MPa, damping time of the barostat in fs; steps of 0.5 fs)."""
    atoms.calc = make_calculator(REFERENCE, HERE)
    width = np.sqrt(atoms.get_masses() * units.kB * temperature)
    momenta = width[:, None] * rng.standard_normal((len(atoms), 3))
    atoms.set_momenta(momenta - momenta.mean(axis=0))
    return MTKNPT(
        atoms,
        timestep=0.5 * units.fs,
        temperature_K=temperature,
        pressure_au=pressure * MPA,
        tdamp=100.0 * units.fs,
        pdamp=barostat * units.fs,
    )


def bare(atoms: Atoms) -> Atoms:
    """A copy without velocities and calculator."""
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)


def closed_pore(rng: np.random.Generator) -> Atoms:
    """The minimum that the large pore falls into when it is pressed together."""
    atoms = make_calculator(REFERENCE, HERE).structure()
    dynamics = npt(atoms, 300.0, 300.0, 300.0, rng)
    while atoms.get_volume() > 830.0:
        dynamics.run(20)
    atoms = bare(atoms)
    atoms.calc = make_calculator(REFERENCE, HERE)
    LBFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.01, steps=2000)
    return atoms


def closed_frames(start: Atoms, count: int, rng: np.random.Generator) -> Iterator[Atoms]:
    """Labelled frames of the closed pore at 300 K and 0 MPa, every 50 fs, in random order."""
    atoms = bare(start)
    dynamics = npt(atoms, 300.0, 0.0, 1000.0, rng)
    dynamics.run(2000)
    frames = []
    for _ in range(count):
        dynamics.run(100)
        if atoms.get_volume() > CLOSED_BELOW:
            raise SystemExit("The pore has opened; take another --seed.")
        frames.append(label(bare(atoms), REFERENCE, HERE))
    return (frames[k] for k in rng.permutation(count))


def sweeps(start: Atoms, count: int, rng: np.random.Generator) -> list[Atoms]:
    """``count`` labelled frames at 600 K of each interval of the volume, by increasing interval."""
    edges = np.linspace(LOW, HIGH, INTERVALS + 1)
    found: dict[int, list[Atoms]] = {k: [] for k in range(INTERVALS)}
    atoms, opening = bare(start), True
    while min(map(len, found.values())) < count:
        passed: Counter[int] = Counter()
        dynamics = npt(atoms, 600.0, -400.0 if opening else 400.0, 300.0, rng)
        while (atoms.get_volume() < HIGH) if opening else (atoms.get_volume() > LOW):
            dynamics.run(20)
            k = int(np.searchsorted(edges, atoms.get_volume())) - 1
            if k in found and passed[k] < 2 and len(found[k]) < count and rng.random() < 0.5:
                passed[k] += 1
                found[k].append(label(bare(atoms), REFERENCE, HERE))
        opening = not opening
        print(f"  {sum(map(len, found.values()))} frames", flush=True)
    return [frame for frames in found.values() for frame in frames]


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="for the files (default: beside this script)")
    parser.add_argument("--only", choices=("start", "frames", "test"), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=256, help="of the closed pore at 300 K")
    parser.add_argument("--per-interval", type=int, default=16, help="frames of the test set per interval")
    options = parser.parse_args()
    folder = options.folder
    start = folder / "closed_pore.extxyz"
    if not start.exists():
        write_structures(start, [label(closed_pore(np.random.default_rng([options.seed, 0])), REFERENCE, HERE)])
    atoms = read(start)
    print(
        f"{start.name}: V = {atoms.get_volume():.1f} Å^3, E = {atoms.get_potential_energy() / len(atoms):.4f} eV/atom"
    )
    frames = folder / "closed_300K.extxyz"
    if options.only in (None, "frames") and not frames.exists():
        write_structures(frames, list(closed_frames(atoms, options.frames, np.random.default_rng([options.seed, 1]))))
        volumes = [frame.get_volume() for frame in read(frames, ":")]
        print(f"{frames.name}: {len(volumes)} frames, V = {min(volumes):.0f} to {max(volumes):.0f} Å^3")
    test = folder / "test_600K.extxyz"
    if options.only in (None, "test") and not test.exists():
        found = sweeps(atoms, options.per_interval, np.random.default_rng([options.seed, 2]))
        some = [frame for k, frame in enumerate(found) if k % options.per_interval < 8]
        write_structures(folder / "test_600K_reduced.extxyz", some)
        write_structures(test, found)
        volumes = [frame.get_volume() for frame in found]
        print(f"{test.name}: {len(found)} frames, V = {min(volumes):.0f} to {max(volumes):.0f} Å^3")


if __name__ == "__main__":
    main()
