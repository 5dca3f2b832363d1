"""Symmetries, derivatives and limits of the GM-NN model; every oracle is independent of the code under test."""

import itertools

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from scipy.spatial.transform import Rotation
from small_model import ELEMENTS, SETTINGS, central, labelled, triclinic

from ubmd.calculator import Calculator
from ubmd.data.graph import build_graph, collate
from ubmd.errors import DataError, ModelError
from ubmd.operators import use_operators
from ubmd.potentials.file import load_model
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.gaussian_moments import GaussianMoments, count_invariants
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.settings import ModelSettings, UncertaintySettings


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory):
    model = GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=3)
    structures = [labelled(molecule("CH3CONH2"), k) for k in range(8)]
    path = tmp_path_factory.mktemp("model") / "model.pt"
    export_model(model, structures[:5], structures[5:], UncertaintySettings(projections=16), path)
    return path


def slow_invariants(descriptor: GaussianMoments, atoms: Atoms, cutoff: float) -> np.ndarray:
    """The table of the eight contractions by einsum over full tensors, pair by pair from brute-force images."""
    b = descriptor.radial.detach().double().numpy()
    n_basis, beta = descriptor.n_basis, descriptor.n_basis**2 / cutoff**2
    centres = 0.5 + np.arange(n_basis) * (cutoff - 0.5) / n_basis
    z = [ELEMENTS.index(s) for s in atoms.symbols]
    images = itertools.product(range(-3, 4), repeat=3) if atoms.pbc.all() else [(0, 0, 0)]
    shifts = np.array(list(images)) @ atoms.cell.array
    result = []
    for i in range(len(atoms)):
        t = [np.zeros((descriptor.n_radial,) + (3,) * rank) for rank in range(4)]
        for j in range(len(atoms)):
            for shift in shifts:
                d = atoms.positions[j] + shift - atoms.positions[i]
                r = np.linalg.norm(d)
                if r < 1e-8 or r >= cutoff:
                    continue
                g = (2 * beta / np.pi) ** 0.25 * np.exp(-beta * (r - centres) ** 2)
                radial = 0.5 * (1 + np.cos(np.pi * r / cutoff)) / np.sqrt(n_basis) * b[z[i], z[j]] @ g
                u = d / r
                t[0] += radial
                t[1] += np.einsum("s,i->si", radial, u)
                t[2] += np.einsum("s,i,j->sij", radial, u, u)
                t[3] += np.einsum("s,i,j,k->sijk", radial, u, u, u)
        n = descriptor.n_radial
        pairs = list(itertools.combinations_with_replacement(range(n), 2))
        triples = itertools.combinations_with_replacement(range(n), 3)
        out = list(t[0])
        for rank, sub in ((1, "i,i"), (2, "ij,ij"), (3, "ijk,ijk")):
            out += [np.einsum(f"{sub}->", t[rank][r], t[rank][s]) for r, s in pairs]
        out += [np.einsum("ij,ik,jk->", t[2][r], t[2][s], t[2][v]) for r, s, v in triples]
        out += [np.einsum("i,j,ij->", t[1][r], t[1][s], t[2][v]) for r, s in pairs for v in range(n)]
        out += [np.einsum("ijk,ijl,kl->", t[3][r], t[3][s], t[2][v]) for r, s in pairs for v in range(n)]
        out += [
            np.einsum("ijk,ij,k->", t[3][r], t[2][s], t[1][v]) for r in range(n) for s in range(n) for v in range(n)
        ]
        result.append(out)
    return np.array(result)


@pytest.mark.parametrize("atoms", [molecule("CH3CONH2"), triclinic()], ids=["molecule", "small triclinic cell"])
def test_invariants_match_slow_einsum(atoms: Atoms, operators: bool) -> None:
    model = GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=1).to_network_dtype(torch.float64)
    use_operators(model, operators)
    graph = build_graph(atoms, ELEMENTS, model.cutoff)
    fast = model.descriptor(graph.species, graph.edge_index, graph.edge_vector, len(atoms)).detach().numpy()
    slow = slow_invariants(model.descriptor, atoms, model.cutoff)
    assert fast.shape == slow.shape == (len(atoms), count_invariants(3))
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-11 * np.abs(slow).max())


