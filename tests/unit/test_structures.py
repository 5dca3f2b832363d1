"""Structures in files: exact round trips, loud failures, and no lost frame after a crash."""

import io

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console
from small_model import with_emt_labels

from ubmd.cli.structure_table import describe
from ubmd.data.extxyz import append_structures, repair_structures, write_structures
from ubmd.data.labels import check_labelled, dataset_hash, labels_of
from ubmd.data.structures import read_structures
from ubmd.errors import DataError


def labelled(atoms: Atoms, seed: int) -> Atoms:
    """A shaken copy with EMT labels (stress for cells)."""
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0, 0.1, (len(atoms), 3))
    return with_emt_labels(atoms)


@pytest.fixture
def molecules() -> list[Atoms]:
    return [labelled(molecule("CH3CH2OH"), seed) for seed in range(4)]


@pytest.fixture
def crystals() -> list[Atoms]:
    cell = bulk("Cu", cubic=True).repeat((1, 1, 2))
    cell.set_cell(np.asarray(cell.cell) + 0.1 * np.random.default_rng(0).normal(size=(3, 3)), scale_atoms=True)
    return [labelled(cell, seed) for seed in range(3)]


def assert_same(left: Atoms, right: Atoms) -> None:
    """Bit for bit, labels included."""
    assert (left.numbers == right.numbers).all()
    assert (left.pbc == right.pbc).all()
    assert left.positions.tobytes() == right.positions.tobytes()
    assert np.asarray(left.cell).tobytes() == np.asarray(right.cell).tobytes()
    first, second = labels_of(left), labels_of(right)
    assert first.keys() == second.keys()
    for key in first:
        assert np.asarray(first[key]).tobytes() == np.asarray(second[key]).tobytes(), key


def test_round_trip_is_exact_here_and_in_ase(tmp_path, molecules, crystals):
    structures = molecules + crystals
    write_structures(tmp_path / "a.extxyz", structures)
    assert not [path for path in tmp_path.iterdir() if path.name != "a.extxyz"], "temporary files are left"
    for reader in (read_structures, lambda path: ase.io.read(path, ":")):
        back = reader(tmp_path / "a.extxyz")
        assert len(back) == len(structures)
        for left, right in zip(structures, back, strict=True):
            assert_same(left, right)
    assert {len(labels_of(atoms)) for atoms in back} == {2, 3}


def test_info_and_arrays_survive(tmp_path, molecules):
    atoms = molecules[0]
    info = {
        "step": 7,
        "uncertainty": 0.1 + 0.2,
        "flag": True,
        "vector": np.array([0.1, 1 / 3]),
        "matrix": np.arange(4.0).reshape(2, 2) / 3,
        "text": "two words",
        "number_text": "12",
        "truth_text": "T",
        "quoted": 'say "hi" \\ [there]',
        "empty": "",
        "nothing": None,
        "nested": {"a": [1, 2], "b": "x"},
    }
    atoms.info.update(info)
    atoms.set_array("atomic_uncertainty", np.linspace(0, 1, len(atoms)) / 3)
    atoms.set_array("id", np.arange(len(atoms)) + 1)
    atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    write_structures(tmp_path / "a.extxyz", [atoms])
    (back,) = read_structures(tmp_path / "a.extxyz")
    assert back.info.keys() == info.keys()
    for key, value in info.items():
        assert np.array_equal(back.info[key], value) if isinstance(value, np.ndarray) else back.info[key] == value, key
        assert isinstance(back.info[key], str) == isinstance(value, str), key
    for name in ("atomic_uncertainty", "id", "momenta"):
        assert (back.arrays[name] == atoms.arrays[name]).all()
    assert "forces" not in back.arrays
    assert "energy" not in back.info


