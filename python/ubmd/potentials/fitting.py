"""What ubmd adds to a module of any back end: an uncertainty that is fitted and calibrated, a record, a file."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers

from ubmd import __version__
from ubmd.data.graph import Batch, Graph, build_graph, chunks, structure_means
from ubmd.devices import CPU, torch_device
from ubmd.errors import ModelError
from ubmd.potentials.baseline import Baseline, check_reach, has_baseline, remainder
from ubmd.potentials.deployed import Deployed, ForeignModule
from ubmd.potentials.evaluation import evaluation
from ubmd.potentials.file import write_model
from ubmd.potentials.interface import Backend, RawModule
from ubmd.potentials.record import format_of
from ubmd.potentials.summed import lone_atoms, summed
from ubmd.settings import ModelSettings, UncertaintySettings
from ubmd.uncertainty import DistanceUncertainty, PosteriorUncertainty
from ubmd.uncertainty.calibration import Calibration, Outcome, calibrate

# Settings that a kind of uncertainty doesn't use: they would be misleading in its file.
WITHOUT_EFFECT = {
    "posterior": {"members", "references"},
    "last-layer": {"members", "references"},
    "distance": {"members", "lambda2"},
    "ensemble": {"references", "lambda2", "seed"},
}


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
    nothing = torch.zeros_like(deployed.structure_uncertainty.factor)  # [p, p], float64, on the module's device
    structure_gram, atom_gram = nothing, nothing.clone()
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
    for batch in chunks(graphs, device=_device_of(deployed)):
        with torch.no_grad():
            phi = deployed(batch.species, batch.edge_index, batch.edge_vector, len(batch.species))[1].double()
        yield structure_means(phi, batch), phi


def _device_of(deployed: Deployed) -> torch.device:
    device: torch.device = deployed.structure_uncertainty.calibration.device
    return device


def outcomes(deployed: Deployed, graphs: Sequence[Graph], numbers: Sequence[int]) -> list[Outcome]:
    """Errors and uncertainties of labelled structures, before calibration; fixed atoms do not count.

    ``numbers``: atomic number by element index.
    """
    by_species, found = torch.tensor(numbers), []
    for batch in chunks(graphs, device=_device_of(deployed)):
        energy, forces, u, atomic_u = evaluate(deployed, batch)
        error = (forces - batch.forces).square().mean(1).sqrt()
        energy_error = ((energy - batch.energy) / batch.counts).abs().tolist()
        u, error, atomic_u, species = (values.cpu() for values in (u, error, atomic_u, batch.species))
        free = torch.ones(len(error), dtype=torch.bool) if batch.fixed is None else ~batch.fixed.cpu()
        sizes = batch.counts.tolist()
        of_atoms = (values.split(sizes) for values in (by_species[species], error, atomic_u, free))
        for k, (kinds, errors, own_u, chosen) in enumerate(zip(*of_atoms, strict=True)):
            of_free = (values[chosen].numpy() for values in (kinds, errors, own_u))
            found.append(Outcome(energy_error[k], float(u[k]), *of_free))
    return found


def evaluate(module: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Energies [S], forces [N, 3], structure u [S] and atomic u [N] of a batch, through the model file's interface."""
    result = evaluation(module, batch, batch.edge_vector)
    with torch.no_grad():
        u = torch.stack([module.uncertainty(mean) for mean in structure_means(result.phi.double(), batch)])
    energy = result.energy.new_zeros(batch.n_structures).index_add(0, batch.structure, result.energy)
    return energy, batch.forces_from(result.gradient), u, result.atomic_uncertainties()


def export_checkpoints(
    backend: Backend,
    checkpoints: Sequence[Path],
    model: ModelSettings,
    training: Sequence[Atoms],
    calibration: Sequence[Atoms],
    settings: UncertaintySettings,
    path: Path,
    provenance: dict[str, Any] | None = None,
    earlier: Sequence[Outcome] = (),
    device: str = CPU,
) -> dict[str, Any]:
    """Write the model file of trained networks; see `export_raw`."""
    raw = backend.raw_module(checkpoints, settings)
    return export_raw(raw, backend.name, model, training, calibration, settings, path, provenance, earlier, device)


