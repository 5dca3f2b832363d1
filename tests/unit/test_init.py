"""`ubmd init FILE`: settings that fit a user's own structures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import write
from typer.testing import CliRunner

from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.learning.dynamic.check import check_box
from ubmd.learning.loop.verify import verify
from ubmd.learning.proposal import propose_run
from ubmd.settings import RunSettings, TrainSettings, load_settings
from ubmd.settings.dynamic import DynamicRunSettings


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def init(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["init", *arguments])
    return result.exit_code, result.stdout, result.stderr


def reason(text: str, key: str) -> str:
    """What a settings file says about a key after 'Here:', on one line."""
    comment = re.search(rf"# Here: ((?:[^\n]*\n# )*[^\n]*)\n{key} = ", text)
    assert comment, key
    return comment[1].split("# Here: ")[-1].replace("\n# ", " ")


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8.0)
    atoms.info.clear()
    atoms.set_constraint(FixAtoms(range(4)))
    return atoms


heavy_water = molecule("H2O")
heavy_water.set_masses([16.0, 2.014, 2.014])
SILICON = bulk("Si", cubic=True) * (3, 3, 3)


@pytest.mark.parametrize("form", [["--short"], []], ids=["short", "all"])
@pytest.mark.parametrize(
    ("atoms", "timestep", "shortest", "ensemble", "cutoff"),
    [
        (molecule("CH3CH2OH"), 0.5, 0.97, "no cell that a barostat", "the molecule is about"),
        (heavy_water, 0.5, 0.97, "no cell that a barostat", "the molecule is about"),
        (molecule("CO2"), 1.0, 1.18, "no cell that a barostat", "the molecule is about"),
        (SILICON, 2.0, 2.35, 'For other volumes take "npt"', "below half the shortest perpendicular width .* 8.14 Å"),
        (bulk("Cu") * (2, 2, 2), 2.0, 2.55, 'take "npt"', "above half the shortest perpendicular width .* 2.08 Å"),
        (slab(), 2.0, 2.55, "some atoms are fixed", "above half the shortest"),
    ],
    ids=["ethanol", "heavy water", "carbon dioxide", "silicon", "copper", "slab"],
)
def test_values_fit_the_structure_and_have_reasons(
    form: list[str], atoms: Atoms, timestep: float, shortest: float, ensemble: str, cutoff: str
) -> None:
    write_structures(Path("my own.extxyz"), [atoms])
    code, out, err = init("my own.extxyz", *form)
    assert (code, err) == (0, "")
    assert out == "Wrote settings.toml. Set reference.calculator, then: ubmd check settings.toml\n"
    settings, text = load_settings(Path("settings.toml"), RunSettings), Path("settings.toml").read_text()
    assert (str(settings.run_dir), str(settings.start.file)) == ("my_own_run", "my own.extxyz")
    assert settings.md.timestep == timestep
    distances = atoms.get_all_distances(mic=True) + 9.0 * np.eye(len(atoms))
    assert distances.min() == pytest.approx(shortest, abs=0.01)
    assert settings.start.displacement == pytest.approx(0.05 * distances.min(), abs=0.006)
    assert f"{shortest:.2f} Å" in reason(text, "displacement")
    assert ensemble in reason(text, "ensemble")
    assert re.search(cutoff, reason(text, "cutoff"))
    assert (settings.md.ensemble, settings.start.strain) == ("nvt", 0.0)
    assert settings.loop.threshold == (1.5 if shortest < 1.3 else 1.0)
    verify(settings, Path())  # what `ubmd check` says first


def test_every_form_of_the_command() -> None:
    write("POSCAR", bulk("Cu", cubic=True))
    Path("deep").mkdir()
    assert init("POSCAR", "deep/mine.toml")[1].startswith("Wrote deep/mine.toml.")
    settings = load_settings(Path("deep/mine.toml"), RunSettings)
    assert settings.start.file == Path("../POSCAR")  # relative to the settings file
    assert verify(settings, Path("deep"))[0].get_chemical_formula() == "Cu4"
    assert init("plain.toml")[0] == init("bare")[0] == 0
    assert Path("plain.toml").read_text().replace("plain.toml", "bare") == Path("bare").read_text()
    for arguments, sentence in (
        (["missing.xyz"], "There is no file missing.xyz with structures (a settings file to write ends in .toml)."),
        (["a.toml", "b.toml"], "a.toml is a settings file; give one file to write, or structures and then that file."),
        (["POSCAR", "plain.toml"], "plain.toml already exists; name another file."),
        (
            ["POSCAR", "--train", "--dynamic"],
            "--dynamic and --train are two kinds of settings files; give one of them.",
        ),
        (
            ["plain.toml.txt"],
            "There is no file plain.toml.txt with structures (a settings file to write ends in .toml).",
        ),
    ):
        assert init(*arguments) == (1, "", f"Error: {sentence}\n")


@pytest.mark.parametrize("form", [["--short"], []], ids=["short", "all"])
def test_dynamic_training_of_a_crystal(form: list[str]) -> None:
    write_structures(Path("cu.extxyz"), [bulk("Cu")])
    assert init("cu.extxyz", "--dynamic", *form)[0] == 0
    settings = load_settings(Path("settings.toml"), DynamicRunSettings)
    box = check_box(settings, Path())
    assert settings.crystal is not None
    second, third, fourth = (settings.crystal.cutoffs[k] for k in (2, 3, 4))
    distances = np.sort(box.get_distances(0, range(1, len(box)), mic=True))
    assert np.count_nonzero(distances < fourth) == 12  # the first shell of a face-centred cubic crystal
    assert np.count_nonzero(distances < third) == 18  # and the second
    assert second <= 0.5 * min(1.0 / np.linalg.norm(np.linalg.inv(box.cell[:]), axis=0))
    write_structures(Path("water.extxyz"), [molecule("H2O")])
    assert init("water.extxyz", "other.toml", "--dynamic") == (
        1,
        "",
        "Error: --dynamic is for crystals, but water.extxyz is not periodic; leave out --dynamic.\n",
    )


def labelled(count: int) -> list[Atoms]:
    structures = []
    for seed in range(count):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed)
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        structures.append(atoms)
    return structures


@pytest.mark.parametrize(("count", "share"), [(10, 0.2), (120, 0.159), (300, 0.1)])
def test_training(count: int, share: float) -> None:
    write_structures(Path("cu.extxyz"), labelled(count))
    code, out, err = init("cu.extxyz", "--train", "--short")
    assert (code, out, err) == (0, "Wrote settings.toml. Then: ubmd train settings.toml\n", "")
    settings = load_settings(Path("settings.toml"), TrainSettings)
    assert (str(settings.training_file), str(settings.output_dir)) == ("cu.extxyz", "cu_model")
    assert settings.validation_share == pytest.approx(share, abs=0.0011)
    if count >= 95:  # a fifth is enough
        assert round(settings.validation_share * count) >= 19  # for a confidence of 95 %
    assert init("cu.extxyz", "all.toml", "--train")[0] == 0
    assert load_settings(Path("all.toml"), TrainSettings) == settings


def test_training_without_usable_labels_says_why() -> None:
    write_structures(Path("cu.extxyz"), [bulk("Cu", cubic=True)])
    code, _, err = init("cu.extxyz", "--train")
    assert code == 0
    assert err.startswith("Remark: cu.extxyz, frame 0: ")
    assert "The key 'labels' in the settings names other keys." in err
    assert "0 with energy and forces" in Path("settings.toml").read_text()


def test_a_run_begins_with_the_labels_of_a_file(tmp_path: Path) -> None:
    structures = []
    for seed in range(3):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        structures.append(atoms)
    write_structures(tmp_path / "have.extxyz", structures)
    for form in ([], ["--short"]):
        (tmp_path / "settings.toml").unlink(missing_ok=True)
        code, _, err = init("have.extxyz", *form)
        assert code == 0, err
        settings = load_settings(tmp_path / "settings.toml", RunSettings)
        assert settings.start.labels == Path("have.extxyz")
        assert (settings.start.file, settings.start.count, settings.loop.labels) == (None, 0, 512)
    found = propose_run(structures * 300, Path("have.extxyz"), "have")
    assert found["loop.labels"].value == 900 + 20 * 8
    del structures[1].calc.results["forces"]
    assert "start.labels" not in propose_run(structures, Path("have.extxyz"), "have")
