"""The loss of a batch, and error measures in the units of the log."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ubmd.data.graph import VOIGT, Batch
from ubmd.data.labels import EV_PER_A3_IN_MPA
from ubmd.settings import TrainingSettings


@dataclass(frozen=True)
class Differences:
    """Prediction minus label of a batch: energy [S] eV, forces [N, 3] eV/Å, virial [S, 6] = V·stress, eV.

    Structures without a stress label have zero rows in ``virial`` and False in ``has_stress`` [S]. Slabs and wires have
    zeros along their free directions, fixed atoms whose forces do not count have zeros in ``forces``.
    """

    energy: Tensor
    forces: Tensor
    virial: Tensor
    has_stress: Tensor


def differences(batch: Batch, energies: Tensor, forces: Tensor, virial: Tensor) -> Differences:
    """Differences to the labels of a batch; virial [S, 3, 3] = dE/d(strain)."""
    has_stress = torch.isfinite(batch.stress).all(dim=1)
    reference = torch.nan_to_num(batch.stress) * batch.volume.unsqueeze(1)
    six = virial[:, VOIGT[0], VOIGT[1]] - reference
    return Differences(
        energy=energies - batch.energy,
        forces=forces - batch.forces if batch.fixed is None else _of_free(batch.fixed, forces - batch.forces),
        virial=torch.where(has_stress.unsqueeze(1), batch.stress_within(six), 0.0),
        has_stress=has_stress,
    )


def loss(errors: Differences, settings: TrainingSettings) -> Tensor:
    """Sum over structures of w_E ΔE^2 + w_F Σ_i |ΔF_i|^2 + w_S V^2 |Δσ|^2 (six components); no unit.

    Sums, not means (Zaverkin et al., npj Comput. Mater. 10, 83 (2024)): a structure counts as much in a small batch.
    """
    total = settings.energy_weight * errors.energy.square().sum()
    total = total + settings.force_weight * errors.forces.square().sum()
    if settings.stress_weight > 0 and bool(errors.has_stress.any()):
        total = total + settings.stress_weight * errors.virial.square().sum()
    return total


def _of_free(fixed: Tensor, errors: Tensor) -> Tensor:
    return torch.where(fixed.unsqueeze(1), 0.0, errors)


def _free_components(batch: Batch, errors: Differences) -> int:
    """Stress components of slabs and wires that are zero by definition, and no errors: three and five of six."""
    if batch.projector is None:
        return 0
    directions = batch.projector.diagonal(dim1=1, dim2=2).sum(1).round()[errors.has_stress]
    return int((6 - directions * (directions + 1) / 2).sum())


@dataclass
class ErrorSums:
    """Sums of squared and absolute errors over batches: energy per atom, force components, stress components."""

    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("energy", "force", "stress"), 0.0))
    absolutes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("energy", "force", "stress"), 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("energy", "force", "stress"), 0))

    @torch.no_grad()
    def add(self, batch: Batch, errors: Differences) -> None:
        """Add the errors of one batch."""
        stress = (errors.virial / batch.volume.clamp(min=1e-300).unsqueeze(1))[errors.has_stress]
        fixed = 0 if batch.fixed is None else 3 * int(batch.fixed.sum())
        for name, values, zeros in (
            ("energy", errors.energy / batch.counts, 0),
            ("force", errors.forces, fixed),
            ("stress", stress, _free_components(batch, errors)),
        ):
            self.squares[name] += float(values.square().sum())
            self.absolutes[name] += float(values.abs().sum())
            self.counts[name] += values.numel() - zeros

    def rmse(self, name: str) -> float | None:
        """Root mean square error: energy eV/atom, force eV/Å, stress eV/Å^3; None without data."""
        return math.sqrt(self.squares[name] / self.counts[name]) if self.counts[name] else None

    def mae(self, name: str) -> float | None:
        """Mean absolute error, units as in `rmse`."""
        return self.absolutes[name] / self.counts[name] if self.counts[name] else None

    def columns(self, prefix: str) -> dict[str, float | None]:
        """RMSEs in the units of the log: meV/atom, eV/Å, MPa."""
        energy, stress = self.rmse("energy"), self.rmse("stress")
        return {
            f"{prefix}_energy_rmse_meV_per_atom": None if energy is None else 1000 * energy,
            f"{prefix}_force_rmse_eV_per_A": self.rmse("force"),
            f"{prefix}_stress_rmse_MPa": None if stress is None else EV_PER_A3_IN_MPA * stress,
        }

    def criterion(self) -> float:
        """What early stopping minimises: energy MAE in eV/atom plus force-component MAE in eV/Å."""
        return (self.mae("energy") or 0.0) + (self.mae("force") or 0.0)
