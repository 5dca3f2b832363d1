"""Gradients of the loss in closed form against automatic differentiation of the plain descriptor and network."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from small_model import labelled, with_emt_labels
from torch import Tensor

from ubmd.data.graph import Batch, build_graph, chunks, collate, scatter_forces, strain_gradient
from ubmd.operators import available
from ubmd.potentials.gmnn import gradient
from ubmd.potentials.gmnn.gaussian_moments import GaussianMoments
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.trainer import train
from ubmd.process import keep_freed_memory
from ubmd.settings import ModelSettings, TrainingSettings

MODEL = ModelSettings(cutoff=4.0, n_radial=3, n_basis=4, hidden=(16, 12))
ELEMENTS = ["H", "C", "O", "Cu"]


# ------------------------------------------------------------- operators by automatic differentiation


def pull(function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor, keep: bool = False) -> Tensor:
    """cotangent · d function/dx."""
    return torch.autograd.grad((cotangent * function(x)).sum(), x, create_graph=keep, allow_unused=True)[0]


def push(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    """d function/dx · tangent, as the derivative of the (linear) pull with respect to its cotangent."""
    cotangent = torch.zeros_like(function(x)).requires_grad_(True)
    return torch.autograd.grad((pull(function, x, cotangent, keep=True) * tangent).sum(), cotangent)[0]


class Operators:
    """Stand-in for the operator library: the plain descriptor, differentiated by autograd."""

    def __init__(self, descriptor: GaussianMoments) -> None:
        self.plain = descriptor

    def _moments(self, species: Tensor, first: Tensor, neighbours: Tensor) -> Callable[[Tensor], Tensor]:
        centre = torch.repeat_interleave(torch.arange(len(species)), first.diff())
        return lambda vectors: self.plain.moments(species, centre, neighbours, vectors)

    @torch.enable_grad()
    def moments(self, species, first, neighbours, vectors, radial, cutoff, r_min):
        return self._moments(species, first, neighbours)(vectors).detach()

    @torch.enable_grad()
    def moments_vjp(self, species, first, neighbours, vectors, radial, cutoff, r_min, cotangent):
        return pull(self._moments(species, first, neighbours), leaf(vectors), cotangent)

    @torch.enable_grad()
    def moments_jvp(self, species, first, neighbours, vectors, radial, cutoff, r_min, tangent):
        return push(self._moments(species, first, neighbours), leaf(vectors), tangent).detach()

    @torch.enable_grad()
    def moments_second(
        self, species, first, neighbours, vectors, radial, cutoff, r_min, tangent, bar, dot_bar, for_vectors, for_radial
    ):
        assert (for_vectors, for_radial) == (False, True)
        function, vectors = self._moments(species, first, neighbours), leaf(vectors)
        total = (bar * function(vectors)).sum() + (pull(function, vectors, dot_bar, keep=True) * tangent).sum()
        return torch.empty(0), torch.autograd.grad(total, self.plain.radial)[0]

    @torch.no_grad()
    def invariants(self, moments, n_radial):
        return self.plain.invariants(moments)

    @torch.enable_grad()
    def invariants_vjp(self, moments, n_radial, cotangent):
        return pull(self.plain.invariants, leaf(moments), cotangent)

    @torch.enable_grad()
    def invariants_jvp(self, moments, n_radial, tangent):
        return push(self.plain.invariants, leaf(moments), tangent)

    @torch.enable_grad()
    def invariants_second(self, moments, n_radial, tangent, bar, dot_bar):
        moments = leaf(moments)
        total = (bar * self.plain.invariants(moments)).sum()
        total = total + (pull(self.plain.invariants, moments, dot_bar, keep=True) * tangent).sum()
        return torch.autograd.grad(total, moments)[0]


def leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_(True)


@pytest.fixture(params=["stand-in", "library"])
def closed_forms(request, monkeypatch) -> None:
    """Closed forms with the stand-in, whether or not there is a library, and with the library."""
    if request.param == "library":
        if not available():
            pytest.skip("the operator library is not installed")
        assert gradient.fused_operators(GaussianMomentNetwork(ELEMENTS, MODEL)) is torch.ops.ubmd
        return
    monkeypatch.setattr("ubmd.potentials.gmnn.model.available", lambda: False)
    monkeypatch.setattr(gradient, "fused_operators", lambda model: Operators(model.descriptor))


@contextmanager
def plain_torch() -> Iterator[None]:
    """Models made in here have nothing but the plain descriptor and autograd."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ubmd.potentials.gmnn.model.available", lambda: False)
        patch.setattr(gradient, "fused_operators", lambda model: None)
        yield


