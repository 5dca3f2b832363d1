"""The closed-form interface of model files against the differentiable forward in plain torch and autograd.

Every test runs on files in plain torch and on files that call the compiled operators.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from small_model import ELEMENTS, SETTINGS, labelled, triclinic

from ubmd.data.graph import Graph, build_graph
from ubmd.operators import available
from ubmd.potentials.evaluation import Evaluation, FastEvaluation, evaluation
from ubmd.potentials.file import load_model
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.sketch import GradientSketch
from ubmd.settings import UncertaintySettings

KINDS = ["posterior", "last-layer", "distance", "ensemble"]
SKETCHED = KINDS[:3]
TRAINING = [labelled(molecule("CH3CONH2"), k) for k in range(5)]
CALIBRATION = [labelled(molecule("CH3CONH2"), k) for k in range(5, 9)]
STRUCTURES = {
    "molecule": labelled(molecule("CH3CONH2"), 50),
    "cell": triclinic(),
    "lone atoms": Atoms("OHC", positions=[[0, 0, 0], [1, 0, 0], [9, 0, 0]]),
    "no pairs": Atoms("CH", positions=[[0, 0, 0], [9, 0, 0]]),
    "no atoms": Atoms(),
}


def network(seed: int) -> GaussianMomentNetwork:
    """With energy scales and shifts that differ by element, and biases that are not zero."""
    model = GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.scale.copy_(torch.tensor([1.1, 0.8, 1.3, 0.9], dtype=torch.float64))
        model.constant.fill_(0.7)
        model.shift.copy_(torch.linspace(-1.0, 2.0, 4) + 0.1 * seed)
        for bias in model.biases:
            bias.normal_(generator=generator)
    return model


class Pair(NamedTuple):
    """A module under test, and the same one in plain torch."""

    module: Any
    plain: Any


class Files:
    """Model files of every kind, with or without operators, made and loaded when they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: dict[Path, Any] = {}

    def pair(self, kind: str, operators: bool) -> Pair:
        return Pair(self.module(kind, operators), self.module(kind, False))

    def module(self, kind: str, operators: bool) -> Any:
        path = self.path(kind, operators)
        if path not in self.modules:
            self.modules[path] = load_model(path)
        return self.modules[path]

    def path(self, kind: str, operators: bool) -> Path:
        path = self.folder / f"{kind}-{operators}.pt"
        if not path.exists():
            settings = UncertaintySettings(kind=kind, projections=16, references=20, seed=3, alpha=0.3)
            models = [network(3 + m) for m in range(settings.networks)]
            export_model(models, TRAINING, CALIBRATION, settings, path, operators=operators)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("fast"))


