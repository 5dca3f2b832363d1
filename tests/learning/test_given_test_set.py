"""A test set that the user gives: its labels under any keys, in any format, read before anything is labelled."""

import json
from pathlib import Path

import ase.io
import dpdata
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from system import cluster, make_settings

from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash, labels_of
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, SettingsError
from ubmd.learning.held_out import HeldOut, read_test_set
from ubmd.learning.labels import reference_key
from ubmd.learning.loop.verify import verify
from ubmd.runs.folder import EventLog, RunFolder
from ubmd.settings import RunSettings


def labelled(count: int) -> list[Atoms]:
    found = []
    for seed in range(count):
        atoms = cluster()
        atoms.rattle(0.05, seed=seed)
        atoms.calc = EMT()
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
        found.append(atoms)
    return found


def disguised(structures: list[Atoms]) -> list[Atoms]:
    """Wrong labels under the usual keys, true ones under others."""
    copies = []
    for atoms in structures:
        copy = atoms.copy()
        copy.calc = SinglePointCalculator(copy, energy=0.0, forces=np.zeros((len(atoms), 3)))
        copy.info["REF_energy"] = atoms.get_potential_energy()
        copy.set_array("REF_forces", atoms.get_forces())
        copies.append(copy)
    return copies


def taken(base: Path, labels: dict[str, str] | None = None, **test: object) -> tuple[RunFolder, list[Atoms]]:
    """Run folder, and its test set after `HeldOut.begin`."""
    settings = make_settings(base / "run", test=test, labels=labels or {})
    folder = RunFolder(base / "run")
    folder.path.mkdir(exist_ok=True)
    HeldOut(settings, cluster(), folder, base, None, EventLog(folder.events)).begin()  # type: ignore[arg-type]
    return folder, read_structures(folder.test, labelled=True, compare=False)


def test_a_plain_file_is_copied_as_it_is(tmp_path):
    write_structures(tmp_path / "test.extxyz", labelled(3))
    folder, found = taken(tmp_path, file="test.extxyz")
    assert folder.test.read_bytes() == (tmp_path / "test.extxyz").read_bytes()
    assert dataset_hash(found) == dataset_hash(labelled(3))


def test_labels_may_be_under_other_keys_and_in_other_formats(tmp_path):
    structures = labelled(3)
    write_structures(tmp_path / "test.extxyz", disguised(structures))
    ase.io.write(tmp_path / "test.traj", structures)
    keys = {"energy": "REF_energy", "forces": "REF_forces"}
    for given in ({"file": "test.extxyz", "labels": keys}, {"file": "test.traj"}):
        _, found = taken(tmp_path, **given)
        assert dataset_hash(found) == dataset_hash(structures)


def test_a_file_in_the_way_of_mace(tmp_path):
    """Isolated atoms, without forces, come first; then labels with REF_."""
    structures = labelled(3)
    copies = [Atoms("Cu", info={"config_type": "IsolatedAtom", "REF_energy": -0.5})]
    for atoms in structures:
        copies.append(atoms.copy())
        copies[-1].info["REF_energy"] = atoms.get_potential_energy()
        copies[-1].set_array("REF_forces", atoms.get_forces())
    write_structures(tmp_path / "test.extxyz", copies)
    _, found = taken(tmp_path, file="test.extxyz")
    assert dataset_hash(found) == dataset_hash(structures)


def test_labels_in_other_units(tmp_path):
    """In the run folder they are in eV; a file that `ubmd run` has made is in eV whatever the settings say."""
    structures = labelled(2)
    copies = []
    for atoms in structures:
        copy = atoms.copy()
        forces, energy = atoms.get_forces(), atoms.get_potential_energy()
        copy.calc = SinglePointCalculator(copy, energy=1000.0 * energy, forces=1000.0 * forces)
        copies.append(copy)
    write_structures(tmp_path / "test.extxyz", copies)
    _, found = taken(tmp_path, {"energy": ":meV", "forces": ":meV/Å"}, file="test.extxyz")
    for one, other in zip(found, structures, strict=True):
        assert one.get_potential_energy() == pytest.approx(other.get_potential_energy(), rel=1e-12)
        np.testing.assert_allclose(one.get_forces(), other.get_forces(), rtol=1e-12)
    write_structures(tmp_path / "made.extxyz", structures)
    (tmp_path / "made.extxyz.json").write_text('{"made_by": "ubmd run", "key": "any"}')
    contents = read_test_set(tmp_path / "made.extxyz", {"energy": ":meV", "forces": "F"})
    assert dataset_hash(contents.structures) == dataset_hash(structures)


