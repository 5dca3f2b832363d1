"""A trained MACE as a module of ubmd: energies of atoms and features, differentiable by edge vectors.

This file runs in the Python that has MACE, not in ubmd's: it imports torch, mace and e3nn, and nothing of ubmd. What it
makes is TorchScript that needs none of them.
"""

import math
from typing import Any

import torch
from e3nn import o3
from e3nn.util.jit import compile_mode
from torch import Tensor, nn

KINDS = ("MACE", "ScaleShiftMACE")


class Unknown(Exception):
    """A network with parts that this file does not know; the message is for the user."""


@compile_mode("script")
class Linear(nn.Module):
    """Derivatives of the energy by the weights of a linear readout: its scalar inputs, divided by sqrt(n)."""

    def __init__(self, readout: Any, scale: float) -> None:
        super().__init__()
        self.first, self.count = scalars(readout.linear.irreps_in)
        self.factor = scale / self.count**0.5

    def forward(self, x: Tensor) -> Tensor:
        """[n, scalars] of node features [n, d]."""
        derivatives: Tensor = x[:, self.first : self.first + self.count] * self.factor
        return derivatives


@compile_mode("script")
class Hidden(nn.Module):
    """Derivatives by the last weights of a readout with one hidden layer."""

    def __init__(self, readout: Any, scale: float) -> None:
        super().__init__()
        self.linear_1: Any = readout.linear_1
        self.non_linearity: Any = readout.non_linearity
        self.factor = scale / readout.linear_2.irreps_in.dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        """[n, hidden] of node features [n, d]."""
        derivatives: Tensor = self.non_linearity(self.linear_1(x)) * self.factor
        return derivatives


@compile_mode("script")
class SketchedLinear(nn.Module):
    """A random projection of `Linear`."""

    projection: Tensor

    def __init__(self, readout: Any, scale: float, projections: int, generator: torch.Generator) -> None:
        super().__init__()
        self.exact = Linear(readout, scale)
        self.register_buffer("projection", _normal(self.exact.count, projections, generator))

    def forward(self, x: Tensor) -> Tensor:
        """[n, projections] of node features [n, d]."""
        return torch.mm(self.exact(x), self.projection.to(x.dtype))