def test_labels_may_be_under_ref_names_or_a_mapping(tmp_path, crystals):
    plain = []
    for atoms in crystals:
        labels = labels_of(atoms)
        copy = atoms.copy()
        copy.info["REF_energy"] = labels["energy"]
        copy.info["REF_stress"] = atoms.get_stress(voigt=False).ravel()
        copy.set_array("REF_forces", labels["forces"])
        copy.info["dft"] = labels["energy"] + 1.0
        plain.append(copy)
    write_structures(tmp_path / "a.extxyz", plain)
    for left, right in zip(crystals, read_structures(tmp_path / "a.extxyz", labelled=True), strict=True):
        assert_same(left, right)
    mapped = read_structures(tmp_path / "a.extxyz", {"energy": "dft"})
    assert labels_of(mapped[1])["energy"] == labels_of(crystals[1])["energy"] + 1.0
    with pytest.raises(DataError, match="frame 0: there is no 'nothing', which the mapping names for the energy"):
        read_structures(tmp_path / "a.extxyz", {"energy": "nothing"})


def test_other_formats_of_ase(tmp_path, molecules):
    ase.io.write(tmp_path / "a.traj", molecules)
    for left, right in zip(molecules, read_structures(tmp_path / "a.traj"), strict=True):
        assert_same(left, right)
    (tmp_path / "a.unknown").write_text("nothing that anybody reads\n")
    with pytest.raises(DataError, match=r"ASE cannot read .*a\.unknown"):
        read_structures(tmp_path / "a.unknown")
    with pytest.raises(DataError, match="There is no file"):
        read_structures(tmp_path / "missing.extxyz")


FRAME = """2
Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 {extra}
H 0.0 0.0 0.0 {force} 0.0 0.0
H 0.0 0.0 0.8 0.0 0.0 0.0
"""


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (FRAME.format(extra="", force="nan"), "frame 1: NaN or infinity in the forces"),
        (FRAME.format(extra="", force="0.0").replace("-1.0", "inf"), "frame 1: NaN or infinity in the energy"),
        (FRAME.format(extra="", force="0.0").replace("energy=-1.0", ""), "frame 1: no energy .1 of 2 frames"),
        ("2\n\nH 0 0 0\nH 0 0 1\n", "frame 1: no energy"),
        (
            FRAME.format(extra="", force="0.0").replace("energy", "REF_energy").replace("forces", "REF_forces"),
            "under 'REF_energy', but under 'energy'",
        ),
        (FRAME.format(extra='stress="1 0 0 0 1 0 0 0 1"', force="0.0"), "frame 1: a stress needs a cell"),
        (FRAME.format(extra='stress="1 0 0 1"', force="0.0"), "frame 1: not valid extended XYZ: .*stress"),
        (FRAME.format(extra='REF_stress="1 0 0 1"', force="0.0"), "frame 1: the stress must be 6 .* or 9 numbers"),
        (
            FRAME.format(extra='pbc="T T T"', force="0.0"),
            "frame 1: periodic along vector a, but that cell vector is zero",
        ),
        (
            FRAME.format(extra='pbc="T T T" Lattice="4 0 0 0 4 0 4 4 0"', force="0.0"),
            "frame 1: the cell is flat",
        ),
        (FRAME.format(extra="", force="").replace(":forces:R:3", ":forces:R:2"), "frame 1: forces must be 2 x 3"),
        (FRAME.format(extra="", force="x"), "frame 1: not valid extended XYZ"),
        (FRAME.format(extra="", force="0.0").replace("H 0.0 0.0 0.8", "H 0.0 nan 0.8"), "position of atom 1"),
        (FRAME.format(extra="", force="0.0").replace("H ", "X "), "atom 0 has no element"),
        ("\n" + FRAME.format(extra="", force="0.0"), "line 5 should be the number of atoms of frame 1"),
        ("2\nenergy=1\nH 0 0 0\n", "the last frame .number 1. is not complete"),
    ],
)
def test_bad_frames_are_refused_by_number(tmp_path, bad, message):
    good = FRAME.format(extra="", force="0.0")
    (tmp_path / "a.extxyz").write_text(good)
    assert len(read_structures(tmp_path / "a.extxyz", labelled=True)) == 1
    (tmp_path / "a.extxyz").write_text(good + bad)
    with pytest.raises(DataError, match=message):
        read_structures(tmp_path / "a.extxyz", labelled=True)


