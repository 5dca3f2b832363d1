"""Every kind of uncertainty: LAMMPS against Python (1e-10, double), on one and two ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress

from ubmd.calculator import Model
from ubmd.data.graph import build_graph
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.settings import ModelSettings, UncertaintySettings

ELEMENTS = ["H", "C", "O"]
KINDS = ["posterior", "last-layer", "distance", "ensemble"]
BY_ELEMENT = ("posterior", "ensemble")

MEASURE = """
compute virial all pressure NULL pair
compute bias all pressure NULL fix
fix b all ubmd force 0.25 stress 0.4 window 1
fix_modify b virial yes
fix u all pair 1 ubmd uncertainty 1
thermo_style custom step pe c_virial[1] c_bias[1]
dump d all custom 1 dump.test id fx fy fz f_b[1] f_b[2] f_b[3] f_b[4] f_u
dump_modify d sort id format float %.17g
run 0
"""
VIRIAL, BIAS_VIRIAL = ([f"c_{name}[{k}]" for k in range(1, 7)] for name in ("virial", "bias"))


@pytest.fixture(scope="module")
def files(structures, tmp_path_factory) -> dict[str, Path]:
    """A small model with random weights and labels, in a file of every kind; half of them with factors by element."""
    rng = np.random.default_rng(21)
    labelled = []
    for kind in ["molecule"] * 5 + ["triclinic"] * 4:
        atoms = structures[kind].copy()
        atoms.positions += rng.uniform(-0.05, 0.05, (len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(len(atoms), 3)))
        labelled.append(atoms)
    folder = tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        by_element = kind in BY_ELEMENT
        settings = UncertaintySettings(
            kind=kind, projections=20, references=30, alpha=0.3, by_element=by_element, atoms_by="structure"
        )
        models = [
            GaussianMomentNetwork(ELEMENTS, ModelSettings(hidden=(16, 12), cutoff=4.0), seed=5 + m)
            for m in range(settings.networks)
        ]
        for m, model in enumerate(models):
            model.initialise_energies([build_graph(atoms, ELEMENTS, 4.0) for atoms in labelled[m:]])
        record = export_model(models, labelled[:6], labelled[6:], settings, folder / f"{kind}.pt")
        assert len(set(record.get("atom_scale", []))) == (len(ELEMENTS) if by_element else 0)
    return {kind: folder / f"{kind}.pt" for kind in KINDS}


def close(value, expected):
    """Relative to the largest component."""
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 0.0
    return np.abs(np.asarray(value) - expected).max() <= 1e-10 * np.abs(expected).max()


def script_of(lab, atoms, file: Path, path: str = "all at once") -> str:
    """Box, atoms and pair style with this model file, evaluated in this way."""
    (lab.folder / "model.pt").write_bytes(file.read_bytes())
    lab.set_path(path)
    return lab.head(atoms)


PATHS = pytest.mark.parametrize(("path", "ranks"), [("all at once", 1), ("blocks", 2), ("generic", 2)])


@PATHS
@pytest.mark.parametrize("structure", ["molecule", "small", "triclinic"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_python(lab, files, structures, kind, structure, path, ranks):
    atoms = structures[structure]
    evaluator = Model(files[kind], "double")
    periodic = atoms.pbc.all()
    measure = MEASURE if periodic else MEASURE.replace("stress 0.4 ", "")
    names = ["pe", *VIRIAL, *(BIAS_VIRIAL if periodic else []), *(f"f_b[{k}]" for k in range(1, 6))]
    numbers = lab.run(script_of(lab, atoms, files[kind], path) + measure + lab.report(*names), ranks).numbers
    n = {name: values[0] for name, values in numbers.items()}
    frame = lab.dump("dump.test")[0]
    expected = evaluator.predict_one(atoms)
    u, gradient, strain = evaluator.uncertainty_gradient(atoms)
    total = lab.to_ase(atoms, np.stack([frame[f"f{k}"] for k in "xyz"], 1))
    bias = lab.to_ase(atoms, np.stack([frame[f"f_b[{k}]"] for k in (2, 3, 4)], 1))
    scale = np.linalg.norm(expected.forces) / np.linalg.norm(gradient)

    assert close(n["pe"], expected.energy)
    assert close(total - bias, expected.forces)
    assert close(bias, 0.25 * scale * gradient)
    assert close(frame["f_b[1]"], expected.atomic_u)
    assert close(frame["f_u"], expected.atomic_u)
    assert close([n[f"f_b[{k}]"] for k in range(1, 5)], [u, expected.atomic_u.max(), expected.atomic_u.mean(), scale])
    if periodic:
        stress = voigt_6_to_full_3x3_stress(expected.stress)
        bias_stress = strain / atoms.get_volume()
        stress_scale = np.linalg.norm(stress) / np.linalg.norm(bias_stress)
        assert close(n["f_b[5]"], stress_scale)
        assert close(lab.tensor_to_ase(atoms, [-n[name] / lab.bar for name in VIRIAL]), stress)
        applied = lab.tensor_to_ase(atoms, [n[name] / lab.bar for name in BIAS_VIRIAL])
        assert close(applied, 0.4 * stress_scale * bias_stress)


@PATHS
@pytest.mark.parametrize("structure", ["molecule", "small", "triclinic"])
@pytest.mark.parametrize("kind", KINDS)
def test_bias_of_summed_atomic_uncertainties_equals_python(lab, files, structures, kind, structure, path, ranks):
    atoms = structures[structure]
    evaluator = Model(files[kind], "double")
    measure = MEASURE.replace("force 0.25", "uncertainty atomic force 0.25")
    if not atoms.pbc.all():
        measure = measure.replace("stress 0.4 ", "")
    names = ["f_b", "f_b[1]", "f_b[4]", *BIAS_VIRIAL]
    numbers = lab.run(script_of(lab, atoms, files[kind], path) + measure + lab.report(*names), ranks).numbers
    n = {name: values[0] for name, values in numbers.items()}
    frame = lab.dump("dump.test")[0]
    expected = evaluator.predict_one(atoms)
    total, gradient, strain = evaluator.atomic_uncertainty_gradient(atoms)
    scale = np.linalg.norm(expected.forces) / np.linalg.norm(gradient)
    bias = lab.to_ase(atoms, np.stack([frame[f"f_b[{k}]"] for k in (2, 3, 4)], 1))

    assert close(total, expected.atomic_u.sum())
    assert close(n["f_b[1]"], expected.u)
    assert close(n["f_b[4]"], scale)
    assert close(n["f_b"], -0.25 * scale * total)
    assert close(bias, 0.25 * scale * gradient)
    if atoms.pbc.all():
        stress = voigt_6_to_full_3x3_stress(expected.stress)
        applied = lab.tensor_to_ase(atoms, [n[name] / lab.bar for name in BIAS_VIRIAL])
        assert close(applied, 0.4 * np.linalg.norm(stress) / np.linalg.norm(strain) * strain)


@PATHS
@pytest.mark.parametrize("kind", KINDS)
def test_excluded_atoms_count_nowhere(lab, files, structures, kind, path, ranks):
    """Values, bias and its stress are those of the atoms that are not excluded from all others."""
    atoms = structures["triclinic"]
    evaluator = Model(files[kind], "double")
    exclude = "group gone id 2 5 11\nneigh_modify exclude group gone all\n"
    names = ["pe", *VIRIAL, *BIAS_VIRIAL, *(f"f_b[{k}]" for k in range(1, 4))]
    script = script_of(lab, atoms, files[kind], path) + exclude + MEASURE + lab.report(*names)
    n = {name: values[0] for name, values in lab.run(script, ranks).numbers.items()}
    frame = lab.dump("dump.test")[0]
    there = ~np.isin(frame["id"], [2, 5, 11])
    kept = atoms[there]
    expected = evaluator.predict_one(kept)
    u, gradient, strain = evaluator.uncertainty_gradient(kept)
    bias = lab.to_ase(atoms, np.stack([frame[f"f_b[{k}]"] for k in (2, 3, 4)], 1))
    scale = np.linalg.norm(expected.forces) / np.linalg.norm(gradient)
    stress = voigt_6_to_full_3x3_stress(expected.stress)

    assert close(n["pe"], expected.energy)
    assert close([n[f"f_b[{k}]"] for k in range(1, 4)], [u, expected.atomic_u.max(), expected.atomic_u.mean()])
    assert close(bias[there], 0.25 * scale * gradient)
    assert close(lab.tensor_to_ase(atoms, [-n[name] / lab.bar for name in VIRIAL]), stress)
    applied = lab.tensor_to_ase(atoms, [n[name] / lab.bar for name in BIAS_VIRIAL])
    assert close(applied, 0.4 * np.linalg.norm(stress) / np.linalg.norm(strain) * strain)
    for values in (bias, frame["f_b[1]"], frame["f_u"]):
        assert not values[~there].any()
    assert close(frame["f_u"][there], expected.atomic_u)


@pytest.fixture(scope="module")
def wide_file(structures, tmp_path_factory) -> Path:
    """So many features that 36 atoms are quicker by the structure's identities than atom by atom."""
    rng = np.random.default_rng(22)
    labelled = []
    for _ in range(4):
        atoms = structures["cubic"].copy()
        atoms.positions += rng.uniform(-0.05, 0.05, (len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(len(atoms), 3)))
        labelled.append(atoms)
    model = GaussianMomentNetwork(ELEMENTS, ModelSettings(hidden=(16, 12), cutoff=4.0), seed=5)
    model.initialise_energies([build_graph(atoms, ELEMENTS, 4.0) for atoms in labelled])
    path = tmp_path_factory.mktemp("wide") / "wide.pt"
    export_model(model, labelled[:2], labelled[2:], UncertaintySettings(projections=80), path)
    return path


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("path", ["all at once", "blocks", "generic"])
@pytest.mark.parametrize("kind", [*KINDS, "wide"])
def test_without_atomic_uncertainties(lab, files, wide_file, structures, kind, path, ranks):
    """`atoms no`: the same u and bias on the path that the model then prefers, zeros for what is left out."""
    file = wide_file if kind == "wide" else files[kind]
    module = Model(file, "double").module
    assert module.by_structure(36) == (kind in ("last-layer", "wide"))
    results = []
    for keyword in ("yes", "no"):
        script = (
            script_of(lab, structures["cubic"], file, path)
            + "replicate 4 1 1\ndisplace_atoms all random 0.1 0.1 0.1 5\n"
        )
        script += "fix 1 all nve\ntimestep 0.0005\n"
        script += f"fix b all ubmd force 0.25 stress 0.3 window 2 every 2 atoms {keyword}\n"
        script += (
            "dump d all custom 4 dump.test id x f_b[1] f_b[2] f_b[3] f_b[4]\ndump_modify d sort id format float %.17g\n"
        )
        n = lab.run(script + "run 4\n" + lab.report(*(f"f_b[{k}]" for k in range(1, 7))), ranks).numbers
        results.append((np.array([n[f"f_b[{k}]"][0] for k in range(1, 7)]), lab.dump("dump.test")[-1]))
    (numbers, frame), (others, other) = results
    assert close(others[[0, 3, 4, 5]], numbers[[0, 3, 4, 5]])
    assert not others[[1, 2]].any()
    assert numbers[[1, 2]].all()
    assert not other["f_b[1]"].any()
    for name in ("x", "f_b[2]", "f_b[3]", "f_b[4]"):
        assert np.allclose(frame[name], other[name], rtol=0, atol=1e-9 * np.abs(frame[name]).max())


