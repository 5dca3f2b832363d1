"""Whole trajectories: any number of ranks, and restarts in the middle."""

from __future__ import annotations

import numpy as np
import pytest

NPT = """
velocity all create 300.0 77 dist gaussian
timestep 0.0005
neigh_modify every 1 delay 0 check yes
"""
BAROSTAT = "fix box all npt temp 300 300 0.1 tri 0 0 1.0\n"
DUMP = """
dump d all custom 20 dump.test id xu yu zu fx fy fz vx vy vz
dump_modify d sort id format float %.17g
"""
OUTPUTS = ["f_b[4]", "f_b[5]", "f_b[6]", "vol", "c_q[1]", "c_q[5]"]


def positions(frames):
    return np.array([np.stack([frame[name] for name in ("xu", "yu", "zu")], 1) for frame in frames])


@pytest.mark.parametrize(
    ("steps", "ranks"), [(60, (1, 2)), pytest.param(300, (1, 2, 4), marks=[pytest.mark.slow, pytest.mark.slow_ci])]
)
def test_every_number_of_ranks_gives_the_same_trajectory(lab, structures, steps, ranks):
    """Biased NPT in a triclinic box: within 1e-7 Å of the run on one rank at every 20th step."""
    script = lab.head(structures["triclinic"]) + NPT + "fix b all ubmd force 0.25 stress 0.25 window 20\n"
    script += "compute q all pressure NULL fix\nthermo_style custom step c_q[1]\n" + BAROSTAT + DUMP + f"run {steps}\n"
    paths, outputs = [], []
    for count in ranks:
        outputs.append({name: v[0] for name, v in lab.run(script + lab.report(*OUTPUTS), count).numbers.items()})
        paths.append(positions(lab.dump("dump.test")))
    assert len(paths[0]) == steps // 20 + 1
    assert np.abs(paths[0][-1] - paths[0][0]).max() > 0.01
    for path, output in zip(paths[1:], outputs[1:], strict=True):
        assert np.abs(path - paths[0]).max() < 1e-7
        assert output == pytest.approx(outputs[0], rel=1e-6)
    assert outputs[0]["f_b[6]"] > 0.1  # force bias
    assert outputs[0]["f_b[5]"] > 0.0
    assert abs(outputs[0]["c_q[1]"]) > 1.0  # stress bias, bar


def cut_and_continue(lab, atoms, pair, fixes, ranks):
    """Last frames of 20 + 20 steps in one script, and of the second half from a restart file."""
    settings = "timestep 0.0005\nneigh_modify every 1 delay 0 check no\n" + fixes
    start = lab.head(atoms).split("pair_style")[0] + pair + "velocity all create 800.0 5 dist gaussian\n"
    lab.run(start + settings + "run 20\nwrite_restart cut\n" + DUMP + "run 20\n", ranks)
    whole = lab.dump("dump.test")[-1]
    again = "units metal\natom_modify map array sort 0 0\nread_restart cut\nneighbor 1.0 bin\n"
    biased = BIAS in fixes
    outcome = lab.run(again + pair + settings + DUMP + "run 20\n" + (lab.report("f_b[6]") if biased else ""), ranks)
    assert not biased or outcome.numbers["f_b[6]"][0] > 0.1
    return whole, lab.dump("dump.test")[-1]


def deviation(frames, names):
    return max(np.abs(frames[0][name] - frames[1][name]).max() for name in names)


UBMD = "pair_style ubmd precision double\npair_coeff * * model.pt H C O\n"
LENNARD_JONES = "pair_style lj/cut 4.0\npair_coeff * * 0.05 1.8\n"
BIAS = "fix b all ubmd force 0.3 stress 0.3 window 4 every 3\n"
ALL = ("xu", "yu", "zu", "fx", "fy", "fz", "vx", "vy", "vz")


@pytest.mark.parametrize("ranks", [1, 2])
def test_restart_of_nvt_is_exact(lab, structures, ranks):
    """Nosé-Hoover NVT, cut between two evaluations: bit for bit."""
    fixes = "fix box all nvt temp 800 800 0.1\n" + BIAS
    whole, continued = cut_and_continue(lab, structures["cubic"], UBMD, fixes, ranks)
    for name in ALL:
        assert np.array_equal(whole[name], continued[name])


def test_restart_of_npt_is_as_good_as_that_of_lj(lab, structures):
    """The box of NPT is not restored to the last bit by LAMMPS itself: no worse than lj/cut beside it."""
    names = ("xu", "yu", "zu")
    frames = cut_and_continue(lab, structures["triclinic"], UBMD, BAROSTAT + BIAS, 1)
    other = cut_and_continue(lab, structures["triclinic"], LENNARD_JONES, BAROSTAT, 1)
    assert deviation(frames, names) <= max(deviation(other, names), 1e-12)
