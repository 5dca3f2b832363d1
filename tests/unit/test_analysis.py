"""Torsions, coverage, calibration numbers, pictures and the report of a run folder."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import tomli_w
import torch
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from ase.units import GPa
from hostile import RECORD, Victim, write_hostile
from scipy import stats

from ubmd import analysis
from ubmd.analysis import figures, predictions
from ubmd.analysis.compare import compare
from ubmd.analysis.figures import at_labels, group_learning_figure, mean_curve, shared_labels
from ubmd.analysis.provenance import setting_texts
from ubmd.analysis.run_data import Frames, read_frames
from ubmd.analysis.run_groups import Run
from ubmd.analysis.table import run_values
from ubmd.calculator import Model, Prediction
from ubmd.data.extxyz import write_structures
from ubmd.data.graph import build_graph
from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.measure.autocorrelation import statistical_inefficiency
from ubmd.measure.errors import parity_data, pearson, share_covered, spearman
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.references import sample
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import open_run, read_settings
from ubmd.settings import (
    ModelSettings,
    ReferenceSettings,
    RunSettings,
    SamplingSettings,
    UncertaintySettings,
    load_settings,
)
from ubmd.settings.run import conditions

EXAMPLE = Path(__file__).parents[2] / "lammps_examples" / "alanine_dipeptide"
PHI, PSI = (4, 6, 8, 14), (6, 8, 14, 16)
REFERENCE = {"calculator": "openmm", "arguments": {"pdb": "alanine_dipeptide.pdb"}}
TORSIONS = {"phi": list(PHI), "psi": list(PSI)}


@pytest.fixture(scope="module")
def frames():
    """24 labelled frames of hot reference MD."""
    torch.set_num_threads(1)
    sampling = SamplingSettings(temperature=600.0, frames=24, stride=40, equilibration=200, seed=1)
    return sample(read(EXAMPLE / "c7eq.extxyz"), ReferenceSettings(**REFERENCE), sampling, EXAMPLE)


# --- torsions ---------------------------------------------------------------------------------------------------


def test_torsions_agree_with_ase(frames):
    rng = np.random.default_rng(0)
    structures = [frame.copy() for frame in frames]
    for atoms in structures:
        atoms.positions += rng.normal(scale=0.5, size=atoms.positions.shape)
    indices = [PHI, PSI, (0, 1, 4, 5), (21, 18, 16, 14)]
    angles = analysis.torsions(structures, indices)
    expected = np.radians([[atoms.get_dihedral(*four) for four in indices] for atoms in structures])
    assert angles.shape == (24, 4)
    assert np.abs(angles).max() <= np.pi
    np.testing.assert_allclose(np.exp(1j * angles), np.exp(1j * expected), atol=1e-12)


def test_torsion_of_planar_atoms():
    """cis = 0, trans = π (never -π), and no division by zero in between."""
    atoms = read(EXAMPLE / "c7eq.extxyz")[:4]
    atoms.positions = [[0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert analysis.torsions([atoms], [(0, 1, 2, 3)])[0, 0] == pytest.approx(0.0, abs=1e-15)
    atoms.positions[3] = [1, -1, 0]
    assert analysis.torsions([atoms], [(0, 1, 2, 3)])[0, 0] == np.pi
    assert analysis.torsions([], [PHI]).shape == (0, 1)


def test_amide_bonds_and_cis_count():
    atoms = read(EXAMPLE / "c7eq.extxyz")
    amides = analysis.amide_torsions(atoms)
    assert amides == [(1, 4, 6, 8), (8, 14, 16, 18)]
    flipped = atoms.copy()
    flipped.set_dihedral(*amides[1], 20.0, indices=range(17, 22))
    assert analysis.count_cis([atoms, flipped, atoms], amides) == 1
    assert analysis.count_cis([atoms], []) == 0
    assert analysis.isomers([atoms, flipped, atoms]) == {"trans": [0, 2], "cis": [1]}
    for no_choice in ([], [atoms, atoms], [flipped], [atoms, flipped, read(EXAMPLE / "c7eq.extxyz")[:10]]):
        assert analysis.isomers(no_choice) == {}
    assert analysis.isomers([bulk("Cu"), bulk("Cu")]) == {}


# --- coverage ---------------------------------------------------------------------------------------------------


def naive_coverage(angles: np.ndarray, levels: int) -> float:
    """The definition as a recursive tree with a set of visited nodes."""
    visited = set()
    for point in angles:
        low, high = np.full(len(point), -np.pi), np.full(len(point), np.pi)
        path: tuple = ()
        for _ in range(levels):
            middle = (low + high) / 2
            upper = point >= middle
            low, high = np.where(upper, middle, low), np.where(upper, high, middle)
            path += (tuple(upper),)
            visited.add(path)
    return sum(2.0 ** (-angles.shape[1] * len(path)) for path in visited) / levels


@pytest.mark.parametrize(("dimensions", "levels"), [(2, 5), (1, 3), (3, 2)])
def test_coverage_equals_the_tree(dimensions, levels):
    rng = np.random.default_rng(dimensions)
    for count in (1, 7, 300):
        angles = rng.uniform(-np.pi, np.pi, size=(count, dimensions))
        assert analysis.coverage(angles, levels) == pytest.approx(naive_coverage(angles, levels), rel=1e-12)


def test_coverage_limits():
    centres = (np.arange(32) + 0.5) / 32 * 2 * np.pi - np.pi
    every = np.array(np.meshgrid(centres, centres)).reshape(2, -1).T
    assert analysis.coverage(every) == pytest.approx(1.0)
    assert analysis.coverage(np.zeros((0, 2))) == 0.0
    # one point: one of 4 cells on level 1, one of 16 on level 2, ...
    assert analysis.coverage([[0.3, 0.4]]) == pytest.approx(sum(4.0**-h for h in range(1, 6)) / 5)
    # one quadrant, fully visited
    assert analysis.coverage(every[np.all(every > 0, axis=1)]) == pytest.approx(0.25)


def test_coverage_is_periodic():
    assert analysis.coverage([[np.pi - 1e-12, 0.1], [-np.pi, 0.1]]) > analysis.coverage([[-np.pi, 0.1]])
    assert analysis.coverage([[np.pi, 0.1], [-np.pi, 0.1]]) == analysis.coverage([[-np.pi, 0.1]])
    assert analysis.coverage([[np.nextafter(-np.pi, -4.0), 0.1]]) == analysis.coverage([[3.14, 0.1]])


def test_coverage_growth_is_the_coverage_of_every_prefix():
    angles = np.random.default_rng(5).normal(size=(60, 2))
    growth = analysis.coverage_growth(angles)
    np.testing.assert_allclose(growth, [naive_coverage(angles[: k + 1], 5) for k in range(60)], rtol=1e-12)


# --- numbers ----------------------------------------------------------------------------------------------------


def test_correlations_agree_with_scipy():
    rng = np.random.default_rng(2)
    x = rng.integers(0, 8, size=50).astype(float)  # with ties
    y = x + rng.normal(scale=3.0, size=50)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(pearson(np.ones(5), y[:5]))


def test_share_covered():
    assert share_covered([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 4.0, 5.0]) == 0.75


def test_mean_curve_interpolates_at_equal_steps():
    grid, mean, deviation = mean_curve([([100, 200], [0.1, 0.3]), ([50, 400], [0.2, 0.2])], points=5)
    np.testing.assert_allclose(grid, [0, 50, 100, 150, 200])
    np.testing.assert_allclose(mean, [0.0, 0.125, 0.15, 0.2, 0.25])
    np.testing.assert_allclose(deviation[1], np.std([0.05, 0.2], ddof=1))


# --- a run folder -----------------------------------------------------------------------------------------------


def small_model(frames, path: Path) -> Model:
    """A real model file, barely trained: energies shifted, 16 projections."""
    elements = ("H", "C", "N", "O")
    model = GaussianMomentNetwork(elements, ModelSettings(hidden=(16, 16)), seed=0)
    model.initialise_energies([build_graph(atoms, elements, 5.0) for atoms in frames])
    export_model(model, frames[:16], frames[16:], UncertaintySettings(projections=16, alpha=0.2), path, {})
    return Model(path)


def copper_model(structures, path: Path) -> None:
    """A real model file of copper, not trained."""
    model = GaussianMomentNetwork(("Cu",), ModelSettings(hidden=(8, 8)), seed=0)
    model.initialise_energies([build_graph(atoms, ("Cu",), 5.0) for atoms in structures])
    export_model(model, structures[:10], structures[10:], UncertaintySettings(projections=8, alpha=0.2), path, {})


@pytest.fixture(scope="module")
def run(frames, tmp_path_factory):
    """A run folder with two iterations of two replicas, as `ubmd run` leaves it (frames from reference MD)."""
    folder = tmp_path_factory.mktemp("runs") / "some_run"
    settings = {
        "run_dir": str(folder),
        "start": {"file": "c7eq.extxyz"},
        "reference": REFERENCE,
        "md": {"frames_every": 40},
        "loop": {"plateau_iterations": 1, "label_budget": 30},
        "variables": {"torsions": TORSIONS},
    }
    folder.mkdir()
    resolved = RunSettings.model_validate(settings)
    open_run(RunFolder(folder), resolved, {"start.file": "0" * 64})
    history = []
    for iteration, md_steps in [(0, 440), (1, 900)]:
        entry = {"iteration": iteration, "labels": 8 + 8 * iteration, "md_steps": md_steps, "coverage": 0.1}
        entry["test"] = {"energy_rmse_mev_per_atom": 20.0 / (iteration + 1), "force_rmse": 0.5 / (iteration + 1)}
        entry["replicas"] = [
            {"replica": 0, "steps": 240, "stopped": "step limit", "reason": "", "seconds": 0.24},
            {"replica": 1, "steps": 190, "stopped": "failed", "reason": "It exploded at step 190.", "seconds": 0.2},
        ]
        entry["valid"] = {"energy_rmse_mev_per_atom": 7.0, "force_rmse": 0.2 + 0.1 * iteration}
        entry["calibration"] = {"force_factor": 40.0}
        entry["seconds"] = {"train": 10.0 + iteration, "md": 1.5, "label": 0.5}
        history.append(entry)
        _write_replicas(folder / "iterations" / f"iter_{iteration:03d}", frames[12 * iteration : 12 * iteration + 12])
    (folder / "history.json").write_text(json.dumps(history))
    write_structures(folder / "test.extxyz", frames)
    rejected = [frames[0].copy() for _ in range(3)]
    for atoms, iteration, reason in zip(rejected, (-1, 0, 0), ("25.1 eV/Å", "21.3 eV/Å", "no <b>"), strict=True):
        atoms.calc = None
        atoms.info = {"iteration": iteration, "reason": f"The force is {reason}."}
    write_structures(folder / "rejected.extxyz", rejected)
    evaluator = small_model(frames, folder / "model.pt")
    keep(folder, 1, evaluator, frames)
    return folder


def keep(folder: Path, iteration: int, evaluator: Model, structures) -> None:
    """What a run keeps of the predictions of its models."""
    path = folder / "iterations" / f"iter_{iteration:03d}" / predictions.FILE
    predictions.keep_predictions(path, structures, evaluator.predict(structures), evaluator.metadata)


def _write_replicas(folder: Path, frames) -> None:
    """Replica 0 runs 240 steps, replica 1 stops in the middle of an interval, at step 190."""
    folder.mkdir(parents=True)
    for replica, steps in [(0, [40, 80, 120, 160, 200, 240]), (1, [40, 80, 120, 160, 190])]:
        structures = []
        for step, frame in zip(steps, frames[replica * 6 :], strict=False):
            atoms = frame.copy()
            atoms.info = {"step": step, "replica": replica, "max_uncertainty": step / 200, "uncertainty": 0.01}
            structures.append(atoms)
        write_structures(folder / f"frames_{replica:03d}.extxyz", structures)


def test_frames_come_in_the_order_of_md(run):
    found = read_frames(run)
    assert len(found) == 22
    assert found.iteration.tolist() == [0] * 11 + [1] * 11
    assert found.step[:11].tolist() == [40, 40, 80, 80, 120, 120, 160, 160, 190, 200, 240]
    assert found.replica[:11].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0]
    # two replicas side by side, until the second one stops at step 190
    assert found.md_steps[:11].tolist() == [80, 80, 160, 160, 240, 240, 320, 320, 380, 390, 430]
    assert found.md_steps[11] == 440 + 80  # the history's count, not the last frame, is what came before
    steps, share = found.coverage_curve([PHI, PSI])
    assert steps[:8].tolist() == [80, 160, 240, 320, 380, 390, 430, 520]
    expected = naive_coverage(analysis.torsions(found.structures[:4], [PHI, PSI]), 5)
    assert share[1] == pytest.approx(expected)


def test_calibration_data_is_about_the_same_atoms(run, frames):
    found = Model(run / "model.pt").predict(frames)
    data = analysis.calibration_data(frames, found)
    worst = [
        max(np.sqrt(np.mean((p.forces[i] - a.get_forces()[i]) ** 2)) for i in range(22))
        for a, p in zip(frames, found, strict=True)
    ]
    np.testing.assert_allclose(data.largest_error, worst, rtol=1e-12)
    components = np.concatenate([(p.forces - a.get_forces()).ravel() for a, p in zip(frames, found, strict=True)])
    assert data.force_rmse == pytest.approx(np.sqrt(np.mean(components**2)))
    energies = np.array([(p.energy - a.get_potential_energy()) / 22 for a, p in zip(frames, found, strict=True)])
    assert data.energy_rmse == pytest.approx(1000 * np.sqrt(np.mean(energies**2)))
    assert data.atom_u.shape == (24 * 22,)
    assert data.largest_u == pytest.approx(data.atom_u.reshape(24, 22).max(axis=1))


PICTURES = [
    "learning_curve.png",
    "learning_curve_steps.png",
    "parity.png",
    "calibration.png",
    "structures.png",
    "ramachandran.png",
    "coverage.png",
    "uncertainty.png",
    "replicas.png",
    "convergence.png",
    "time.png",
]


def check_picture(path: Path) -> None:
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > 400
    assert image.shape[1] <= 1300  # not larger than what a page shows
    assert image[..., :3].std() > 0.03  # something is drawn
    border = np.concatenate([image[:3].ravel(), image[-3:].ravel(), image[:, :3].ravel(), image[:, -3:].ravel()])
    assert border.min() > 0.9  # and nothing is clipped by the edge


def test_report_has_readable_pictures_and_tables(run):
    files = [path for path in analysis.make_report(run) if path.name != "structures.html"]  # the extra may be missing
    assert [path.name for path in files] == [*PICTURES, "report.md", "report.html"]
    for path in files[:-2]:
        check_picture(path)
    text = files[-2].read_text()
    assert re.search(r"\| 1 +\| 16 +\| +\| 900 +\| 7.00 +\| 0.3000 +\| 10.00", text)
    assert "The run has not finished." in text
    assert "force error of held-out labels varies by 40 %, their calibration factor by 0 % (tolerance 10 %)" in text
    assert re.search(r"\| label budget \| yes +\| 19 reference calculations of 30", text)
    assert "0 last iterations (of 3) in which every replica reached the step limit" in text
    assert "expected share" in text
    assert "22 stored frames" in text
    assert "| 2     | start to 0 | The force is 21.3 eV/Å." in text  # two reasons that differ in a number
    assert "| 2     | 0 to 1     | It exploded at step 190." in text
    assert re.search(r"\| training +\| 21.0 s +\| 84.0 % +\| 10.5 s per training", text)
    assert "| md.frames_every" in text
    assert "| seed " in text
    for name in PICTURES:
        assert f"]({name})" in text


class Page(HTMLParser):
    """Tags of an HTML page; the standard library's parser closes nothing by itself, so their balance is checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_report_needs_no_other_file(run):
    path = analysis.make_report(run)[-1]
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    pictures = [source for source in page.sources if source.startswith("data:image/png;base64,")]
    assert len(pictures) == len(PICTURES)
    embedded = base64.b64decode(pictures[0].partition(",")[2])
    assert embedded == (run / "report" / PICTURES[0]).read_bytes()
    others = {source for source in page.sources if not source.startswith(("data:", "#"))}
    assert {source.partition("#")[0] for source in others} <= {"structures.html"}  # a page beside it, if there is one
    assert "The force is no &lt;b&gt;." in text


