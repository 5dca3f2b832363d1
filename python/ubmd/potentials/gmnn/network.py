"""The feed-forward network on top of the invariants, with its derivatives in closed form.

Notation: a_l = d_l^(-1/2); z^l = a_{l-1} W^l x^{l-1} + 0.1 b^l; s, t the first two derivatives of the activation.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ubmd.operators import Products, activation, use_operators

BIAS_SCALE = 0.1


class Layers(NamedTuple):
    """What one evaluation leaves behind for features and derivatives, for n atoms.

    x0 [n, F], x1, x2 [n, d_l]: inputs of the three layers; s1, s2 [n, d_l]: slopes of the activation;
    delta1, delta2 [n, d_l], delta3 [n, 1]: dE/dz^l; curvature1, curvature2 [n, d_l]: t^l dE/dx^l.
    """

    x0: Tensor
    x1: Tensor
    x2: Tensor
    s1: Tensor
    s2: Tensor
    delta1: Tensor
    delta2: Tensor
    delta3: Tensor
    curvature1: Tensor
    curvature2: Tensor


class NeuralTangentNetwork(Products):
    """y = NN(G): two hidden layers in the neural-tangent parameterisation.

    z^l = d_{l-1}^(-1/2) W^l x^{l-1} + 0.1 b^l,  x^l = 1.6765 SiLU(z^l),  y = z^3.

    ``forward``, ``gradient_factors`` and ``input_gradient`` can be differentiated by autograd. ``energies``,
    ``evaluate``, ``tangent`` and ``input_tangent`` are closed forms for callers that need no autograd graph; they are
    methods of the `folded` network.
    """

    def __init__(self, n_inputs: int, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.bias_scale = BIAS_SCALE
        self.input_scale = 1.0 / math.sqrt(n_inputs)
        self.scale1 = 1.0 / math.sqrt(hidden[0])
        self.scale2 = 1.0 / math.sqrt(hidden[1])
        self.weight1 = nn.Parameter(torch.empty(hidden[0], n_inputs))
        self.bias1 = nn.Parameter(torch.empty(hidden[0]))
        self.weight2 = nn.Parameter(torch.empty(hidden[1], hidden[0]))
        self.bias2 = nn.Parameter(torch.empty(hidden[1]))
        self.weight3 = nn.Parameter(torch.empty(1, hidden[1]))
        self.bias3 = nn.Parameter(torch.empty(1))

    def folded(self) -> "NeuralTangentNetwork":
        """The same function with the factors a_l and 0.1 inside its weights (copies), so that products need none."""
        twin = NeuralTangentNetwork(self.weight1.size(1), (self.weight1.size(0), self.weight2.size(0)))
        use_operators(twin, self.operators)
        twin.weight1 = fixed(self.input_scale * self.weight1)
        twin.weight2 = fixed(self.scale1 * self.weight2)
        twin.weight3 = fixed(self.scale2 * self.weight3)
        twin.bias1, twin.bias2, twin.bias3 = (
            fixed(self.bias_scale * bias) for bias in (self.bias1, self.bias2, self.bias3)
        )
        twin.bias_scale = twin.input_scale = twin.scale1 = twin.scale2 = 1.0
        return twin

    def forward(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x0 [n, F] -> y [n], hidden states x1, x2 [n, d_l] and activation slopes s1, s2 [n, d_l]."""
        layer1 = activation(self.hidden1(x0), 1)
        layer2 = activation(self.hidden2(layer1[0]), 1)
        return self.output(layer2[0]), layer1[0], layer2[0], layer1[1], layer2[1]

    def hidden1(self, x0: Tensor) -> Tensor:
        """z^1 [n, d_1]."""
        return torch.addmm(self.bias1, x0, self.weight1.t(), beta=self.bias_scale, alpha=self.input_scale)

    def hidden2(self, x1: Tensor) -> Tensor:
        """z^2 [n, d_2]."""
        return torch.addmm(self.bias2, x1, self.weight2.t(), beta=self.bias_scale, alpha=self.scale1)

    def output(self, x2: Tensor) -> Tensor:
        """y [n]."""
        bias = self.bias3.expand(x2.size(0))  # of no atoms, torch would return one number
        return torch.addmv(bias, x2, self.weight3[0], beta=self.bias_scale, alpha=self.scale2)

    def gradient_factors(self, s1: Tensor, s2: Tensor, delta3: Tensor) -> tuple[Tensor, Tensor]:
        """delta^1, delta^2 [n, d_l] of dE/dz^l = d_l^(-1/2) (W^{l+1}^T delta^{l+1}) act'(z^l), from delta^3 [n, 1]."""
        delta2 = self.hidden2_gradient(delta3) * s2
        return self.hidden1_gradient(delta2) * s1, delta2

    def hidden2_gradient(self, delta3: Tensor) -> Tensor:
        """dE/dx2 [n, d_2] from delta^3 [n, 1]."""
        return delta3 * (self.scale2 * self.weight3)

    def hidden1_gradient(self, delta2: Tensor) -> Tensor:
        """dE/dx1 [n, d_1] from delta^2."""
        return torch.addmm(self.bias1, delta2, self.weight2, beta=0.0, alpha=self.scale1)

    def input_gradient(self, delta1: Tensor) -> Tensor:
        """dE/dx0 [n, F] from delta^1."""
        return torch.addmm(self.weight1[:1], delta1, self.weight1, beta=0.0, alpha=self.input_scale)

    def energies(self, x0: Tensor, delta3: Tensor) -> tuple[Tensor, Tensor]:
        """y [n] and dE/dx0 [n, F]; delta3 = dE/dy [n, 1]."""
        if self.operators and x0.is_cpu:
            found = self._by_operator(x0, delta3, False)
            return found[0], found[1]
        layer1 = self.activation(self.product(x0, self.weight1.t(), self.bias1), 1)
        layer2 = self.activation(self.product(layer1[0], self.weight2.t(), self.bias2), 1)
        delta2 = layer2[1].mul_(delta3 * self.weight3)
        delta1 = self.product(delta2, self.weight2).mul_(layer1[1])
        return self.output(layer2[0]), self.product(delta1, self.weight1)

    def evaluate(self, x0: Tensor, delta3: Tensor) -> tuple[Tensor, Tensor, Layers]:
        """y [n], dE/dx0 [n, F], and what features and second derivatives need; delta3 = dE/dy [n, 1]."""
        if self.operators and x0.is_cpu:
            y, slope, x1, x2, s1, s2, delta1, delta2, curvature1, curvature2 = self._by_operator(x0, delta3, True)
            return y, slope, Layers(x0, x1, x2, s1, s2, delta1, delta2, delta3, curvature1, curvature2)
        y, slope, kept, z2 = self.evaluate_for_bias(x0, delta3)
        return y, slope, self.with_second_layer(kept, z2)

    def evaluate_for_bias(self, x0: Tensor, delta3: Tensor) -> tuple[Tensor, Tensor, Layers, Tensor]:
        """The same with z2 [n, d_2] in place of slopes and curvatures of the second layer, which then are empty."""
        none = x0.new_empty(0)
        if self.operators and x0.is_cpu:
            y, slope, x1, x2, s1, z2, delta1, delta2, curvature1 = self._by_operator(x0, delta3, True, True)
            return y, slope, Layers(x0, x1, x2, s1, none, delta1, delta2, delta3, curvature1, none), z2
        layer1 = self.activation(self.product(x0, self.weight1.t(), self.bias1), 2)
        z2 = self.product(layer1[0], self.weight2.t(), self.bias2)
        layer2 = self.activation(z2, 1)
        delta2 = (delta3 * self.weight3).mul_(layer2[1])
        back1 = self.product(delta2, self.weight2)
        curvature1 = layer1[2].mul_(back1)
        delta1 = back1.mul_(layer1[1])
        layers = Layers(
            x0=x0,
            x1=layer1[0],
            x2=layer2[0],
            s1=layer1[1],
            s2=none,
            delta1=delta1,
            delta2=delta2,
            delta3=delta3,
            curvature1=curvature1,
            curvature2=none,
        )
        return self.output(layer2[0]), self.product(delta1, self.weight1), layers, z2

    def with_second_layer(self, layers: Layers, z2: Tensor) -> Layers:
        """Layers of `evaluate_for_bias` with slopes and curvatures of the second one."""
        if self.operators and z2.is_cpu:
            found: list[Tensor] = torch.ops.ubmd.second_layer(z2, layers.delta3, self.weight3)
            s2, curvature2 = found[0], found[1]
        else:
            _, s2, curvature2 = self.activation(z2, 2)
            curvature2 = curvature2.mul_(layers.delta3 * self.weight3)
        return Layers(
            x0=layers.x0,
            x1=layers.x1,
            x2=layers.x2,
            s1=layers.s1,
            s2=s2,
            delta1=layers.delta1,
            delta2=layers.delta2,
            delta3=layers.delta3,
            curvature1=layers.curvature1,
            curvature2=curvature2,
        )

    def _by_operator(self, x0: Tensor, delta3: Tensor, keep: bool, for_bias: bool = False) -> list[Tensor]:
        """All of it in one operator: y, dE/dx0, and to ``keep`` the layers; ``for_bias`` as `evaluate_for_bias`."""
        found: list[Tensor] = torch.ops.ubmd.network(
            x0, delta3, self.weight1, self.bias1, self.weight2, self.bias2, self.weight3, self.bias3, keep, for_bias
        )
        return found

    def tangent(
        self, layers: Layers, zdot1: Tensor, base2: Tensor, top: Tensor, base1: Tensor, base0: Tensor
    ) -> Tensor:
        """dD/dx0 [n, F] of a directional derivative D of the energies.

        A direction in the weights moves z^1 by zdot1 and z^2 by base2 + a_1 W^2 (s^1 zdot^1). D depends on x^l by
        base_l [n, d_l] (top for the last one) directly, and through the layers above it:
        zbar^2 = s^2 top + t^2 zdot^2 dE/dx^2,  zbar^1 = s^1 (base1 + a_1 W^2^T zbar^2) + t^1 zdot^1 dE/dx^1,
        dD/dx0 = base0 + a_0 W^1^T zbar^1. ``zdot1`` is written over.
        """
        zdot2 = self.product(layers.s1 * zdot1, self.weight2.t(), base2)
        zbar2 = zdot2.mul_(layers.curvature2).addcmul_(layers.s2, top)
        xbar1 = self.product(zbar2, self.weight2, base1)
        zbar1 = zdot1.mul_(layers.curvature1).addcmul_(layers.s1, xbar1)
        return self.product(zbar1, self.weight1, base0)

    def input_tangent(self, layers: Layers, xdot0: Tensor) -> Tensor:
        """d(dE/dx0 · xdot0)/dx0 [n, F]: the network's Hessian times xdot0 [n, F]."""
        zdot1 = self.product(xdot0, self.weight1.t())
        xdot1 = layers.s1 * zdot1
        zdot2 = self.product(xdot1, self.weight2.t())
        zbar2 = zdot2.mul_(layers.curvature2)
        zbar1 = zdot1.mul_(layers.curvature1).addcmul_(layers.s1, self.product(zbar2, self.weight2))
        return self.product(zbar1, self.weight1)


def fixed(tensor: Tensor) -> nn.Parameter:
    """A parameter that is never trained, so that it follows the network's precision."""
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
