"""[labels] and --label: keys, units and signs, and the tables of earlier versions."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from ubmd.cli.labels import label_mapping, label_overrides
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import labels_of
from ubmd.data.structures import read_contents, read_structures
from ubmd.data.units import factor
from ubmd.errors import DataError, SettingsError
from ubmd.learning.loop.verify import verify
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import open_run, read_settings
from ubmd.settings import RunSettings, TrainSettings, make_settings
from ubmd.settings import labels as sources
from ubmd.settings.dynamic import DynamicRunSettings
from ubmd.settings.labels import Source, gather_labels, parse_sources

# CODATA 2022, written down by hand: the elementary charge and the Avogadro constant are exact.
E_CHARGE, AVOGADRO = 1.602176634e-19, 6.02214076e23
EV = {
    "eV": 1.0,
    "meV": 0.001,
    "kcal/mol": 4184.0 / (AVOGADRO * E_CHARGE),
    "kJ/mol": 1000.0 / (AVOGADRO * E_CHARGE),
    "Ha": 27.211386245981,
    "Ry": 13.6056931229905,
}
ANGSTROM = {"Å": 1.0, "nm": 10.0, "Bohr": 0.529177210544}
PASCAL = {"GPa": 1e9, "MPa": 1e6, "kbar": 1e8, "bar": 1e5, "Pa": 1.0}
EV_PER_A3 = 1.602176634e11  # Pa


@pytest.mark.parametrize("label", ["energy", "virial"])
@pytest.mark.parametrize("unit", EV)
def test_energies(label, unit):
    assert factor(parse_sources({label: f"key:{unit}"})[label]) == pytest.approx(EV[unit], rel=1e-7)


@pytest.mark.parametrize(("energy", "length"), itertools.product(EV, ANGSTROM))
def test_forces_and_stresses_of_every_energy_and_length(energy, length):
    found = parse_sources({"forces": f":{energy}/{length}", "stress": f":{energy}/{length}^3"})
    assert factor(found["forces"]) == pytest.approx(EV[energy] / ANGSTROM[length], rel=1e-7)
    assert factor(found["stress"]) == pytest.approx(EV[energy] / ANGSTROM[length] ** 3, rel=1e-7)


@pytest.mark.parametrize("unit", PASCAL)
def test_pressures(unit):
    assert factor(parse_sources({"stress": f":{unit}"})["stress"]) == pytest.approx(PASCAL[unit] / EV_PER_A3, rel=1e-7)
    opposite = factor(parse_sources({"stress": f":-{unit}"})["stress"])
    assert opposite == pytest.approx(-PASCAL[unit] / EV_PER_A3, rel=1e-7)


def test_well_known_numbers():
    """Those that people know by heart, so that a mistake in the tables above shows."""
    known = {("forces", "Ha/Bohr"): 51.4220675, ("stress", "Ha/Bohr^3"): 183.6315, ("energy", "kcal/mol"): 0.0433641}
    known |= {("stress", "GPa"): 0.00624151, ("forces", "Ry/Bohr"): 25.7110337}
    for (label, unit), number in known.items():
        assert factor(parse_sources({label: f":{unit}"})[label]) == pytest.approx(number, rel=1e-6), unit


@pytest.mark.parametrize(
    ("label", "text", "unit"),
    [
        ("energy", "e:Hartree", "Ha"),
        ("energy", "e:rydberg", "Ry"),
        ("forces", "f:hartree/bohr", "Ha/Bohr"),
        ("forces", "f:eV/A", "eV/Å"),
        ("forces", "f:kcal/mol/Angstrom", "kcal/mol/Å"),
        ("forces", "f:eV/\u212b", "eV/Å"),  # the sign for Ångström, which is another character
        ("forces", "f:eV/A\u030a", "eV/Å"),  # the letter and its ring as two characters
        ("stress", "s:eV/A3", "eV/Å^3"),
        ("stress", "s:eV/Å³", "eV/Å^3"),
        ("stress", "s: eV/Ang**3", "eV/Å^3"),
        ("stress", "s:kB", "kbar"),
        ("stress", "s", "eV/Å^3"),
    ],
)
def test_spellings_of_units(label, text, unit):
    assert parse_sources({label: text})[label] == Source(unit, text[0])


def test_every_unit_that_errors_list_exists():
    for label, units in sources._LISTED.items():
        for unit in units:
            assert parse_sources({label: f":{unit}"})[label].unit == unit
            assert factor(Source(unit)) > 0.0


def test_keys_units_and_signs():
    assert parse_sources({"energy": "dft_energy"}) == {"energy": Source("eV", "dft_energy")}
    assert parse_sources({"stress": ":-kbar"}) == {"stress": Source("kbar", None, True)}
    assert parse_sources({"virial": "W:-"}) == {"virial": Source("eV", "W", True)}
    assert parse_sources({"forces": "a:b:eV/nm"}) == {"forces": Source("eV/nm", "a:b")}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"enrgy": "E"}, "there is no label 'enrgy', only energy, forces, stress, virial; the nearest is 'energy'"),
        (
            {"energy": "E:ev"},
            r"labels.energy = 'E:ev': 'ev' is not a unit of an energy .did you mean 'eV'.*eV, meV, kcal",
        ),
        (
            {"stress": ":kbr"},
            r"'kbr' is not a unit of a stress .did you mean 'kbar'\?.; known are eV/Å\^3, GPa, MPa, kbar",
        ),
        ({"energy": ":GPa"}, "'GPa' is not a unit of an energy; known are eV, meV, kcal/mol, kJ/mol, Ha, Ry"),
        ({"forces": "F:Ha"}, "'Ha' is not a unit of forces.*; known are eV/Å, .*Ha/Bohr"),
        ({"energy": "E:"}, "labels.energy = 'E:' must be 'KEY', 'KEY:UNIT', or ':UNIT'"),
        ({"energy": ""}, "labels.energy = '' must be 'KEY'"),
        ({"energy": ":-Ha"}, "an energy has no other sign; remove the minus"),
        ({"virial": "W", "stress": ":kbar"}, "labels.stress = ':kbar' has no effect beside labels.virial = 'W'"),
    ],
)
def test_mistakes_are_one_sentence_everywhere(tmp_path, labels, message):
    with pytest.raises(SettingsError, match=message):
        make_settings(TrainSettings, {"training_file": "a", "output_dir": "b", "labels": labels})
    with pytest.raises(SettingsError, match=message):
        make_settings(RunSettings, {**RUN, "labels": labels})
    write_structures(tmp_path / "a.extxyz", [Atoms("H")])
    with pytest.raises(DataError, match=message):
        read_structures(tmp_path / "a.extxyz", labels)
    if all(labels.values()):
        with pytest.raises(SettingsError, match=f"--label: .*{message}"):
            label_mapping([f"{label}={text}" for label, text in labels.items()])


def test_the_option_is_the_table():
    options = ["energy=dft_energy:Ha", "stress=:-kbar"]
    assert label_mapping(options) == {"energy": "dft_energy:Ha", "stress": ":-kbar"}
    settings = make_settings(RunSettings, dict(RUN), [*label_overrides(options), "labels.forces=:Ha/Bohr"])
    assert settings.labels == {"energy": "dft_energy:Ha", "stress": ":-kbar", "forces": ":Ha/Bohr"}
    with pytest.raises(SettingsError, match=r"--label needs LABEL=KEY\[:UNIT\], e.g. .*; got 'energy'"):
        label_mapping(["energy"])
    with pytest.raises(SettingsError, match="--label names two keys for energy: a and b; give one"):
        label_mapping(["energy=a", "energy=b"])


# ------------------------------------------------------------------------------------------------ in files

CELL = np.diag([4.0, 5.0, 6.0])
ENERGY, FORCES = -3.25, np.array([[0.5, -0.25, 0.125], [-0.5, 0.25, -0.125]])
STRESS = np.array([0.01, 0.02, 0.03, -0.004, 0.005, -0.006])


def frame(energy: float, forces: np.ndarray, stress: np.ndarray, names: tuple[str, str, str]) -> Atoms:
    atoms = Atoms("Cu2", [[0, 0, 0], [2, 0, 0]], cell=CELL, pbc=True)
    atoms.info |= {names[0]: energy, names[2]: stress}
    atoms.set_array(names[1], forces)
    return atoms


@pytest.mark.parametrize("names", [("REF_energy", "REF_forces", "REF_stress"), ("E", "F", "S")])
@pytest.mark.parametrize("sign", ["", "-"])
def test_labels_come_out_in_our_units(tmp_path, names, sign):
    there = frame(ENERGY / EV["Ha"], FORCES / (EV["Ha"] / 0.529177210544), STRESS * EV_PER_A3 / 1e8, names)
    if sign:
        there.info[names[2]] = -there.info[names[2]]
        there.set_array(names[1], -there.arrays[names[1]])
    write_structures(tmp_path / "a.extxyz", [there])
    keys = names if names[0] == "E" else ("", "", "")
    mapping = {"energy": f"{keys[0]}:Ha", "forces": f"{keys[1]}:{sign}Ha/Bohr", "stress": f"{keys[2]}:{sign}kbar"}
    contents = read_contents(tmp_path / "a.extxyz", mapping, labelled=True)
    (atoms,) = contents.structures
    assert labels_of(atoms)["energy"] == pytest.approx(ENERGY, rel=1e-7)
    np.testing.assert_allclose(labels_of(atoms)["forces"], FORCES, rtol=1e-7)
    np.testing.assert_allclose(labels_of(atoms)["stress"], STRESS, rtol=1e-7)
    told = ", opposite sign" if sign else ""
    assert contents.taken == (
        f"energy from {names[0]} (Ha), forces from {names[1]} (Ha/Bohr{told}), stress from {names[2]} (kbar{told})"
    )


def test_a_virial_in_another_unit_and_sign(tmp_path):
    there = frame(ENERGY, FORCES, STRESS * 120.0 / EV["kJ/mol"], ("energy_", "forces_", "W"))
    write_structures(tmp_path / "a.extxyz", [there])
    mapping = {"energy": "energy_", "forces": "forces_", "virial": "W:-kJ/mol"}
    (atoms,) = read_structures(tmp_path / "a.extxyz", mapping)
    np.testing.assert_allclose(labels_of(atoms)["stress"], STRESS, rtol=1e-7)


def test_units_do_not_hide_contradictions(tmp_path):
    """Two families must agree after the conversion, and may not be mixed, as without a unit."""
    there = frame(ENERGY / EV["Ha"], FORCES, STRESS, ("REF_energy", "REF_forces", "REF_stress"))
    there.info["dft_energy"] = ENERGY
    write_structures(tmp_path / "a.extxyz", [there])
    with pytest.raises(DataError, match=r"'REF_energy' is -3.25.* eV, but 'dft_energy' is -88.43"):
        read_structures(tmp_path / "a.extxyz", {"energy": ":Ha"})
    del there.info["dft_energy"], there.info["REF_energy"]
    there.info["dft_energy"] = ENERGY
    write_structures(tmp_path / "a.extxyz", [there])
    with pytest.raises(DataError, match="energy is under 'dft_energy', but the forces under 'REF_forces'"):
        read_structures(tmp_path / "a.extxyz", {"energy": ":Ha"})


def test_a_unit_without_effect_is_remarked(tmp_path):
    there = frame(ENERGY, FORCES, STRESS, ("REF_energy", "REF_forces", "REF_virials"))
    write_structures(tmp_path / "a.extxyz", [there])
    remarks: list[str] = []
    read_structures(tmp_path / "a.extxyz", {"stress": ":kbar"}, remark=remarks.append)
    assert len(remarks) == 1
    assert (
        "the unit kbar of a stress has no effect: the stress is read from 'REF_virials', which is a virial."
        in remarks[0]
    )


# ---------------------------------------------------------------------------------- tables of earlier versions

RUN = {"run_dir": "r", "start": {"file": "s"}, "reference": {"calculator": "ase.calculators.emt:EMT"}}
KEYS = {"energy": "E", "forces": "F"}


@pytest.mark.parametrize("name", ["start", "test"])
def test_an_old_table_is_moved_to_the_top(name):
    values = {**RUN, name: {"file": "s", "labels": dict(KEYS)}}
    settings = make_settings(RunSettings, values)
    assert settings.labels == KEYS
    assert values[name]["labels"] == KEYS  # what was given is not changed
    assert settings.start.labels is None  # a file now


def test_empty_and_equal_tables_are_no_contradiction():
    empty = {**RUN, "start": {"file": "s", "labels": {}}, "test": {"file": "t", "labels": {}}}
    assert make_settings(RunSettings, empty).labels == {}
    both = {**RUN, "labels": KEYS, "start": {"file": "s", "labels": KEYS}, "test": {"file": "t", "labels": KEYS}}
    assert make_settings(RunSettings, both).labels == KEYS
    dynamic = {"run_dir": "r", "start": {"file": "s", "count": 2}, "reference": RUN["reference"]}
    dynamic |= {"dynamic": {}, "test": {"file": "t", "labels": KEYS}}
    assert make_settings(DynamicRunSettings, dynamic).labels == KEYS


def test_tables_that_differ_are_refused():
    values = {**RUN, "start": {"file": "s", "labels": KEYS}, "test": {"file": "t", "labels": {"energy": "X"}}}
    with pytest.raises(SettingsError, match=r"start.labels and test.labels differ: write one table \[labels\]"):
        make_settings(RunSettings, values)
    values = {**RUN, "labels": KEYS, "test": {"file": "t", "labels": {"energy": "X"}}}
    with pytest.raises(SettingsError, match=r"labels and test.labels differ: write one table \[labels\]"):
        make_settings(RunSettings, values)
    assert gather_labels(values, strict=False)["labels"] == KEYS
    settings = make_settings(RunSettings, {**RUN, "start": {"file": "s", "labels": "a.extxyz"}})
    assert (settings.start.labels, settings.labels) == (Path("a.extxyz"), {})  # a file of labels, no table of keys


@pytest.mark.parametrize(
    "old",
    [
        {"start": {}, "test": {}},
        {"start": KEYS, "test": {}},
        {"start": KEYS, "test": {"energy": "X"}},  # earlier versions allowed that
    ],
)
def test_runs_of_earlier_versions_can_be_resumed(tmp_path, old):
    """Their manifests and settings.toml have the tables in their old places."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.dataset.write_text("a label\n")
    settings = make_settings(RunSettings, {**RUN, "run_dir": str(folder.path), "test": {"file": "t"}})
    open_run(folder, settings, {})
    text = folder.manifest.read_text()
    for name, table in old.items():  # as they were written: always, also empty
        text = text.replace(f'"{name}": {{', f'"{name}": {{"labels": {to_json(table)}, ', 1)
    folder.manifest.write_text(text.replace('"labels": {},\n', "", 1))
    toml = folder.settings.read_text().replace("[labels]\n", "")
    for name, table in old.items():
        toml += f"\n[{name}.labels]\n" + "".join(f'{label} = "{key}"\n' for label, key in table.items())
    folder.settings.write_text(toml)
    assert read_settings(folder).labels == (old["start"] or old["test"])
    now = make_settings(
        RunSettings, {**RUN, "run_dir": str(folder.path), "test": {"file": "t"}, "labels": {"energy": "N"}}
    )
    plan, changes = open_run(folder, now, {})
    assert plan.at(0).labels == {"energy": "N"}
    assert set(changes) <= {"labels.energy", "labels.forces"}
    assert read_settings(folder).labels == {"energy": "N"}


def to_json(table: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in table.items()) + "}"


def test_one_table_holds_for_start_and_test(tmp_path: Path):
    """Start structures need no labels: keys that only the test set has must not stop the run."""
    atoms = Atoms("Cu2", [[0, 0, 0], [2.4, 0, 0]])
    write_structures(tmp_path / "s.extxyz", [atoms])
    test = atoms.copy()
    test.info["E"] = 2.0
    test.set_array("F", 0.0 * test.positions)
    write_structures(tmp_path / "t.extxyz", [test])
    values = {**RUN, "run_dir": str(tmp_path / "run"), "start": {"file": "s.extxyz"}, "test": {"file": "t.extxyz"}}
    told: list[str] = []
    verify(
        make_settings(RunSettings, values | {"labels": {"energy": "E:Ha", "forces": "F"}}), tmp_path, print, told.append
    )
    assert told == ["t.extxyz: energy from E (Ha), forces from F (eV/Å)."]
    with pytest.raises(DataError, match=r"t.extxyz, frame 0: there is no 'X', which the mapping names for the energy"):
        verify(make_settings(RunSettings, values | {"labels": {"energy": "X"}}), tmp_path)
