"""Slow waves, errors by volume, and the pictures of trajectories."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from ubmd.analysis import trajectory_figures as figures
from ubmd.calculator import Prediction
from ubmd.measure.errors import error_summary
from ubmd.measure.volumes import errors_by_volume, slow_wave, volume_edges

# --- the slow wave ----------------------------------------------------------------------------------------------


def test_slow_wave_is_found_again():
    t = np.linspace(3.0, 13.0, 4001)
    rng = np.random.default_rng(0)
    clean = 900.0 + 40.0 * np.sin(2 * np.pi * (t - 3.0) / 20.0 + 0.7)
    fit = slow_wave(t, clean)
    assert fit.amplitude == pytest.approx(40.0)
    assert fit.mean == pytest.approx(900.0)
    assert fit.explained == pytest.approx(1.0)
    np.testing.assert_allclose(fit.curve, clean)
    fit = slow_wave(t, clean + rng.normal(scale=15.0, size=len(t)))
    assert fit.amplitude == pytest.approx(40.0, rel=0.1)
    assert fit.noise == pytest.approx(15.0, rel=0.05)
    assert fit.sample(1).std() == pytest.approx((clean + rng.normal(scale=15.0, size=len(t))).std(), rel=0.1)


def test_slow_wave_has_the_least_squares_of_a_grid_of_phases():
    t = np.arange(60.0)
    v = np.random.default_rng(1).normal(size=60).cumsum()
    fit = slow_wave(t, v)
    best = np.inf
    for phase in np.linspace(0, np.pi, 2001):
        wave = np.sin(np.pi * t / 59.0 + phase)
        slope, offset = np.polyfit(wave, v, 1)
        best = min(best, np.sum((v - offset - slope * wave) ** 2))
    assert np.sum((v - fit.curve) ** 2) == pytest.approx(best, rel=1e-5)
    assert fit.noise == pytest.approx(np.sqrt(best / 57), rel=1e-5)
    assert fit.explained == pytest.approx(1 - best / np.sum((v - v.mean()) ** 2), rel=1e-4)


# --- errors by volume -------------------------------------------------------------------------------------------


def cells() -> tuple[list, list[Prediction]]:
    """Labelled cells of 11 volumes, and predictions with random errors."""
    rng = np.random.default_rng(2)
    structures, predictions = [], []
    for k in range(11):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell[:] * (1 + 0.03 * k), scale_atoms=True)
        label = {"energy": rng.normal(), "forces": rng.normal(size=(4, 3)), "stress": rng.normal(size=6)}
        atoms.calc = SinglePointCalculator(atoms, **label)
        structures.append(atoms)
        predictions.append(
            Prediction(rng.normal(), rng.normal(size=(4, 3)), rng.normal(size=6), 0.1, rng.uniform(size=4), np.ones(2))
        )
    return structures, predictions


def test_errors_by_volume_are_those_of_each_bin():
    structures, predictions = cells()
    edges = volume_edges(structures, 4)
    volumes = [atoms.get_volume() for atoms in structures]
    assert edges[0] == min(volumes)
    assert edges[-1] == max(volumes)
    bins = errors_by_volume(structures, predictions, [*edges, 1000.0])
    for k, found in enumerate(bins[:4]):
        chosen = [i for i, v in enumerate(volumes) if edges[k] <= v < edges[k + 1]]
        expected = error_summary([structures[i] for i in chosen], [predictions[i] for i in chosen])
        assert (found.structures, found.errors) == (len(chosen), expected)
        assert found.errors["stress_rmse_mpa"] > 0
    assert bins[4].structures == 1  # the largest, as the last bin has another end
    bins = errors_by_volume(structures, predictions, edges)
    assert sum(found.structures for found in bins) == 11
    assert errors_by_volume(structures, predictions, [1.0, 2.0])[0].errors == {}
    assert volume_edges(structures[:1] * 3) is None


# --- pictures ---------------------------------------------------------------------------------------------------


def check(path: Path) -> None:
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > 400
    assert image.shape[1] <= 1300
    assert image[..., :3].std() > 0.03
    border = np.concatenate([image[:3].ravel(), image[-3:].ravel(), image[:, :3].ravel(), image[:, -3:].ravel()])
    assert border.min() > 0.9


def test_pictures_of_trajectories(tmp_path):
    rng = np.random.default_rng(3)
    angles = {f"group {k}": rng.vonmises([1.0, -2.0], 2.0 + k, size=(500 * (k + 1), 2)) for k in range(4)}
    check(figures.torsion_histogram_figure(angles, tmp_path / "torsions.png"))
    check(figures.torsion_histogram_figure({"one": angles["group 0"]}, tmp_path / "torsions_1.png"))
    volumes = {"closed": rng.normal(820, 10, 900), "open": rng.normal(1400, 30, 900)}
    check(figures.histogram_figure(volumes, tmp_path / "volumes.png", "Volume (Å³)"))
    lag = np.arange(300)
    curves = {"Positions": {"a": 0.99**lag, "b": 0.95**lag}, "max u": {"a": 0.9**lag, "b": 0.97**lag}}
    check(figures.autocorrelation_figure(curves, 0.01, tmp_path / "c.png", {"Positions": {"a": 1.99, "b": 0.39}}))
    t = np.linspace(0, 10, 800)
    v = 1000 + 200 * np.cos(np.pi * t / 10 + 0.2) + rng.normal(size=800, scale=15)
    runs = {name: (t, v + k, slow_wave(t, v + k)) for k, name in enumerate(("biased", "unbiased"))}
    check(figures.slow_wave_figure(runs, tmp_path / "wave.png"))
    structures, predictions = cells()
    bins = [errors_by_volume(structures, p, volume_edges(structures, 5)) for p in (predictions, predictions[::-1])]
    check(figures.volume_error_figure({"biased": bins, "plain": bins[:1]}, tmp_path / "errors.png"))
    rows = {f"energy RMSE at the end, kind {k}, meV/atom": [[1.0, 2.0], [1.5, np.nan], [3.0, 2.5]] for k in range(5)}
    check(figures.dependence_figure([0.5, 0.1, 0.25], rows, "bias.force", tmp_path / "tau.png"))
