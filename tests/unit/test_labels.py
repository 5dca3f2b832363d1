"""Labels under several keys: one rule, the right numbers, and one sentence where they contradict each other."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.stress import voigt_6_to_full_3x3_stress
from ase.units import GPa

from ubmd.data.extxyz import write_structures
from ubmd.data.labels import labels_of
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, SettingsError
from ubmd.settings import RunSettings, TrainSettings, make_settings

ENERGY, FORCES = -3.25, np.array([[0.5, -0.25, 0.125], [-0.5, 0.25, -0.125]])
STRESS = np.array([0.01, 0.02, 0.03, -0.004, 0.005, -0.006])  # xx yy zz yz xz xy
FULL = voigt_6_to_full_3x3_stress(STRESS)
CELL = np.array([[4.0, 0.1, 0.0], [0.3, 5.0, 0.2], [0.0, -0.4, 6.0]])
VOLUME = float(np.linalg.det(CELL))


def numbers(values: np.ndarray) -> str:
    return " ".join(repr(float(x)) for x in np.ravel(values))


def frame(header: str, forces: dict[str, np.ndarray] | None = None, pbc: str = "T T T") -> str:
    """Text of a frame of two atoms with these items in its header, and these columns of forces."""
    columns = {"forces": FORCES} if forces is None else forces
    properties = "species:S:1:pos:R:3" + "".join(f":{name}:R:3" for name in columns)
    rows = [f"Cu {k}.5 0.0 0.0 " + " ".join(numbers(value[k]) for value in columns.values()) for k in (0, 1)]
    lattice = "" if pbc == "F F F" else f'Lattice="{numbers(CELL)}" '
    return f'2\n{lattice}Properties={properties} {header} pbc="{pbc}"\n' + "\n".join(rows) + "\n"


def read(folder: Path, *frames: str, **options: object) -> tuple[list[Atoms], list[str]]:
    """(structures, remarks) of a file with these frames."""
    (folder / "a.extxyz").write_text("".join(frames))
    remarks: list[str] = []
    mapping = options.pop("mapping", None)
    return read_structures(folder / "a.extxyz", mapping, remark=remarks.append, labelled=True, **options), remarks


BOTH = {"forces": FORCES, "REF_forces": FORCES + 0.01}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            frame("energy=-3.25 REF_energy=-5.25"),
            r"a.extxyz, frame 1: 'energy' is -3.25 eV, but 'REF_energy' is -5.25 eV; say which one to use, e.g. "
            r"--label energy=REF_energy .in settings: labels = {energy = \"REF_energy\"}",
        ),
        (
            frame("energy=-3.25 REF_energy=-3.25", BOTH),
            r"frame 1: the forces under 'forces' and 'REF_forces' differ by up to 0.01 eV/Å; .*forces=REF_forces",
        ),
        (
            frame(f'energy=-3.25 stress="{numbers(FULL)}" virial="{numbers(VOLUME * FULL)}"'),
            r"the stress under 'stress' and 'virial' differ by up to 0.06 eV/Å\^3 .stress = -virial/volume",
        ),
        (
            frame("REF_energy=-3.25"),
            r"frame 1: the energy is under 'REF_energy', but the forces under 'forces': two sources .* --label "
            r"energy=REF_energy --label forces=forces",
        ),
        (
            frame(f'energy=-3.25 REF_virials="{numbers(VOLUME * STRESS)}"'),
            "the energy is under 'energy', but the stress under 'REF_virials': .*--label virial=REF_virials",
        ),
        (frame('energy=-3.25 virials="1 2 3 4"'), "the virial must be 6 .xx yy zz yz xz xy. or 9 numbers .eV."),
        (frame('energy=-3.25 virials="1 2 3 4 5 6 7 8 9"'), "the virial tensor is not symmetric"),
        (frame("qm_energy=-3.25"), "no energy .1 of 2 frames lack it.; .*--label energy=KEY, in settings labels ="),
    ],
)
def test_labels_that_contradict_each_other_are_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, frame("energy=-3.25"), text)


def test_what_a_mapping_names_counts_and_the_keys_of_the_others_are_gone(tmp_path):
    text = frame("energy=-3.25 REF_energy=-5.25", BOTH)
    (atoms,), _ = read(tmp_path, text, mapping={"energy": "REF_energy", "forces": "REF_forces"})
    assert labels_of(atoms)["energy"] == -5.25
    np.testing.assert_array_equal(labels_of(atoms)["forces"], FORCES + 0.01)
    (plain,), _ = read(tmp_path, text, mapping={"energy": "energy", "forces": "forces"})
    np.testing.assert_array_equal(labels_of(plain)["forces"], FORCES)
    for found in (atoms, plain):  # a label of the old place would be wrong as soon as the atoms move
        assert not [key for key in (*found.info, *found.arrays) if "energy" in key or "forces" in key]
    write_structures(tmp_path / "b.extxyz", [atoms])
    assert labels_of(read_structures(tmp_path / "b.extxyz")[0])["energy"] == -5.25


def test_equal_values_with_fewer_digits_are_one_label(tmp_path):
    exact = np.array([[0.123456789, -0.25, 0.125], [-0.5, 0.25, -0.125]])
    columns = {"forces": exact, "REF_forces": np.round(exact, 5)}
    (atoms,), remarks = read(tmp_path, frame("energy=-1234.5678912 REF_energy=-1234.56789", columns))
    assert labels_of(atoms)["energy"] == -1234.5678912
    np.testing.assert_array_equal(labels_of(atoms)["forces"], exact)
    assert not remarks


def test_one_family_for_all_labels_of_a_frame(tmp_path):
    """Energies agree in both families, forces are REF_ alone: all labels come from REF_."""
    text = frame(f'energy=-3.25 REF_energy=-3.25 REF_stress="{numbers(STRESS)}"', {"REF_forces": FORCES})
    (atoms,), _ = read(tmp_path, text)
    np.testing.assert_allclose(labels_of(atoms)["stress"], STRESS)


@pytest.mark.parametrize("key", ["virial", "virials", "REF_virial", "REF_virials"])
@pytest.mark.parametrize("count", [6, 9])
def test_virials_are_stresses(tmp_path, key, count):
    """Oracle: EMT's energy as a function of strain, by central differences; only some frames have a virial."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.set_cell(atoms.cell[:] @ (np.eye(3) + 0.02 * np.random.default_rng(1).normal(size=(3, 3))), scale_atoms=True)
    atoms.calc = EMT()

    def energy(strain: np.ndarray) -> float:
        moved = atoms.copy()
        moved.set_cell(atoms.cell[:] @ (np.eye(3) + strain), scale_atoms=True)
        moved.calc = EMT()
        return moved.get_potential_energy()

    virial = np.zeros((3, 3))
    for i, j in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[i, j] = step[j, i] = 1e-4 if i == j else 0.5e-4
        virial[i, j] = -(energy(step) - energy(-step)) / 2e-4
    copies = [atoms.copy(), atoms.copy()]
    for copy in copies:
        copy.info["E"] = atoms.get_potential_energy()
        copy.set_array("F", atoms.get_forces())
    copies[1].info[key] = virial[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] if count == 6 else virial
    write_structures(tmp_path / "a.extxyz", copies)
    mapping = {"energy": "E", "forces": "F"}
    if (key, count) == ("virial", 6):  # ASE takes this key for 9 numbers alone
        with pytest.raises(DataError, match=r"frame 1: not valid extended XYZ: .* virial, .*9-long"):
            read_structures(tmp_path / "a.extxyz", mapping)
        return
    first, second = read_structures(tmp_path / "a.extxyz", mapping, labelled=True)
    assert "stress" not in labels_of(first)
    np.testing.assert_allclose(labels_of(second)["stress"], atoms.get_stress(), atol=1e-7)
    assert key not in second.info


