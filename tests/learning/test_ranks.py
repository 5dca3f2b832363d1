"""One replica on several MPI ranks."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from processes import descendants, linux, wait_for
from replicas import make_task
from system import cluster, make_settings

from ubmd.attempts import steps_so_far
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import MachineError, SimulationError
from ubmd.lammps.replica import run_replica
from ubmd.learning import RunFolder, run


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
def test_two_ranks_run_the_same_physics(
    crystal_model: Path,
    tmp_path: Path,
    ensemble: str,
) -> None:
    """Without noise the ranks only change the order of sums."""
    start: Atoms = bulk("Cu", cubic=True) * (3, 2, 2)
    results = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        # A thermostat that does next to nothing: its random numbers belong to ranks.
        task = make_task(folder, crystal_model, start, ranks=ranks, ensemble=ensemble, damping=1e6, precision="double")
        results.append((run_replica(task), read_structures(task.frames)))
    (one, frames_of_one), (two, frames_of_two) = results
    assert (one.steps, one.stopped, one.frames) == (two.steps, two.stopped, two.frames)
    for a, b in zip(frames_of_one, frames_of_two, strict=True):
        assert a.info["step"] == b.info["step"]
        np.testing.assert_allclose(a.positions, b.positions, atol=2e-3)
        assert a.info["max_uncertainty"] == pytest.approx(b.info["max_uncertainty"], rel=0.02)


def test_what_fails_on_the_ranks_is_one_sentence(model: Path, tmp_path: Path) -> None:
    start = cluster()
    start.symbols[:] = "Fe"
    with pytest.raises(SimulationError, match=r"^The replica could not be run on 2 MPI ranks: .*Fe"):
        run_replica(make_task(tmp_path, model, start, ranks=2))


@linux
def test_a_rank_that_is_killed_is_no_fault_of_the_replica(model: Path, tmp_path: Path) -> None:
    task = make_task(tmp_path, model, cluster(), ranks=2, steps=10**7)

    def ranks() -> list[int]:
        commands = {p: Path(f"/proc/{p}/cmdline").read_bytes() for p in descendants(os.getpid())}
        return [p for p, command in commands.items() if b"ubmd.lammps.replica" in command and b"mpiexec" not in command]

    with ThreadPoolExecutor(1) as thread:
        replica = thread.submit(run_replica, task)
        assert wait_for(lambda: bool(steps_so_far(task.frames)), 120.0)
        maps = [line for p in ranks() for line in Path(f"/proc/{p}/maps").read_text().splitlines()]
        shared = [line for line in maps if "/dev/shm/mpich_shm_" in line]
        assert all(line.endswith("(deleted)") for line in shared), shared  # nothing stays behind
        os.kill(ranks()[-1], signal.SIGKILL)
        with pytest.raises(MachineError, match=r"^An MPI rank of the replica was killed by SIGKILL \(often: out of"):
            replica.result(120.0)
    assert wait_for(lambda: not ranks())


def test_ranks_import_nothing_from_the_working_directory(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A numpy.py beside the settings is not numpy."""
    folder, marker = tmp_path / "work", tmp_path / "marker"
    folder.mkdir()
    for name in ("numpy", "torch", "lammps", "ase", "ubmd", "json", "pydantic"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ImportError('evil')\n")
    monkeypatch.chdir(folder)
    result = run_replica(make_task(tmp_path, model, cluster(), ranks=2))
    assert result.stopped != "failed"
    assert not marker.exists()


def test_the_loop_runs_replicas_on_two_ranks(tmp_path: Path) -> None:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    tables = {"md": {"ranks": 2, "replicas": 2}, "loop": {"labels": 6, "warm_epochs": 4}, "training": {"epochs": 6}}
    folder = RunFolder(run(make_settings(tmp_path / "run", **tables, test=None), tmp_path))
    assert len(read_structures(folder.dataset)) == 6
    assert [entry["md_steps"] for entry in folder.read_history()] == [80, 80]
