"""What the start file alone can tell is said before anything is labelled, trained or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import silicon
from ase import Atoms
from ase.build import bulk, fcc111
from ase.constraints import FixAtoms
from command_line import ubmd
from rich.console import Console
from system import cluster, make_settings, write_inputs

from ubmd.cli.dynamic_status import status as dynamic_status
from ubmd.cli.loop_status import status
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import LabelError, SettingsError, SimulationError, UbmdError
from ubmd.lammps.trajectory import read_piece
from ubmd.learning import RunFolder, run
from ubmd.learning.dynamic.engine import run as run_dynamic
from ubmd.learning.loop.verify import verify
from ubmd.runs.manifest import open_run
from ubmd.settings import RunSettings
from ubmd.settings.dynamic import DynamicRunSettings

SMALL = {"training": {"epochs": 1, "threads": 1}, "md": {"replicas": 2, "steps": 20}, "test": None}


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=6.0)
    atoms.symbols[-1] = "Au"
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=(True, True, False))


def dynamic_table(folder: Path) -> dict[str, Any]:
    """One segment of 20 steps without a request."""
    return {
        "run_dir": str(folder / "run"),
        "start": {"file": "start.extxyz", "count": 2},
        "reference": {"calculator": "ase.calculators.emt:EMT"},
        "model": {"hidden": [8, 8], "n_radial": 2},
        "training": {"epochs": 2, "threads": 1},
        "uncertainty": {"projections": 8},
        "dynamic": {"steps": 20, "segment": 20, "labels": 3, "trigger": {"maximum": 1e6}},
        "workers": {"processes": 1},
    }


def shown(folder: Path) -> str:
    console = Console(width=1000)
    with console.capture() as capture:
        console.print(status(folder))
    return capture.get()


def test_check_says_which_atoms_are_fixed(tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    atoms = slab()
    atoms.set_constraint(FixAtoms(range(4)))
    write_structures(tmp_path / "start.extxyz", [atoms])
    result = ubmd("check", "settings.toml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Fixed atoms (FixAtoms): 4 of 8. They stay where they are in all MD" in " ".join(result.stdout.split())
    result = ubmd("check", "settings.toml", "--set", "md.ensemble=npt", cwd=tmp_path)
    assert result.returncode == 1
    assert "md.ensemble = 'npt' does not go with fixed atoms" in result.stderr


@pytest.mark.parametrize("atoms", [Atoms("Au"), bulk("Au")], ids=["atom", "cell"])
def test_single_atoms_are_refused(tmp_path: Path, atoms: Atoms) -> None:
    """Their forces are zero, and LAMMPS has no velocities for them."""
    write_structures(tmp_path / "start.extxyz", [atoms])
    with pytest.raises(SettingsError, match=r"start\.extxyz has a single atom, .* repeat its cell"):
        run(make_settings(tmp_path / "run"), tmp_path)
    assert not (tmp_path / "run").exists()


def test_overlapping_atoms_are_refused(tmp_path: Path) -> None:
    """No replica would get beyond its first frame."""
    atoms = cluster()
    atoms.positions[1] = atoms.positions[0] + [0.3, 0.0, 0.0]
    write_structures(tmp_path / "start.extxyz", [atoms])
    with pytest.raises(
        SettingsError, match=r"start\.extxyz: Atoms 0 \(Au\) and 1 \(Au\) are too close: 0\.300 Å, limit"
    ):
        run(make_settings(tmp_path / "run"), tmp_path)
    verify(make_settings(tmp_path / "run", reference={"min_distance": 0.1}), tmp_path)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"model": {"elements": ["Cu"]}}, r"holds Au; add it to model\.elements"),
        ({"variables": {"torsions": {"phi": [0, 1, 2, 13]}}}, r"variables\.torsions\.phi"),
        ({"md": {"colvars": "nowhere"}}, r"md\.colvars: there is no file"),
        ({"start": {"file": "nowhere.extxyz"}}, r"start\.file: there is no file"),
    ],
)
def test_python_refuses_what_the_command_line_refuses(tmp_path: Path, tables: dict, words: str) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    with pytest.raises(SettingsError, match=words):
        run(make_settings(tmp_path / "run", **tables), tmp_path)
    assert not (tmp_path / "run").exists()


def test_slabs_move_in_dynamic_runs_and_their_fixed_atoms_do_not(tmp_path: Path) -> None:
    atoms = slab()
    atoms.set_constraint(FixAtoms(range(4)))
    write_structures(tmp_path / "start.extxyz", [atoms])
    folder = RunFolder(run_dynamic(DynamicRunSettings.model_validate(dynamic_table(tmp_path)), tmp_path))
    results = [result for entry in folder.read_history() for result in entry["replicas"]]
    assert {result["ended"] for result in results} == {"segment"}
    state, piece = read_piece(next(folder.path.rglob("piece*.npz")))
    assert state.pbc.tolist() == [True, True, False]
    frames = [*piece.frames, state.positions]
    moved = np.array([np.abs(positions - frames[0]).max(axis=1) for positions in frames[1:]]).max(axis=0)
    assert moved[:4].max() < 1e-12
    assert moved[4:].min() > 1e-4
    np.testing.assert_allclose(state.positions[:4], atoms.positions[:4], atol=1e-12)
    assert not state.velocities[:4].any()


def test_crystals_of_dynamic_runs_must_be_periodic(tmp_path: Path) -> None:
    crystal = bulk("Si", a=5.431, cubic=True)
    crystal.pbc = (True, True, False)
    write_structures(tmp_path / "silicon.extxyz", [crystal])
    with pytest.raises(UbmdError, match="periodic in three directions"):
        run_dynamic(silicon.make_settings(tmp_path / "run"), tmp_path)
    assert not RunFolder(tmp_path / "run").has_labels()


def test_flat_molecules_run_to_their_labels(tmp_path: Path) -> None:
    """A ring in a coordinate plane, a chain along an axis: box size << cutoff for LAMMPS's bins."""
    angles = np.pi * np.arange(6) / 3.0
    ring = Atoms("Cu6", np.stack([0.0 * angles, 2.5 * np.cos(angles), 2.5 * np.sin(angles)], axis=1))
    write_structures(tmp_path / "start.extxyz", [ring])
    settings = make_settings(tmp_path / "run", **SMALL, bias={"species": {}}, loop={"labels": 6, "warm_epochs": 1})
    folder = RunFolder(run(settings, tmp_path))
    assert len(read_structures(folder.dataset, labelled=True)) == 6
    assert {result["stopped"] for result in folder.read_history()[0]["replicas"]} == {"step limit"}


