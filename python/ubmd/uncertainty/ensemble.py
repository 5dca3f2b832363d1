"""Disagreement of an ensemble of networks as an uncertainty (population standard deviations).

Query by committee: Seung, Opper and Sompolinsky, Proc. 5th Workshop on Computational Learning Theory, 287 (1992);
ensembles of networks: Lakshminarayanan, Pritzel and Blundell, Adv. Neural Inf. Process. Syst. 30, 6402 (2017).
"""

import torch
from torch import Tensor

from ubmd.uncertainty.base import Uncertainty


class EnsembleUncertainty(Uncertainty):
    """u = standard deviation over the members of E_m/n, from mean features [S, M] = E_m/n up to a constant."""

    def fit(self, features: Tensor) -> None:
        """Set the scale that the members' deviations [T, M] are divided by where they serve as features."""
        deviations = features - features.mean(1, keepdim=True)
        self.feature_scale.copy_(torch.sqrt((deviations * deviations).sum(1).mean()))

    def forward(self, phi: Tensor) -> Tensor:
        """Calibrated u [S] (float64)."""
        return self.calibration * torch.sqrt(variance(phi.to(self.calibration.dtype)) + self.tiny)


class ForceSpreadUncertainty(Uncertainty):
    """u_i = sqrt(mean over x, y, z of the variance over the members of F_i)."""

    def forward(self, forces: Tensor) -> Tensor:
        """Calibrated u_i [n] (float64) of the members' forces [n, 3, M]."""
        return self.calibration * torch.sqrt(variance(forces.to(self.calibration.dtype)).mean(1) + self.tiny)


def variance(values: Tensor) -> Tensor:
    """Population variance over the last dimension."""
    deviations = values - values.mean(-1, keepdim=True)
    return (deviations * deviations).mean(-1)
