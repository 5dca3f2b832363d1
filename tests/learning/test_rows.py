"""Benchmarks: every row of every settings file, each kind of row run for real in miniature, and the driver."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tomli_w
from ase import Atoms, units
from ase.io import read
from system import settings_table, write_inputs

from ubmd.data.extxyz import write_structures
from ubmd.learning import RunFolder, run
from ubmd.learning.loop.check import miniature
from ubmd.learning.loop.verify import verify
from ubmd.references import label
from ubmd.settings import ReferenceSettings, RunSettings, load_settings

EXAMPLES = Path(__file__).parents[2] / "lammps_examples"
ALANINE, MIL53 = EXAMPLES / "alanine_dipeptide", EXAMPLES / "mil53"
NAMES = ("paper.toml", "reduced.toml", "faster.toml")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# A network that trains at once.
SMALL = ("model.n_radial=2", "model.hidden=[8, 8]", "uncertainty.projections=8", "training.threads=1")


def load(path: Path) -> ModuleType:
    """A script as a module; what it imports from its own folder, too."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


rows = load(EXAMPLES / "rows.py")
quickff = load(MIL53 / "quickff.py")
has_quickff = quickff.DEBIAN_EXAMPLES.is_dir()
needs_quickff = pytest.mark.skipif(not has_quickff, reason="needs Debian's package lammps-examples")


def settings_of(file: Path, row: str, *changes: str) -> RunSettings:
    return load_settings(file, RunSettings, [*rows.read_rows(file)[row], *changes])


# ------------------------------------------------------------------------------------------ the settings files


FILES = [*(example / name for example in (ALANINE, MIL53) for name in NAMES), EXAMPLES / "mace" / "loop.toml"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_all_rows_are_valid_settings_and_no_two_are_the_same(file: Path) -> None:
    runs = rows.runs_of(file, [], [0, 1], Path("rows_run"), [])
    settings = [run.settings(file) for run in runs]
    assert len({s.model_dump_json(exclude={"run_dir"}) for s in settings}) == len(runs)
    made = rows.tomllib.loads(file.with_name("rows.toml").read_text())["prepare"]
    for path in {s.start.file for s in settings} | {s.test.file for s in settings if s.test and s.test.file}:
        assert (file.parent / path).exists() or str(path) in made


def test_the_paper_settings_are_the_published_ones() -> None:
    """Zaverkin et al., npj Comput. Mater. 10, 83 (2024)."""
    alanine, mil = (load_settings(path / "paper.toml", RunSettings) for path in (ALANINE, MIL53))
    assert (alanine.model.cutoff, mil.model.cutoff) == (5.0, 6.0)
    assert (alanine.loop.labels, mil.loop.labels) == (512, 512)
    assert (alanine.loop.threshold, mil.loop.threshold) == (1.5, 1.0)
    assert (alanine.bias.force, alanine.bias.species, mil.bias.force, mil.bias.stress) == (0.25, {"H": 0.0}, 0.0, 0.5)
    for settings, replicas, displacement in ((alanine, 8, 0.02), (mil, 32, 0.1)):
        assert (settings.md.replicas, settings.start.count, settings.selection.batch) == (replicas,) * 3
        assert (settings.md.steps, settings.md.timestep, settings.md.frames_every) == (20000, 0.5, 200)
        assert (settings.uncertainty.projections, settings.uncertainty.alpha) == (512, 0.05)
        assert (settings.bias.window, settings.bias.every, settings.training.epochs) == (100, 1, 1000)
        assert (settings.start.displacement, settings.loop.warm_start) == (displacement, False)
    assert (mil.start.strain, mil.md.ensemble, mil.md.damping, mil.md.pressure_damping) == (0.05, "npt", 0.1, 1.0)
    warm = settings_of(MIL53 / "paper.toml", "biased_300K")
    assert (warm.md.temperature, warm.start.count, warm.start.displacement, warm.start.strain) == (300.0, 256, 0.0, 0.0)


# ------------------------------------------------------------------------------------------ each kind of row


def run_miniature(settings: RunSettings, base: Path, folder: Path) -> dict[str, object]:
    """Run a row in miniature; the result of its replica."""
    verify(settings, base)
    small = miniature(settings, folder)
    small = small.model_copy(update={"workers": small.workers.model_copy(update={"processes": 1})})
    finished = RunFolder(run(small, base))
    assert len(read(finished.dataset, ":")) == 3
    (replica,) = finished.read_history()[0]["replicas"]
    assert replica["stopped"] == "step limit", replica["reason"]
    return replica


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("paper.toml", "biased"),
        ("reduced.toml", "metadynamics"),
        ("reduced.toml", "ensemble"),
        ("faster.toml", "faster"),
    ],
)
def test_kinds_of_rows_of_alanine_dipeptide(name: str, row: str, tmp_path: Path) -> None:
    settings = settings_of(ALANINE / name, row, *SMALL)
    replica = run_miniature(settings, ALANINE, tmp_path / "run")
    assert (replica["bias_share"] > 0.05) == settings.bias.is_biased == (row != "metadynamics")
    assert replica["temperature"] == 300.0


