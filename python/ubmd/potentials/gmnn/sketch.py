"""Sketched gradient features: random projections of dE_i/d(weights), layer by layer, without building that gradient.

phi_i = sum_l (P_in^l x~_i^{l-1}) * (P_out^l delta_i^l), with x~^{l-1} = (d_{l-1}^(-1/2) x^{l-1}, 0.1) and
delta^l = dE_i/dz^l (Zaverkin et al., npj Comput. Mater. 10, 83 (2024); Holzmueller et al., JMLR 24, 164 (2023)).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ubmd.operators import Products
from ubmd.potentials.gmnn.network import BIAS_SCALE, Layers, NeuralTangentNetwork, fixed


class GradientSketch(Products):
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
        self.outer1, self.outer2 = (fixed(matrix) for matrix in outer)

    def forward(self, x0: Tensor, x1: Tensor, x2: Tensor, delta1: Tensor, delta2: Tensor, delta3: Tensor) -> Tensor:
        """phi [n, p] from the inputs x^{l-1} [n, d_{l-1}] and gradient factors delta^l [n, d_l] of the three layers."""
        layer1 = F.linear(x0, self.inner1, self.inner_bias1) * F.linear(delta1, self.outer1)
        layer2 = F.linear(x1, self.inner2, self.inner_bias2) * F.linear(delta2, self.outer2)
        layer3 = F.linear(x2, self.inner3, self.inner_bias3) * delta3
        return layer1 + layer2 + layer3

    def by_structure(self, n: int) -> bool:
        """Whether the sum of the features and its gradient cost fewer multiply-adds by structure than atom by atom.

        With the layers' sizes F, d_1, d_2, M = F d_1 + d_1 d_2 and H = d_1 d_2: by structure
        n (4 M + H) + 2 p M (weight gradient M, tangent pass 3 M + H, and twice p M for the whole structure);
        atom by atom n (M + H + p (2 F + 4 d_1 + 3 d_2)).
        """
        p, d0, d1, d2 = self.projections, self.inner1.size(1), self.outer1.size(1), self.outer2.size(1)
        layers, hidden = d0 * d1 + d1 * d2, d1 * d2
        return n * (4 * layers + hidden) + 2 * p * layers < n * (layers + hidden + p * (2 * d0 + 4 * d1 + 3 * d2))

    def features(self, layers: Layers, by_structure: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """(sums, phi [n, p], factors). By structure the sums are weight gradients, and phi has no rows."""
        if by_structure:
            return self.weight_gradients(layers), layers.x0.new_zeros(0, self.projections), []
        if self.operators and layers.x0.is_cpu:
            found: list[Tensor] = torch.ops.ubmd.sketch_features(
                layers.x0, layers.x1, layers.x2, layers.delta1, layers.delta2, layers.delta3, self.matrices()
            )
            return [found[0].sum(0, dtype=torch.float64)], found[0], found[1:]
        inner1 = self.product(layers.x0, self.inner1.t(), self.inner_bias1)
        outer1 = self.product(layers.delta1, self.outer1.t())
        inner2 = self.product(layers.x1, self.inner2.t(), self.inner_bias2)
        outer2 = self.product(layers.delta2, self.outer2.t())
        inner3 = self.product(layers.x2, self.inner3.t(), self.inner_bias3)
        phi = inner3.mul_(layers.delta3).addcmul_(inner1, outer1).addcmul_(inner2, outer2)
        return [phi.sum(0, dtype=torch.float64)], phi, [inner1, outer1, inner2, outer2]

    def matrices(self) -> list[Tensor]:
        """All projections and biases, as the operator takes them."""
        return [
            self.inner1,
            self.inner_bias1,
            self.outer1,
            self.inner2,
            self.inner_bias2,
            self.outer2,
            self.inner3,
            self.inner_bias3,
        ]

    def weight_gradients(self, layers: Layers) -> list[Tensor]:
        """sum_i delta_i^l x_i^{l-1}^T and sum_i delta_i^l of the three layers."""
        return [
            self.product(layers.delta1.t(), layers.x0),
            layers.delta1.sum(0),
            self.product(layers.delta2.t(), layers.x1),
            layers.delta2.sum(0),
            torch.mm(layers.delta3.t(), layers.x2),
            layers.delta3.sum(0),
        ]

    def feature_sum(self, sums: list[Tensor]) -> Tensor:
        """sum_i phi_i [p] (float64) from the sums of ``features``."""
        if len(sums) == 1:
            return sums[0]
        weight1, bias1, weight2, bias2, weight3, bias3 = sums
        layer1 = (
            contracted(self.product(self.outer1, weight1), self.inner1)
            + torch.mv(self.outer1, bias1) * self.inner_bias1
        )
        layer2 = (
            contracted(self.product(self.outer2, weight2), self.inner2)
            + torch.mv(self.outer2, bias2) * self.inner_bias2
        )
        layer3 = torch.mv(self.inner3, weight3[0]) + bias3 * self.inner_bias3
        return (layer1 + layer2 + layer3).to(torch.float64)

    def directions(self, w: Tensor, by_structure: bool) -> list[Tensor]:
        """By structure the direction in the weights and biases along which E_i changes by w·phi_i; else w and v^3."""
        w = w.to(self.inner3.dtype)
        last = torch.mv(self.inner3.t(), w)
        if not by_structure:
            return [w, last]
        outer1, outer2 = (self.outer1 * w.unsqueeze(1)).t(), (self.outer2 * w.unsqueeze(1)).t()
        return [
            self.product(outer1, self.inner1),
            torch.mv(outer1, self.inner_bias1),
            self.product(outer2, self.inner2),
            torch.mv(outer2, self.inner_bias2),
            last,
        ]

    def tangents(
        self, layers: Layers, factors: list[Tensor], directions: list[Tensor], w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """zdot1, base2, top, base1, base0 of `NeuralTangentNetwork.tangent` for D = sum_i w·phi_i; w [p] or [n, p]."""
        by_structure = len(factors) == 0
        if by_structure:
            weight1, bias1, weight2, bias2, last = directions
            return (
                self.product(layers.x0, weight1.t(), bias1),
                self.product(layers.x1, weight2.t(), bias2),
                layers.delta3 * last,
                self.product(layers.delta2, weight2),
                self.product(layers.delta1, weight1),
            )
        inner1, outer1, inner2, outer2 = factors
        if len(directions) == 0:  # w is different from atom to atom
            w = w.to(self.inner3.dtype)
            last = self.product(w, self.inner3)
        else:
            w, last = directions
        return (
            self.product(inner1 * w, self.outer1),
            self.product(inner2 * w, self.outer2),
            layers.delta3 * last,
            self.product(outer2 * w, self.inner2),
            self.product(outer1 * w, self.inner1),
        )

    def gradient(
        self,
        layers: Layers,
        factors: list[Tensor],
        directions: list[Tensor],
        w: Tensor,
        weight1: Tensor,
        weight2: Tensor,
    ) -> Tensor:
        """dD/dx0 [n, F] of D = sum_i w·phi_i, atom by atom, by the operator: ``tangents`` and the network's own.

        ``weight1``, ``weight2``: of the `folded` network.
        """
        if len(directions) == 0:  # w is different from atom to atom
            rows = w.to(self.inner3.dtype)
            last = self.product(rows, self.inner3)
        else:
            rows, last = directions[0].unsqueeze(0), directions[1].unsqueeze(0)
        kept = [layers.s1, layers.s2, layers.curvature1, layers.curvature2, layers.delta3]
        projections = [self.outer1, self.inner1, self.outer2, self.inner2]
        found: Tensor = torch.ops.ubmd.sketch_gradient(kept, factors, rows, last, projections, weight1, weight2)
        return found


class LastLayerSketch(Products):
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

    def by_structure(self, n: int) -> bool:
        """Always: the sum over the atoms comes before the projection, and the gradient costs the same either way."""
        return True

    def features(self, layers: Layers, by_structure: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """(sums, phi [n, p], factors). By structure the sums are the layer's weight gradient, and phi has no rows."""
        if by_structure:
            sums = [torch.mm(layers.delta3.t(), layers.x2), layers.delta3.sum(0)]
            return sums, layers.x2.new_zeros(0, self.projections), sums[:0]
        phi = self.forward(layers.x2, layers.delta3)
        sums = [phi.sum(0, dtype=torch.float64)]
        return sums, phi, sums[:0]

    def feature_sum(self, sums: list[Tensor]) -> Tensor:
        """sum_i phi_i [p] (float64) from the sums of ``features``."""
        if len(sums) == 1:
            return sums[0]
        return (torch.mv(self.inner3, sums[0][0]) + sums[1] * self.inner_bias3).to(torch.float64)

    def directions(self, w: Tensor, by_structure: bool) -> list[Tensor]:
        """The direction in the last layer's weights along which E_i changes by w·phi_i."""
        return [torch.mv(self.inner3.t(), w.to(self.inner3.dtype))]

    def last_gradient(self, delta3: Tensor, directions: list[Tensor], w: Tensor) -> Tensor:
        """d(w·phi)/dx2 [n, d_2]; without directions w is [n, p]."""
        if len(directions) == 0:
            return delta3 * torch.mm(w.to(self.inner3.dtype), self.inner3)
        return delta3 * directions[0]


def contracted(left: Tensor, right: Tensor) -> Tensor:
    """Sums over the rows of a product, [p, d] -> [p]."""
    sums: Tensor = torch.linalg.vecdot(left, right)
    return sums


def _inner_parameters(matrix: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights [p, d] and biases [p] of P_in [p, d + 1], with the factors of x~ folded in."""
    return fixed(matrix[:, :-1] / (matrix.size(1) - 1) ** 0.5), fixed(BIAS_SCALE * matrix[:, -1])


def make_sketch(network: NeuralTangentNetwork, projections: int, seed: int) -> GradientSketch:
    """The sketch for a network's layer sizes."""
    sizes = (network.weight1.size(1), network.weight2.size(1), network.weight3.size(1))
    return GradientSketch(sizes, projections, seed)