def test_named_sizes_have_the_published_number_of_invariants() -> None:
    assert (count_invariants(5), count_invariants(7)) == (360, 910)
    light, paper = (GaussianMomentNetwork(["Si"], ModelSettings(size=size)) for size in ("light", "paper"))
    assert (light.weights[0].shape, paper.weights[0].shape) == ((512, 360), (512, 910))


def outputs(path, atoms: Atoms) -> tuple[float, np.ndarray, float, np.ndarray, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = Calculator(path)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    results = atoms.calc.results
    return energy, forces, results["uncertainty"], results["atomic_uncertainties"], atoms.calc.get_bias_forces(atoms)


@pytest.mark.parametrize("atoms", [molecule("CH3CONH2"), triclinic()], ids=["molecule", "cell"])
def test_rotation_translation_permutation_and_image_invariance(model_file, atoms: Atoms) -> None:
    energy, forces, u, atomic_u, bias = outputs(model_file, atoms)
    assert np.abs(bias).max() > 1e-4, "a bias test needs a bias"
    rotation = Rotation.from_euler("xyz", [0.4, -1.1, 2.0]).as_matrix()
    order = np.random.default_rng(0).permutation(len(atoms))
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ rotation.T)
    moved.positions = (atoms.positions + np.array([0.3, -7.0, 11.0])) @ rotation.T
    if atoms.pbc.all():
        moved.positions += np.random.default_rng(1).integers(-2, 3, (len(atoms), 3)) @ moved.cell.array
    moved = moved[order]
    energy2, forces2, u2, atomic_u2, bias2 = outputs(model_file, moved)
    np.testing.assert_allclose([energy2, u2], [energy, u], rtol=1e-11)
    np.testing.assert_allclose(forces2, (forces @ rotation.T)[order], rtol=0, atol=1e-11 * np.abs(forces).max())
    np.testing.assert_allclose(bias2, (bias @ rotation.T)[order], rtol=0, atol=1e-10 * np.abs(bias).max())
    np.testing.assert_allclose(atomic_u2, atomic_u[order], rtol=1e-10)


def test_supercell_repeats_energy_per_atom_and_mean_features(model_file) -> None:
    """A 2 x 1 x 2 repetition has the same u (mean features) and 4 times the energy."""
    cell = triclinic()
    energy, _, u, atomic_u, _ = outputs(model_file, cell)
    energy4, _, u4, atomic_u4, _ = outputs(model_file, cell.repeat((2, 1, 2)))
    np.testing.assert_allclose([energy4 / 4, u4], [energy, u], rtol=1e-11)
    np.testing.assert_allclose(atomic_u4.reshape(4, -1), np.tile(atomic_u, (4, 1)), rtol=1e-10)


