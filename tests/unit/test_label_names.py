"""Names that labels are known by: a small file in the way of each package, and its line on what was read from where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from pydantic import ValidationError

from ubmd.data.extxyz import write_structures
from ubmd.data.label_keys import FREE_ENERGY, NAMES
from ubmd.data.labels import labels_of
from ubmd.data.structures import Contents, read_contents
from ubmd.errors import DataError
from ubmd.settings import ReferenceSettings, TrainSettings, load_settings

ENERGY, FORCES = -3.25, np.array([[0.5, -0.25, 0.125], [-0.5, 0.25, -0.125]])
STRESS = np.array([0.01, 0.02, 0.03, -0.004, 0.005, -0.006])  # tension positive; xx yy zz yz xz xy
FULL = voigt_6_to_full_3x3_stress(STRESS)
VOLUME = 120.0
LATTICE = 'Lattice="4.0 0.0 0.0 0.0 5.0 0.0 0.0 0.0 6.0"'
VIRIAL = -VOLUME * FULL


def numbers(values: np.ndarray) -> str:
    return " ".join(repr(float(x)) for x in np.ravel(values))


def frame(header: str, forces: str = "forces", lattice: str = LATTICE, word: str = "Properties") -> str:
    rows = [f"Cu {2.5 * k} 0.0 0.0 {numbers(FORCES[k])}" for k in (0, 1)]
    return f"2\n{lattice} {word}=species:S:1:pos:R:3:{forces}:R:3 {header}\n" + "\n".join(rows) + "\n"


def read(folder: Path, *frames: str, labelled: bool = True) -> tuple[Contents, list[str]]:
    """(contents, remarks) of a file of these frames."""
    (folder / "a.xyz").write_text("".join(frames))
    remarks: list[str] = []
    return read_contents(folder / "a.xyz", labelled=labelled, remark=remarks.append), remarks


SCHEMES = {
    "ASE": (
        frame(f'energy=-3.25 stress="{numbers(FULL)}"'),
        "energy from energy (eV), forces from forces (eV/Å), stress from stress (eV/Å^3)",
    ),
    "MACE": (
        frame(f'REF_energy=-3.25 REF_virials="{numbers(VIRIAL)}"', "REF_forces"),
        "energy from REF_energy (eV), forces from REF_forces (eV/Å), stress from REF_virials (eV)",
    ),
    "NequIP": (
        frame(f'total_energy=-3.25 stress="{numbers(FULL)}"'),
        "energy from total_energy (eV), forces from forces (eV/Å), stress from stress (eV/Å^3)",
    ),
    "GPUMD": (
        frame(f'energy = -3.25 virial="{numbers(VIRIAL)}"', "force"),
        "energy from energy (eV), forces from force (eV/Å), stress from virial (eV)",
    ),
    "GPUMD in other letters": (
        frame(f'Energy=-3.25 Stress="{numbers(FULL)}"', "Force", LATTICE.lower(), "properties"),
        "energy from Energy (eV), forces from Force (eV/Å), stress from Stress (eV/Å^3)",
    ),
    "GAP": (
        frame(f'dft_energy=-3.25 dft_virial="{numbers(VIRIAL)}"', "dft_force"),
        "energy from dft_energy (eV), forces from dft_force (eV/Å), stress from dft_virial (eV)",
    ),
    "GAP with a stress": (
        frame(f'dft_energy=-3.25 dft_stress="{numbers(FULL)}"', "dft_forces"),
        "energy from dft_energy (eV), forces from dft_forces (eV/Å), stress from dft_stress (eV/Å^3)",
    ),
    "capitals": (
        frame(f'DFT_Energy=-3.25 DFT_Virials="{numbers(VIRIAL)}"', "DFT_Forces"),
        "energy from DFT_Energy (eV), forces from DFT_Forces (eV/Å), stress from DFT_Virials (eV)",
    ),
    "TotEnergy": (
        frame(f'TotEnergy=-3.25 virial="{numbers(VIRIAL)}"', "Forces"),
        "energy from TotEnergy (eV), forces from Forces (eV/Å), stress from virial (eV)",
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_labels_are_known_by_their_usual_names(tmp_path, scheme):
    text, taken = SCHEMES[scheme]
    contents, remarks = read(tmp_path, text, text)
    assert contents.taken == taken
    assert not remarks
    for atoms in contents.structures:
        labels = labels_of(atoms)
        assert labels["energy"] == ENERGY
        np.testing.assert_array_equal(labels["forces"], FORCES)
        np.testing.assert_allclose(labels["stress"], STRESS, rtol=1e-12)
        assert atoms.pbc.all()
        assert atoms.get_volume() == pytest.approx(VOLUME)
        names = [name.lower() for name in (*atoms.info, *atoms.arrays)]  # a copy would be wrong once the atoms move
        assert not [n for n in names for label in ("energy", "force", "stress", "virial") if label in n]


def test_a_tension_is_positive_whatever_the_package(tmp_path):
    """One compressed crystal, described in words by GPUMD and NequIP: virial positive, stress negative."""
    squeezed = np.eye(3)
    for header in (f'virial="{numbers(squeezed)}"', f'stress="{numbers(-squeezed / VOLUME)}"'):
        contents, _ = read(tmp_path, frame(f"energy=1 {header}"))
        assert (labels_of(contents.structures[0])["stress"][:3] < 0.0).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (frame("energy=-3.25 total_energy=-3.0"), "'energy' is -3.25 eV, but 'total_energy' is -3 eV; say which one"),
        (frame("energy=-3.25 Energy=-3.0"), "'energy' is -3.25 eV, but 'Energy' is -3 eV; say which one"),
        (frame("dft_energy=-3.25"), "energy is under 'dft_energy', but the forces under 'forces': two sources"),
        (frame("REF_energy=-3.25", "dft_forces"), "under 'REF_energy', but the forces under 'dft_forces': two sources"),
        (
            frame(f'energy=1 stress="{numbers(FULL)}" Virial="{numbers(-VIRIAL)}"'),
            r"the stress under 'stress' and 'Virial' differ by up to 0.06 eV/Å\^3 .stress = -virial/volume",
        ),
    ],
)
def test_contradictions_stop(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text)


def test_other_quantities_of_nearly_the_same_name_are_none(tmp_path):
    """The largest force of a relaxation, or a comment, is no label; it stays where it is."""
    text = frame("energy=-3.25 force=0.03 Energy=yes lattice=fcc Properties_of=x")
    contents, remarks = read(tmp_path, text)
    (atoms,) = contents.structures
    assert (atoms.info["force"], atoms.info["Energy"], atoms.info["lattice"]) == (0.03, "yes", "fcc")
    assert contents.taken == "energy from energy (eV), forces from forces (eV/Å)"
    assert not remarks


def test_one_key_in_the_whole_file(tmp_path):
    with pytest.raises(DataError, match="frame 1: the energy is under 'total_energy', but under 'energy' in frame 0"):
        read(tmp_path, frame("energy=1"), frame("total_energy=1"))


def test_some_frames_have_a_stress(tmp_path):
    virial = frame(f'energy=1 virial="{numbers(VIRIAL)}"')
    contents, remarks = read(tmp_path, frame("energy=1"), virial, frame("energy=1"))
    assert ["stress" in labels_of(atoms) for atoms in contents.structures] == [False, True, False]
    assert contents.taken.endswith(", stress from virial (eV) in 1 of 3 frames")
    assert not remarks
    contents, _ = read(tmp_path, frame("energy=1"), virial, frame(f'energy=1 stress="{numbers(FULL)}"'))
    assert contents.taken.endswith(", stress from virial (eV) in 1 and stress (eV/Å^3) in 1 of 3 frames")
    assert read(tmp_path, "1\n\nH 0 0 0\n", labelled=False)[0].taken == "no labels"


@pytest.mark.parametrize("prefix", ["", "REF_", "dft_", "DFT_"])
def test_no_known_name_may_be_a_key_of_a_calculator(prefix):
    """It would be taken away as a label."""
    for name in (FREE_ENERGY, *(name for names in NAMES.values() for name in names)):
        with pytest.raises(ValidationError, match="a key that ubmd uses for something else"):
            ReferenceSettings(calculator="emt", info=(prefix + name,))


# -------------------------------------------------------------------------------------------- isolated atoms


def lone(element: str, header: str) -> str:
    return f'1\nProperties=species:S:1:pos:R:3 config_type=IsolatedAtom {header} pbc="F F F"\n{element} 0 0 0\n'


def test_isolated_atoms_are_set_aside(tmp_path):
    """As in MACE's training files, where they come first, and may lack forces."""
    usual = frame("REF_energy=-3.25", "REF_forces")
    text = [lone("O", "REF_energy=-432.125"), usual, lone("H", "REF_energy=-13.6"), usual]
    contents, remarks = read(tmp_path, *text)
    assert [len(atoms) for atoms in contents.structures] == [2, 2]
    assert contents.numbers == [1, 3]
    assert len(remarks) == 1
    assert "2 frames with config_type=IsolatedAtom are set aside" in remarks[0]
    assert "write atom_energies = {H = -13.6, O = -432.125} below [model]" in remarks[0]