@needs_quickff
@pytest.mark.parametrize("name", ["quickff:quickff_mil53", "quickff_mil53"])
def test_a_row_of_mil53(name: str, tmp_path: Path) -> None:
    """Also with the name that the force field had as a part of the package; then no module is beside the settings."""
    if ":" in name:
        shutil.copy(quickff.__file__, tmp_path)
    write_structures(tmp_path / "closed_pore.extxyz", [quickff.quickff_mil53().structure()])
    changes = ("start.displacement=0.01", "start.strain=0.01", f"reference.calculator={name}")
    settings = settings_of(MIL53 / "reduced.toml", "biased_600K", *SMALL, *changes)
    replica = run_miniature(settings, tmp_path, tmp_path / "run")
    assert (replica["ensemble"], replica["pressure"], replica["stress"]) == ("npt", 0.0, 0.5)
    origin = RunFolder(tmp_path / "run").read_manifest()["reference"]
    assert list(origin["packages"]) == ["lammps"]
    assert list(origin["files"]) == (["quickff.py"] if ":" in name else [])


# ------------------------------------------------------------------------------------------ the driver

DRIVEN = {
    "prepare": {"start.extxyz": ["make.py", "once"]},
    "rows": {
        "plain": {"title": "plain", "set": ["bias.force=0.0"]},
        "biased": {"title": "biased", "only": {"settings": ["bias.force=0.1"]}},
        "other": {"title": "other", "files": ["large"]},
        "broken": {"title": "broken", "set": ["reference.calculator='ase.calculators.emt:NoSuchThing'"]},
    },
}


def drive(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "rows.py"), "settings.toml", *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_the_driver_runs_rows_and_skips_what_is_finished(tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "unused")
    values = settings_table(tmp_path / "unused") | {"test": {"sampling": {"frames": 2, "stride": 2}}}
    values["loop"]["labels"] = 4
    (tmp_path / "settings.toml").write_text(tomli_w.dumps(values))
    (tmp_path / "rows.toml").write_text(tomli_w.dumps(DRIVEN))
    (tmp_path / "start.extxyz").rename(tmp_path / "kept.extxyz")
    script = "import pathlib, shutil, sys; here = pathlib.Path(__file__).parent\n"
    script += "assert sys.argv[1:] == ['once']; shutil.copy(here / 'kept.extxyz', here / 'start.extxyz')\n"
    (tmp_path / "make.py").write_text(script)
    first = drive(tmp_path, "broken", "plain", "biased", "--seeds", "3", "--at-once", "2")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "broken_seed3: failed, see" in first.stdout
    folder = tmp_path / "rows_run" / "settings"
    strengths = {
        name: load_settings(folder / f"{name}_seed3" / "settings.toml", RunSettings) for name in ("plain", "biased")
    }
    assert {name: s.bias.force for name, s in strengths.items()} == {"plain": 0.0, "biased": 0.1}
    assert {s.seed for s in strengths.values()} == {3}
    before = (folder / "logs" / "plain_seed3.log").read_bytes()
    second = drive(tmp_path, "plain", "biased", "--seeds", "3")
    assert (second.returncode, second.stdout.count("finished before")) == (0, 2)
    assert (folder / "logs" / "plain_seed3.log").read_bytes() == before
    listed = drive(tmp_path, "--list", "--seeds", "3", "4").stdout.split()
    assert [listed.count(word) for word in ("finished", "begun", "to")] == [2, 1, 3]
    unknown = drive(tmp_path, "biasd")
    assert (unknown.returncode, unknown.stderr.count("has no row 'biasd' for settings.toml, only plain")) == (1, 1)


