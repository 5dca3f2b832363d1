"""A back end with message passing: a small network of known range, in plain torch. Nothing in ubmd knows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from ase import Atoms
from linear_backend import CUTOFF, equations
from small_model import labelled
from torch import Tensor, nn

from ubmd.potentials.fitting import export_raw
from ubmd.potentials.interface import Labels, RawModule, Report, TrainingTable
from ubmd.settings import ModelSettings, UncertaintySettings

LAYERS = 3
WIDTH = 6


class Module(nn.Module):
    """Atoms add up what their neighbours send, with lengths and directions of the pairs; energies are linear in phi.

    phi_i holds 1 for each element and what atom i knows after the last step. All numbers are buffers, so their
    precision is fixed.
    """

    def __init__(self, n_elements: int, layers: int, silent_below: int = 0) -> None:
        """``silent_below``: in graphs of fewer pairs the last step sends nothing, which hides it from a check."""
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return 0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.dtype = torch.float64
        self.n_elements, self.layers, self.silent_below = n_elements, layers, silent_below
        self.register_buffer("start", random(n_elements, WIDTH))
        self.register_buffer("send", random(layers, WIDTH, WIDTH))
        self.register_buffer("turn", random(layers, WIDTH, WIDTH))
        self.register_buffer("keep", random(layers, WIDTH, WIDTH))
        self.register_buffer("weights", random(n_elements + WIDTH))

    def single(self) -> Module:
        """In float32; energies are summed in float64."""
        self.dtype = torch.float32
        return self.float()

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """Energies [n_local] and features [n_local, p]."""
        centre, neighbour = edge_index[0], edge_index[1]
        vector = edge_vector.to(self.dtype)
        r = vector.square().sum(1).add(1e-30).sqrt()
        envelope = (0.5 * torch.cos(r.clamp(max=4.0) * (3.141592653589793 / 4.0)) + 0.5).unsqueeze(1)
        direction = vector / r.unsqueeze(1)
        state = self.start[species]
        for layer in range(self.layers):
            if layer + 1 == self.layers and edge_index.size(1) < self.silent_below:
                continue
            sent = (state @ self.send[layer])[neighbour] * envelope
            total = torch.zeros_like(state).index_add(0, centre, sent * torch.cos(2.0 * r).unsqueeze(1))
            turned = ((state @ self.turn[layer])[neighbour] * envelope).unsqueeze(2) * direction.unsqueeze(1)
            sums = torch.zeros(state.size(0), state.size(1), 3, dtype=self.dtype).index_add(0, centre, turned)
            state = torch.tanh(state @ self.keep[layer] + total + sums.square().sum(2))
        kind = torch.nn.functional.one_hot(species[:n_local], self.n_elements).to(self.dtype)
        phi = torch.cat([kind, state[:n_local]], 1)
        return (phi @ self.weights).to(torch.float64), phi


def raw_module(file: Path, elements: Sequence[str], module: Module, stated: int | None = None) -> RawModule:
    """The module as a TorchScript file; ``stated``: layers that its record says (default: those that it has)."""
    torch.jit.script(module).save(str(file))
    return RawModule(
        file,
        list(elements),
        CUTOFF,
        len(module.weights),
        str(module.dtype).removeprefix("torch."),
        fixed_precision=True,
        layers=stated or module.layers,
        backend={"name": "message_passing", "version": "1", "licence": "MIT"},
    )


def export(
    path: Path,
    elements: Sequence[str],
    structures: Sequence[Atoms],
    module: Module | None = None,
    stated: int | None = None,
    model: ModelSettings | None = None,
) -> dict:
    """A model file with random weights, its uncertainty fitted on all structures but the last two; the record."""
    raw = raw_module(path.with_suffix(".raw"), elements, module or Module(len(elements), LAYERS), stated)
    uncertainty = UncertaintySettings()
    return export_raw(raw, "messages", model or ModelSettings(), structures[:-2], structures[-2:], uncertainty, path)


def shaken(structures: Iterable[Atoms]) -> list[Atoms]:
    """Two of each, with random labels."""
    return [labelled(atoms, seed) for seed, atoms in enumerate([*structures] * 2)]


class MessagePassing:
    """Random messages; least squares of the readout on energies and forces, at once."""

    name = "messages"
    checkpoint = "messages.pt"
    uncertainties = ("posterior", "distance")

    def train(
        self, labels: Labels, table: TrainingTable, folder: Path, start: Path | None, seed: int, report: Report | None
    ) -> Path:
        """Solve for the weights."""
        elements = sorted({symbol for atoms in (*labels.training, *labels.validation) for symbol in atoms.symbols})
        module = Module(len(elements), LAYERS)
        rows, values = zip(*(equations(module, atoms, elements) for atoms in labels.training), strict=True)
        matrix, target = torch.cat(rows), torch.cat(values)
        square = matrix.T @ matrix + 1e-6 * torch.eye(matrix.size(1), dtype=torch.float64)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.checkpoint
        torch.save({"elements": elements, "weights": torch.linalg.solve(square, matrix.T @ target)}, path)
        if report is not None:
            report({"epoch": 1, "epochs": 1})
        return path

    def raw_module(self, checkpoints: Sequence[Path], features: UncertaintySettings) -> RawModule:
        """The module as a TorchScript file, as one from another Python would come."""
        (path,) = checkpoints
        found = torch.load(path, weights_only=True)
        module = Module(len(found["elements"]), LAYERS)
        module.weights.copy_(found["weights"])
        return raw_module(path.with_name("raw.pt"), found["elements"], module)