def test_a_folder_of_deepmd(tmp_path):
    structures = labelled(2)
    data = dpdata.LabeledSystem()
    for atoms in structures:
        data.append(dpdata.LabeledSystem(atoms, fmt="ase/structure"))
    data.to("deepmd/npy", tmp_path / "test", prec=np.float64)
    _, found = taken(tmp_path, file="test")
    for one, other in zip(found, structures, strict=True):
        assert sorted(one.numbers) == sorted(other.numbers)
        assert one.get_potential_energy() == pytest.approx(other.get_potential_energy(), rel=1e-12)


def test_a_virial_is_there_as_stress(tmp_path):
    atoms = cluster()
    atoms.set_cell([12.0, 13.0, 14.0])
    atoms.pbc = True
    atoms.rattle(0.05, seed=1)
    atoms.calc = EMT()
    stress = atoms.get_stress()
    copy = atoms.copy()
    copy.calc = SinglePointCalculator(copy, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    copy.info["virials"] = -stress * atoms.get_volume()
    write_structures(tmp_path / "test.extxyz", [copy])
    _, (found,) = taken(tmp_path, file="test.extxyz")
    np.testing.assert_allclose(labels_of(found)["stress"], stress, rtol=1e-12)


def test_a_bad_test_set_is_told_before_any_label(tmp_path):
    write_structures(tmp_path / "start.extxyz", [cluster()])
    write_structures(tmp_path / "test.extxyz", disguised(labelled(2)))
    settings = make_settings(tmp_path / "run", test={"file": "test.extxyz"})
    with pytest.raises(DataError, match=r"test.extxyz, frame 0: 'energy' is 0 eV, but 'REF_energy' is"):
        verify(settings, tmp_path)
    structures = labelled(2)
    for atoms in structures:
        atoms.info["free_energy"] = atoms.get_potential_energy() - 1.0
    write_structures(tmp_path / "test.extxyz", structures)
    remarks: list[str] = []
    verify(settings, tmp_path, remarks.append)
    assert len(remarks) == 1
    assert "'energy' is read, which differs from 'free_energy' by up to 76.9 meV/atom" in remarks[0]


def test_keys_of_the_start_structures_labels(tmp_path):
    write_structures(tmp_path / "start.extxyz", disguised(labelled(1)))
    with pytest.raises(DataError, match=r"start.extxyz, frame 0: 'energy' is 0 eV, but 'REF_energy' is"):
        verify(make_settings(tmp_path / "run", test=None), tmp_path)
    keys = {"energy": "REF_energy", "forces": "REF_forces"}
    settings = make_settings(tmp_path / "run", test=None, labels=keys)
    assert labels_of(verify(settings, tmp_path)[0])["energy"] == labels_of(labelled(1)[0])["energy"]


def test_a_test_set_of_an_older_version_is_taken_as_it_is(tmp_path):
    """Its frames may carry labels of the start structure in REF_energy; the note beside it says who made it."""
    structures = labelled(2)
    for atoms in structures:
        atoms.info["REF_energy"] = -1.0
    write_structures(tmp_path / "test.extxyz", structures)
    settings = make_settings(tmp_path / "run", test={"file": "test.extxyz"})
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    held_out = HeldOut(settings, cluster(), folder, tmp_path, None, EventLog(folder.events))  # type: ignore[arg-type]
    (tmp_path / "test.extxyz.json").write_text(f'{{"made_by": "ubmd run", "key": "{held_out._key}"}}')
    held_out.begin()
    assert dataset_hash(read_structures(folder.test, compare=False)) == dataset_hash(labelled(2))


def test_the_test_set_of_another_run_is_taken_if_its_labels_are_of_the_same_reference(tmp_path):
    """Only a run that says how its test set is made refuses one that was made in another way."""
    values = make_settings(tmp_path / "run").model_dump(mode="json") | {"test": {"file": "test.extxyz"}}
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    events = EventLog(folder.events)

    def begin(name: str = "test", **changes: object) -> None:
        settings = RunSettings.model_validate(values | {name: values[name] | changes})
        HeldOut(settings, cluster(), folder, tmp_path, None, events).begin()  # type: ignore[arg-type]

    write_structures(tmp_path / "test.extxyz", labelled(3))
    reference = RunSettings.model_validate(values).reference
    note = {"made_by": "ubmd run", "key": "of another one", "reference": reference_key(reference)}
    (tmp_path / "test.extxyz.json").write_text(json.dumps(note))
    begin()
    assert dataset_hash(read_structures(folder.test, labelled=True)) == dataset_hash(labelled(3))
    with pytest.raises(SettingsError, match=r"was made with other reference, sampling or start settings"):
        begin(sampling={"frames": 5})
    with pytest.raises(SettingsError, match=r"was made with other reference, sampling or start settings"):
        begin("reference", force_limit=3.0)
