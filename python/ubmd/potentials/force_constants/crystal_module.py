"""What all modules of crystals have in common."""

import json

import torch
from torch import Tensor, nn

from ubmd.operators import use_operators
from ubmd.uncertainty.posterior import deviation


class CrystalModule(nn.Module):
    """Record and uncertainty of a crystal; energies and their derivatives are those of its subclasses.

    A subclass sets ``operators``, ``tiny`` (eV/atom: u of the ideal lattice, where the root has no derivative),
    ``energy_scale`` (calibration of u), ``triangular`` (whether the factor is), ``description`` (the JSON record of the
    file) and the buffer ``factor`` [p, p], the root of the parameters' covariance.
    """

    __constants__ = ("operators",)  # unlike Final, TorchScript sees it in subclasses, too
    operators: bool
    factor: Tensor
    tiny: float
    energy_scale: float
    triangular: bool
    description: str

    def use_operators(self, wanted: bool) -> None:
        """Compute by torch.ops.ubmd.* (as it does if they can be loaded), or by torch alone (slow)."""
        use_operators(self, wanted)
        self.description = json.dumps(json.loads(self.description) | {"operators": ["ubmd"] if wanted else []})

    @torch.jit.export
    def metadata(self) -> str:
        """The JSON record of the file."""
        return self.description

    @torch.jit.export
    def by_structure(self, n: int) -> bool:
        """Always: features of single atoms don't exist."""
        return True

    @torch.jit.export
    def uncertainty(self, phi_mean: Tensor) -> Tensor:
        """Standard deviation u of the energy per atom (0-dim, eV/atom), calibrated, from phi_mean [p]."""
        if self.operators:
            sigma: Tensor = torch.ops.ubmd.crystal_deviation(
                phi_mean.to(torch.float64), self.factor, self.triangular, self.tiny
            )
            return self.energy_scale * sigma
        z = torch.mv(self.factor.t(), phi_mean.to(torch.float64))
        return self.energy_scale * deviation(z, self.tiny * self.tiny)