@compile_mode("script")
class SketchedHidden(nn.Module):
    """A random projection of the derivatives by both layers of a readout with one hidden layer (SiLU).

    Those by the first layer are outer products x ⊗ delta: projected by products of two random vectors.
    """

    weights: Tensor
    projection: Tensor
    inputs: Tensor
    outputs: Tensor

    def __init__(self, readout: Any, scale: float, projections: int, generator: torch.Generator) -> None:
        super().__init__()
        act = readout.non_linearity.acts[0]
        if getattr(act, "f", None) is not torch.nn.functional.silu:
            raise Unknown("features = 'readout' needs a readout with SiLU; use features = 'nodes' or 'last-layer'")
        self.exact = Hidden(readout, scale)
        hidden = int(readout.linear_2.irreps_in.dim)
        self.first, self.count = scalars(readout.linear_1.irreps_in)
        self.constant = float(act.cst)
        self.factor = scale / hidden**0.5 / self.count**0.5
        self.register_buffer("weights", readout.linear_2.weight.detach().reshape(-1).clone())
        self.register_buffer("projection", _normal(hidden, projections, generator))
        self.register_buffer("inputs", _normal(self.count, projections, generator))
        self.register_buffer("outputs", _normal(hidden, projections, generator) * projections**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[n, projections] of node features [n, d]."""
        z = self.exact.linear_1(x)
        sigmoid = torch.sigmoid(z)
        slope = self.constant * sigmoid * (1.0 + z * (1.0 - sigmoid))
        delta = slope * self.weights.to(x.dtype) * self.factor
        inputs = torch.mm(x[:, self.first : self.first + self.count], self.inputs.to(x.dtype))
        last = torch.mm(self.exact(x), self.projection.to(x.dtype))
        return last + inputs * torch.mm(delta, self.outputs.to(x.dtype))


@compile_mode("script")
class Nodes(nn.Module):
    """The invariant node features of a layer."""

    def __init__(self, product: Any) -> None:
        super().__init__()
        self.first, self.count = scalars(product.linear.irreps_out)

    def forward(self, x: Tensor) -> Tensor:
        """[n, scalars] of node features [n, d]."""
        invariants: Tensor = x[:, self.first : self.first + self.count]
        return invariants


def scalars(irreps: Any) -> tuple[int, int]:
    """Where the invariant channels of node features begin, and how many they are."""
    found = [part for part, irrep in zip(irreps.slices(), irreps, strict=True) if irrep.ir == o3.Irrep(0, 1)]
    if len(found) != 1:
        raise Unknown(f"its node features {irreps} have {len(found)} groups of invariant channels, not one")
    return found[0].start, found[0].stop - found[0].start


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random numbers of variance 1/columns, so that scalar products survive the projection."""
    numbers = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return numbers / math.sqrt(columns)


def feature_modules(mace: Any, kind: str, scale: float, projections: int, seed: int) -> list[nn.Module]:
    """What makes features of the node features, one for each readout (``nodes``: one for each layer)."""
    if kind == "nodes":
        return [Nodes(product) for product in mace.products]
    generator = torch.Generator().manual_seed(seed)
    found: list[nn.Module] = []
    for readout in mace.readouts:
        has_hidden = hasattr(readout, "linear_1")
        if hasattr(readout, "linear_mid") or not (has_hidden or hasattr(readout, "linear")):
            raise Unknown(f"its readout {type(readout).__name__} has other layers; use features = 'nodes'")
        if kind == "readout":
            sketch = SketchedHidden if has_hidden else SketchedLinear
            found.append(sketch(readout, scale, projections, generator))
        else:
            found.append((Hidden if has_hidden else Linear)(readout, scale))
    return found


def check_kind(mace: Any) -> None:
    """Unknown for networks that need more than species and edges, or have several heads."""
    if type(mace).__name__ not in KINDS:
        raise Unknown(f"it is a {type(mace).__name__}, not one of {' and '.join(KINDS)}")
    heads = list(getattr(mace, "heads", ["Default"]))
    if len(heads) > 1:
        raise Unknown(f"it has the heads {', '.join(heads)}; choose one with mace_select_head, MACE's own command")
    if hasattr(mace, "joint_embedding"):
        raise Unknown("its energies depend on more than elements and positions (embedding_specs), such as a charge")


@compile_mode("script")
class Wrapped(nn.Module):
    """See `ubmd.potentials.interface.RawModule`."""

    atom_energies: Tensor
    numbers: Tensor
    unit: Tensor

    def __init__(self, mace: Any, kind: str, projections: int, seed: int, elements: list[str]) -> None:
        """``kind``: of features; ``elements``: names of ``mace.atomic_numbers``."""
        super().__init__()
        check_kind(mace)
        dtype = next(mace.parameters()).dtype
        scale = float(mace.scale_shift.scale.reshape(-1)[0]) if hasattr(mace, "scale_shift") else 1.0
        self.elements = elements
        self.cutoff = float(mace.r_max)
        self.layers = int(mace.num_interactions)
        self.precision = "float64" if dtype == torch.float64 else "float32"
        self.node_embedding: Any = mace.node_embedding
        self.spherical_harmonics: Any = mace.spherical_harmonics
        self.radial_embedding: Any = mace.radial_embedding
        self.interactions: Any = mace.interactions
        self.products: Any = mace.products
        self.readouts: Any = mace.readouts
        self.features = nn.ModuleList(feature_modules(mace, kind, scale, projections, seed))
        self.sketched = kind == "readout"
        self.only_last = len(mace.readouts) == 1 and kind != "nodes"
        self.only_last_readout = len(mace.readouts) == 1
        self.scale = scale
        self.shift = float(mace.scale_shift.shift.reshape(-1)[0]) if hasattr(mace, "scale_shift") else 0.0
        if hasattr(mace, "pair_repulsion_fn"):
            self.pair_repulsion_fn: Any = mace.pair_repulsion_fn
        self.register_buffer(
            "atom_energies", mace.atomic_energies_fn.atomic_energies.detach().reshape(-1).double().clone()
        )
        self.register_buffer("numbers", mace.atomic_numbers.clone())
        self.register_buffer("unit", torch.ones(1, dtype=dtype))  # of the network's precision

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local] in eV, float64; phi [n_local, p])."""
        attributes = torch.nn.functional.one_hot(species, self.atom_energies.size(0)).to(self.unit.dtype)
        vectors = -edge_vector.to(self.unit.dtype)  # MACE: from sender to receiver; here from centre to neighbour
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        index = torch.stack([edge_index[1], edge_index[0]])
        x = self.node_embedding(attributes)
        harmonics = self.spherical_harmonics(vectors)
        radial, cutoff = self.radial_embedding(lengths, attributes, index, self.numbers)
        nodes: list[Tensor] = []
        for k, (interaction, product) in enumerate(zip(self.interactions, self.products)):  # noqa: B905 (TorchScript)
            x, connection = interaction(
                node_attrs=attributes,
                node_feats=x,
                edge_attrs=harmonics,
                edge_feats=radial,
                edge_index=index,
                cutoff=cutoff,
                first_layer=(k == 0),
            )
            x = product(node_feats=x, sc=connection, node_attrs=attributes)
            nodes.append(x)
        energy = torch.zeros_like(species, dtype=torch.float64)
        if hasattr(self, "pair_repulsion_fn"):
            energy = energy + self.pair_repulsion_fn(lengths, attributes, index, self.numbers).double()
        for k, readout in enumerate(self.readouts):
            energy = energy + readout(nodes[-1 if self.only_last_readout else k], None)[:, 0].double()
        energy = self.atom_energies.index_select(0, species) + self.scale * energy + self.shift
        return energy[:n_local], self.joined(nodes)[:n_local]

    def joined(self, nodes: list[Tensor]) -> Tensor:
        """phi [n, p] of the node features of all layers: sketches are summed, others follow one another."""
        parts: list[Tensor] = []
        for k, feature in enumerate(self.features):
            parts.append(feature(nodes[-1 if self.only_last else k]))
        if self.sketched:
            return torch.stack(parts).sum(0)
        return torch.cat(parts, 1)
