"""The bias over a run: window, impulses, groups, species, restart; each against an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.io import read

from ubmd.data.graph import build_graph, scatter_forces

DYNAMICS = """
velocity all create 300.0 77 dist gaussian
timestep 0.0002
fix integrate all nve
"""
DUMP = """
dump d all custom 1 dump.test id x y z fx fy fz f_b[2] f_b[3] f_b[4] proc
dump_modify d sort id format float %.17g
"""


def columns(frame, names):
    return np.stack([frame[name] for name in names], 1)


def positions(frame):
    return columns(frame, "xyz")


def bias(frame):
    return columns(frame, ["f_b[2]", "f_b[3]", "f_b[4]"])


def measure(evaluator, atoms, frames):
    """Forces [T, n, 3] and raw uncertainty forces [T, n, 3] in Python at dumped positions."""
    forces, gradients = [], []
    for frame in frames:
        copy = atoms.copy()
        copy.positions = positions(frame)
        forces.append(evaluator.predict_one(copy).forces)
        gradients.append(evaluator.uncertainty_gradient(copy)[1])
    return np.array(forces), np.array(gradients)


def test_window_scale_by_hand(lab, evaluator, structures):
    """150 steps in five runs behind a thermostat: every step's scale from Python forces at the dumped positions."""
    atoms = structures["molecule"]
    script = (
        lab.head(atoms) + DYNAMICS + "fix noise all langevin 300.0 300.0 0.1 99\nfix b all ubmd force 0.25 window 100\n"
    )
    script += DUMP + lab.every_step("f_b[4]") + "run 1\nrun 40\nrun 0\nrun 59\nrun 50 pre no\n"
    scales = lab.by_step(lab.run(script), "f_b[4]")
    frames = lab.dump("dump.test")
    assert sorted(scales) == list(range(151))
    assert len(frames) == 151
    forces, gradients = measure(evaluator, atoms, frames)
    f2, g2 = (forces**2).sum((1, 2)), (gradients**2).sum((1, 2))
    for step, scale in scales.items():
        window = slice(step - 99, step + 1)
        expected = np.sqrt(f2[window].sum() / g2[window].sum()) if step >= 99 else 0.0
        assert scale == pytest.approx(expected, rel=1e-9)
        assert np.allclose(bias(frames[step]), 0.25 * expected * gradients[step], rtol=1e-9, atol=1e-12)
    assert np.abs(bias(frames[99])).max() > 1e-3


@pytest.mark.parametrize("ranks", [1, 2])
def test_species_group_and_impulses(lab, evaluator, structures, ranks):
    """`every 4`: evaluated and applied fourfold at 0, 4, 8 ..., also over runs that start off that grid."""
    atoms = structures["molecule"]
    script = lab.head(atoms) + DYNAMICS + "group some id 1 2 4 5\n"
    script += "fix b some ubmd force 0.5 species H 0.0 C 0.5 window 3 every 4\n" + DUMP + "run 10\nrun 7\n"
    lab.run(script, ranks)
    frames = lab.dump("dump.test")
    forces, gradients = measure(evaluator, atoms, frames)
    strength = 0.5 * np.array([{"H": 0.0, "C": 0.5, "O": 1.0}[symbol] for symbol in atoms.symbols])
    group = np.isin(np.arange(len(atoms)) + 1, [1, 2, 4, 5])
    strength *= group
    assert 0 < np.count_nonzero(strength) < len(atoms)
    for step, frame in enumerate(frames):
        last = step - step % 4
        evaluated = [k for k in (last - 8, last - 4, last) if k >= 0]
        scale = (
            np.sqrt((forces[evaluated][:, group] ** 2).sum() / (gradients[evaluated][:, group] ** 2).sum())
            if len(evaluated) == 3
            else 0.0
        )
        assert np.allclose(bias(frame), scale * strength[:, None] * gradients[last], rtol=1e-9, atol=1e-12)
        applied = columns(frame, ["fx", "fy", "fz"]) - forces[step]
        assert np.allclose(applied, 4.0 * bias(frame) if step % 4 == 0 else 0.0, rtol=1e-8, atol=1e-9)
    assert np.abs(bias(frames[17])).max() > 1e-3