# ---------------------------------------------------------------------------------------------- tests


def shaken(atoms: Atoms, seed: int) -> Atoms:
    """With random labels; cells with EMT labels, which include the stress."""
    atoms = labelled(atoms, seed)
    return with_emt_labels(atoms) if atoms.pbc.all() else atoms


def lonely() -> Atoms:
    """Carbon monoxide and a hydrogen atom out of everyone's reach."""
    return Atoms("COH", positions=[[0, 0, 0], [1.1, 0, 0], [30, 0, 0]])


BATCHES = {
    "molecules": [molecule("CH3OH"), molecule("H2O"), molecule("CH4")],
    "cells": [bulk("Cu", cubic=True), bulk("Cu")],
    "cells and molecules": [molecule("CH3OH"), bulk("Cu", cubic=True), Atoms("H"), lonely()],
    "no pairs": [Atoms("H"), Atoms("O")],
    "one atom": [Atoms("C")],
}


def batch_of(name: str) -> Batch:
    graphs = [build_graph(shaken(atoms, seed), ELEMENTS, MODEL.cutoff) for seed, atoms in enumerate(BATCHES[name])]
    return collate(graphs)


def model_of(dtype: torch.dtype, settings: ModelSettings = MODEL) -> GaussianMomentNetwork:
    """All parameters away from their initial values."""
    model = GaussianMomentNetwork(ELEMENTS, settings, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (*model.biases, model.scale, model.shift):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        model.constant.fill_(0.3)
    return model.to_network_dtype(dtype)


def gradients(model: GaussianMomentNetwork, batch: Batch, settings: TrainingSettings) -> tuple[dict, float, object]:
    """Gradients of all parameters, loss and errors."""
    model.zero_grad(set_to_none=True)
    errors, loss = gradient.loss_and_gradients(model, batch, settings)
    return {name: parameter.grad for name, parameter in model.named_parameters()}, loss, errors


def by_autograd(
    dtype: torch.dtype, batch: Batch, settings: TrainingSettings, model: ModelSettings = MODEL
) -> tuple[dict, float, object]:
    """The same from the plain path."""
    with plain_torch():
        return gradients(model_of(dtype, model), batch, settings)


def relative(value: Tensor, expected: Tensor) -> float:
    """Difference over the norm of what is expected (zero for two zeros)."""
    return float((value - expected).norm() / expected.norm().clamp(min=1e-300))


CENTRED = MODEL.model_copy(update={"atom_energies": dict.fromkeys(ELEMENTS, 0.0)})  # an atom alone has no energy


@pytest.mark.parametrize("settings", [MODEL, CENTRED], ids=["shifts", "centred"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("weights", [(1.0, 4.0, 0.01), (0.3, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 0.5)])
def test_gradients_are_those_of_autograd(closed_forms, name, weights, settings):
    """Every parameter, the errors and the loss; energies, forces and stresses together and alone."""
    chosen = TrainingSettings(**dict(zip(("energy_weight", "force_weight", "stress_weight"), weights, strict=True)))
    model, batch = model_of(torch.float64, settings), batch_of(name)
    expected, expected_loss, expected_errors = by_autograd(torch.float64, batch, chosen, settings)
    found, loss, errors = gradients(model, batch, chosen)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for field in ("energy", "forces", "virial", "has_stress"):
        torch.testing.assert_close(getattr(errors, field), getattr(expected_errors, field), rtol=1e-11, atol=1e-11)
    assert found.keys() == expected.keys()
    rounding = 1e-12 if settings is CENTRED else 0.0  # of derivatives that are zero, e.g. by the last bias
    for key, value in expected.items():
        reference = torch.zeros_like(found[key]) if value is None else value
        assert relative(found[key], reference) < 1e-10 or float((found[key] - reference).norm()) < rounding, key


def test_gradients_add_up(closed_forms):
    """A second call adds to ``.grad``, as the chunks of a mini-batch need."""
    model, batch, chosen = model_of(torch.float64), batch_of("molecules"), TrainingSettings()
    once = {name: value.clone() for name, value in gradients(model, batch, chosen)[0].items()}
    gradient.loss_and_gradients(model, batch, chosen)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-12, atol=0)


def test_float32_network(closed_forms):
    """Within the rounding of float32 of the float64 gradients."""
    batch, chosen = batch_of("cells and molecules"), TrainingSettings()
    expected, *_ = by_autograd(torch.float64, batch, chosen)
    found, *_ = gradients(model_of(torch.float32), batch, chosen)
    for name, value in expected.items():
        assert relative(found[name].double(), value) < 1e-4, name


def test_errors_without_gradients(closed_forms):
    """The errors of a validation are those of a training step."""
    model, batch = model_of(torch.float64), batch_of("cells and molecules")
    _, _, expected = by_autograd(torch.float64, batch, TrainingSettings())
    model.zero_grad(set_to_none=True)
    errors = gradient.prediction_errors(model, batch)
    for field in ("energy", "forces", "virial"):
        torch.testing.assert_close(getattr(errors, field), getattr(expected, field), rtol=1e-11, atol=1e-11)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", BATCHES)
def test_pairs_of_a_batch(name):
    """Pairs by centre and by structure; sums of pair gradients like those that autograd can follow."""
    batch = batch_of(name)
    centres, neighbours = batch.edge_index
    assert torch.equal(centres, torch.repeat_interleave(torch.arange(len(batch.species)), batch.first.diff()))
    assert torch.equal(batch.neighbours, batch.species[neighbours])
    owner = batch.structure[centres]
    assert batch.pair_counts == torch.bincount(owner, minlength=batch.n_structures).tolist()
    values = torch.randn(len(centres), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        batch.forces_from(values), scatter_forces(batch.edge_index, values, len(batch.species)), rtol=0, atol=1e-12
    )
    expected = strain_gradient(batch.edge_vector, values, owner, batch.n_structures)
    torch.testing.assert_close(batch.virials_from(values), expected, rtol=0, atol=1e-10)


def test_chunks_are_bounded():
    """By atoms and by pairs; a structure that is too large comes alone, and none gets lost."""
    graphs = [build_graph(molecule(name), ELEMENTS, 4.0) for name in ("H2O", "CH3OH", "H2O", "H2O", "H2O")]
    assert [batch.counts.tolist() for batch in chunks(graphs, max_atoms=6)] == [[3], [6], [3, 3], [3]]
    assert [batch.counts.tolist() for batch in chunks(graphs, max_pairs=12)] == [[3], [6], [3, 3], [3]]
    assert [batch.counts.tolist() for batch in chunks(graphs, max_atoms=2)] == [[3], [6], [3], [3], [3]]


def test_training_curves_agree(tmp_path, closed_forms):
    """Closed forms and autograd train alike."""
    structures = [shaken(molecule("CH3OH"), seed) for seed in range(9)]
    chosen = TrainingSettings(epochs=4, batch_size=3, precision="float64", threads=1)

    def curve(name: str) -> list[list[float]]:
        history = train(MODEL, chosen, structures[:6], structures[6:], tmp_path / name, seed=0).history
        return [[row["loss"], row["valid_force_rmse_eV_per_A"]] for row in history]

    found = curve("closed forms")
    with plain_torch():
        np.testing.assert_allclose(found, curve("autograd"), rtol=1e-7)


def test_memory_of_a_step_is_kept_for_the_next():
    """With glibc: steps with tensors of megabytes cause no page faults once the first ones have fetched the memory."""
    if not keep_freed_memory():
        pytest.skip("the C library has no mallopt")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(1 << 20) for _ in range(8)]
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(5)) < 100, "32 MB are 8192 pages"