def test_the_line_to_paste_is_a_setting(tmp_path):
    _, remarks = read(tmp_path, lone("H", "energy=-13.6"), frame("energy=1"))
    line = remarks[0].partition("write ")[2].partition(" below")[0]
    (tmp_path / "t.toml").write_text(f'training_file = "a"\noutput_dir = "b"\n[model]\n{line}\n')
    assert load_settings(tmp_path / "t.toml", TrainSettings).model.atom_energies == {"H": -13.6}


def test_isolated_atoms_in_another_unit(tmp_path):
    (tmp_path / "a.xyz").write_text(lone("H", "REF_energy=-0.5") + frame("REF_energy=-3.25", "REF_forces"))
    remarks: list[str] = []
    read_contents(tmp_path / "a.xyz", {"energy": ":Ha"}, labelled=True, remark=remarks.append)
    assert "{H = -13.60569" in remarks[0]


def test_isolated_atoms_that_say_two_things_stop(tmp_path):
    text = lone("H", "energy=-13.6"), frame("energy=1"), lone("H", "energy=-13.5")
    with pytest.raises(DataError, match=r"isolated atom H has the energy -13.6 eV in frame 0, but -13.5 eV in frame 2"):
        read(tmp_path, *text)


def test_frames_keep_their_numbers_behind_isolated_atoms(tmp_path):
    with pytest.raises(DataError, match=r"frame 2: no energy .1 of 2 frames lack it"):
        read(tmp_path, lone("H", "energy=-13.6"), frame("energy=1"), frame(""))


def test_only_marked_single_atoms_are_isolated(tmp_path):
    one = '1\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-1 config_type=dimer pbc="F F F"\nH 0 0 0 0 0 0\n'
    pair = frame("energy=-3.25 config_type=IsolatedAtom")
    contents, remarks = read(tmp_path, one, pair, lone("H", ""))
    assert [len(atoms) for atoms in contents.structures] == [1, 2]
    assert "One isolated atom is set aside: a single atom is no structure to learn from." in remarks[0]
    with pytest.raises(DataError, match="holds nothing but isolated atoms"):
        read(tmp_path, lone("H", "energy=-13.6"))


def test_copies_in_run_folders_are_not_compared(tmp_path):
    """Their keys are ubmd's own: other spellings are what a calculator may have left there."""
    atoms = Atoms("H")
    atoms.info |= {"Energy": 1.0, "config_type": "IsolatedAtom"}
    write_structures(tmp_path / "a.extxyz", [atoms])
    contents = read_contents(tmp_path / "a.extxyz", compare=False)
    assert contents.structures[0].calc is None
    assert contents.structures[0].info["Energy"] == 1.0
