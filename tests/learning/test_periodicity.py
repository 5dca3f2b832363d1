"""Replicas and whole loops of slabs and wires, with fixed atoms and without."""

from __future__ import annotations

import signal
from itertools import product
from pathlib import Path

import ase.io
import numpy as np
import pytest
import tomli_w
from ase import Atoms
from ase.build import fcc111
from ase.constraints import FixAtoms
from ase.geometry import find_mic
from killed_driver import start_driver
from replicas import labelled, make_task
from system import make_settings, settings_table, without_times

from ubmd.calculator import Model
from ubmd.data.constraints import is_fixed
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.lammps.replica import _session, run_replica
from ubmd.learning import RunFolder, run
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.trainer import train
from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings

PERIODICITIES = [pbc for pbc in product((True, False), repeat=3) if any(pbc) and not all(pbc)]


def slab(fixed: bool = True) -> Atoms:
    """Twelve atoms of copper with a gold atom on top; the two lowest layers are fixed."""
    atoms = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    if fixed:
        atoms.set_constraint(FixAtoms(mask=atoms.get_tags() > 1))
    atoms.extend(Atoms("Au", positions=[atoms.positions[-4:-1].mean(axis=0) + np.array([0.0, 0.0, 2.3])]))
    atoms.pbc = (True, True, False)
    return atoms


def piece(pbc: tuple[bool, ...]) -> Atoms:
    """Copper in a skewed cell, turned, periodic in some directions."""
    atoms = fcc111("Cu", (2, 2, 2), vacuum=0.0, orthogonal=True)
    atoms.cell[2] = [0.4, -0.7, 4.3]
    atoms.set_cell(atoms.cell[:] @ np.array([[1.0, 0.1, 0.0], [0.0, 1.0, 0.15], [0.05, 0.0, 1.0]]), scale_atoms=True)
    atoms.rotate(40.0, (1.0, 2.0, 3.0), rotate_cell=True)
    atoms.symbols[3] = "Au"
    atoms.pbc = pbc
    return atoms