def test_rare_evaluations_are_no_friction(lab, structures):
    """Errors of `every 4` are of second order in its time step; those of a held, lagging force of first order."""
    atoms = structures["molecule"]

    def end(timestep: float, every: int) -> np.ndarray:
        script = lab.head(atoms) + DYNAMICS.replace("0.0002", f"{timestep}")
        script += f"fix b all ubmd force 0.5 window 1 every {every}\n" + DUMP + f"run {round(0.02 / timestep)}\n"
        lab.run(script)
        return positions(lab.dump("dump.test")[-1])

    exact = end(0.00005, 1)
    coarse, fine = (np.abs(end(timestep, 4) - exact).max() for timestep in (0.0002, 0.0001))
    assert fine > 1e-7  # there is something to compare
    assert coarse / fine > 3.0


def test_bias_force_is_the_derivative_of_u(lab, structures):
    """Central differences of f_b[1] in LAMMPS, with the scale that the fix reports."""
    atoms = structures["triclinic"]
    step = 1e-4
    with lab.session(lab.head(atoms) + "fix b all ubmd force 0.25 window 1\nrun 0\n") as lammps:
        scale = lammps.extract_fix("b", 0, 1, 3)
        array = lammps.numpy.extract_fix("b", 1, 2)
        order = np.argsort(lammps.numpy.extract_atom("id")[: len(atoms)])
        analytic = array[order][:, 1:4] / (0.25 * scale)
        assert np.abs(analytic).max() > 1e-3
        for atom, axis in ((1, 0), (4, 1), (7, 2), (10, 0)):
            values = []
            for shift in (step, -2 * step):
                move = ["0", "0", "0"]
                move[axis] = f"{shift:.17g}"
                lammps.command(f"group one id {atom}")
                lammps.command(f"displace_atoms one move {' '.join(move)} units box")
                lammps.command("run 0")
                values.append(lammps.extract_fix("b", 0, 1, 0))
                lammps.command("group one clear")
            move[axis] = f"{step:.17g}"
            lammps.command(f"group one id {atom}")
            lammps.command(f"displace_atoms one move {' '.join(move)} units box")
            lammps.command("group one clear")
            derivative = (values[0] - values[1]) / (2 * step)
            assert derivative == pytest.approx(analytic[atom - 1, axis], rel=1e-5, abs=1e-7)


def test_migrating_atoms_keep_their_bias(lab, structures):
    """Hot crystal on 1 and 4 ranks, bias held for 5 steps, neighbour lists rebuilt each step: same trajectory."""
    atoms = structures["triclinic"]
    dynamics = DYNAMICS.replace("300.0", "9000.0").replace("0.0002", "0.001")
    script = (
        lab.head(atoms)
        + "atom_modify sort 3 2.0\n"
        + dynamics.replace("gaussian", "gaussian loop all")
        + "neigh_modify every 1 delay 0 check no\n"
    )
    script += "fix b all ubmd force 0.3 window 2 every 5\n" + DUMP + "run 40\n"
    lab.run(script, 1)
    alone = lab.dump("dump.test")
    lab.run(script, 4)
    shared = lab.dump("dump.test")
    owners = np.array([frame["proc"] for frame in shared])
    moves = np.diff(owners, axis=0).any(1)
    assert any(moves[k] for k in range(40) if (k + 1) % 5)  # an atom changed its rank between evaluations
    assert np.abs(bias(alone[-1])).max() > 1e-3
    for one, many in zip(alone, shared, strict=True):
        assert np.allclose(bias(one), bias(many), rtol=1e-6, atol=1e-7)


def test_biased_nve_is_driven_by_the_bias(lab, structures):
    """The energy that NVE gains equals the work of the bias forces along the path, which are not zero."""
    atoms = structures["molecule"]
    script = lab.head(atoms) + DYNAMICS + "fix b all ubmd force 0.5 window 10\n" + DUMP
    script += lab.every_step("etotal") + "thermo_style custom step etotal\nrun 100\n"
    energies = lab.by_step(lab.run(script), "etotal")
    frames = lab.dump("dump.test")
    forces = np.array([bias(frame) for frame in frames])
    x = np.array([positions(frame) for frame in frames])
    assert np.abs(forces[9:]).max() > 0.01
    assert not forces[:9].any()
    work = (0.5 * (forces[1:] + forces[:-1]) * np.diff(x, axis=0)).sum((1, 2))
    gain = energies[100] - energies[20]
    assert abs(gain) > 1e-3
    assert gain == pytest.approx(work[20:].sum(), rel=0.02)


