"""What a LAMMPS user expects of any pair style and any fix."""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest

NVE = """
velocity all create 600.0 31 dist gaussian
timestep 0.0005
fix integrate all nve
"""
BIAS_DUMP = """
dump d all custom 1 dump.test id type x y z fx fy fz f_b[1] f_b[2] f_b[3] f_b[4]
dump_modify d sort id format float %.17g
"""


def columns(frame, names):
    return np.stack([frame[name] for name in names], 1)


def forces(frame):
    return columns(frame, ["fx", "fy", "fz"])


def bias(frame):
    return columns(frame, ["f_b[2]", "f_b[3]", "f_b[4]"])


def one(outcome, *names):
    """The only value that each name was printed with."""
    return [outcome.numbers[name][0] for name in names]


def test_rerun_reports_every_frame(lab, structures):
    """A monitor with `every 10` looks at each frame of a dump, whatever its step; so does fix pair."""
    script = lab.head(structures["triclinic"]) + NVE + "fix b all ubmd\nfix u all pair 1 ubmd uncertainty 1\n"
    script += "dump d all custom 7 dump.test id type x y z f_b[1] f_u\ndump_modify d sort id format float %.17g\n"
    lab.run(script + "run 21\n")
    frames = lab.dump("dump.test")
    script = lab.head(structures["triclinic"]) + "fix b all ubmd every 10 save 0.0 frames.extxyz every 1\n"
    script += "fix u all pair 1 ubmd uncertainty 1\n"
    script += "dump d all custom 1 dump.again id f_b[1] f_u\ndump_modify d sort id format float %.17g\n"
    outcome = lab.run(script + "rerun dump.test dump x y z box no\n" + lab.report("f_b[8]"))
    again = lab.dump("dump.again")
    assert len(frames) == len(again) == 4
    assert one(outcome, "f_b[8]") == [4.0]
    for frame, copy in zip(frames, again, strict=True):
        assert np.allclose(copy["f_b[1]"], frame["f_b[1]"], rtol=1e-9)
        assert np.array_equal(copy["f_b[1]"], copy["f_u"])
    assert not np.allclose(frames[0]["f_u"], frames[-1]["f_u"], rtol=1e-3)


def test_run_after_a_stopped_rerun(lab, structures):
    """`stop` has no run to end in rerun; it reports, and the next run is a normal one."""
    script = lab.head(structures["molecule"]) + NVE + "dump d all custom 5 dump.test id type x y z\nrun 10\nundump d\n"
    script += "fix b all ubmd stop 1e-9\nrerun dump.test dump x y z\n" + lab.report("f_b[7]", "step")
    n = lab.run(script + "unfix b\nrun 3\n" + lab.report("step")).numbers
    assert n["f_b[7]"] == [1.0]
    assert n["step"] == [10.0, 13.0]


def test_run_0_repeats_nothing(lab, structures):
    """However often a step is evaluated, it is one entry of the window."""
    with lab.session(lab.head(structures["molecule"]) + "fix b all ubmd force 0.25 window 2\nrun 0\n") as lammps:
        for _ in range(3):
            lammps.command("run 0")
            assert lammps.extract_fix("b", 0, 1, 3) == 0.0
        lammps.command("run 1")
        assert lammps.extract_fix("b", 0, 1, 3) > 0.0


def test_minimise_finds_the_unbiased_minimum(lab, structures):
    """A biasing fix changes neither the path nor the energy of a minimisation."""
    results = []
    for fix in ("", "fix b all ubmd force 0.5 stress 0.5 window 1\n", "fix b all ubmd every 5\n"):
        script = lab.head(structures["triclinic"]) + fix + "minimize 0.0 1e-4 20 100\n"
        with lab.session(script) as lammps:
            order = np.argsort(lammps.numpy.extract_atom("id")[:18])
            results.append((lammps.get_thermo("pe"), lammps.numpy.extract_atom("x")[:18][order].copy()))
    for energy, x in results[1:]:
        assert energy == pytest.approx(results[0][0], rel=1e-12)
        assert np.allclose(x, results[0][1], rtol=0, atol=1e-10)


