"""Posterior uncertainty of Bayesian linear regression in (sketched) gradient features.

The predictive variance of Bishop, Pattern Recognition and Machine Learning (2006), section 3.3, without its noise term;
as the posterior kernel of a network's features: Holzmüller et al., J. Mach. Learn. Res. 24, 164 (2023).
"""

import torch
from torch import Tensor, nn

from ubmd.operators import Products
from ubmd.uncertainty.base import Uncertainty


class PosteriorUncertainty(Uncertainty):
    """u^2 = lambda^2 phi^T (Phi^T Phi + lambda^2 I)^-1 phi, for features divided by one scalar.

    The scalar makes the mean of |phi|^2 over the training features 1. Stored is the eigen-factor M with u = |M phi| for
    *raw* features (scalar and lambda folded in).

    For structures M is a buffer and stays float64 in every precision. For ``many`` features at once (those of all
    atoms) it is a parameter and follows the network's precision: the product costs half as much, and the error of u_i
    (4e-5) is that of float32 features alone.
    """

    factor: Tensor

    def __init__(self, projections: int, many: bool = False) -> None:
        super().__init__()
        self.products = Products()
        factor = torch.zeros(projections, projections, dtype=torch.float64)
        if many:
            self.factor = nn.Parameter(factor, requires_grad=False)
        else:
            self.register_buffer("factor", factor)

    def fit(self, gram: Tensor, count: int, lambda2: float) -> None:
        """Fit from the Gram matrix Phi^T Phi [p, p] (float64) of ``count`` raw training features."""
        scale2 = torch.trace(gram) / count  # mean |phi|^2
        values, vectors = torch.linalg.eigh(gram / scale2)
        weights = torch.sqrt(lambda2 / (values.clamp(min=0.0) + lambda2))
        self.feature_scale.copy_(torch.sqrt(scale2))
        self.factor.copy_(weights.unsqueeze(1) * vectors.T / torch.sqrt(scale2))

    def forward(self, phi: Tensor) -> Tensor:
        """Calibrated u [n] (float64) of raw features [n, p] of any precision."""
        phi = phi.to(self.factor.dtype)
        factor = self.factor.t()
        return self.calibration * deviation(self.products.product(phi, factor), self.tiny)

    @torch.jit.export
    def with_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """u [n] and du/dphi [n, p] (float64) of raw features [n, p], detached: u = |M phi|, du/dphi = M^T M phi / u."""
        phi = phi.to(self.factor.dtype)
        projected = self.products.product(phi, self.factor.t())
        u = deviation(projected, self.tiny)
        gradient = self.products.product(projected, self.factor).to(torch.float64) / u.unsqueeze(1)
        return self.calibration * u, self.calibration * gradient


def deviation(projected: Tensor, tiny: float) -> Tensor:
    """Standard deviations sqrt(|z|^2 + tiny) [...] (float64) of a linear function of parameters with covariance W Wᵀ.

    ``projected`` [..., p] holds the rows z = Wᵀφ of features φ; ``tiny`` gives the root a derivative at z = 0.
    """
    return torch.sqrt((projected * projected).sum(-1, dtype=torch.float64) + tiny)
