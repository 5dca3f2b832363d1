"""Energy modules of other programs: TorchScript files that say themselves which elements, cutoff and layers they have.

Besides ``forward`` (see `ubmd.potentials.interface.RawModule`) a module has the attributes

- ``elements``: names of the species 0, 1, ...
- ``cutoff``: Å
- ``layers``: steps of message passing; 1 if the energy of an atom depends on the edges of that atom alone
- ``precision`` (optional): 'float32' or 'float64', if it runs in no other; without it, it takes edge vectors of either.
"""

import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from torch import Tensor, nn

from ubmd.data.graph import build_graph, chunks
from ubmd.errors import DataError, ModelError
from ubmd.files import file_hash, replacing
from ubmd.potentials.interface import RawModule

ATTRIBUTES = ("elements", "cutoff", "layers")
_ARGUMENTS = ["species", "edge_index", "edge_vector", "n_local"]


def is_torchscript(path: Path) -> bool:
    """Whether a file is TorchScript, by its list of contents: nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_raw(path: Path, name: str = "file") -> RawModule:
    """The module of a TorchScript file, which is run, with what it says of itself.

    Args:
        path: the file.
        name: of the program that it is from, for the record of the model file.

    Raises:
        ModelError: there is none, it is something else, or it lacks an attribute or has a wrong one.
    """
    module = _load(path)
    missing = [key for key in ATTRIBUTES if not hasattr(module, key)]
    if missing:
        raise ModelError(
            f"{path}: the module has no attribute {missing[0]!r}; set elements (names), cutoff (Å) and layers (1 "
            "without message passing) in its __init__."
        )
    elements, cutoff, layers = list(module.elements), module.cutoff, module.layers
    precision = getattr(module, "precision", None)
    _check_attributes(path, elements, cutoff, layers, precision)
    return RawModule(
        module=path,
        elements=elements,
        cutoff=float(cutoff),
        n_features=_count_features(module, path),
        precision=precision or _precision(module),
        fixed_precision=precision is not None,
        layers=layers,
        record=_record(module, elements),
        backend={"name": name, "checkpoint": file_hash(path)},
    )


def _record(module: Any, elements: Sequence[str]) -> dict[str, Any]:
    """The constants that `write_shifted` has added, of the elements that have any."""
    if not isinstance(getattr(module, "constants", None), Tensor):
        return {}
    return {
        "constants": {name: value for name, value in zip(elements, module.constants.tolist(), strict=True) if value}
    }


def _load(path: Path) -> Any:
    """The module, if its ``forward`` has the right arguments."""
    if not path.is_file():
        raise ModelError(f"There is no file {path}.")
    if not is_torchscript(path):
        raise ModelError(f"{path} is no TorchScript file: save the module with torch.jit.script(module).save(PATH).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu").eval()
        found = [argument.name for argument in module.forward.schema.arguments[1:]]
    except (RuntimeError, AttributeError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded as TorchScript: {str(error).strip().splitlines()[-1]}") from None
    if hasattr(module, "metadata") and hasattr(module, "uncertainty"):
        raise ModelError(f"{path} is a model file of ubmd already: it has an uncertainty.")
    if len(found) != len(_ARGUMENTS):
        raise ModelError(
            f"{path}: forward takes ({', '.join(found)}), but ({', '.join(_ARGUMENTS)}) is needed: see 'Your own "
            "model' in USAGE.md."
        )
    return module


def _check_attributes(path: Path, elements: Sequence[str], cutoff: Any, layers: Any, precision: Any) -> None:
    """ModelError for an attribute that cannot be what its name says."""
    unknown = [element for element in elements if element not in atomic_numbers]
    wrong = {
        f"elements = {list(elements)} names {unknown[0] if unknown else 'nothing'}, which is no element": bool(unknown)
        or not elements,
        f"elements = {list(elements)} names an element twice": len(set(elements)) < len(elements),
        f"cutoff = {cutoff!r} is no length in Å": not _is_length(cutoff),
        f"layers = {layers!r} is no number of message-passing steps: 1, 2, ...": type(layers) is not int or layers < 1,
        f"precision = {precision!r} is neither 'float32' nor 'float64'": precision not in (None, "float32", "float64"),
    }
    for what, holds in wrong.items():
        if holds:
            raise ModelError(f"{path}: {what}.")


def _is_length(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 < value < math.inf


def _precision(module: nn.Module) -> str:
    """Of the parameters: that which the module was trained in."""
    kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return "float32" if kinds == {torch.float32} else "float64"


def _count_features(module: Any, path: Path) -> int:
    """p, from one pair of atoms of the first element at half the cutoff."""
    species = torch.zeros(2, dtype=torch.int64)
    edge = torch.tensor([[0.5 * module.cutoff, 0.0, 0.0], [-0.5 * module.cutoff, 0.0, 0.0]], dtype=torch.float64)
    try:
        with torch.no_grad(), torch.jit.optimized_execution(False):
            phi = module(species, torch.tensor([[0, 1], [1, 0]]), edge, 2)[1]
        return int(phi.shape[1])
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(
            f"{path}: forward fails for two atoms, or does not give (energies [n], features [n, p]): "
            f"{str(error).strip().splitlines()[-1]}"
        ) from None


# ------------------------------------------------------------------------------------------ constants of the elements


class Shifted(nn.Module):
    """A module whose energies are changed by a constant per element; it is a module of this kind itself."""

    constants: Tensor

    def __init__(self, module: Any, raw: RawModule, constants: Sequence[float]) -> None:
        super().__init__()
        self.module: Any = module
        self.elements = list(raw.elements)
        self.cutoff = raw.cutoff
        self.layers = raw.layers
        if raw.fixed_precision:
            self.precision = raw.precision
        self.register_buffer("constants", torch.tensor(constants, dtype=torch.float64))

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], phi [n_local, p])."""
        energy, phi = self.module(species, edge_index, edge_vector, n_local)
        return energy + self.constants.index_select(0, species[:n_local]), phi