def test_a_virial_may_have_any_name_but_not_that_of_a_stress(tmp_path):
    text = frame(f'energy=-3.25 W="{numbers(-VOLUME * FULL)}" virial="1 0 0 0 1 0 0 0 1"')
    (atoms,), _ = read(tmp_path, text, mapping={"virial": "W"})
    np.testing.assert_allclose(labels_of(atoms)["stress"], STRESS)
    with pytest.raises(DataError, match=r"'virial' is a virial, not a stress: .*--label virial=virial"):
        read(tmp_path, text, mapping={"stress": "virial"})
    with pytest.raises(DataError, match="a virial needs a cell with a volume that is periodic in some"):
        read(tmp_path, frame('energy=1 W="1 2 3 4 5 6"', pbc="F F F"), mapping={"virial": "W"})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"stress": "DFT_virials"}, "'DFT_virials' is a virial, not a stress: .*--label virial=DFT_virials"),
        ({"virial": "dft_stress"}, "'dft_stress' is a stress, not a virial: .*--label stress=dft_stress"),
        ({"energy": "dft_enrgy"}, "there is no 'dft_enrgy', .* for the energy; did you mean 'dft_energy'"),
    ],
)
def test_names_of_keys_that_say_something_else(tmp_path, mapping, message):
    """Stress and virial have one shape: under the other's name, labels would be wrong by the volume and the sign."""
    text = frame(f'energy=-3.25 dft_energy=-3 DFT_virials="{numbers(FULL)}" dft_stress="{numbers(FULL)}"')
    with pytest.raises(DataError, match=message):
        read(tmp_path, text, mapping=mapping)