def test_left_handed_cell(model_file) -> None:
    """Swapping two cell vectors changes handedness and nothing else."""
    atoms = triclinic()
    swapped = atoms.copy()
    swapped.set_cell(atoms.cell.array[[1, 0, 2]])
    assert np.linalg.det(swapped.cell.array) < 0
    for before, after in zip(outputs(model_file, atoms), outputs(model_file, swapped), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-11 * np.abs(before).max())
    atoms.calc, swapped.calc = Calculator(model_file), Calculator(model_file)
    np.testing.assert_allclose(swapped.get_stress(), atoms.get_stress(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("atoms", [molecule("CH3CONH2"), triclinic()], ids=["molecule", "cell"])
def test_forces_and_bias_forces_are_derivatives(model_file, atoms: Atoms) -> None:
    evaluator = Calculator(model_file).evaluator

    def value(attribute: str):
        def at(positions: np.ndarray) -> float:
            moved = atoms.copy()
            moved.positions = positions
            return getattr(evaluator.predict_one(moved), attribute)

        return at

    rattled = atoms.positions + np.random.default_rng(5).normal(0, 0.03, atoms.positions.shape)
    atoms = atoms.copy()
    atoms.positions = rattled
    forces = evaluator.predict_one(atoms).forces
    gradient = evaluator.uncertainty_gradient(atoms)[1]
    for analytic, numeric in (
        (-forces, central(value("energy"), rattled, 1e-3)),
        (gradient, central(value("u"), rattled, 1e-3)),
    ):
        assert np.abs(analytic).max() > 1e-4
        assert np.abs(analytic - numeric).max() < 1e-6 * np.abs(analytic).max()


def test_stress_and_strain_gradient_of_u_are_derivatives(model_file) -> None:
    atoms = triclinic()
    evaluator = Calculator(model_file).evaluator

    def strained(epsilon: np.ndarray) -> Atoms:
        moved = atoms.copy()
        moved.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (epsilon + epsilon.T)), scale_atoms=True)
        return moved

    zero = np.zeros((3, 3))
    stress = central(lambda e: evaluator.predict_one(strained(e)).energy, zero, 1e-4) / atoms.get_volume()
    strain_u = central(lambda e: evaluator.predict_one(strained(e)).u, zero, 1e-4)
    voigt = (np.array([0, 1, 2, 1, 0, 0]), np.array([0, 1, 2, 2, 2, 1]))
    analytic = evaluator.predict_one(atoms).stress
    assert np.abs(analytic - stress[voigt]).max() < 1e-6 * np.abs(analytic).max()
    analytic_u = evaluator.uncertainty_gradient(atoms)[2]
    assert np.abs(analytic_u - strain_u).max() < 1e-6 * np.abs(analytic_u).max()


def test_smooth_at_the_cutoff(model_file) -> None:
    """Energy and force of a pair go to those of separated atoms continuously."""
    cutoff = SETTINGS.cutoff
    pair = [outputs(model_file, Atoms("CO", positions=[[0, 0, 0], [r, 0, 0]])) for r in (cutoff - 1e-5, cutoff, 8.0)]
    assert abs(pair[0][0] - pair[1][0]) < 1e-9
    assert np.abs(pair[0][1]).max() < 1e-4
    assert pair[1][0] == pair[2][0]
    assert (pair[1][1] == 0).all()


def test_zero_neighbour_atoms_have_the_isolated_energy(model_file) -> None:
    energy, forces, u, atomic_u, bias = outputs(model_file, Atoms("C"))
    assert np.isfinite([energy, u]).all()
    assert np.isfinite(atomic_u).all()
    assert (forces == 0).all()
    assert (bias == 0).all()
    both = outputs(model_file, Atoms("CC", positions=[[0, 0, 0], [20, 0, 0]]))
    np.testing.assert_allclose(both[0], 2 * energy, rtol=1e-13)


