"""`stop` ends the run at the first exceeding step and the script goes on; `save` collects frames."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from ase.io import read

DYNAMICS = """
velocity all create 900.0 31 dist gaussian
timestep 0.0005
fix integrate all nve
"""


def largest_by_step(lab, atoms, steps):
    """Largest atomic uncertainty of steps 0, 1, 2, ... of a monitored run."""
    script = lab.head(atoms) + DYNAMICS + "fix b all ubmd\n" + lab.every_step("f_b[2]") + f"run {steps}\n"
    return np.array(list(lab.by_step(lab.run(script), "f_b[2]").values()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_stops_at_first_exceeding_step(lab, structures, ranks):
    atoms = structures["molecule"]
    u = largest_by_step(lab, atoms, 60)
    limit = 0.5 * (u[:10].max() + u[10:].max())
    first = int(np.argmax(u > limit))
    assert 10 < first < 60
    script = lab.head(atoms) + DYNAMICS + f"fix b all ubmd save 1000.0 frames.extxyz stop {limit}\nrun 60\n"
    script += lab.report("step", "f_b[7]", "f_b[8]") + "unfix b\nrun 5\n" + lab.report("step")
    n = lab.run(script, ranks).numbers
    assert n["step"] == [first, first + 5]
    assert n["f_b[7]"] == [1.0]
    assert n["f_b[8]"] == [1.0]
    frames = read("frames.extxyz", ":")
    assert [frame.info["step"] for frame in frames] == [first]
    assert frames[0].info["max_uncertainty"] > limit


def test_setup_may_stop_already(lab, structures):
    """A structure that exceeds the limit at once runs no step; every later run command checks again."""
    script = lab.head(structures["molecule"]) + DYNAMICS
    script += "fix b all ubmd stop 1e-9 save 0.0 frames.extxyz every 10\nrun 50\nrun 50\n" + lab.report(
        "step", "f_b[7]"
    )
    script += "unfix b\nfix b all ubmd stop 1e9\nrun 7\n" + lab.report("step", "f_b[7]")
    n = lab.run(script).numbers
    assert n["step"] == [0.0, 7.0]
    assert n["f_b[7]"] == [1.0, 0.0]
    assert len(read("frames.extxyz", ":")) == 1


@pytest.mark.parametrize(("kind", "ranks"), [("molecule", 1), ("triclinic", 2)])
def test_saved_frames(lab, evaluator, structures, kind, ranks):
    """Every tenth step, sorted by id, exact positions, uncertainties as in Python."""
    atoms = structures[kind]
    script = lab.head(atoms) + DYNAMICS + "fix b all ubmd save 0.0 frames.extxyz every 10 window 5 force 0.1\n"
    script += "dump d all custom 10 dump.test id xu yu zu\ndump_modify d sort id format float %.17g\nrun 15\nrun 15\n"
    n = lab.run(script + lab.report("f_b[8]"), ranks).numbers
    frames = read("frames.extxyz", ":")
    dumped = lab.dump("dump.test")
    assert [frame.info["step"] for frame in frames] == [0, 10, 20, 30]
    assert n["f_b[8]"] == [4.0]
    for frame, columns in zip(frames, dumped, strict=True):
        assert frame.get_chemical_symbols() == atoms.get_chemical_symbols()
        assert frame.arrays["id"].tolist() == list(range(1, len(atoms) + 1))
        assert np.array_equal(frame.positions, np.stack([columns[k] for k in ("xu", "yu", "zu")], 1))
        assert frame.pbc.all() == atoms.pbc.all()
        expected = evaluator.predict_one(frame)
        assert frame.info["uncertainty"] == pytest.approx(expected.u, rel=1e-9)
        assert frame.info["max_uncertainty"] == pytest.approx(expected.atomic_u.max(), rel=1e-9)
        assert np.allclose(frame.arrays["atomic_uncertainty"], expected.atomic_u, rtol=1e-9)


def test_only_frames_above_the_limit(lab, structures):
    """With `every 1` of save but evaluations every 2 steps: exceeding evaluations only."""
    atoms = structures["molecule"]
    u = largest_by_step(lab, atoms, 40)
    limit = float(np.median(u[2::2]))
    expected = [step for step in range(2, 41, 2) if u[step] > limit]
    script = lab.head(atoms) + DYNAMICS + f"fix b all ubmd every 2 save {limit:.17g} frames.extxyz every 1\nrun 40\n"
    lab.run(script)
    saved = [frame.info["step"] for frame in read("frames.extxyz", ":") if frame.info["step"] > 0]
    assert saved == expected
    assert 3 < len(saved) < 20


SAVE = "fix b all ubmd save 0.0 frames.extxyz every {}\n"
MOVE = "displace_atoms all random 0.05 0.05 0.05 {} units box\n"


def difference(frame, other):
    """Largest change of a position or cell vector, Å; infinite if atoms or elements differ."""
    if frame.get_chemical_symbols() != other.get_chemical_symbols():
        return np.inf
    return max(np.abs(frame.positions - other.positions).max(), np.abs(frame.cell.array - other.cell.array).max())


def check_frames(lab, evaluator, outcome, steps):
    """The file has frames of these steps, as many as the counter says; u as in Python; no two in a row are alike."""
    frames = read("frames.extxyz", ":")
    assert [frame.info["step"] for frame in frames] == steps
    assert outcome.numbers["f_b[8]"][-1] == len(steps)
    for frame in frames:
        assert frame.info["uncertainty"] == pytest.approx(evaluator.predict_one(frame).u, rel=1e-9)
    for frame, other in pairwise(frames):
        assert difference(frame, other) > 1e-6
    return frames


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("every", [1, 10])
def test_every_setup_of_other_positions_is_a_frame(lab, evaluator, structures, every, ranks):
    """However often `run 0` is given at one step; the same positions again are none."""
    script = lab.head(structures["triclinic"]) + SAVE.format(every) + "run 0\nrun 0\n" + MOVE.format(11) + "run 0\n"
    script += "run 0 post no\n" + MOVE.format(12) + "run 0\n" + "fix move all nve\ntimestep 0.0005\n" + MOVE.format(13)
    script += "run 3\nrun 4\n" + MOVE.format(14) + "run 3\n" + lab.report("f_b[8]")
    ones = [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10]
    check_frames(lab, evaluator, lab.run(script, ranks), ones if every == 1 else [0, 0, 0, 0, 7, 10])


CHANGES = {
    "set": "set atom 4 x 0.3\n",
    "type": "set atom 4 type 2\n",
    "delete": "group one id 4\ndelete_atoms group one compress no\n",
    "create": "create_atoms 2 single 1.0 1.1 0.9\n",
    "box": "change_box all x scale 1.02 remap\n",
    "vacuum": "change_box all z final -1.0 12.0\n",
    "read_dump": "read_dump old.dump 0 x y z box no\n",
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_two_setups(lab, evaluator, structures, change):
    script = lab.head(structures["cubic"])
    script += "write_dump all custom old.dump id type x y z\n" + MOVE.format(3) + SAVE.format(5) + "run 0\n"
    script += CHANGES[change] + "run 0\nrun 0\n" + lab.report("f_b[8]")
    check_frames(lab, evaluator, lab.run(script), [0, 0])


NOTHING = {
    "velocities": "velocity all create 500.0 9\n",
    "neighbours": "neighbor 1.5 bin\nneigh_modify delay 0 every 1 check no\n",
    "order": "atom_modify sort 1 2.0\n",
    "a monitor": "fix w all ave/atom 1 1 1 x\n",
    "step": "reset_timestep 0\n",
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("nothing", NOTHING)
def test_the_end_of_a_run_is_saved_once(lab, evaluator, structures, nothing, ranks):
    """Atoms that left the box at the last step are wrapped, sorted and sent to other ranks in the next setup."""
    hot = DYNAMICS.replace("900.0", "9000.0") + "neighbor 3.0 bin\nneigh_modify delay 50\n"
    script = lab.head(structures["triclinic"]) + hot + SAVE.format(1) + "run 12\n" + NOTHING[nothing]
    first = 0 if nothing == "step" else 12
    steps = [*range(13), *range(first + 1, first + 6)]
    check_frames(lab, evaluator, lab.run(script + "run 5\n" + lab.report("f_b[8]"), ranks), steps)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_number_that_comes_again_is_another_frame(lab, evaluator, structures, ranks):
    """After `reset_timestep` the last frame of the run before has the number of a later step."""
    script = lab.head(structures["triclinic"]) + DYNAMICS + SAVE.format(5) + "run 5\nreset_timestep 0\nrun 5\n"
    script += "reset_timestep 3\nrun 4\n" + lab.report("f_b[8]")
    check_frames(lab, evaluator, lab.run(script, ranks), [0, 5, 5, 5])


def test_relaxations_between_setups(lab, evaluator, structures):
    """`run 0`, minimize, the step set back, `run 0`: minimisations aren't saved, what they lead to is."""
    script = lab.head(structures["triclinic"]) + SAVE.format(1) + "run 0\nminimize 0.0 1e-8 5 20\n"
    script += "reset_timestep 0\nrun 0\nminimize 0.0 1e-8 3 20\nrun 0\nminimize 0.0 1e9 0 20\nrun 0\n"
    outcome = lab.run(script + lab.report("f_b[8]"))
    frames = read("frames.extxyz", ":")
    check_frames(lab, evaluator, outcome, [0, 0, frames[2].info["step"]])
    assert frames[2].info["step"] > 0


