"""Dynamic training, small but real: what a run leaves behind, kills in every stage, failures, both kinds of models."""

from __future__ import annotations

import json
import math
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from ase.build import bulk
from ase.neighborlist import neighbor_list
from killed_driver import start_driver, tear
from processes import is_alive, linux, wait_for
from silicon import make_settings, settings_table, write_inputs

from ubmd.cli.dynamic_progress import describe_event
from ubmd.data.extxyz import write_structures
from ubmd.data.labelled_range import LabelledRange
from ubmd.data.structures import read_structures
from ubmd.errors import LabelError, SettingsError
from ubmd.lammps.trajectory import PieceTask, TrajectoryState, read_piece, read_state, run_piece, write_state
from ubmd.lammps.triggers import AbsoluteTrigger, AverageTrigger
from ubmd.learning import RunFolder
from ubmd.learning.dynamic.engine import run
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.regression import NormalEquations, Posterior, fit
from ubmd.potentials.force_constants.seen import Seen
from ubmd.references import label
from ubmd.references.lammps import LAMMPS
from ubmd.runs.dynamic_history import read_errors
from ubmd.runs.event_records import read_event
from ubmd.settings.dynamic import DynamicRunSettings

SW = LAMMPS(["pair_style sw", "pair_coeff * * Si.sw Si"], ["Si"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, folder / "run")
    return folder


@pytest.fixture(scope="module")
def finished(inputs: Path) -> RunFolder:
    """An uninterrupted run."""
    return RunFolder(run(make_settings(inputs / "run"), inputs))


def without_times(folder: RunFolder) -> list[dict]:
    """The history without what a clock has measured."""
    history = folder.read_history()
    for entry in history:
        del entry["seconds"]
        entry["model"].pop("fit_seconds", None)
        for result in entry["replicas"]:
            del result["ms_per_step"]
    return history


def refitted(folder: RunFolder, labels: int) -> tuple[ClusterBasis, Posterior]:
    """The regression on the first labels of the data set, from the beginning."""
    basis = ClusterBasis.load(folder.path / "basis.npz")
    equations = NormalEquations(basis.parameter_orders)
    for atoms in read_structures(folder.dataset)[:labels]:
        equations.add(basis.force_matrix(atoms, basis.supercell(ideal())), atoms.get_forces())
    return basis, fit(equations, tolerance=1e-6)


def ideal():
    return bulk("Si", a=5.431, cubic=True)


# ------------------------------------------------------------------------------------------ what a run leaves behind


def test_labels_are_those_of_the_reference(finished: RunFolder, inputs: Path) -> None:
    dataset = read_structures(finished.dataset, labelled=True)
    settings = make_settings(finished.path)
    assert [atoms.info["label"] for atoms in dataset] == list(range(7))
    noise = []
    for atoms in dataset:
        copy = atoms.copy()
        copy.calc = SW
        assert atoms.get_potential_energy() == pytest.approx(copy.get_potential_energy(), abs=1e-9)
        noise.append(atoms.get_forces() - copy.get_forces())
        assert np.array_equal(label(atoms, settings.reference, inputs).get_forces(), atoms.get_forces())
    assert np.std(noise) == pytest.approx(0.01, rel=0.2)  # 168 numbers
    asked = [row for entry in finished.read_history() for row in entry["asked"]]
    assert [(a.info["replica"], a.info["step"]) for a in dataset[1:]] == [(r["replica"], r["step"]) for r in asked]


def test_errors_in_the_history_are_those_of_the_regression(finished: RunFolder) -> None:
    """Of a model that had seen the earlier labels only, and of one that has seen this one, too."""
    dataset, history = read_structures(finished.dataset), finished.read_history()
    refits = [entry for entry in history if entry["refit"]]
    assert [row["label"] for entry in refits for row in entry["learnt"]] == list(range(7))
    for before, entry in pairwise(refits):
        for row in entry["learnt"]:
            atoms = dataset[row["label"]]
            for when, labels in (("before", before["labels"]), ("after", entry["labels"])):
                basis, posterior = refitted(finished, labels)
                matrix = basis.force_matrix(atoms, basis.supercell(ideal()))
                difference = atoms.get_forces().ravel() - posterior.forces(matrix)
                assert row[f"error_{when}"] == pytest.approx(posterior.bayesian_error(matrix), rel=0.02)
                assert row[f"rms_{when}"] == pytest.approx(np.sqrt(np.mean(difference**2)), rel=0.02, abs=1e-4)
            assert row["error_after"] < row["error_before"]
            assert row["error_before"] > row["threshold"]
    last = refits[-1]
    _, posterior = refitted(finished, 7)
    assert last["model"]["noise"] == pytest.approx(posterior.noise, rel=0.01)
    assert sum(last["model"]["gamma"].values()) == pytest.approx(sum(posterior.gamma.values()), rel=0.01)
    assert last["ended"]["rule"] == "labels"
    assert last["test"]["force_rmse"] < refits[0]["test"]["force_rmse"]
    energy = read_energy(ideal())
    assert last["model"]["energy"] == pytest.approx(energy / 4, abs=0.02)  # 4 primitive cells


def read_energy(atoms) -> float:
    atoms.calc = SW
    return float(atoms.get_potential_energy())


def test_trajectories_go_on_where_they_were(finished: RunFolder) -> None:
    history = finished.read_history()
    ends: dict[int, tuple[Path, int]] = {}
    for entry in history:
        folder = finished.path / "rounds" / f"round_{entry['round']:04d}"
        for result in entry["replicas"]:
            replica = result["replica"]
            start = read_state(folder / f"start_{replica:03d}.npz")
            assert start.step == result["begin"]
            if replica in ends:
                path, step = ends[replica]
                end = read_state(path)
                assert end.step == step == result["begin"]
                assert np.array_equal(end.positions, start.positions)
                assert np.array_equal(end.velocities, start.velocities)
            else:
                assert np.array_equal(start.positions, ideal().positions)
            ends[replica] = folder / f"piece_{replica:03d}.npz", result["end"]
    assert set(ends) == {0, 1}
    asked = [(row["replica"], row["step"]) for entry in history for row in entry["asked"]]
    dataset = read_structures(finished.dataset)
    assert len(asked) == len(dataset) - 1


def test_error_series_have_every_check(finished: RunFolder) -> None:
    history, series = finished.read_history(), read_errors(finished.path)
    assert set(series) == {0, 1}
    for replica, one in series.items():
        results = [r for entry in history for r in entry["replicas"] if r["replica"] == replica]
        assert one.step.tolist() == list(range(2, results[-1]["end"] + 1, 2))
        assert one.calls.tolist() == [r["end"] for r in results if r["ended"] == "asked"]
        asked = np.isin(one.step, one.calls)
        assert (one.error[asked] > one.threshold[asked]).all()
        assert one.error.max() == max(r["max_error"] for r in results)
        assert (np.diff(one.labels) >= 0).all()


def test_a_finished_run_stays_as_it_is_and_goes_on_with_more_labels(finished: RunFolder, tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    # as many as the run has after one of its rounds
    labels = finished.read_history()[2]["labels"]
    short = make_settings(tmp_path / "run", dynamic=settings_table(tmp_path)["dynamic"] | {"labels": labels})
    folder = RunFolder(run(short, tmp_path))
    assert folder.read_history()[-1]["labels"] == labels < 7
    events = len(folder.read_events())
    run(short, tmp_path)
    assert not [e for e in folder.read_events()[events:] if e["event"] == "stage_started"]
    run(make_settings(tmp_path / "run"), tmp_path)
    assert folder.dataset.read_bytes() == finished.dataset.read_bytes()
    assert without_times(folder) == without_times(finished)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"seed": 6}, "seed = 5, now it is 6"),
        ({"crystal": {"cutoffs": {"2": 4.0}}}, r"crystal.cutoffs.3 = 2.6, now it is not set"),
        ({"bias": {"force": 0.5}}, "bias"),
    ],
)
def test_changed_settings_are_refused(finished: RunFolder, inputs: Path, tables: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        run(make_settings(finished.path, **tables), inputs)


# ------------------------------------------------------------------------------------------ kills

KILLS = [
    ({"event": "label_appended", "round": -1}, 0),
    ({"event": "stage_started", "stage": "learn", "round": 0}, 0),
    ({"event": "piece_done", "round": 0}, 0),
    ({"event": "label_done", "round": 0}, 0),
    ({"event": "stage_started", "stage": "judge", "round": 0}, 0),
    ({"event": "round_done", "round": 0}, 0),
    ({"event": "stage_done", "stage": "learn", "round": 1}, 0),
    ({"event": "label_appended", "round": 1}, 0),
]


@linux
def test_kill_9_in_every_stage_changes_nothing(finished: RunFolder, tmp_path: Path) -> None:
    check_kills(KILLS, finished, tmp_path)


@linux
@pytest.mark.quick
def test_kill_9_between_labels_changes_nothing(finished: RunFolder, tmp_path: Path) -> None:
    check_kills([({"event": "label_appended", "round": 1}, 0)], finished, tmp_path)


def check_kills(kills: list[tuple[dict, int]], finished: RunFolder, base: Path) -> None:
    """A run whose driver was killed at these events, and resumed, equals the one that was not."""
    settings = write_inputs(base, base / "run")
    # two workers, where the uninterrupted run had one
    settings.write_text(tomli_w.dumps(settings_table(base / "run") | {"workers": {"processes": 2}}))
    folder = RunFolder(base / "run")
    for wanted, passes in kills:
        assert start_driver(settings, wanted, passes) == -signal.SIGKILL, wanted
        workers = [int(number) for number in (base / "children").read_text().split()]
        assert wait_for(lambda: not any(is_alive(worker) for worker in workers), 60.0), "orphans"  # noqa: B023
        tear(folder)
    assert start_driver(settings, {"event": "never"}, 0) == 0
    assert folder.dataset.read_bytes() == finished.dataset.read_bytes()
    assert without_times(folder) == without_times(finished)


@pytest.mark.slow
@pytest.mark.slow_ci
def test_lost_and_damaged_files_cost_no_label(finished: RunFolder, tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    short = make_settings(tmp_path / "run", dynamic=settings_table(tmp_path)["dynamic"] | {"labels": 5})
    folder = RunFolder(run(short, tmp_path))
    last = folder.path / "rounds" / f"round_{len(folder.read_history()) - 2:04d}"
    piece = last / "piece_001.npz"
    piece.write_bytes(piece.read_bytes()[:-200])
    (last / "labels" / "label_000.extxyz").unlink()
    (folder.path / "basis.npz").unlink()
    folder.dataset.write_bytes(folder.dataset.read_bytes()[:-50])
    before = len(folder.read_events())
    run(make_settings(tmp_path / "run"), tmp_path)
    assert len(read_structures(folder.dataset)) == 7
    appended = [e["label"] for e in folder.read_events()[before:] if e["event"] == "label_appended"]
    assert appended == [4, 5, 6]
    same = read_structures(finished.dataset)
    for one, other in zip(read_structures(folder.dataset), same, strict=True):
        assert one.positions == pytest.approx(
            other.positions, abs=1e-6
        )  # a model that was made again rounds differently


# ------------------------------------------------------------------------------------------ pieces


@pytest.fixture(scope="module")
def piece(finished: RunFolder) -> PieceTask:
    """A task with the finished run's model, from the ideal crystal at 900 K."""
    state = TrajectoryState.begin(ideal(), 900.0, AbsoluteTrigger(1e6), np.random.default_rng(0))
    start = finished.path / "piece" / "start.npz"
    write_state_to(start, state)
    return PieceTask(
        replica=0,
        model=finished.model,
        start=start,
        result=start.with_name("piece.npz"),
        steps=60,
        timestep=2.0,
        temperature=900.0,
        damping=0.1,
        check_every=1,
        frames=5,
        precision="double",
        force=0.0,
        species={},
        window=5,
        noise=0.0,
        lattice=True,
        langevin_seed=99,
    )


def write_state_to(path: Path, state: TrajectoryState) -> None:
    path.parent.mkdir(exist_ok=True)
    write_state(path, state)


def test_errors_of_a_piece_are_those_of_the_posterior(finished: RunFolder, piece: PieceTask) -> None:
    result = run_piece(piece)
    _, data = read_piece(piece.result)
    basis, posterior = ClusterBasis.load(finished.path / "basis.npz"), Posterior.load(finished.path / "posterior.npz")
    box = basis.supercell(ideal())
    assert len(data.frames) == 5
    assert max(np.diff(data.frame_steps)) <= 2 * min(np.diff(data.frame_steps))
    for step, positions in zip(data.frame_steps, data.frames, strict=True):
        displacements = positions - ideal().positions
        error = posterior.bayesian_error(basis.force_matrix(displacements, box))
        assert data.errors[step - 1] == pytest.approx(error, rel=1e-8)
    assert (result.ended, result.begin, result.end) == ("segment", 0, 60)
    assert result.max_error == data.errors.max()
    relative = data.frames - ideal().positions
    size = np.linalg.norm(relative - relative.mean(axis=1, keepdims=True), axis=-1).max()
    assert 0.5 * size < result.max_displacement < 2.0 * size + 0.2


def test_a_piece_does_not_depend_on_how_often_it_looks(piece: PieceTask) -> None:
    ends = []
    for every in (1, 5, 60):
        run_piece(piece.model_copy(update={"check_every": every}))
        state, data = read_piece(piece.result)
        assert len(data.errors) == 60 // every
        ends.append((state.positions, state.velocities, data.errors[-1]))
    for positions, velocities, error in ends[1:]:
        assert np.array_equal(positions, ends[0][0])
        assert np.array_equal(velocities, ends[0][1])
        assert error == ends[0][2]
    assert not np.allclose(ends[0][0], ideal().positions, atol=0.01)


def test_a_piece_ends_at_its_trigger(piece: PieceTask) -> None:
    run_piece(piece)
    _, quiet = read_piece(piece.result)
    state = read_state(piece.start)
    trigger = AverageTrigger(maximum=float(np.sort(quiet.errors)[-20]), factor=1e3)
    asking = piece.start.with_name("asking.npz")
    write_state(asking, TrajectoryState(**(vars(state) | {"trigger": trigger.state()})))
    result = run_piece(piece.model_copy(update={"start": asking}))
    first = int(np.argmax(quiet.errors > trigger.maximum)) + 1
    assert (result.ended, result.rule, result.end) == ("asked", "absolute", first)
    end, data = read_piece(piece.result)
    assert np.array_equal(data.errors, quiet.errors[:first])
    assert end.trigger["memory"]["steps"] == first
    assert first not in data.frame_steps
    # Below the noise it does not ask.
    result = run_piece(piece.model_copy(update={"start": asking, "noise": 1e3}))
    assert result.ended == "segment"


def test_a_piece_ends_where_displacements_leave_the_labels(finished: RunFolder, piece: PieceTask) -> None:
    """The first frame, `wait` checks after the refit, in which two neighbours differ by more than in any label."""
    basis = ClusterBasis.load(finished.path / "basis.npz")
    dataset = read_structures(finished.dataset)
    near = neighbor_list("ij", ideal(), 2.6)  # the cutoff of order 3: nearest neighbours, one shell

    def largest(positions: np.ndarray) -> float:
        u = positions - ideal().positions
        return float(np.linalg.norm(u[near[0]] - u[near[1]], axis=1).max())

    limit = max(0.2 * 5.431 * 3**0.5 / 4, *(largest(atoms.positions) for atoms in dataset))
    seen = Seen(basis)
    box = basis.supercell(ideal())
    for atoms in dataset:
        seen.add(box.displacements(atoms), box)
    assert seen.largest == pytest.approx([limit], rel=1e-9)
    pairs = basis.shells.pairs(box)
    file = piece.start.with_name("range.npz")
    LabelledRange(ideal().positions, pairs.first, pairs.second, seen.largest[pairs.shell]).save(file)
    run_piece(piece.model_copy(update={"frames": 60}))
    _, quiet = read_piece(piece.result)
    sizes = [largest(positions) for positions in quiet.frames]
    factor = 0.999 * max(sizes[20:]) / limit
    first = next(k for k, size in enumerate(sizes, 1) if k >= 10 and size > factor * limit)
    asking = piece.start.with_name("asking.npz")
    trigger = AbsoluteTrigger(1e6, extrapolation=factor)
    write_state(asking, TrajectoryState(**(vars(read_state(piece.start)) | {"trigger": trigger.state()})))
    result = run_piece(piece.model_copy(update={"start": asking, "labelled_range": file}))
    assert (result.ended, result.rule, result.end, result.threshold) == ("asked", "extrapolation", first, None)


def test_a_turned_crystal_keeps_its_orientation(finished: RunFolder, piece: PieceTask, tmp_path: Path) -> None:
    """LAMMPS turns the cell; states, frames and errors stay those of the structure."""
    primitive = bulk("Si", a=5.431).repeat((2, 2, 2))
    state = TrajectoryState.begin(primitive, 900.0, AbsoluteTrigger(1e6), np.random.default_rng(1))
    write_state(tmp_path / "start.npz", state)
    task = piece.model_copy(update={"start": tmp_path / "start.npz", "result": tmp_path / "piece.npz", "steps": 20})
    run_piece(task)
    end, data = read_piece(task.result)
    basis, posterior = ClusterBasis.load(finished.path / "basis.npz"), Posterior.load(finished.path / "posterior.npz")
    matrix = basis.force_matrix(end.positions - primitive.positions, basis.supercell(primitive))
    assert data.errors[-1] == pytest.approx(posterior.bayesian_error(matrix), rel=1e-8)
    # The first steps follow the initial velocities.
    run_piece(task.model_copy(update={"steps": 1, "damping": 1e3}))
    moved = read_state(task.result).positions - primitive.positions
    assert moved == pytest.approx(0.002 * state.velocities, abs=1e-3)


def test_a_bias_raises_the_error_sooner(finished: RunFolder, piece: PieceTask) -> None:
    plain = run_piece(piece)
    _, without = read_piece(piece.result)
    biased = run_piece(piece.model_copy(update={"force": 1.0}))
    _, with_bias = read_piece(piece.result)
    assert plain.bias_share == 0.0
    assert biased.bias_share > 0.2
    assert np.array_equal(with_bias.errors[:4], without.errors[:4])  # before the window is full
    assert with_bias.errors[20:].mean() > without.errors[20:].mean()


def test_the_guard_ends_a_piece_at_the_last_frame_within_its_range(inputs: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    table = settings_table(tmp_path)
    crystal = table["crystal"] | {"max_displacement": 0.12}
    dynamic = table["dynamic"] | {"labels": 4, "trigger": {"rule": "absolute", "threshold": 1e3}}
    folder = RunFolder(run(make_settings(tmp_path / "run", crystal=crystal, dynamic=dynamic, test=None), tmp_path))
    asked = [row for entry in folder.read_history() for row in entry["asked"]]
    assert {row["rule"] for row in asked} == {"guard"}
    results = [r for entry in folder.read_history() for r in entry["replicas"] if r["ended"] == "guard"]
    assert all("0.12" in r["reason"] and r["max_displacement"] <= 0.12 for r in results)


# ------------------------------------------------------------------------------------------ other runs


def test_of_several_requests_only_the_best_are_labelled_and_calibrate(tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    dynamic = settings_table(tmp_path)["dynamic"] | {"labels": 5, "batch": 1, "calibrate": True}
    folder = RunFolder(run(make_settings(tmp_path / "run", dynamic=dynamic, test=None), tmp_path))
    history = folder.read_history()
    passed = [entry for entry in history if entry["passed"]]
    assert passed
    for entry in passed:
        drops = json.loads((folder.path / "rounds" / f"round_{entry['round']:04d}" / "signals.json").read_text())
        (asked,) = entry["asked"]
        assert drops["chosen"] == [asked["replica"]]
        assert asked["drop"] == drops["drops"][str(asked["replica"])]
    refits = [entry for entry in history if entry["refit"]]
    assert refits[0]["model"]["force_scale"] == 1.0
    ratios: list[float] = []
    for before, entry in pairwise(refits):
        scale = before["model"]["force_scale"]
        ratios += [row["true_before"] / (row["error_before"] / scale) for row in entry["learnt"]]
        assert entry["model"]["force_scale"] == pytest.approx(max(ratios), rel=1e-6)  # few: the largest ratio
        assert entry["conformal"]["attainable"] == pytest.approx(len(ratios) / (len(ratios) + 1))


def test_converged_runs_stop(tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    signals = {"determined": 1e-3, "noise": 1e3, "gain": 10.0, "steps": 10}
    dynamic = settings_table(tmp_path)["dynamic"] | {"labels": 20, "convergence": signals}
    folder = RunFolder(run(make_settings(tmp_path / "run", dynamic=dynamic, test=None), tmp_path))
    last = folder.read_history()[-1]
    assert last["ended"]["rule"] == "converged"
    assert last["fresh_steps"] >= 10
    assert {signal["name"] for signal in last["signals"]} == {"determined", "below noise", "little to gain"}
    assert last["asked"] == []
    assert last["labels"] < 20


def test_a_reference_that_rejects_everything_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    reference = settings_table(tmp_path)["reference"] | {"force_limit": 0.5}  # start structures have 0.3 eV/Å
    dynamic = settings_table(tmp_path)["dynamic"] | {"labels": 50, "steps": 900, "temperatures": [900.0]}
    dynamic["trigger"] = {"rule": "absolute", "threshold": 0.3}
    with pytest.raises(LabelError, match=r"3 consecutive rounds without a new label; .*reference.force_limit"):
        run(make_settings(tmp_path / "run", reference=reference, dynamic=dynamic, test=None), tmp_path)
    folder = RunFolder(tmp_path / "run")
    rejected = read_structures(folder.rejected)
    assert all("force_limit" in atoms.info["reason"] for atoms in rejected)
    last = folder.path / "rounds" / "round_0001"
    if (last / "start_000.npz").exists() and any(a.info["iteration"] == 0 for a in rejected):
        assert np.array_equal(read_state(last / "start_000.npz").positions, ideal().positions)


def test_labels_after_a_runaway_are_not_learnt(tmp_path: Path) -> None:
    """A reference whose forces explode in its seventh and ninth calculation, as after an atom fell into another."""
    (tmp_path / "exploding.py").write_text(EXPLODING.format(calls=str(tmp_path / "calls")))
    write_inputs(tmp_path, tmp_path / "run")
    reference = {"calculator": "exploding:Exploding", "arguments": {}, "noise": 0.0, "force_limit": 1e9}
    dynamic = settings_table(tmp_path)["dynamic"] | {"labels": 10, "steps": 600, "temperatures": [900.0, 900.0]}
    dynamic["trigger"] = {"rule": "absolute", "threshold": 1e6, "extrapolation": 0.3, "floor": 0.0}
    folder = RunFolder(run(make_settings(tmp_path / "run", reference=reference, dynamic=dynamic, test=None), tmp_path))
    dataset, rejected = read_structures(folder.dataset), read_structures(folder.rejected)
    assert len(dataset) == 8
    assert len(rejected) == 2
    assert all("had left its site" in atoms.info["reason"] for atoms in rejected)
    sizes = [np.linalg.norm(atoms.get_forces(), axis=1).max() for atoms in dataset]
    assert all(size <= 5.0 * max(sizes[:k]) for k, size in enumerate(sizes) if k >= 5)
    asked = [row for entry in folder.read_history() for row in entry["asked"]]
    assert {row["rule"] for row in asked} == {"extrapolation"}
    assert sum(bool(row["rejected"]) for row in asked) == len(rejected)
    lines = [describe_event(read_event(event)) for event in folder.read_events()]
    assert any("displacements beyond those of all labels (extrapolation)" in line for line in lines)
    report = (folder.path / "report" / "report.md").read_text()
    assert "trigger 'absolute', and displacements beyond 0.3 times those of the labels; seed 5" in report


EXPLODING = """
import numpy as np
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes

class Exploding(Calculator):
    implemented_properties = ["energy", "forces"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        u = atoms.positions - bulk("Si", a=5.431, cubic=True).positions
        u = u - u.mean(0)
        with open("{calls}", "a+") as calls:
            calls.write("x")
            calls.seek(0)
            number = len(calls.read())
        forces = -9.0 * u * (100.0 if number in (7, 9) else 1.0)
        self.results = {{"energy": 4.5 * float(np.sum(u**2)), "forces": forces}}
"""


@pytest.mark.slow
@pytest.mark.slow_ci
def test_networks_learn_dynamically_too(tmp_path: Path) -> None:
    """The trigger on calibrated atomic uncertainties of a Gaussian-moment network; a resumed run is the same."""
    write_structures(tmp_path / "start.extxyz", [bulk("Cu", cubic=True)])
    table = {
        "run_dir": str(tmp_path / "run"),
        "seed": 3,
        "start": {"file": "start.extxyz", "count": 3, "displacement": 0.05},
        "reference": {"calculator": "ase.calculators.emt:EMT"},
        "model": {"hidden": [16, 16], "n_radial": 2},
        "training": {"epochs": 8, "threads": 1},
        "uncertainty": {"projections": 16},
        "dynamic": {
            "temperatures": [300.0, 600.0],
            "steps": 200,
            "segment": 40,
            "check_every": 4,
            "timestep": 2.0,
            "labels": 6,
            "warm_epochs": 4,
            "batch": 1,
            "trigger": {"maximum": 3.0},
        },
        "workers": {"processes": 1},
    }
    (tmp_path / "settings.toml").write_text(tomli_w.dumps(table))
    assert start_driver(tmp_path / "settings.toml", {"event": "label_appended", "round": 0}, 0) == -signal.SIGKILL
    assert start_driver(tmp_path / "settings.toml", {"event": "never"}, 0) == 0
    folder = RunFolder(tmp_path / "run")
    history = folder.read_history()
    dataset = read_structures(folder.dataset, labelled=True)
    assert len(dataset) == 6
    asked = [row for entry in history for row in entry["asked"]]
    assert [row["label"] for row in asked] == [3, 4, 5]
    for row in asked:
        assert row["error_before"] == pytest.approx(dataset[row["label"]].info["predicted_error"], rel=2e-3)
    assert history[-1]["ended"]["rule"] == "labels"
    assert all(entry["signals"] == [] for entry in history)
    table["run_dir"] = str(tmp_path / "again")
    run(DynamicRunSettings.model_validate(table), tmp_path)
    for one, other in zip(read_structures(tmp_path / "again" / "dataset.extxyz"), dataset, strict=True):
        assert one.info == other.info
        assert one.positions == pytest.approx(other.positions, abs=1e-9)  # energies of EMT differ by rounding, too


def test_errors_are_finite_numbers_or_null(finished: RunFolder) -> None:
    """Readers in other languages refuse Python's NaN."""

    def numbers(value: object) -> list[float]:
        if isinstance(value, dict):
            return [x for item in value.values() for x in numbers(item)]
        if isinstance(value, list):
            return [x for item in value for x in numbers(item)]
        return [value] if isinstance(value, float) else []

    found = numbers(finished.read_history())
    assert found
    assert all(math.isfinite(x) for x in found)
    assert os.fspath(finished.path) not in finished.history.read_text()
