"""Rows of a published table from runs, and what plain trajectories say."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write
from typer.testing import CliRunner

from ubmd import analysis
from ubmd.analysis.compare import compare
from ubmd.analysis.table import collect_rows, read_published, table_markdown
from ubmd.analysis.trajectory import aligned
from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.errors import DataError
from ubmd.measure.autocorrelation import statistical_inefficiency
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import open_run
from ubmd.settings import RunSettings

EXAMPLES = Path(__file__).parents[2] / "lammps_examples"
PHI, PSI = (4, 6, 8, 14), (6, 8, 14, 16)


def make_run(folder: Path, seed: int, factor: float, labels: list[int], **changes) -> Path:
    """A run folder with a history only: errors fall with the labels."""
    folder.mkdir()
    settings = {"run_dir": str(folder), "start": {"file": "x"}, "reference": {"calculator": "x"}, "seed": seed}
    open_run(RunFolder(folder), RunSettings.model_validate(settings | changes), {"start.file": "0" * 64})
    history = []
    for k, count in enumerate(labels):
        test = {"energy_rmse_mev_per_atom": factor * 100 / count, "force_rmse": factor / count}
        entry = {"iteration": k, "labels": count, "md_steps": 1000 * (k + 1), "coverage": 0.1 * (k + 1), "test": test}
        history.append(entry)
    (folder / "history.json").write_text(json.dumps(history))
    return folder


def cells(text: str, name: str) -> list[list[str]]:
    """Cells of the lines of a row: of runs, then the published one."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    first = next(k for k, line in enumerate(lines) if line[0] == name)
    return [lines[first], *(line for line in lines[first + 1 : first + 2] if line[0] == "")]


@pytest.mark.parametrize("words", [("paper", "ours"), ()])
def test_rows_are_means_over_seeds_beside_published_ones(words, tmp_path):
    runs = [make_run(tmp_path / f"biased_{seed}", seed, 1.0 + seed, [8, 16, 24]) for seed in (0, 1)]
    plain = make_run(tmp_path / "plain", 0, 3.0, [8, 15, 24], bias={"force": 0.0})
    published = tmp_path / "published.toml"
    published.write_text(
        "".join(f'{key} = "{word}"\n' for key, word in zip(("label", "label_of_runs"), words, strict=False))
        + 'source = "a book"\n[[row]]\nname = "biased"\nenergy = [3.0, 0.25]\nstress = 7\n[[row]]\nname = "x"\n'
    )
    rows = collect_rows([runs[0], plain, runs[1]], ["biased", "plain"])
    text = table_markdown(rows, read_published(published))
    head = [cell.strip() for cell in text.splitlines()[0].split("|")[1:-1]]
    assert head == ["row", "source", "labels", "coverage", "E, meV/atom", "F, eV/Å", "S, MPa", "MD, ps"]
    # 100/24 and 200/24; coverage and time of the MD before the last model: two iterations, 2000 steps of 0.5 fs
    made, known = cells(text, "biased")
    label, before = (words[0], f"{words[1]}, ") if words else ("published", "")
    assert made[1:6] == [f"{before}2 runs", "24", "0.200 ± 0.000", "6.25 ± 2.95", "0.062 ± 0.029"]
    assert made[6:] == ["-", "1 ± 0"]
    assert known[1:] == [label, "-", "-", "3.00 ± 0.25", "-", "7.0", "-"]
    assert cells(text, "plain")[0][1:5] == [f"{before}1 run", "24", "0.200", "12.50"]
    assert cells(text, "x")[0][1] == label  # a row without runs shows
    assert f"- {label.capitalize()}: a book" in text
    assert "- biased: biased_0, biased_1; seeds 0, 1; begun " in text


def test_rows_at_a_number_of_labels(tmp_path):
    runs = [make_run(tmp_path / f"run_{seed}", seed, 1.0, counts) for seed, counts in enumerate(([8, 16], [8, 15, 23]))]
    (row,) = collect_rows(runs, labels=16)
    assert [values["labels"] for values in row.runs] == [16, 23]
    assert [values["coverage"] for values in row.runs] == pytest.approx([0.1, 0.2])
    assert [values["force"] for values in row.runs] == pytest.approx([1 / 16, 1 / 23])
    assert np.isnan(collect_rows(runs[:1], labels=8)[0].runs[0]["coverage"])
    with pytest.raises(DataError, match="has no model with 20 labels yet; the last one has 16"):
        collect_rows(runs, labels=20)


