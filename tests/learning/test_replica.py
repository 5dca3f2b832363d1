"""One LAMMPS replica: same physics as in Python, sane frames only, and a result however it ends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.lammps import Prism
from replicas import crystal, make_task
from system import cluster

from ubmd.attempts import Attempt
from ubmd.calculator import Model
from ubmd.data.structures import read_structures
from ubmd.errors import SimulationError
from ubmd.lammps import replica
from ubmd.lammps.box import Box
from ubmd.lammps.replica import ReplicaTask, run_replica, salvage
from ubmd.lammps.session import system_commands
from ubmd.references import label
from ubmd.settings import ReferenceSettings


def skewed_cell() -> Atoms:
    """Copper in a cell that is triclinic, turned against LAMMPS's axes, and has atoms outside."""
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.set_cell(atoms.cell[:] @ np.array([[1.0, 0.1, 0.0], [0.0, 1.0, 0.15], [0.05, 0.0, 1.0]]), scale_atoms=True)
    atoms.rotate(40.0, (1.0, 2.0, 3.0), rotate_cell=True)
    atoms.symbols[3] = "Au"
    atoms.positions[0] += 2.0 * atoms.cell[1]
    return atoms


@pytest.mark.parametrize("start", [cluster(), skewed_cell()], ids=["molecule", "skewed cell"])
def test_frames_have_the_uncertainties_of_python(model: Path, tmp_path: Path, start: Atoms) -> None:
    task = make_task(tmp_path, model, start)
    result = run_replica(task)
    assert (result.stopped, result.steps, result.frames, result.reason) == ("step limit", 40, 5, "")
    assert 0.05 < result.bias_share < 1.0
    frames = read_structures(task.frames)
    assert [frame.info["step"] for frame in frames] == [0, 10, 20, 30, 40]
    assert {frame.info["replica"] for frame in frames} == {3}
    evaluator = Model(model, "double")
    for frame, prediction in zip(frames, evaluator.predict(frames), strict=True):
        assert frame.get_chemical_symbols() == start.get_chemical_symbols()
        assert frame.info["uncertainty"] == pytest.approx(prediction.u, rel=1e-9)
        np.testing.assert_allclose(frame.arrays["atomic_uncertainty"], prediction.atomic_u, rtol=1e-9)
        assert frame.info["max_uncertainty"] == pytest.approx(prediction.atomic_u.max(), rel=1e-9)
    # The first frame is the start structure, turned at most.
    before, after = (a.get_all_distances(mic=bool(a.pbc.any())) for a in (start, frames[0]))
    np.testing.assert_allclose(after, before, atol=1e-9)
    assert np.abs(frames[-1].get_all_distances() - frames[0].get_all_distances()).max() > 0.05


RING = [[2.5 * np.cos(np.pi * k / 3.0), 2.5 * np.sin(np.pi * k / 3.0), 0.0] for k in range(6)]
CHAIN = [[2.4 * k, 0.0, 0.0] for k in range(3)]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize(("symbols", "positions"), [("Cu5Au", RING), ("CuAuCu", CHAIN)], ids=["ring", "chain"])
def test_flat_and_linear_molecules_run(
    model: Path, tmp_path: Path, symbols: str, positions: list[list[float]], axes: tuple[int, int, int]
) -> None:
    """Along the axes LAMMPS has no bins for neighbours; forces and uncertainties are those of Python all the same."""
    start = Atoms(symbols, np.array(positions)[:, axes])
    assert np.ptp(start.positions, axis=0).min() == 0.0
    result = run_replica(make_task(tmp_path, model, start))
    assert (result.stopped, result.steps, result.frames, result.reason) == ("step limit", 40, 5, "")
    frames = read_structures(tmp_path / "frames.extxyz")
    np.testing.assert_array_equal(frames[0].positions, start.positions)
    for frame, prediction in zip(frames, Model(model, "double").predict(frames), strict=True):
        assert frame.info["uncertainty"] == pytest.approx(prediction.u, rel=1e-9)
        np.testing.assert_allclose(frame.arrays["atomic_uncertainty"], prediction.atomic_u, rtol=1e-9)


