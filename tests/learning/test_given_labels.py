"""A run that begins with labels that the user has: taken without a call, but only if the reference agrees with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from command_line import ubmd
from system import cluster, make_settings, without_times

from ubmd.data.duplicates import close_pairs
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import labels_of
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, SettingsError, UbmdError
from ubmd.learning import RunFolder, run
from ubmd.learning.given import check_agreement, compare, given_remarks, set_aside, to_check
from ubmd.learning.loop.check import check
from ubmd.learning.loop.verify import verify
from ubmd.settings import RunSettings

FILE = "have.extxyz"


def labelled(atoms: Atoms, factor: float = 1.0, shifts: dict[str, float] | None = None) -> Atoms:
    """A copy with EMT's labels, its forces times a factor and its energy shifted by a constant per element."""
    copy = atoms.copy()
    copy.calc = EMT()
    results = {"energy": copy.get_potential_energy(), "forces": factor * copy.get_forces()}
    results["energy"] += sum((shifts or {}).get(symbol, 0.0) for symbol in copy.symbols)
    if copy.pbc.all():
        results["stress"] = copy.get_stress()
    copy.calc = SinglePointCalculator(copy, **results)
    return copy


def shaken(count: int, **how: Any) -> list[Atoms]:
    """Labelled copies of the cluster."""
    found = []
    for seed in range(count):
        atoms = cluster()
        atoms.rattle(0.1, seed=seed)
        found.append(labelled(atoms, **how))
    return found


def settings(folder: Path, given: list[Atoms], start: dict[str, Any] | None = None, **tables: Any) -> RunSettings:
    write_structures(folder / FILE, given)
    made = make_settings(folder / "run", test=None, **tables)
    table = {"labels": FILE, **(start or {})}
    return RunSettings.model_validate(made.model_dump(mode="json") | {"start": table})


def test_a_run_begins_with_given_labels(tmp_path: Path) -> None:
    given = shaken(6)
    given[2].info["config_type"] = "md"  # of somebody else's program
    run(settings(tmp_path, given), tmp_path)
    folder = RunFolder(tmp_path / "run")
    dataset = read_structures(folder.dataset, labelled=True)
    assert len(dataset) == 8
    for atoms, original in zip(dataset, given, strict=False):
        np.testing.assert_allclose(atoms.positions, original.positions, atol=1e-8)
        np.testing.assert_allclose(labels_of(atoms)["forces"], labels_of(original)["forces"], atol=1e-8)
        assert atoms.info["given"]
        assert atoms.info["iteration"] == -1
        assert "config_type" not in atoms.info
    assert [bool(atoms.info.get("given")) for atoms in dataset] == [True] * 6 + [False] * 2
    assert {atoms.info["split"] for atoms in dataset[:6]} == {"train", "valid"}
    assert folder.read_history()[0]["labels"] == 6
    assert not list((folder.path / "start").glob("label_*"))  # no copies were labelled
    text = folder.events.read_text()
    assert "the reference agrees with 3 labels that it has made again: forces to" in text
    before = without_times(folder)
    run(settings(tmp_path, given), tmp_path)  # resumes: nothing is done again
    assert without_times(folder) == before
    assert folder.events.read_text().count('"check_labels"') == 2  # started, done


def test_a_run_does_not_go_on_with_labels_that_are_read_in_another_way(tmp_path: Path) -> None:
    trust = {"trust": True}
    run(settings(tmp_path, shaken(4), trust, loop={"labels": 4}), tmp_path)
    before = (tmp_path / "run" / "dataset.extxyz").read_bytes()
    with pytest.raises(SettingsError, match=r"have.extxyz is read in another way than when the run in"):
        run(settings(tmp_path, shaken(4), trust, loop={"labels": 4}, labels={"forces": ":meV/Å"}), tmp_path)
    assert (tmp_path / "run" / "dataset.extxyz").read_bytes() == before


def test_copies_can_be_labelled_beside_them(tmp_path: Path) -> None:
    run(settings(tmp_path, shaken(3), {"count": 2, "displacement": 0.1}, loop={"labels": 5}), tmp_path)
    dataset = read_structures(tmp_path / "run" / "dataset.extxyz", labelled=True)
    assert [bool(atoms.info.get("given")) for atoms in dataset] == [True] * 3 + [False] * 2


def test_more_labels_than_wanted_train_one_model(tmp_path: Path) -> None:
    run(settings(tmp_path, shaken(6), loop={"labels": 4}), tmp_path)
    folder = RunFolder(tmp_path / "run")
    assert [entry["labels"] for entry in folder.read_history()] == [6]
    assert folder.model.exists()