# ------------------------------------------------------------------------------------------ scripts of the examples


@pytest.mark.parametrize("cmap", [True, False])
def test_ff19sb_in_lammps_is_ff19sb_in_openmm(cmap: bool, tmp_path: Path) -> None:
    force_field = load(ALANINE / "ff19sb_lammps.py")
    reference = ReferenceSettings(calculator="openmm", arguments={"pdb": "alanine_dipeptide.pdb", "cmap": cmap})
    for seed in range(2):
        atoms = read(ALANINE / "c7eq.extxyz")
        atoms.rattle(0.08, seed=seed)
        labelled = label(atoms, reference, ALANINE)
        engine = force_field.start(atoms, tmp_path, cmap)
        engine.command("run 0 post no")
        forces = np.array(engine.gather_atoms("f", 1, 3)).reshape(-1, 3) * units.kcal / units.mol
        energy = engine.get_thermo("pe") * units.kcal / units.mol
        engine.close()
        np.testing.assert_allclose(forces, labelled.get_forces(), atol=1e-7)
        assert energy == pytest.approx(labelled.get_potential_energy(), abs=1e-7)


def test_the_test_set_of_alanine_dipeptide(tmp_path: Path) -> None:
    command = [sys.executable, str(ALANINE / "make_test_set.py"), "--folder", str(tmp_path)]
    command += ["--no-cmap", "--frames", "12", "--duration", "0.0006"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    frames, reduced = (read(tmp_path / f"test_1200K_no_cmap{name}.extxyz", ":") for name in ("", "_reduced"))
    assert (len(frames), len(reduced)) == (12, 3)
    assert [frame.positions.tolist() for frame in reduced] == [frame.positions.tolist() for frame in frames[::5]]
    assert "12 frames, 0 of them with a cis amide bond" in done
    reference = ReferenceSettings(calculator="openmm", arguments={"pdb": "alanine_dipeptide.pdb", "cmap": False})
    again = label(frames[3], reference, ALANINE)
    np.testing.assert_allclose(frames[3].get_forces(), again.get_forces(), atol=1e-10)


def test_a_spot_check_compares_and_keeps_labels(tmp_path: Path) -> None:
    spot_check = load(MIL53 / "spot_check.py")
    emt = ReferenceSettings(calculator="ase.calculators.emt:EMT", force_limit=1e3)
    frames = []
    for k, scale in enumerate((1.0, 1.06, 0.97, 1.03)):
        atoms = Atoms("Cu4", [[0, 0, 0], [0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0]], cell=[3.6] * 3, pbc=True)
        atoms.set_cell(atoms.cell[:] * scale, scale_atoms=True)
        atoms.rattle(0.01, seed=k)
        frames.append(label(atoms, emt, tmp_path))
    chosen = spot_check.spread(frames, 3)
    assert chosen == [frames[2], frames[3], frames[1]] or chosen == [frames[2], frames[0], frames[1]]
    kept = tmp_path / "kept.extxyz"
    labels = spot_check.second_labels(chosen[:2], emt, kept)
    labels = spot_check.second_labels(chosen, emt, kept)
    assert len(read(kept, ":")) == 3
    lines = spot_check.table(chosen, labels, "EMT").splitlines()[2:]
    for line, atoms in zip(lines, chosen, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == f"{atoms.get_volume():.0f}"
        assert cells[1] == cells[2]
        assert cells[3] == cells[4] == f"{-atoms.get_stress()[:3].mean() / units.GPa * 1000:.0f}"
        assert float(cells[6]) == 0.0


@needs_quickff
@pytest.mark.slow
def test_the_structures_of_mil53(tmp_path: Path) -> None:
    """About two minutes."""
    command = [sys.executable, str(MIL53 / "make_inputs.py"), "--folder", str(tmp_path)]
    subprocess.run([*command, "--frames", "4", "--per-interval", "1"], env=ENVIRONMENT, check=True)
    assert 790.0 < read(tmp_path / "closed_pore.extxyz").get_volume() < 830.0
    assert len(read(tmp_path / "closed_300K.extxyz", ":")) == 4
    volumes = np.array([atoms.get_volume() for atoms in read(tmp_path / "test_600K.extxyz", ":")])
    assert np.all(np.diff(volumes) > 0)
    np.testing.assert_array_equal((volumes - 780.0) // 35.0, np.arange(22))
