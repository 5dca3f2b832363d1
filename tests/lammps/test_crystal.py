"""Force-constant models: LAMMPS against the cluster basis's numpy formulas, in boxes of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from ase.calculators.lammps import Prism
from crystals import ENERGY, Crystal, bonds_of, boron_arsenide, head, pair_polynomial

from ubmd.potentials.force_constants.pairs import CORE, PAIRS

MEASURE = """
fix b all ubmd force 0.25 window 1
compute virial all pressure NULL virial
compute peratom all pe/atom
compute energy all reduce sum c_peratom
thermo_style custom step pe c_energy c_virial[1]
dump d all custom 1 dump.test id fx fy fz f_b[1] f_b[2] f_b[3] f_b[4]
dump_modify d sort id format float %.17g
run 0
"""
SIX = [f"c_virial[{k}]" for k in range(1, 7)]
OUTPUTS = ["pe", "c_energy", *SIX, *(f"f_b[{k}]" for k in range(1, 11))]
BOXES = {
    "training cell": ("zincblende", (2, 2, 2)),
    "twice the training cell": ("zincblende", (4, 4, 4)),
    "primitive cell": ("zincblende", (1, 1, 1)),
    "orthorhombic": ("orthorhombic", (1, 2, 2)),
    "triclinic": ("triclinic", (2, 3, 2)),
}


def close(value, expected, tolerance=1e-10):
    """Relative to the largest component."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(value) - expected).max() <= tolerance * np.abs(expected).max()


