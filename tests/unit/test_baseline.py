"""What a network is added to: the repulsion of nuclei and energies of atoms, in labels, trainings and model files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import slow_zbl
import tomli_w
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from small_model import ELEMENTS, SETTINGS, central, labelled, triclinic
from typer.testing import CliRunner

import ubmd
from ubmd.calculator import Model
from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.data.graph import VOIGT, build_graph, scatter_forces
from ubmd.errors import DataError, ModelError, SettingsError
from ubmd.potentials.baseline import Baseline, check_baseline, remainder
from ubmd.potentials.gmnn.backend import GaussianMoments
from ubmd.potentials.gmnn.checkpoint import load_weights
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.trainer import train
from ubmd.potentials.interface import Labels, TrainingTable
from ubmd.potentials.members import train_network
from ubmd.potentials.record import read_record
from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings, load_settings
from ubmd.settings.marks import key_values
from ubmd.settings.potentials import TrainSettings

ZBL = SETTINGS.model_copy(update={"baseline": "zbl"})
ATOM_ENERGIES = {"H": -13.6, "C": -1030.0, "N": -1480.0, "O": -2040.0}
GIVEN = SETTINGS.model_copy(update={"atom_energies": ATOM_ENERGIES})
BOTH = ZBL.model_copy(update={"atom_energies": ATOM_ENERGIES})
KINDS = ["posterior", "last-layer", "distance", "ensemble"]


def crowded(seed: int = 0) -> Atoms:
    """A molecule whose atoms are nearer than in any bond."""
    atoms = molecule("CH3CONH2")
    atoms.positions *= 0.6
    return labelled(atoms, seed)


def zeros(atoms: Atoms) -> Atoms:
    """The structure with labels that are zero."""
    atoms = atoms.copy()
    labels = {"energy": 0.0, "forces": np.zeros((len(atoms), 3)), "stress": np.zeros(6)}
    atoms.calc = SinglePointCalculator(atoms, **(labels if atoms.pbc.all() else labels | {"stress": None}))
    return atoms


def moved(atoms: Atoms, positions: np.ndarray) -> Atoms:
    """The structure with other positions."""
    atoms = atoms.copy()
    atoms.positions = positions
    return atoms


def strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    """The structure with cell and positions strained."""
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


STRUCTURES = {
    "molecule": crowded(100),
    "cell": strained(triclinic(), -0.4 * np.eye(3)),
    "bonds": labelled(molecule("CH3CONH2"), 101),
}


# ------------------------------------------------------------------------------------------ the repulsion


@pytest.mark.parametrize("name", STRUCTURES)
def test_labels_lose_the_slow_formula_and_its_differences(name: str) -> None:
    """Energies, forces and stress, with every element's own radius; half of a pair belongs to either atom."""
    atoms = STRUCTURES[name]
    (rest,) = remainder([zeros(atoms)], ZBL)
    expected = slow_zbl.energy(atoms)
    assert expected > 1e-3
    assert rest.calc.results["energy"] == pytest.approx(-expected, rel=1e-9, abs=1e-9)
    slopes = central(lambda x: slow_zbl.energy(moved(atoms, x)), atoms.positions.copy(), 1e-4)
    assert rest.calc.results["forces"] == pytest.approx(slopes, rel=1e-8, abs=1e-8)
    if atoms.pbc.all():
        virial = central(lambda e: slow_zbl.energy(strained(atoms, e)), np.zeros((3, 3)), 1e-4)
        stress = 0.5 * (virial + virial.T)[VOIGT] / atoms.get_volume()
        assert rest.calc.results["stress"] == pytest.approx(-stress, rel=1e-8, abs=1e-8)
    graph, baseline = build_graph(atoms, ELEMENTS, 4.0), Baseline(ZBL, ELEMENTS)
    energies, _ = baseline(graph.species, graph.edge_index, graph.edge_vector, len(atoms))
    np.testing.assert_allclose(energies, slow_zbl.atomic_energies(atoms), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", STRUCTURES)
def test_both_forms_are_one_function_with_its_gradient(name: str) -> None:
    """Attached to the graph, and in closed form, which is added to a gradient."""
    graph, baseline = build_graph(STRUCTURES[name], ELEMENTS, 4.0), Baseline(BOTH, ELEMENTS)
    edge = graph.edge_vector.clone().requires_grad_(True)
    attached, repulsion = baseline(graph.species, graph.edge_index, edge, graph.n_atoms)
    (slopes,) = torch.autograd.grad(attached.sum(), edge)
    start = torch.arange(3.0 * graph.n_pairs, dtype=torch.float64).view(-1, 3)
    energies, gradient = baseline.evaluate(graph.species, graph.first, graph.neighbours, graph.edge_vector, start)
    torch.testing.assert_close(energies, attached.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient - start, slopes, rtol=1e-10, atol=1e-10)
    own = torch.tensor([ATOM_ENERGIES[ELEMENTS[k]] for k in graph.species], dtype=torch.float64)
    torch.testing.assert_close(attached - repulsion, own, rtol=1e-12, atol=1e-12)


def pair(r: float, symbols: str = "CO") -> Atoms:
    """Two atoms, r in Å."""
    return Atoms(symbols, positions=[[0, 0, 0], [0.6 * r, 0.0, 0.8 * r]])


def test_it_ends_smoothly_at_the_sum_of_the_radii() -> None:
    """Near the end R: V = V_0(R) 56 ((R - r)/R)^3, so that two derivatives vanish; beyond, exactly nothing."""
    end = 0.76 + 0.66
    unended = slow_zbl.pair_energy("C", "O", 0.9 * end, envelope=False)
    slope = np.log(slow_zbl.pair_energy("C", "O", end * 0.9999, envelope=False) / unended) / 0.0999
    for h in (1e-2, 1e-3):
        energy, forces = repulsion(pair(end * (1.0 - h)))
        expected = unended * np.exp(slope * (0.1 - h)) * 56.0 * h**3
        assert energy == pytest.approx(expected, rel=10.0 * h)
        assert np.linalg.norm(forces[0]) == pytest.approx(3.0 * expected / (h * end), rel=10.0 * h)
    for r in (end + 1e-9, end + 0.1):
        energy, forces = repulsion(pair(r))
        assert energy == np.abs(forces).max() == 0.0


def repulsion(atoms: Atoms) -> tuple[float, np.ndarray]:
    """Energy, eV, and forces [n, 3], eV/Å."""
    graph = build_graph(atoms, ELEMENTS, 4.0)
    arguments = graph.species, graph.first, graph.neighbours, graph.edge_vector
    energies, gradient = Baseline(ZBL, ELEMENTS).evaluate(*arguments, torch.zeros_like(graph.edge_vector))
    return float(energies.sum()), scatter_forces(graph.edge_index, gradient, graph.n_atoms).numpy()


def test_other_labels_and_structures_stay_as_they_are() -> None:
    atoms = crowded()
    atoms.info["charge"] = 1
    before = atoms.calc.results["forces"].copy()
    (rest,) = remainder([atoms], BOTH)
    assert rest.info == {"charge": 1}
    np.testing.assert_array_equal(atoms.calc.results["forces"], before)
    assert not np.allclose(rest.calc.results["forces"], before)
    assert set(rest.calc.results) == {"energy", "forces"}
    assert remainder([atoms], SETTINGS) == [atoms]
    (bare,) = remainder([molecule("H2O")], ZBL)
    assert bare.calc.results == {}
    with pytest.raises(DataError, match=r"structure 1: atoms 0 .* are at the same place"):
        remainder([atoms, pair(0.0)], ZBL)


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("model", "elements", "words"),
    [
        (GIVEN, ["H", "Cu"], r"model.atom_energies lacks Cu; give"),
        ({"atom_energies": {"H": 1.0, "CL": 2.0}}, ["H"], r"model.atom_energies.CL: .* did you mean 'Cl'\?"),
        ({"atom_energies": {"Hx2": 1.0}}, ["H"], r"model.atom_energies.Hx2: there is no element 'Hx2'"),
        ({"baseline": "zbl", "cutoff": 4.0}, ["H", "Cs"], r"ends at 4.88 Å between two atoms of Cs, beyond model.cut"),
        ({"baseline": "zbl"}, ["Cs", "Xy"], r"model.elements names 'Xy', which is not an element"),
        ({"baseline": "zbl"}, ["Cs"], ""),
        ({"baseline": "zbl", "kind": "my:Own"}, ["Cs"], ""),
    ],
)
def test_what_does_not_fit_is_said(model: ModelSettings | dict, elements: list[str], words: str) -> None:
    settings = model if isinstance(model, ModelSettings) else ModelSettings.model_validate(model)
    if not words:
        check_baseline(settings, elements)
        return
    with pytest.raises(SettingsError, match=words):
        check_baseline(settings, elements)
    with pytest.raises(SettingsError, match=words):
        Baseline(settings, elements)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"model": {"baseline": "zlb"}}, r"'model.baseline': Input should be 'zbl' \(got 'zlb'\)"),
        ({"model": {"atom_energies": {"H": float("nan")}}}, r"'model.atom_energies.H': .*finite"),
        ({"model": {"base_line": "zbl"}}, r"unknown key 'model.base_line'; did you mean 'baseline'"),
        (
            {"model": {"baseline": "zbl"}, "crystal": {"structure": "a.xyz", "cutoffs": {"2": 3.0}}},
            r"\[model\] is for networks and \[crystal\] trains a force-constant potential; remove one",
        ),
    ],
)
def test_mistakes_in_a_settings_file(tables: dict, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(tomli_w.dumps({"training_file": "a", "output_dir": "b"} | tables))
    with pytest.raises(SettingsError, match=words):
        load_settings(tmp_path / "a.toml", TrainSettings)


def test_keys_and_networks_without_a_baseline_are_those_of_earlier_versions() -> None:
    assert not {"baseline", "atom_energies"} & set(key_values(ModelSettings()))
    assert {"baseline", "atom_energies"} <= set(key_values(BOTH))
    plain = GaussianMomentNetwork(ELEMENTS, SETTINGS).config()["settings"]
    assert not {"baseline", "atom_energies"} & set(plain)
    config = GaussianMomentNetwork(ELEMENTS, BOTH).config()
    assert GaussianMomentNetwork.from_config(config).settings == BOTH


def test_networks_are_trained_in_one_place() -> None:
    """Everything that trains goes through `train_network`, which takes the baseline off the labels."""
    root = Path(ubmd.__file__).parent
    callers = {p.relative_to(root).as_posix() for p in root.rglob("*.py") if "backend.train(" in p.read_text("utf-8")}
    assert callers == {"potentials/members.py"}


# ------------------------------------------------------------------------------------------ model files


def network(settings: ModelSettings, seed: int) -> GaussianMomentNetwork:
    """A network whose weights are those of the seed, whatever the settings."""
    return GaussianMomentNetwork(ELEMENTS, settings, seed=seed)


LABELLED = [crowded(seed) for seed in range(9)] + [labelled(molecule("CH3CONH2"), seed) for seed in range(9, 12)]


@pytest.fixture(scope="module", params=KINDS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of the same networks: with a baseline, and without one, fitted to what it leaves."""
    folder = tmp_path_factory.mktemp("files")
    uncertainty = UncertaintySettings(kind=request.param, projections=16, references=20, alpha=0.3)
    for name, settings in (("sum", ZBL), ("network", SETTINGS)):
        labels = LABELLED if name == "sum" else remainder(LABELLED, ZBL)
        networks = [network(settings, seed) for seed in range(uncertainty.networks)]
        export_model(networks, labels[:8], labels[8:], uncertainty, folder / f"{name}.pt")
    return folder / "sum.pt", folder / "network.pt"


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_file_is_the_network_plus_the_repulsion(files: tuple[Path, Path], name: str) -> None:
    """Energy, forces and stress are sums; uncertainties and bias forces are the network's."""
    atoms = STRUCTURES[name]
    total, alone = (Model(path, "double") for path in files)
    (found,), (part,), (rest,) = total.predict([atoms]), alone.predict([atoms]), remainder([zeros(atoms)], ZBL)
    assert found.energy - part.energy == pytest.approx(slow_zbl.energy(atoms), rel=1e-10, abs=1e-10)
    np.testing.assert_allclose(found.forces - part.forces, -rest.calc.results["forces"], rtol=1e-9, atol=2e-9)
    if part.stress is not None:
        np.testing.assert_allclose(found.stress - part.stress, -rest.calc.results["stress"], rtol=1e-9, atol=2e-9)
    np.testing.assert_allclose(found.u, part.u, rtol=1e-10)
    np.testing.assert_allclose(found.atomic_u, part.atomic_u, rtol=1e-10)
    np.testing.assert_allclose(found.feature, part.feature, rtol=1e-9, atol=1e-9 * np.abs(part.feature).max())
    for of in ("uncertainty_gradient", "atomic_uncertainty_gradient"):
        gradients, expected = (getattr(evaluator, of)(atoms)[1] for evaluator in (total, alone))
        assert np.abs(expected).max() > 0.0
        np.testing.assert_allclose(gradients, expected, rtol=1e-9, atol=1e-10 * np.abs(expected).max())


def test_the_calibration_counts_the_same_errors(files: tuple[Path, Path]) -> None:
    total, alone = (read_record(path)["uncertainty"] for path in files)  # type: ignore[index]
    for name in ("energy", "forces"):
        assert total[name]["scale"] == pytest.approx(alone[name]["scale"], rel=1e-10)
    assert total["energy"]["feature_scale"] == pytest.approx(alone["energy"]["feature_scale"], rel=1e-10)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_generic_part_says_what_the_fast_part_says(files: tuple[Path, Path], name: str) -> None:
    """Energies, forces, and the gradient of any weights of the features."""
    module, graph = Model(files[0], "double").module, build_graph(STRUCTURES[name], ELEMENTS, 4.0)
    arguments = graph.species, graph.edge_index, graph.edge_vector, graph.n_atoms
    energy, gradient, tape = module.evaluate(graph.species, graph.first, graph.neighbours, graph.edge_vector, True)
    edge = graph.edge_vector.clone().requires_grad_(True)
    attached, _ = module(graph.species, graph.edge_index, edge, graph.n_atoms)
    for other in (module.forces(*arguments), (attached.detach(), torch.autograd.grad(attached.sum(), edge)[0])):
        torch.testing.assert_close(other[0], energy, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other[1], gradient, rtol=1e-9, atol=1e-9)
    w = torch.linspace(-1.0, 1.0, module.features(tape, False)[1].size(1), dtype=torch.float64)
    fast = module.feature_gradient(tape, module.features(tape, False)[2], module.directions(w, False), w)
    torch.testing.assert_close(module.bias(*arguments, w), fast, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("precision", ["mixed", "single"])
def test_other_precisions(files: tuple[Path, Path], precision: str) -> None:
    atoms = STRUCTURES["molecule"]
    forces = [Model(files[0], chosen).predict([atoms])[0].forces for chosen in ("double", precision)]
    np.testing.assert_allclose(forces[1], forces[0], rtol=1e-4, atol=1e-4 * np.abs(forces[0]).max())


@pytest.mark.parametrize("r", [0.3, 0.5, 0.8])
def test_near_atoms_repel_whatever_the_network_says(files: tuple[Path, Path], r: float) -> None:
    atoms = pair(r)
    total, alone = (Model(path, "double").predict([atoms])[0].forces for path in files)
    direction = (atoms.positions[1] - atoms.positions[0]) / r
    assert total[1] @ direction > 5.0 * abs(alone[1] @ direction)
    np.testing.assert_allclose(total[0], -total[1], atol=1e-10)


# ------------------------------------------------------------------------------------------ trainings


TRAINING = TrainingSettings(epochs=4, batch_size=4, threads=1, precision="float64", checkpoint_every=2)


def shifted(atoms: Atoms) -> Atoms:
    """With an energy like that of a molecule whose atoms have the given energies."""
    atoms = atoms.copy()
    forces = np.random.default_rng(len(atoms)).normal(size=(len(atoms), 3))
    energy = sum(ATOM_ENERGIES[symbol] for symbol in atoms.symbols) - 4.0 * len(atoms)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


@pytest.mark.parametrize("settings", [GIVEN, BOTH], ids=["atom energies", "both"])
def test_a_lone_atom_has_exactly_its_energy(settings: ModelSettings, tmp_path: Path) -> None:
    """After training and export; its record says so, and the shifts of the network are none."""
    labels = [shifted(atoms) for atoms in LABELLED]
    backend, table = (
        GaussianMoments(),
        TrainingTable(settings.model_copy(update={"elements": tuple(ELEMENTS)}), TRAINING),
    )
    weights = train_network(backend, Labels(labels[:8], labels[8:]), table, tmp_path, None, 1)
    model = load_weights(weights)
    assert float(model.shift.detach().abs().max()) == 0.0
    assert abs(float(model.lone_output().detach())) > 1e-3, "otherwise there is nothing to test"
    record = export_model(model, labels[:8], labels[8:], UncertaintySettings(projections=8), tmp_path / "model.pt")
    assert record["baseline"]["atom_energies"] == ATOM_ENERGIES
    assert record["baseline"]["lone_atoms"] == pytest.approx(ATOM_ENERGIES, abs=1e-8)
    far = Atoms("COH", positions=[[0, 0, 0], [9, 0, 0], [0, 9, 0]])
    found = Model(tmp_path / "model.pt", "double").predict([far, labels[9]])
    assert found[0].energy == pytest.approx(sum(ATOM_ENERGIES[s] for s in "COH"), abs=1e-8)
    assert found[1].energy == pytest.approx(labels[9].get_potential_energy(), abs=200.0)


def test_a_warm_start_has_the_same_baseline(tmp_path: Path) -> None:
    """As every other setting of the network; with it, and after a kill, a training goes on."""
    labels = Labels(LABELLED[:6], LABELLED[6:9])
    backend, again = GaussianMoments(), []
    start = train_network(backend, labels, TrainingTable(ZBL, TRAINING), tmp_path / "old", None, 0)
    train_network(backend, labels, TrainingTable(ZBL, TRAINING), tmp_path / "old", None, 0, again.append)
    assert again == [], "finished: its labels are known again"
    train_network(backend, labels, TrainingTable(ZBL, TRAINING, 1), tmp_path / "new", start, 0)
    assert load_weights(tmp_path / "new" / "weights.pt").settings.baseline == "zbl"
    for settings, words in (
        (SETTINGS, "baseline = zbl, the settings have None"),
        (BOTH, r"atom_energies\.C = None"),
    ):
        with pytest.raises(ModelError, match=words):
            train_network(backend, labels, TrainingTable(settings, TRAINING), tmp_path / "other", start, 0)
    with pytest.raises(ModelError, match="need the same baseline"):
        export_model([network(ZBL, 0), network(SETTINGS, 1)], LABELLED, LABELLED, ENSEMBLE, tmp_path / "model.pt")


ENSEMBLE = UncertaintySettings(kind="ensemble", members=2)


def test_a_network_learns_what_the_baseline_leaves(tmp_path: Path) -> None:
    """The same bits as a training without a baseline on labels without it."""
    sets = LABELLED[:6], LABELLED[6:9]
    found = train_network(GaussianMoments(), Labels(*sets), TrainingTable(ZBL, TRAINING), tmp_path / "a", None, 0)
    plain = train(SETTINGS, TRAINING, *(remainder(part, ZBL) for part in sets), tmp_path / "b", 0)
    for name, value in load_weights(found).state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name])


def test_export_and_info_know_it(tmp_path: Path) -> None:
    """`ubmd export` adds what the weights were trained with, `ubmd info` shows it."""
    write_structures(tmp_path / "data.extxyz", [shifted(atoms) for atoms in LABELLED])
    table = TrainingTable(BOTH.model_copy(update={"elements": tuple(ELEMENTS)}), TRAINING)
    labels = [shifted(atoms) for atoms in LABELLED]
    weights = train_network(GaussianMoments(), Labels(labels, labels), table, tmp_path, None, 0)
    data, model = str(tmp_path / "data.extxyz"), tmp_path / "model.pt"
    done = CliRunner().invoke(app, ["export", str(weights), data, data, "-o", str(model), "--set", "projections=8"])
    assert done.exit_code == 0, done.output
    record = read_record(model)
    assert record is not None
    assert record["baseline"]["kind"] == "zbl"
    assert record["baseline"]["covalent_radii"]["O"] == 0.66
    said = CliRunner().invoke(app, ["info", str(model)]).output
    assert all(word in said for word in ("baseline.kind", "zbl", "baseline.covalent_radii.O", "baseline.lone_atoms.C"))
