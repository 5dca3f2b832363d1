"""Forces, virials, bias forces and bias virial against central differences, in every kind of cell."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from differences import FORCES, bias_gradients, columns, deviation

QUICK = partial(pytest.param, marks=pytest.mark.quick)
NUMDIFF_ORDER = (1, 2, 3, 6, 5, 4)  # fix numdiff/virial: xx yy zz yz xz xy


@pytest.mark.parametrize(("kind", "replicas"), [QUICK("triclinic", "1 1 1"), ("small", "1 1 1"), ("small", "2 1 2")])
def test_forces_and_virial_equal_numdiff(lab, structures, kind, replicas):
    """fix numdiff and numdiff/virial, also beside the bias.

    The only deviation is that of the central difference itself: it falls with the square of the step h down to the
    numerical limit of 3e-8 at h = 1e-4 Å (relative to the largest force). Virial: 1.4e-9 at a strain of 1e-5.
    """
    deviations = []
    for h in (4e-3, 1e-3, 1e-4):
        script = lab.head(structures[kind]) + f"replicate {replicas}\nfix n all numdiff 1 {h}\n"
        script += f"fix v all numdiff/virial 1 {0.1 * h}\nfix b all ubmd force 0.25 window 1\n"
        script += "compute p all pressure NULL virial\nthermo_style custom step c_p[1]\n" + FORCES + "run 0\n"
        names = [f"c_p[{k}]" for k in range(1, 7)] + [f"f_v[{k}]" for k in NUMDIFF_ORDER]
        n = lab.run(script + lab.report(*names, "f_b[6]")).numbers
        frame = lab.dump("dump.test")[0]
        forces = columns(frame, ["fx", "fy", "fz"]) - columns(frame, ["f_b[2]", "f_b[3]", "f_b[4]"])
        pressures = np.array([n[name][0] for name in names])
        deviations.append(deviation(columns(frame, ["f_n[1]", "f_n[2]", "f_n[3]"]), forces))
        virial = deviation(pressures[6:], pressures[:6])
        assert n["f_b[6]"][0] == pytest.approx(0.25)
    assert deviations[0] / deviations[1] == pytest.approx(4**2, rel=0.05)
    assert deviations[1] / deviations[2] == pytest.approx(10**2, rel=0.05)
    assert deviations[2] < 1e-7
    assert virial < 1e-8


def strained_uncertainty(lab, atoms, strain, mode):
    """(what is biased, number of atoms) of a strained copy, by LAMMPS."""
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    with lab.session(lab.head(copy) + f"fix b all ubmd stress 0.4 uncertainty {mode} window 1\nrun 0\n") as lammps:
        return lammps.extract_fix("b", 0, 1, 2) * len(atoms) if mode == "atomic" else lammps.extract_fix("b", 0, 1, 0)


@pytest.mark.parametrize(
    ("kind", "replicas", "mode"),
    [
        QUICK("triclinic", (1, 1, 1), "energy"),
        ("triclinic", (1, 1, 1), "atomic"),
        ("small", (1, 1, 1), "energy"),
        ("small", (2, 2, 1), "energy"),
    ],
)
def test_bias_virial_is_the_strain_derivative(lab, structures, kind, replicas, mode):
    """At fixed scale, virial of the fix = tau_s s_s du/dstrain for all six strains."""
    atoms = structures[kind].repeat(replicas)
    h = 1e-4
    script = lab.head(atoms) + f"fix b all ubmd stress 0.4 uncertainty {mode} window 1\n"
    script += "compute p all pressure NULL fix\nthermo_style custom step c_p\nrun 0\n"
    n = lab.run(script + lab.report("f_b[5]", *(f"c_p[{k}]" for k in range(1, 7)))).numbers
    virial = lab.tensor_to_ase(atoms, [n[f"c_p[{k}]"][0] / lab.bar for k in range(1, 7)]) * atoms.get_volume()
    numerical = np.zeros((3, 3))
    for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
        strain = np.zeros((3, 3))
        strain[a, b] += 0.5 * h
        strain[b, a] += 0.5 * h
        difference = strained_uncertainty(lab, atoms, strain, mode) - strained_uncertainty(lab, atoms, -strain, mode)
        numerical[a, b] = numerical[b, a] = difference / (2 * h)
    assert n["f_b[5]"][0] > 0.0
    assert np.abs(virial).max() > 1e-3
    assert deviation(0.4 * n["f_b[5]"][0] * numerical, virial) < 1e-5


@pytest.mark.parametrize(("kind", "replicas"), [QUICK("small", "1 1 1"), ("small", "2 2 1"), ("molecule", "")])
def test_bias_force_is_the_derivative(lab, structures, kind, replicas):
    """Central differences of f_b[1] for every atom and axis, at the scale that the fix reports."""
    script = lab.head(structures[kind]) + (f"replicate {replicas}\n" if replicas else "")
    with lab.session(script + "fix b all ubmd force 0.25 window 1\nrun 0\n") as lammps:
        analytic, numerical = bias_gradients(lammps, 1e-4)
    assert np.abs(analytic).max() > 1e-3
    assert deviation(numerical, analytic) < 1e-5


def test_replicated_box_has_the_same_uncertainty(lab, structures):
    """Mean features: u, the largest and the mean u_i stay; the energy grows with the box; s_F with its size.

    |F| and the norm of the raw uncertainty force grow as sqrt(n) and 1/sqrt(n), so s_F is proportional to n and the
    applied bias force of every atom stays, too.
    """
    results = []
    for replicas in ("1 1 1", "3 2 2"):
        script = lab.head(structures["small"]) + f"replicate {replicas}\n"
        script += "fix b all ubmd force 0.25 stress 0.2 window 1\nthermo_style custom step pe press\nrun 0\n"
        names = ["atoms", "pe", "press", *(f"f_b[{k}]" for k in range(1, 7))]
        results.append({name: values[0] for name, values in lab.run(script + lab.report(*names)).numbers.items()})
    one, many = results
    assert many["atoms"] == 12 * one["atoms"]
    for name in ("pe", "f_b[4]"):
        assert many[name] == pytest.approx(12 * one[name], rel=1e-10)
    for name in ("press", "f_b[1]", "f_b[2]", "f_b[3]", "f_b[6]"):
        assert many[name] == pytest.approx(one[name], rel=1e-10)
    assert one["f_b[1]"] > 0.0
