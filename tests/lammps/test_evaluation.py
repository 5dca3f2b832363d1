"""LAMMPS against Python: energies, forces, virials, uncertainties and bias forces, on 1, 2 and 4 ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")
DEVICES = ["", pytest.param(" device cuda", marks=NO_GPU)]
KINDS = ["molecule", "cubic", "small", "triclinic", "left-handed"]
CASES = [
    pytest.param(kind, ranks, marks=[pytest.mark.quick] if ranks == 2 and kind in ("molecule", "triclinic") else [])
    for kind in KINDS
    for ranks in (1, 2, 4)
]

MEASURE = """
compute virial all pressure NULL virial
compute peratom all pe/atom
compute energy all reduce sum c_peratom
compute s6 all stress/atom NULL virial
compute s9 all centroid/stress/atom NULL virial
compute sum6 all reduce sum c_s6[1] c_s6[2] c_s6[3] c_s6[4] c_s6[5] c_s6[6]
compute sum9 all reduce sum c_s9[1] c_s9[2] c_s9[3] c_s9[4] c_s9[5] c_s9[6] c_s9[7] c_s9[8] c_s9[9]
fix b all ubmd force 0.25 window 1
thermo_style custom step pe c_energy c_virial[1] c_sum6[1] c_sum9[1]
dump d all custom 1 dump.test id fx fy fz f_b[1] f_b[2] f_b[3] f_b[4]
dump_modify d sort id format float %.17g
dump v all custom 1 dump.virials id c_s6[*] c_s9[*]
dump_modify v sort id format float %.17g
run 0
"""
SIX = ["c_virial[1]", "c_virial[2]", "c_virial[3]", "c_virial[4]", "c_virial[5]", "c_virial[6]"]
OUTPUTS = ["pe", "c_energy", *SIX, "f_b", *(f"f_b[{k}]" for k in range(1, 9))]
SUMS = [f"c_sum6[{k}]" for k in range(1, 7)] + [f"c_sum9[{k}]" for k in range(1, 10)]


def close(value, expected, tolerance=1e-10):
    """Relative to the largest component."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(value) - expected).max() <= tolerance * np.abs(expected).max()


def check_against_python(lab, evaluator, atoms, ranks, settings="", margin=(5.0, 5.0)):
    """Everything that LAMMPS reports for one structure equals the evaluation in Python (1e-10, double)."""
    script = lab.head(atoms, settings=settings, margin=margin) + MEASURE + lab.report(*OUTPUTS, *SUMS)
    n = {name: values[0] for name, values in lab.run(script, ranks).numbers.items()}
    frame = lab.dump("dump.test")[0]
    expected = evaluator.predict_one(atoms)
    u, gradient, _ = evaluator.uncertainty_gradient(atoms)
    columns = lab.to_ase(atoms, np.stack([frame[f"f{k}"] for k in "xyz"], 1))
    bias = lab.to_ase(atoms, np.stack([frame[f"f_b[{k}]"] for k in (2, 3, 4)], 1))
    scale = np.linalg.norm(expected.forces) / np.linalg.norm(gradient)

    assert close(n["pe"], expected.energy)
    assert close(n["c_energy"], expected.energy)
    assert np.linalg.norm(bias) > 0.1 * np.linalg.norm(expected.forces)
    assert close(columns - bias, expected.forces)
    assert close(bias, 0.25 * scale * gradient)
    assert close(frame["f_b[1]"], expected.atomic_u)
    assert close(n["f_b"], -0.25 * scale * u)
    assert close(
        [n[f"f_b[{k}]"] for k in range(1, 9)],
        [u, expected.atomic_u.max(), expected.atomic_u.mean(), scale, 0.0, 0.25, 0.0, 0.0],
    )
    check_virials(lab, n, atoms, expected)
    virials = lab.dump("dump.virials")[0]  # of each atom: the split of an edge is the same in both
    six, nine = (np.stack([virials[f"c_s{c}[{k}]"] for k in range(1, 7)], 1) for c in (6, 9))
    assert close(six, nine)


def check_virials(lab, n, atoms, expected):
    """Global virial, and the sums of both per-atom virials."""
    six = np.array([n[f"c_sum6[{k}]"] for k in range(1, 7)])
    nine = np.array([n[f"c_sum9[{k}]"] for k in range(1, 10)])
    assert close(six, nine[:6])
    assert close(nine[[3, 4, 5]], nine[[6, 7, 8]])
    if not atoms.pbc.all():
        return
    stress = lab.tensor_to_ase(atoms, [-n[name] / lab.bar for name in SIX])
    assert close(stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], expected.stress)
    assert close(lab.tensor_to_ase(atoms, six / lab.bar) / atoms.get_volume(), stress)


