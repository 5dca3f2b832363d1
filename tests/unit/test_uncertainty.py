"""Sketch, posterior and conformal calibration against naive oracles."""

import numpy as np
import pytest
import torch
from ase.build import molecule
from crepes import ConformalRegressor

from ubmd.data.graph import build_graph
from ubmd.errors import DataError
from ubmd.potentials.gmnn.deployed import DeployedModel
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.sketch import GradientSketch
from ubmd.settings import ModelSettings
from ubmd.uncertainty import DistanceUncertainty, PosteriorUncertainty, conformal_scale

ELEMENTS = ["H", "C", "N", "O"]


def test_sketch_is_a_projection_of_the_autograd_weight_gradient() -> None:
    """phi_i from the closed form = sum over layers of P_out (dE_i/dW, dE_i/db) P_in by autograd, atom by atom."""
    model = GaussianMomentNetwork(ELEMENTS, ModelSettings(n_radial=2, n_basis=4, hidden=(7, 6)), seed=4)
    model.to_network_dtype(torch.float64)
    with torch.no_grad():
        model.constant.fill_(0.7)
        model.scale.copy_(torch.tensor([1.1, 0.8, 1.3, 0.9], dtype=torch.float64))
        for bias in model.biases:
            bias.normal_(generator=torch.Generator().manual_seed(1))
    sizes = (model.network.weight1.size(1), 7, 6)
    generator = torch.Generator().manual_seed(9)
    p = 5
    inner = [torch.randn(p, d + 1, generator=generator, dtype=torch.float64) for d in sizes]
    outer = [torch.randn(p, d, generator=generator, dtype=torch.float64) for d in sizes[1:]]
    sketch = GradientSketch(sizes, p, seed=0)
    sketch.set_projections(inner, outer)
    graph = build_graph(molecule("CH3CONH2"), ELEMENTS, model.cutoff)
    _, phi = DeployedModel(model, sketch)(graph.species, graph.edge_index, graph.edge_vector, graph.n_atoms)
    energies = model(graph.species, graph.edge_index, graph.edge_vector, graph.n_atoms)
    for i in range(graph.n_atoms):
        gradients = torch.autograd.grad(energies[i], [*model.weights, *model.biases], retain_graph=True)
        expected = torch.zeros(p, dtype=torch.float64)
        for layer in range(3):
            full = torch.cat(
                [gradients[layer], gradients[3 + layer].unsqueeze(1)], dim=1
            )  # d(W, b): d_l x (d_{l-1} + 1)
            left = outer[layer] if layer < 2 else torch.ones(p, 1, dtype=torch.float64)
            expected += torch.einsum("po,oi,pi->p", left, full, inner[layer])
        torch.testing.assert_close(phi[i], expected, rtol=1e-11, atol=1e-13)


def test_posterior_matches_the_direct_inverse() -> None:
    rng = np.random.default_rng(0)
    features, tests, lambda2 = rng.normal(size=(6, 9)) * 3.0, rng.normal(size=(4, 9)), 1e-4
    posterior = PosteriorUncertainty(9)
    raw = torch.from_numpy(features)
    posterior.fit(raw.T @ raw, len(raw), lambda2)
    scale = np.sqrt((features**2).sum(1).mean())
    a = features / scale
    inverse = np.linalg.inv(a.T @ a + lambda2 * np.eye(9))
    expected = [np.sqrt(lambda2 * (t / scale) @ inverse @ (t / scale)) for t in tests]
    np.testing.assert_allclose(posterior(torch.from_numpy(tests)).numpy(), expected, rtol=1e-9)
    assert float(posterior.feature_scale) == pytest.approx(scale, rel=1e-12)
    # u <= |phi| always, and training points are certain compared with a point outside their span
    outside = np.linalg.svd(a)[2][-1] * scale
    u_train, u_outside = posterior(raw).numpy(), float(posterior(torch.from_numpy(outside[None])))
    assert u_outside == pytest.approx(1.0, rel=1e-9)
    assert u_train.max() < 0.02


def test_distance_is_the_naive_minimum() -> None:
    rng = np.random.default_rng(4)
    features, tests = rng.normal(size=(30, 6)) * 4.0, rng.normal(size=(9, 6)) * 4.0
    tests[0] = features[11]
    distance = DistanceUncertainty(6)
    distance.fit(torch.from_numpy(features))
    scale = np.sqrt(np.mean([f @ f for f in features]))
    expected = [max(min(np.sum((t - f) ** 2) for f in features) / scale**2, 1e-8) ** 0.5 for t in tests]
    assert expected[0] == 1e-4
    np.testing.assert_allclose(distance(torch.from_numpy(tests)).numpy(), expected, rtol=1e-12)
    assert float(distance.feature_scale) == pytest.approx(scale, rel=1e-12)