@pytest.fixture(scope="module")
def slab_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file that holds the slab together."""
    folder, rng, structures = tmp_path_factory.mktemp("slab_model"), np.random.default_rng(0), []
    for k in range(24):
        atoms = slab(fixed=False)
        atoms.positions += rng.uniform(-0.2, 0.2, atoms.positions.shape)
        atoms.positions[-1, 2] += 3.0 * (k % 4 == 0)
        structures.append(labelled(atoms))
    settings, training = ModelSettings(hidden=(16, 16), n_radial=2, cutoff=5.0), TrainingSettings(epochs=60, threads=1)
    trained = train(settings, training, structures[:18], structures[18:], folder, 0)
    uncertainty = UncertaintySettings(projections=16)
    export_model(trained.model, structures[:18], structures[18:], uncertainty, folder / "model.pt")
    return folder / "model.pt"


# ---- replicas


@pytest.mark.parametrize("pbc", PERIODICITIES, ids=lambda pbc: "".join("FT"[p] for p in pbc))
def test_frames_have_the_uncertainties_of_python_and_the_cell_of_the_start(
    model: Path, tmp_path: Path, pbc: tuple[bool, ...]
) -> None:
    start = piece(pbc)
    task = make_task(tmp_path, model, start, timestep=1.0)
    result = run_replica(task)
    assert (result.stopped, result.steps, result.frames) == ("step limit", 40, 5), result.reason
    frames = read_structures(task.frames)
    for frame, prediction in zip(frames, Model(model, "double").predict(frames), strict=True):
        assert frame.pbc.tolist() == list(pbc)
        np.testing.assert_allclose(frame.cell.cellpar(), start.cell.cellpar(), rtol=1e-10)
        assert frame.info["uncertainty"] == pytest.approx(prediction.u, rel=1e-9)
        np.testing.assert_allclose(frame.arrays["atomic_uncertainty"], prediction.atomic_u, rtol=1e-9)
    before, after = (atoms.get_all_distances(mic=True) for atoms in (start, frames[0]))
    np.testing.assert_allclose(after, before, atol=1e-9)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("pbc", [(True, True, False), (False, True, False)], ids=["slab", "wire"])
def test_every_number_of_ranks_gives_the_same_frames(
    model: Path, tmp_path: Path, pbc: tuple[bool, ...], ranks: int
) -> None:
    found = []
    for count in (1, ranks):
        folder = tmp_path / str(count)
        folder.mkdir()
        # A thermostat that does next to nothing: its random numbers belong to ranks.
        task = make_task(folder, model, piece(pbc), timestep=1.0, steps=20, ranks=count, damping=1e12)
        assert run_replica(task).stopped == "step limit"
        found.append(read_structures(task.frames))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other.get_all_distances(mic=True), one.get_all_distances(mic=True), atol=1e-5)
        assert other.info["uncertainty"] == pytest.approx(one.info["uncertainty"], rel=1e-5)
    for frame, prediction in zip(found[1], Model(model, "double").predict(found[1]), strict=True):
        assert frame.info["uncertainty"] == pytest.approx(prediction.u, rel=1e-10)
        np.testing.assert_allclose(frame.arrays["atomic_uncertainty"], prediction.atomic_u, rtol=1e-9)


def test_a_barostat_moves_a_slab_in_its_plane_only(slab_model: Path, tmp_path: Path) -> None:
    start = slab(fixed=False)
    task = make_task(
        tmp_path, slab_model, start, ensemble="npt", pressure_damping=0.2, stress=0.2, coupling="tri", temperature=100.0
    )
    result = run_replica(task)
    assert result.stopped == "step limit", result.reason
    last = read_structures(task.frames)[-1]
    change = np.linalg.solve(start.cell[:], last.cell[:])
    assert np.abs(change[:2, :2] - np.eye(2)).max() > 1e-4
    np.testing.assert_allclose(last.cell[2], start.cell[2], atol=1e-12)
    np.testing.assert_allclose(last.cell[:2, 2], 0.0, atol=1e-12)


def test_a_barostat_tilts_an_upright_slab(slab_model: Path, tmp_path: Path) -> None:
    """LAMMPS tilts boxes only that were made as prisms."""
    start = fcc111("Cu", (2, 2, 3), vacuum=6.0, orthogonal=True)
    start.symbols[-1] = "Au"
    start.pbc = (True, True, False)
    task = make_task(
        tmp_path, slab_model, start, ensemble="npt", pressure_damping=0.2, coupling="tri", temperature=100.0
    )
    result = run_replica(task)
    assert result.stopped == "step limit", result.reason
    last = read_structures(task.frames)[-1]
    assert abs(last.cell[1, 0]) > 1e-6


def test_fixed_atoms_do_not_move_by_a_bit(slab_model: Path, tmp_path: Path) -> None:
    task = make_task(tmp_path, slab_model, slab())
    assert run_replica(task).stopped == "step limit"
    frames = read_structures(task.frames)
    fixed = is_fixed(slab())
    for frame in frames:
        np.testing.assert_array_equal(is_fixed(frame), fixed)
        np.testing.assert_array_equal(frame.positions[fixed], frames[0].positions[fixed])
    assert np.abs(frames[-1].positions[~fixed] - frames[0].positions[~fixed]).max() > 0.01
    (largest,) = {
        frame.info["max_uncertainty"] == pytest.approx(frame.arrays["atomic_uncertainty"][~fixed].max(), rel=1e-12)
        for frame in frames
    }
    assert largest


def test_temperature_of_a_slab_is_that_of_its_mobile_atoms(slab_model: Path, tmp_path: Path) -> None:
    """5 atoms move and 8 are fixed: with the degrees of freedom of all, it would be 13 instead of 300 K off by 2.4."""
    task = make_task(tmp_path, slab_model, slab(), force=0.0, damping=0.05, steps=8000, frames_every=8000)
    with _session(task, tmp_path, read_structures(task.start)[0]) as session:
        session.run(500, first=True)
        seen = []
        for _ in range(300):
            session.run(25, first=False)
            seen.append(session.temperature())
    # 15 degrees of freedom: one value scatters by sqrt(2/15) = 37 %; at least 60 of 300 are independent
    assert np.mean(seen) == pytest.approx(300.0, rel=4 * 0.37 / np.sqrt(60))


def test_desorption_ends_a_replica_and_keeps_its_frames(slab_model: Path, tmp_path: Path) -> None:
    start = slab()
    start.positions[-1, 2] += 2.4  # nearly out of reach, and on its way up
    task = make_task(tmp_path, slab_model, start, steps=2000, force=0.0, timestep=1.0, velocity_seed=12)
    result = run_replica(task)
    assert result.stopped == "desorbed", result
    assert "further from the rest than the model's cutoff" in result.reason
    frames = read_structures(task.frames)
    assert len(frames) == result.frames > 1
    assert frames[-1].info["step"] == result.steps
    heights = [frame.positions[:, 2].max() - np.sort(frame.positions[:, 2])[-2] for frame in frames]
    assert heights[-1] == max(heights)
    assert (tmp_path / "frames.log").is_file()


# ---- loops


@pytest.mark.slow
def test_a_loop_of_a_slab_survives_kill_9_and_keeps_its_fixed_atoms(tmp_path: Path) -> None:
    table = settings_table(tmp_path / "killed" / "run") | {"model": {"hidden": [16, 16], "n_radial": 2, "cutoff": 5.0}}
    table["reference"] = {"calculator": "fresh_emt:FreshEMT"}
    folders = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        write_structures(folder / "start.extxyz", [slab()])
        (folder / "settings.toml").write_text(tomli_w.dumps(table | {"run_dir": str(folder / "run")}))
        folders.append(RunFolder(folder / "run"))
    kills = [{"event": "replica_done", "iteration": 0}, {"event": "label_done", "iteration": 0}]
    for wanted in kills:
        assert start_driver(tmp_path / "killed" / "settings.toml", wanted, 0) == -signal.SIGKILL
    for name in ("killed", "whole"):
        assert start_driver(tmp_path / name / "settings.toml", {"event": "never"}, 0) == 0
    whole, killed = folders
    assert killed.dataset.read_bytes() == whole.dataset.read_bytes()
    assert without_times(killed) == without_times(whole)
    start, fixed = slab(), is_fixed(slab())
    for atoms in read_structures(whole.dataset):
        np.testing.assert_array_equal(is_fixed(atoms), fixed)
        moved = find_mic((atoms.positions - start.positions)[fixed], start.cell, start.pbc)[1]
        np.testing.assert_allclose(moved, 0.0, atol=1e-9)
        assert not atoms.calc.results["stress"][2:5].any()
        assert np.abs(atoms.calc.results["forces"][fixed]).max() > 0.1
    for atoms in ase.io.read(whole.test, ":"):  # no constraint hides forces from other programs
        assert not atoms.constraints
    assert (whole.path / "report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("pbc", "md"),
    [
        ((True, True, False), {"ensemble": "npt", "pressure_damping": 0.2}),
        ((False, True, False), {}),
        ((False, True, True), {"start_from": "labelled"}),
    ],
    ids=["slab, npt", "wire", "slab along b and c"],
)
def test_a_loop_of_every_periodicity(tmp_path: Path, pbc: tuple[bool, ...], md: dict) -> None:
    start = slab(fixed=False) if md.get("ensemble") else piece(pbc)
    write_structures(tmp_path / "start.extxyz", [start])
    tables = {"md": md | {"timestep": 1.0}, "start": {"strain": 0.02}, "test": None, "loop": {"labels": 6}}
    folder = RunFolder(run(make_settings(tmp_path / "run", **tables), tmp_path))
    dataset = read_structures(folder.dataset)
    assert len(dataset) == 6
    assert {tuple(atoms.pbc.tolist()) for atoms in dataset} == {pbc}
    assert all("stress" in atoms.calc.results for atoms in dataset)
    assert all(replica["stopped"] != "failed" for entry in folder.read_history() for replica in entry["replicas"])
    for atoms in dataset:
        length = np.linalg.norm(atoms.cell[~atoms.pbc], axis=1)
        np.testing.assert_allclose(length, np.linalg.norm(start.cell[~start.pbc], axis=1), rtol=1e-10)