def test_a_missing_label_names_keys_that_may_hold_it(tmp_path):
    with pytest.raises(DataError, match=r"holds the energy, perhaps 'qm_energy': --label energy=KEY"):
        read(tmp_path, frame("qm_energy=-3.25 qm_energies=_JSON[1,2] step=3"))
    with pytest.raises(DataError, match=r"holds the forces, perhaps 'qm_force': --label forces=KEY"):
        read(tmp_path, frame("energy=-3.25", {"qm_force": FORCES}))
    with pytest.raises(DataError, match=r"holds the forces: --label forces=KEY"):
        read(tmp_path, frame("energy=-3.25", {}))


def test_a_stress_of_zero_beside_forces_is_remarked(tmp_path):
    """Programs that compute no stress write zeros; an ideal crystal has neither stress nor forces."""
    zero = frame('energy=1 stress="0 0 0 0 0 0 0 0 0"')
    _, remarks = read(tmp_path, zero, zero)
    assert [text for text in remarks if "the stress of 2 frames is exactly zero, but the forces are not" in text]
    _, remarks = read(tmp_path, zero, frame(f'energy=1 stress="{numbers(FULL)}"'), frame("energy=1"))
    assert [text for text in remarks if "the stress of 1 frame is exactly zero, but the forces are not" in text]
    assert not read(tmp_path, frame('energy=1 stress="0 0 0 0 0 0 0 0 0"', {"forces": 0.0 * FORCES}))[1]


CIF = """data_x
_cell_length_a 4.0
_cell_length_b 4.0
_cell_length_c 4.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
O1 O 0.5 0.5 0.5 1.0
"""


@pytest.mark.parametrize(
    ("sites", "told"),
    [("Cu1 Cu 0 0 0 0.5\nAu1 Au 0 0 0 0.5\n", "Cu 0.5 and Au 0.5"), ("Cu1 Cu 0 0 0 0.25\n", "Cu 0.25")],
)
def test_sites_that_are_occupied_in_part_are_refused(tmp_path, sites, told):
    """ASE reads a whole atom there, without a word."""
    path = tmp_path / "disordered.cif"
    path.write_text(CIF + sites)
    with pytest.raises(DataError, match=rf"disordered.cif, frame 0: a site is occupied by {told}, of which ASE makes"):
        read_structures(path)
    path.write_text(CIF + "Cu1 Cu 0 0 0 1.0\n")
    assert str(read_structures(path)[0].symbols) in ("OCu", "CuO")


def test_remarks_name_what_is_not_used(tmp_path):
    _, remarks = read(tmp_path, frame("energy=1"), frame('energy=1 virial="1 0 0 0 1 0 0 0 1"', pbc="F F F"))
    assert len(remarks) == 1
    assert "'virial' of 1 frame is not used: a stress needs a cell with a volume that is periodic" in remarks[0]
    columns = {"forces": FORCES, "virials": FORCES}
    (atoms,), remarks = read(tmp_path, frame("energy=1", columns))
    assert "'virials' of 1 frame is not used: it is given per atom" in remarks[0]
    assert "stress" not in labels_of(atoms)


