"""Networks with message passing: LAMMPS against Python, where ghosts stand for atoms with neighbours of their own."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import message_passing
import numpy as np
import pytest
import torch
from differences import FORCES, bias_gradients, columns, deviation
from message_passing import shaken
from torch import Tensor

from ubmd.calculator import Model
from ubmd.errors import ModelError
from ubmd.lammps.box import Box
from ubmd.lammps.session import Session
from ubmd.settings import ModelSettings

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
dump d all custom 1 dump.test id fx fy fz f_b[1] f_b[2] f_b[3] f_b[4]
dump_modify d sort id format float %.17g
run 0
"""
OUTPUTS = ["pe", "c_energy", *SIX, "f_b", *(f"f_b[{k}]" for k in range(1, 9))]


def close(value, expected, tolerance=1e-10):
    """Relative to the largest component."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(value) - expected).max() <= tolerance * np.abs(expected).max()


class Stated(torch.nn.Module):
    """A model file whose record says something else."""

    def __init__(self, inner: torch.jit.ScriptModule, record: str) -> None:
        super().__init__()
        self.inner, self.record = inner, record

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        return self.inner.forward(species, edge_index, edge_vector, n_local)

    @torch.jit.export
    def forces(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        return self.inner.forces(species, edge_index, edge_vector, n_local)

    @torch.jit.export
    def uncertainty(self, phi_mean: Tensor) -> Tensor:
        return self.inner.uncertainty(phi_mean)

    @torch.jit.export
    def atomic_uncertainties(self, phi: Tensor) -> Tensor:
        return self.inner.atomic_uncertainties(phi)

    @torch.jit.export
    def metadata(self) -> str:
        return self.record


class StatedEnsemble(Stated):
    """With the method of an ensemble."""

    @torch.jit.export
    def force_uncertainties(self, forces: Tensor) -> Tensor:
        return forces


class StatedFast(Stated):
    """With the method of a local model."""

    @torch.jit.export
    def evaluate(self, species: Tensor) -> Tensor:
        return species


def measured(messages, atoms, ranks, settings="", margin=(5.0, 5.0), mode="energy", division=""):
    """(numbers, columns by atom) of one evaluation in LAMMPS."""
    script = messages.head(atoms, settings=settings, margin=margin) + division
    script += MEASURE.format(f"uncertainty {mode}") + messages.report(*OUTPUTS)
    numbers = {name: values[0] for name, values in messages.run(script, ranks).numbers.items()}
    return numbers, messages.dump("dump.test")[0]


def check_against_python(messages, network, atoms, ranks, settings="", margin=(5.0, 5.0), mode="energy", division=""):
    """Everything that LAMMPS reports for one structure equals the evaluation in Python (1e-10, double)."""
    n, frame = measured(messages, atoms, ranks, settings, margin, mode, division)
    expected = network.predict_one(atoms)
    u, gradient, _ = network.uncertainty_gradient(atoms)
    if mode == "atomic":
        biased, gradient, _ = network.atomic_uncertainty_gradient(atoms)
    else:
        biased = u
    total = messages.to_ase(atoms, columns(frame, ["fx", "fy", "fz"]))
    bias = messages.to_ase(atoms, columns(frame, ["f_b[2]", "f_b[3]", "f_b[4]"]))
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
        stress = messages.tensor_to_ase(atoms, [-n[name] / messages.bar for name in SIX])
        assert close(stress[VOIGT], expected.stress)


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_equals_python(messages, network, structures, kind, ranks):
    check_against_python(messages, network, structures[kind], ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["molecule", "triclinic"])
def test_bias_along_atomic_uncertainties_equals_python(messages, network, structures, kind, ranks):
    check_against_python(messages, network, structures[kind], ranks, mode="atomic")


def test_a_slab_equals_python(message_file, network, structures):
    """A turned, skewed cell that is periodic in two directions."""
    atoms = structures["triclinic"].copy()
    atoms.rotate(40.0, (1.0, 2.0, 3.0), rotate_cell=True)
    atoms.pbc = (True, False, True)
    expected = network.predict_one(atoms)
    with Session(model=message_file) as session:
        session.make_system(atoms, "mixed")  # the file runs in double only, which the session knows
        session.commands(["fix b all ubmd", "run 0"])
        forces = session.gather("f") @ Box(atoms).rotation.T
        assert close(session.energy(), expected.energy)
        assert close(forces, expected.forces)
        assert close([session.fix_value("b", 0), session.fix_value("b", 1)], [expected.u, expected.atomic_u.max()])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sum_with_a_baseline_equals_python(messages, structures, tmp_path, ranks):
    """The repulsion is that of owned atoms alone, though ghosts have pairs."""
    model = ModelSettings(baseline="zbl", atom_energies={"H": 1.0, "C": 2.0, "O": 3.0})
    message_passing.export(tmp_path / "model.pt", ELEMENTS, shaken(structures.values()), model=model)
    atoms = structures["triclinic"]
    check_against_python(messages, Model(tmp_path / "model.pt"), atoms, ranks)
    alone = tmp_path / "alone.pt"
    message_passing.export(alone, ELEMENTS, shaken(structures.values()))
    assert abs(Model(tmp_path / "model.pt").predict_one(atoms).energy - Model(alone).predict_one(atoms).energy) > 1.0


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_without_atoms(messages, network, structures, ranks):
    """The molecule lies at the low end of a long box, so that at least one rank owns nothing."""
    atoms, settings = structures["molecule"], f"processors {ranks} 1 1"
    script = messages.head(atoms, settings=settings, margin=(5.0, 60.0)) + "fix b all ubmd\nrun 0\n"
    text = messages.run(script, ranks).text
    assert text.split("Nlocal:")[1].split("min")[0].split()[-1] == "0"
    check_against_python(messages, network, atoms, ranks, settings, (5.0, 60.0))


@pytest.mark.parametrize(
    ("settings", "division", "replicas"),
    [("comm_style tiled", "balance 1.0 rcb", (3, 4, 3)), ("processors 1 1 4", "balance 1.0 shift z 5 1.0", (1, 1, 3))],
    ids=["tiled", "shifted"],
)
def test_other_divisions_of_the_box(messages, network, structures, settings, division, replicas):
    """Parts of any size; tiled communication needs a box that is longer than the ghosts reach."""
    atoms = structures["cubic"].repeat(replicas)
    check_against_python(messages, network, atoms, 4, settings, division=division)


# ------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("kind", ["triclinic", "small"])
def test_forces_and_virial_equal_numdiff(messages, structures, kind):
    """fix numdiff and numdiff/virial, beside the bias, on two ranks."""
    script = messages.head(structures[kind]) + "fix n all numdiff 1 1e-4\nfix v all numdiff/virial 1 1e-5\n"
    script += (
        "fix b all ubmd force 0.25 window 1\ncompute p all pressure NULL virial\nthermo_style custom step c_p[1]\n"
    )
    names = [f"c_p[{k}]" for k in range(1, 7)] + [f"f_v[{k}]" for k in (1, 2, 3, 6, 5, 4)]
    n = messages.run(script + FORCES + "run 0\n" + messages.report(*names), 2).numbers
    frame = messages.dump("dump.test")[0]
    forces = columns(frame, ["fx", "fy", "fz"]) - columns(frame, ["f_b[2]", "f_b[3]", "f_b[4]"])
    pressures = np.array([n[name][0] for name in names])
    assert deviation(columns(frame, ["f_n[1]", "f_n[2]", "f_n[3]"]), forces) < 1e-6
    assert deviation(pressures[6:], pressures[:6]) < 1e-7


def test_bias_force_is_the_derivative(messages, structures):
    """Central differences of f_b[1] for every atom and axis, at the scale that the fix reports."""
    with messages.session(messages.head(structures["small"]) + "fix b all ubmd force 0.25 window 1\nrun 0\n") as lammps:
        analytic, numerical = bias_gradients(lammps, 1e-5)
    assert np.abs(analytic).max() > 1e-3
    assert deviation(numerical, analytic) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_bias_virial_is_the_strain_derivative(messages, network, structures, ranks):
    """That of the fix is tau_s s_s du/dstrain, with u of strained structures in Python."""
    atoms, h = structures["triclinic"], 1e-5
    script = messages.head(atoms) + "fix b all ubmd stress 0.4 window 1\n"
    script += "compute p all pressure NULL fix\nthermo_style custom step c_p\nrun 0\n"
    n = messages.run(script + messages.report("f_b[5]", *(f"c_p[{k}]" for k in range(1, 7))), ranks).numbers
    virial = messages.tensor_to_ase(atoms, [n[f"c_p[{k}]"][0] / messages.bar for k in range(1, 7)]) * atoms.get_volume()
    numerical = np.zeros((3, 3))
    for a, b in zip(*VOIGT, strict=True):
        values = []
        for sign in (1.0, -1.0):
            strain = np.eye(3)
            strain[a, b] += 0.5 * sign * h
            strain[b, a] += 0.5 * sign * h
            copy = atoms.copy()
            copy.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            values.append(network.predict_one(copy).u)
        numerical[a, b] = numerical[b, a] = (values[0] - values[1]) / (2.0 * h)
    assert n["f_b[5]"][0] > 0.0
    assert deviation(0.4 * n["f_b[5]"][0] * numerical, virial) < 1e-5


# ------------------------------------------------------------------------------------------ runs

NPT = """
velocity all create 3000.0 31 dist gaussian
timestep 0.0005
fix move all npt temp 3000 3000 0.05 iso 0 0 0.5
fix b all ubmd force 0.2 stress 0.2 window 5 every 2
"""


def test_a_run_is_the_same_on_all_ranks(messages, structures):
    """NPT with bias force and stress: atoms change ranks, ghosts change with them."""
    atoms = structures["cubic"].repeat((1, 1, 2))
    found, owners = [], []
    for ranks in (1, 2, 4):
        script = messages.head(atoms) + NPT + "dump d all custom 20 dump.test id x y z f_b[1] f_b[2] proc\n"
        script += "dump_modify d sort id format float %.17g\nrun 60\n" + messages.report("pe", "vol", "f_b[1]")
        n = messages.run(script, ranks).numbers
        frames = messages.dump("dump.test")
        found.append([*frames[-1]["x"], *frames[-1]["f_b[2]"], *(n[name][0] for name in ("pe", "vol", "f_b[1]"))])
        owners.append(np.array([frame["proc"] for frame in frames]))
    assert (np.ptp(owners[2], axis=0) > 0).any()
    assert close(found[1], found[0], 1e-9)
    assert close(found[2], found[0], 1e-9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_continues_from_a_restart_file(messages, structures, ranks):
    atoms, dynamics = structures["triclinic"], NPT.replace("3000", "300")
    start = messages.head(atoms) + dynamics
    whole = messages.run(start + "run 12\n" + messages.report("pe", "f_b[1]", "f_b[4]"), ranks).numbers
    messages.run(start + "run 6\nwrite_restart half.restart\n", ranks)
    coefficients = "\npair_style ubmd\npair_coeff * * model.pt H C O\n"
    rest = "timestep" + dynamics.split("timestep")[1] + "run 6\n" + messages.report("pe", "f_b[1]", "f_b[4]")
    again = messages.run(f"read_restart half.restart{coefficients}{rest}", ranks).numbers
    for name, values in whole.items():
        assert again[name] == pytest.approx(values, rel=1e-8)


@pytest.mark.parametrize("ranks", [1, 2])
def test_atoms_that_take_no_part(messages, network, structures, ranks):
    """Excluded atoms are absent, as those of another style are: no message goes through them."""
    atoms = structures["triclinic"]
    script = messages.head(atoms) + "group gone id 2 5 11\nneigh_modify exclude group gone all\n"
    report = messages.report("pe", "f_b[1]", "f_b[2]")
    excluded = messages.run(script + "fix b all ubmd\nrun 0\n" + report, ranks).numbers
    kept = atoms[np.isin(np.arange(len(atoms)), [1, 4, 10], invert=True)]
    expected = network.predict_one(kept)
    said = [excluded[name][0] for name in ("pe", "f_b[1]", "f_b[2]")]
    assert close(said, [expected.energy, expected.u, expected.atomic_u.max()])
    script = messages.head(atoms).replace("pair_style ubmd precision double", "pair_style hybrid/overlay ubmd zero 2.0")
    script = script.replace(
        "pair_coeff * * model.pt H C O", "pair_coeff * * ubmd model.pt H C NULL\npair_coeff * * zero"
    )
    hybrid = messages.run(script + "fix b all ubmd\nrun 0\n" + report, ranks).numbers
    expected = network.predict_one(atoms[[symbol != "O" for symbol in atoms.symbols]])
    assert close([hybrid["pe"][0], hybrid["f_b[1]"][0]], [expected.energy, expected.u])


def test_the_range_of_ghosts_is_set_and_given_back(messages, structures):
    """Three times the cutoff and the skin on several ranks; with the next pair style it is the user's again."""
    script = messages.head(structures["cubic"], settings="comm_modify cutoff 7.5") + "run 0\n"
    script += "pair_style zero 4.0\npair_coeff * *\nrun 0\n"
    for ranks, expected in ((1, ["7.5", "7.5"]), (2, ["13", "7.5"])):
        assert re.findall(r"ghost atom cutoff = (\S+)", messages.run(script, ranks).text) == expected


