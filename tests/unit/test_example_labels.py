"""The examples' script that makes and checks label sets."""

import importlib.util
import json
import lzma
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

from ubmd.calculator import Calculator
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures

SCRIPT = Path(__file__).parents[2] / "lammps_examples" / "silicon" / "labels.py"
SETTINGS = """
run_dir = "run"
[crystal]
structure = "silicon.extxyz"
cutoffs = {2 = 4.0, 3 = 2.5}
[start]
repeat = [2, 1, 1]
[reference]
calculator = "lammps"
cache = "kept"
arguments = {elements = ["Si"], commands = ["pair_style sw", "pair_coeff * * Si.sw Si"]}
[dynamic]
temperatures = [300.0]
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The script's main function with arguments, in a folder with a small silicon example."""
    specification = importlib.util.spec_from_file_location("example_labels", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "example_labels", module)  # dataclasses look there
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "EQUILIBRATION", 20)
    (tmp_path / "dynamic.toml").write_text(SETTINGS, encoding="utf-8")
    write_structures(tmp_path / "silicon.extxyz", [bulk("Si", "diamond", 5.431, cubic=True)])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["labels.py", str(tmp_path / "dynamic.toml"), *map(str, arguments)])
        try:
            module.main()
        except SystemExit as end:
            return end.code
        return 0

    return call


MAKE = ["--make", "--amplitudes", 0.02, 0.05, "--rattled", 2, "--temperatures", 300, 500, "--test", 2, "--md", 3]
MAKE += ["--spacing", 5]


def test_sets_are_made_checked_and_found_damaged(run, tmp_path, capsys):
    assert run(*MAKE) == 0
    sets = {path.name.split(".extxyz")[0]: read_structures(path) for path in (tmp_path / "labels").glob("*.xz")}
    assert {name: len(s) for name, s in sets.items()} == {
        "rattled_0.02": 2,
        "rattled_0.05": 2,
        "test_300K": 2,
        "test_500K": 2,
        "md": 3,
    }
    ideal = bulk("Si", "diamond", 5.431, cubic=True).repeat((2, 1, 1)).positions
    amplitudes = [np.std([a.positions - ideal for a in sets[f"rattled_{x}"]]) for x in ("0.02", "0.05")]
    np.testing.assert_allclose(amplitudes, [0.02, 0.05], rtol=0.3)
    record = json.loads((tmp_path / "labels" / "provenance.json").read_text(encoding="utf-8"))
    assert record["reference"]["calculator"] == "lammps"
    assert all("--rattled 2" in record["sets"][name]["command"] for name in sets)
    capsys.readouterr()
    assert run("--check") == 0
    assert "largest difference of a force: 0.0e+00 eV/Å" in capsys.readouterr().out

    path = tmp_path / "labels" / "md.extxyz.xz"
    text = lzma.decompress(path.read_bytes()).decode()
    digit = next(k for k in range(text.index("Si ") + 5, len(text)) if text[k] in "123")
    path.write_bytes(lzma.compress((text[:digit] + "4" + text[digit + 1 :]).encode()))
    assert run("--check") == 1
    assert "md: 3 structures, NOT as recorded" in capsys.readouterr().out


def test_a_killed_run_goes_on_without_computing_labels_again(run, tmp_path, capsys):
    assert run(*MAKE) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "labels").glob("*.xz")}
    kept = sorted(path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.extxyz"))
    shutil.rmtree(tmp_path / "labels")
    assert run(*MAKE) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "labels").glob("*.xz")} == first
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.extxyz")) == kept


def test_the_teacher_is_a_model_file_that_fits_the_labels(run, tmp_path):
    assert "make them with --make" in run("--teacher", tmp_path / "teacher.pt")
    assert run(*MAKE) == 0
    assert run("--teacher", tmp_path / "teacher.pt", "--cutoffs", "2=5.0", "3=2.5") == 0
    for atoms in read_structures(tmp_path / "labels" / "rattled_0.02.extxyz.xz"):
        wanted = atoms.get_forces()
        atoms.calc = Calculator(tmp_path / "teacher.pt")
        assert np.sqrt(np.mean((atoms.get_forces() - wanted) ** 2) / np.mean(wanted**2)) < 0.1


def test_further_labels_make_another_potential_for_the_dynamics(run, tmp_path, capsys):
    assert run(*MAKE) == 0
    assert "potential of 4 labels" in capsys.readouterr().out
    assert run(*MAKE, "--md", 2, "--fit-also", tmp_path / "labels" / "test_300K.extxyz.xz") == 0
    assert "potential of 6 labels" in capsys.readouterr().out
    record = json.loads((tmp_path / "labels" / "provenance.json").read_text(encoding="utf-8"))
    assert record["sets"]["md"]["from"].endswith("to the rattled sets and to further labels")


def test_joined_sets_have_each_structure_once_and_none_of_the_tests(run, tmp_path):
    assert run(*MAKE) == 0
    folder, file = tmp_path / "labels", tmp_path / "joined.extxyz"
    sets = {path.name.split(".extxyz")[0]: read_structures(path, labelled=True) for path in folder.glob("*.xz")}
    again = [sets["md"][1], sets["test_300K"][0]]  # one that another set has, one that a test has
    write_structures(tmp_path / "more.extxyz", again)
    (folder / "more.extxyz.xz").write_bytes(lzma.compress((tmp_path / "more.extxyz").read_bytes()))
    assert run("--join", file, "--without", "test_300K", "test_500K") == 0
    joined = read_structures(file, labelled=True)
    wanted = [atoms for name in ("md", "rattled_0.02", "rattled_0.05") for atoms in sets[name]]
    assert len(joined) == len(wanted) == 7
    for atoms, other in zip(joined, wanted, strict=True):
        np.testing.assert_allclose(atoms.positions, other.positions, atol=1e-7)
        np.testing.assert_allclose(atoms.get_forces(), other.get_forces(), atol=1e-7)
        assert atoms.get_potential_energy() == pytest.approx(other.get_potential_energy(), abs=1e-7)
    assert run("--join", file) == 0
    assert len(read_structures(file)) == 11
    assert run("--join", file, "--without", "test_30K").startswith("--without test_30K: there is no such set in")