def test_given_labels_are_no_reference_calculations(tmp_path: Path) -> None:
    run(settings(tmp_path, shaken(5), loop={"labels": 50, "label_budget": 5}), tmp_path)  # 3 again, 2 new ones
    dataset = read_structures(tmp_path / "run" / "dataset.extxyz", labelled=True)
    assert len(dataset) == 7


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"factor": 1.01}, r"have.extxyz: the reference's own forces for 3 of its structures differ by up to"),
        ({"factor": units.Bohr / units.Ha}, r"\(a factor of 51.42: perhaps they are in Ha/Bohr\)"),
        ({"factor": units.mol / units.kcal}, r"perhaps they are in kcal/mol/Å"),
        ({"factor": -1.0}, r"\(they have the opposite sign\)"),
        ({"shifts": {"Cu": -2.0}}, r"another zero than the reference's, by .* start.energy_shifts = {Cu = "),
    ],
)
def test_labels_of_something_else_stop_the_run(tmp_path: Path, how: dict[str, Any], words: str) -> None:
    given, loose = shaken(4, **how), {"force_limit": 1e6}
    with pytest.raises(DataError, match=words) as caught:
        run(settings(tmp_path, given, reference=loose), tmp_path)
    folder = RunFolder(tmp_path / "run")
    assert not folder.dataset.exists()
    if "shifts" not in how:
        assert str(caught.value).endswith("start.trust = true begins with them all the same.")
        run(settings(tmp_path, given, {"trust": True}, reference=loose, loop={"labels": 5}), tmp_path)
        assert '"check_labels"' not in folder.events.read_text()
        assert len(read_structures(folder.dataset, labelled=True)) == 5


def test_the_constant_that_is_offered_is_the_right_one(tmp_path: Path) -> None:
    """Compositions of two kinds tell the elements apart; energies of the run are then the reference's."""
    given = [*shaken(3, shifts={"Cu": -2.0, "Au": 0.5})]
    alloy = cluster()
    alloy.symbols[5] = "Au"
    given.append(labelled(alloy, shifts={"Cu": -2.0, "Au": 0.5}))
    assert to_check(given) == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"start.energy_shifts = {Cu = 2, Au = -0.5}"):
        run(settings(tmp_path, given), tmp_path)
    run(settings(tmp_path, given, {"energy_shifts": {"Cu": 2.0, "Au": -0.5}}, loop={"labels": 4}), tmp_path)
    (first, *_) = read_structures(tmp_path / "run" / "dataset.extxyz", labelled=True)
    assert first.get_potential_energy() == pytest.approx(shaken(1)[0].get_potential_energy(), abs=1e-8)


def test_relative_energies_are_compared(tmp_path: Path) -> None:
    given = shaken(3)
    again = [atoms.copy() for atoms in given]
    for k, (atoms, copy) in enumerate(zip(given, again, strict=True)):
        results = labels_of(atoms)
        copy.calc = SinglePointCalculator(copy, energy=results["energy"] + 0.1 * k, forces=results["forces"])
    found = compare(given, again)
    assert found.energy == pytest.approx(0.1 / 13, rel=1e-9)  # the mean of 0, 0.1, 0.2 eV is a constant
    assert found.constant == pytest.approx(0.1 / 13, rel=1e-9)
    with pytest.raises(DataError, match=r"energies for 3 of its structures differ by up to 7.69 meV/atom"):
        check_agreement(given, again, FILE)


@pytest.mark.parametrize(("factor", "words"), [(-1.0, "the sign is the opposite"), (10.0, "differs by up to")])
def test_stresses_are_compared(factor: float, words: str) -> None:
    again = labelled(bulk("Cu", a=3.7, cubic=True))
    given = again.copy()
    given.calc = SinglePointCalculator(given, **labels_of(again) | {"stress": factor * labels_of(again)["stress"]})
    with pytest.raises(DataError, match=words):
        check_agreement([given], [again], FILE)
    check_agreement([again], [again], FILE)


def test_what_looks_wrong_is_told(tmp_path: Path) -> None:
    given = shaken(5)
    given.append(given[1].copy())  # without displacement
    given[-1].calc = SinglePointCalculator(given[-1], **labels_of(given[1]))
    near = given[2].copy()
    near.positions[0, 0] += 0.03  # 0.03/sqrt(13) = 0.0083 Å
    given.append(labelled(near))
    pressed = cluster()
    pressed.positions *= 0.75
    given.append(labelled(pressed))
    made = settings(tmp_path, given)
    remarks = list(given_remarks(given, set_aside(given, made.reference)[1], Path(FILE)))
    assert len(remarks) == 3
    assert remarks[0].startswith("have.extxyz: 1 of 8 labels are beyond the limits for new ones and are left out")
    assert remarks[1] == "have.extxyz: one frame is there more than once (1 and 5)."
    assert remarks[2].startswith("have.extxyz: one frame differs from an earlier one by less than 0.02 Å (2 and 6)")
    heard: list[str] = []
    verify(made, tmp_path, heard.append)
    assert heard == remarks
    run(made.model_copy(update={"loop": made.loop.model_copy(update={"labels": 7})}), tmp_path)
    folder = RunFolder(tmp_path / "run")
    assert len(read_structures(folder.dataset, labelled=True)) == 7
    assert len(read_structures(folder.rejected)) == 1


