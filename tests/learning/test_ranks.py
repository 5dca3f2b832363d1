"""One replica on several MPI ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from system import cluster, make_settings
from test_replica import crystal_model, make_task, model  # noqa: F401 (fixtures)

from ubmd.data.structures import read_structures, write_structures
from ubmd.errors import SimulationError
from ubmd.lammps.replica import run_replica
from ubmd.learning import RunFolder, run


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
def test_two_ranks_run_the_same_physics(
    crystal_model: Path,  # noqa: F811
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


def test_what_fails_on_the_ranks_is_one_sentence(model: Path, tmp_path: Path) -> None:  # noqa: F811
    start = cluster()
    start.symbols[:] = "Fe"
    with pytest.raises(SimulationError, match=r"^The replica could not be run on 2 MPI ranks: .*Fe"):
        run_replica(make_task(tmp_path, model, start, ranks=2))


def test_ranks_import_nothing_from_the_working_directory(
    model: Path,  # noqa: F811
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
