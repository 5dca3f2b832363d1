"""Crystals in motion: sites kept by tag, drift, restarts, ranks, and what else happens in a script."""

from __future__ import annotations

import numpy as np
import pytest
from ase.io import read
from crystals import CUBIC, head

DYNAMICS = """
velocity all create {temperature} 77 dist gaussian loop all mom yes
timestep 0.0005
fix integrate all nve
"""
DUMP = """
dump d all custom {every} dump.test id xu yu zu fx fy fz f_b[1] f_b[2] f_b[3] f_b[4]
dump_modify d sort id format float %.17g
"""
NAMES = ("xu", "yu", "zu", "fx", "fy", "fz", "f_b[1]", "f_b[2]", "f_b[3]", "f_b[4]")


def dynamics(temperature=600.0):
    return DYNAMICS.format(temperature=temperature)


def columns(frame, names):
    return np.stack([frame[name] for name in names], 1)


def start(crystal, repeat=(3, 3, 3), amplitude=0.0, **options):
    return head(crystal, crystal.shaken(repeat, amplitude)[0], **options)


def test_nve_keeps_the_energy(crystal_lab, springs):
    """The error is that of the integrator: it falls with the square of the time step."""
    spreads = []
    for step in (0.002, 0.001):
        script = start(springs) + dynamics(1200.0) + f"timestep {step}\nfix b all ubmd every 1000\n"
        script += crystal_lab.every_step("etotal") + f"thermo_style custom etotal\nrun {round(0.2 / step)}\n"
        energies = list(crystal_lab.by_step(crystal_lab.run(script), "etotal").values())
        spreads.append(np.std(energies))
    assert spreads[0] / spreads[1] == pytest.approx(4.0, rel=0.2)
    assert spreads[1] < 1e-3 * 54 * 1.5 * 8.617e-5 * 1200.0  # of the kinetic energy


@pytest.mark.parametrize("ranks", [1, 2])
def test_drift_over_several_cells_changes_nothing(crystal_lab, springs, ranks):
    """A crystal that flies through the box (12 Å along x) vibrates, and is biased, as one at rest."""
    paths = []
    velocity = np.array([120.0, -70.0, 40.0])
    for drift in ("", "velocity all set 120.0 -70.0 40.0 sum yes\n"):
        script = start(springs, (2, 2, 3)) + dynamics() + drift + "neighbor 0.5 bin\n"
        script += "fix b all ubmd force 0.3 window 20 every 2\n" + DUMP.format(every=50) + "run 200\n"
        crystal_lab.run(script, ranks)
        paths.append(crystal_lab.dump("dump.test"))
    assert len(paths[0]) == 5
    assert np.abs(columns(paths[0][-1], NAMES[7:])).max() > 1e-3
    for k, (rest, moving) in enumerate(zip(*paths, strict=True)):
        expected = columns(rest, NAMES)
        expected[:, :3] += velocity * 0.0005 * 50 * k
        assert np.abs(columns(moving, NAMES) - expected).max() < 1e-6


@pytest.mark.slow
@pytest.mark.slow_ci
@pytest.mark.parametrize("ranks", [1, 2])
def test_long_langevin_run_keeps_its_sites(crystal_lab, springs, ranks):
    """The whole crystal moves by more than a lattice constant; energies stay those of vibrations."""
    script = start(springs, (2, 2, 2)) + dynamics(900.0) + "fix noise all langevin 900.0 900.0 0.5 31\n"
    script += "fix b all ubmd every 100\nvelocity all set 20.0 12.0 8.0 sum yes\ncompute u all msd com no\n"
    script += "compute v all msd com yes\nthermo_style custom step pe c_u[4] c_v[4] f_b[10]\nrun 20000\n"
    n = crystal_lab.run(script + crystal_lab.report("pe", "c_u[4]", "c_v[4]", "f_b[10]"), ranks).numbers
    assert n["c_u[4]"][0] > 4.78**2
    assert n["c_v[4]"][0] < 0.25
    assert 0.02 < n["f_b[10]"][0] < 0.8
    assert n["pe"][0] == pytest.approx(16 * 1.5 * 8.617e-5 * 900.0 - 3.0 * 8, rel=0.06)


