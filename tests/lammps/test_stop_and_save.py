"""`stop` ends the run at the first exceeding step and the script goes on; `save` collects frames."""

from __future__ import annotations

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