def test_flat_boxes_move_in_dynamic_runs(tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [Atoms("Cu3", [[0.0, 0.0, 2.4 * k] for k in range(3)])])
    folder = RunFolder(run_dynamic(DynamicRunSettings.model_validate(dynamic_table(tmp_path)), tmp_path))
    ended = [result["ended"] for entry in folder.read_history() for result in entry["replicas"]]
    assert set(ended) == {"segment"}
    assert folder.read_history()[-1]["ended"]["rule"] == "steps"


# ------------------------------------------------------------------------------------------ what status advises


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"kind": "SettingsError"}, "it would stop there again: change what the message names first"),
        ({"kind": "DataError"}, "it would stop there again"),
        ({"kind": "TrainingError"}, "it would stop there again"),
        ({"kind": "SimulationError"}, "once the cause is fixed, 'ubmd run' with the same settings resumes it"),
        ({"kind": "LabelError"}, "(why); 'ubmd run' with the same settings resumes it"),
        ({"kind": "StorageError"}, "(why); 'ubmd run' with the same settings resumes it"),
        ({"kind": "KeyboardInterrupt"}, "(why); 'ubmd run' with the same settings resumes it"),
        ({}, "(why); 'ubmd run' with the same settings resumes it"),  # of an older version
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_status_does_not_advise_what_can_only_fail_again(
    tmp_path: Path, event: dict[str, str], words: str, dynamic: bool
) -> None:
    folder = RunFolder(tmp_path)
    open_run(folder, (silicon.make_settings if dynamic else make_settings)(tmp_path), {})
    folder.events.write_text(json.dumps({"event": "run_stopped", "why": "why."} | event) + "\n")
    console = Console(width=1000)
    with console.capture() as capture:
        console.print((dynamic_status if dynamic else status)(tmp_path))
    assert f"stopped (why); {words.removeprefix('(why); ')}" in capture.get()


def test_a_run_that_its_settings_stop_says_so(tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    settings = make_settings(tmp_path / "run", reference={"calculator": "ase.calculators.emt:NoSuchThing"}, **SMALL)
    with pytest.raises(UbmdError) as failed:
        run(settings, tmp_path)
    found = shown(tmp_path / "run") if (tmp_path / "run" / "manifest.json").exists() else ""
    assert failed.type is SettingsError
    assert "resumes it" not in found


def test_replicas_that_never_got_anywhere_are_tried_again(tmp_path: Path) -> None:
    """On resuming the cause has been fixed, here a limit of the time: kept failures must not end the run again."""
    write_structures(tmp_path / "start.extxyz", [cluster()])
    tables = SMALL | {"loop": {"labels": 6, "warm_epochs": 1}}
    hurried = make_settings(tmp_path / "run", **tables | {"md": SMALL["md"] | {"timeout": 1e-3}})
    with pytest.raises(SimulationError, match=r"Every replica failed before its first frame"):
        run(hurried, tmp_path)
    assert "once the cause is fixed, 'ubmd run'" in shown(tmp_path / "run")
    folder = RunFolder(run(make_settings(tmp_path / "run", **tables), tmp_path))
    assert len(read_structures(folder.dataset, labelled=True)) == 6


def test_a_mended_reference_is_asked_again(tmp_path: Path) -> None:
    """A program is missing at the start, and again later: what it has rejected must not end the run forever."""
    write_structures(tmp_path / "start.extxyz", [cluster()])

    def settings(labels: int, **environment: str) -> RunSettings:
        reference = {"calculator": "unkind:InstalledEMT", "environment": environment}
        loop = {"labels": labels, "warm_epochs": 1}
        return make_settings(tmp_path / "run", **SMALL, loop=loop, reference=reference)

    with pytest.raises(LabelError, match=r"Only 0 of 4 start structures could be labelled, .*dft\.x"):
        run(settings(4), tmp_path)
    assert "'ubmd run' with the same settings resumes it" in shown(tmp_path / "run")
    folder = RunFolder(run(settings(4, PROGRAM="there"), tmp_path))
    assert len(read_structures(folder.dataset, labelled=True)) == 4
    with pytest.raises(LabelError, match=r"3 consecutive iterations without a new label; .*dft\.x"):
        run(settings(8), tmp_path)
    run(settings(8, PROGRAM="there"), tmp_path)
    labels = read_structures(folder.dataset, labelled=True)
    assert [atoms.info["label"] for atoms in labels] == list(range(8))