@pytest.mark.parametrize("uncertainty", ["energy", "atomic"])
def test_ensemble_with_a_rank_without_atoms(lab, files, structures, uncertainty):
    """The molecule lies at one end of a long box: a rank that owns nothing joins every communication."""
    atoms = structures["molecule"]
    evaluator = Model(files["ensemble"], "double")
    (lab.folder / "model.pt").write_bytes(files["ensemble"].read_bytes())
    script = lab.head(atoms, settings="processors 2 1 1", margin=(5.0, 60.0))
    script += f"fix b all ubmd force 0.25 uncertainty {uncertainty} window 1\nrun 0\n"
    outcome = lab.run(script + lab.report("f_b[1]", "f_b[2]", "f_b[4]"), 2)
    assert outcome.text.split("Nlocal:")[1].split("min")[0].split()[-1] == "0"
    expected = evaluator.predict_one(atoms)
    atomic = uncertainty == "atomic"
    gradient = (evaluator.atomic_uncertainty_gradient if atomic else evaluator.uncertainty_gradient)(atoms)[1]
    scale = np.linalg.norm(expected.forces) / np.linalg.norm(gradient)
    n = outcome.numbers
    assert close([n["f_b[1]"][0], n["f_b[2]"][0], n["f_b[4]"][0]], [expected.u, expected.atomic_u.max(), scale])