def test_molecules_that_become_flat_run_from_the_beginning_without_bins(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turning dimer is thinner than the bins now and then; its frames are those of a run without bins."""
    attempts: list[str] = []
    original = replica._run_once

    def note(task: ReplicaTask, attempt: Attempt, neighbours: replica.Neighbours, *rest: Any) -> Any:
        attempts.append(neighbours)
        return original(task, attempt, neighbours, *rest)

    monkeypatch.setattr(replica, "_run_once", note)
    dimer = Atoms("Cu2", [[0.0, 0.0, 0.0], [2.2, 0.2, 0.4]])
    changes = {"steps": 4000, "temperature": 600.0, "force": 0.0}
    result = run_replica(make_task(tmp_path, model, dimer, **changes))
    assert attempts == ["bin", "nsq"]
    assert (result.stopped, result.steps, result.frames) == ("step limit", 4000, 401)
    content = (tmp_path / "frames.extxyz").read_bytes()
    task = make_task(tmp_path, model, dimer, **changes)
    original(task, Attempt.begin(task.frames), "nsq")
    result = replica.salvage(task, "as above")
    assert (result.frames, (tmp_path / "frames.extxyz").read_bytes()) == (401, content)


def test_bins_of_other_molecules_stay(model: Path, tmp_path: Path) -> None:
    """The order in which bins list neighbours decides last digits: runs of before must repeat."""
    commands = system_commands(cluster(), Box(cluster()), model, "double")
    assert "neighbor 1.0 bin" in commands
    assert "boundary s s s" in commands


CV = """
colvarsTrajFrequency 0
colvarsRestartFrequency 0
colvar {
    name apart
    distance {
        group1 { atomNumbers 1 }
        group2 { atomNumbers 2 }
    }
}
"""
SPRING = """
harmonic {
    colvars apart
    centers 3.3
    forceConstant 50.0
}
"""
HILLS = """
metadynamics {
    colvars apart
    hillWeight 0.1
    newHillFrequency 5
    gaussianSigmas 0.2
    useGrids off
}
"""


def test_colvars_join_the_dynamics_of_a_monitored_replica(model: Path, tmp_path: Path) -> None:
    """A spring pulls two atoms apart; uncertainties are watched and stop the replica as ever, no file is left."""
    results, largest = {}, {}
    for name, changes in (("free", {}), ("pulled", {"colvars": CV + SPRING})):
        (tmp_path / name).mkdir()
        task = make_task(tmp_path / name, model, force=0.0, frames_every=2, **changes)
        results[name] = run_replica(task)
        largest[name] = max(frame.get_distance(0, 1) for frame in read_structures(task.frames))
        assert (results[name].reason, results[name].bias_share) == ("", 0.0), largest
        assert sorted(path.name for path in task.frames.parent.iterdir()) == [
            "frames.extxyz",
            "frames.log",
            "start.extxyz",
        ]
    assert largest["free"] < 3.1 < largest["pulled"]
    threshold = (read_structures(task.frames)[0].info["max_uncertainty"] + results["pulled"].max_u) / 2
    stopped = run_replica(make_task(tmp_path, model, force=0.0, colvars=CV + SPRING, threshold=threshold))
    assert (stopped.stopped, stopped.steps < 40) == ("threshold", True)


def test_colvars_do_not_notice_pieces_of_a_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, model, colvars=CV + HILLS, force=0.0)
    run_replica(task)
    whole = read_structures(task.frames)
    run_replica(task.model_copy(update={"colvars": ""}))
    assert np.abs(read_structures(task.frames)[-1].positions - whole[-1].positions).max() > 0.01
    monkeypatch.setattr(replica, "_PIECE", 7)
    run_replica(task)
    for before, after in zip(whole, read_structures(task.frames), strict=True):
        np.testing.assert_allclose(after.positions, before.positions, atol=1e-9)


def test_colvars_that_lammps_refuses(model: Path, tmp_path: Path) -> None:
    result = run_replica(make_task(tmp_path, model, colvars=CV.replace("distance", "distans")))
    assert result.stopped == "failed"
    assert "collective variables" in result.reason


def test_pieces_of_a_run_leave_no_trace(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, model)
    run_replica(task)
    whole = task.frames.read_bytes()
    monkeypatch.setattr(replica, "_PIECE", 7)
    run_replica(task)
    assert task.frames.read_bytes() == whole


@pytest.mark.parametrize("start", [cluster(), skewed_cell()], ids=["molecule", "skewed cell"])
def test_traces_record_what_frames_say_and_change_nothing(model: Path, tmp_path: Path, start: Atoms) -> None:
    task = make_task(tmp_path, model, start)
    run_replica(task)
    plain = task.frames.read_bytes()
    assert not replica.trace_file(task).exists()
    log = task.frames.with_suffix(".log").read_text()
    task = task.model_copy(update={"trace_every": 4})
    run_replica(task)
    assert task.frames.read_bytes() == plain
    assert task.frames.with_suffix(".log").read_text().count("\nrun ") == log.count("\nrun ") + 1 == 2  # not ten
    trace, frames = np.load(replica.trace_file(task)), read_structures(task.frames)
    assert trace["step"].tolist() == list(range(4, 41, 4))
    assert float(trace["timestep"]) == task.timestep
    np.testing.assert_array_equal(trace["numbers"], start.numbers)
    for step in (20, 40):
        record, frame = trace["step"].tolist().index(step), frames[step // 10]
        assert trace["max_u"][record] == frame.info["max_uncertainty"]
        np.testing.assert_allclose(trace["cell"][record], frame.cell[:] if start.pbc.all() else 0.0, atol=1e-9)
        apart = trace["positions"][record] - frame.positions
        if start.pbc.all():  # up to cell vectors
            apart = apart - np.round(apart @ np.linalg.inv(frame.cell[:])) @ frame.cell[:]
        assert np.abs(apart).max() < 1e-5


def test_a_failed_replica_has_no_trace(model: Path, tmp_path: Path) -> None:
    change = {"timestep": 60.0, "steps": 3000, "force": 0.0, "threshold": 1e30, "trace_every": 2}
    task = make_task(tmp_path, model, **change)
    assert run_replica(task).stopped == "failed"
    assert not replica.trace_file(task).exists()


def test_seeds_decide_the_trajectory(model: Path, tmp_path: Path) -> None:
    ends = []
    for seeds in ((11, 12), (11, 12), (11, 13), (10, 12)):
        task = make_task(tmp_path, model, velocity_seed=seeds[0], langevin_seed=seeds[1])
        run_replica(task)
        ends.append(read_structures(task.frames)[-1].positions)
    np.testing.assert_array_equal(ends[0], ends[1])
    assert np.abs(ends[0] - ends[2]).max() > 1e-3
    assert np.abs(ends[0] - ends[3]).max() > 1e-3


def test_bias_heats_what_it_may_and_a_monitor_does_not(model: Path, tmp_path: Path) -> None:
    shares = {}
    ends = {}
    for force in (0.0, 0.5):
        task = make_task(tmp_path, model, force=force)
        shares[force] = run_replica(task).bias_share
        ends[force] = read_structures(task.frames)[-1].positions
    assert shares[0.0] == 0.0
    assert shares[0.5] > 0.05
    assert np.abs(ends[0.0] - ends[0.5]).max() > 1e-3


def test_the_threshold_ends_the_run_and_keeps_its_frame(model: Path, tmp_path: Path) -> None:
    task = make_task(tmp_path, model, steps=2000)
    free = run_replica(make_task(tmp_path, model, steps=100))
    threshold = 0.9 * free.max_u
    result = run_replica(task.model_copy(update={"threshold": threshold}))
    frames = read_structures(task.frames)
    assert result.stopped == "threshold"
    assert result.steps == frames[-1].info["step"] <= 100
    assert frames[-1].info["max_uncertainty"] > threshold
    assert all(frame.info["max_uncertainty"] <= threshold for frame in frames[:-1])


def test_an_explosion_keeps_the_sane_frames(model: Path, tmp_path: Path) -> None:
    task = make_task(tmp_path, model, timestep=60.0, steps=3000, frames_every=1, force=0.0, threshold=1e30)
    result = run_replica(task)
    assert result.stopped == "failed"
    assert any(word in result.reason for word in ("exploded", "overlap", "LAMMPS stopped with an error"))
    frames = read_structures(task.frames)
    assert 0 < len(frames) == result.frames < 3000
    assert all(np.isfinite(frame.positions).all() for frame in frames)
    assert result.steps < 3000


def test_overlapping_start_atoms_give_no_frames(model: Path, tmp_path: Path) -> None:
    atoms = cluster()
    atoms.positions[1] = atoms.positions[0] + 0.3
    task = make_task(tmp_path, model, atoms, threshold=1e30)
    result = run_replica(task)
    assert (result.stopped, result.frames) == ("failed", 0)
    assert task.frames.read_text() == ""


def test_a_lost_process_leaves_its_frames(model: Path, tmp_path: Path) -> None:
    task = make_task(tmp_path, model)
    run_replica(task)
    content = task.frames.read_text()
    (Attempt.begin(task.frames).folder / "frames.extxyz").write_text(content[:-200])  # the last frame is cut short
    task.frames.unlink()
    result = salvage(task, "The worker process was killed by SIGSEGV.")
    assert (result.stopped, result.reason) == ("failed", "The worker process was killed by SIGSEGV.")
    assert [frame.info["step"] for frame in read_structures(task.frames)] == [0, 10, 20, 30]
    assert result.steps == 30


def test_what_cannot_start_is_one_sentence(model: Path, tmp_path: Path) -> None:
    unknown = cluster()
    unknown.symbols[0] = "Ni"
    with pytest.raises(SimulationError, match=r"LAMMPS could not be set up: .*Ni"):
        run_replica(make_task(tmp_path, model, unknown))
    with pytest.raises(SimulationError, match=r"LAMMPS could not be set up: .*nowhere.pt"):
        run_replica(make_task(tmp_path, tmp_path / "nowhere.pt"))


# ------------------------------------------------------------------------------------------ constant pressure


NPT = {
    "ensemble": "npt",
    "temperature": 500.0,
    "damping": 0.1,
    "pressure": 2000.0,
    "pressure_damping": 0.3,
    "force": 0.0,
    "species": {},
}


def pressures(frames: list[Atoms], model: Path, temperature: float) -> np.ndarray:
    """Virial of the model plus the kinetic part of the thermostat's temperature, MPa."""
    stress = np.array([p.stress for p in Model(model, "double").predict(frames)])
    kinetic = np.array([(len(a) - 1) * units.kB * temperature / a.get_volume() for a in frames])
    return (kinetic - stress[:, :3].mean(axis=1)) / units.GPa * 1000.0


def test_constant_pressure_repeats_bit_for_bit_in_pieces_or_not(
    crystal_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, crystal_model, crystal(), **NPT | {"force": 0.2, "stress": 0.3})
    result = run_replica(task)
    assert (result.stopped, result.reason) == ("step limit", "")
    assert (result.ensemble, result.temperature, result.pressure) == ("npt", 500.0, 2000.0)
    assert (result.force, result.stress) == (0.2, 0.3)
    whole = task.frames.read_bytes()
    run_replica(task)
    assert task.frames.read_bytes() == whole
    monkeypatch.setattr(replica, "_PIECE", 7)
    run_replica(task)
    assert task.frames.read_bytes() == whole


@pytest.mark.parametrize("coupling", ["iso", "aniso", "tri"])
def test_the_barostat_moves_what_it_may(crystal_model: Path, tmp_path: Path, coupling: str) -> None:
    task = make_task(tmp_path, crystal_model, crystal(), **NPT | {"coupling": coupling, "steps": 100})
    assert run_replica(task).stopped == "step limit"
    frames = read_structures(task.frames)
    first, last = frames[0].cell[:], frames[-1].cell[:]
    np.testing.assert_allclose(frames[0].cell.cellpar(), crystal().cell.cellpar(), rtol=1e-12)
    np.testing.assert_array_equal(last[[0, 0, 1], [1, 2, 2]], 0.0)  # as LAMMPS turns cells
    stretch = np.linalg.solve(first, last)
    assert abs(frames[-1].get_volume() / frames[0].get_volume() - 1.0) > 1e-3
    lengths = np.diag(stretch)
    assert (np.ptp(lengths) < 1e-12) == (coupling == "iso")
    sheared = np.abs(stretch - np.diag(lengths)).max()
    assert (sheared < 1e-12) == (coupling == "iso") or coupling == "aniso"
    assert np.isclose(last[1, 0] / first[1, 0], last[1, 1] / first[1, 1]) == (coupling != "tri")


def test_frames_have_the_cell_of_the_run(crystal_model: Path, tmp_path: Path) -> None:
    task = make_task(tmp_path, crystal_model, crystal(), **NPT)
    with replica._session(task, tmp_path, crystal()) as session:
        np.testing.assert_allclose(session.cell(), Prism(crystal().cell[:]).lammps_cell, atol=1e-12)
        session.run(task.steps, first=True)
        cell, volume = session.cell(), session.lammps.get_thermo("vol")
    *_, last = replica._sane_frames(task, tmp_path)
    np.testing.assert_array_equal(last.cell[:], cell)
    assert last.get_volume() == pytest.approx(volume, rel=1e-12)
    assert volume != pytest.approx(crystal().get_volume(), rel=1e-4)


def test_labels_of_frames_are_those_of_the_unturned_structure(crystal_model: Path, tmp_path: Path) -> None:
    """Energy the same, forces and stress turned: frames carry LAMMPS's cell, and nothing mixes the two orientations."""
    task = make_task(tmp_path, crystal_model, crystal(), **NPT | {"force": 0.2, "stress": 0.3, "steps": 100})
    run_replica(task)
    turn = Prism(crystal().cell[:]).rot_mat  # x_lammps = x @ turn
    reference = ReferenceSettings(calculator="ase.calculators.emt:EMT")
    for frame in read_structures(task.frames)[::5]:
        turned_back = Atoms(frame.numbers, frame.positions @ turn.T, cell=frame.cell[:] @ turn.T, pbc=True)
        here, there = label(frame, reference, Path()), label(turned_back, reference, Path())
        assert here.get_potential_energy() == pytest.approx(there.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(here.get_forces(), there.get_forces() @ turn, atol=1e-9)
        np.testing.assert_allclose(
            here.get_stress(voigt=False), turn.T @ there.get_stress(voigt=False) @ turn, atol=1e-10
        )
        np.testing.assert_array_equal(frame.positions, here.positions)
    # The first frame is the start structure: same label, turned.
    start, first = (label(a, reference, Path()) for a in (crystal(), read_structures(task.frames)[0]))
    np.testing.assert_allclose(first.get_forces(), start.get_forces() @ turn, atol=1e-8)
    np.testing.assert_allclose(first.get_stress(voigt=False), turn.T @ start.get_stress(voigt=False) @ turn, atol=1e-9)
    # and the model says of a frame what the fix said during the run, in a cell that has changed
    last = read_structures(task.frames)[-1]
    prediction = Model(crystal_model, "double").predict_one(last)
    assert last.info["uncertainty"] == pytest.approx(prediction.u, rel=1e-8)
    np.testing.assert_allclose(last.arrays["atomic_uncertainty"], prediction.atomic_u, rtol=1e-8)


def test_the_mean_pressure_is_that_of_the_barostat(crystal_model: Path, tmp_path: Path) -> None:
    means = {}
    for pressure in (-1000.0, 4000.0):
        task = make_task(tmp_path, crystal_model, crystal(), **NPT | {"pressure": pressure, "steps": 800})
        assert run_replica(task).stopped == "step limit"
        frames = read_structures(task.frames)[30:]  # after 0.6 ps
        means[pressure] = pressures(frames, crystal_model, 500.0).mean(), np.mean([a.get_volume() for a in frames])
        assert means[pressure][0] == pytest.approx(pressure, abs=400.0)  # they fluctuate by 2500
    # The bulk modulus of EMT copper is 134 GPa: 5 GPa are 3.7 %.
    assert -0.05 < means[4000.0][1] / means[-1000.0][1] - 1.0 < -0.025


def test_a_bias_stress_acts_through_the_barostat(crystal_model: Path, tmp_path: Path) -> None:
    cells = {}
    for stress in (0.0, 0.5):
        task = make_task(tmp_path, crystal_model, crystal(), **NPT | {"stress": stress})
        result = run_replica(task)
        assert result.bias_share == 0.0  # of the forces
        frames = read_structures(task.frames)
        cells[stress] = np.array([frame.cell[:] for frame in frames])
    np.testing.assert_array_equal(cells[0.0][0], cells[0.5][0])
    assert np.abs(cells[0.0][-1] - cells[0.5][-1]).max() > 1e-4


def test_atomic_uncertainty_biases_otherwise(crystal_model: Path, tmp_path: Path) -> None:
    ends = []
    for kind in ("energy", "atomic"):
        task = make_task(tmp_path, crystal_model, crystal(), **NPT | {"force": 0.5, "uncertainty": kind})
        assert 0.05 < run_replica(task).bias_share < 2.0
        ends.append(read_structures(task.frames)[-1].positions)
    assert np.abs(ends[0] - ends[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("pressure", "words"),
    [(-15000.0, r"is [1-9][\d.]* times that of the start"), (30000.0, r"is 0\.\d+ times that of the start")],
    ids=["blown up", "collapsed"],
)
def test_a_cell_out_of_bounds_ends_the_replica(
    crystal_model: Path, tmp_path: Path, pressure: float, words: str
) -> None:
    change = {"pressure": pressure, "pressure_damping": 2.0, "cell_limit": 1.08, "steps": 2000, "frames_every": 5}
    task = make_task(tmp_path, crystal_model, crystal(), **NPT | change | {"threshold": float("inf")})
    result = run_replica(task)
    assert result.stopped == "failed"
    assert re.search(words, result.reason), result.reason
    assert "beyond a factor of 1.08" in result.reason
    frames = read_structures(task.frames)
    assert 1 < len(frames) == result.frames < 200
    assert result.steps <= frames[-1].info["step"] + 5
    ratios = np.array([frame.get_volume() for frame in frames]) / crystal().get_volume()
    assert all(1 / 1.08 < ratio < 1.08 for ratio in ratios)
    assert np.abs(ratios - 1.0).max() > 0.02


def test_a_sheared_cell_is_out_of_bounds() -> None:
    start = bulk("Cu", cubic=True)
    task = ReplicaTask.model_construct(ensemble="npt", cell_limit=2.5)
    shear = np.eye(3)
    for tilt, sane in ((0.6, True), (1.9, True), (2.3, False)):
        shear[1, 0] = tilt
        reason = replica._cell_out_of_bounds(start.cell[:] @ shear, start, task)
        assert (reason == "") == sane
    assert "in one direction, is 2.67 times that of the start" in reason
    assert replica._cell_out_of_bounds(start.cell[:] @ shear, start, task.model_copy(update={"ensemble": "nvt"})) == ""


def test_a_skewed_start_cell_runs(crystal_model: Path, tmp_path: Path) -> None:
    """Tilts beyond half a length, which LAMMPS would refuse by default."""
    atoms = crystal()
    atoms.set_cell(np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]]) @ atoms.cell[:])
    task = make_task(tmp_path, crystal_model, atoms, **NPT)
    result = run_replica(task)
    assert result.stopped == "step limit", result.reason


def test_constant_pressure_needs_a_cell(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=r"md\.ensemble = 'npt' needs a periodic start structure"):
        run_replica(make_task(tmp_path, model, **NPT))


def test_no_threshold_is_no_stop(model: Path, tmp_path: Path) -> None:
    result = run_replica(make_task(tmp_path, model, threshold=float("inf")))
    assert (result.stopped, result.steps) == ("step limit", 40)


def test_a_task_survives_json(tmp_path: Path) -> None:
    task = make_task(tmp_path, Path("model.pt"), threshold=float("inf"))
    assert ReplicaTask.model_validate_json(task.model_dump_json()) == task