def test_stop_saves_every_start_that_exceeds_it(lab, evaluator, structures):
    """The same start again is no new frame, another start is one."""
    script = lab.head(structures["molecule"]) + DYNAMICS + "fix b all ubmd stop 1e-9 save 1000.0 frames.extxyz\n"
    script += "run 5\nrun 5\n" + MOVE.format(5) + "run 5\nrun 5\n" + lab.report("f_b[8]")
    check_frames(lab, evaluator, lab.run(script), [0, 0])


def test_frame_before_a_restart_is_not_saved_again(lab, evaluator, structures):
    script = lab.head(structures["triclinic"]) + DYNAMICS + SAVE.format(2) + "run 4\nwrite_restart cut\n"
    lab.run(script)
    again = "units metal\natom_modify map array sort 0 0\nread_restart cut\nneighbor 1.0 bin\n"
    again += "pair_style ubmd precision double\npair_coeff * * model.pt H C O\ntimestep 0.0005\nfix integrate all nve\n"
    again += SAVE.format(2) + "run 2\n" + MOVE.format(8) + "run 2\n" + lab.report("f_b[8]")
    check_frames(lab, evaluator, lab.run(again), [0, 2, 4, 6, 6, 8])


def test_reruns_of_the_same_steps(lab, evaluator, structures):
    """Two files of frames 0, 4, 8 are six frames."""
    dynamics = DYNAMICS + "dump d all custom 4 {0}.dump id type x y z\nrun 8\n"
    lab.run(lab.head(structures["cubic"]) + dynamics.format("a"))
    lab.run(lab.head(structures["cubic"]) + dynamics.replace("31", "33").format("b"))
    reruns = "rerun a.dump dump x y z box no\nrerun b.dump dump x y z box no\n"
    outcome = lab.run(lab.head(structures["cubic"]) + SAVE.format(1) + reruns + lab.report("f_b[8]"))
    frames = read("frames.extxyz", ":")
    assert [frame.info["step"] for frame in frames] == [0, 4, 8, 0, 4, 8]
    assert outcome.numbers["f_b[8]"] == [6.0]
