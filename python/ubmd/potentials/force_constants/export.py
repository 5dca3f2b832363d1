"""From a fitted force-constant potential to the one file that LAMMPS and Python run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ubmd import __version__
from ubmd.errors import ModelError
from ubmd.operators import chosen
from ubmd.potentials.file import write_model
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.model import CrystalModel
from ubmd.potentials.force_constants.pair_model import PairedCrystalModel
from ubmd.potentials.force_constants.regression import Posterior
from ubmd.potentials.record import format_of
from ubmd.uncertainty.conformal import ConformalScale

BASIS = "basis.npz"  # extra file in the model file: phonon programs need the force constants themselves
GUARD = 0.4  # default of max_displacement over the shortest distance between sites
GUARD_PAIRS = 0.55  # the same with pair functions


def export_crystal(
    basis: ClusterBasis,
    posterior: Posterior,
    path: Path,
    *,
    energy_scale: float | ConformalScale = 1.0,
    force_scale: float | ConformalScale = 1.0,
    max_displacement: float | None = None,
    energy: float = 0.0,
    provenance: dict[str, Any] | None = None,
    operators: bool | None = None,
) -> dict[str, Any]:
    """Write ``path``: energies, forces and calibrated uncertainties of a crystal.

    Args:
        basis: the cluster basis.
        posterior: parameters and covariance in that basis.
        path: of the file; it replaces an old one only once it is complete.
        energy_scale: factor on u; plain numbers stand for no calibration.
        force_scale: factor on atomic uncertainties.
        max_displacement: largest displacement that simulations accept, Å; default: 0.4 of the shortest distance
            between sites, 0.55 with pair functions.
        energy: of the ideal crystal per primitive cell, eV; 0 if unknown.
        provenance: joins the metadata, e.g. training_set_hash, n_training, settings.
        operators: whether the file calls the compiled operators (None: if they can be loaded here); without it runs
            anywhere, but slower.

    Returns:
        The metadata of the file.

    Raises:
        ModelError: the posterior belongs to another basis, or operators are wanted that can't be loaded.
    """
    if posterior.parameter_orders.tolist() != basis.parameter_orders.tolist():
        raise ModelError(
            f"The parameters ({len(posterior.parameter_orders)}) are not those of the cluster basis "
            f"({basis.n_parameters}): fit them in the basis that is exported."
        )
    with_operators = chosen(operators)
    kind, share = (CrystalModel, GUARD) if basis.pairs is None else (PairedCrystalModel, GUARD_PAIRS)
    guard = share * basis.lattice.shortest_distance if max_displacement is None else max_displacement
    model: CrystalModel | PairedCrystalModel = kind(
        basis,
        posterior,
        energy_scale=_scale(energy_scale),
        force_scale=_scale(force_scale),
        max_displacement=guard,
        energy=energy,
    )
    model.use_operators(with_operators)
    record: dict[str, Any] = json.loads(model.metadata())
    record |= _metadata(basis, posterior, energy_scale, force_scale) | (provenance or {})
    model.description = json.dumps(record)
    write_model(model, path, {BASIS: basis.to_bytes()})
    return record


def _scale(scale: float | ConformalScale) -> float:
    return scale.scale if isinstance(scale, ConformalScale) else float(scale)


def _metadata(
    basis: ClusterBasis, posterior: Posterior, energy: float | ConformalScale, forces: float | ConformalScale
) -> dict[str, Any]:
    """What the record has beside the model's own part; numbers by order have the order as key."""
    alpha = next((scale.alpha for scale in (forces, energy) if isinstance(scale, ConformalScale)), None)
    return {
        "format": format_of(layers=1, fixed_precision=False, pairs=basis.pairs is not None),
        "model": "force constants",
        "units": {"energy": "eV", "length": "Å", "force": "eV/Å"},
        "precision": "float64",
        "space_group": None if basis.lattice.space_group is None else str(basis.lattice.space_group),
        "cutoffs": _by_order(basis.all_cutoffs),
        "parameters": _by_order(posterior.counts),
        "uncertainty": {
            "kind": "posterior",
            "projections": basis.n_parameters,
            "alpha": alpha,
            "energy": _calibrated(energy),
            "forces": _calibrated(forces),
        },
        "regression": {
            "gamma": _by_order(posterior.gamma),
            "determined": sum(posterior.gamma.values()) / basis.n_parameters,
            "prior_precision": _by_order(posterior.alpha),
            "noise": {channel: beta**-0.5 for channel, beta in posterior.beta.items()},
            "noise_limited": list(posterior.noise_limited),
            "log_evidence": posterior.log_evidence,
            "converged": posterior.converged,
        },
        "package_version": __version__,
        "torch_version": torch.__version__,
    }


def _by_order(values: dict[int, Any]) -> dict[str, Any]:
    return {str(order): value for order, value in values.items()}


def _calibrated(scale: float | ConformalScale) -> dict[str, Any]:
    """The record of one factor; a bare number is not calibrated and guarantees nothing."""
    if isinstance(scale, ConformalScale):
        result = {"scale": scale.scale, "attainable": scale.attainable, "n_calibration": scale.count}
    else:
        result = {"scale": float(scale), "attainable": 0.0, "n_calibration": 0}
    return result | {"feature_scale": 1.0}
