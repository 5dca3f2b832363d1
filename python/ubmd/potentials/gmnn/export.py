"""From a trained network to the one file that LAMMPS runs: fit the uncertainty, calibrate, script, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms

from ubmd.devices import CPU
from ubmd.errors import ModelError
from ubmd.operators import chosen, use_operators
from ubmd.potentials.baseline import baseline_settings
from ubmd.potentials.deployed import Deployed
from ubmd.potentials.fitting import export_raw
from ubmd.potentials.gmnn.deployed import DeployedEnsemble, DeployedModel, LastLayerModel
from ubmd.potentials.gmnn.model import ARCHITECTURE, GaussianMomentNetwork
from ubmd.potentials.gmnn.sketch import LastLayerSketch, make_sketch
from ubmd.potentials.interface import RawModule
from ubmd.settings import UncertaintySettings


def export_model(
    model: GaussianMomentNetwork | Sequence[GaussianMomentNetwork],
    training: Sequence[Atoms],
    calibration: Sequence[Atoms],
    settings: UncertaintySettings,
    path: Path,
    provenance: dict[str, Any] | None = None,
    operators: bool | None = None,
    device: str = CPU,
) -> dict[str, Any]:
    """Write ``path``: energies, forces, features and calibrated uncertainties of ``model`` (several: an ensemble).

    The uncertainty is fitted on the features of ``training``, the conformal scales on the errors of ``calibration``;
    both in float64. The labels are whole ones: a baseline (`models[0].settings`) is taken off them here, and added to
    the networks. ``provenance`` (e.g. training_set_hash, settings) joins the metadata, which is returned.
    ``operators``: whether the file calls the operator library (None: if it can be loaded here). Files without run
    anywhere, but much slower on the CPU. ``device``: as of `export_raw`.

    Raises:
        DataError: a calibration structure without energy or forces.
        ModelError: the number of networks doesn't fit the settings, their elements, cutoffs or baselines differ, or
            operators are wanted that can't be loaded.
    """
    operators = chosen(operators)
    models = [model] if isinstance(model, GaussianMomentNetwork) else list(model)
    dtypes = [member.radial.dtype for member in models]
    try:
        for member in models:
            member.to_network_dtype(torch.float64)
        raw = raw_module(models, settings, operators, dtypes[0])
        first = models[0].settings
        return export_raw(raw, "gmnn", first, training, calibration, settings, path, provenance, (), device)
    finally:
        for member, original in zip(models, dtypes, strict=True):
            member.to_network_dtype(original)


def raw_module(
    models: Sequence[GaussianMomentNetwork], settings: UncertaintySettings, operators: bool, dtype: torch.dtype
) -> RawModule:
    """Networks in float64, trained in ``dtype``, as the module of the file, its uncertainty not yet fitted.

    Raises:
        ModelError: the number of networks doesn't fit the settings, or their elements, cutoffs or baselines differ.
    """
    _check_models(models, settings)
    deployed, first = make_deployed(models, settings), models[0]
    use_operators(deployed, operators)
    record = {"network": first.settings.model_dump(include=ARCHITECTURE)}
    library = ["ubmd"] if operators else []
    precision = str(dtype).removeprefix("torch.")
    return RawModule(deployed, first.elements, first.cutoff, deployed.n_features, precision, record, library)


def _check_models(models: Sequence[GaussianMomentNetwork], settings: UncertaintySettings) -> None:
    """Refuse networks that don't fit the kind of uncertainty or each other."""
    if len(models) != settings.networks:
        raise ModelError(
            f"uncertainty.kind = '{settings.kind}' needs {settings.networks} trained networks (kind and members of "
            f"[uncertainty]), but {len(models)} were given."
        )
    for member in models[1:]:
        if (member.elements, member.cutoff) != (models[0].elements, models[0].cutoff):
            raise ModelError("The networks of an ensemble need the same elements and cutoff; train them together.")
        if baseline_settings(member.settings) != baseline_settings(models[0].settings):
            raise ModelError(
                "The networks of an ensemble need the same baseline and atom_energies; train them together."
            )


def make_deployed(models: Sequence[GaussianMomentNetwork], settings: UncertaintySettings) -> Deployed:
    """The module of the file, its uncertainty not yet fitted; it uses no operators."""
    if settings.kind == "ensemble":
        return DeployedEnsemble(models)
    model = models[0]
    if settings.kind == "last-layer":
        width = model.network.weight3.size(1)
        return LastLayerModel(model, LastLayerSketch(width, settings.projections, settings.seed))
    sketch = make_sketch(model.network, settings.projections, settings.seed)
    return DeployedModel(model, sketch, kind=settings.kind)
