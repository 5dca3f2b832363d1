"""Labels in the formats of other programs: the numbers of EMT, written with the other program's units and signs."""

from __future__ import annotations

import sys
from pathlib import Path

import dpdata
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from program_outputs import cp2k_output, outcar, vasprun

from ubmd.data.labels import labels_of
from ubmd.data.structures import read_contents, read_structures
from ubmd.errors import DataError
from ubmd.files import file_hash


def crystal(seed: int = 0) -> Atoms:
    """A strained alloy in a general cell, whose stress has six different components."""
    generator = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[2:] = "Au"
    atoms.set_cell(atoms.cell[:] @ (np.eye(3) + generator.uniform(-0.05, 0.05, (3, 3))), scale_atoms=True)
    atoms.rattle(0.1, seed=seed)
    atoms.calc = EMT()
    return atoms


def check_same(found: Atoms, atoms: Atoms, accuracy: float) -> None:
    labels = labels_of(found)
    assert str(found.symbols) == str(atoms.symbols)
    np.testing.assert_allclose(found.positions, atoms.positions, atol=accuracy)
    np.testing.assert_allclose(found.cell[:], atoms.cell[:], atol=accuracy)
    assert labels["energy"] == pytest.approx(atoms.get_potential_energy(), abs=accuracy)
    np.testing.assert_allclose(labels["forces"], atoms.get_forces(), atol=accuracy)
    if atoms.pbc.all():
        np.testing.assert_allclose(labels["stress"], atoms.get_stress(), atol=accuracy)


# ------------------------------------------------------------------------------------------------ deepmd/npy


def system(*structures: Atoms) -> dpdata.LabeledSystem:
    """dpdata's own system of these structures, with its own conversion of the stress."""
    found = dpdata.LabeledSystem()
    for atoms in structures:
        atoms.get_forces()
        if atoms.pbc.all():
            atoms.get_stress()
        found.append(dpdata.LabeledSystem(atoms, fmt="ase/structure"))
    return found


def test_a_deepmd_folder(tmp_path):
    """Three frames in two sets; written by dpdata, which is what DeePMD-kit's users do."""
    crystals = [crystal(seed) for seed in range(3)]
    system(*crystals).to("deepmd/npy", tmp_path / "data", prec=np.float64, set_size=2)
    assert (tmp_path / "data" / "set.001" / "virial.npy").is_file()
    contents = read_contents(tmp_path / "data", labelled=True)
    for found, atoms in zip(contents.structures, crystals, strict=True):
        check_same(found, atoms, 1e-12)
    assert contents.taken == "energy from energy (eV), forces from forces (eV/Å), stress from virial (eV)"


@pytest.mark.parametrize("form", ["deepmd/npy", "deepmd/npy/mixed"])
def test_nested_folders_with_and_without_cells(tmp_path, form):
    cluster = Atoms("Cu3", [[0, 0, 0], [2.5, 0, 0], [0, 2.6, 0.1]], calculator=EMT())
    several = dpdata.MultiSystems()
    several.append(system(crystal(0), crystal(1)))
    several.append(system(cluster))
    several.to(form, tmp_path / "data", prec=np.float64)
    contents = read_contents(tmp_path / "data", labelled=True)
    by_size = {len(atoms): atoms for atoms in contents.structures}
    assert len(contents.structures) == 3
    assert not by_size[3].pbc.any()
    check_same(by_size[3], cluster, 1e-12)
    assert contents.taken.endswith("stress from virial (eV) in 2 of 3 frames")


def test_units_hold_for_folders_too(tmp_path):
    data = system(crystal())
    data.data["energies"] = data.data["energies"] / 27.211386245981
    data.to("deepmd/npy", tmp_path / "data", prec=np.float64)
    (found,) = read_structures(tmp_path / "data", {"energy": ":Ha"}, labelled=True)
    check_same(found, crystal(), 1e-6)


def test_structures_without_labels(tmp_path):
    atoms = crystal()
    dpdata.System(atoms, fmt="ase/structure").to("deepmd/npy", tmp_path / "data", prec=np.float64)
    (found,) = read_structures(tmp_path / "data")
    assert found.calc is None
    np.testing.assert_allclose(found.positions, atoms.positions)
    with pytest.raises(DataError, match=r"data, frame 0: no energy"):
        read_structures(tmp_path / "data", labelled=True)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"is a folder without type.raw; give a file, or a folder of deepmd/npy"):
        read_structures(tmp_path)
    system(crystal()).to("deepmd/npy", tmp_path / "data", prec=np.float64)
    (tmp_path / "data" / "type_map.raw").unlink()
    with pytest.raises(DataError, match=r"'Type_0' is no element: write the elements .* into type_map.raw"):
        read_structures(tmp_path / "data")
    (tmp_path / "data" / "type_map.raw").write_text("Cu\nAu\n")
    np.save(tmp_path / "data" / "set.000" / "force.npy", np.zeros((1, 7)))
    with pytest.raises(DataError, match=r"dpdata cannot read .*data as deepmd/npy: .*reshape"):
        read_structures(tmp_path / "data")
    system(crystal()).to("deepmd/raw", tmp_path / "raw")
    with pytest.raises(DataError, match=r"has no set.\*/coord.npy; deepmd/raw is not read: convert it"):
        read_structures(tmp_path / "raw")