@pytest.mark.parametrize("ranks", [1, 2])
def test_restart_continues_exactly(crystal_lab, springs, ranks):
    """Cut between two evaluations, bit for bit (in triclinic boxes LAMMPS itself changes the last bits)."""
    fixes = "fix integrate all nve\ntimestep 0.0005\nneigh_modify every 1 delay 0 check no\n"
    fixes += "fix b all ubmd force 0.3 window 4 every 3\n"
    script = start(springs, CUBIC) + "velocity all create 800.0 5 dist gaussian\n" + fixes
    crystal_lab.run(script + "run 20\nwrite_restart cut\n" + DUMP.format(every=20) + "run 20\n", ranks)
    whole = crystal_lab.dump("dump.test")[-1]
    again = "units metal\natom_modify map array sort 0 0\nread_restart cut\npair_style ubmd\n"
    again += "pair_coeff * * model.pt B As\n" + fixes + 'print "RESULT sigma $(f_b[9]:%.17g)"\n'
    again += DUMP.format(every=20) + "run 20\n"
    outcome = crystal_lab.run(again, ranks)
    continued = crystal_lab.dump("dump.test")[-1]
    assert np.abs(columns(whole, NAMES[7:])).max() > 1e-3
    for name in NAMES:
        assert np.array_equal(whole[name], continued[name])
    assert outcome.numbers["sigma"][0] > 0.0  # held, before anything was evaluated


def test_restart_after_a_drift(crystal_lab, springs):
    """The origin is then somewhere else: found again from the atoms."""
    fixes = "fix integrate all nve\ntimestep 0.0005\nfix b all ubmd force 0.3 window 4 every 3\n"
    script = start(springs) + dynamics() + "velocity all set 60.0 -35.0 20.0 sum yes\n" + fixes.split("\n", 1)[1]
    script += "run 199\nrun 1\nwrite_restart cut\n" + DUMP.format(every=100) + "run 100\n"
    crystal_lab.run(script)
    whole = crystal_lab.dump("dump.test")[-1]
    again = "units metal\natom_modify map array sort 0 0\nread_restart cut\npair_style ubmd\n"
    crystal_lab.run(again + "pair_coeff * * model.pt B As\n" + fixes + DUMP.format(every=100) + "run 100\n")
    continued = crystal_lab.dump("dump.test")[-1]
    assert np.abs(columns(whole, NAMES) - columns(continued, NAMES)).max() < 1e-8


def test_two_ranks_give_the_same_trajectory(crystal_lab, springs):
    paths = []
    for ranks in (1, 2):
        script = start(springs) + dynamics(1200.0) + "fix b all ubmd force 0.3 window 5\n" + DUMP.format(every=100)
        crystal_lab.run(script + "run 100\n", ranks)
        paths.append(columns(crystal_lab.dump("dump.test")[-1], NAMES))
    assert np.abs(paths[0] - paths[1]).max() < 1e-7


def test_minimise_finds_the_ideal_crystal(crystal_lab, springs):
    script = start(springs, amplitude=0.15) + "fix b all ubmd force 0.5 window 1\nminimize 0.0 1e-8 200 2000\n"
    with crystal_lab.session(script) as lammps:
        assert lammps.get_thermo("pe") == pytest.approx(-3.0 * 27, abs=1e-9)
        assert lammps.extract_fix("b", 0, 1, 9) < 1e-6


