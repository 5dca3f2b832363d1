"""Sketched gradient features: random projections of dE_i/d(weights), layer by layer, without building that gradient.

phi_i = sum_l (P_in^l x~_i^{l-1}) * (P_out^l delta_i^l), with x~^{l-1} = (d_{l-1}^(-1/2) x^{l-1}, 0.1) and
delta^l = dE_i/dz^l (Zaverkin et al., npj Comput. Mater. 10, 83 (2024); Holzmueller et al., JMLR 24, 164 (2023)).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ubmd.models.network import BIAS_SCALE, NeuralTangentNetwork


class GradientSketch(nn.Module):
    """The fixed projections; parameters that are never trained, so that they follow the network's precision.

    ``inner`` holds P_in^l (p x (d_{l-1} + 1), last column for the bias) and ``outer`` P_out^l (p x d_l); the layer with
    one output needs no outer projection.
    """

    def __init__(self, sizes: tuple[int, int, int], projections: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inner = [torch.randn(projections, d + 1, generator=generator, dtype=torch.float64) for d in sizes]
        outer = [torch.randn(projections, d, generator=generator, dtype=torch.float64) for d in sizes[1:]]
        self.set_projections(inner, outer)

    def set_projections(self, inner: list[Tensor], outer: list[Tensor]) -> None:
        """Use these matrices; the factors of x~ are folded into them once."""
        self.projections = len(inner[0])
        (self.inner1, self.inner_bias1), (self.inner2, self.inner_bias2), (self.inner3, self.inner_bias3) = (
            _inner_parameters(matrix) for matrix in inner
        )
        self.outer1, self.outer2 = (_fixed(matrix) for matrix in outer)

    def forward(self, x0: Tensor, x1: Tensor, x2: Tensor, delta1: Tensor, delta2: Tensor, delta3: Tensor) -> Tensor:
        """phi [n, p] from the inputs x^{l-1} [n, d_{l-1}] and gradient factors delta^l [n, d_l] of the three layers."""
        layer1 = F.linear(x0, self.inner1, self.inner_bias1) * F.linear(delta1, self.outer1)
        layer2 = F.linear(x1, self.inner2, self.inner_bias2) * F.linear(delta2, self.outer2)
        layer3 = F.linear(x2, self.inner3, self.inner_bias3) * delta3
        return layer1 + layer2 + layer3


class LastLayerSketch(nn.Module):
    """The third layer's part of the sketch alone: cheap, because it needs no gradient factors of hidden layers."""

    def __init__(self, size: int, projections: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inner = torch.randn(projections, size + 1, generator=generator, dtype=torch.float64)
        self.projections = projections
        self.inner3, self.inner_bias3 = _inner_parameters(inner)

    def forward(self, x2: Tensor, delta3: Tensor) -> Tensor:
        """phi [n, p] from the last hidden state [n, d_2] and delta^3 [n, 1]."""
        return F.linear(x2, self.inner3, self.inner_bias3) * delta3


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def _inner_parameters(matrix: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights [p, d] and biases [p] of P_in [p, d + 1], with the factors of x~ folded in."""
    return _fixed(matrix[:, :-1] / (matrix.size(1) - 1) ** 0.5), _fixed(BIAS_SCALE * matrix[:, -1])


def make_sketch(network: NeuralTangentNetwork, projections: int, seed: int) -> GradientSketch:
    """The sketch for a network's layer sizes."""
    sizes = (network.weight1.size(1), network.weight2.size(1), network.weight3.size(1))
    return GradientSketch(sizes, projections, seed)