def test_minutes_end_with_the_training_of_the_model(tmp_path):
    run = make_run(tmp_path / "run", 0, 1.0, [8, 16, 24])
    history = json.loads((run / "history.json").read_text())
    for k, entry in enumerate(history):
        entry["seconds"] = {"train": 60.0 * (k + 1), "export": 6.0, "measure": 6.0, "md": 600.0, "label": 30.0}
    (run / "history.json").write_text(json.dumps(history))
    (at_16,), (at_24,) = (collect_rows([run], labels=labels) for labels in (16, 24))
    assert at_16.runs[0]["minutes"] == pytest.approx(1 + 10.7 + 2 + 0.2)  # the MD after the second model is not in it
    assert at_24.runs[0]["minutes"] == pytest.approx(1 + 2 + 2 * 10.7 + 3 + 0.2)
    assert "wall time, min" in table_markdown([at_16])


def test_runs_that_have_not_come_so_far_are_named_and_left_out(tmp_path):
    runs = [make_run(tmp_path / f"run_seed{seed}", seed, 1.0, [8, 16][: seed + 1]) for seed in (0, 1)]
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["table", *map(str, runs), str(tmp_path / "empty"), "--labels", "16"])
    assert result.exit_code == 0, result.output
    assert cells(result.output, "run_seed1")[0][1:3] == ["1 run", "16"]
    assert "Not counted:" in result.output
    assert "run_seed0 has no model with 16 labels yet; the last one has 8." in result.output
    assert "There is no run in" in result.output


def test_outputs_that_cannot_be_written(tmp_path):
    """One sentence that names the option; a folder that is missing is made."""
    run = make_run(tmp_path / "run", 0, 1.0, [8, 16])
    (tmp_path / "file").write_text("mine")
    for command in (["table", str(run), "--out", "file/x.md"], ["trajectory", "a.xyz", "--spacing", "1", "-o", "file"]):
        command[-1] = str(tmp_path / command[-1])
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert (
            f"Error: --out: {tmp_path / 'file'} cannot be made or written (there is a file in the way)" in result.stderr
        )
    assert (tmp_path / "file").read_text() == "mine"
    assert CliRunner().invoke(app, ["table", str(run), "--out", str(tmp_path / "new" / "x.md")]).exit_code == 0
    assert cells((tmp_path / "new" / "x.md").read_text(), "run")[0][1] == "1 run"


def test_runs_without_their_test_sets_are_compared(tmp_path):
    runs = [make_run(tmp_path / f"run_{k}", k, 1.0, [8, 16]) for k in range(2)]
    _, files = compare(runs, tmp_path / "out")
    (page,) = (path.read_text() for path in files if path.name.endswith(".md"))
    assert "Caution: it is not known whether the test sets are the same: there is no" in page


def test_titles_of_rows_by_the_names_of_folders(tmp_path):
    runs = [make_run(tmp_path / f"biased_no_cmap_seed{seed}", seed, 1.0, [8, 16]) for seed in (0, 1)]
    alone = make_run(tmp_path / "plain_seed0", 0, 1.0, [8, 16], bias={"force": 0.0})
    (tmp_path / "rows.toml").write_text('[rows.biased_no_cmap]\ntitle = "A"\n[rows.plain]\ntitle = "B"\n')
    names = ["table", *map(str, [*runs, alone]), "--rows", str(tmp_path / "rows.toml")]
    result = CliRunner().invoke(app, names)
    assert result.exit_code == 0, result.output
    assert (cells(result.output, "A")[0][1], cells(result.output, "B")[0][1]) == ("2 runs", "1 run")


def test_row_files_stand_for_what_is_no_run(tmp_path):
    for k in range(2):
        (tmp_path / f"row{k}.json").write_text(json.dumps({"name": "metadynamics", "energy": 1.0 + k, "stress": None}))
    (row,) = collect_rows([tmp_path / "row0.json", tmp_path / "row1.json"])
    assert (row.name, row.runs, row.cell("energy")) == (
        "metadynamics",
        [{"energy": 1.0}, {"energy": 2.0}],
        "1.50 ± 0.71",
    )
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(DataError, match="is not a row file"):
        collect_rows([tmp_path / "bad.json"])
    (tmp_path / "bad.toml").write_text('[[row]]\nname = "a"\nenergies = 1.0\n')
    with pytest.raises(DataError, match="unknown column 'energies'"):
        read_published(tmp_path / "bad.toml")
    with pytest.raises(DataError, match="no table of published numbers"):
        read_published(tmp_path / "none.toml")