def test_changes_between_runs(crystal_lab, crystals):
    """A crystal that is moved, repeated, renumbered, or exchanged for another one is mapped again where needed."""
    crystal = crystals["zincblende"]
    atoms, box = crystal.shaken((2, 2, 2))
    expected = crystal.expected(atoms, box)
    with crystal_lab.session(head(crystal, atoms) + "fix b all ubmd\nrun 0\n") as lammps:
        for command, factor in (
            ("", 1),
            ("displace_atoms all move 1.7 -2.9 8.8 units box", 1),
            ("displace_atoms all move 0.9 0.9 0.0 units box", 1),
            ("reset_atoms id sort yes", 1),
            ("unfix b\nreplicate 1 2 1\nfix b all ubmd", 2),
            ("displace_atoms all move 0.0 0.4 -0.7 units box", 2),
        ):
            lammps.commands_string(command + "\nrun 0\n")
            assert lammps.get_thermo("pe") == pytest.approx(factor * expected.energy, rel=1e-10)
            assert lammps.extract_fix("b", 0, 1, 9) == pytest.approx(expected.displacement, rel=1e-10)
        n = lammps.get_natoms()
        x = lammps.numpy.extract_atom("x")[:n]
        x[:] = x[::-1].copy()  # other atoms on every site, types with them
        kinds = lammps.numpy.extract_atom("type")[:n]
        kinds[:] = kinds[::-1].copy()
        lammps.command("run 0")
        assert lammps.get_thermo("pe") == pytest.approx(2 * expected.energy, rel=1e-10)


def test_rerun(crystal_lab, springs):
    """Every frame as in the run that wrote it; read backwards, atoms jump between frames."""
    script = start(springs) + dynamics() + "velocity all set 60.0 -35.0 20.0 sum yes\nfix b all ubmd\n"
    script += "thermo_style custom step pe f_b[1] f_b[10]\nthermo_modify format float %.14g\nthermo 20\n"
    table = []
    script += "dump e all custom 20 dump.frames id type x y z\ndump_modify e format float %.17g\n"
    for tail in ("run 80\n", None):
        text = script + tail if tail else start(springs) + "fix b all ubmd\n" + script.split("fix b all ubmd\n")[1]
        if tail is None:
            text = text.split("dump e")[0] + "rerun dump.frames every 40 dump x y z box no\n"
        lines = [line.split() for line in crystal_lab.run(text).text.splitlines()]
        table.append({int(w[0]): [float(x) for x in w[1:]] for w in lines if len(w) == 4 and w[0].isdigit()})
    assert sorted(table[1]) == [0, 40, 80]
    for step, values in table[1].items():
        assert values == pytest.approx(table[0][step], rel=1e-8)


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_atoms_beside_the_crystal(crystal_lab, crystals, ranks):
    """hybrid/overlay: an interstitial helium atom (NULL) has no share in energies, u, mean displacement or number."""
    crystal = crystals["zincblende"]
    atoms, box = crystal.shaken((2, 2, 2))
    expected = crystal.expected(atoms, box)
    script = head(crystal, atoms).replace("read_data data.test", "read_data data.test extra/atom/types 1\nmass 3 4.0")
    script = script.replace("pair_style ubmd", "pair_style hybrid/overlay ubmd lj/cut 2.0")
    script = script.replace("* * model.pt B As", "* * ubmd model.pt B As NULL\npair_coeff * * lj/cut 0.0 1.0")
    script += "create_atoms 3 single 2.0 1.0 1.5\nfix b all ubmd force 0.2 window 1\nrun 0\n"
    n = crystal_lab.run(
        script + crystal_lab.report("atoms", "pe", "f_b[1]", "f_b[3]", "f_b[9]", "f_b[10]"), ranks
    ).numbers
    assert n["atoms"] == [17.0]
    assert n["pe"][0] == pytest.approx(expected.energy, rel=1e-10)
    assert n["f_b[1]"][0] == pytest.approx(expected.sigma / 16, rel=1e-9)
    assert n["f_b[3]"][0] == pytest.approx(expected.atomic.mean(), rel=1e-10)
    assert n["f_b[9]"][0] == pytest.approx(expected.sigma, rel=1e-9)
    assert n["f_b[10]"][0] == pytest.approx(expected.displacement, rel=1e-10)


