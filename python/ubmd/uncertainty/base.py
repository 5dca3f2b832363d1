"""What the uncertainties of all kinds share."""

import torch
from torch import Tensor, nn

TINY = 1e-40  # keeps sqrt differentiable at zero without changing any float64 result


class Uncertainty(nn.Module):
    """Calibrated uncertainties [n] (float64) of raw features [n, p]; subclasses define ``forward``.

    ``feature_scale`` is the root mean square of |phi| over the training features, ``calibration`` the conformal factor.
    Both are buffers, so they stay float64 in every precision.
    """

    feature_scale: Tensor
    calibration: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tiny = TINY
        self.register_buffer("feature_scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("calibration", torch.ones((), dtype=torch.float64))
