"""Uncertainties: gradient features, posterior, conformal calibration.

Distance, ensemble and last-layer uncertainties will join as siblings of ``posterior``.
"""

from ubmd.uncertainty.conformal import ConformalScale, conformal_scale
from ubmd.uncertainty.posterior import PosteriorUncertainty
from ubmd.uncertainty.sketch import GradientSketch, make_sketch

__all__ = ["ConformalScale", "GradientSketch", "PosteriorUncertainty", "conformal_scale", "make_sketch"]