def test_group_is_biased_and_all_have_uncertainties(lab, evaluator, structures):
    """u and the atomic uncertainties are those of all atoms; only the group feels a force, and the largest is its."""
    atoms = structures["cubic"]
    expected = evaluator.predict_one(atoms)
    some = np.sort(np.argsort(expected.atomic_u)[[0, 4, 9]])  # not the most uncertain one
    ids = " ".join(map(str, some + 1))
    script = lab.head(atoms) + f"group some id {ids}\nfix b some ubmd force 0.25 window 1\n" + BIAS_DUMP + "run 0\n"
    u, largest = one(lab.run(script + lab.report("f_b[1]", "f_b[2]")), "f_b[1]", "f_b[2]")
    frame = lab.dump("dump.test")[0]
    assert u == pytest.approx(expected.u, rel=1e-10)
    assert largest == pytest.approx(expected.atomic_u[some].max(), rel=1e-10)
    assert largest < 0.999 * expected.atomic_u.max()
    assert np.allclose(frame["f_b[1]"], expected.atomic_u, rtol=1e-9)
    biased = np.abs(bias(frame)).max(1) > 0.0
    assert frame["id"][biased].tolist() == (some + 1).tolist()
    assert np.allclose(forces(frame) - bias(frame), expected.forces, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_created_and_deleted_atoms(lab, structures, ranks):
    """Between evaluations a new atom has no held bias; at the next one it counts like all others."""
    atoms = structures["cubic"]
    script = lab.head(atoms) + NVE + "fix b all ubmd force 0.25 window 1 every 5\nrun 7\n"
    script += "group gone id 3 18\ndelete_atoms group gone compress no\ncreate_atoms 2 single 1.0 1.1 0.9\n"
    outcome = lab.run(script + BIAS_DUMP + "run 3\n" + lab.report("atoms", "f_b[6]"), ranks)
    frames = lab.dump("dump.test")
    assert one(outcome, "atoms", "f_b[6]") == [17.0, pytest.approx(0.25)]
    for frame in frames:
        assert 3 not in frame["id"]
        held = np.abs(bias(frame)).max(1)
        assert (held[frame["id"] <= 17] > 0.0).all()
    assert [np.abs(bias(frame)[-1]).max() > 0.0 for frame in frames] == [False, False, False, True]


def test_atoms_inserted_in_a_run(lab, structures):
    """fix deposit inserts atoms while the bias is held, fix evaporate takes atoms away."""
    script = lab.head(structures["molecule"], margin=(5.0, 15.0)) + NVE.replace("600.0", "50.0")
    script += "fix b all ubmd force 0.25 window 1 every 4\nregion up block -4 4 -4 4 10 14\n"
    script += "fix more all deposit 2 1 5 88 region up near 2.0 vz -1 -1\n"
    script += "fix less all evaporate 14 1 up 99\n" + BIAS_DUMP + "run 20\n" + lab.report("atoms")
    lab.run(script)
    counts = [len(frame["id"]) for frame in lab.dump("dump.test")]
    assert max(counts) > counts[0] == 9
    assert counts[-1] < max(counts)


def test_sorting_and_reneighbouring_change_nothing(lab, structures):
    """Atoms change their place in memory at every rebuild of the lists; their held bias follows."""
    paths = []
    for sort, neighbours in (("0 0", "delay 0 every 1 check yes"), ("1 1.5", "delay 0 every 1 check no")):
        head = lab.head(structures["triclinic"]).replace("sort 0 0", f"sort {sort}")
        script = head + NVE.replace("600.0", "4000.0") + f"neigh_modify {neighbours}\n"
        lab.run(script + "fix b all ubmd force 0.3 window 2 every 5\n" + BIAS_DUMP + "run 30\n")
        paths.append(lab.dump("dump.test"))
    assert np.abs(bias(paths[0][-1])).max() > 1e-3
    for frame, other in zip(*paths, strict=True):
        assert np.allclose(forces(frame), forces(other), rtol=0, atol=1e-7)
        assert np.allclose(bias(frame), bias(other), rtol=0, atol=1e-7)


def test_load_balancing_with_tiled_communication(lab, structures):
    """fix balance moves atoms, and their held bias, between ranks with sub-domains of any size."""
    head = lab.head(structures["cubic"]) + "replicate 1 2 1\n"
    script = NVE.replace("600.0", "4000.0") + "fix b all ubmd force 0.3 window 2 every 5\n" + BIAS_DUMP
    lab.run(head + script + "run 15\n")
    alone = lab.dump("dump.test")
    tiled = head.replace("boundary p p p", "boundary p p p\ncomm_style tiled")
    lab.run(tiled + script + "fix even all balance 7 1.0 rcb\nrun 15\n", 3)
    assert np.abs(bias(alone[-1])).max() > 1e-3
    for frame, other in zip(alone, lab.dump("dump.test"), strict=True):
        assert np.allclose(forces(frame), forces(other), rtol=0, atol=1e-7)
        assert np.allclose(bias(frame), bias(other), rtol=0, atol=1e-7)


def test_molecular_atom_style(lab, evaluator, structures):
    """Bonded neighbours interact too: the default special_bonds are refused with a sentence."""
    atoms = structures["molecule"]
    script = lab.head(atoms).replace("atom_style atomic", "atom_style full")
    rows = Path("data.test").read_text().split("Atoms # atomic\n\n")
    full = "".join("{} 1 {} 0.0 {} {} {}\n".format(*row.split()) for row in rows[1].splitlines())
    Path("data.test").write_text(f"{rows[0]}Atoms # full\n\n{full}")
    with pytest.raises(Exception, match=r"add 'special_bonds lj/coul 1\.0 1\.0 1\.0'"), lab.session(script + "run 0\n"):
        pass
    with lab.session(script + "special_bonds lj/coul 1.0 1.0 1.0\nrun 0\n") as lammps:
        assert lammps.get_thermo("pe") == pytest.approx(evaluator.predict_one(atoms).energy, rel=1e-10)


def test_overlay_with_zbl(lab, structures):
    """Energies and forces add up; the scale of the bias knows the forces of pair_style ubmd alone."""
    atoms = structures["cubic"]
    zbl = "zbl 1.0 3.0\n"
    pairs = combinations_with_replacement(enumerate((1, 6, 8), start=1), 2)
    charges = "".join(f"pair_coeff {i} {j} {{0}} {a} {b}\n" for (i, a), (j, b) in pairs)
    tail = "run 0\n" + BIAS_DUMP + "run 0\n" + lab.report("pe")
    fix = "fix b all ubmd force 0.25 window 1\n"
    both = lab.head(atoms).replace(
        "pair_style ubmd precision double", "pair_style hybrid/overlay ubmd precision double " + zbl
    )
    both = both.replace("* * model.pt", "* * ubmd model.pt") + charges.format("zbl") + fix
    energies, frames, scales = [], [], []
    alone = lab.head(atoms) + fix
    other = lab.head(atoms).split("pair_style")[0] + "pair_style " + zbl + charges.format("")
    other += "fix b all store/state 0 vx vx vx vx\n"
    for script in (both, alone, other):
        report = lab.report("f_b[4]") if script is not other else ""
        outcome = lab.run(script + tail + report)
        energies.append(one(outcome, "pe")[0])
        scales += outcome.numbers.get("f_b[4]", [])
        frames.append(forces(lab.dump("dump.test")[-1]))
    assert np.abs(frames[2]).max() > 1e-2
    assert energies[0] == pytest.approx(energies[1] + energies[2], rel=1e-10)
    assert np.allclose(frames[0], frames[1] + frames[2], rtol=0, atol=1e-9)
    assert scales[0] == pytest.approx(scales[1], rel=1e-12)


def test_fix_pair_of_a_sub_style(lab, structures):
    """fix pair finds the sub-style of hybrid/overlay; atoms without element have no uncertainty."""
    script = lab.head(structures["cubic"]).replace("pair_style ubmd", "pair_style hybrid/overlay lj/cut 3.0 ubmd")
    script = script.replace("* * model.pt H", "* * lj/cut 0.0 1.0\npair_coeff * * ubmd model.pt NULL")
    script += "fix u all pair 1 ubmd uncertainty 1\nfix b all ubmd\nrun 0\n"
    with lab.session(script) as lammps:
        u = lammps.numpy.extract_fix("u", 1, 1)[:18]
        assert np.array_equal(u, lammps.numpy.extract_fix("b", 1, 2)[:18, 0])
        assert np.array_equal(u == 0.0, lammps.numpy.extract_atom("type")[:18] == 1)


def test_stop_ends_a_minimisation(lab, structures):
    """And the next run is a normal one."""
    script = lab.head(structures["triclinic"]) + "fix b all ubmd stop 1e-9\nminimize 0.0 1e-4 20 100\n"
    script += lab.report("step") + "unfix b\nfix move all nve\nrun 3\n" + lab.report("step")
    steps = lab.run(script).numbers["step"]
    assert steps[0] <= 1.0
    assert steps[1] == steps[0] + 3.0


def test_fix_modify_energy_and_virial(lab, structures):
    """The bias energy is in pe only with `energy yes`, the bias virial in press unless `virial no`."""
    script = lab.head(structures["triclinic"]) + "fix b all ubmd force 0.2 stress 0.3 window 1\n"
    script += "compute q all pressure NULL fix\nthermo_style custom step pe press c_q\n"
    outputs = ("pe", "press", "f_b", "c_q")
    with_both = one(lab.run(script + "fix_modify b energy yes\nrun 0\n" + lab.report(*outputs)), *outputs)
    plain = one(lab.run(script + "run 0\n" + lab.report(*outputs)), *outputs)
    off = one(lab.run(script + "fix_modify b virial no\nrun 0\n" + lab.report(*outputs[:3])), *outputs[:3])
    assert plain[2] < 0.0
    assert abs(plain[3]) > 1.0
    assert with_both[0] == pytest.approx(plain[0] + plain[2], rel=1e-12)
    assert with_both[1] == plain[1] == pytest.approx(off[1] + plain[3], rel=1e-10)
    assert off[0] == plain[0]


def test_dump_of_uncertain_atoms(lab, structures):
    """`dump_modify thresh` on the fix's and on fix pair's atomic uncertainties."""
    atoms = structures["triclinic"]
    script = lab.head(atoms) + "fix b all ubmd\nfix u all pair 1 ubmd uncertainty 1\n"
    lab.run(script + BIAS_DUMP + "run 0\n")
    everyone = lab.dump("dump.test")[0]
    limit = float(np.median(everyone["f_b[1]"]))
    script += "dump d all custom 1 dump.one id f_b[1]\ndump_modify d sort id thresh f_b[1] > {0:.17g}\n"
    script += "dump e all custom 1 dump.two id f_u\ndump_modify e sort id thresh f_u > {0:.17g}\n"
    lab.run(script.format(limit) + "run 0\n")
    expected = everyone["id"][everyone["f_b[1]"] > limit]
    assert 0 < len(expected) < len(atoms)
    for name in ("dump.one", "dump.two"):
        assert lab.dump(name)[0]["id"].tolist() == expected.tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_shrink_wrapped_box(lab, evaluator, structures, ranks):
    """`boundary s s s`: the same numbers as in a fixed box."""
    atoms = structures["molecule"]
    script = lab.head(atoms).replace("boundary f f f", "boundary s s s") + NVE
    script += "fix b all ubmd force 0.25 window 5\n" + BIAS_DUMP + "run 10\n"
    lab.run(script, ranks)
    frame = lab.dump("dump.test")[-1]
    copy = atoms.copy()
    copy.positions = columns(frame, "xyz")
    expected = evaluator.predict_one(copy)
    assert np.abs(bias(frame)).max() > 1e-3
    assert np.allclose(forces(frame) - bias(frame), expected.forces, rtol=1e-8, atol=1e-9)
    assert np.allclose(frame["f_b[1]"], expected.atomic_u, rtol=1e-9)


def test_respa_runs_the_pair(lab, structures):
    """One level per pair style: an inner level of half the step is Verlet with half the step."""
    paths = []
    for style, timestep, steps in (("respa 2 2 pair 1", 0.0005, 10), ("verlet", 0.00025, 20)):
        script = lab.head(structures["molecule"]) + NVE.replace("0.0005", str(timestep))
        with lab.session(script + f"run_style {style}\nrun {steps}\n") as lammps:
            order = np.argsort(lammps.numpy.extract_atom("id")[:9])
            paths.append(lammps.numpy.extract_atom("x")[:9][order].copy())
    assert np.allclose(paths[0], paths[1], rtol=0, atol=1e-10)
    assert np.abs(paths[0] - structures["molecule"].positions).max() > 1e-3


def test_virial_is_zero_until_the_first_setup(lab, structures):
    """Fixes that come earlier in the script, barostats too, read it in their own setup.

    MALLOC_PERTURB_ makes glibc fill new memory with nonsense.
    """
    lab.environment = {"MALLOC_PERTURB_": "165"}
    script = (
        lab.head(structures["cubic"])
        + """
        compute p all pressure NULL fix
        fix early all ave/time 1 1 1 c_p
        fix b all ubmd force 0.25 stress 0.25 window 1
        run 0
        """
    )
    assert one(lab.run(script + lab.report("f_early", "c_p")), "f_early") == [0.0]