@pytest.fixture(autouse=True)
def no_optimiser() -> Iterator[None]:
    """As everywhere in this package: TorchScript's optimiser compiles anew for every shape."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, files: Files, operators: bool) -> Pair:
    return files.pair(request.param, operators)


@pytest.fixture(params=SKETCHED)
def sketched(request: pytest.FixtureRequest, files: Files, operators: bool) -> Pair:
    return files.pair(request.param, operators)


@pytest.fixture(params=list(STRUCTURES))
def graph(request: pytest.FixtureRequest) -> Graph:
    return build_graph(STRUCTURES[request.param], ELEMENTS, SETTINGS.cutoff)


def by_centre(graph: Graph, start: int = 0, stop: int | None = None) -> tuple[torch.Tensor, ...]:
    """species, first, neighbours and vectors of the centres start .. stop - 1."""
    stop = graph.n_atoms if stop is None else stop
    counts = torch.bincount(graph.edge_index[0], minlength=graph.n_atoms)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])[start : stop + 1]
    pairs = slice(int(first[0]), int(first[-1]))
    return (
        graph.species[start:stop],
        first - first[0],
        graph.species[graph.edge_index[1, pairs]],
        graph.edge_vector[pairs],
    )


def reference(module: Any, graph: Graph, value: Callable[..., torch.Tensor]) -> tuple[Any, ...]:
    """(E, phi, d value(E, phi)/d edge_vector) by autograd."""
    edge = graph.edge_vector.clone().requires_grad_(True)
    energy, phi = module(graph.species, graph.edge_index, edge, graph.n_atoms)
    gradient = torch.zeros_like(edge)
    if len(edge):
        (gradient,) = torch.autograd.grad(value(energy, phi), edge)
    return energy.detach(), phi.detach(), gradient


def weights(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(8).normal(size=shape))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-11) -> None:
    """Equal shapes, and equal up to a share of the largest number."""
    assert actual.shape == expected.shape
    assert not actual.requires_grad
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * size)


def test_energies_and_gradients(pair: Pair, graph: Graph) -> None:
    module, plain = pair
    energy, _, gradient = reference(plain, graph, lambda e, phi: e.sum())
    for keep in (False, True):
        fast, slope, tape = module.evaluate(*by_centre(graph), keep)
        assert_close(fast, energy)
        assert_close(slope, gradient)
        assert slope.dtype == torch.float64
        assert bool(tape) == keep


@pytest.mark.parametrize("by_structure", [False, True])
def test_feature_sums_and_their_gradients(pair: Pair, graph: Graph, by_structure: bool) -> None:
    module, plain = pair
    w = weights(module.n_features)
    _, phi, gradient = reference(plain, graph, lambda e, phi: (phi @ w).sum())
    tape = module.evaluate(*by_centre(graph), True)[2]
    sums, rows, factors = module.features(tape, by_structure)
    if len(rows) or not by_structure:
        assert_close(rows, phi)
    assert_close(module.feature_sum(sums), phi.sum(0))
    directions = module.directions(w, by_structure)
    assert_close(module.feature_gradient(tape, factors, directions, w), gradient)
    if hasattr(module, "kept_for_bias"):
        kept = module.kept_for_bias(tape, by_structure)
        assert sum(part.numel() for part in kept) < sum(part.numel() for part in tape) or not graph.n_atoms
        assert_close(module.feature_gradient(kept, factors, directions, w), gradient)


def test_gradients_with_different_weights_for_every_atom(sketched: Pair, graph: Graph) -> None:
    module, plain = sketched
    w = weights(graph.n_atoms, module.n_features)
    gradient = reference(plain, graph, lambda e, phi: (phi * w).sum())[2]
    tape = module.evaluate(*by_centre(graph), True)[2]
    factors = module.features(tape, False)[2]
    assert_close(module.feature_gradient(tape, factors, [], w), gradient)


@pytest.mark.parametrize("by_structure", [False, True])
def test_chunks_add_up(pair: Pair, by_structure: bool) -> None:
    module, plain = pair
    graph = build_graph(STRUCTURES["molecule"], ELEMENTS, SETTINGS.cutoff)
    w = weights(module.n_features)
    energy, phi, gradient = reference(plain, graph, lambda e, phi: (phi @ w).sum())
    blocks = [(0, 4), (4, 4), (4, 9)]
    assert blocks[-1][1] == graph.n_atoms
    tapes = [module.evaluate(*by_centre(graph, *block), True) for block in blocks]
    kept = [module.features(tape, by_structure) for _, _, tape in tapes]
    sums = [sum(parts[1:], parts[0]) for parts in zip(*[sums for sums, _, _ in kept], strict=True)]
    directions = module.directions(w, by_structure)
    slopes = [
        module.feature_gradient(tape, factors, directions, w)
        for (_, _, tape), (_, _, factors) in zip(tapes, kept, strict=True)
    ]
    assert_close(torch.cat([e for e, _, _ in tapes]), energy)
    assert_close(module.feature_sum(sums), phi.sum(0))
    assert_close(torch.cat(slopes), gradient)


def test_members_of_an_ensemble(files: Files, operators: bool, graph: Graph) -> None:
    module, plain = files.pair("ensemble", operators)
    cotangents = weights(3, len(graph.edge_vector), 3)
    edge = graph.edge_vector.clone().requires_grad_(True)
    phi = plain(graph.species, graph.edge_index, edge, graph.n_atoms)[1]
    gradients, bias = torch.zeros_like(cotangents), torch.zeros_like(edge)
    if len(edge):
        columns = [torch.autograd.grad(phi[:, m].sum(), edge, create_graph=True)[0] for m in range(3)]
        gradients = torch.stack(columns)
        (bias,) = torch.autograd.grad((cotangents * gradients).sum(), edge)
    arguments = by_centre(graph)
    assert_close(module.member_gradients(module.evaluate(*arguments, True)[2]), gradients.detach())
    assert_close(module.member_bias(*arguments, cotangents), bias)


def test_generic_and_fast_evaluation_agree(pair: Pair, graph: Graph) -> None:
    """What Python uses: files without the fast part go through the generic one."""
    module, plain = pair
    fast, generic = FastEvaluation(module, graph, graph.edge_vector), Evaluation(plain, graph, graph.edge_vector)
    w = weights(module.n_features)
    assert type(evaluation(module, graph, graph.edge_vector)) is FastEvaluation
    for value in (
        lambda e: e.energy,
        lambda e: e.gradient,
        lambda e: e.phi,
        lambda e: e.feature_gradient(w),
        lambda e: e.atomic_uncertainties(),
        lambda e: e.atomic_uncertainty_gradient()[0],
        lambda e: e.atomic_uncertainty_gradient()[1],
    ):
        assert_close(value(fast), value(generic), 1e-9)


def test_generic_part_agrees_with_plain_torch(pair: Pair, graph: Graph) -> None:
    """forward with its graph, forces and bias, for programs that don't know the fast part."""
    module, plain = pair
    w = weights(module.n_features)
    arguments = (graph.species, graph.edge_index, graph.edge_vector, graph.n_atoms)

    def value(energy: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
        return energy.square().sum() + (phi @ w).sum()

    for a, b in zip(reference(module, graph, value), reference(plain, graph, value), strict=True):
        assert_close(a, b)
    for a, b in zip(module.forces(*arguments), plain.forces(*arguments), strict=True):
        assert_close(a, b)
    assert_close(module.bias(*arguments, w), plain.bias(*arguments, w))


def test_works_in_every_grad_mode_and_leaves_it_alone(pair: Pair) -> None:
    graph = build_graph(STRUCTURES["molecule"], ELEMENTS, SETTINGS.cutoff)
    results = []
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            results.append(pair.module.evaluate(*by_centre(graph), True)[:2])
            assert torch.is_grad_enabled() == mode
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge_dtype", [torch.float64, torch.float32])
def test_mixed_and_single_stay_close_to_double(
    files: Files, operators: bool, kind: str, edge_dtype: torch.dtype
) -> None:
    graph = build_graph(STRUCTURES["molecule"], ELEMENTS, SETTINGS.cutoff)
    exact, rough = files.module(kind, False), load_model(files.path(kind, operators), "mixed")
    *arguments, edge = by_centre(graph)
    for by_structure in (False, True):
        results = []
        for module, vectors in ((exact, edge), (rough, edge.to(edge_dtype))):
            energy, gradient, tape = module.evaluate(*arguments, vectors, True)
            sums, _, factors = module.features(tape, by_structure)
            mean = (module.feature_sum(sums) / graph.n_atoms).requires_grad_(True)
            u = module.uncertainty(mean)
            (w,) = torch.autograd.grad(u, mean)
            bias = module.feature_gradient(tape, factors, module.directions(w, by_structure), w)
            results.append((energy, gradient, u.detach(), bias))
            assert all(result.dtype == torch.float64 for result in results[-1])
        for a, b, tolerance in zip(*results, (1e-5, 1e-5, 1e-3, 1e-3), strict=True):
            assert_close(b, a, tolerance)


def test_paths_are_chosen_by_their_multiply_adds(files: Files) -> None:
    """By structure pays for large systems, where there are more projections than a tangent pass costs."""
    inputs, hidden1, hidden2 = 360, 512, 512
    for p, expected in ((512, {100: False, 2000: True}), (128, {100: False, 2000: False})):
        sketch = GradientSketch((inputs, hidden1, hidden2), p, seed=0)
        for n, choice in expected.items():
            forward = inputs * hidden1 + hidden1 * hidden2
            tangent = 3 * inputs * hidden1 + 4 * hidden1 * hidden2
            by_structure = n * (forward + tangent) + 2 * p * forward
            sketched = p * (inputs + 2 * hidden1 + 2 * hidden2)
            pulled = p * (inputs + 2 * hidden1 + hidden2) + inputs * hidden1 + 2 * hidden1 * hidden2
            assert sketch.by_structure(n) == (by_structure < n * (sketched + pulled)) == choice
    assert files.module("last-layer", False).by_structure(1)
    assert not files.module("ensemble", False).by_structure(10**6)


def test_files_say_whether_they_need_operators(files: Files, operators: bool) -> None:
    for kind in KINDS:
        path = files.path(kind, operators)
        with ZipFile(path) as archive:
            code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".py"))
        assert json.loads(files.module(kind, operators).metadata())["operators"] == (["ubmd"] if operators else [])
        assert ("ops.ubmd." in code) == operators


def test_file_that_needs_missing_operators_says_so(files: Files) -> None:
    """In a process of its own, since operators stay registered."""
    if not available():
        pytest.skip("the compiled operators are not installed")
    program = """
import sys
from pathlib import Path
from ubmd import operators
operators.library_file = lambda: Path("/nowhere/libubmd_ops.so")
from ubmd.errors import ModelError
from ubmd.potentials.file import load_model
load_model(Path(sys.argv[2]))
try:
    load_model(Path(sys.argv[1]))
except ModelError as error:
    print(error)
"""
    paths = [str(files.path("posterior", operators)) for operators in (True, False)]
    result = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    assert result.stdout.count("\n") == 1
    assert "needs ubmd's compiled operators" in result.stdout
    assert "ubmd export --no-operators" in result.stdout