def test_close_pairs_are_those_of_a_plain_search() -> None:
    rng = np.random.default_rng(3)
    structures = [bulk("Cu", cubic=True) for _ in range(30)]
    for atoms in structures:
        atoms.positions += rng.normal(scale=0.02, size=(4, 3))
        atoms.cell[0, 0] += rng.normal(scale=0.02)
    structures[7].pbc = False
    expected = []
    for i, a in enumerate(structures):
        for j, b in enumerate(structures[:i]):
            if 7 in (i, j):
                continue
            d = np.concatenate([a.positions - b.positions, a.cell[:] - b.cell[:]])
            rms = np.sqrt((d**2).sum() / 7)
            if rms < 0.025:
                expected.append((j, i, rms))
    found = close_pairs(structures, 0.025)
    assert len(found) == len(expected) > 5
    for (i, j, d), (k, m, rms) in zip(found, sorted(expected), strict=True):
        assert (i, j) == (k, m)
        assert d == pytest.approx(rms)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"labels": "no.extxyz"}, "start.labels: there is no file"),
        ({"energy_shifts": {"He": 1.0}}, "start.energy_shifts names He, which have.extxyz does not have"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(tmp_path: Path, start: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        verify(settings(tmp_path, shaken(3), start), tmp_path)


@pytest.mark.parametrize("start", [{"file": "start.extxyz"}, {}], ids=["other start", "among labels"])
def test_labels_of_two_states_are_refused(tmp_path: Path, start: dict[str, str]) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    given = shaken(3)
    given[2].info["charge"] = 1
    made = settings(tmp_path, given, start)
    with pytest.raises(SettingsError, match=r"have.extxyz.* frames? .*charge .*which a model cannot tell apart"):
        verify(made, tmp_path)
    verify(settings(tmp_path, given, start | {"mixed_states": True}), tmp_path)


def test_one_label_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has only one structure"):
        verify(settings(tmp_path, shaken(1)), tmp_path)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({}, "the key 'start.file' is missing"),
        ({"file": "a.extxyz", "count": 1}, "start.count must be at least 2"),
        ({"file": "a.extxyz", "trust": True}, "start.trust is about start.labels, which is not set"),
    ],
)
def test_start_needs_a_file_or_labels(tmp_path: Path, start: dict[str, Any], words: str) -> None:
    values = make_settings(tmp_path / "run").model_dump(mode="json") | {"start": start}
    with pytest.raises(ValueError, match=words):
        RunSettings.model_validate(values)


def test_check_compares_the_labels_too(tmp_path: Path) -> None:
    lines = list(check(settings(tmp_path, shaken(6)), tmp_path))
    assert lines[0] == (
        "Start: 6 structures in have.extxyz (Au2Cu11); 6 labels in have.extxyz, of which 3 are labelled again. Labels "
        "are made by ase.calculators.emt:EMT."
    )
    assert any("Remark: have.extxyz: the reference agrees with 3 labels" in line for line in lines)
    assert any(line == "Reference: 1 structure labelled." for line in lines)
    other = shaken(6, factor=units.mol / units.kcal)
    with pytest.raises(UbmdError, match="perhaps they are in kcal/mol/Å"):
        list(check(settings(tmp_path, other, reference={"force_limit": 1e6}), tmp_path))
    with pytest.raises(UbmdError, match=r"no structure of have.extxyz can be used \(are its units eV and Å\?\)"):
        list(check(settings(tmp_path, other), tmp_path))


def test_the_command_line_tells_in_one_sentence(tmp_path: Path) -> None:
    write_structures(tmp_path / FILE, shaken(4, factor=1.02))
    text = f'run_dir = "run"\n[start]\nlabels = "{FILE}"\n[reference]\ncalculator = "ase.calculators.emt:EMT"\n'
    (tmp_path / "settings.toml").write_text(text)
    done = ubmd("run", "settings.toml", cwd=tmp_path)
    assert done.returncode != 0
    assert "start.trust = true begins with them all the same." in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_run_starts_from_the_model_of_another_one(tmp_path: Path) -> None:
    """From its folder, and labels of another zero of energy: the first training begins with the old model."""
    first = make_settings(tmp_path / "old", test=None)
    write_structures(tmp_path / "start.extxyz", [cluster()])
    run(first, tmp_path)
    made = settings(tmp_path, shaken(6), {"model": "old"}, loop={"labels": 8})
    run(made, tmp_path)
    folder = RunFolder(tmp_path / "run")
    assert (folder.iteration(0) / "initial" / "weights.pt").exists()
    assert "Constants that were added to the energies of the model" in folder.events.read_text()
    log = (folder.iteration(0) / "train" / "log.csv").read_text().splitlines()
    assert len(log) - 1 == made.loop.warm_epochs  # not those of a training from random weights
    before = without_times(folder)
    run(made, tmp_path)
    assert without_times(folder) == before
    (tmp_path / "old" / "model.pt").unlink()  # the run has its own copy
    (folder.iteration(0) / "train" / "weights.pt").unlink()
    run(made, tmp_path)
    assert without_times(folder) == before


def test_a_start_model_needs_warm_starts(tmp_path: Path) -> None:
    values = make_settings(tmp_path / "run", loop={"warm_start": False}).model_dump(mode="json")
    values["start"] |= {"model": "old.pt"}
    with pytest.raises(ValueError, match=r"needs loop.warm_start = true"):
        RunSettings.model_validate(values)
