"""Uncertainties of features: posterior, distance, ensemble, conformal calibration. No network is known here."""

from ubmd.uncertainty.base import Uncertainty
from ubmd.uncertainty.conformal import ConformalScale, conformal_scale
from ubmd.uncertainty.distance import DistanceUncertainty
from ubmd.uncertainty.ensemble import EnsembleUncertainty, ForceSpreadUncertainty
from ubmd.uncertainty.posterior import PosteriorUncertainty

__all__ = [
    "ConformalScale",
    "DistanceUncertainty",
    "EnsembleUncertainty",
    "ForceSpreadUncertainty",
    "PosteriorUncertainty",
    "Uncertainty",
    "conformal_scale",
]