def test_ensemble_trajectories_do_not_depend_on_the_ranks(lab, files, structures):
    """Held bias of summed atomic uncertainties over 20 steps: one, two and four ranks, and fix pair beside it."""
    atoms = structures["triclinic"]
    script = script_of(lab, atoms, files["ensemble"]) + "velocity all create 2000.0 4 loop all\nfix 1 all nve\n"
    script += "timestep 0.0005\nfix b all ubmd force 0.3 uncertainty atomic window 4 every 2\n"
    script += "fix u all pair 1 ubmd uncertainty 1\nvariable d atom abs(f_u-f_b[1])\ncompute d all reduce max v_d\n"
    script += "dump d all custom 1 dump.test id x y z f_b[2] f_u\ndump_modify d sort id format float %.17g\n"
    frames = []
    for ranks in (1, 2, 4):
        n = lab.run(script + "thermo_style custom step c_d\nthermo 20\nrun 20\n" + lab.report("c_d"), ranks).numbers
        assert n["c_d"][0] < 1e-10
        frames.append(lab.dump("dump.test")[-1])
    assert np.abs(frames[0]["f_b[2]"]).max() > 1e-3
    for name in ("x", "y", "z", "f_b[2]"):
        for other in frames[1:]:
            assert np.allclose(frames[0][name], other[name], rtol=0, atol=1e-9)