@pytest.mark.parametrize(("kind", "ranks"), CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_python(lab, evaluator, structures, device, kind, ranks):
    lab.device = device
    check_against_python(lab, evaluator, structures[kind], ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["molecule", "triclinic"])
@pytest.mark.parametrize("path", ["blocks", "generic"])
def test_other_paths_equal_python(lab, evaluator, structures, path, kind, ranks):
    """Many small blocks of atoms; a model file of another kind, which has the generic methods only."""
    lab.set_path(path)
    check_against_python(lab, evaluator, structures[kind], ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_without_atoms(lab, evaluator, structures, ranks):
    """The molecule lies at the low end of a long box, so that at least one rank owns nothing."""
    atoms = structures["molecule"]
    script = lab.head(atoms, margin=(5.0, 60.0), settings=f"processors {ranks} 1 1")
    assert "Nlocal:" in (text := lab.run(script + "fix b all ubmd\nrun 0\n", ranks).text)
    assert text.split("Nlocal:")[1].split("min")[0].split()[-1] == "0"
    check_against_python(lab, evaluator, atoms, ranks, settings=f"processors {ranks} 1 1", margin=(5.0, 60.0))


@pytest.mark.parametrize("ranks", [1, 2])
def test_atoms_without_neighbours(lab, evaluator, structures, ranks):
    """No pair within the cutoff: energies are those of free atoms, forces and bias are zero."""
    atoms = structures["molecule"][:3].copy()
    atoms.positions = [[0, 0, 0], [9, 0, 0], [0, 9, 0]]
    script = (
        lab.head(atoms) + "fix b all ubmd force 0.25 window 1\nrun 0\n" + lab.report("pe", "fmax", "f_b[1]", "f_b[6]")
    )
    n = lab.run(script, ranks).numbers
    expected = evaluator.predict_one(atoms)
    assert close(n["pe"][0], expected.energy)
    assert close(n["f_b[1]"][0], expected.u)
    assert n["fmax"][0] == n["f_b[6]"][0] == 0.0


def test_mixed_and_single_precision(lab, evaluator, structures):
    atoms = structures["triclinic"]
    expected = evaluator.predict_one(atoms)
    for precision, tolerance in (("mixed", 1e-5), ("single", 1e-4)):
        script = lab.head(atoms, precision) + MEASURE + lab.report("pe", "f_b[1]")
        n = lab.run(script).numbers
        frame = lab.dump("dump.test")[0]
        forces = np.stack([frame[f"f{k}"] - frame[f"f_b[{m}]"] for k, m in zip("xyz", (2, 3, 4), strict=True)], 1)
        assert close(n["pe"][0], expected.energy, tolerance)
        assert close(lab.to_ase(atoms, forces), expected.forces, tolerance)
        assert close(n["f_b[1]"][0], expected.u, 1e-3)


@pytest.mark.parametrize("path", ["all at once", "blocks", "generic"])
def test_null_types_are_ignored(lab, evaluator, structures, path):
    """With hybrid/overlay and NULL hydrogen has no energy and doesn't count in the mean feature."""
    lab.set_path(path)
    atoms = structures["cubic"]
    script = lab.head(atoms).replace("pair_style ubmd", "pair_style hybrid/overlay lj/cut 3.0 ubmd")
    script = script.replace(
        "pair_coeff * * model.pt H C O", "pair_coeff * * ubmd model.pt NULL C O\npair_coeff * * lj/cut 0.0 1.0"
    )
    n = lab.run(
        script + "fix b all ubmd force 0.25 window 1\nrun 0\n" + lab.report("pe", "f_b[1]", "f_b[2]", "f_b[4]")
    ).numbers
    rest = atoms[[symbol != "H" for symbol in atoms.symbols]]
    expected = evaluator.predict_one(rest)
    u, gradient, _ = evaluator.uncertainty_gradient(rest)
    assert close(n["pe"][0], expected.energy)
    assert close(n["f_b[1]"][0], u)
    assert close(n["f_b[2]"][0], expected.atomic_u.max())
    assert close(n["f_b[4]"][0], np.linalg.norm(expected.forces) / np.linalg.norm(gradient))


@pytest.mark.parametrize("path", ["blocks", "generic"])
def test_pair_forces_equal_numerical_derivative(lab, structures, path):
    """fix numdiff and numdiff/virial agree, and their 6N evaluations disturb neither u nor bias of the same step."""
    lab.set_path(path)
    atoms = structures["small"]
    tail = "fix b all ubmd force 0.25 window 1\n"
    numdiff = "fix n all numdiff 1 1e-4\nfix v all numdiff/virial 1 1e-4\n"
    dump = (
        "dump d all custom 1 dump.test id fx fy fz f_b[2] f_b[3] f_b[4] {}\ndump_modify d sort id format float %.17g\n"
    )
    plain = lab.head(atoms) + tail + dump.format("") + "run 0\n" + lab.report("f_b[1]", "f_b[4]")
    lone = lab.run(plain).numbers
    reference = lab.dump("dump.test")[0]
    virial = "compute p all pressure NULL virial\nthermo_style custom step c_p[1]\n"
    outputs = lab.report("f_b[1]", "f_b[4]", *(f"c_p[{k}]" for k in range(1, 7)), *(f"f_v[{k}]" for k in range(1, 7)))
    columns = dump.format("f_n[1] f_n[2] f_n[3]")
    for order in (numdiff + tail, tail + numdiff):
        n = lab.run(lab.head(atoms) + order + virial + columns + "run 0\n" + outputs).numbers
        frame = lab.dump("dump.test")[0]
        assert n["f_b[1]"] == lone["f_b[1]"]
        assert n["f_b[4]"] == lone["f_b[4]"]
        for k, m in zip("xyz", (1, 2, 3), strict=True):
            assert np.array_equal(frame[f"f_b[{m + 1}]"], reference[f"f_b[{m + 1}]"])
            assert close(frame[f"f_n[{m}]"], reference[f"f{k}"] - reference[f"f_b[{m + 1}]"], 1e-5)
        numerical = [n[f"f_v[{k}]"][0] for k in (1, 2, 3, 6, 5, 4)]  # its order is xx yy zz yz xz xy
        assert close([n[f"c_p[{k}]"][0] for k in range(1, 7)], numerical, 1e-5)


def test_heat_flux_is_the_derivative_of_the_energy_moment(lab, structures):
    """J = d/dt sum_i r_i E_i on a cluster (NVE): true only if an edge's virial goes to its neighbour."""
    atoms = structures["molecule"]
    script = (
        lab.head(atoms)
        + """
        velocity all create 600.0 4242 dist gaussian
        fix 1 all nve
        timestep 1e-5
        compute ke all ke/atom
        compute pe all pe/atom
        compute s all centroid/stress/atom NULL virial
        compute j all heat/flux ke pe s
        variable mx atom (c_ke+c_pe)*x
        variable my atom (c_ke+c_pe)*y
        variable mz atom (c_ke+c_pe)*z
        compute m all reduce sum v_mx v_my v_mz
        thermo_style custom step c_j[1] c_m[1]
        thermo 1
        run 0
        """
    )
    step = "run 1\n"
    moments = lab.report("c_m[1]", "c_m[2]", "c_m[3]")
    fluxes = lab.report("c_j[1]", "c_j[2]", "c_j[3]")
    n = lab.run(script + moments + step + fluxes + step + moments).numbers
    for k in (1, 2, 3):
        derivative = (n[f"c_m[{k}]"][1] - n[f"c_m[{k}]"][0]) / 2e-5
        assert derivative == pytest.approx(n[f"c_j[{k}]"][0], rel=1e-5, abs=1e-4)
        assert abs(derivative) > 0.1


@pytest.mark.parametrize("path", ["all at once", "blocks", "generic"])
def test_fix_pair_reads_atomic_uncertainties(lab, evaluator, structures, path):
    """Without fix ubmd and beside it, also while fix numdiff evaluates displaced atoms in the same step."""
    lab.set_path(path)
    atoms = structures["small"]
    expected = evaluator.predict_one(atoms).atomic_u
    pair, numdiff = "fix u all pair 1 ubmd uncertainty 1\n", "fix n all numdiff 1 1e-2\n"
    bias, other = "fix b all ubmd force 0.1 window 100\n", "fix b all ubmd atoms no\n"
    for fixes in (pair, bias + pair, other + pair, numdiff + bias + pair):
        with lab.session(lab.head(atoms) + fixes + "run 0\nrun 1\n") as lammps:
            order = np.argsort(lammps.numpy.extract_atom("id")[: len(atoms)])
            assert close(lammps.numpy.extract_fix("u", 1, 1)[: len(atoms)][order], expected)
