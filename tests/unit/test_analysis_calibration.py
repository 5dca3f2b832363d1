"""The study of calibrated uncertainties on random splits, against models that were exported for each case."""

from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

from ubmd.analysis import figures
from ubmd.analysis.calibration_study import Outcome, Sizes, calibration_study, summary_rows
from ubmd.calculator import Model
from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.measure.errors import CalibrationData, calibration_data, share_covered
from ubmd.potentials.gmnn.checkpoint import load_weights
from ubmd.potentials.gmnn.export import export_model
from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings

MODEL = ModelSettings(hidden=(16, 16), n_radial=2)
TRAINING = TrainingSettings(epochs=4, threads=1)
UNCERTAINTY = UncertaintySettings(projections=16, members=2, references=8, by_element=False)
SIZES = Sizes(10, 4, 8)


@pytest.fixture(scope="module")
def structures() -> list[Atoms]:
    """24 labelled clusters of four atoms."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(24):
        atoms = Atoms("CuAuCuAu", positions=np.array([[0, 0, 0], [2.5, 0, 0], [0, 2.5, 0], [0, 0, 2.5]]))
        atoms.positions += rng.normal(scale=0.15, size=(4, 3))
        atoms.calc = EMT()
        label = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **label)
        found.append(atoms)
    return found


@pytest.fixture(scope="module")
def study(structures, tmp_path_factory) -> tuple[list[Outcome], Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study")
    kinds = ("posterior", "distance", "ensemble")
    return calibration_study(structures, SIZES, 2, kinds, MODEL, TRAINING, UNCERTAINTY, folder, 5), folder


def test_outcomes_are_those_of_models_exported_for_each_case(structures, study, tmp_path):
    """Oracle: the same networks exported with this confidence and this way to calibrate."""
    outcomes, folder = study
    assert [(o.kind, o.split) for o in outcomes] == [
        (k, s) for s in (0, 1) for k in ("posterior", "distance", "ensemble")
    ]
    order = np.random.default_rng(np.random.SeedSequence([5, 1])).permutation(24)
    training, calibration, test = ([structures[i] for i in order[a:b]] for a, b in ((0, 10), (10, 14), (14, 22)))
    members = [load_weights(folder / "split_001" / "training" / f"member_{m}" / "weights.pt") for m in (0, 1)]
    for outcome in outcomes[3:]:
        models = members if outcome.kind == "ensemble" else members[:1]
        for alpha, way in ((0.5, "atom"), (0.05, "structure")):
            change = {"kind": outcome.kind, "alpha": alpha, "atoms_by": way}
            path = tmp_path / "model.pt"
            record = export_model(models, training, calibration, UNCERTAINTY.model_copy(update=change), path)
            data = calibration_data(test, Model(path, "double").predict(test))
            scale, attained = outcome.force_scale(alpha, way)
            np.testing.assert_allclose(scale * outcome.test.atom_u, data.atom_u, rtol=1e-6)
            assert attained == record["uncertainty"]["forces"]["attainable"]
            assert outcome.atom_share(alpha, way) == share_covered(data.atom_error, data.atom_u)
            assert outcome.structure_share(alpha, way) == share_covered(data.largest_error, data.largest_u)
            assert outcome.energy_share(alpha) == share_covered(data.energy_error, data.energy_u)


def test_a_finished_study_is_read_again(structures, study, monkeypatch):
    outcomes, folder = study
    monkeypatch.setattr("ubmd.analysis.calibration_study.train_networks", None)  # would fail if called
    again = calibration_study(structures, SIZES, 2, ("distance",), MODEL, TRAINING, UNCERTAINTY, folder, 5)
    for found, expected in zip(again, (outcomes[1], outcomes[4]), strict=True):
        np.testing.assert_array_equal(found.test.atom_u, expected.test.atom_u)
    with pytest.raises(DataError, match=r"20 \+ 4 \+ 8 structures are needed for a split, but there are only 24"):
        calibration_study(structures, Sizes(20, 4, 8), 1, (), MODEL, TRAINING, UNCERTAINTY, folder)


def made_up(errors: np.ndarray, u: np.ndarray, atoms: int) -> CalibrationData:
    """Structures of equal size from atomic errors and uncertainties."""
    largest = [x.reshape(-1, atoms).max(axis=1) for x in (errors, u)]
    means = [x.reshape(-1, atoms).mean(axis=1) for x in (errors, u)]
    return CalibrationData(means[0], means[1], errors, u, largest[0], largest[1])


def test_structure_maxima_need_their_own_calibration():
    """Errors |N(0, 1)| times u: calibrated per atom, the largest of 20 passes its own confidence; per structure not."""
    rng = np.random.default_rng(1)

    def draw(count: int) -> CalibrationData:
        u = np.repeat(rng.uniform(0.5, 2.0, size=count), 20)
        return made_up(np.abs(rng.normal(size=count * 20)) * u, u, 20)

    outcome = Outcome("made up", 0, draw(400), draw(4000))
    assert outcome.atom_share(0.05, "atom") == pytest.approx(0.95, abs=0.01)
    assert outcome.structure_share(0.05, "structure") == pytest.approx(0.95, abs=0.02)
    assert outcome.structure_share(0.05, "atom") == pytest.approx(0.95**20, abs=0.05)
    assert outcome.miscalibration("atom") < 0.01
    assert outcome.miscalibration("structure") < 0.04
    rows = summary_rows([outcome, outcome], [0.5, 0.05])
    assert [row[1:4] for row in rows] == [
        [words, f"{c:.2f}", f"{c:.3f}"] for words in ("per atom", "per structure") for c in (0.5, 0.95)
    ]
    assert rows[1][5] == f"{outcome.atom_share(0.05, 'atom'):.3f} ± 0.000"


def test_many_structures_share_a_colour_bar_and_nothing_overlaps(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)
    rng = np.random.default_rng(1)
    error = rng.lognormal(-1.0, 0.5, 2500)
    panels = {
        f"{kind}, {level} % confidence": (error * scale, error)
        for kind, scale in (("posterior", 0.5), ("distance", 1.0), ("ensemble", 4.0))
        for level in (50, 95)
    }
    figures.group_calibration_figure(panels, tmp_path / "x.png")
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    *cells, bar = figure.axes
    assert [cell.get_title().splitlines()[0] for cell in cells] == list(panels)
    norms = {(cell.collections[0].norm.vmin, cell.collections[0].norm.vmax) for cell in cells}
    assert norms == {(1.0, max(cell.collections[0].get_array().max() for cell in cells))}
    titles = [cell.title.get_window_extent() for cell in cells]
    others = [*titles, bar.get_tightbbox(), *(cell.bbox for cell in cells)]
    for title in titles:
        assert not any(title.overlaps(other) for other in others if other is not title)
    for cell in cells[3:]:
        labels = [tick.label1.get_window_extent() for tick in cell.xaxis.get_major_ticks() if tick.label1.get_text()]
        assert not any(a.overlaps(b) for a, b in pairwise(labels))


def test_calibration_command_makes_tables_and_pictures(structures, tmp_path):
    write_structures(tmp_path / "labels.extxyz", structures)
    assert len(read_structures(tmp_path / "labels.extxyz")) == 24
    changes = ["model.hidden=[8, 8]", "model.n_radial=2", "training.epochs=2", "training.threads=1"]
    changes += ["uncertainty.projections=8", "uncertainty.members=2", "uncertainty.alpha=0.1"]
    options = [word for change in changes for word in ("--set", change)]
    sizes = ["--training", "10", "--calibrating", "4", "--test", "10", "--splits", "2"]
    arguments = ["calibration", str(tmp_path / "labels.extxyz"), *sizes, *options, "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "250"})
    assert result.exit_code == 0, result.output
    assert "split 1: training of 2 networks" in result.output
    text = (tmp_path / "out" / "calibration.md").read_text()
    assert "2 random splits into 10 training, 4 calibration and 10 test structures" in text
    assert text.count("| ensemble ") == 5  # errors, and two confidences in two ways
    assert "| 0.90   | 0.800" in text  # 4 structures attain no more, counted per structure
    for name in ("calibration_atom.png", "calibration_structure.png", "reliability.png"):
        image = matplotlib.image.imread(tmp_path / "out" / name)
        assert min(image.shape[:2]) > 400
        assert image.shape[1] <= 1300
        assert image[..., :3].std() > 0.03
    result = CliRunner().invoke(app, ["calibration", str(tmp_path / "labels.extxyz"), "--kind", "postrior"])
    assert result.exit_code == 1
    assert "--kind" in result.output + (result.stderr if result.stderr_bytes else "")


def test_the_rest_is_the_test_and_too_few_structures_name_the_options(structures, tmp_path):
    """Without --test, 24 - 18 - 2 = 4 structures; whatever is too large is named with its option."""
    data = tmp_path / "labels.extxyz"
    write_structures(data, structures)
    changes = ["model.hidden=[8, 8]", "model.n_radial=2", "training.epochs=1", "training.threads=1"]
    options = [word for change in changes for word in ("--set", change)]
    base = ["calibration", str(data), "--splits", "1", "--kind", "distance", "-o", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(app, [*base, "--training", "18", "--calibrating", "2"])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "calibration.md").read_text()
    assert "into 18 training, 2 calibration and 4 test structures" in text
    for sizes, message in (
        ([], "24 structures: --training 45 and --calibrating 5 leave none for the test; lower them."),
        (["--training", "10", "--test", "10"], "--training 10 and --calibrating 5 leave 9 for the test, not --test 10"),
    ):
        result = CliRunner().invoke(app, [*base, *sizes])
        assert result.exit_code == 1
        assert message in result.output + (result.stderr if result.stderr_bytes else "")