def test_energy_counts_and_not_free_energy(tmp_path):
    texts = [frame(f"energy=-3.25 free_energy={free}") for free in (-3.25, -3.26)]
    structures, remarks = read(tmp_path, *texts)
    assert [labels_of(atoms)["energy"] for atoms in structures] == [-3.25, -3.25]
    assert len(remarks) == 1
    assert "differs from 'free_energy' by up to 5 meV/atom" in remarks[0]
    assert "--label energy=free_energy" in remarks[0]
    structures, remarks = read(tmp_path, *texts, mapping={"energy": "free_energy"})
    assert [labels_of(atoms)["energy"] for atoms in structures] == [-3.25, -3.26]
    assert not remarks
    structures, remarks = read(tmp_path, *(text.replace(" energy=-3.25", "") for text in texts))
    assert [labels_of(atoms)["energy"] for atoms in structures] == [-3.25, -3.26]
    assert not remarks


@pytest.mark.parametrize(("factor", "unit"), [(1.0, None), (1 / GPa, "GPa"), (10 / GPa, "kbar"), (1e4 / GPa, "bar")])
def test_a_stress_in_another_unit_is_remarked(tmp_path, factor, unit):
    _, remarks = read(tmp_path, frame(f'energy=1 stress="{numbers(factor * FULL)}"'))
    assert len(remarks) == (0 if unit is None else 1)
    if unit is not None:
        assert f"perhaps {unit}, or virials in eV" in remarks[0]


def test_a_stress_beside_named_energies_is_remarked(tmp_path):
    text = frame(f'E=-1 energy=-3.25 stress="{numbers(FULL)}"')
    _, remarks = read(tmp_path, text, mapping={"energy": "E", "forces": "forces"})
    assert "the energy is read from 'E', the stress from 'stress'" in remarks[0]
    _, remarks = read(tmp_path, text, mapping={"energy": "E", "forces": "forces", "stress": "stress"})
    assert not remarks


def test_files_of_run_folders_are_read_as_before(tmp_path):
    """A test set of an older version may carry labels of its start structure under other keys."""
    text = frame('energy=-3.25 REF_energy=-1 free_energy=-2 virial="1 0 0 0 1 0 0 0 1"')
    (atoms,), remarks = read(tmp_path, text, compare=False)
    assert labels_of(atoms)["energy"] == -3.25
    assert "stress" not in labels_of(atoms)
    assert not remarks


def test_label_names_are_checked(tmp_path):
    with pytest.raises(DataError, match=r"there is no label 'enrgy', only energy, .*; the nearest is 'energy'"):
        read(tmp_path, frame("energy=1"), mapping={"enrgy": "E"})
    values = {"training_file": "a", "output_dir": "b", "labels": {"force": "F"}}
    with pytest.raises(SettingsError, match=r"there is no label 'force', .*; the nearest is 'forces'"):
        make_settings(TrainSettings, values)
    reference = {"calculator": "ase.calculators.emt:EMT"}
    values = {"run_dir": "r", "start": {"file": "s"}, "labels": {"force": "F"}, "reference": reference}
    with pytest.raises(SettingsError, match=r"there is no label 'force', .*; the nearest is 'forces'"):
        make_settings(RunSettings, values)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    write_structures(tmp_path / "a.extxyz", [molecule("H2O"), molecule("CH4")])
    content = (tmp_path / "a.extxyz").read_bytes()
    for name in ("b.extxyz", "b.xyz"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert [str(atoms.symbols) for atoms in read_structures(tmp_path / name)] == ["OH2", "CH4"]
    (tmp_path / "c.extxyz").write_text(content.decode(), encoding="utf-16")
    with pytest.raises(DataError, match=r"c.extxyz is text in UTF-16; save it as UTF-8"):
        read_structures(tmp_path / "c.extxyz")
