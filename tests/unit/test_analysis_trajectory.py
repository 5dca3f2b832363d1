"""Autocorrelation, trajectories without rotation or cell, and what replicas' traces give."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from ubmd.analysis.trajectory import Trajectory, aligned, correlation_times, read_trajectory, without_cell
from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.errors import DataError
from ubmd.measure.autocorrelation import (
    autocorrelation,
    autocorrelation_time,
    mean_autocorrelation,
    statistical_inefficiency,
)


def correlated(length: int, memory: float, seed: int, shape: tuple[int, ...] = ()) -> np.ndarray:
    """An autoregressive series with C(t) = memory^t."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(length, *shape))
    series = np.zeros_like(noise)
    for t in range(length):
        series[t] = noise[t] + (memory * series[t - 1] if t else 0.0)
    return series


# --- autocorrelation --------------------------------------------------------------------------------------------


def naive_autocorrelation(x: np.ndarray, lag: int) -> float:
    spread = x - x.mean()
    products = [spread[k] * spread[k + lag] for k in range(len(x) - lag)]
    return float(np.mean(products) / np.mean(spread**2))


def test_autocorrelation_is_its_definition():
    x = correlated(40, 0.8, 1) + 3.0
    np.testing.assert_allclose(autocorrelation(x), [naive_autocorrelation(x, t) for t in range(40)], atol=1e-12)
    many = np.stack([x, x[::-1] ** 2], axis=1).reshape(40, 2, 1)
    np.testing.assert_allclose(autocorrelation(many)[:, 0, 0], autocorrelation(x), atol=1e-12)
    np.testing.assert_allclose(autocorrelation(many)[:, 1, 0], autocorrelation(x[::-1] ** 2), atol=1e-12)


@pytest.mark.parametrize(("length", "memory"), [(3000, 0.95), (500, 0.0), (60, 0.99), (5, 0.5), (2, 0.5)])
def test_statistical_inefficiency_agrees_with_the_plain_sum(length, memory):
    x = correlated(length, memory, length)
    g = 1.0
    for lag in range(1, length - 1):
        c = naive_autocorrelation(x, lag)
        if c <= 0:
            break
        g += 2 * c * (1 - lag / length)
    assert statistical_inefficiency(x) == pytest.approx(max(g, 1.0), rel=1e-10)


def test_statistical_inefficiency_agrees_with_pymbar():
    timeseries = pytest.importorskip("pymbar.timeseries", reason="pymbar is an oracle of the development environment")
    x = np.stack([correlated(800, memory, seed) for seed, memory in enumerate((0.0, 0.5, 0.9, 0.99))], axis=1)
    expected = [timeseries.statistical_inefficiency(column, mintime=0) for column in x.T]
    np.testing.assert_allclose(statistical_inefficiency(x), expected, rtol=1e-10)


def test_series_with_known_memory_and_constant_ones():
    """C(t) = a^t has g = (1 + a) / (1 - a)."""
    x = correlated(200_000, 0.9, 7)
    assert statistical_inefficiency(x) == pytest.approx(19.0, rel=0.1)
    assert np.isnan(statistical_inefficiency(np.full(10, 0.1)))
    assert np.isnan(autocorrelation_time([np.full(10, 0.1)], 1.0))
    assert np.isnan(autocorrelation_time([[1.0]], 1.0))


def test_several_series_share_their_effective_sample_size():
    a, b = correlated(300, 0.9, 1, (2,)), correlated(700, 0.9, 2, (2,))
    times = [
        0.01 * 1000 / (300 / statistical_inefficiency(a[:, k]) + 700 / statistical_inefficiency(b[:, k]))
        for k in range(2)
    ]
    assert autocorrelation_time([a, b], 0.01) == pytest.approx(np.mean(times), rel=1e-12)
    mean = mean_autocorrelation([a, b], 500)
    assert len(mean) == 500
    lag = 5
    each = [np.mean([naive_autocorrelation(x[:, k], lag) for k in range(2)]) for x in (a, b)]
    assert mean[lag] == pytest.approx((295 * each[0] + 695 * each[1]) / 990, rel=1e-10)
    assert mean[400] == pytest.approx(np.mean([naive_autocorrelation(b[:, k], 400) for k in range(2)]), rel=1e-8)