def test_batch_composition_does_not_change_results(operators: bool) -> None:
    model = GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=2).to_network_dtype(torch.float64)
    use_operators(model, operators)
    graphs = [build_graph(a, ELEMENTS, model.cutoff) for a in (molecule("H2O"), triclinic(), molecule("CH3CONH2"))]
    energies, forces, virial = model.energy_forces_virial(collate(graphs))
    for k, graph in enumerate(graphs):
        energy, force, vir = model.energy_forces_virial(collate([graph]))
        torch.testing.assert_close(energies[k], energy[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(virial[k], vir[0], rtol=1e-11, atol=1e-13)
        start = sum(g.n_atoms for g in graphs[:k])
        torch.testing.assert_close(forces[start : start + graph.n_atoms], force, rtol=1e-10, atol=1e-13)


def test_training_loss_gradient_is_a_derivative(operators: bool) -> None:
    """The double backward through forces: d(sum F^2)/d(parameter) against central differences."""
    model = GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=2).to_network_dtype(torch.float64)
    use_operators(model, operators)
    batch = collate([build_graph(molecule("CH3CONH2"), ELEMENTS, model.cutoff)])

    def loss() -> torch.Tensor:
        energy, forces, virial = model.energy_forces_virial(batch, create_graph=True)
        return energy.sum() + forces.square().sum() + virial.square().sum()

    loss().backward()
    for parameter in (model.radial, model.weights[0], model.biases[1], model.weights[2], model.scale, model.shift):
        assert parameter.grad is not None
        index = int(parameter.grad.abs().argmax())
        flat, h, values = parameter.data.view(-1), 1e-5, []
        for step in (h, -h):
            flat[index] += step
            values.append(float(loss().detach()))
            flat[index] -= step
        numeric = (values[0] - values[1]) / (2 * h)
        assert numeric == pytest.approx(float(parameter.grad.view(-1)[index]), rel=1e-6)


def test_mixed_and_single_precision_stay_close_to_double(model_file) -> None:
    atoms = labelled(molecule("CH3CONH2"), 99)
    exact = Calculator(model_file, precision="double").evaluator
    for precision in ("mixed", "single"):
        rough = Calculator(model_file, precision=precision).evaluator
        a, b = exact.predict_one(atoms), rough.predict_one(atoms)
        assert b.energy == pytest.approx(a.energy, rel=1e-5)
        assert np.abs(a.forces - b.forces).max() < 1e-5 * np.abs(a.forces).max()
        assert b.u == pytest.approx(a.u, rel=1e-3)
        du, dv = exact.uncertainty_gradient(atoms)[1], rough.uncertainty_gradient(atoms)[1]
        assert np.abs(du - dv).max() < 1e-3 * np.abs(du).max()


def test_energy_regression_survives_a_single_composition() -> None:
    structures = [labelled(molecule("CH3CONH2"), k) for k in range(5)]
    graphs = [build_graph(atoms, ELEMENTS, 4.0) for atoms in structures]
    model = GaussianMomentNetwork(ELEMENTS, SETTINGS)
    model.initialise_energies(graphs)
    counts = np.bincount(graphs[0].species.numpy(), minlength=4)
    mean = np.mean([graph.energy for graph in graphs])
    shift = float((model.constant * model.shift).detach().numpy() @ counts)
    assert shift == pytest.approx(mean, rel=1e-10)
    rmse = np.sqrt(np.mean([((graph.energy - mean) / 9) ** 2 for graph in graphs]))
    assert float(model.constant) == pytest.approx(rmse, rel=1e-8)


def test_bad_structures_and_files_are_refused_with_a_sentence(model_file, tmp_path) -> None:
    with pytest.raises(DataError, match=r"Element Cu is not one of the model's elements \(H C N O\)"):
        build_graph(bulk("Cu"), ELEMENTS, 4.0)
    broken = molecule("H2O")
    broken.positions[1, 2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        build_graph(broken, ELEMENTS, 4.0)
    with pytest.raises(ModelError, match="There is no model file"):
        load_model(tmp_path / "missing.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(model_file.read_bytes()[:2000])
    with pytest.raises(ModelError, match="not a ubmd model file"):
        load_model(damaged)
    with pytest.raises(ModelError, match="mixed, single or double"):
        load_model(model_file, "half")


def test_predictions_do_not_depend_on_how_structures_are_batched(model_file, monkeypatch) -> None:
    evaluator = Calculator(model_file).evaluator
    structures = [molecule("H2O"), triclinic(), molecule("CH3CONH2"), Atoms("C")]
    together = evaluator.predict(structures)
    monkeypatch.setattr("ubmd.data.graph.PAIRS_PER_CHUNK", 40)
    apart = [evaluator.predict_one(atoms) for atoms in structures]
    for one, other in zip(together, apart, strict=True):
        assert one.energy == pytest.approx(other.energy, rel=1e-12)
        assert one.u == pytest.approx(other.u, rel=1e-10)
        np.testing.assert_allclose(one.forces, other.forces, rtol=0, atol=1e-12)
        np.testing.assert_allclose(one.atomic_u, other.atomic_u, rtol=1e-10)
        np.testing.assert_allclose(one.feature, other.feature, rtol=0, atol=1e-11)
        assert (one.stress is None) == (other.stress is None)
        if one.stress is not None and other.stress is not None:
            np.testing.assert_allclose(one.stress, other.stress, rtol=0, atol=1e-12)