def test_ghosts_that_are_taken_away_are_missed(messages, structures):
    """`pre no` skips the initialisation, in which the style sets their range."""
    script = messages.head(structures["cubic"]) + "fix move all nve\nrun 1\ncomm_modify cutoff 6.0\nrun 1 pre no\n"
    outcome = messages.run(script, 2, check=False)
    assert outcome.status != 0
    assert "ghosts reach 6 A but the model's messages 13 A: remove 'comm_modify cutoff'" in outcome.text
    assert messages.run(script.replace("pre no", ""), 2).status == 0


def test_a_fixed_single_precision(messages, structures, tmp_path):
    """A module in float32 runs as `mixed`, which then is the default of all, and in no other precision."""
    module = message_passing.Module(len(ELEMENTS), 3).single()
    message_passing.export(tmp_path / "model.pt", ELEMENTS, shaken(structures.values()), module)
    atoms = structures["triclinic"]
    expected = Model(tmp_path / "model.pt").predict_one(atoms)
    with pytest.raises(ModelError, match="runs in mixed precision only, not in double"):
        Model(tmp_path / "model.pt", "double")
    script = messages.head(atoms) + "fix b all ubmd\nrun 0\n" + messages.report("pe", "f_b[1]", "f_b[2]")
    outcome = messages.run(script, 2, check=False)
    assert "model.pt runs in mixed precision only: remove 'precision double'" in outcome.text
    n = messages.run(script.replace("precision double", ""), 2).numbers
    assert close(n["pe"][0], expected.energy, 1e-6)
    assert close([n["f_b[1]"][0], n["f_b[2]"][0]], [expected.u, expected.atomic_u.max()], 1e-3)