def check(lab, crystal, atoms, box, ranks=1, shift=None, settings=""):
    """Everything that LAMMPS reports for one structure equals numpy (1e-10)."""
    script = head(crystal, atoms, shift, settings) + MEASURE + lab.report(*OUTPUTS)
    n = {name: values[0] for name, values in lab.run(script, ranks).numbers.items()}
    frame = lab.dump("dump.test")[0]
    expected = crystal.expected(atoms, box)
    prism = Prism(atoms.cell.array)
    bias = prism.vector_to_ase(np.stack([frame[f"f_b[{k}]"] for k in (2, 3, 4)], 1))
    forces = prism.vector_to_ase(np.stack([frame[f"f{k}"] for k in "xyz"], 1)) - bias
    scale = np.linalg.norm(expected.forces) / np.linalg.norm(expected.sigma_gradient / len(atoms))
    assert close(n["pe"], expected.energy)
    assert close(n["c_energy"], expected.energy)
    assert close(forces, expected.forces)
    assert close(bias, 0.25 * scale / len(atoms) * expected.sigma_gradient, 1e-9)
    assert close(frame["f_b[1]"], expected.atomic)
    assert close(
        [n[f"f_b[{k}]"] for k in range(1, 11)],
        [
            *(expected.sigma / len(atoms), expected.atomic.max(), expected.atomic.mean(), scale, 0.0, 0.25, 0.0, 0.0),
            *(expected.sigma, expected.displacement),
        ],
        1e-9,
    )
    assert n["f_b[9]"] == pytest.approx(expected.sigma, rel=1e-10)
    assert n["f_b[10]"] == pytest.approx(expected.displacement, rel=1e-10)
    return n


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("kind", BOXES)
def test_equals_numpy(crystal_lab, crystals, kind, ranks):
    name, repeat = BOXES[kind]
    check(crystal_lab, crystals[name], *crystals[name].shaken(repeat), ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("repeat", [(1, 2, 2), (2, 4, 4)], ids=["training cell", "twice the training cell"])
def test_pair_functions_equal_numpy(crystal_lab, crystals, repeat, ranks):
    """Atoms that are far from their sites: pairs come within the cutoff, the core acts."""
    crystal = crystals["pairs"]
    atoms, box = crystal.shaken(repeat, 0.35)
    assert crystal.basis.fixed(crystal.posterior.core, None, atoms, box)[0] > 0.05
    assert crystal.basis.fixed(None, crystal.posterior.limits, atoms, box)[0] > 0.05
    check(crystal_lab, crystal, atoms, box, ranks)


def test_pair_functions_are_a_table_in_hybrid_overlay(crystal_lab, crystals, tmp_path):
    """Force constants alone with a LAMMPS table of each pair of elements, to the table's accuracy; without the wall."""
    crystal = crystals["pairs"]
    atoms, box = crystal.shaken((1, 2, 2), 0.3)
    expected = crystal.expected(atoms, box)
    wall, push = crystal.basis.fixed(None, crystal.posterior.limits, atoms, box)
    pairs, orders = crystal.basis.pairs, crystal.basis.parameter_orders
    (tmp_path / "alone").mkdir()
    mean = crystal.posterior.mean[orders != PAIRS]
    alone = Crystal.make(tmp_path / "alone", crystal.primitive, crystal.basis.cutoffs, mean=mean)
    weights = pairs.parameters @ crystal.posterior.mean[orders == PAIRS]
    r = np.linspace(1.5, 5.2, 20001)
    for kind, radius in enumerate(crystal.posterior.core):
        value, slope, _ = (part @ weights for part in pairs.radial(r, np.full(len(r), kind)))
        excess = np.maximum(radius / r - 1.0, 0.0)
        value, force = value + CORE * excess**3, 3.0 * CORE * excess**2 * radius / r**2 - slope
        rows = "".join(
            f"{k} {a:.16g} {b:.16g} {c:.16g}\n" for k, (a, b, c) in enumerate(zip(r, value, force, strict=True), 1)
        )
        (tmp_path / f"{kind}.table").write_text(f"# energies\n\nV\nN {len(r)}\n\n{rows}")
    script = head(alone, atoms).replace("pair_style ubmd", "pair_style hybrid/overlay ubmd table spline 20000")
    script = script.replace("* * model.pt", "* * ubmd model.pt")
    for kind, types in enumerate(("2 2", "1 2", "1 1")):
        script += f"pair_coeff {types} table {kind}.table V\n"
    script += "dump d all custom 1 dump.test id fx fy fz\ndump_modify d sort id format float %.17g\nrun 0\n"
    n = crystal_lab.run(script + crystal_lab.report("pe")).numbers
    frame = crystal_lab.dump("dump.test")[0]
    ideal = weights @ pairs.radial(*ideal_pairs(crystal, box))[0].sum(0) / 2.0
    assert n["pe"][0] == pytest.approx(expected.energy - wall + ideal, abs=1e-6)
    forces = Prism(atoms.cell.array).vector_to_ase(np.stack([frame[f"f{k}"] for k in "xyz"], 1))
    assert np.abs(forces - expected.forces + push).max() < 1e-5 * np.abs(expected.forces).max()


def ideal_pairs(crystal, box):
    """Distances and kinds of the pairs of an ideal box: their energy is in the table, not in the model's."""
    found = crystal.basis.pairs.neighbours(np.zeros((len(box), 3)), box)
    return found.distance, found.kind


TURNS = {
    "cubic cell": [[-1, 1, 1], [1, -1, 1], [1, 1, -1]],
    "left-handed": [[0, 2, 0], [2, 0, 0], [0, 0, 2]],
    "skewed": [[1, 0, 0], [3, 1, 0], [-2, 2, 2]],
}


@pytest.mark.parametrize("kind", TURNS)
def test_boxes_in_other_orientations(crystal_lab, crystals, kind):
    """Any integer combination of primitive vectors; the crystal is turned, too, and its origin somewhere else."""
    crystal = crystals["zincblende"]
    check(crystal_lab, crystal, *crystal.shaken(TURNS[kind], 0.1), shift=np.array([0.7, -1.1, 2.9]))


@pytest.mark.parametrize("kind", ["orthorhombic", "triclinic"])
def test_turned_crystal(crystal_lab, crystals, kind):
    """A crystal of low symmetry whose box has its vectors in another order, shifted by a vector of any length."""
    crystal = crystals[kind]
    atoms, box = crystal.shaken((1, 2, 2), 0.1)
    expected = crystal.expected(atoms, box)
    atoms.set_cell(atoms.cell.array[[2, 0, 1]], scale_atoms=False)
    script = head(crystal, atoms, np.array([1.3, 11.9, -0.4])) + MEASURE + crystal_lab.report("pe", "f_b[9]", "f_b[10]")
    n = crystal_lab.run(script).numbers
    frame = crystal_lab.dump("dump.test")[0]
    forces = np.stack([frame[f"f{k}"] - frame[f"f_b[{m}]"] for k, m in zip("xyz", (2, 3, 4), strict=True)], 1)
    assert n["pe"][0] == pytest.approx(expected.energy, rel=1e-10)
    assert n["f_b[9]"][0] == pytest.approx(expected.sigma, rel=1e-9)
    assert n["f_b[10]"][0] == pytest.approx(expected.displacement, rel=1e-9)
    assert close(Prism(atoms.cell.array).vector_to_ase(forces), expected.forces)


def test_replicate_repeats_everything(crystal_lab, crystals):
    """u, u_i and displacement stay, energies grow."""
    crystal = crystals["zincblende"]
    atoms, box = crystal.shaken((2, 2, 2))
    expected = crystal.expected(atoms, box)
    script = head(crystal, atoms) + "replicate 2 1 3\nfix b all ubmd\nrun 0\n"
    n = crystal_lab.run(script + crystal_lab.report("pe", "f_b[1]", "f_b[2]", "f_b[10]")).numbers
    assert n["pe"][0] == pytest.approx(6 * expected.energy, rel=1e-10)
    assert n["f_b[1]"][0] == pytest.approx(expected.sigma / len(atoms), rel=1e-9)
    assert n["f_b[2]"][0] == pytest.approx(expected.atomic.max(), rel=1e-10)
    assert n["f_b[10]"][0] == pytest.approx(expected.displacement, rel=1e-10)


def test_one_tag_order_is_as_good_as_another(crystal_lab, crystals):
    """Sites go by positions, not by the order of the atoms."""
    crystal = crystals["orthorhombic"]
    atoms, box = crystal.shaken((1, 2, 2))
    expected = crystal.expected(atoms, box)
    order = np.random.default_rng(8).permutation(len(atoms))
    script = head(crystal, atoms[order]) + MEASURE
    crystal_lab.run(script)
    frame = crystal_lab.dump("dump.test")[0]
    assert close(frame["f_b[1]"], expected.atomic[order])


# ---- virials ----


@pytest.mark.parametrize(("ranks", "left"), [(1, False), (4, True)])
def test_virial_equals_sum_over_force_constants(crystal_lab, tmp_path, ranks, left):
    """All force constants of a box in which every pair has one nearest image."""
    crystal = Crystal.make(tmp_path, boron_arsenide(), {2: 2.5, 3: 2.5, 4: 2.5})
    ideal = crystal.primitive.repeat((2, 2, 2))
    if left:
        ideal.set_cell(ideal.cell.array[[1, 0, 2]], scale_atoms=False)
    box = crystal.basis.supercell(ideal)
    u = np.random.default_rng(2).uniform(-0.1, 0.1, (len(ideal), 3))
    atoms = ideal.copy()
    atoms.positions += u
    n = crystal_lab.run(head(crystal, atoms) + MEASURE + crystal_lab.report(*SIX), ranks).numbers
    stress = crystal_lab.tensor_to_ase(atoms, [-n[name][0] / crystal_lab.bar for name in SIX])
    assert close(stress, crystal.strain_derivative(u - u.mean(0), box) / atoms.get_volume())


def test_virial_of_springs(crystal_lab, springs):
    """A model fitted to bonds with known virials: sum over bonds of r ⊗ dE/dr, though it knows total energies only."""
    ideal, box = springs.shaken((4, 4, 4), 0.0)
    bonds = bonds_of(ideal)
    atoms = ideal.copy()
    # optical displacements have a stress of the first order, others of the second
    atoms.positions += np.random.default_rng(4).uniform(-0.1, 0.1, (len(ideal), 3))
    atoms.positions += np.where(atoms.symbols == "B", 0.1, 0.0)[:, None] * [1.0, 0.5, -0.2]
    u = atoms.positions - ideal.positions
    energy, _, slope = pair_polynomial(u, bonds)
    strain = np.einsum("na,nb->ab", bonds[2] + u[bonds[1]] - u[bonds[0]], slope)
    n = crystal_lab.run(head(springs, atoms) + MEASURE + crystal_lab.report("pe", *SIX)).numbers
    stress = crystal_lab.tensor_to_ase(atoms, [-n[name][0] / crystal_lab.bar for name in SIX])
    assert n["pe"][0] - box.determinant * ENERGY == pytest.approx(energy, rel=1e-9)
    assert close(stress, 0.5 * (strain + strain.T) / atoms.get_volume(), 1e-9)
