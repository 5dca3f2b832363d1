"""The report of a dynamic run: every section, on a run that is real and small, and on half a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hostile import Victim, write_hostile
from silicon import make_settings, write_inputs

from ubmd.analysis.dynamic_report import make_dynamic_report, newest_structures
from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.learning import RunFolder
from ubmd.learning.dynamic.engine import run
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.potential import anharmonicity, load_potential, order_shares
from ubmd.potentials.force_constants.regression import Posterior
from ubmd.runs.reading import read_rounds

PICTURES = {"learning_curve", "calibration", "trajectories", "signals", "orders", "phonons", "structures"}
SECTIONS = [
    "Result",
    "Errors against reference calculations",
    "Predicted against true error",
    "Structures",
    "Errors along the trajectories",
    "Convergence without further labels",
    "Orders",
    "Phonons and elastic constants",
    "Labels",
    "Rejected labels",
    "Time",
    "Settings that are not defaults",
    "All settings",
    "Provenance",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("report")
    write_inputs(folder, folder / "run")
    return RunFolder(run(make_settings(folder / "run"), folder))


def rows_of(text: str, section: str) -> list[list[str]]:
    """Cells of the first table of a section, without its head."""
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_section_is_there(finished: RunFolder) -> None:
    files = make_dynamic_report(finished.path)
    assert {path.stem for path in files if path.suffix == ".png"} == PICTURES
    assert all(path.exists() for path in files)
    text = (finished.report / "report.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    page = (finished.report / "report.html").read_text()
    assert page.count("data:image/png") == len(PICTURES)


def test_numbers_are_those_of_the_files(finished: RunFolder) -> None:
    make_dynamic_report(finished.path)
    text, last = (finished.report / "report.md").read_text(), finished.read_history()[-1]
    posterior = Posterior.load(finished.path / "posterior.npz")
    orders = rows_of(text, "Orders")
    assert [int(row[0]) for row in orders] == [2, 3]
    assert [int(row[2]) for row in orders] == list(posterior.counts.values())
    assert [float(row[3]) for row in orders] == pytest.approx(list(posterior.gamma.values()), abs=0.06)
    labels = rows_of(text, "Labels")
    dataset = read_structures(finished.dataset)
    assert [int(row[0]) for row in labels] == list(range(last["labels"]))
    assert [row[1] for row in labels] == [atoms.info["rule"] for atoms in dataset[: last["labels"]]]
    assert f"{last['test']['force_rmse']:.5f} eV/Å" in text
    assert last["ended"]["reason"] in text


def test_shares_of_the_orders(finished: RunFolder) -> None:
    """Against the force matrix of the same frames: shares are ratios of rms forces."""
    structures, what = newest_structures(finished, read_rounds(finished))
    assert set(structures) == {"300 K", "900 K"}
    assert "newest trajectories" in what
    potential = load_potential(finished.path)
    shares = {name: order_shares(potential, frames) for name, frames in structures.items()}
    basis = ClusterBasis.load(finished.path / "basis.npz")
    parameters = Posterior.load(finished.path / "posterior.npz").mean
    for name, frames in structures.items():
        matrix = np.concatenate([basis.force_matrix(atoms, basis.supercell(frames[0])) for atoms in frames])
        whole = np.linalg.norm(matrix @ parameters)
        for order in (2, 3):
            one = np.linalg.norm(matrix @ (parameters * (basis.parameter_orders == order)))
            assert shares[name][order] == pytest.approx(one / whole, rel=1e-9)
        # beyond the second order there is the third only
        assert anharmonicity(potential, frames) == pytest.approx(shares[name][3], rel=1e-9)
    assert shares["900 K"][3] > shares["300 K"][3]


def test_half_a_run_and_no_run(finished: RunFolder, tmp_path: Path) -> None:
    """A report can be made at any time: here after the first round, without test errors, signals and pieces."""
    half = RunFolder(tmp_path)
    for name in ("settings.toml", "manifest.json", "dataset.extxyz", "basis.npz", "posterior.npz"):
        (tmp_path / name).write_bytes((finished.path / name).read_bytes())
    entry = finished.read_history()[0] | {"signals": [], "asked": [], "test": None}
    half.history.write_text(json.dumps([entry]))
    files = make_dynamic_report(tmp_path)
    pictures = {path.stem for path in files if path.suffix == ".png"}
    assert pictures == {"learning_curve", "orders", "phonons", "structures"}
    assert "on the labels" in (half.report / "report.md").read_text()
    half.history.unlink()
    assert "No round has finished" in make_dynamic_report(tmp_path)[0].read_text()
    with pytest.raises(DataError, match="no run"):
        make_dynamic_report(tmp_path / "empty")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_stranger_s_model_file_is_not_run(finished: RunFolder, tmp_path: Path) -> None:
    """Also where the files that the report reads are gone: model.pt has the same force constants, but is a program."""
    folder, victim = tmp_path / "run", Victim(tmp_path)
    shutil.copytree(finished.path, folder)
    write_hostile(folder / "model.pt", victim)
    for gone in ("rounds", "basis.npz"):
        make_dynamic_report(folder)
        assert not victim.harmed
        shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    sections = re.findall(r"^## (.*)$", make_dynamic_report(folder)[-2].read_text(), re.MULTILINE)
    assert sections == [name for name in SECTIONS if name not in ("Orders", "Phonons and elastic constants")]
    assert not victim.harmed
