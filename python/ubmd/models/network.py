"""The feed-forward network on top of the invariants, with the closed form of its gradient factors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATION_SCALE = 1.6765324703310907  # unit second moment of SiLU under N(0, 1)
BIAS_SCALE = 0.1


class NeuralTangentNetwork(nn.Module):
    """y = NN(G): two hidden layers in the neural-tangent parameterisation.

    z^l = d_{l-1}^(-1/2) W^l x^{l-1} + 0.1 b^l,  x^l = 1.6765 SiLU(z^l),  y = z^3.
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

    def forward(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x0 [n, F] -> y [n], hidden states x1, x2 [n, d_l] and activation slopes s1, s2 [n, d_l]."""
        z1 = F.linear(x0 * self.input_scale, self.weight1, self.bias_scale * self.bias1)
        x1, s1 = activation(z1)
        z2 = F.linear(x1 * self.scale1, self.weight2, self.bias_scale * self.bias2)
        x2, s2 = activation(z2)
        y = F.linear(x2 * self.scale2, self.weight3, self.bias_scale * self.bias3)
        return y.squeeze(1), x1, x2, s1, s2

    def gradient_factors(self, s1: Tensor, s2: Tensor, delta3: Tensor) -> tuple[Tensor, Tensor]:
        """delta^1, delta^2 [n, d_l] of dE/dz^l = d_l^(-1/2) (W^{l+1}^T delta^{l+1}) act'(z^l), from delta^3 [n, 1]."""
        delta2 = (delta3 * (self.scale2 * self.weight3)) * s2
        delta1 = torch.mm(delta2 * self.scale1, self.weight2) * s1
        return delta1, delta2

    def input_gradient(self, delta1: Tensor) -> Tensor:
        """dE/dx0 [n, F] from delta^1."""
        return torch.mm(delta1 * self.input_scale, self.weight1)


def activation(z: Tensor, scale: float = ACTIVATION_SCALE) -> tuple[Tensor, Tensor]:
    """Scaled SiLU and its derivative: c z s, c s (1 + z (1 - s)) with s = sigmoid(z)."""
    sigmoid = torch.sigmoid(z)
    x = z * sigmoid
    return scale * x, scale * (sigmoid + x * (1.0 - sigmoid))
