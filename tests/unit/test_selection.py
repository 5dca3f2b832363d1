"""Batch selection against the definitions, written out naively (N × N kernels, refits, determinants)."""

import itertools

import numpy as np
import pytest

from ubmd.errors import SettingsError
from ubmd.selection import METHODS, select

LAMBDA2 = 1e-2


def features(seed: int, pool: int = 12, training: int = 6, p: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    training_features = rng.normal(size=(training, p)) / np.sqrt(p)
    # unequal lengths, so that the choices are not close calls
    pool_features = rng.normal(size=(pool, p)) * rng.uniform(0.2, 2.0, size=(pool, 1))
    return pool_features, training_features


def kernel(pool: np.ndarray, training: np.ndarray, lambda2: float) -> np.ndarray:
    """k(s, t) = λ² φ_s (ΦᵀΦ + λ²)⁻¹ φ_t, by an explicit inverse."""
    inverse = np.linalg.inv(training.T @ training + lambda2 * np.eye(pool.shape[1]))
    return lambda2 * pool @ inverse @ pool.T


def run(method, pool, training, count, noise=0.0, tolerance=0.0, u=None, seed=0, lambda2=LAMBDA2):
    u = np.arange(len(pool)) if u is None else u
    return select(method, pool, training, u, count, lambda2, noise, tolerance, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(5))
def test_max_det_with_noise_equals_refitting_with_each_pick(seed):
    pool, training = features(seed)
    picks: list[int] = []
    for _ in range(6):
        refit = kernel(pool, np.vstack([training, pool[picks]]), LAMBDA2)
        variance = np.diag(refit).copy()
        variance[picks] = -1.0
        picks.append(int(np.argmax(variance)))
    assert run("max_det", pool, training, 6, noise=LAMBDA2) == picks


@pytest.mark.parametrize("seed", range(5))
def test_max_det_without_noise_is_the_greedy_determinant(seed):
    pool, training = features(seed)
    k = kernel(pool, training, LAMBDA2)
    picks: list[int] = []
    for _ in range(6):
        rest = [s for s in range(len(pool)) if s not in picks]
        determinants = [np.linalg.det(k[np.ix_([*picks, s], [*picks, s])]) for s in rest]
        picks.append(rest[int(np.argmax(determinants))])
    assert run("max_det", pool, training, 6) == picks


def test_max_det_nearly_reaches_the_best_determinant_of_all_batches():
    """Greedy need not find the best batch, but on small cases it must come close and beat most batches."""
    better = 0
    for seed in range(10):
        pool, training = features(seed, pool=9)
        k = kernel(pool, training, LAMBDA2)
        every = [np.linalg.det(k[np.ix_(batch, batch)]) for batch in itertools.combinations(range(9), 3)]
        picks = run("max_det", pool, training, 3)
        better += np.mean(np.array(every) > np.linalg.det(k[np.ix_(picks, picks)]) * (1 + 1e-9))
    assert better / 10 < 0.02


def test_max_det_counts_the_training_set():
    """What training already explains is not picked: here the longest feature vector lies in its span."""
    training = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    pool = np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 0.5], [0.0, 2.0, 0.0]])
    assert run("max_det", pool, training, 1, lambda2=1e-4) == [1]
    assert run("max_det", pool, np.zeros((0, 3)), 1, lambda2=1e-4) == [0]


def test_max_det_spreads_where_max_diag_repeats_itself():
    pool = np.array([[2.0, 0.0], [1.99, 0.05], [0.0, 1.0]])
    training = np.zeros((0, 2))
    assert run("max_det", pool, training, 2) == [0, 2]
    assert run("max_diag", pool, training, 2, u=np.linalg.norm(pool, axis=1)) == [0, 1]


@pytest.mark.parametrize("noise", [0.0, LAMBDA2])
def test_max_det_goes_on_beyond_the_rank(noise):
    pool, training = features(3, pool=20, p=4)
    picks = run("max_det", pool, training, 15, noise=noise)
    assert len(set(picks)) == 15
    assert np.linalg.matrix_rank(pool[picks[:4]]) == 4  # the floor must not disturb the picks within the rank


def test_max_diag_takes_the_largest_uncertainties():
    pool, training = features(0)
    u = np.random.default_rng(1).permutation(len(pool)).astype(float)
    assert run("max_diag", pool, training, 4, u=u) == list(np.argsort(-u)[:4])


@pytest.mark.parametrize("seed", range(5))
def test_max_dist_takes_the_farthest_from_training_and_picks(seed):
    pool, training = features(seed)
    picks: list[int] = []
    for _ in range(6):
        known = [*training, *(pool[k] for k in picks)]
        nearest = [min(np.linalg.norm(row - other) for other in known) for row in pool]
        picks.append(int(np.argmax(nearest)))
    assert run("max_dist", pool, training, 6) == picks
    assert run("max_dist", pool, training[:0], 1) != picks[:1] or picks[0] == 0  # the training set counts


def test_random_depends_on_its_generator_only_and_reaches_every_structure():
    pool, training = features(0)
    assert run("random", pool, training, 5, seed=4) == run("random", pool, training, 5, seed=4)
    assert run("random", pool, training, 5, seed=4) != run("random", pool, training, 5, seed=5)
    first = [run("random", pool, training, 1, seed=seed)[0] for seed in range(200)]
    assert set(first) == set(range(len(pool)))


@pytest.mark.parametrize("method", METHODS)
def test_near_duplicates_are_never_picked(method):
    pool, training = features(2)
    copies = pool + 1e-5
    known = training[:2] + 1e-5  # like two training structures
    u = np.concatenate([np.full(2, 9.0), np.arange(24)])
    picks = run(method, np.vstack([known, pool, copies]), training, 26, tolerance=1e-3, u=u)
    assert len(picks) == 12  # fewer than asked for: one of each pair, none of the known ones
    assert sorted((i - 2) % 12 for i in picks) == list(range(12))
    assert min(picks) >= 2


@pytest.mark.parametrize("method", METHODS)
def test_identical_structures_differ_at_any_tolerance_above_zero(method):
    """Identical rows have distance 0, however long they are: no rounding may hide that."""
    pool = np.repeat(features(1)[0] * 1e3, 2, axis=0)
    picks = run(method, pool, np.zeros((0, 8)), 24, tolerance=1e-12)
    assert sorted(i // 2 for i in picks) == list(range(12))


@pytest.mark.parametrize("method", METHODS)
def test_structures_without_finite_values_are_never_picked(method):
    pool, training = features(0)
    pool[3, 2] = np.nan
    u = np.arange(12.0)
    u[7] = np.inf
    picks = run(method, pool, training, 12, u=u)
    assert sorted(picks) == [i for i in range(12) if i not in (3, 7)]


def test_empty_pool_and_unknown_method():
    assert run("max_det", np.zeros((0, 8)), np.zeros((0, 8)), 3) == []
    with pytest.raises(SettingsError, match="choose one of max_det, max_dist, max_diag, random"):
        run("best", np.ones((2, 3)), np.ones((2, 3)), 1)