# ------------------------------------------------------------------------------------------ refusals

PAIR = "pair_style ubmd precision double"
FIX = "fix b all ubmd\nrun 0\n"
REFUSED = {
    "virials of atoms": (
        "compute s all stress/atom NULL virial\ncompute m all reduce max c_s[1]\n",
        "",
        "",
        "per atom",
    ),
    "centroid": (
        "compute s all centroid/stress/atom NULL virial\ncompute m all reduce max c_s[1]\n",
        "",
        "",
        "per atom",
    ),
    "chunk": ("", PAIR, f"{PAIR} chunk 3", "model.pt has message passing, .*: remove 'chunk 3'"),
    "precision": ("", PAIR, "pair_style ubmd precision mixed", "in double precision only: remove 'precision mixed'"),
    "multi": ("", "1.0 bin", "1.0 multi\ncomm_modify mode multi", "remove 'comm_modify mode multi'"),
}


@pytest.mark.parametrize(("more", "old", "new", "words"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_not_available_is_refused(messages, structures, more, old, new, words):
    script = messages.head(structures["cubic"]).replace(old, new, 1) + more
    script += "thermo_style custom step pe c_m\n" if more else ""
    outcome = messages.run(script + FIX, ranks=2, check=False)
    assert outcome.status != 0
    assert re.search(rf"ERROR: pair_style ubmd.*{words}", outcome.text)


def rewritten(path: Path, change: dict, more: type[torch.nn.Module] = Stated) -> None:
    """The model file with another record, or further methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = torch.jit.load(path)
        record = json.dumps({k: v for k, v in json.loads(inner.metadata()).items() if k != "atom_scale"} | change)
        torch.jit.script(more(inner, record)).save(str(path))


WRONG = {
    "too few layers": ({"layers": 2}, Stated, r"passes messages in more steps than its record says \(layers 2\)"),
    "local": ({"format": 1, "layers": 1, "fixed_precision": False}, Stated, r"its record says \(layers 1\)"),
    "format": ({"format": 1}, Stated, "layers or precision .* is damaged"),
    "no layers": ({"layers": 0}, Stated, "layers or precision .* is damaged"),
    "unknown precision": ({"precision": "half"}, Stated, "layers or precision .* is damaged"),
    "newer": ({"format": 5}, Stated, "has format 5 but this ubmd reads formats up to 4: update ubmd"),
    "ensemble": ({}, StatedEnsemble, "is an ensemble of networks with message passing, which is not supported"),
    "fast": ({}, StatedFast, "has message passing and the method evaluate"),
}


@pytest.mark.parametrize(("change", "kind", "words"), WRONG.values(), ids=list(WRONG))
def test_files_that_cannot_be_run_are_refused(messages, structures, change, kind, words):
    rewritten(messages.folder / "model.pt", change, kind)
    script = messages.head(structures["cubic"])
    with pytest.raises(Exception, match=words), messages.session(script):
        pass


# ------------------------------------------------------------------------------------------ a test that can fail


@pytest.mark.parametrize(("stated", "right"), [(2, False), (3, True)])
def test_a_layer_less_is_wrong(messages, structures, tmp_path, stated, right):
    """Without the pairs that are two pairs away, the same network gives other forces on two ranks.

    Its last step is silent in small graphs, so that no check sees how many it has.
    """
    module = message_passing.Module(len(ELEMENTS), 3, silent_below=40)
    message_passing.export(tmp_path / "model.pt", ELEMENTS, shaken(structures.values()), module, stated)
    atoms = structures["triclinic"].repeat((3, 1, 1))
    network = Model(tmp_path / "model.pt")
    expected = network.predict_one(atoms)
    n, frame = measured(messages, atoms, 2, settings="processors 2 1 1")
    forces = columns(frame, ["fx", "fy", "fz"]) - columns(frame, ["f_b[2]", "f_b[3]", "f_b[4]"])
    assert close(n["pe"], expected.energy) == right
    assert close(messages.to_ase(atoms, forces), expected.forces, 1e-10 if right else 1e-5) == right