# --- trajectories -----------------------------------------------------------------------------------------------


def vibrations(length: int, seed: int = 0) -> np.ndarray:
    """Positions [T, 5, 3] of a small molecule that vibrates."""
    rest = np.random.default_rng(9).uniform(-2, 2, size=(5, 3))
    return rest + 0.05 * correlated(length, 0.9, seed, (5, 3))


def test_alignment_removes_rotation_and_shift():
    still = vibrations(50)
    rng = np.random.default_rng(3)
    turned = np.array([Rotation.random(rng=rng).apply(p) + rng.normal(size=3) for p in still])
    found, expected = aligned(turned), aligned(still)
    turn = Rotation.align_vectors(expected[0], found[0])[0]  # both are aligned with their own first record
    np.testing.assert_allclose(turn.apply(found.reshape(-1, 3)).reshape(found.shape), expected, atol=1e-6)
    mean = found.mean(axis=0)
    for record, before in zip(found, turned, strict=True):  # each rotation is the best one
        best, _ = Rotation.align_vectors(mean, before - before.mean(axis=0))
        np.testing.assert_allclose(best.apply(before - before.mean(axis=0)), record, atol=1e-3)
    mirrored = aligned(np.array([still[0], still[0] * [1, 1, -1]]))
    assert np.abs(mirrored[0] - mirrored[1]).max() > 0.1


def test_cells_jumps_and_drift_are_removed():
    rng = np.random.default_rng(4)
    fractional = rng.uniform(0, 1, size=(6, 3)) + 0.01 * correlated(80, 0.9, 5, (6, 3))
    cells = np.eye(3) * 6.0 + np.triu(rng.normal(size=(3, 3))) + 0.05 * correlated(80, 0.9, 6, (3, 3))
    drift = np.linspace(0, 3, 80)[:, None, None]
    wrapped = np.einsum("tna,tab->tnb", (fractional + drift) % 1.0, cells)
    expected = (fractional - fractional.mean(axis=1, keepdims=True)) @ cells.mean(axis=0)
    found = without_cell(wrapped, cells)
    shift = found[0] - expected[0]  # each atom by whole vectors of the mean cell, less their mean
    np.testing.assert_allclose(found - shift, expected, atol=1e-9)


def test_times_are_those_of_internal_motion(tmp_path: Path):
    still, u = vibrations(400, 1), np.abs(correlated(400, 0.97, 2))
    trajectory = Trajectory(np.array([6] * 5), still + np.cumsum(np.ones((400, 1, 3)), axis=0), None, 0.005, u)
    short = Trajectory(np.array([6] * 5), still[:100], None, 0.005, u[:100])
    times = correlation_times([trajectory, short])
    internal = aligned(still)
    each = [statistical_inefficiency(internal[:, i, k]) for i in range(5) for k in range(3)]
    assert times.positions == pytest.approx(0.005 * np.mean(each), rel=1e-6)
    assert times.uncertainty == pytest.approx(0.005 * statistical_inefficiency(u), rel=1e-10)
    assert (times.trajectories, times.duration) == (1, pytest.approx(2.0))
    assert correlation_times([short]).trajectories == 0
    with pytest.raises(DataError, match="different spacings"):
        correlation_times([trajectory, Trajectory(trajectory.numbers, still, None, 0.01)])


