"""Boxes that are periodic in some directions only, and groups: LAMMPS against Python and central differences."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from ubmd.calculator import Model
from ubmd.data.graph import VOIGT
from ubmd.data.periodicity import projector, stress_within
from ubmd.errors import SimulationError
from ubmd.lammps.box import Box
from ubmd.lammps.session import Session

PERIODICITIES = [pbc for pbc in product((True, False), repeat=3) if any(pbc)]
BAR = 1.6021765e6  # bar per eV/Å^3, LAMMPS's own constant in units metal
SIX = ((0, 1, 2, 0, 0, 1), (0, 1, 2, 1, 2, 2))  # LAMMPS's order


def ids(pbc: tuple[bool, ...]) -> str:
    return "".join("FT"[p] for p in pbc)


def structure(structures: dict[str, Atoms], pbc: tuple[bool, ...]) -> Atoms:
    """A skewed cell, turned, with atoms outside of it."""
    atoms = structures["triclinic"].copy()
    atoms.rotate(40.0, (1.0, 2.0, 3.0), rotate_cell=True)
    atoms.positions[0] += 2.0 * (atoms.cell[:] * np.array(pbc)[:, None]).sum(axis=0)
    atoms.pbc = pbc
    return atoms


@pytest.mark.parametrize(
    "pbc", [pytest.param(pbc, marks=pytest.mark.quick) if sum(pbc) == 2 else pbc for pbc in PERIODICITIES], ids=ids
)
def test_energy_forces_and_virial_are_those_of_python(
    model_file: Path, evaluator: Model, structures: dict[str, Atoms], pbc: tuple[bool, ...]
) -> None:
    atoms = structure(structures, pbc)
    expected = evaluator.predict_one(atoms)
    with Session(model=model_file) as session:
        session.make_system(atoms, "double")
        session.commands(["fix b all ubmd", "compute p all pressure NULL virial"])
        session.commands(["thermo_style custom step c_p", "run 0"])
        rotation = Box(atoms).rotation
        forces = session.gather("f") @ rotation.T
        volume = float(session.lammps.get_thermo("vol"))
        six = np.array(session.lammps.extract_compute("p", 0, 1)[:6]) * volume / BAR
        assert session.energy() == pytest.approx(expected.energy, rel=1e-10)
        np.testing.assert_allclose(forces, expected.forces, atol=1e-10 * np.abs(expected.forces).max())
        assert session.fix_value("b", 0) == pytest.approx(expected.u, rel=1e-10)
        assert session.fix_value("b", 1) == pytest.approx(expected.atomic_u.max(), rel=1e-10)
    turned = np.zeros((3, 3))
    turned[SIX] = turned[SIX[::-1]] = six
    virial = stress_within((rotation @ turned @ rotation.T)[VOIGT], atoms)
    scale = np.abs(virial).max()
    np.testing.assert_allclose(virial, -expected.stress * atoms.get_volume(), atol=1e-10 * scale)


def strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    """A copy whose atoms and periodic vectors are strained."""
    copy, stretch = atoms.copy(), np.eye(3) + strain
    copy.set_cell(np.where(atoms.pbc[:, None], atoms.cell[:] @ stretch, atoms.cell[:]))
    copy.positions = atoms.positions @ stretch
    return copy


@pytest.mark.parametrize(
    "pbc", [pytest.param(pbc, marks=pytest.mark.quick) if sum(pbc) == 2 else pbc for pbc in PERIODICITIES], ids=ids
)
def test_bias_stress_acts_along_the_periodic_directions(
    model_file: Path, evaluator: Model, structures: dict[str, Atoms], pbc: tuple[bool, ...]
) -> None:
    """The fix's virial is tau_s s_s du/dstrain there and zero elsewhere; s_s is that of these directions, too.

    u at strained structures is Python's: the test above compares it with LAMMPS's.
    """
    atoms, h = structure(structures, pbc), 1e-4
    within = projector(atoms)
    expected = np.zeros((3, 3))
    for a, b in zip(*SIX, strict=True):
        strain = np.zeros((3, 3))
        strain[a, b] += 0.5 * h
        strain[b, a] += 0.5 * h
        strain = within @ strain @ within
        up, down = evaluator.predict([strained(atoms, strain), strained(atoms, -strain)])
        expected[a, b] = expected[b, a] = (up.u - down.u) / (2 * h)
    with Session(model=model_file) as session:
        session.make_system(atoms, "double")
        session.commands(["fix b all ubmd stress 0.4 window 1", "compute p all pressure NULL fix"])
        session.commands(["thermo_style custom step c_p", "run 0"])
        scale = session.fix_value("b", 4)
        volume = float(session.lammps.get_thermo("vol"))
        six = np.array(session.lammps.extract_compute("p", 0, 1)[:6]) * volume / BAR
    turned = np.zeros((3, 3))
    turned[SIX] = turned[SIX[::-1]] = six
    free = ~np.array(pbc)
    assert not turned[free].any()
    assert not turned[:, free].any()
    rotation = Box(atoms).rotation
    virial = rotation @ turned @ rotation.T
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(virial, 0.4 * scale * expected, atol=1e-5 * np.abs(virial).max())
    _, _, of_u = evaluator.uncertainty_gradient(atoms)
    of_energy = strain_derivative(evaluator, atoms)
    norms = [np.linalg.norm(within @ derivative @ within) for derivative in (of_energy, of_u)]
    assert scale == pytest.approx(norms[0] / norms[1], rel=1e-5)


def strain_derivative(evaluator: Model, atoms: Atoms) -> np.ndarray:
    """dE/d(strain) [3, 3] of all directions, by central differences: positions alone, where the box is free."""
    found, h = np.zeros((3, 3)), 1e-4
    for a, b in zip(*SIX, strict=True):
        strain = np.zeros((3, 3))
        strain[a, b] += 0.5 * h
        strain[b, a] += 0.5 * h
        up, down = evaluator.predict([strained(atoms, strain), strained(atoms, -strain)])
        found[a, b] = found[b, a] = (up.energy - down.energy) / (2 * h)
    return found


def test_a_molecule_has_no_bias_stress(model_file: Path, structures: dict[str, Atoms]) -> None:
    with Session(model=model_file) as session:
        session.make_system(structures["molecule"], "double")
        session.command("fix b all ubmd stress 0.4 window 1")
        with pytest.raises(SimulationError, match="at least one direction"):
            session.run(0, first=True)


@pytest.mark.quick
def test_scale_and_largest_uncertainty_are_those_of_the_group(
    model_file: Path, evaluator: Model, structures: dict[str, Atoms]
) -> None:
    atoms = structures["cubic"]
    moves = np.arange(len(atoms)) % 3 != 0
    prediction, gradient, _ = evaluator.predict_with_gradient(atoms)
    with Session(model=model_file) as session:
        session.make_system(atoms, "double")
        session.commands([f"group some id {' '.join(str(k + 1) for k in np.flatnonzero(moves))}"])
        session.commands(["fix b some ubmd force 0.25 window 1", "run 0"])
        scale = np.linalg.norm(prediction.forces[moves]) / np.linalg.norm(gradient[moves])
        assert session.fix_value("b", 3) == pytest.approx(scale, rel=1e-8)
        assert session.fix_value("b", 5) == pytest.approx(0.25, rel=1e-8)
        assert session.fix_value("b", 1) == pytest.approx(prediction.atomic_u[moves].max(), rel=1e-10)
        forces = session.gather("f")
    expected = prediction.forces + 0.25 * scale * np.where(moves[:, None], gradient, 0.0)
    np.testing.assert_allclose(forces, expected, atol=1e-8 * np.abs(expected).max())