def test_unlabelled_structures_are_fine_unless_labels_are_needed(tmp_path):
    write_structures(tmp_path / "a.extxyz", [molecule("H2O"), molecule("CH4")])
    assert [len(atoms) for atoms in read_structures(tmp_path / "a.extxyz")] == [3, 5]
    with pytest.raises(DataError, match=r"frame 0: no energy \(2 of 2 frames"):
        read_structures(tmp_path / "a.extxyz", labelled=True)
    with pytest.raises(DataError, match="training set, structure 0: no energy"):
        check_labelled([molecule("H2O")], "training set")
    with pytest.raises(DataError, match="The training set is empty"):
        check_labelled([], "training set")


def test_stale_labels_and_label_names_in_info_are_refused(tmp_path, molecules):
    molecules[0].positions += 0.1
    with pytest.raises(DataError, match="out of date: positions changed"):
        write_structures(tmp_path / "a.extxyz", molecules)
    assert not list(tmp_path.iterdir())
    molecules[1].info["energy"] = 1.0
    with pytest.raises(DataError, match="reserved key 'energy'"):
        write_structures(tmp_path / "a.extxyz", molecules[1:])
    molecules[2].info["note"] = "a\nb"
    with pytest.raises(DataError, match="line break"):
        write_structures(tmp_path / "a.extxyz", molecules[2:])


def test_no_finished_frame_is_lost_wherever_a_write_is_cut(tmp_path, molecules):
    """Cut the file at every byte of the last frame: repair keeps all others, and appending works again."""
    path = tmp_path / "a.extxyz"
    append_structures(path, molecules[:2])
    finished = path.stat().st_size
    append_structures(path, molecules[2:3])
    whole = path.read_bytes()
    for length in range(finished, len(whole)):
        path.write_bytes(whole[:length])
        assert repair_structures(path) == length - finished
        assert path.read_bytes() == whole[:finished]
    path.write_bytes(whole[: len(whole) - 5])
    append_structures(path, molecules[2:])
    back = read_structures(path)
    assert len(back) == 4
    for left, right in zip(molecules, back, strict=True):
        assert_same(left, right)
    assert repair_structures(path) == 0
    assert repair_structures(tmp_path / "missing.extxyz") == 0


def test_repair_cuts_zeros_but_refuses_damage_in_the_middle(tmp_path, molecules):
    path = tmp_path / "a.extxyz"
    append_structures(path, molecules)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 100)
    assert repair_structures(path) == 100
    lines = whole.splitlines(keepends=True)
    del lines[5]
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match="line 12 should be the number of atoms"):
        repair_structures(path)
    assert path.read_bytes() == b"".join(lines)


def test_hash_follows_content_and_not_files(tmp_path, crystals):
    write_structures(tmp_path / "a.extxyz", crystals)
    reference = dataset_hash(crystals)
    assert dataset_hash(read_structures(tmp_path / "a.extxyz")) == reference
    assert dataset_hash(crystals[::-1]) != reference
    assert dataset_hash(crystals[:-1]) != reference
    labels = labels_of(crystals[0])
    for change in ({"energy": labels["energy"] + 1e-12}, {"forces": labels["forces"] * (1 + 1e-15)}):
        other = crystals[0].copy()
        other.calc = SinglePointCalculator(other, **{**labels, **change})
        assert dataset_hash([other, *crystals[1:]]) != reference


def test_table_names_counts_and_units(molecules, crystals):
    console = Console(file=io.StringIO(), width=120)
    console.print(describe(molecules + crystals))
    text = console.file.getvalue()
    for expected in ("H 24, C 8, O 4, Cu 24", "3 of 7", "7 of 7", "eV/atom", "eV/Å", "Å^3", "MPa"):
        assert expected in text
    pressures = [-atoms.get_stress()[:3].mean() * 160217.66 for atoms in crystals]
    assert f"{max(pressures):.6g}" in text