@pytest.mark.parametrize("kept", [True, False])
def test_without_a_test_set_new_labels_stand_in(run, frames, tmp_path, kept):
    folder = tmp_path / "no_test"
    shutil.copytree(run, folder)
    (folder / "test.extxyz").unlink()
    labels = [frame.copy() for frame in frames[:6]]
    for k, atoms in enumerate(labels):
        atoms.calc, atoms.info = frames[k].calc, {"label": k, "iteration": k // 3 - 1}
    write_structures(folder / "dataset.extxyz", labels)
    shutil.copy(folder / "model.pt", folder / "iterations" / "iter_000" / "model.pt")
    if kept:
        keep(folder, 0, Model(folder / "model.pt"), labels[3:6])
    text = analysis.make_report(folder, run_models=not kept)[-2].read_text()
    assert "The run has no test set. Instead, these are 3 labels" in text
    found = Model(folder / "model.pt").predict(frames[3:6])
    expected = analysis.calibration_data(frames[3:6], found).force_rmse
    assert f"force RMSE {expected:.4f} eV/Å (3 structures)." in text


def test_kept_predictions_are_those_of_the_model(run, frames, tmp_path):
    """Also without a stress; a file about other structures, or a damaged one, is none."""
    evaluator, path = Model(run / "model.pt"), tmp_path / "predictions.npz"
    cell = bulk("C", "sc", a=2.3).repeat((2, 1, 1))
    cell.calc = SinglePointCalculator(cell, energy=1.0, forces=np.ones((2, 3)))
    structures = [frames[0], cell, frames[1]]
    found = evaluator.predict(structures)
    predictions.keep_predictions(path, structures, found, evaluator.metadata)
    write_structures(tmp_path / "structures.extxyz", structures)
    kept = predictions.kept_predictions(path, read_structures(tmp_path / "structures.extxyz"))
    assert kept.promise["alpha"] == 0.2
    for a, b in zip(kept.each, found, strict=True):
        assert (a.energy, a.u) == (b.energy, b.u)
        np.testing.assert_array_equal(a.forces, b.forces)
        np.testing.assert_array_equal(a.atomic_u, b.atomic_u)
        assert (a.stress is None) == (b.stress is None)
    np.testing.assert_array_equal(kept.each[1].stress, found[1].stress)
    assert predictions.kept_predictions(path, structures[:2]) is None
    assert predictions.kept_predictions(tmp_path / "absent.npz", structures) is None
    content = dict(np.load(path))
    for name, wrong in (
        ("forces", content["forces"][:-1]),
        ("energy", np.array(["a", "b", "c"])),
        ("promise", json.dumps({"alpha": 0.2})),
        ("promise", "[" * 100_000),
        ("u", np.array([object()] * 3)),  # would be a pickle
    ):
        np.savez(tmp_path / "wrong.npz", **(content | {name: wrong}))
        assert predictions.kept_predictions(tmp_path / "wrong.npz", structures) is None
    path.write_bytes(path.read_bytes()[:1000])
    assert predictions.kept_predictions(path, structures) is None


EVIL = """
from pathlib import Path
Path({marker!r}).touch()
raise ImportError("evil")
"""


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_commands_about_a_stranger_s_folder_run_nothing_in_it(run, tmp_path):
    """Hostile model files, modules with the names of packages, a reference of one's own: looking at them is safe."""
    marker, victim = tmp_path / "marker", Victim(tmp_path)
    folder = copy_run(run, tmp_path / "folder", reference={"calculator": "evil:Calculator"})
    write_hostile(folder / "model.pt", victim, record=RECORD)
    for iteration in (0, 1):
        shutil.copy(folder / "model.pt", folder / "iterations" / f"iter_{iteration:03d}")
    for name in ("evil", "numpy", "torch", "ase", "matplotlib", "ubmd", "json"):
        (folder / f"{name}.py").write_text(EVIL.format(marker=str(marker)))
    command = [Path(sys.executable).with_name("ubmd")]

    def ubmd(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "evil:Calculator" in ubmd("info", ".")
    assert "cutoff" in ubmd("info", "model.pt")
    assert "iter" in ubmd("status", ".")
    ubmd("report", ".")
    assert (folder / "report" / "parity.png").exists()
    ubmd("compare", ".", ".", "--out", "out")
    assert (folder / "out" / "calibration.png").exists()
    assert "labels" in ubmd("table", ".")
    (folder / "iterations" / "iter_001" / predictions.FILE).unlink()
    ubmd("report", ".")
    text = (folder / "report" / "report.md").read_text()
    assert "has no predictions of its models for these structures (an earlier version of ubmd made it" in text
    assert not victim.harmed
    assert not marker.exists()
    failed = subprocess.run([*command, "report", ".", "--run-models"], cwd=folder, capture_output=True, check=False)
    assert failed.returncode == 1  # it is no potential
    assert victim.harmed  # the attack is a real one


def test_parity_has_stress_in_mpa_where_there_are_labels():
    atoms = bulk("Cu", cubic=True)
    stress = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) * 1e-3
    atoms.calc = SinglePointCalculator(atoms, energy=-2.0, forces=np.full((4, 3), 0.5), stress=stress)
    other = atoms.copy()
    other.calc = SinglePointCalculator(other, energy=-4.0, forces=np.zeros((4, 3)))
    prediction = Prediction(-3.0, np.ones((4, 3)), 2 * stress, 0.1, np.ones(4), np.ones(2))
    data = parity_data([atoms, other], [prediction, prediction])
    assert data.energy_label.tolist() == [-0.5, -1.0]
    assert data.energy.tolist() == [-0.75, -0.75]
    assert (data.force - data.force_label).tolist() == [0.5] * 12 + [1.0] * 12
    np.testing.assert_allclose(data.stress_label, stress / GPa * 1000)
    np.testing.assert_allclose(data.stress, 2 * data.stress_label)
    summary = analysis.error_summary([atoms, other], [prediction, prediction])
    assert summary["stress_rmse_mpa"] == pytest.approx(1000 / GPa * np.sqrt(np.mean(stress**2)))
    assert summary["structures"] == 2
    assert "stress_rmse_mpa" not in analysis.error_summary([other], [prediction])


def test_report_of_an_unfinished_run_and_of_no_run(run, tmp_path):
    with pytest.raises(DataError, match=r"There is no run in .* no manifest.json"):
        analysis.make_report(tmp_path)
    for name in ("settings.toml", "manifest.json"):
        shutil.copy(run / name, tmp_path)
    assert [path.name for path in analysis.make_report(tmp_path)] == ["report.md", "report.html"]
    assert "No iteration has finished" in (tmp_path / "report" / "report.md").read_text()
    entry = {"iteration": 0, "labels": 8, "md_steps": 10, "test": None, "coverage": None}
    (tmp_path / "history.json").write_text(json.dumps([entry]))
    assert [path.name for path in analysis.make_report(tmp_path)] == ["report.md", "report.html"]
    assert "| 0         | 8      | 10 " in (tmp_path / "report" / "report.md").read_text()


def test_learning_curves_have_a_panel_for_stress_where_there_is_one(tmp_path):
    labels, errors = [8, 16, 24], [3.0, 2.0, 1.0]
    sets = {"test set": (labels, errors, errors, errors), "training": (labels, errors, errors, [np.nan] * 3)}
    with_stress = analysis.learning_curve_figure(sets, tmp_path / "stress.png")
    without = analysis.learning_curve_figure({"training": sets["training"]}, tmp_path / "without.png")
    for path in (with_stress, without):
        check_picture(path)
    assert matplotlib.image.imread(with_stress).shape != matplotlib.image.imread(without).shape
    run = np.array([labels, [0, 100, 300], errors, errors, errors], dtype=float).T
    groups = {"a": [run, 2 * run * [0.5, 1, 1, 1, 1]], "b": [run]}
    check_picture(group_learning_figure(groups, tmp_path / "groups.png"))


def test_volumes_count_where_cells_change(tmp_path):
    cells = [bulk("Cu") for _ in range(30)]
    for k, atoms in enumerate(cells):
        atoms.set_cell(atoms.cell[:] * (1 + 0.001 * k), scale_atoms=True)
    numbers = np.arange(30)
    frames = Frames(cells, numbers // 10, numbers * 0, numbers, 100 * numbers, numbers / 10)
    np.testing.assert_allclose(frames.volumes(), [atoms.get_volume() for atoms in cells])
    assert Frames(cells[:1] * 3, *[np.zeros(3, int)] * 4, np.zeros(3)).volumes() is None
    check_picture(analysis.volume_figure(frames.md_steps, frames.volumes(), frames.iteration, tmp_path / "v.png"))


def test_legends_with_long_names_are_not_clipped(tmp_path):
    curves = {
        f"unbiased_at_{k}50_MPa_and_600_K": [([0, 50 + k], [0.0, 5.0 + k + m]) for m in range(2)] for k in range(3)
    }
    check_picture(figures.exploration_figure(curves, curves, tmp_path / "long.png", "volume range"))


def test_coverage_picture_compares_groups_of_runs(tmp_path):
    rng = np.random.default_rng(0)
    runs = [(np.arange(1, 50) * 1000, np.sort(rng.uniform(0, 0.6, 49))) for _ in range(6)]
    path = analysis.coverage_figure({"biased": runs[:3], "unbiased": runs[3:]}, tmp_path / "a" / "coverage.png")
    assert path.stat().st_size > 10_000


def test_calibration_picture_counts_many_points(tmp_path):
    rng = np.random.default_rng(0)
    u = 10 ** rng.normal(size=3000)
    panels = {"many": (u, u * rng.uniform(0.2, 1.1, size=3000)), "few": (u[:9], np.zeros(9))}
    path = analysis.calibration_figure(panels, tmp_path / "calibration.png", [("u", "error"), ("u", "error")])
    check_picture(path)


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        ({}, "NVT at 300 K, bias force 0.25"),
        ({"bias": {"force": 0.0}}, "NVT at 300 K, no bias (plain MD)"),
        ({"md": {"ramp": {"temperature": [300.0, 600.0]}}}, "NVT at 300 to 600 K (ramped), bias force 0.25"),
        (
            {"md": {"ensemble": "npt", "pressures": [250.0, -250.0]}, "bias": {"stress": 0.5}},
            "NPT at 300 K and 250 and -250 MPa (in turn), bias force 0.25, bias stress 0.5",
        ),
    ],
)
def test_conditions_in_words(tables, text):
    values = {"run_dir": "x", "start": {"file": "x"}, "reference": {"calculator": "x"}} | tables
    assert conditions(RunSettings.model_validate(values)) == text


