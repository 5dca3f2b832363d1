"""Uncertainties: gradient features, posterior, distance, ensemble, conformal calibration."""

from ubmd.uncertainty.base import Uncertainty
from ubmd.uncertainty.conformal import ConformalScale, conformal_scale
from ubmd.uncertainty.distance import DistanceUncertainty
from ubmd.uncertainty.ensemble import EnsembleUncertainty, ForceSpreadUncertainty
from ubmd.uncertainty.posterior import PosteriorUncertainty
from ubmd.uncertainty.sketch import GradientSketch, LastLayerSketch, make_sketch

__all__ = [
    "ConformalScale",
    "DistanceUncertainty",
    "EnsembleUncertainty",
    "ForceSpreadUncertainty",
    "GradientSketch",
    "LastLayerSketch",
    "PosteriorUncertainty",
    "Uncertainty",
    "conformal_scale",
    "make_sketch",
]