def test_monitor_changes_nothing(lab, structures):
    """Without a strength the trajectory is that without the fix, and the fix reports u."""
    atoms = structures["molecule"]
    result = []
    for fix in ("", "fix b all ubmd every 3\n"):
        with lab.session(lab.head(atoms) + DYNAMICS + fix + "run 20\n") as lammps:
            result.append(np.array(lammps.numpy.extract_atom("x")[: len(atoms)]))
            if fix:
                assert lammps.extract_fix("b", 0, 1, 0) > 0.0
                assert lammps.extract_fix("b", 0, 1, 3) == 0.0
    assert np.allclose(result[0], result[1], rtol=0, atol=1e-11)


def test_minimise_is_monitored_only(lab, evaluator, structures):
    """No bias, no entry in the window, but u of the current positions; MD afterwards fills the window."""
    atoms = structures["cubic"]
    script = lab.head(atoms) + DYNAMICS + "fix b all ubmd force 0.25 window 6\nrun 3\nminimize 0.0 1e-3 5 20\n"
    with lab.session(script) as lammps:
        assert lammps.extract_fix("b", 0, 0) == 0.0
        assert not np.array(lammps.numpy.extract_fix("b", 1, 2))[: len(atoms), 1:].any()
        order = np.argsort(lammps.numpy.extract_atom("id")[: len(atoms)])
        copy = atoms.copy()
        copy.positions = lab.to_ase(atoms, np.array(lammps.numpy.extract_atom("x"))[: len(atoms)][order])
        assert lammps.extract_fix("b", 0, 1, 0) == pytest.approx(evaluator.predict_one(copy).u, rel=1e-8)
        lammps.command("run 0")  # the fifth evaluation
        assert lammps.extract_fix("b", 0, 1, 3) == 0.0
        lammps.command("run 1")
        assert lammps.extract_fix("b", 0, 1, 3) > 0.0
        assert lammps.extract_fix("b", 0, 0) < 0.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_restart_continues_exactly(lab, structures, ranks):
    """Cut between two evaluations: windows and held bias come back from the restart file, bit for bit."""
    atoms = structures["cubic"]
    bias_fix = "fix b all ubmd force 0.3 window 4 every 3\n"
    settings = "fix integrate all nve\ntimestep 0.0005\nneigh_modify every 1 delay 0 check no\n"
    start = lab.head(atoms) + "velocity all create 800.0 5 dist gaussian\n" + settings + bias_fix
    lab.run(start + "run 20\nwrite_restart cut\n" + DUMP + "run 20\n", ranks)
    whole = lab.dump("dump.test")[-1]
    pair = "units metal\natom_modify map array sort 0 0\nread_restart cut\nneighbor 1.0 bin\n"
    pair += "pair_style ubmd precision double\n"
    lab.run(pair + "pair_coeff * * model.pt H C O\n" + settings + bias_fix + DUMP + "run 20\n", ranks)
    continued = lab.dump("dump.test")[-1]
    assert np.abs(bias(whole)).max() > 1e-3
    for name in ("x", "y", "z", "fx", "fy", "fz", "f_b[2]"):
        assert np.array_equal(whole[name], continued[name])