def test_ensemble_in_mixed_precision(lab, files, structures):
    atoms = structures["triclinic"]
    (lab.folder / "model.pt").write_bytes(files["ensemble"].read_bytes())
    script = lab.head(atoms, "mixed") + "fix b all ubmd force 0.25 window 1\nrun 0\n"
    n = lab.run(script + lab.report("f_b[1]", "f_b[2]", "f_b[4]")).numbers
    evaluator = Model(files["ensemble"], "double")
    expected = evaluator.predict_one(atoms)
    gradient = evaluator.uncertainty_gradient(atoms)[1]
    scale = np.linalg.norm(expected.forces) / np.linalg.norm(gradient)
    found = [n["f_b[1]"][0], n["f_b[2]"][0], n["f_b[4]"][0]]
    assert found == pytest.approx([expected.u, expected.atomic_u.max(), scale], rel=1e-3)


@pytest.mark.parametrize("mode", ["energy", "atomic"])
def test_ensemble_in_real_units(lab, files, structures, mode):
    """u, u_i and the bias force scale with the energy unit."""
    script = script_of(lab, structures["triclinic"], files["ensemble"])
    script += f"fix b all ubmd force 0.25 uncertainty {mode} window 1\nrun 0\n"
    found = {}
    for units in ("metal", "real"):
        with lab.session(script.replace("units metal", f"units {units}")) as lammps:
            order = np.argsort(lammps.numpy.extract_atom("id")[: lammps.get_natoms()])
            array = np.array(lammps.numpy.extract_fix("b", 1, 2))[: len(order)][order]
            found[units] = [lammps.extract_fix("b", 0, 1, 0), *array.ravel()]
    assert close(found["real"], 23.060549 * np.array(found["metal"]))
