"""Crystals: forces, bias forces and heat flux against differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from crystals import CUBIC, head
from differences import FORCES, bias_gradients, columns, deviation


@pytest.mark.parametrize(
    ("kind", "multiple", "ranks"),
    [
        ("triclinic", (2, 2, 1), 1),
        ("zincblende", (1, 1, 1), 1),
        pytest.param("zincblende", (1, 1, 1), 2, marks=pytest.mark.quick),
        ("orthorhombic", (1, 1, 2), 1),
    ],
)
def test_forces_equal_numdiff(crystal_lab, crystals, kind, multiple, ranks):
    """Also beside the bias, and in boxes where an atom is its own neighbour; u of the step isn't disturbed."""
    crystal = crystals[kind]
    atoms, box = crystal.shaken(multiple)
    script = (
        head(crystal, atoms) + "fix n all numdiff 1 1e-4\nfix b all ubmd force 0.25 window 1\n" + FORCES + "run 0\n"
    )
    n = crystal_lab.run(script + crystal_lab.report("f_b[6]", "f_b[9]", "f_b[10]"), ranks).numbers
    frame = crystal_lab.dump("dump.test")[0]
    forces = columns(frame, ["fx", "fy", "fz"]) - columns(frame, ["f_b[2]", "f_b[3]", "f_b[4]"])
    assert deviation(columns(frame, ["f_n[1]", "f_n[2]", "f_n[3]"]), forces) < 1e-6
    expected = crystal.expected(atoms, box)
    assert n["f_b[6]"][0] == pytest.approx(0.25)
    assert n["f_b[9]"][0] == pytest.approx(expected.sigma, rel=1e-9)
    assert n["f_b[10]"][0] == pytest.approx(expected.displacement, rel=1e-10)


@pytest.mark.quick
def test_bias_force_is_the_derivative_of_u(crystal_lab, crystals):
    crystal = crystals["triclinic"]
    atoms, _ = crystal.shaken((2, 2, 1))
    with crystal_lab.session(head(crystal, atoms) + "fix b all ubmd force 0.25 window 1\nrun 0\n") as lammps:
        analytic, numerical = bias_gradients(lammps, 1e-4)
    assert np.abs(analytic).max() > 1e-5
    assert deviation(numerical, analytic) < 1e-5


HEAT = """
fix 1 all nve
timestep 2e-6
compute ke all ke/atom
compute pe all pe/atom
compute s all centroid/stress/atom NULL virial
compute j all heat/flux ke pe s
variable mx atom (c_ke+c_pe)*x
variable my atom (c_ke+c_pe)*y
variable mz atom (c_ke+c_pe)*z
compute m all reduce sum v_mx v_my v_mz
thermo_style custom step c_j[1] c_m[1]
run 0
"""


def test_heat_flux_is_the_derivative_of_the_energy_moment(crystal_lab, springs):
    """J = d/dt sum_i r_i E_i while only an inner part of the box moves, so that nothing flows through its boundaries.

    Displacements and velocities of that part have no sum: their mean would move the other atoms against their sites.
    """
    atoms, _ = springs.shaken(CUBIC, 0.0)
    rng = np.random.default_rng(6)
    centre = np.argmin(np.linalg.norm(atoms.positions - 0.5 * atoms.cell.array.sum(0), axis=1))
    inner = np.linalg.norm(atoms.positions - atoms.positions[centre], axis=1) < 2.2
    assert inner.sum() == 5
    u, v = np.zeros((2, len(atoms), 3))
    for target, size in ((u, 0.1), (v, 8.0)):
        target[inner] = rng.uniform(-size, size, (5, 3))
        target[inner] -= target[inner].mean(0)
    atoms.positions += u
    script = head(springs, atoms) + HEAT
    with Path("data.test").open("a") as file:
        file.write(
            "\nVelocities\n\n" + "".join(f"{k + 1} {a:.17g} {b:.17g} {c:.17g}\n" for k, (a, b, c) in enumerate(v))
        )
    moments, fluxes = (crystal_lab.report(*(f"{name}[{k}]" for k in (1, 2, 3))) for name in ("c_m", "c_j"))
    n = crystal_lab.run(script + moments + "run 1\n" + fluxes + "run 1\n" + moments).numbers
    for k in (1, 2, 3):
        derivative = (n[f"c_m[{k}]"][1] - n[f"c_m[{k}]"][0]) / 4e-6
        assert derivative == pytest.approx(n[f"c_j[{k}]"][0], rel=2e-3)
        assert abs(derivative) > 0.1
