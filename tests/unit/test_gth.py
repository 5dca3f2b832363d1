"""GTH pseudopotentials from CP2K's file for Quantum ESPRESSO."""

import shutil

import numpy as np
import pytest
from ase.build import bulk

from ubmd.errors import SettingsError
from ubmd.references import label
from ubmd.references.espresso import espresso
from ubmd.references.gth import FOLDERS, find_potentials, read_gth
from ubmd.settings import ReferenceSettings

# The layout of CP2K's file with made-up numbers: rows of upper triangles, an empty channel, comments, two valences.
FILE = """\
# comment
Sn GTH-PBE-q4 GTH-PBE
    2    2
     0.60500000    1     6.25
    3
     0.56000000    3     1.11     1.12    -1.13
                                 -1.22     1.23
                                           -1.33
     0.64000000    2     2.11     2.12
                                 -2.22
     0.99000000    1     3.11
#
Sn GTH-PBE-q14
    2    2   10
     0.50000000    0
    0
#
B GTH-PADE-q3 GTH-LDA-q3 GTH-PADE GTH-LDA
    2    1
     0.43392956    2    -5.5     0.75
    2
     0.37384326    1     6.25
     0.36039317    0
"""

needs_programs = pytest.mark.skipif(
    shutil.which("pw.x") is None or not any((folder / "GTH_POTENTIALS").is_file() for folder in FOLDERS),
    reason="quantum-espresso or cp2k-data is not installed",
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "GTH_POTENTIALS"
    path.write_text(FILE, encoding="utf-8")
    return path


def as_pw_reads_it(text):
    """Numbers of a .gth file by list-directed reads, as Fortran does: the words it needs, then on to the next line."""
    lines = iter(text.splitlines())
    next(lines)  # title
    nuclear, valence = (int(word) for word in next(lines).split()[:2])
    code, functional, lmax, local_channel = (int(word) for word in next(lines).split()[:4])
    words = next(lines).split()
    local = [float(word) for word in words[2 : 2 + int(words[1])]]
    radii, matrices = [float(words[0])], []
    next(lines)
    for momentum in range(lmax + 1):
        words = next(lines).split()
        n = int(words[1])
        radii.append(float(words[0]))
        rows = [words[2 : 2 + n]] + [next(lines).split() for _ in range(n - 1)]
        spin_orbit = [next(lines).split() for _ in range(n)] if momentum else []
        assert all(float(word) == 0.0 for row in spin_orbit for word in row)
        assert [len(row) for row in spin_orbit] == [n - k for k in range(len(spin_orbit))]
        matrices.append([[float(word) for word in row] for row in rows])
    assert list(lines) == []
    return nuclear, valence, code, functional, local_channel > lmax, local, radii, matrices


def test_conversion_keeps_every_number(file):
    text = read_gth(file, "Sn", "PBE").text()
    assert as_pw_reads_it(text) == (
        50,
        4,
        10,
        11,
        True,
        [6.25],
        [0.605, 0.56, 0.64, 0.99],
        [[[1.11, 1.12, -1.13], [-1.22, 1.23], [-1.33]], [[2.11, 2.12], [-2.22]], [[3.11]]],
    )


def test_a_channel_without_projectors_is_left_out_and_lda_has_two_names(file):
    text = read_gth(file, "B", "PADE").text()
    assert as_pw_reads_it(text) == (5, 3, 10, 7, True, [-5.5, 0.75], [0.43392956, 0.37384326], [[[6.25]]])
    assert read_gth(file, "B", "LDA").text() == text


def test_the_number_of_valence_electrons_chooses_among_several(file):
    assert read_gth(file, "Sn", "PBE-q4") == read_gth(file, "Sn", "PBE")
    assert read_gth(file, "Sn", "PBE-q14").valence == 14
    assert as_pw_reads_it(read_gth(file, "Sn", "PBE-q14").text())[5:] == ([], [0.5], [])


@pytest.mark.parametrize(
    ("element", "name", "says"),
    [
        ("Sn", "PADE", "no GTH-PADE for Sn"),
        ("Sn", "PBE-q5", "no GTH-PBE-q5 for Sn"),
        ("Se", "PBE", "no GTH-PBE for Se"),
        ("Sn", "OLYP", "'gth:OLYP' of Sn is unknown to pw.x"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(file, element, name, says):
    with pytest.raises(SettingsError, match=says):
        read_gth(file, element, name)


def test_a_damaged_entry_is_named(file):
    file.write_text(FILE[: FILE.index("     0.37384326")], encoding="utf-8")
    with pytest.raises(SettingsError, match=r"GTH-PADE of B in .* is damaged"):
        read_gth(file, "B", "PADE")


def test_the_file_is_looked_for_and_its_package_named(tmp_path, file, monkeypatch):
    assert find_potentials("GTH_POTENTIALS", tmp_path) == file
    with pytest.raises(SettingsError, match=r"gth_file: there is no file .*nowhere"):
        find_potentials("nowhere", tmp_path)
    monkeypatch.setattr("ubmd.references.gth.FOLDERS", (tmp_path / "other", tmp_path))
    assert find_potentials(None, tmp_path / "other") == file
    monkeypatch.setattr("ubmd.references.gth.FOLDERS", (tmp_path / "other",))
    with pytest.raises(SettingsError, match="apt-get install cp2k-data"):
        find_potentials(None, tmp_path)


@needs_programs
def test_espresso_asks_for_a_folder_only_for_files():
    with pytest.raises(SettingsError, match=r"pseudo_dir: name the folder of Si\.UPF"):
        espresso({"Si": "Si.UPF", "B": "gth:PADE"})
    espresso({"B": "gth:PADE"})


def settings(potentials, cutoff, **others):
    data = {"ecutwfc": cutoff, "conv_thr": 1e-9}
    arguments = {"pseudopotentials": potentials, "input_data": data} | others
    return ReferenceSettings(calculator="espresso", arguments=arguments)


@needs_programs
@pytest.mark.slow
def test_silicon_has_its_lattice_constant(tmp_path):
    """LDA with the GTH potential: 5.39 Å within 0.02 (all-electron LDA: 5.41 Å, experiment 5.43 Å)."""
    lengths = np.array([5.30, 5.36, 5.42, 5.48])
    reference = settings({"Si": "gth:PADE"}, 30.0, kpts=[4, 4, 4], koffset=[1, 1, 1])
    energies = [label(bulk("Si", "diamond", a), reference, tmp_path).get_potential_energy() for a in lengths]
    minima = np.roots(np.polyder(np.polyfit(lengths, energies, 3)))
    assert minima[np.argmin(np.abs(minima - 5.4))] == pytest.approx(5.39, abs=0.02)


@needs_programs
@pytest.mark.slow
def test_forces_of_two_potentials_are_derivatives_of_the_energy(tmp_path):
    """Both elements with three channels; pw.x keeps the parameters by number of the element."""
    atoms = bulk("SnSe", "rocksalt", 6.0)
    atoms.positions[1] += [0.11, 0.07, -0.05]
    reference = settings({"Sn": "gth:PBE", "Se": "gth:PBE"}, 40.0)
    forces = label(atoms, reference, tmp_path).get_forces()
    for k in range(2):
        energies = []
        for step in (-0.01, 0.01):
            moved = atoms.copy()
            moved.positions[k, 0] += step
            energies.append(label(moved, reference, tmp_path).get_potential_energy())
        assert forces[k, 0] == pytest.approx((energies[0] - energies[1]) / 0.02, abs=0.01)
