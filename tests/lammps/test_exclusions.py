"""`neigh_modify exclude`: atoms that are excluded from all others are absent, other exclusions act on pairs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from ase.io import read
from crystals import head

from ubmd.data.graph import build_graph

FIXES = """
fix b all ubmd force 0.25 window 1
fix u all pair 1 ubmd uncertainty 1
compute each all pe/atom
compute total all reduce sum c_each
thermo_style custom step pe press c_total
"""
OUTPUTS = ["pe", "c_total", "press", *(f"f_b[{k}]" for k in (1, 2, 3, 4, 6, 9))]
RUN = """
dump d all custom 1 {} id fx fy fz f_b[1] f_b[2] f_b[3] f_b[4] f_u c_each
dump_modify d sort id format float %.17g
run 0
undump d
"""
OXYGEN = "neigh_modify exclude type 3 1 exclude type 3 2 exclude type 3 3\n"


def close(value, expected, tolerance=1e-10):
    """Relative to the largest component."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(value) - expected).max() <= tolerance * np.abs(expected).max()


def forces(frame):
    return np.stack([frame[f"f{k}"] for k in "xyz"], 1)


def bias(frame):
    return np.stack([frame[f"f_b[{k}]"] for k in (2, 3, 4)], 1)


@pytest.mark.parametrize(("path", "ranks"), [("all at once", 1), ("blocks", 2), ("generic", 2)])
@pytest.mark.parametrize(
    ("gone", "exclusion"),
    [
        ("id 2 5 11", "neigh_modify exclude group gone all\n"),
        ("id 2 5 11", "neigh_modify exclude group all gone\n"),
        ("type 3", OXYGEN),
    ],
)
def test_excluded_from_all_equals_deleted(lab, evaluator, structures, path, ranks, gone, exclusion):
    """The energy, u and bias are those of the atoms that are left, in LAMMPS and in Python; the others have nothing."""
    atoms = structures["triclinic"]
    lab.set_path(path)
    script = lab.head(atoms) + f"group gone {gone}\n" + FIXES
    report = lab.report(*OUTPUTS)
    script += exclusion + RUN.format("dump.excluded") + report
    script += "neigh_modify exclude none\n" + RUN.format("dump.all") + report
    script += "delete_atoms group gone compress no\n" + RUN.format("dump.deleted") + report
    n = lab.run(script, ranks).numbers
    excluded, all_there, deleted = (lab.dump(f"dump.{name}")[0] for name in ("excluded", "all", "deleted"))
    for name in OUTPUTS:
        assert n[name][0] == pytest.approx(n[name][2], rel=1e-10)
    left = np.isin(excluded["id"], deleted["id"])
    kept = atoms[left]
    expected = evaluator.predict_one(kept)
    u, gradient, _ = evaluator.uncertainty_gradient(kept)
    assert 0 < len(kept) < len(atoms)
    assert close([n["pe"][0], n["c_total"][0]], expected.energy)
    assert close([n[f"f_b[{k}]"][0] for k in (1, 9)], [u, u * len(kept)])
    assert close([n[f"f_b[{k}]"][0] for k in (2, 3)], [expected.atomic_u.max(), expected.atomic_u.mean()])
    assert close(lab.to_ase(atoms, (forces(excluded) - bias(excluded))[left]), expected.forces)
    scale = np.linalg.norm(expected.forces) / np.linalg.norm(gradient)
    assert close(lab.to_ase(atoms, bias(excluded)[left]), 0.25 * scale * gradient)
    assert close(excluded["f_b[1]"][left], expected.atomic_u)
    for name in excluded.keys() - {"id"}:
        assert not excluded[name][~left].any()
    assert close(n["pe"][1], evaluator.predict_one(atoms).energy)
    assert all_there["f_b[1]"].all()


