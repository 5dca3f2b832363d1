"""Files with a repulsion of nuclei in LAMMPS: a network plus the slow formula, and the bias of the network alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import slow_zbl
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress
from small_model import central

from ubmd.calculator import Model
from ubmd.potentials.baseline import remainder
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.settings import ModelSettings, UncertaintySettings

ELEMENTS = ["H", "C", "O"]
NETWORK = ModelSettings(hidden=(16, 12), cutoff=4.0, n_radial=3)
SUM = NETWORK.model_copy(update={"baseline": "zbl"})
KINDS = ["posterior", "last-layer", "distance", "ensemble"]

MEASURE = """
compute virial all pressure NULL pair
fix b all ubmd force 0.25 window 1
thermo_style custom step pe c_virial[1]
dump d all custom 1 dump.test id fx fy fz f_b[1] f_b[2] f_b[3] f_b[4]
dump_modify d sort id format float %.17g
run 0
"""
VIRIAL = [f"c_virial[{k}]" for k in range(1, 7)]


def crowded(atoms: Atoms, factor: float) -> Atoms:
    """The structure compressed, so that atoms are nearer than in bonds."""
    atoms = atoms.copy()
    atoms.set_cell(factor * atoms.cell.array)
    atoms.positions *= factor
    return atoms


@pytest.fixture(scope="module")
def crowds(structures: dict[str, Atoms]) -> dict[str, Atoms]:
    return {"molecule": crowded(structures["molecule"], 0.65), "triclinic": crowded(structures["triclinic"], 0.6)}


@pytest.fixture(scope="module")
def files(crowds, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Kind of uncertainty -> (file of the sum, file of its network alone)."""
    rng = np.random.default_rng(21)
    labelled = []
    for kind in ["molecule"] * 5 + ["triclinic"] * 4:
        atoms = crowds[kind].copy()
        atoms.positions += rng.uniform(-0.05, 0.05, (len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(len(atoms), 3)))
        labelled.append(atoms)
    folder, found = tmp_path_factory.mktemp("baseline"), {}
    for kind in KINDS:
        uncertainty = UncertaintySettings(kind=kind, projections=20, references=30, alpha=0.3)
        for name, settings, labels in (("sum", SUM, labelled), ("network", NETWORK, remainder(labelled, SUM))):
            networks = [GaussianMomentNetwork(ELEMENTS, settings, seed=5 + m) for m in range(uncertainty.networks)]
            export_model(networks, labels[:6], labels[6:], uncertainty, folder / f"{kind}_{name}.pt")
        found[kind] = folder / f"{kind}_sum.pt", folder / f"{kind}_network.pt"
    return found


def close(value, expected, tolerance=1e-10):
    """Relative to the largest component."""
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 0.0
    return np.abs(np.asarray(value) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def repulsions(crowds: dict[str, Atoms]) -> dict[str, np.ndarray]:
    """Forces of the repulsion alone."""
    return {name: slow_forces(atoms) for name, atoms in crowds.items()}


def slow_forces(atoms: Atoms) -> np.ndarray:
    """Of the repulsion alone, by differences of the slow formula (8 digits)."""

    def energy(positions: np.ndarray) -> float:
        moved = atoms.copy()
        moved.positions = positions
        return slow_zbl.energy(moved)

    return -central(energy, atoms.positions.copy(), 1e-3)


CASES = [
    *(pytest.param(kind, "molecule", "blocks", 2) for kind in KINDS),
    *(pytest.param(kind, "triclinic", "all at once", 1) for kind in KINDS),
    pytest.param("posterior", "triclinic", "blocks", 2, marks=pytest.mark.quick),
    pytest.param("posterior", "molecule", "all at once", 1, marks=pytest.mark.quick),
    *(pytest.param(kind, "triclinic", "generic", 2) for kind in ("posterior", "ensemble")),
]


@pytest.mark.parametrize(("kind", "structure", "path", "ranks"), CASES)
def test_the_sum_and_the_bias_of_the_network(lab, files, crowds, repulsions, kind, structure, path, ranks):
    atoms = crowds[structure]
    total, network = files[kind]
    (lab.folder / "model.pt").write_bytes(total.read_bytes())
    lab.set_path(path)
    names = ["pe", *VIRIAL, *(f"f_b[{k}]" for k in range(1, 5))]
    n = {k: v[0] for k, v in lab.run(lab.head(atoms) + MEASURE + lab.report(*names), ranks).numbers.items()}
    frame = lab.dump("dump.test")[0]
    whole, alone = Model(total, "double").predict_one(atoms), Model(network, "double").predict_one(atoms)
    u, gradient, _ = Model(network, "double").uncertainty_gradient(atoms)
    forces = lab.to_ase(atoms, np.stack([frame[f"f{k}"] for k in "xyz"], 1))
    bias = lab.to_ase(atoms, np.stack([frame[f"f_b[{k}]"] for k in (2, 3, 4)], 1))
    repulsion = slow_zbl.energy(atoms)

    assert repulsion > 1.0
    assert close(n["pe"], alone.energy + repulsion)
    assert close(forces - bias, whole.forces)
    assert close(forces - bias, alone.forces + repulsions[structure], 1e-7)
    assert close(bias, n["f_b[4]"] * 0.25 * gradient)
    assert close(n["f_b[4]"], np.linalg.norm(whole.forces) / np.linalg.norm(gradient))
    assert close([n["f_b[1]"], n["f_b[2]"]], [u, alone.atomic_u.max()])
    assert close(frame["f_b[1]"], alone.atomic_u)
    if atoms.pbc.all():
        stress = lab.tensor_to_ase(atoms, [-n[name] / lab.bar for name in VIRIAL])
        assert close(stress, voigt_6_to_full_3x3_stress(whole.stress))


def test_the_formula_is_that_of_pair_zbl(lab):
    """So near that neither has begun to end: 0.03 Å, where f = 1 - 1e-9."""
    atoms = Atoms("CC", positions=[[0, 0, 0], [0.03, 0, 0]])
    script = lab.head(atoms, settings="comm_modify cutoff 12.0").split("pair_style")[0]
    script += "pair_style zbl 8.0 10.0\npair_coeff 1 1 1 1\npair_coeff 2 2 6 6\npair_coeff 3 3 8 8\nrun 0\n"
    found = lab.run(script + "variable f equal fx[1]\n" + 'print "RESULT f $(v_f:%.17g)"\n').numbers["f"][0]
    assert found == pytest.approx(slow_forces_of_pair(0.03), rel=1e-6)


def slow_forces_of_pair(r: float) -> float:
    """Force along x on the first of two carbon atoms at distance r, by differences."""
    return float(central(lambda x: slow_zbl.pair_energy("C", "C", float(x[0])), np.array([r]), 1e-4)[0])