def test_without_dpdata_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    system(crystal()).to("deepmd/npy", tmp_path / "data")
    monkeypatch.setitem(sys.modules, "dpdata", None)
    with pytest.raises(DataError, match=r"Reading .*data \(deepmd/npy\) needs dpdata: pip install 'ubmd\[formats\]'"):
        read_structures(tmp_path / "data")


def test_the_hash_of_a_folder_follows_its_content(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        system(crystal(seed)).to("deepmd/npy", tmp_path / name)
    hashes = [file_hash(tmp_path / name) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


# ------------------------------------------------------------------------------------------------ VASP


@pytest.mark.parametrize(("name", "write"), [("OUTCAR", outcar), ("vasprun.xml", vasprun)])
def test_outputs_of_vasp(tmp_path, name, write):
    """energy(sigma->0) is read, the remark says so; forces and stress are those of the free energy."""
    atoms = crystal()
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)
    (tmp_path / name).write_text(write(atoms, energy, energy - 0.02, forces, stress))
    remarks: list[str] = []
    contents = read_contents(tmp_path / name, labelled=True, remark=remarks.append)
    check_same(contents.structures[0], atoms, 1e-6)
    assert contents.taken.startswith("energy from energy(sigma->0) (eV), forces from forces (eV/Å), stress from stress")
    assert len(remarks) == 1
    assert "'energy' (energy(sigma->0)) is read, which differs from 'free_energy' (free energy TOTEN) by" in remarks[0]
    assert "5 meV/atom" in remarks[0]
    contents = read_contents(tmp_path / name, {"energy": "free_energy"}, labelled=True)
    assert labels_of(contents.structures[0])["energy"] == pytest.approx(energy - 0.02, abs=1e-7)
    assert contents.taken.startswith("energy from free energy TOTEN (eV)")


# ------------------------------------------------------------------------------------------------ CP2K


def test_an_output_of_cp2k(tmp_path):
    atoms = crystal()
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)
    (tmp_path / "cp2k.log").write_text(cp2k_output(atoms, energy, forces, stress))
    contents = read_contents(tmp_path / "cp2k.log", labelled=True)
    check_same(contents.structures[0], atoms, 1e-6)
    assert contents.taken.endswith("stress from virial (eV)")


def test_a_stress_of_cp2k_that_is_not_read_is_remarked(tmp_path):
    atoms = crystal()
    text = cp2k_output(atoms, atoms.get_potential_energy(), atoms.get_forces(), None)
    (tmp_path / "cp2k.log").write_text(text + " STRESS| Analytical stress tensor [bar]\n")
    remarks: list[str] = []
    (found,) = read_structures(tmp_path / "cp2k.log", labelled=True, remark=remarks.append)
    assert "stress" not in labels_of(found)
    assert [text for text in remarks if "the stress of this CP2K output is not read" in text]


def test_an_output_of_cp2k_in_other_units_is_refused(tmp_path):
    atoms = crystal()
    text = cp2k_output(atoms, atoms.get_potential_energy(), atoms.get_forces(), None)
    for old, new in (("energy (a.u.):", "energy [eV]:"), ("ATOMIC FORCES in [a.u.]", "ATOMIC FORCES in [eV/angstrom]")):
        assert old in text
        (tmp_path / "cp2k.log").write_text(text.replace(old, new))
        with pytest.raises(DataError, match=r"cp2k.log: '.*': only energies and forces in atomic units can be read"):
            read_structures(tmp_path / "cp2k.log")
    (tmp_path / "cp2k.log").write_text(text.replace("energy (a.u.):", "energy [a.u.]:"))
    assert labels_of(read_structures(tmp_path / "cp2k.log")[0])["energy"] == pytest.approx(
        atoms.get_potential_energy(), abs=1e-6
    )


def test_a_calculation_that_did_not_converge_is_no_label(tmp_path: Path):
    atoms = crystal()
    text = cp2k_output(atoms, -1.0, atoms.get_forces(), None).replace("SCF run converged", "SCF run NOT converged")
    (tmp_path / "cp2k.log").write_text(text)
    with pytest.raises(DataError, match=r"cp2k.log is an output of CP2K without a converged calculation"):
        read_structures(tmp_path / "cp2k.log")


def test_other_texts_are_still_unknown(tmp_path):
    (tmp_path / "notes.unknown").write_text(str(molecule("H2O")))
    with pytest.raises(DataError, match=r"ASE cannot read .*notes.unknown: its format is not known"):
        read_structures(tmp_path / "notes.unknown")