def test_volumes_of_the_whole_cell_up_to_the_labels(tmp_path):
    run = make_run(tmp_path / "npt", 0, 1.0, [8, 16], md={"ensemble": "npt", "frames_every": 500}, bias={"force": 0.0})
    for iteration in range(2):
        frames = []
        for step in (0, 500, 1000):
            atoms = bulk("Cu", cubic=True)
            atoms.set_cell(atoms.cell[:] * (1 + 1e-5 * (step + 1000 * iteration)), scale_atoms=True)
            atoms.info = {"step": step, "replica": 0, "max_uncertainty": 0.1}
            frames.append(atoms)
        folder = run / "iterations" / f"iter_{iteration:03d}"
        folder.mkdir(parents=True)
        write_structures(folder / "frames_000.extxyz", frames)
    (row,) = collect_rows([run])
    volume = bulk("Cu", cubic=True).get_volume()
    assert row.runs[0]["volume_min"] == pytest.approx(volume)
    assert row.runs[0]["volume_max"] == pytest.approx(volume * 1.01**3)  # of iteration 0, not of what came after


@pytest.mark.parametrize("name", ["alanine_dipeptide", "mil53"])
def test_published_tables_of_the_examples(name, tmp_path):
    table = read_published(EXAMPLES / name / "published.toml")
    assert "npj Comput. Mater. 10, 83 (2024)" in table.source
    assert all({"labels", "energy", "force"} <= set(row) for row in table.rows.values())
    run = make_run(tmp_path / "run", 0, 1.0, [8, 16])
    first = next(iter(table.rows))
    options = ["--published", str(EXAMPLES / name / "published.toml"), "--name", first, "-o", str(tmp_path / "t.md")]
    result = CliRunner().invoke(app, ["table", str(run), *options])
    assert result.exit_code == 0, result.output
    made, known = cells((tmp_path / "t.md").read_text(), first)
    assert made[1:3] == ["ours, 1 run", "16"]
    assert known[1:3] == ["paper", "512"]


# --- plain trajectories -----------------------------------------------------------------------------------------


def test_trajectory_command_needs_nothing_of_ubmd(tmp_path):
    rng = np.random.default_rng(0)
    start = read(EXAMPLES / "alanine_dipeptide" / "c7eq.extxyz")
    frames, shift = [], np.zeros((22, 3))
    for _ in range(250):
        shift = 0.9 * shift + 0.02 * rng.normal(size=(22, 3))
        frames.append(Atoms(start.numbers, start.positions + shift + rng.normal(size=3)))
    write(tmp_path / "md.xyz", frames)
    frames = read(tmp_path / "md.xyz", ":")
    options = ["--spacing", "10", "--torsion", "phi=4,6,8,14", "--torsion", "psi=6,8,14,16", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, ["trajectory", str(tmp_path / "md.xyz"), *options], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    share = analysis.coverage(analysis.torsions(frames, [PHI, PSI]))
    assert f"{share:.3f} from 250 frames" in result.output
    g = statistical_inefficiency(aligned(np.array([atoms.positions for atoms in frames])))
    assert f"{0.01 * np.mean(g):.4g} ps" in result.output
    assert "- ps" in result.output  # max u, which nobody gave
    for name in ("torsions.png", "autocorrelation.png"):
        assert matplotlib.image.imread(tmp_path / name)[..., :3].std() > 0.03
    result = CliRunner().invoke(app, ["trajectory", str(tmp_path / "md.xyz"), "--torsion", "phi=1,2"])
    assert result.exit_code == 1


def test_trajectory_command_fits_slow_waves(tmp_path):
    times = 0.01 * np.arange(300)
    frames = []
    for t in times:
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell[:] * (1 + 0.05 * np.sin(np.pi * t / times[-1])) ** (1 / 3), scale_atoms=True)
        frames.append(atoms)
    write(tmp_path / "cell.extxyz", frames)
    result = CliRunner().invoke(
        app,
        ["trajectory", str(tmp_path / "cell.extxyz"), "--spacing", "10", "-o", str(tmp_path)],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.output
    assert (
        f"amplitude {0.05 * bulk('Cu', cubic=True).get_volume():.1f} Å³, noise 0.0 Å³, explains 100 %" in result.output
    )
    assert (tmp_path / "volume_against_time.png").exists()
