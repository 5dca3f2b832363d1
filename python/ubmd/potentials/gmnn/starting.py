"""Networks to start a training from: out of weights, checkpoints and model files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ubmd.data.graph import Batch, build_graph, chunks
from ubmd.errors import ModelError
from ubmd.potentials.file import load_with_record
from ubmd.potentials.gmnn import checkpoint
from ubmd.potentials.gmnn.gradient import chunk_limits
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.record import read_record
from ubmd.settings import ModelSettings


def adapt(source: Path, labels: Sequence[Atoms], targets: Sequence[Path]) -> dict[str, float]:
    """Write the networks of a file as weights files, their constants of the elements refitted to other labels.

    Energies of two levels of theory differ by large constants per element, which training would take long to learn.

    Args:
        source: weights or checkpoint of a training, or a model file.
        labels: labelled structures without the baseline of the settings.
        targets: one file for each network of the new training; a single network is written to all of them.

    Returns:
        element -> what was added to the energy of an atom (mean of the networks), eV.

    Raises:
        ModelError: the file is damaged or of another kind, has another number of networks, or lacks an element.
    """
    networks = networks_in(source)
    if len(networks) not in (1, len(targets)):
        raise ModelError(
            f"{source} has {len(networks)} networks, but {len(targets)} are trained (uncertainty.members): use as many."
        )
    shifts = [_refit(network, labels, source) for network in networks]
    for k, target in enumerate(targets):
        checkpoint.save_weights(networks[k % len(networks)], target)
    return {element: float(np.mean([shift[element] for shift in shifts])) for element in shifts[0]}


def networks_in(path: Path) -> list[GaussianMomentNetwork]:
    """The networks of a weights file, a checkpoint (the best weights so far) or a model file (all of an ensemble).

    Raises:
        ModelError: the file is missing, damaged, of another kind of potential, or a checkpoint before its first
            validation.
    """
    if _is_model_file(path):
        return _from_model_file(path)
    content = checkpoint.load(path, "weights", "checkpoint")
    if content["kind"] == "weights":
        return [checkpoint.load_weights(path)]
    if content["best"] is None:
        raise ModelError(f"{path} is a checkpoint from before the first validation: it has no weights to start from.")
    return [checkpoint.restore_model(content["best"])]


def _is_model_file(path: Path) -> bool:
    try:
        read_record(path)
    except ModelError:
        return False
    return True


def _from_model_file(path: Path) -> list[GaussianMomentNetwork]:
    """The networks of a model file, which is run: their weights with the factors that `folded` has multiplied in."""
    module, record = load_with_record(path)
    state = dict(module.state_dict())
    prefix = "network." if "baseline" in record else ""
    names = [f"{prefix}potential."]
    if not any(name.startswith(names[0]) for name in state):
        scales = [name for name in state if name.endswith(".energy_scale")]  # one for each member
        names = [f"{prefix}members.{k}." for k in range(len(scales))]
    settings = record.get("network")
    if not names or not settings or f"{names[0]}energy_scale" not in state:
        raise ModelError(f"{path} holds no Gaussian-moment network to start from.")
    return [_unfolded(state, name, record, settings) for name in names]


def _unfolded(
    state: Mapping[str, Tensor], name: str, record: Mapping[str, Any], settings: Mapping[str, Any]
) -> GaussianMomentNetwork:
    """The network whose `ScaledNetwork` has its tensors under this name; c is the mean of c sigma_Z."""
    model = GaussianMomentNetwork(record["elements"], ModelSettings.model_validate({**settings, **_baseline(record)}))
    model.to_network_dtype(torch.float64)
    network = model.network
    factors = {
        "weight1": network.input_scale,
        "weight2": network.scale1,
        "weight3": network.scale2,
        **dict.fromkeys(("bias1", "bias2", "bias3"), network.bias_scale),
    }
    with torch.no_grad():
        for key, factor in factors.items():
            getattr(network, key).copy_(state[f"{name}network.{key}"] / factor)
        model.radial.copy_(state[f"{name}descriptor.radial"])
        scale = state[f"{name}energy_scale"]
        model.constant.fill_(float(scale.mean()))
        model.scale.copy_(scale / model.constant)
        if not model.centred:
            model.shift.copy_(state[f"{name}energy_shift"] / model.constant)
    return model.to_network_dtype(getattr(torch, record.get("precision", "float32")))


def _baseline(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of [model] that a model file's record of its baseline belongs to."""
    found = record.get("baseline", {})
    repulsion = {"baseline": found["kind"]} if "kind" in found else {}
    return repulsion | {key: found[key] for key in ("atom_energies",) if key in found}


def _energies(model: GaussianMomentNetwork, batch: Batch) -> Tensor:
    """Energies [S] of the structures of a batch, eV."""
    atomic: Tensor = model(batch.species, batch.edge_index, batch.edge_vector, len(batch.species))
    return atomic.new_zeros(batch.n_structures).index_add(0, batch.structure, atomic)


def _refit(model: GaussianMomentNetwork, labels: Sequence[Atoms], source: Path) -> dict[str, float]:
    """Add constants per element to the model's energies, by least squares (minimum norm if rank-deficient).

    A `centred` model has none.
    """
    present = sorted({symbol for atoms in labels for symbol in atoms.symbols})
    missing = [element for element in present if element not in model.elements]
    if missing:
        raise ModelError(f"{source} does not contain the element {missing[0]} of the new labels; train from scratch.")
    if model.centred:
        return dict.fromkeys(present, 0.0)
    graphs = [build_graph(atoms, model.elements, model.cutoff) for atoms in labels]
    with torch.no_grad():
        found = torch.cat([_energies(model, batch) for batch in chunks(iter(graphs), *chunk_limits(model))]).numpy()
    counts = np.stack([np.bincount(graph.species.numpy(), minlength=len(model.elements)) for graph in graphs])
    difference = np.array([graph.energy for graph in graphs]) - found
    added, *_ = np.linalg.lstsq(counts.astype(float), difference, rcond=None)
    with torch.no_grad():
        model.shift.add_(torch.from_numpy(added) / model.constant)
    return {element: float(added[model.elements.index(element)]) for element in present}
