"""Folders of any legal name: what runs in them is what runs in a plain one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from system import cluster, settings_table
from typer.testing import CliRunner

from ubmd.aliases import Aliases
from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SimulationError
from ubmd.lammps.replica import ReplicaTask, run_replica
from ubmd.lammps.trajectory import PieceTask, TrajectoryState, read_state, run_piece, write_state
from ubmd.lammps.triggers import AbsoluteTrigger
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.references.lammps import LAMMPS
from ubmd.settings import ModelSettings, UncertaintySettings

NAMES = [
    "lauf_ä",
    "日本語",
    "a b",
    "it's",
    'say "a"',
    """both ' and \"""",
    "$x ${y}",
    "x”y",
    "end &",
    "a#b",
    "*%?[1]",
    '"""',
    "line\nbreak",
    os.fsdecode(b"latin-\xe4"),
]

SPRING = """
colvarsTrajFrequency 0
colvarsRestartFrequency 0
colvar {
    name apart
    distance {
        group1 { atomNumbers 1 }
        group2 { atomNumbers 2 }
    }
}
harmonic {
    colvars apart
    centers 3.3
    forceConstant 50.0
}
"""


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Content of a model file for copper and gold, untrained."""
    structures = []
    for seed in range(6):
        atoms = cluster()
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        structures.append(atoms)
    network = GaussianMomentNetwork(["Cu", "Au"], ModelSettings(hidden=(8, 8), n_radial=2, cutoff=4.0), seed=1)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    export_model(network, structures[:3], structures[3:], UncertaintySettings(projections=8), path)
    return path.read_bytes()


def replica_in(folder: Path, model: bytes, **changes: object) -> tuple[np.ndarray, ReplicaTask]:
    """(positions of all frames, the task) of a replica that runs in a folder."""
    folder.mkdir()
    (folder / "model.pt").write_bytes(model)
    write_structures(folder / "start.extxyz", [cluster()])
    fixed = {"replica": 3, "timestep": 2.0, "temperature": 300.0, "damping": 0.5, "precision": "double"}
    bias = {"force": 0.5, "species": {}, "window": 4, "every": 2, "threshold": 1000.0}
    seeds = {"velocity_seed": 11, "langevin_seed": 12, "min_distance": 0.3}
    files = {"model": folder / "model.pt", "start": folder / "start.extxyz", "frames": folder / "frames_003.extxyz"}
    # a trace with records between the pieces: LAMMPS's log is closed and opened again
    values = {**fixed, **bias, **seeds, **files, "steps": 40, "frames_every": 10, "trace_every": 8, **changes}
    task = ReplicaTask.model_validate(values)
    result = run_replica(task)
    assert (result.stopped, result.reason, result.frames) == ("step limit", "", 5)
    return np.array([atoms.positions for atoms in read_structures(task.frames)]), task


@pytest.fixture(scope="module")
def plain(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return replica_in(tmp_path_factory.mktemp("plain") / "plain", content)[0]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_replica_runs_in_a_folder_of_any_name(content: bytes, plain: np.ndarray, tmp_path: Path, name: str) -> None:
    handles = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    positions, task = replica_in(tmp_path / name, content)
    np.testing.assert_array_equal(positions, plain)
    left = {"model.pt", "start.extxyz", "frames_003.extxyz", "frames_003.log", "trace_003.npz"}
    assert {path.name for path in (tmp_path / name).iterdir()} == left
    assert "Loop time" in task.frames.with_suffix(".log").read_text() or task.frames.with_suffix(".log").stat().st_size
    assert len(os.listdir("/proc/self/fd")) <= handles + 2  # noqa: PTH208 (torch and LAMMPS open some of their own)


def test_two_ranks_in_a_folder_with_an_odd_name(content: bytes, tmp_path: Path) -> None:
    odd, plain = (replica_in(tmp_path / name, content, ranks=2)[0] for name in ("zwei 'ä' $x", "plain"))
    np.testing.assert_allclose(odd, plain, rtol=0, atol=1e-7)


def test_colvars_in_a_folder_with_an_odd_name(content: bytes, plain: np.ndarray, tmp_path: Path) -> None:
    positions, task = replica_in(tmp_path / "ä'$x", content, colvars=SPRING)
    expected, _ = replica_in(tmp_path / "plain", content, colvars=SPRING)
    np.testing.assert_array_equal(positions, expected)
    assert np.abs(positions - plain).max() > 1e-3
    assert not list(task.frames.parent.glob("*colvars*"))


def test_a_missing_model_is_named_as_it_is(content: bytes, tmp_path: Path) -> None:
    _, task = replica_in(tmp_path / "lauf_ä", content)
    task.model.unlink()
    with pytest.raises(SimulationError, match=r"lauf_ä/model\.pt") as caught:
        run_replica(task)
    assert "/proc" not in str(caught.value)


@pytest.mark.parametrize("name", ["lauf_ä", "it's $x"])
def test_a_piece_of_a_dynamic_run(content: bytes, tmp_path: Path, name: str) -> None:
    ends = []
    for folder in (tmp_path / "plain", tmp_path / name):
        folder.mkdir()
        (folder / "mödel.pt").write_bytes(content)
        rng = np.random.default_rng(1)
        state = TrajectoryState.begin(bulk("Cu", cubic=True) * (2, 2, 2), 300.0, AbsoluteTrigger(100.0), rng)
        write_state(folder / "start.npz", state)
        files = {"model": folder / "mödel.pt", "start": folder / "start.npz", "result": folder / "end.npz"}
        fixed = {"replica": 0, "timestep": 2.0, "temperature": 300.0, "damping": 0.5, "precision": "double"}
        bias = {"force": 0.2, "species": {}, "window": 4, "noise": 0.0, "lattice": False, "langevin_seed": 5}
        task = PieceTask(**files, **fixed, **bias, steps=20, check_every=5, frames=2)
        assert run_piece(task).end == 20
        ends.append(read_state(task.result).positions)
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("name", NAMES[:8], ids=ascii)
def test_a_lammps_reference_with_files_in_any_folder(tmp_path: Path, name: str) -> None:
    import lammps

    table = (Path(lammps.__file__).parent / "share/lammps/potentials/Si.sw").read_bytes()
    atoms = bulk("Si") * (2, 1, 1)
    atoms.rattle(0.1, seed=1)
    atoms.calc = LAMMPS(["pair_style sw", "pair_coeff * * Si.sw Si"], ["Si"])
    expected = atoms.get_forces()
    folder = tmp_path / name
    folder.mkdir()
    (folder / "mine.sw").write_bytes(table)
    atoms.calc = LAMMPS(["pair_style sw", "pair_coeff * * mine.sw Si"], ["Si"], base=folder)
    np.testing.assert_array_equal(atoms.get_forces(), expected)


def test_scripts_of_users(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lauf_ä").mkdir()
    (tmp_path / "lauf_ä" / "model.pt").write_bytes(content)
    lines = (
        "units metal\nregion r block 0 9 0 9 0 9\ncreate_box 1 r\nmass 1 63\npair_style ubmd\npair_coeff * * {} Cu\n"
    )
    command = [str(Path(sys.executable).parent / "lmp"), "-log", "none", "-var", "model", "lauf_ä/model.pt", "-in"]
    said = {}
    for name, file in (("typed", "lauf_ä/model.pt"), ("variable", "${model}")):
        (tmp_path / name).write_text(lines.replace("{}", file))
        done = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, timeout=60, check=False)
        said[name] = (done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace"))
    assert said["variable"][0], said
    assert not said["typed"][0]
    assert "cannot read model file lauf_?/model.pt: LAMMPS replaces non-ASCII characters" in said["typed"][1]
    assert "start it with '-var model FILE' and write ${model} in pair_coeff" in said["typed"][1]


def test_plain_names_stay_as_they_are(tmp_path: Path) -> None:
    aliases = Aliases()
    assert aliases.of(Path("/a b/c-1.2_3/model.pt")) == Path("/a b/c-1.2_3/model.pt")
    odd = tmp_path / "ä"
    odd.mkdir()
    (odd / "file").write_text("x")
    first = aliases.of(odd / "file")
    assert first.read_text() == "x"
    assert aliases.of(odd / "other").parent == first.parent  # one handle per folder
    assert aliases.real(f"no {first}, no {first.parent}0") == f"no {odd / 'file'}, no {first.parent}0"
    aliases.close()
    assert not first.exists()
    with pytest.raises(SimulationError, match="cannot be opened"):
        aliases.of(tmp_path / "ö" / "file")


@pytest.mark.parametrize("name", ["lauf_ä", 'say "it\'s" $x [b]'])
def test_a_loop_in_a_folder_with_an_odd_name(tmp_path: Path, name: str) -> None:
    base = tmp_path / name
    base.mkdir()
    write_structures(base / "start.extxyz", [cluster()])
    settings = settings_table(base / "run") | {"loop": {"labels": 5, "threshold": 1000.0}}
    settings["md"] |= {"replicas": 1}
    settings["selection"] = {"batch": 1}
    settings["training"]["epochs"] = 2
    del settings["test"]
    (base / "settings.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    done = CliRunner().invoke(app, ["run", str(base / "settings.toml")])
    assert done.exit_code == 0, done.output
    assert f"{base / 'run' / 'model.pt'}" in done.output
    for command in ("status", "info", "report"):
        done = CliRunner().invoke(app, [command, str(base / "run")], env={"COLUMNS": "400"})
        assert done.exit_code == 0, done.output
        assert str(base / "run") in done.output
