"""Distance to the nearest training feature as an uncertainty.

Janet et al., Chem. Sci. 10, 7913 (2019), in the space of a network's features; with sketched gradient features and
biased dynamics: Zaverkin et al., npj Comput. Mater. 10, 83 (2024).
"""

import numpy as np
import torch
from torch import Tensor

from ubmd.selection import select
from ubmd.uncertainty.base import Uncertainty

SMALLEST_SQUARE = 1e-8  # of u before calibration: the lower bound, reached by training structures


class DistanceUncertainty(Uncertainty):
    """u^2 = min over stored features of |phi - phi_t|^2, at least 1e-8, for features divided by one scalar.

    The scalar makes the mean of |phi|^2 over the training features 1; ``references`` are divided by it already.
    The gradient jumps where another reference becomes the nearest.
    """

    references: Tensor

    def __init__(self, projections: int) -> None:
        super().__init__()
        self.smallest = SMALLEST_SQUARE
        self.register_buffer("references", torch.zeros(1, projections, dtype=torch.float64))

    def fit(self, features: Tensor, count: int | None = None, seed: int = 0) -> None:
        """Keep the raw training features [T, p] (float64), or ``count`` of them that lie far from each other.

        The first of these is drawn with ``seed``, each other one is the farthest from those before (max-dist).
        """
        self.feature_scale.copy_(torch.sqrt((features * features).sum(1).mean()))
        scaled = features / self.feature_scale
        if count is not None and count < len(features):
            scaled = scaled[farthest_points(scaled.cpu().numpy(), count, seed)]
        self.references = scaled

    def forward(self, phi: Tensor) -> Tensor:
        """Calibrated u [n] (float64) of raw features [n, p] of any precision."""
        squared = self.difference(phi).square().sum(1)
        return self.calibration * torch.sqrt(torch.clamp(squared, min=self.smallest))

    def difference(self, phi: Tensor) -> Tensor:
        """Scaled features minus the nearest stored ones [n, p] (float64), differentiable."""
        x = phi.to(self.references.dtype) / self.feature_scale
        # A matrix product finds the nearest reference; the difference to it then has full precision.
        halves = 0.5 * (self.references * self.references).sum(1)
        nearest = torch.argmin(halves - torch.mm(x.detach(), self.references.t()), dim=1)
        return x - self.references.index_select(0, nearest)

    @torch.jit.export
    def with_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """u [n] and du/dphi [n, p] (float64) of raw features [n, p], detached; no gradient at the lower bound."""
        difference = self.difference(phi)
        squared = difference.square().sum(1)
        distance = torch.sqrt(torch.clamp(squared, min=self.smallest))
        factor = torch.where(squared >= self.smallest, self.calibration / (self.feature_scale * distance), 0.0)
        return self.calibration * distance, difference * factor.unsqueeze(1)


def farthest_points(features: np.ndarray, count: int, seed: int) -> list[int]:
    """Indices of ``count`` rows of [T, p]: one drawn with ``seed``, then each the farthest from those before it."""
    rng = np.random.default_rng(seed)
    first = int(rng.integers(len(features)))
    nothing = np.zeros(len(features))
    return [first, *select("max_dist", features, features[first : first + 1], nothing, count - 1, 1.0, 0.0, 0.0, rng)]