def test_traces_and_plain_files_are_the_same_trajectory(tmp_path: Path):
    cells = [bulk("Cu", cubic=True) * (2, 1, 1) for _ in range(6)]
    for k, atoms in enumerate(cells):
        atoms.set_cell(atoms.cell[:] * (1 + 0.01 * k), scale_atoms=True)
        atoms.info = {"step": 20 * (k + 1), "max_uncertainty": 0.1 * k}
    write(tmp_path / "plain.extxyz", cells)
    np.savez(
        tmp_path / "trace_000.npz",
        numbers=cells[0].numbers,
        timestep=0.5,
        step=np.arange(20, 121, 20),
        positions=np.array([atoms.positions for atoms in cells], dtype=np.float32),
        cell=np.array([atoms.cell[:] for atoms in cells]),
        max_u=0.1 * np.arange(6),
    )
    trace, plain = read_trajectory(tmp_path / "trace_000.npz"), read_trajectory(tmp_path / "plain.extxyz", 0.01)
    for found in (trace, plain):
        assert found.spacing == pytest.approx(0.01)
        assert found.duration == pytest.approx(0.06)
        np.testing.assert_allclose(found.volumes, [atoms.get_volume() for atoms in cells], rtol=1e-6)
        np.testing.assert_allclose(found.max_u, 0.1 * np.arange(6))
        np.testing.assert_allclose(found.structures()[3].get_all_distances(), cells[3].get_all_distances(), atol=1e-5)
    with pytest.raises(DataError, match=r"does not contain the time between its frames; give it .--spacing, fs"):
        read_trajectory(tmp_path / "plain.extxyz")
    cells[4].info["step"] = 110
    write(tmp_path / "plain.extxyz", cells)
    with pytest.raises(DataError, match="not equally spaced"):
        read_trajectory(tmp_path / "plain.extxyz", 0.01)
    write(tmp_path / "other.xyz", [Atoms("H2", positions=np.eye(2, 3)), Atoms("H")])
    with pytest.raises(DataError, match="frames of one system"):
        read_trajectory(tmp_path / "other.xyz", 0.01)


def test_mistakes_of_the_command_name_their_options(tmp_path):
    write(tmp_path / "a.xyz", [Atoms("H4", positions=np.eye(4, 3))] * 3)
    spacing = ["--spacing", "10"]
    for options, message in (
        ([], "does not contain the time between its frames; give it (--spacing, fs)"),
        (["--spacing", "0"], "--spacing must be above 0 fs, not 0."),
        ([*spacing, "--torsion", "phi=0,1,2,4"], "--torsion phi=0,1,2,4: it needs four different atoms, counted from"),
        ([*spacing, "--torsion", "phi=0,1,2,-1"], "--torsion phi=0,1,2,-1: it needs four different atoms"),
    ):
        result = CliRunner().invoke(app, ["trajectory", str(tmp_path / "a.xyz"), *options, "-o", str(tmp_path / "out")])
        assert result.exit_code == 1
        assert message in result.output + (result.stderr if result.stderr_bytes else "")
    for none in ("none.xyz", "none.npz"):
        with pytest.raises(DataError, match=rf"There is no file .*{none}"):
            read_trajectory(tmp_path / none)
    with pytest.raises(DataError, match="is a folder; name the trajectories in it"):
        read_trajectory(tmp_path)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for content in ((tmp_path / "other.npz").read_bytes(), b"", b"PK\x03\x04", b"text"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"bad.npz is not a trace of a replica .md.trace_every., or it is damaged"):
            read_trajectory(tmp_path / "bad.npz")
    (tmp_path / "bad.xyz").write_text("2\n\nH 0 0\n")
    with pytest.raises(DataError, match=r"ASE cannot read .*bad.xyz: "):
        read_trajectory(tmp_path / "bad.xyz", 0.01)


def test_trajectories_of_slabs(tmp_path):
    """Jumps by periodic vectors are undone, motion along the free direction is kept, however far."""
    rng, records = np.random.default_rng(0), 40
    slab = Atoms("Cu4", positions=rng.uniform(0.0, 4.0, (4, 3)), cell=[4.0, 5.0, 0.0], pbc=(True, True, False))
    moves = np.cumsum(rng.normal(scale=0.2, size=(records, 4, 3)), axis=0)
    moves[:, 0, 2] += np.linspace(0.0, 30.0, records)  # desorbed
    frames = []
    for k in range(records):
        frame = slab.copy()
        frame.positions += moves[k]
        frame.wrap()
        frame.info["step"] = 10 * k
        frames.append(frame)
    write_structures(tmp_path / "slab.extxyz", frames)
    trajectory = read_trajectory(tmp_path / "slab.extxyz", 0.1)
    assert trajectory.volumes is None
    assert [atoms.pbc.tolist() for atoms in trajectory.structures()[:2]] == [[True, True, False]] * 2
    found = trajectory.internal_positions()
    expected = slab.positions + moves
    expected -= expected.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(np.diff(found, axis=0), np.diff(expected, axis=0), atol=1e-8)