def energy_without(lab, atoms, excluded):
    """Energy in Python of a graph without the pairs (i, j) for which excluded[i, j]."""
    graph = build_graph(atoms, lab.elements, 4.0)
    keep = ~torch.as_tensor(excluded)[graph.edge_index[0], graph.edge_index[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load("model.pt").double()
    energies, _ = module.forward(graph.species, graph.edge_index[:, keep], graph.edge_vector[keep].double(), len(atoms))
    return float(energies.sum())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("exclusion", "members"),
    [
        ("neigh_modify exclude group some some\n", ([2, 3, 9, 10], [2, 3, 9, 10])),
        ("neigh_modify exclude group some rest\n", ([2, 3, 9, 10], None)),
        ("neigh_modify exclude type 2 3\n", (2, 3)),
    ],
)
def test_other_exclusions_act_on_pairs(lab, evaluator, structures, exclusion, members, ranks):
    """All atoms stay, with energies without those pairs; forces are the derivative; those of mobile atoms change."""
    atoms = structures["cubic"]
    types = np.array([lab.elements.index(s) + 1 for s in atoms.symbols])
    ids = np.arange(1, len(atoms) + 1)
    if isinstance(members[0], int):
        first, second = (types == kind for kind in members)
    else:
        first = np.isin(ids, members[0])
        second = first if members[1] else ~first
    excluded = np.outer(first, second) | np.outer(second, first)
    script = lab.head(atoms) + "group some id 2 3 9 10\ngroup rest subtract all some\n" + exclusion
    script += "fix b all ubmd\nfix n all numdiff 1 1e-4\n"
    script += "dump d all custom 1 dump.test id fx fy fz f_n[1] f_n[2] f_n[3]\n"
    script += "dump_modify d sort id format float %.17g\nrun 0\n"
    n = lab.run(script + lab.report("pe", "f_b[1]", "f_b[9]"), ranks).numbers
    frame = lab.dump("dump.test")[0]
    numerical = np.stack([frame[f"f_n[{k}]"] for k in (1, 2, 3)], 1)
    full = evaluator.predict_one(atoms)
    assert n["pe"] == [pytest.approx(energy_without(lab, atoms, excluded), rel=1e-10)]
    assert abs(n["pe"][0] - full.energy) > 1e-3
    assert n["f_b[9]"][0] == pytest.approx(18 * n["f_b[1]"][0], rel=1e-12)
    assert np.abs(forces(frame) - numerical).max() < 1e-5 * np.abs(numerical).max()
    mobile = ~first
    assert np.abs(forces(frame) - lab.to_ase(atoms, full.forces))[mobile].max() > 1e-3


@pytest.mark.parametrize("exclusion", ["", "neigh_modify exclude group far near\n", "neigh_modify exclude type 2 2\n"])
def test_an_isolated_atom_is_not_absent(lab, evaluator, structures, exclusion):
    """It has no neighbours, but its own energy and uncertainty."""
    atoms = structures["molecule"].copy()
    atoms.append("O")
    atoms.positions[-1] = atoms.positions[0] + [30.0, 0.0, 0.0]
    script = lab.head(atoms) + "group far id 10\ngroup near subtract all far\n" + FIXES + exclusion
    script += RUN.format("dump.test")
    n = lab.run(script + lab.report("pe", "f_b[1]", "f_b[9]")).numbers
    frame = lab.dump("dump.test")[0]
    expected, near = evaluator.predict_one(atoms), evaluator.predict_one(atoms[:9])
    assert frame["c_each"][-1] == pytest.approx(expected.energy - near.energy, rel=1e-8)
    assert abs(frame["c_each"][-1]) > 1e-3
    assert frame["f_b[1]"][-1] == pytest.approx(expected.atomic_u[-1], rel=1e-9) != 0.0
    assert n["f_b[9]"][0] == pytest.approx(10 * n["f_b[1]"][0], rel=1e-12)
    if "type" not in exclusion:
        assert n["pe"][0] == pytest.approx(expected.energy, rel=1e-10)


def test_no_atom_is_left(lab, structures):
    """Everything is zero; the next run is a normal one."""
    script = lab.head(structures["molecule"]) + FIXES.replace("press", "") + "fix_modify b energy yes\n"
    script += "neigh_modify exclude group all all\nrun 0\n" + lab.report("pe", "f_b", "f_b[1]", "f_b[3]", "f_b[6]")
    outcome = lab.run(script + "neigh_modify exclude none\nrun 0\n" + lab.report("f_b[1]"))
    n = outcome.numbers
    assert outcome.text.count("no atom has an element of the model, u is 0: check the names in pair_coeff") == 1
    assert {name: values[0] for name, values in n.items()} == dict.fromkeys(n, 0.0)
    assert n["f_b[1]"][1] > 0.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_absent_atoms_are_in_no_saved_frame(lab, evaluator, structures, ranks):
    atoms = structures["triclinic"]
    script = lab.head(atoms) + "group gone id 2 5 11\nfix b all ubmd save 0.0 frames.extxyz\nrun 0\n"
    lab.run(script + "neigh_modify exclude group gone all\nrun 0\nrun 0\n" + lab.report("f_b[8]"), ranks)
    whole, part = read("frames.extxyz", ":")
    assert len(whole) == 18
    assert part.arrays["id"].tolist() == [k for k in range(1, 19) if k not in (2, 5, 11)]
    assert part.info["max_uncertainty"] == pytest.approx(evaluator.predict_one(part).atomic_u.max(), rel=1e-9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_atoms_outside_an_included_group(lab, evaluator, structures, ranks):
    """`neigh_modify include` builds lists of one group only: the others are not there, nor in a frame."""
    atoms = structures["cubic"]
    script = lab.head(atoms) + "group some id 2 3 9 10\natom_modify first some\nneigh_modify include some\n"
    script += "fix b all ubmd save 0.0 frames.extxyz\nrun 0\n" + lab.report("pe", "f_b[1]", "f_b[9]")
    n = lab.run(script, ranks).numbers
    frame = read("frames.extxyz")
    expected = evaluator.predict_one(atoms[[1, 2, 8, 9]])
    assert frame.arrays["id"].tolist() == [2, 3, 9, 10]
    assert close([n[name][0] for name in ("pe", "f_b[1]", "f_b[9]")], [expected.energy, expected.u, 4 * expected.u])


def test_atoms_without_element_and_a_second_pair_style(lab, structures):
    """hybrid/overlay: exclusions of NULL types take no energy away; excluded atoms have none of either style."""
    script = lab.head(structures["cubic"]).replace("pair_style ubmd", "pair_style hybrid/overlay lj/cut 3.0 ubmd")
    script = script.replace("* * model.pt H", "* * lj/cut 0.01 1.5\npair_coeff * * ubmd model.pt NULL") + FIXES
    script += "compute model all pair ubmd\ngroup gone id 4 5 7\nthermo_style custom step pe c_model\n"
    report = "run 0\n" + lab.report("pe", "c_model", "f_b[1]", "f_b[9]")
    n = lab.run(
        script
        + report
        + "neigh_modify exclude type 1 1 exclude type 1 2 exclude type 1 3\n"
        + report
        + "neigh_modify exclude none exclude group gone all\n"
        + report
        + "neigh_modify exclude none\ndelete_atoms group gone compress no\n"
        + report
    ).numbers
    for name in ("c_model", "f_b[1]", "f_b[9]"):
        assert n[name][1] == pytest.approx(n[name][0], rel=1e-12)
    for values in n.values():
        assert values[2] == pytest.approx(values[3], rel=1e-10)
        assert values[2] != pytest.approx(values[0], rel=1e-6)


MESSAGE = "cannot leave out pairs of its atoms: remove 'neigh_modify exclude'"


@pytest.mark.parametrize(
    ("exclusion", "refused"),
    [("group gone all", True), ("type 1 2", True), ("group gone none", False), ("group none all", False)],
)
def test_crystals_refuse_exclusions(crystal_lab, crystals, exclusion, refused):
    crystal = crystals["zincblende"]
    script = head(crystal, crystal.shaken((2, 2, 2))[0])
    script += f"group gone id 3\ngroup none empty\nneigh_modify exclude {exclusion}\nrun 0\n"
    outcome = crystal_lab.run(script, ranks=2, check=not refused)
    assert (MESSAGE in " ".join(outcome.text.split())) == refused
