"""From a trained network to the one file that LAMMPS runs: fit the uncertainty, calibrate, script, write."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ubmd import __version__
from ubmd.data.graph import Batch, Graph, build_graph, chunks, structure_means
from ubmd.errors import DataError, ModelError
from ubmd.operators import available
from ubmd.operators import load as load_operators
from ubmd.potentials.deployed import Deployed
from ubmd.potentials.evaluation import evaluation
from ubmd.potentials.file import write_model
from ubmd.potentials.gmnn.deployed import DeployedEnsemble, DeployedModel, LastLayerModel
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.sketch import LastLayerSketch, make_sketch
from ubmd.potentials.record import FORMAT
from ubmd.settings import UncertaintySettings
from ubmd.uncertainty import ConformalScale, conformal_scale

# Settings that a kind of uncertainty doesn't use: they would only mislead in its file.
WITHOUT_EFFECT = {
    "posterior": {"members", "references"},
    "last-layer": {"members", "references"},
    "distance": {"members", "lambda2"},
    "ensemble": {"references", "lambda2", "seed"},
}


def export_model(
    model: GaussianMomentNetwork | Sequence[GaussianMomentNetwork],
    training: Sequence[Atoms],
    calibration: Sequence[Atoms],
    settings: UncertaintySettings,
    path: Path,
    provenance: dict[str, Any] | None = None,
    operators: bool | None = None,
) -> dict[str, Any]:
    """Write ``path``: energies, forces, features and calibrated uncertainties of ``model`` (several: an ensemble).

    The uncertainty is fitted on the features of ``training``, the conformal scales on the errors of ``calibration``;
    both in float64. ``provenance`` (e.g. training_set_hash, settings) joins the metadata, which is returned.
    ``operators``: whether the file calls the operator library (None: if it can be loaded here). Files without run
    anywhere, but much slower on the CPU.

    Raises:
        DataError: a calibration structure without energy or forces.
        ModelError: the number of networks doesn't fit the settings, their elements or cutoffs differ, or operators are
            wanted that can't be loaded.
    """
    if operators:
        load_operators()
    operators = available() if operators is None else operators
    models = [model] if isinstance(model, GaussianMomentNetwork) else list(model)
    _check_models(models, settings)
    elements, cutoff, dtype = models[0].elements, models[0].cutoff, models[0].radial.dtype
    dtypes = [member.radial.dtype for member in models]
    try:
        for member in models:
            member.to_network_dtype(torch.float64)
        deployed = make_deployed(models, settings, operators)
        fit_uncertainty(deployed, (build_graph(atoms, elements, cutoff) for atoms in training), settings)
        energy, forces = calibrate(deployed, [build_graph(atoms, elements, cutoff) for atoms in calibration], settings)
        metadata = _metadata(models[0], deployed, settings, energy, forces, len(training), dtype)
        metadata |= {"operators": ["ubmd"] if operators else [], **(provenance or {})}
        deployed.description = json.dumps(metadata)
        write_model(deployed, path)
    finally:
        for member, original in zip(models, dtypes, strict=True):
            member.to_network_dtype(original)
    return metadata


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


def make_deployed(
    models: Sequence[GaussianMomentNetwork], settings: UncertaintySettings, operators: bool = False
) -> Deployed:
    """The module of the file, its uncertainty not yet fitted."""
    if settings.kind == "ensemble":
        return DeployedEnsemble(models, operators=operators)
    model = models[0]
    if settings.kind == "last-layer":
        width = model.network.weight3.size(1)
        return LastLayerModel(model, LastLayerSketch(width, settings.projections, settings.seed), operators=operators)
    sketch = make_sketch(model.network, settings.projections, settings.seed)
    return DeployedModel(model, sketch, kind=settings.kind, operators=operators)


def fit_uncertainty(deployed: Deployed, graphs: Iterable[Graph], settings: UncertaintySettings) -> None:
    """Fit both uncertainties of the settings' kind on the training structures."""
    if settings.kind == "distance":
        fit_distance(deployed, graphs, settings.references, settings.seed)
    elif settings.kind == "ensemble":
        deployed.structure_uncertainty.fit(torch.cat([means for means, _ in _training_features(deployed, graphs)]))
    else:
        fit_posterior(deployed, graphs, settings.lambda2)


def fit_posterior(deployed: Deployed, graphs: Iterable[Graph], lambda2: float) -> None:
    """Fit both posteriors: structures from their mean features, atoms from all atomic features (float64 sums)."""
    p = deployed.n_features
    structure_gram = torch.zeros(p, p, dtype=torch.float64)
    atom_gram = torch.zeros(p, p, dtype=torch.float64)
    n_structures = n_atoms = 0
    for means, phi in _training_features(deployed, graphs):
        structure_gram += means.T @ means
        atom_gram += phi.T @ phi
        n_structures += len(means)
        n_atoms += len(phi)
    deployed.structure_uncertainty.fit(structure_gram, n_structures, lambda2)
    deployed.atom_uncertainty.fit(atom_gram, n_atoms, lambda2)