def export_raw(
    raw: RawModule,
    name: str,
    model: ModelSettings,
    training: Sequence[Atoms],
    calibration: Sequence[Atoms],
    settings: UncertaintySettings,
    path: Path,
    provenance: dict[str, Any] | None = None,
    earlier: Sequence[Outcome] = (),
    device: str = CPU,
) -> dict[str, Any]:
    """Give a module its uncertainty, add its baseline, and write ``path``, the model file.

    Args:
        raw: of a back end.
        name: of the back end.
        model: settings that the networks were trained with.
        training: labelled structures that the uncertainty is fitted on.
        calibration: labelled structures whose errors give the conformal factors.
        settings: of the uncertainty.
        path: of the model file.
        provenance: joins the record of the file (training_set_hash, settings ...).
        earlier: what earlier models of a run said of structures that they had not been trained on; it calibrates, too.
        device: where the uncertainty is fitted and calibrated. The file is the same: its numbers are on the CPU.

    Returns:
        The record.

    Raises:
        DataError: a calibration structure without energy or forces.
        ModelError: the module of another program does not give what it should.
        SettingsError: the baseline does not fit the module's elements or cutoff.
    """
    baseline = _baseline(raw, model)
    # The errors of the network on what the baseline leaves are those of the sum on the labels.
    training, calibration = remainder(training, model), remainder(calibration, model)
    deployed = _with_uncertainty(raw, settings)
    numbers = [atomic_numbers[name] for name in raw.elements]
    # As in `ubmd.calculator.Model`: what torch records in the first calls, it assumes in later ones (for instance
    # that features have derivatives), and compiles.
    with torch.jit.optimized_execution(False):
        if isinstance(deployed, ForeignModule):
            _check_module(deployed, build_graph(training[0], raw.elements, raw.cutoff), name)
            _check_layers(deployed, raw, name)
        graphs = (build_graph(atoms, raw.elements, raw.cutoff) for atoms in training)
        held_out = [build_graph(atoms, raw.elements, raw.cutoff) for atoms in calibration]
        with _on_device(deployed, raw, torch_device(device)):
            fit_uncertainty(deployed, graphs, settings)
            said = outcomes(deployed, held_out, numbers)
    found = _calibrated([*said, *earlier], settings, numbers)
    deployed.structure_uncertainty.calibration.fill_(found.energy.scale)
    deployed.atom_uncertainty.calibration.fill_(found.forces.scale)
    metadata = _metadata(raw, name, deployed, settings, found, len(training))
    if earlier and said:
        metadata["uncertainty"]["held_out"] = _factors(_calibrated(said, settings, numbers))
    metadata |= {"operators": list(raw.operators), **(provenance or {})}
    if baseline is not None:
        deployed = summed(deployed, baseline)
        metadata["baseline"] = baseline.record(raw.elements) | {
            "lone_atoms": dict(zip(raw.elements, lone_atoms(deployed, len(raw.elements)), strict=True))
        }
    deployed.description = json.dumps(metadata)
    write_model(deployed, path)
    return metadata


def _baseline(raw: RawModule, model: ModelSettings) -> Baseline | None:
    """What the module is added to; SettingsError if the module does not see all pairs that repel each other."""
    if not has_baseline(model):
        return None
    baseline = Baseline(model, raw.elements)
    if baseline.repulsive:
        check_reach(raw.elements, raw.cutoff, "the cutoff of the network")
    return baseline


def _with_uncertainty(raw: RawModule, settings: UncertaintySettings) -> Deployed:
    """The module as a `Deployed` one; a module of another program gets an uncertainty of ubmd."""
    if isinstance(raw.module, Deployed):
        return raw.module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript
        deployed = ForeignModule(_frozen(raw.module), raw.n_features)
    is_distance = settings.kind == "distance"
    deployed.structure_uncertainty, deployed.atom_uncertainty = (
        DistanceUncertainty(raw.n_features) if is_distance else PosteriorUncertainty(raw.n_features, many=atoms)
        for atoms in (False, True)
    )
    return deployed


@contextmanager
def _on_device(deployed: Deployed, raw: RawModule, device: torch.device) -> Iterator[None]:
    """The module on a device, and afterwards on the CPU again."""
    if device.type == "cpu":
        yield
        return
    try:
        _move(deployed, raw, device)
        yield
    finally:
        _move(deployed, raw, torch.device("cpu"))


def _move(deployed: Deployed, raw: RawModule, device: torch.device) -> None:
    deployed.to(device)
    if isinstance(deployed, ForeignModule):  # its numbers are constants, which only loading puts on a device
        deployed.raw = _frozen(raw.module, device)


def _check_module(deployed: ForeignModule, graph: Graph, name: str) -> None:
    """ModelError if energies and features of a structure are not what the interface promises."""
    edge, n = graph.edge_vector.clone().requires_grad_(True), graph.n_atoms
    energy, phi = deployed(graph.species, graph.edge_index, edge, n)
    wrong = {
        f"energies of shape {tuple(energy.shape)}, not one for each of {n} atoms": energy.shape != (n,),
        f"energies in {energy.dtype}, not float64": energy.dtype != torch.float64,
        f"features of shape {tuple(phi.shape)}, not {(n, deployed.n_features)}": phi.shape != (n, deployed.n_features),
        "energies or features that do not depend on edge_vector": not (energy.requires_grad and phi.requires_grad),
        "energies or features that are not finite": not np.isfinite([*energy.tolist(), *phi.flatten().tolist()]).all(),
    }
    for what, holds in wrong.items():
        if holds:
            raise ModelError(f"The module of the back end {name!r} gives {what}.")