def test_distance_keeps_features_that_lie_far_from_each_other() -> None:
    """Farthest points from a drawn one on; their scale is that of all features, and the seed decides."""
    features = np.random.default_rng(5).normal(size=(40, 3))
    scale = np.sqrt(np.mean([f @ f for f in features]))
    drawn = set()
    for seed in range(4):
        distance = DistanceUncertainty(3)
        distance.fit(torch.from_numpy(features), 7, seed)
        kept = distance.references.numpy() * scale
        indices = [int(np.argmin(np.abs(features - row).sum(1))) for row in kept]
        drawn.add(indices[0])
        chosen = indices[:1]
        while len(chosen) < 7:
            nearest = [min(np.linalg.norm(f - features[k]) for k in chosen) for f in features]
            chosen.append(int(np.argmax(nearest)))
        assert indices == chosen
        np.testing.assert_allclose(kept, features[chosen], rtol=1e-12)
    assert len(drawn) > 1
    distance.fit(torch.from_numpy(features), 99, 0)
    assert len(distance.references) == 40


@pytest.mark.parametrize("kind", ["posterior", "distance"])
def test_gradients_of_several_structures_are_those_of_autograd(kind: str) -> None:
    """`with_gradient`, in closed form; rows do not depend on each other."""
    features = torch.randn(30, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    uncertainty: PosteriorUncertainty | DistanceUncertainty
    if kind == "posterior":
        uncertainty = PosteriorUncertainty(12)
        uncertainty.fit(features[:20].T @ features[:20], 20, lambda2=1e-3)
    else:
        uncertainty = DistanceUncertainty(12)
        uncertainty.fit(features[:20])
    uncertainty.calibration.fill_(1.7)
    rows = features[20:].clone().requires_grad_(True)
    expected = uncertainty(rows)
    (slopes,) = torch.autograd.grad(expected.sum(), rows)
    found, gradient = uncertainty.with_gradient(features[20:])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-13, atol=0.0)
    torch.testing.assert_close(gradient, slopes, rtol=1e-12, atol=1e-14)
    scripted = torch.jit.script(uncertainty)
    torch.testing.assert_close(scripted.with_gradient(features[20:])[1], gradient, rtol=0.0, atol=0.0)
    if kind == "distance":  # at the lower bound there is no slope
        u, none = uncertainty.with_gradient(features[3:4])
        assert float(u) == pytest.approx(1.7e-4)
        assert not none.any()


def test_conformal_scale_is_the_inverted_cdf_quantile() -> None:
    rng = np.random.default_rng(1)
    for n in (5, 19, 20, 37, 100):
        for alpha in (0.05, 0.1, 0.5):
            errors, u = rng.normal(size=n), rng.uniform(0.1, 1, n)
            result = conformal_scale(errors, u, alpha)
            ratios = sorted((abs(e) + 1e-8) / (v + 1e-8) for e, v in zip(errors, u, strict=True))
            k = next(k for k in range(1, n + 2) if k >= (n + 1) * (1 - alpha) - 1e-9)  # smallest integer k
            assert result.scale == pytest.approx(ratios[min(k, n) - 1], rel=1e-12)
            assert result.attainable == pytest.approx(1 - alpha if k <= n else n / (n + 1))
            if k <= n:
                quantile = np.quantile(ratios, k / n, method="inverted_cdf")
                assert result.scale == pytest.approx(quantile, rel=1e-12)


def test_conformal_scale_agrees_with_crepes() -> None:
    rng = np.random.default_rng(2)
    errors, u = rng.normal(size=60), rng.uniform(0.1, 1, 60)
    regressor = ConformalRegressor()
    regressor.fit(residuals=errors, sigmas=u)
    interval = regressor.predict_int(y_hat=np.zeros(1), sigmas=np.ones(1), confidence=0.9)
    assert conformal_scale(errors, u, 0.1).scale == pytest.approx(interval[0, 1], rel=1e-5)


def test_conformal_coverage_holds_on_fresh_data() -> None:
    """Split conformal promises 1 - alpha <= coverage <= 1 - alpha + 1/(n + 1) on average over calibration sets."""
    rng = np.random.default_rng(3)
    n, alpha, covered = 19, 0.2, []
    for _ in range(2000):
        u = rng.uniform(0.1, 1, n + 1)
        errors = u * rng.standard_t(3, n + 1)
        q = conformal_scale(errors[:-1], u[:-1], alpha).scale
        covered.append(abs(errors[-1]) <= q * u[-1])
    assert 1 - alpha - 0.025 < np.mean(covered) < 1 - alpha + 1 / (n + 1) + 0.025


def test_conformal_refuses_nonsense() -> None:
    with pytest.raises(DataError, match="at least one"):
        conformal_scale([], [], 0.05)
    with pytest.raises(DataError, match="not finite"):
        conformal_scale([np.nan], [1.0], 0.05)