def fit_distance(deployed: Deployed, graphs: Iterable[Graph], references: int, seed: int) -> None:
    """Keep the features of all structures, and ``references`` atomic features that lie far from each other."""
    means, phi = zip(*_training_features(deployed, graphs), strict=True)
    deployed.structure_uncertainty.fit(torch.cat(means))
    deployed.atom_uncertainty.fit(torch.cat(phi), references, seed)


def _training_features(deployed: Deployed, graphs: Iterable[Graph]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Mean features [S, p] and atomic features [N, p] (float64), batch by batch."""
    for batch in chunks(graphs):
        with torch.no_grad():
            phi = deployed(batch.species, batch.edge_index, batch.edge_vector, len(batch.species))[1].double()
        yield structure_means(phi, batch), phi


def calibrate(
    deployed: Deployed, graphs: Sequence[Graph], settings: UncertaintySettings
) -> tuple[ConformalScale, ConformalScale]:
    """Set the conformal factors from |energy error|/n of structures and RMSE over xyz of atomic forces.

    With ``settings.atoms_by == 'structure'`` a structure counts once, with max_i error / max_i u, because
    atoms of one structure are not exchangeable and the threshold acts on the maximum.
    """
    energy_errors, energy_u, force_errors, force_u = [], [], [], []
    for batch in chunks(graphs):
        energy, forces, u, atomic_u = evaluate(deployed, batch)
        error = (forces - batch.forces).square().mean(1).sqrt()
        sizes = batch.counts.tolist()
        energy_errors.append(((energy - batch.energy) / batch.counts).numpy())
        energy_u.append(u.numpy())
        for atom_error, atom_u in zip(error.split(sizes), atomic_u.split(sizes), strict=True):
            whole = settings.atoms_by == "structure"
            force_errors.append(atom_error.max().reshape(1).numpy() if whole else atom_error.numpy())
            force_u.append(atom_u.max().reshape(1).numpy() if whole else atom_u.numpy())
    if not energy_errors:
        raise DataError("Calibration needs at least one structure.")
    energy_scale = conformal_scale(np.concatenate(energy_errors), np.concatenate(energy_u), settings.alpha)
    force_scale = conformal_scale(np.concatenate(force_errors), np.concatenate(force_u), settings.alpha)
    deployed.structure_uncertainty.calibration.fill_(energy_scale.scale)
    deployed.atom_uncertainty.calibration.fill_(force_scale.scale)
    return energy_scale, force_scale


def evaluate(module: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Energies [S], forces [N, 3], structure u [S] and atomic u [N] of a batch, through the model file's interface."""
    result = evaluation(module, batch, batch.edge_vector)
    with torch.no_grad():
        u = torch.stack([module.uncertainty(mean) for mean in structure_means(result.phi.double(), batch)])
    energy = torch.zeros(batch.n_structures, dtype=torch.float64).index_add(0, batch.structure, result.energy)
    return energy, batch.forces_from(result.gradient), u, result.atomic_uncertainties()


def _metadata(
    model: GaussianMomentNetwork,
    deployed: Deployed,
    settings: UncertaintySettings,
    energy: ConformalScale,
    forces: ConformalScale,
    n_training: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The JSON record of the file."""

    def calibrated(scale: ConformalScale, feature_scale: torch.Tensor) -> dict[str, Any]:
        return {
            "scale": scale.scale,
            "attainable": scale.attainable,
            "n_calibration": scale.count,
            "feature_scale": float(feature_scale),
        }

    return {
        "format": FORMAT,
        "model": "gmnn",
        "elements": list(model.elements),
        "cutoff": model.cutoff,
        "units": {"energy": "eV", "length": "Å", "force": "eV/Å", "stress": "eV/Å^3"},
        "precision": str(dtype).removeprefix("torch."),
        # projections: the length of the features, which is the number of members in an ensemble
        "uncertainty": {
            **settings.model_dump(exclude=WITHOUT_EFFECT[settings.kind]),
            "projections": deployed.n_features,
            "energy": calibrated(energy, deployed.structure_uncertainty.feature_scale),
            "forces": calibrated(forces, deployed.atom_uncertainty.feature_scale),
        },
        "n_training": n_training,
        "network": model.settings.model_dump(),
        "package_version": __version__,
        "torch_version": torch.__version__,
    }
