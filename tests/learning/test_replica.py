"""One LAMMPS replica: same physics as in Python, sane frames only, and a result however it ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from system import cluster

from ubmd.calculator import Evaluator
from ubmd.data.structures import read_structures, write_structures
from ubmd.errors import SimulationError
from ubmd.export import export_model
from ubmd.lammps import replica
from ubmd.lammps.replica import ReplicaTask, run_replica, salvage
from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings
from ubmd.training import train


def labelled(atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    copy.calc = EMT()
    copy.calc = SinglePointCalculator(copy, energy=copy.get_potential_energy(), forces=copy.get_forces())
    return copy


def shaken(atoms: Atoms, seed: int) -> Atoms:
    copy = atoms.copy()
    copy.positions += np.random.default_rng(seed).uniform(-0.15, 0.15, copy.positions.shape)
    return copy


def skewed_cell() -> Atoms:
    """Copper in a cell that is triclinic, turned against LAMMPS's axes, and has atoms outside."""
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.set_cell(atoms.cell[:] @ np.array([[1.0, 0.1, 0.0], [0.0, 1.0, 0.15], [0.05, 0.0, 1.0]]), scale_atoms=True)
    atoms.rotate(40.0, (1.0, 2.0, 3.0), rotate_cell=True)
    atoms.symbols[3] = "Au"
    atoms.positions[0] += 2.0 * atoms.cell[1]
    return atoms


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    structures = [labelled(shaken(cluster(), k)) for k in range(8)]
    settings = ModelSettings(hidden=(16, 16), n_radial=2)
    trained = train(settings, TrainingSettings(epochs=30, threads=1), structures[:6], structures[6:], folder, 0)
    export_model(
        trained.model, structures[:6], structures[6:], UncertaintySettings(projections=16), folder / "model.pt"
    )
    return folder / "model.pt"


def make_task(folder: Path, model: Path, start: Atoms | None = None, **changes: object) -> ReplicaTask:
    write_structures(folder / "start.extxyz", [cluster() if start is None else start])
    values = {
        "replica": 3,
        "model": model,
        "start": folder / "start.extxyz",
        "frames": folder / "frames.extxyz",
        "steps": 40,
        "timestep": 2.0,
        "temperature": 300.0,
        "damping": 0.5,
        "frames_every": 10,
        "precision": "double",
        "force": 0.5,
        "species": {"Au": 0.0},
        "window": 4,
        "every": 2,
        "threshold": 1000.0,
        "velocity_seed": 11,
        "langevin_seed": 12,
        "min_distance": 0.5,
    }
    return ReplicaTask.model_validate(values | changes)


@pytest.mark.parametrize("start", [cluster(), skewed_cell()], ids=["molecule", "skewed cell"])
def test_frames_have_the_uncertainties_of_python(model: Path, tmp_path: Path, start: Atoms) -> None:
    task = make_task(tmp_path, model, start)
    result = run_replica(task)
    assert (result.stopped, result.steps, result.frames, result.reason) == ("step limit", 40, 5, "")
    assert 0.05 < result.bias_share < 1.0
    frames = read_structures(task.frames)
    assert [frame.info["step"] for frame in frames] == [0, 10, 20, 30, 40]
    assert {frame.info["replica"] for frame in frames} == {3}
    evaluator = Evaluator(model, "double")
    for frame, prediction in zip(frames, evaluator.predict(frames), strict=True):
        assert frame.get_chemical_symbols() == start.get_chemical_symbols()
        assert frame.info["uncertainty"] == pytest.approx(prediction.u, rel=1e-9)
        np.testing.assert_allclose(frame.arrays["atomic_uncertainty"], prediction.atomic_u, rtol=1e-9)
        assert frame.info["max_uncertainty"] == pytest.approx(prediction.atomic_u.max(), rel=1e-9)
    # The first frame is the start structure, turned at most.
    before, after = (a.get_all_distances(mic=bool(a.pbc.any())) for a in (start, frames[0]))
    np.testing.assert_allclose(after, before, atol=1e-9)
    assert np.abs(frames[-1].get_all_distances() - frames[0].get_all_distances()).max() > 0.05


def test_pieces_of_a_run_leave_no_trace(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, model)
    run_replica(task)
    whole = task.frames.read_bytes()
    monkeypatch.setattr(replica, "_PIECE", 7)
    run_replica(task)
    assert task.frames.read_bytes() == whole


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
    task.frames.with_name("frames.extxyz.tmp").write_text(content[:-200])  # the last frame is cut short
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
    slab = skewed_cell()
    slab.pbc = (True, True, False)
    with pytest.raises(SimulationError, match=r"periodic in some directions only"):
        run_replica(make_task(tmp_path, model, slab))