@pytest.mark.parametrize("ranks", [1, 2])
def test_stress_bias_virial(lab, evaluator, structures, ranks):
    """The fix's virial is tau_s s_s du/dstrain, with the scale of its own window; forces stay unbiased."""
    atoms = structures["triclinic"]
    script = lab.head(atoms) + "fix b all ubmd stress 0.4 window 1\ncompute p all pressure NULL fix\n"
    script += "thermo_style custom step c_p\nfix_modify b virial yes\nrun 0\n"
    names = [f"c_p[{k}]" for k in range(1, 7)]
    n = lab.run(script + lab.report(*names, "f_b", "f_b[4]", "f_b[5]", "f_b[6]"), ranks).numbers
    _, _, strain = evaluator.uncertainty_gradient(atoms)
    stress = evaluator.predict_one(atoms).stress[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    scale = np.linalg.norm(stress) / np.linalg.norm(strain / atoms.get_volume())
    measured = lab.tensor_to_ase(atoms, [n[name][0] / lab.bar for name in names])
    assert np.abs(strain).max() > 1e-4
    assert np.allclose(measured, 0.4 * scale * strain / atoms.get_volume(), rtol=1e-9, atol=1e-12)
    assert n["f_b[5]"][0] == pytest.approx(scale, rel=1e-9)
    assert n["f_b"] == n["f_b[4]"] == n["f_b[6]"] == [0.0]


def test_npt_feels_the_stress_bias(lab, structures):
    """The box of fix npt moves differently with a stress bias; `fix_modify virial no` takes the difference away."""
    atoms = structures["triclinic"]
    volumes = []
    barostat = DYNAMICS.replace("fix integrate all nve", "fix box all npt temp 300 300 0.1 tri 0 0 1")
    biased = "fix b all ubmd stress 3.0 window 5\n"
    for fix in ("", biased, biased + "fix_modify b virial no\n"):
        with lab.session(lab.head(atoms) + barostat + fix + "run 40\n") as lammps:
            volumes.append(lammps.get_thermo("vol"))
            assert not fix or lammps.extract_fix("b", 0, 1, 4) > 0.0
    assert abs(volumes[1] - volumes[0]) > 1e-5 * volumes[0]
    assert volumes[2] == pytest.approx(volumes[0], rel=1e-9)


@pytest.mark.parametrize(("kind", "ranks"), [("molecule", 1), ("triclinic", 2)])
def test_bias_of_atomic_uncertainties(lab, evaluator, structures, kind, ranks):
    """`uncertainty atomic`: the bias follows the gradient of sum_i u_i, computed here through the model's forward."""
    atoms = structures[kind]
    graph = build_graph(atoms, evaluator.elements, evaluator.cutoff)
    edge = graph.edge_vector.clone().requires_grad_(True)
    phi = evaluator.module(graph.species, graph.edge_index, edge, len(atoms))[1]
    factors = torch.tensor(evaluator.metadata["atom_scale"], dtype=torch.float64)
    total = factors[graph.species] @ evaluator.module.atomic_uncertainties(phi)
    gradient = -scatter_forces(graph.edge_index, torch.autograd.grad(total, edge)[0], len(atoms)).numpy()
    scale = np.linalg.norm(evaluator.predict_one(atoms).forces) / np.linalg.norm(gradient)
    script = lab.head(atoms) + "fix b all ubmd force 0.25 uncertainty atomic window 1\n" + DUMP + "run 0\n"
    n = lab.run(script + lab.report("f_b", "f_b[1]", "f_b[4]"), ranks).numbers
    applied = lab.to_ase(atoms, bias(lab.dump("dump.test")[0]))
    assert n["f_b[4]"][0] == pytest.approx(scale, rel=1e-10)
    assert n["f_b"][0] == pytest.approx(-0.25 * scale * float(total.detach()), rel=1e-10)
    assert n["f_b[1]"][0] == pytest.approx(evaluator.predict_one(atoms).u, rel=1e-10)
    assert np.abs(applied - 0.25 * scale * gradient).max() < 1e-10 * np.abs(applied).max()


def test_partitions_are_independent(lab, structures):
    """Two partitions in one mpiexec: all communication stays in the partition's own world."""
    script = lab.head(structures["molecule"]) + "variable tau world 0.1 0.3\n"
    script += "fix b all ubmd force ${tau} window 1 save 0.0 frames.${tau}.extxyz\nrun 0\n"
    script += 'print "RESULT share $(f_b[6]:%.17g)"\n'
    lab.run(script, 2, partition="2x1")
    shares = [float((lab.folder / f"screen.{k}").read_text().split("RESULT share ")[-1].split()[0]) for k in (0, 1)]
    assert shares == pytest.approx([0.1, 0.3], rel=1e-9)
    assert [read(f"frames.{tau}.extxyz").info["replica"] for tau in ("0.1", "0.3")] == [0, 1]


def test_rare_impulses_are_told(lab, structures):
    """Beyond a third of the fastest period of the atoms that are biased; not where these are heavy, or nothing is."""
    atoms = structures["molecule"]
    for keywords, timestep, told in (
        ("force 0.3 every 4", 0.0009, True),
        ("force 0.3 every 4", 0.0007, False),
        ("force 0.3 every 1", 0.004, False),
        ("force 0.3 species H 0.0 every 4", 0.0009, False),
        ("every 10", 0.001, False),
    ):
        script = lab.head(atoms) + DYNAMICS.replace("0.0002", f"{timestep}") + f"fix b all ubmd {keywords}\nrun 0\n"
        sentence = "bias forces every 4 steps (3.6 fs) are too rare for the vibrations of atoms of mass 1.01"
        found = lab.run(script).text
        assert (sentence in found and "use every 3" in found) is told, keywords