def test_settings_that_a_kind_of_network_does_not_use_are_not_listed():
    """A MACE network with r_max = 4 has no 'model.cutoff' of 5 Å, the default of Gaussian-moment networks."""
    texts = {}
    for kind, more in (("gmnn", {}), ("mace", {"arguments": {"r_max": 4.0}}), ("my:Network", {})):
        values = {"run_dir": "x", "start": {"file": "x"}, "reference": {"calculator": "x"}}
        values["model"] = {"kind": kind, **more}
        texts[kind] = setting_texts(RunSettings.model_validate(values))
    assert texts["gmnn"]["model.cutoff"] == "5.0"
    assert texts["mace"]["model.arguments"] == '{"r_max": 4.0}'
    assert not {"model.cutoff", "model.hidden", "training.learning_rate"} & texts["mace"].keys()
    assert {"training.epochs", "training.threads", "model.baseline", "model.features"} < texts["mace"].keys()
    assert not {"model.arguments", "model.python", "training.mode"} & texts["gmnn"].keys()
    assert {"model.arguments", "training.learning_rate"} < texts["my:Network"].keys()
    assert "model.cutoff" not in texts["my:Network"]


def test_comparison_of_two_kinds_of_networks_has_the_settings_of_both(run, tmp_path):
    other = copy_run(run, tmp_path / "other", model={"kind": "mace", "python": "p", "arguments": {"r_max": 4.0}})
    compare([run, other], tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert re.search(r"\| model.kind +\| \"gmnn\" +\| \"mace\" +\|", text)
    assert re.search(r"\| model.arguments +\| - +\| \{\"r_max\": 4.0\} +\|", text)
    assert re.search(r"\| model.cutoff +\| [0-9.]+ +\| - +\|", text)


# --- the example that uses all this -------------------------------------------------------------------------------


def copy_run(run: Path, folder: Path, entries: int = 2, **changes) -> Path:
    """A copy with other settings, and perhaps fewer iterations."""
    shutil.copytree(run, folder)
    settings = read_settings(RunFolder(run)).model_dump(mode="json", exclude_none=True)
    settings |= {"run_dir": str(folder)} | changes
    (folder / "settings.toml").write_text(tomli_w.dumps(settings))
    history = json.loads((run / "history.json").read_text())[:entries]
    for entry in history:
        entry["valid"]["force_rmse"] = 0.125
    (folder / "history.json").write_text(json.dumps(history))
    return folder


def test_comparison_groups_by_seed_and_interpolates_at_equal_md_steps(run, tmp_path):
    biased = [copy_run(run, tmp_path / f"biased_seed{k}", seed=k) for k in (0, 1)]
    unbiased = [copy_run(run, tmp_path / f"plain{k}", 2 - k, seed=k, bias={"force": 0.0}) for k in (0, 1)]
    rows, files = compare([biased[0], *unbiased, biased[1]], tmp_path / "out")
    values = {row.title: row.values for row in rows}
    steps, share = read_frames(run).coverage_curve([PHI, PSI])
    for mark in (108, 215, 322, 430):  # quarters of the last frame of the shortest run
        expected = np.interp(mark, np.append(0, steps), np.append(0.0, share))
        assert values[f"coverage after {mark} MD steps"] == {"biased": [expected] * 2, "plain": [expected] * 2}
    assert values["force RMSE at 8 labels, eV/Å"]["plain"] == [0.5, 0.5]
    assert values["force RMSE at the end, eV/Å"] == {"biased": [0.25, 0.25], "plain": [0.25, 0.5]}
    assert next(row for row in rows if row.title.startswith("force RMSE at the end")).cells()[1] == "0.375 ± 0.177"
    names = [path.name for path in files]
    assert names == [
        "learning_curves.png",
        "coverage.png",
        "torsions.png",
        "calibration.png",
        *(f"comparison.{x}" for x in ("md", "html", "json")),
    ]
    for path in files[:4]:
        check_picture(path)
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| bias.force | 0.25   | 0.0   |" in text
    assert "| biased | 2    | 0, 1  | biased_seed0, biased_seed1 |" in text
    assert "those on the test set" in text
    assert "Caution" not in text
    assert Page((tmp_path / "out" / "comparison.html").read_text()).open == []
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == values


def test_learning_curves_are_compared_at_equal_labels():
    """Rejected labels make runs differ in their numbers: errors are interpolated in their logarithm."""
    one = np.array([[8, 0, 4.0, 0.4, 10.0], [16, 100, 1.0, 0.1, 10.0], [24, 300, 0.5, 0.05, 10.0]])
    other = np.array([[8, 0, 4.0, 0.4, np.nan], [15, 80, 2.0, 0.2, np.nan], [22, 200, 1.0, 0.1, np.nan]])
    assert shared_labels([one, other]).tolist() == [8, 16, 22]
    assert shared_labels([one, one[:2]]).tolist() == [8, 16]
    found = at_labels(one, [8, 12, 24])
    np.testing.assert_allclose(found[:, :4], [[8, 0, 4, 0.4], [12, 50, 2, 0.2], [24, 300, 0.5, 0.05]])
    assert np.isnan(at_labels(other, [9])[0, 4])


def test_comparison_at_labels_that_one_run_lacks(run, tmp_path):
    runs = [copy_run(run, tmp_path / f"run_{k}", seed=k) for k in range(2)]
    history = json.loads((runs[1] / "history.json").read_text())
    history[0]["labels"], history[1]["labels"] = 7, 13
    (runs[1] / "history.json").write_text(json.dumps(history))
    values = {row.title: row.values for row in compare(runs, tmp_path / "out")[0]}
    a, b = np.log(20.0), np.log(10.0)
    expected = [np.exp(a + (b - a) * 5 / 8), 10.0]  # 13 labels: between 8 and 16 of one run, the last of the other
    assert values["energy RMSE at 13 labels, meV/atom"]["run_0"] == pytest.approx(expected)


def test_comparison_of_traces_and_of_three_strengths(run, tmp_path):
    rng = np.random.default_rng(8)
    runs = [copy_run(run, tmp_path / f"force_{force}", bias={"force": force}) for force in (0.5, 0.1, 0.25)]
    expected = {}
    for folder in runs:
        noise = 0.1 * np.cumsum(rng.normal(size=(300, 22, 3)), axis=0)
        values = {"numbers": np.ones(22, int), "timestep": 0.5, "cell": np.zeros((300, 3, 3))}
        values |= {"step": 20 * np.arange(1, 301), "positions": noise + 5 * rng.normal(size=(22, 3))}
        values["max_u"] = np.abs(noise[:, 0, 0])
        np.savez(folder / "iterations" / "iter_001" / "trace_000.npz", **values)
        expected[folder.name] = [pytest.approx(0.01 * statistical_inefficiency(values["max_u"]))]
    rows, files = compare(runs, tmp_path / "out")
    found = {row.title: row.values for row in rows}
    assert found["autocorrelation time of max u, ps"] == expected
    assert all(0.1 < time[0] < 3.0 for time in found["autocorrelation time of positions, ps"].values())
    pictures = [path for path in files if path.suffix == ".png"]
    assert [path.name for path in pictures[3:]] == ["autocorrelation.png", "calibration.png", "dependence.png"]
    for path in pictures:
        check_picture(path)
    assert "recorded every 10 fs; force_0.5: 1 (3 ps), force_0.1: 1 (3 ps)" in files[-3].read_text()
    time = found["autocorrelation time of max u, ps"]["force_0.5"][0]
    text = analysis.make_report(runs[0])[-2].read_text()
    assert f"{time:.3g} ps of the largest uncertainty, from 1 replicas of at least 1 ps (3 ps together" in text


def test_comparison_of_breathing_cells(run, tmp_path):
    runs = [copy_run(run, tmp_path / f"tau_{force}", bias={"force": force}, variables={}) for force in (0.1, 0.5)]
    rng = np.random.default_rng(9)
    for folder, amplitude in zip(runs, (0.02, 0.2), strict=True):
        structures = []
        for k in range(20):
            atoms = bulk("Cu", cubic=True)
            atoms.set_cell(atoms.cell[:] * (1 + amplitude * np.sin(k / 3)) ** (1 / 3), scale_atoms=True)
            forces = rng.normal(size=(4, 3))
            atoms.calc = SinglePointCalculator(atoms, energy=-2.0, forces=forces, stress=rng.normal(size=6) / 100)
            atoms.info = {"step": 100 * k, "replica": 0, "max_uncertainty": 0.1}
            structures.append(atoms)
        for iteration in (0, 1):
            where = folder / "iterations" / f"iter_{iteration:03d}"
            for path in where.glob("frames_*"):
                path.unlink()
            write_structures(where / "frames_000.extxyz", structures)
        write_structures(folder / "test.extxyz", structures)
        cells = np.eye(3) * (3.6 * (1 + amplitude * np.sin(np.pi * np.arange(1, 151) / 150)) ** (1 / 3))[:, None, None]
        values = {"numbers": np.full(4, 29), "timestep": 0.5, "step": 20 * np.arange(1, 151), "cell": cells}
        values |= {"positions": rng.normal(size=(150, 4, 3)), "max_u": rng.uniform(size=150)}
        np.savez(folder / "iterations" / "iter_000" / "trace_001.npz", **values)
        still = np.repeat(cells[:1], len(cells), axis=0)
        np.savez(folder / "iterations" / "iter_000" / "trace_000.npz", **(values | {"cell": still}))
        copper_model(structures, folder / "model.pt")
    shutil.copy(runs[0] / "test.extxyz", runs[1] / "test.extxyz")
    for folder in runs:
        keep(folder, 1, Model(folder / "model.pt"), read_structures(folder / "test.extxyz"))
    rows, files = compare(runs, tmp_path / "out")
    found = {row.title: row.values for row in rows}
    volume = bulk("Cu", cubic=True).get_volume() / 4
    waves = 1 + 0.2 * np.sin(np.arange(20) / 3)
    assert found["volume range (Å³/atom) after 3,800 MD steps"]["tau_0.5"] == pytest.approx([volume * np.ptp(waves)])
    pictures = {path.name: path for path in files if path.suffix == ".png"}
    wanted = {"volumes.png", "volume_histogram.png", "volume_against_time.png", "errors_by_volume.png"}
    assert wanted <= pictures.keys()
    for name in wanted:
        check_picture(pictures[name])
    text = files[-3].read_text()
    assert re.search(r"\| tau_0.5 +\| 47 to 56 +\| 9.2 +\| 0.0 +\| 100 % +\|", text)
    assert "Errors by volume" in text


@pytest.mark.parametrize("kept", [True, False])
def test_errors_of_cis_and_trans_test_structures(run, frames, tmp_path, kept):
    """In `ubmd compare` and `ubmd table`, of the model that the row is about."""
    folder = copy_run(run, tmp_path / "both")
    amide = analysis.amide_torsions(frames[0])[1]
    flipped = []
    for atoms in frames[:5]:
        forces = 3.0 * atoms.get_forces()
        other = atoms.copy()
        other.set_dihedral(*amide, 20.0, indices=range(17, 22))
        other.calc = SinglePointCalculator(other, energy=atoms.get_potential_energy(), forces=forces)
        flipped.append(other)
    structures = [*flipped, *frames[5:]]
    write_structures(folder / "test.extxyz", structures)
    rows, files = compare([folder], tmp_path / "before")
    assert not any("amides" in row.title for row in rows)  # what is kept is about other structures
    assert "Give --run-models to make them" in files[-3].read_text()
    model = folder / "iterations" / "iter_001" / "model.pt"
    shutil.copy(folder / "model.pt", model)
    if kept:
        keep(folder, 1, Model(model), structures)
        model.unlink()
    predicted = Model(folder / "model.pt").predict(structures)
    squares = [np.mean((p.forces - a.get_forces()) ** 2) for p, a in zip(predicted, structures, strict=True)]
    gaps = [(p.energy - a.get_potential_energy()) / 22 for p, a in zip(predicted, structures, strict=True)]
    expected = {"trans": np.sqrt(np.mean(squares[5:])), "cis": np.sqrt(np.mean(squares[:5]))}
    assert expected["cis"] > 1.5 * expected["trans"]
    rows, files = compare([folder], tmp_path / "after", run_models=not kept)
    assert "--run-models" not in files[-3].read_text()
    found = {row.title: row.values["both"] for row in rows}
    energies = {
        "trans": 1000 * np.sqrt(np.mean(np.square(gaps[5:]))),
        "cis": 1000 * np.sqrt(np.mean(np.square(gaps[:5]))),
    }
    for name, error in expected.items():
        assert found[f"energy RMSE at the end, {name} amides, meV/atom"] == pytest.approx([energies[name]])
        assert run_values(Run(folder, not kept))[f"energy_{name}"] == pytest.approx(energies[name])
        assert found[f"force RMSE at the end, {name} amides, eV/Å"] == pytest.approx([error])
        assert run_values(Run(folder, not kept))[f"force_{name}"] == pytest.approx(error)
    assert "force_cis" not in run_values(Run(folder), labels=8)  # an older model, whose file is gone
    write_structures(folder / "test.extxyz", frames)
    assert "force_cis" not in run_values(Run(folder))


def test_comparison_without_a_common_test_set(run, tmp_path):
    runs = [copy_run(run, tmp_path / name, selection={"method": name}) for name in ("random", "max_det")]
    history = json.loads((runs[0] / "history.json").read_text())
    (runs[0] / "history.json").write_text(json.dumps([entry | {"test": None} for entry in history]))
    rows, files = compare(runs, tmp_path / "out")
    assert {row.title: row.values for row in rows}["force RMSE at the end, eV/Å"] == {
        "random": [0.125],
        "max_det": [0.125],
    }
    assert "each run's own validation labels" in files[-3].read_text()
    pictures = ["learning_curves.png", "coverage.png", "torsions.png", "calibration.png"]
    assert [path.name for path in files][:4] == pictures
    with pytest.raises(DataError, match="1 names for 2 groups"):
        compare(runs, tmp_path / "out", ["one"])
    (runs[1] / "history.json").unlink()
    with pytest.raises(DataError, match=r"No iteration of the run in .*max_det has finished"):
        compare(runs, tmp_path / "out")


def test_comparison_says_when_test_sets_differ(run, frames, tmp_path):
    runs = [copy_run(run, tmp_path / f"run_{k}", seed=k) for k in range(2)]
    write_structures(runs[1] / "test.extxyz", frames[:5])
    _, files = compare(runs, tmp_path / "out")
    assert "Caution: the runs have different test sets" in files[-3].read_text()


def test_settings_of_the_example_load():
    settings = {name: load_settings(EXAMPLE / f"{name}.toml", RunSettings) for name in ("quickstart", "paper")}
    assert settings["quickstart"].bias.force == settings["paper"].bias.force == 0.25
    for one in settings.values():
        assert (EXAMPLE / one.start.file).exists()
        assert one.variables.torsions == {"phi": PHI, "psi": PSI}
    paper = settings["paper"]
    assert (paper.uncertainty.projections, paper.loop.labels, paper.bias.every) == (512, 512, 1)
    assert (paper.training.batch_size, paper.training.epochs, paper.loop.warm_start) == (32, 1000, False)
