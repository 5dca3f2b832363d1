"""Labels that are kept in a folder and found again."""

import datetime

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes

from ubmd.errors import LabelError, SettingsError
from ubmd.references import label, labels
from ubmd.references.cache import label_hash
from ubmd.settings import ReferenceSettings

CALCULATOR = '''
from pathlib import Path
from ase.calculators.emt import EMT

class Counting(EMT):
    """EMT that leaves a line for each calculation; it fails if the file says so."""
    def __init__(self, record, asap_cutoff=False, potential=""):
        super().__init__(asap_cutoff=asap_cutoff)
        self.record = record
    def calculate(self, *args, **kwargs):
        with open(Path(self.record) / "calls", "a") as file:
            file.write("x\\n")
        if "fail" in (Path(self.record) / "calls").read_text():
            raise RuntimeError("told to fail")
        super().calculate(*args, **kwargs)
'''


@pytest.fixture
def copper(tmp_path, request):
    """A displaced crystal, settings with a cache, and how often the reference has computed."""
    name = f"counting_{abs(hash(request.node.name))}"  # one module per test: Python imports a name once
    (tmp_path / f"{name}.py").write_text(CALCULATOR, encoding="utf-8")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "calls").write_text("", encoding="utf-8")
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=3)

    def settings(**others):
        arguments = {"record": str(tmp_path / "record")} | others.pop("arguments", {})
        return ReferenceSettings(
            **({"calculator": f"{name}:Counting", "cache": "kept", "arguments": arguments} | others)
        )

    def calls():
        return (tmp_path / "record" / "calls").read_text(encoding="utf-8").count("x")

    return atoms, settings, calls


def forget():
    """As in a new process: calculators know their last structure."""
    labels._cache.clear()


def test_a_label_is_computed_once_and_comes_back_to_the_last_bit(copper, tmp_path):
    atoms, settings, calls = copper
    first = label(atoms, settings(), tmp_path)
    assert calls() == 1
    forget()
    again = label(atoms, settings(), tmp_path)
    assert calls() == 1
    assert again.get_potential_energy() == first.get_potential_energy()
    np.testing.assert_array_equal(again.get_forces(), first.get_forces())
    np.testing.assert_array_equal(again.get_stress(), first.get_stress())
    np.testing.assert_array_equal(again.positions, atoms.positions)


def test_nothing_is_kept_without_the_setting(copper, tmp_path):
    atoms, settings, calls = copper
    for expected in (1, 2):
        label(atoms, settings(cache=None), tmp_path)
        assert calls() == expected
        forget()
    assert not list(tmp_path.rglob("*.extxyz"))


def test_whatever_decides_a_label_decides_its_name(copper, tmp_path):
    atoms, settings, _ = copper
    moved, renamed, cell = atoms.copy(), atoms.copy(), atoms.copy()
    moved.positions[0, 0] = np.nextafter(moved.positions[0, 0], 1.0)
    renamed.symbols[0] = "Ag"
    cell.set_cell(cell.cell[:] * 1.01)
    hashes = {label_hash(a, settings(), tmp_path) for a in (atoms, moved, renamed, cell, atoms[::-1])}
    hashes.add(label_hash(atoms, settings(arguments={"asap_cutoff": True}), tmp_path))
    (tmp_path / "potential").write_text("one", encoding="utf-8")
    named = settings(arguments={"potential": "coeff * * potential Cu"})
    hashes.add(label_hash(atoms, named, tmp_path))
    (tmp_path / "potential").write_text("two", encoding="utf-8")
    hashes.add(label_hash(atoms, named, tmp_path))
    assert len(hashes) == 8


def test_limits_noise_and_the_machine_do_not_count(copper, tmp_path):
    atoms, settings, calls = copper
    clean = label(atoms, settings(), tmp_path)
    others = settings(noise=0.01, timeout=5.0, environment={"A": "b"})
    noisy = label(atoms, others, tmp_path)
    assert calls() == 1
    assert 0.0 < np.abs(noisy.get_forces() - clean.get_forces()).max() < 0.1
    np.testing.assert_array_equal(label(atoms, settings(), tmp_path).get_forces(), clean.get_forces())
    with pytest.raises(LabelError, match="above the limit"):
        label(atoms, settings(force_limit=1e-3), tmp_path)
    parallel = settings(arguments={"launcher": "mpiexec -n 4", "threads": 2})
    assert label_hash(atoms, parallel, tmp_path) == label_hash(atoms, settings(), tmp_path)


def test_a_damaged_file_is_made_anew_and_failures_are_not_kept(copper, tmp_path):
    atoms, settings, calls = copper
    first = label(atoms, settings(), tmp_path)
    (path,) = tmp_path.rglob("*.extxyz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    forget()
    assert label(atoms, settings(), tmp_path).get_potential_energy() == first.get_potential_energy()
    assert path.read_bytes() == content
    assert calls() == 2
    other = atoms.copy()
    other.rattle(0.02, seed=5)
    (tmp_path / "record" / "calls").write_text("fail", encoding="utf-8")
    with pytest.raises(LabelError, match="told to fail"):
        label(other, settings(), tmp_path)
    assert len(list(tmp_path.rglob("*.extxyz"))) == 1


def test_a_cache_that_is_a_file_is_refused(copper, tmp_path):
    atoms, settings, _ = copper
    (tmp_path / "kept").write_text("", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"reference\.cache"):
        label(atoms, settings(), tmp_path)


@pytest.mark.parametrize(
    ("forces", "message"),
    [
        (np.zeros(12), r"forces of shape \(12,\) for 4 atoms"),
        (np.ones((3, 4)), r"forces of shape \(3, 4\) for 4 atoms"),
        (np.full((4, 3), np.nan), r"not finite \(forces\)"),
    ],
)
def test_what_is_no_label_is_no_label_with_a_cache_either(copper, tmp_path, monkeypatch, forces, message):
    """Neither the first time nor the second."""

    class Odd(Calculator):
        implemented_properties = ("energy", "forces")

        def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
            super().calculate(atoms, properties, system_changes)
            self.results = {"energy": 0.0, "forces": forces}

    labels._cache.clear()
    monkeypatch.setattr(labels, "make_calculator", lambda *_: Odd())
    settings = ReferenceSettings(calculator="ase.calculators.emt:EMT", cache="kept")
    for _ in range(2):
        with pytest.raises(LabelError, match=message):
            label(copper[0], settings, tmp_path)
    assert not list((tmp_path / "kept").glob("*/*.extxyz"))


def test_dates_in_arguments_have_a_name_too(copper, tmp_path):
    made = [
        ReferenceSettings(calculator="x:Y", arguments={"day": datetime.date(2026, 1, day)}, cache="kept")
        for day in (1, 2)
    ]
    assert label_hash(copper[0], made[0], tmp_path) != label_hash(copper[0], made[1], tmp_path)
