"""The loss of a batch and its derivatives with respect to all parameters.

The loss contains forces, so its derivatives need second derivatives of the energy. Instead of a double backward pass:
forward and backward give energies, forces and with them the loss; its derivatives e_i with respect to the atomic
energies and q with respect to the gradients of the pairs are then known numbers, and dL/d(parameters) is the one of
S = sum_i e_i E_i + sum_pairs q · dE/d(edge vector), whose second sum is the derivative of the energy along q. One pass
forward and one backward with values and their derivatives along q (dual numbers) give that. Counted in matrix products
per atom, all of it is six times the energy alone, in few large ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ubmd.data.graph import VOIGT, Batch
from ubmd.potentials.gmnn.loss import Differences, differences, loss
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.network import BIAS_SCALE
from ubmd.settings import TrainingSettings

# With the fused operators one evaluation keeps some 200 bytes per pair and 20 to 40 kilobytes per atom; larger ones
# would not be faster.
PAIRS_PER_CHUNK, ATOMS_PER_CHUNK = 200_000, 2_000


def loss_and_gradients(
    model: GaussianMomentNetwork, batch: Batch, settings: TrainingSettings
) -> tuple[Differences, float]:
    """Errors and loss of a batch; the derivatives of the loss are added to ``.grad`` of every parameter."""
    operators = fused_operators(model)
    if operators is None:
        return _by_autograd(model, batch, settings)
    with torch.no_grad():
        forms = _ClosedForms(operators, model, batch, second=True)
        errors = forms.errors()
        forms.add_gradients(*_cotangents(batch, errors, settings))
        return errors, float(loss(errors, settings))


def prediction_errors(model: GaussianMomentNetwork, batch: Batch) -> Differences:
    """Errors of a batch, without anything that derivatives with respect to parameters would need."""
    operators = fused_operators(model)
    if operators is None:
        return differences(batch, *model.energy_forces_virial(batch))
    with torch.no_grad():
        return _ClosedForms(operators, model, batch, second=False).errors()


def chunk_limits(model: GaussianMomentNetwork) -> tuple[int | None, int | None]:
    """How many pairs and atoms one batch should have at most, as `data.graph.chunks` takes them."""
    return (None, None) if fused_operators(model) is None else (PAIRS_PER_CHUNK, ATOMS_PER_CHUNK)


def fused_operators(model: GaussianMomentNetwork) -> Any | None:
    """The operators that the closed forms need; None: use the plain descriptor and autograd."""
    return torch.ops.ubmd if model.descriptor.operators and model.radial.is_cpu else None


def _by_autograd(model: GaussianMomentNetwork, batch: Batch, settings: TrainingSettings) -> tuple[Differences, float]:
    errors = differences(batch, *model.energy_forces_virial(batch, create_graph=True))
    value = loss(errors, settings)
    # only the parameters: derivatives with respect to the edge vectors would cost a third more
    value.backward(inputs=list(model.parameters()))
    return errors, float(value.detach())


def _cotangents(batch: Batch, errors: Differences, settings: TrainingSettings) -> tuple[Tensor, Tensor]:
    """Derivatives of the loss with respect to atomic energies, [N], and to the energy gradients of pairs, [P, 3]."""
    energy = (2.0 * settings.energy_weight) * errors.energy.index_select(0, batch.structure)
    forces = (2.0 * settings.force_weight) * errors.forces
    pairs = forces.index_select(0, batch.edge_index[0]).sub_(forces.index_select(0, batch.edge_index[1]))
    if settings.stress_weight > 0 and batch.any_stress:
        six = (2.0 * settings.stress_weight) * errors.virial
        virial = six.new_zeros(len(six), 3, 3)
        virial[:, VOIGT[0], VOIGT[1]] += 0.5 * six  # half for either of the two equal off-diagonal elements
        virial[:, VOIGT[1], VOIGT[0]] += 0.5 * six
        if batch.projector is not None:  # the errors are P D P of slabs, with P of `Batch.stress_within`
            virial = batch.projector @ virial @ batch.projector
        parts = zip(batch.by_structure(pairs), batch.by_structure(batch.edge_vector), virial, strict=True)
        for q, vectors, own in parts:
            q.addmm_(vectors, own)
    return energy, pairs


class _ClosedForms:
    """A batch's energies and forces, and (``second``) what remains of them for the second pass, `add_gradients`.

    Notation of `models.network`; moments [n, 20, S], and ``_bar`` for energy gradients of moments and invariants.
    """

    def __init__(self, operators: Any, model: GaussianMomentNetwork, batch: Batch, second: bool) -> None:
        self.operators, self.model, self.batch = operators, model, batch
        descriptor = model.descriptor
        self.n_radial = descriptor.n_radial
        self.pairs = (
            batch.species,
            batch.first,
            batch.neighbours,
            batch.edge_vector,
            model.radial,
            descriptor.cutoff,
            descriptor.r_min,
        )
        self.network = model.network.folded()
        self.moments = operators.moments(*self.pairs)
        delta3 = (model.constant * model.scale).index_select(0, batch.species).to(model.radial.dtype).unsqueeze(1)
        x0 = operators.invariants(self.moments, self.n_radial)
        if second:
            self.y, self.invariants_bar, self.layers = self.network.evaluate(x0, delta3)
        else:
            self.y, self.invariants_bar = self.network.energies(x0, delta3)
        self.moments_bar = operators.invariants_vjp(self.moments, self.n_radial, self.invariants_bar)

    def errors(self) -> Differences:
        """Energies, forces and virials minus their labels."""
        batch = self.batch
        atomic = self.model.atomic_energies(self.y, batch.species)
        energies = atomic.new_zeros(batch.n_structures).index_add_(0, batch.structure, atomic)
        gradient = self.operators.moments_vjp(*self.pairs, self.moments_bar)
        virials = batch.virials_from(gradient) if batch.any_stress else gradient.new_zeros(batch.n_structures, 3, 3)
        return differences(batch, energies, batch.forces_from(gradient), virials)

    def add_gradients(self, e: Tensor, q: Tensor) -> None:
        """Add dS/d(parameter) to every parameter's ``.grad``; e [n] and q [P, 3] as at the top of this file.

        ``_dot``: derivative along q; ``_bar``: derivative of S with respect to that quantity.
        """
        layers, network, operators = self.layers, self.network, self.operators
        moments_dot = operators.moments_jvp(*self.pairs, q)
        x0_dot = operators.invariants_jvp(self.moments, self.n_radial, moments_dot)
        z1_dot = network.product(x0_dot, network.weight1.t())
        x1_dot = layers.s1 * z1_dot
        z2_dot = network.product(x1_dot, network.weight2.t())
        x2_dot = layers.s2 * z2_dot
        e_column = e.to(x2_dot.dtype).unsqueeze(1)
        z2_bar = z2_dot.mul_(layers.curvature2).addcmul_(e_column, layers.delta2)
        z1_bar = z1_dot.mul_(layers.curvature1).addcmul_(layers.s1, network.product(z2_bar, network.weight2))

        self._add_to_layer(1, z1_bar, layers.x0, layers.delta1, x0_dot)
        self._add_to_layer(2, z2_bar, layers.x1, layers.delta2, x1_dot)
        self._add_to_layer(3, e_column * layers.delta3, layers.x2, layers.delta3, x2_dot)
        self._add_to_energies(e, torch.mv(x2_dot, network.weight3[0]))
        if self.model.centred:
            self._add_to_lone_output(e)

        x0_bar = network.product(z1_bar, network.weight1)
        moments_bar = operators.invariants_second(self.moments, self.n_radial, moments_dot, x0_bar, self.invariants_bar)
        _, radial = operators.moments_second(*self.pairs, q, moments_bar, self.moments_bar, False, True)
        _gradient(self.model.radial).add_(radial)

    def _add_to_layer(self, number: int, z_bar: Tensor, x: Tensor, delta: Tensor, x_dot: Tensor) -> None:
        """Gradients of layer z = a·W x + 0.1 b, from z_bar and delta [n, d_out], x and x_dot [n, d_in]."""
        model = self.model
        scale = (model.network.input_scale, model.network.scale1, model.network.scale2)[number - 1]
        gradient = self.network.product(z_bar.t(), x)
        gradient = self.network.product(delta.t(), x_dot, gradient)
        _gradient(model.weights[number - 1]).add_(gradient, alpha=scale)
        _gradient(model.biases[number - 1]).add_(z_bar.sum(0), alpha=BIAS_SCALE)

    def _add_to_energies(self, e: Tensor, y_dot: Tensor) -> None:
        """Gradients of the scales and shifts of the elements."""
        model, species = self.model, self.batch.species
        y = self.y - model.lone_output() if model.centred else self.y
        _gradient(model.scale).index_add_(0, species, model.constant * (e * y + y_dot))
        _gradient(model.shift).index_add_(0, species, model.constant * e)

    def _add_to_lone_output(self, e: Tensor) -> None:
        """Gradients of -sum_i e_i c sigma_i NN(0): of one atom, so that autograd costs nothing."""
        model = self.model
        factor = -(e * (model.constant * model.scale).index_select(0, self.batch.species)).sum()
        with torch.enable_grad():
            (factor * model.lone_output()).backward(inputs=[*model.weights, *model.biases])


def _gradient(parameter: nn.Parameter) -> Tensor:
    """``.grad`` to add to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