def _check_layers(deployed: ForeignModule, raw: RawModule, name: str) -> None:
    """ModelError if results for an atom depend on pairs further away than ``raw.layers`` says.

    LAMMPS would give such a module too few atoms, and no error. The first atom of a chain shows it.
    """
    steps = np.arange(raw.layers + 2)
    positions = np.stack([0.55 * steps, 0.25 * (steps % 2), 0.1 * (steps % 3)], 1) * raw.cutoff
    symbols = [raw.elements[k % len(raw.elements)] for k in steps]
    graph = build_graph(Atoms(symbols, positions), raw.elements, raw.cutoff)
    edge = graph.edge_vector.clone().requires_grad_(True)
    energy, phi = deployed(graph.species, graph.edge_index, edge, graph.n_atoms)
    (slopes,) = torch.autograd.grad(energy[0] + phi[0].sum(), edge, allow_unused=True)
    if slopes is None:
        return
    sizes = slopes.abs().sum(1)
    if (sizes[graph.edge_index[0] >= raw.layers] > 1e-9 * sizes.max()).any():
        raise ModelError(
            f"The module of the back end {name!r} passes messages in more steps than layers = {raw.layers} says."
        )


def _frozen(file: Path, device: torch.device | None = None) -> torch.jit.ScriptModule:
    """The module of a TorchScript file with its numbers as constants, on a device (None: the CPU).

    Their precision does not change with that of the model file, which applies to parameters only: a module of another
    program may mix them with buffers.
    """
    loaded = torch.jit.load(str(file), map_location="cpu").eval()
    buffer = io.BytesIO()  # a frozen module can be part of another one only when it has been loaded
    torch.jit.save(torch.jit.freeze(loaded, optimize_numerics=False), buffer)
    buffer.seek(0)
    frozen: torch.jit.ScriptModule = torch.jit.load(buffer, map_location=device or "cpu")
    return frozen


def _graph(raw: RawModule) -> dict[str, Any]:
    """What only some modules have in their record: a local one that any precision suits adds nothing."""
    values = {"layers": raw.layers, "fixed_precision": raw.fixed_precision, "backend": raw.backend}
    absent: dict[str, Any] = {"layers": 1, "fixed_precision": False, "backend": {}}
    return {name: value for name, value in values.items() if value != absent[name]}


def _calibrated(said: Sequence[Outcome], settings: UncertaintySettings, elements: Sequence[int]) -> Calibration:
    by_structure = settings.atoms_by == "structure"
    return calibrate(said, settings.alpha, by_structure, elements if settings.by_element else None)


def _factors(found: Calibration) -> dict[str, dict[str, Any]]:
    """Conformal factors, and what they rest on, as in the record of a model file."""
    scales = {"energy": found.energy, "forces": found.forces}
    return {
        name: {"scale": scale.scale, "attainable": scale.attainable, "n_calibration": scale.count}
        for name, scale in scales.items()
    }


def _metadata(
    raw: RawModule,
    name: str,
    deployed: Deployed,
    settings: UncertaintySettings,
    found: Calibration,
    n_training: int,
) -> dict[str, Any]:
    """The JSON record of the file."""
    parts = _factors(found)
    parts["energy"]["feature_scale"] = float(deployed.structure_uncertainty.feature_scale)
    parts["forces"]["feature_scale"] = float(deployed.atom_uncertainty.feature_scale)
    by_element = {} if found.atom_scale is None else {"atom_scale": list(found.atom_scale.values())}
    return {
        "format": format_of(raw.layers, raw.fixed_precision, scaled=bool(by_element)),
        "model": name,
        "elements": list(raw.elements),
        "cutoff": raw.cutoff,
        "units": {"energy": "eV", "length": "Å", "force": "eV/Å", "stress": "eV/Å^3"},
        "precision": raw.precision,
        **_graph(raw),
        **by_element,
        # projections: the length of the features, which is the number of members in an ensemble
        "uncertainty": {
            **settings.model_dump(exclude=WITHOUT_EFFECT[settings.kind]),
            "projections": deployed.n_features,
            **parts,
        },
        "n_training": n_training,
        **raw.record,
        "package_version": __version__,
        "torch_version": torch.__version__,
    }
