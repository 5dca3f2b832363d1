"""Networks with message passing: LAMMPS against Python, where ghosts stand for atoms with neighbours of their own."""

from __future__ import annotations

from pathlib import Path

import message_passing
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from differences import columns

from ubmd.calculator import Model

ELEMENTS = ["H", "C", "O"]
KINDS = ["molecule", "cubic", "small", "triclinic", "left-handed"]
CASES = [
    pytest.param(kind, ranks, marks=[pytest.mark.quick] if (kind, ranks) in (("small", 1), ("triclinic", 2)) else [])
    for kind in KINDS
    for ranks in (1, 2, 4)
]
SIX = [f"c_virial[{k}]" for k in range(1, 7)]
VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])
MEASURE = """
compute virial all pressure NULL virial
compute peratom all pe/atom
compute energy all reduce sum c_peratom
fix b all ubmd force 0.25 {} window 1
thermo_style custom step pe c_energy c_virial[1]
dump d all custom 1 dump.test id fx fy fz f_b[1] f_b[2] f_b[3] f_b[4] c_peratom
dump_modify d sort id format float %.17g
run 0
"""
OUTPUTS = ["pe", "c_energy", *SIX, "f_b", *(f"f_b[{k}]" for k in range(1, 9))]


def close(value, expected, tolerance=1e-10):
    """Relative to the largest component."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(value) - expected).max() <= tolerance * np.abs(expected).max()


def labelled(structures: dict[str, Atoms]) -> list[Atoms]:
    """All structures, shaken twice, with random labels."""
    rng = np.random.default_rng(5)
    found = []
    for atoms in [*structures.values()] * 2:
        copy = atoms.copy()
        copy.positions += rng.uniform(-0.05, 0.05, copy.positions.shape)
        copy.calc = SinglePointCalculator(copy, energy=rng.normal(), forces=rng.normal(size=copy.positions.shape))
        found.append(copy)
    return found


@pytest.fixture(scope="session")
def model_file(structures, tmp_path_factory) -> Path:
    """Three steps of message passing with a range of 4 Å each; `lab` and `evaluator` take this file."""
    path = tmp_path_factory.mktemp("messages") / "model.pt"
    message_passing.export(path, ELEMENTS, labelled(structures))
    return path


def measured(lab, atoms, ranks, settings="", margin=(5.0, 5.0), mode="energy", division=""):
    """(numbers, columns by atom) of one evaluation in LAMMPS."""
    script = lab.head(atoms, settings=settings, margin=margin) + division
    script += MEASURE.format(f"uncertainty {mode}") + lab.report(*OUTPUTS)
    numbers = {name: values[0] for name, values in lab.run(script, ranks).numbers.items()}
    return numbers, lab.dump("dump.test")[0]


def check_against_python(lab, evaluator, atoms, ranks, settings="", margin=(5.0, 5.0), mode="energy", division=""):
    """Everything that LAMMPS reports for one structure equals the evaluation in Python (1e-10, double)."""
    n, frame = measured(lab, atoms, ranks, settings, margin, mode, division)
    expected = evaluator.predict_one(atoms)
    u, gradient, _ = evaluator.uncertainty_gradient(atoms)
    if mode == "atomic":
        biased, gradient, _ = evaluator.atomic_uncertainty_gradient(atoms)
    else:
        biased = u
    total = lab.to_ase(atoms, columns(frame, ["fx", "fy", "fz"]))
    bias = lab.to_ase(atoms, columns(frame, ["f_b[2]", "f_b[3]", "f_b[4]"]))
    scale = np.linalg.norm(expected.forces) / np.linalg.norm(gradient)
    assert close([n["pe"], n["c_energy"]], expected.energy)
    assert np.linalg.norm(bias) > 0.1 * np.linalg.norm(expected.forces)
    assert close(total - bias, expected.forces)
    assert close(bias, 0.25 * scale * gradient)
    assert close(frame["f_b[1]"], expected.atomic_u)
    assert close(n["f_b"], -0.25 * scale * biased)
    numbers = [u, expected.atomic_u.max(), expected.atomic_u.mean(), scale, 0.0, 0.25, 0.0, 0.0]
    assert close([n[f"f_b[{k}]"] for k in range(1, 9)], numbers)
    if atoms.pbc.all():
        stress = lab.tensor_to_ase(atoms, [-n[name] / lab.bar for name in SIX])
        assert close(stress[VOIGT], expected.stress)


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_equals_python(lab, evaluator, structures, kind, ranks):
    check_against_python(lab, evaluator, structures[kind], ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["molecule", "triclinic"])
def test_bias_along_atomic_uncertainties_equals_python(lab, evaluator, structures, kind, ranks):
    check_against_python(lab, evaluator, structures[kind], ranks, mode="atomic")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_without_atoms(lab, evaluator, structures, ranks):
    """The molecule lies at the low end of a long box, so that at least one rank owns nothing."""
    atoms, settings = structures["molecule"], f"processors {ranks} 1 1"
    text = lab.run(lab.head(atoms, settings=settings, margin=(5.0, 60.0)) + "fix b all ubmd\nrun 0\n", ranks).text
    assert text.split("Nlocal:")[1].split("min")[0].split()[-1] == "0"
    check_against_python(lab, evaluator, atoms, ranks, settings, (5.0, 60.0))


@pytest.mark.parametrize(
    ("settings", "division", "replicas"),
    [("comm_style tiled", "balance 1.0 rcb", (3, 4, 3)), ("processors 1 1 4", "balance 1.0 shift z 5 1.0", (1, 1, 3))],
    ids=["tiled", "shifted"],
)
def test_other_divisions_of_the_box(lab, evaluator, structures, settings, division, replicas):
    """Parts of any size; tiled communication needs a box that is longer than the ghosts reach."""
    atoms = structures["cubic"].repeat(replicas)
    check_against_python(lab, evaluator, atoms, 4, settings, division=division)


# ------------------------------------------------------------------------------------------ a test that can fail


@pytest.mark.parametrize(("stated", "right"), [(2, False), (3, True)])
def test_a_layer_less_is_wrong(lab, structures, tmp_path, stated, right):
    """Without the pairs that are two pairs away, the same network gives other forces on two ranks.

    Its last step is silent in small graphs, so that no check sees how many it has.
    """
    module = message_passing.Module(len(ELEMENTS), 3, silent_below=40)
    message_passing.export(tmp_path / "model.pt", ELEMENTS, labelled(structures), module, stated)
    atoms = structures["triclinic"].repeat((3, 1, 1))
    evaluator = Model(tmp_path / "model.pt")
    expected = evaluator.predict_one(atoms)
    n, frame = measured(lab, atoms, 2, settings="processors 2 1 1")
    forces = columns(frame, ["fx", "fy", "fz"]) - columns(frame, ["f_b[2]", "f_b[3]", "f_b[4]"])
    assert close(n["pe"], expected.energy) == right
    assert close(lab.to_ase(atoms, forces), expected.forces, 1e-10 if right else 1e-5) == right
