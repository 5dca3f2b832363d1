"""Potentials. One so far: the Gaussian-moment neural network."""

from ubmd.models.gmnn import GaussianMomentNetwork

__all__ = ["GaussianMomentNetwork"]