def write_shifted(raw: RawModule, constants: Mapping[str, float], target: Path) -> None:
    """Write a module with constants (element -> eV per atom) added to its energies; the file is read by `read_raw`."""
    each = [constants.get(element, 0.0) for element in raw.elements]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(Shifted(torch.jit.load(str(raw.module), map_location="cpu").eval(), raw, each))
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as handle:
        torch.jit.save(scripted, handle)


def fitted_constants(raw: RawModule, labels: Sequence[Atoms]) -> dict[str, float]:
    """What has to be added to the energy of an atom of each element so that the module fits the labels' energies.

    Least squares of the energies per atom, minimum norm if the compositions do not tell the elements apart: energies of
    two levels of theory differ by large constants, which a calibration would take for uncertainty.

    Args:
        raw: its module is a TorchScript file.
        labels: structures with energies; those without are left out.

    Returns:
        element -> eV, of the elements that occur.

    Raises:
        DataError: an element that the module does not know.
    """
    labelled = [atoms for atoms in labels if np.isfinite(_energy(atoms))]
    if not labelled:
        return {}
    module = torch.jit.load(str(raw.module), map_location="cpu").eval()
    graphs = [build_graph(atoms, raw.elements, raw.cutoff) for atoms in labelled]
    found = []
    with torch.no_grad(), torch.jit.optimized_execution(False):
        for batch in chunks(iter(graphs)):
            energy = module(batch.species, batch.edge_index, batch.edge_vector, len(batch.species))[0].double()
            found += torch.zeros(batch.n_structures, dtype=torch.float64).index_add(0, batch.structure, energy).tolist()
    counts = np.stack([np.bincount(graph.species.numpy(), minlength=len(raw.elements)) for graph in graphs])
    sizes = counts.sum(1)
    difference = np.array([graph.energy for graph in graphs]) - found
    if not np.isfinite(difference).all():
        raise DataError("The module gives energies that are not finite for the training labels.")
    added, *_ = np.linalg.lstsq(counts / sizes[:, None], difference / sizes, rcond=None)
    present = counts.sum(0) > 0
    return {element: float(added[k]) for k, element in enumerate(raw.elements) if present[k]}


def _energy(atoms: Atoms) -> float:
    """The label, eV; NaN if there is none."""
    return float(atoms.calc.results.get("energy", np.nan)) if atoms.calc is not None else math.nan