def test_sum_with_another_pair_style(crystal_lab, crystals):
    """Forces of both styles add up on the same atoms."""
    crystal = crystals["zincblende"]
    atoms, _ = crystal.shaken((2, 2, 2))
    energies = []
    other = "lj/cut 3.0\npair_coeff * * lj/cut 0.02 2.0\n"
    for style in ("hybrid/overlay ubmd " + other, "hybrid/overlay zero 3.0 " + other, "hybrid/overlay ubmd"):
        tail = "pair_coeff * * ubmd model.pt B As\n" if "ubmd" in style else "pair_coeff * * zero\n"
        script = head(crystal, atoms).split("pair_style")[0] + f"pair_style {style}\n{tail}run 0\n"
        with crystal_lab.session(script) as lammps:
            energies.append(lammps.get_thermo("pe"))
    assert abs(energies[1]) > 1e-3
    assert energies[0] == pytest.approx(energies[1] + energies[2], rel=1e-12)


def test_stop_and_save(crystal_lab, springs):
    """`stop` acts on the largest u_i; the frame is saved."""
    script = start(springs) + dynamics(900.0) + "fix b all ubmd every 5 stop 1e-3 save 1e-4 frames.extxyz every 10\n"
    n = crystal_lab.run(script + "run 200\n" + crystal_lab.report("step", "f_b[2]", "f_b[7]", "f_b[8]")).numbers
    frames = read("frames.extxyz", ":")
    assert 0 < n["step"][0] < 200
    assert n["f_b[7]"] == [1.0]
    assert len(frames) == n["f_b[8]"][0] >= 1
    assert frames[-1].info["max_uncertainty"] == pytest.approx(n["f_b[2]"][0], rel=1e-12)
    assert n["f_b[2]"][0] > 1e-3


def test_fix_pair_reads_atomic_uncertainties(crystal_lab, crystals):
    crystal = crystals["zincblende"]
    atoms, box = crystal.shaken((2, 2, 2))
    script = head(crystal, atoms) + "fix n all numdiff 1 1e-3\nfix u all pair 1 ubmd uncertainty 1\nrun 0\nrun 1\n"
    with crystal_lab.session(script) as lammps:
        order = np.argsort(lammps.numpy.extract_atom("id")[:16])
        values = lammps.numpy.extract_fix("u", 1, 1)[:16][order]
    assert np.allclose(values, crystal.expected(atoms, box).atomic, rtol=1e-10)


def test_units_real(crystal_lab, crystals):
    """Energies in kcal/mol; displacements stay in Å."""
    crystal = crystals["zincblende"]
    atoms, box = crystal.shaken((2, 2, 2))
    expected = crystal.expected(atoms, box)
    script = head(crystal, atoms).replace("units metal", "units real") + "fix b all ubmd\nrun 0\n"
    with crystal_lab.session(script) as lammps:
        assert lammps.get_thermo("pe") == pytest.approx(23.060549 * expected.energy, rel=1e-10)
        assert lammps.extract_fix("b", 0, 1, 8) == pytest.approx(23.060549 * expected.sigma, rel=1e-9)
        assert lammps.extract_fix("b", 0, 1, 9) == pytest.approx(expected.displacement, rel=1e-10)


def test_partitions_are_independent(crystal_lab, springs):
    script = start(springs, (2, 2, 2), 0.05) + "variable scale world 0.1 0.3\nfix b all ubmd force ${scale} window 1\n"
    crystal_lab.run(script + 'run 5\nprint "RESULT share $(f_b[6]:%.17g)"\n', 2, partition="2x1")
    shares = [
        float((crystal_lab.folder / f"screen.{k}").read_text().split("RESULT share ")[-1].split()[0]) for k in (0, 1)
    ]
    assert shares == pytest.approx([0.1, 0.3], rel=1e-6)


def test_clear_and_another_crystal(crystal_lab, crystals, springs):
    """Nothing of the first crystal is left after `clear`."""
    atoms, box = crystals["orthorhombic"].shaken((1, 2, 2))
    with crystal_lab.session(start(springs) + "run 0\n") as lammps:
        lammps.command("clear")
        lammps.commands_string(head(crystals["orthorhombic"], atoms) + "run 0\n")
        energy = crystals["orthorhombic"].expected(atoms, box).energy
        assert lammps.get_thermo("pe") == pytest.approx(energy, rel=1e-10)
