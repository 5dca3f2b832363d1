"""What a calculator sees besides elements, positions, cell and periodicity: carried, hashed, and labelled."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixBondLength, FixCartesian, Hookean
from ase.io import read, write

from ubmd.data.constraints import fixed_atoms
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.state import bare, electrons_differ, state_hash, structures_hash
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, LabelError, SettingsError
from ubmd.learning.labels import label_key
from ubmd.learning.loop.verify import verify
from ubmd.learning.start import check_start, check_states, perturb
from ubmd.references import label, labels, sample
from ubmd.references.cache import label_hash, structure_hash
from ubmd.references.electrons import spin_multiplicity, total_charge
from ubmd.settings import ReferenceSettings, RunSettings, SamplingSettings, StartSettings, TestSettings

INFO = ("charge", "spin", "multiplicity")

# The energy depends on all that a state has; EMT does the rest.
SEEN = """
import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

class Seen(Calculator):
    implemented_properties = ["energy", "forces"]
    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        plain = atoms.copy()
        plain.calc = EMT()
        told = atoms.get_initial_charges().sum() + 10 * atoms.get_initial_magnetic_moments().sum()
        told += 100 * atoms.get_tags().sum() + 1000 * atoms.info.get("charge", 0)
        told += 1e-3 * (atoms.get_masses() - plain.get_masses()).sum() if atoms.has("masses") else 0.0
        self.results = {"energy": plain.get_potential_energy() + told, "forces": plain.get_forces() * (1.0 + told)}
"""


def copper(seed: int = 1) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    return atoms


def states() -> dict[str, Atoms]:
    """One geometry in several states."""
    made = {
        name: copper() for name in ("none", "charges", "moments", "non-collinear", "tags", "masses", "charge", "spin")
    }
    made["charges"].set_initial_charges([0.1, 0, 0, 0])
    made["moments"].set_initial_magnetic_moments([1.0, -1.0, 1.0, -1.0])
    made["non-collinear"].set_initial_magnetic_moments(np.eye(4, 3))
    made["tags"].set_tags([0, 0, 0, 1])
    made["masses"].set_masses([64.9] * 4)
    made["charge"].info["charge"] = 1
    made["spin"].info["spin"] = 1
    return made


@pytest.fixture
def seen(tmp_path, request):
    """Settings of a reference whose labels depend on the state."""
    name = f"seen_{abs(hash(request.node.name))}"  # one module per test: Python imports a name once
    (tmp_path / f"{name}.py").write_text(SEEN, encoding="utf-8")

    def settings(**others) -> ReferenceSettings:
        return ReferenceSettings(**({"calculator": f"{name}:Seen", "force_limit": 1e6} | others))

    return settings


# ---------------------------------------------------------------------------------------------- hashes


def test_every_state_has_a_hash_of_its_own_and_nothing_has_none():
    hashes = {name: state_hash(atoms, INFO) for name, atoms in states().items()}
    assert hashes.pop("none") == ""
    assert len(set(hashes.values())) == len(hashes)
    assert "" not in hashes.values()


def test_zeros_and_usual_masses_are_no_state():
    atoms = copper()
    atoms.set_initial_charges([0.0] * 4)
    atoms.set_initial_magnetic_moments([0.0] * 4)
    atoms.set_tags([0] * 4)
    atoms.set_masses("defaults")
    atoms.info["unrelated"] = 3
    assert state_hash(atoms, INFO) == ""
    assert structures_hash([atoms], INFO) == dataset_hash([atoms])


def test_numbers_in_info_are_compared_as_numbers():
    hashes = set()
    for value in (2, 2.0, np.int64(2), np.float32(2.0)):
        atoms = copper()
        atoms.info["charge"] = value
        hashes.add(state_hash(atoms, INFO))
    assert len(hashes) == 1


@pytest.mark.parametrize("name", list(states()))
def test_a_state_survives_a_file(name, tmp_path):
    atoms = states()[name]
    write_structures(tmp_path / "a.extxyz", [atoms])
    assert state_hash(read_structures(tmp_path / "a.extxyz")[0], INFO) == state_hash(atoms, INFO)


def test_keys_of_structures_without_state_are_those_of_earlier_versions():
    """Paid labels stay valid: these hashes were printed by version 0.1.0 before it knew of states."""
    atoms = Atoms("CuAu", [[0.0, 0.0, 0.0], [0.0, 0.0, 2.5]])
    settings = ReferenceSettings(calculator="ase.calculators.emt:EMT")
    assert label_hash(atoms, settings, Path()) == "edd6152be4f2fa4531f353f39ab15305720eb771ce51a745e05c93267fad424b"
    assert label_key(atoms, settings) == "07309c3d09b4ffd6d4ca1d7480877cb4ab6aeaf00d8a5d263ef14eac7a25f074"


@pytest.mark.parametrize("name", [name for name in states() if name != "none"])
def test_keys_of_labels_depend_on_the_state(name):
    settings = ReferenceSettings(calculator="ase.calculators.emt:EMT")
    plain, other = states()["none"], states()[name]
    assert structure_hash(plain) == structure_hash(other)
    assert label_hash(plain, settings, Path()) != label_hash(other, settings, Path())
    assert label_key(plain, settings) != label_key(other, settings)


def test_a_key_of_info_that_the_settings_do_not_name_does_not_count():
    settings = ReferenceSettings(calculator="ase.calculators.emt:EMT", info=("field",))
    charged, in_a_field = states()["charge"], copper()
    in_a_field.info["field"] = [0.0, 0.0, 0.1]
    assert label_key(charged, settings) == label_key(copper(), settings)
    assert label_key(in_a_field, settings) != label_key(copper(), settings)


# ---------------------------------------------------------------------------------------------- labels


def test_one_geometry_in_several_states_has_several_labels(seen, tmp_path):
    """With the cache and without; one calculator in one process computes them all."""
    expected = {"none": 0.0, "charges": 0.1, "tags": 100.0, "charge": 1000.0}
    plain = copper()
    plain.calc = EMT()
    for settings in (seen(), seen(cache="kept"), seen(cache="kept")):
        for name, shift in [*expected.items(), *reversed(expected.items())]:
            energy = label(states()[name], settings, tmp_path).get_potential_energy()
            assert energy == pytest.approx(plain.get_potential_energy() + shift, abs=1e-9), name


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8.0)
    atoms.pbc = True
    atoms.set_tags([0] * len(atoms))  # ase.build numbers the layers
    atoms.rattle(0.1, seed=2)
    return atoms


EMT_CACHED = ReferenceSettings(calculator="ase.calculators.emt:EMT", cache="kept")


def emt_forces(atoms: Atoms) -> np.ndarray:
    free = atoms.copy()
    free.set_constraint()
    free.calc = EMT()
    return free.get_forces()


@pytest.mark.parametrize(
    "constraint",
    [FixAtoms([0, 1]), FixCartesian([0], mask=(True, False, True)), FixBondLength(0, 1), Hookean(0, 1, k=5.0, rt=1.0)],
)
def test_labels_are_the_references_own_forces_and_energies(constraint, tmp_path):
    atoms = slab()
    atoms.set_constraint(constraint)
    made = label(atoms, EMT_CACHED, tmp_path)
    free = slab()
    free.calc = EMT()
    np.testing.assert_allclose(made.get_forces(), emt_forces(atoms), rtol=0, atol=1e-12)
    assert made.get_potential_energy() == pytest.approx(free.get_potential_energy(), abs=1e-12)
    assert len(atoms.constraints) == 1  # the caller's atoms are left alone
    np.testing.assert_array_equal(label(slab(), EMT_CACHED, tmp_path).get_forces(), made.get_forces())


class SeesConstraints(Calculator):
    """A program that would act on constraints."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        assert not self.atoms.constraints
        self.results = {"energy": 0.0, "forces": np.ones((len(self.atoms), 3))}


def use(calculator: Calculator, monkeypatch, settings: ReferenceSettings, base: Path) -> None:
    """Let a calculator of the test be the one of these settings in this process."""
    labels._cache.clear()
    monkeypatch.setattr(labels, "make_calculator", lambda *_: calculator)


def test_a_calculator_never_sees_a_constraint(monkeypatch, tmp_path):
    use(SeesConstraints(), monkeypatch, EMT_CACHED, tmp_path)
    atoms = slab()
    atoms.set_constraint(FixAtoms([0]))
    assert label(atoms, EMT_CACHED, tmp_path).get_forces().sum() == 3 * len(atoms)


def test_kept_labels_with_a_row_of_zero_forces_are_made_anew_once(tmp_path, monkeypatch):
    atoms = slab()
    label(atoms, EMT_CACHED, tmp_path)
    (path,) = tmp_path.rglob("*.extxyz")
    kept = read_structures(path)[0]
    kept.calc.results["forces"][0] = 0.0  # as an earlier version kept it for a fixed atom
    write_structures(path, [kept])
    labels._cache.clear()
    np.testing.assert_allclose(label(atoms, EMT_CACHED, tmp_path).get_forces(), emt_forces(atoms), rtol=0, atol=1e-12)
    # An atom on its own has no force: that label is made once more, then kept.
    alone = Atoms("Cu")
    for _ in range(2):
        label(alone, EMT_CACHED, tmp_path)
    monkeypatch.setattr(labels, "make_calculator", lambda *_: pytest.fail("it is kept"))
    labels._cache.clear()
    label(alone, EMT_CACHED, tmp_path)


class Changing(EMT):
    """EMT that changes the atoms it is given, before or after it has computed them."""

    def __init__(self, change, before: bool) -> None:
        super().__init__()
        self.change, self.before = change, before

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        if self.before:
            self.change(atoms)
        super().calculate(atoms, properties, system_changes)
        if not self.before:
            self.change(atoms)


def shift(atoms: Atoms) -> None:
    atoms.positions += 0.7


def move(atoms: Atoms) -> None:
    atoms.positions[0] += 0.3


def stretch(atoms: Atoms) -> None:
    atoms.set_cell(atoms.cell[:] * 1.1, scale_atoms=True)


def rename(atoms: Atoms) -> None:
    atoms.numbers[:] = 47


@pytest.mark.parametrize(
    ("change", "before", "reason"),
    [
        (Atoms.wrap, True, ""),
        (Atoms.wrap, False, ""),
        (shift, True, ""),
        (shift, False, ""),
        (move, False, ""),
        (stretch, False, ""),
        (rename, False, ""),
        (move, True, "moved the atoms"),
        (stretch, True, "a cell other than"),
        (rename, True, "elements other than"),
        (lambda atoms: atoms.set_pbc(False), False, ""),
        (lambda atoms: atoms.set_pbc(False), True, r"without its periodicity \(pbc\)"),
        (lambda atoms: atoms.info.clear(), True, ""),
        (lambda atoms: setattr(atoms, "calc", None), True, ""),
    ],
)
def test_calculators_that_change_their_atoms(change, before, reason, monkeypatch, tmp_path):
    """They get a copy; a label of a structure other than the requested one is refused."""
    settings = ReferenceSettings(calculator="ase.calculators.emt:EMT")
    use(Changing(change, before), monkeypatch, settings, tmp_path)
    atoms = slab()
    atoms.positions[:, 0] -= 3.0  # outside the cell, so that wrapping moves atoms
    asked = atoms.copy()
    if reason:
        with pytest.raises(LabelError, match=reason):
            label(atoms, settings, tmp_path)
        return
    made = label(atoms, settings, tmp_path)
    for structure in (atoms, made):
        np.testing.assert_array_equal(structure.positions, asked.positions)
        np.testing.assert_array_equal(structure.cell[:], asked.cell[:])
        np.testing.assert_array_equal(structure.numbers, asked.numbers)
    np.testing.assert_allclose(made.get_forces(), emt_forces(asked), rtol=0, atol=1e-9)
    asked.calc = EMT()
    assert made.get_potential_energy() == pytest.approx(asked.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(made.get_stress(), asked.get_stress(), rtol=0, atol=1e-9)


class Sorting(Calculator):
    """Sorts the atoms that it is given, and returns forces in the new order."""

    implemented_properties = ("energy", "forces")

    def __init__(self, by) -> None:
        super().__init__()
        self.by = by

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        atoms.arrays = atoms[np.argsort(self.by(atoms), kind="stable")].arrays
        self.results = {"energy": 0.0, "forces": emt_forces(atoms)}


@pytest.mark.parametrize("by", [lambda atoms: atoms.numbers, lambda atoms: atoms.positions[:, 0]])
def test_forces_that_may_be_in_another_order_are_refused(by, monkeypatch, tmp_path):
    settings = ReferenceSettings(calculator="ase.calculators.emt:EMT", cache="kept")
    labels._cache.clear()
    monkeypatch.setattr(labels, "make_calculator", lambda *_: Sorting(by))
    atoms = slab()
    atoms.numbers[0], atoms.positions[0, 0] = 79, atoms.positions[0, 0] + 0.1  # neither by element nor by x
    for _ in range(2):  # the second time the calculator has results of its own
        with pytest.raises(LabelError, match="sorted the atoms"):
            label(atoms, settings, tmp_path)
    with pytest.raises(LabelError, match="sorted the atoms"):
        sample(atoms, settings, SAMPLING, tmp_path)
    in_order = atoms[np.argsort(by(atoms), kind="stable")]
    made = label(in_order, settings, tmp_path)
    np.testing.assert_allclose(made.get_forces(), emt_forces(in_order), rtol=0, atol=1e-9)


class Told(Calculator):
    """Its energy is the sum of the numbers in info."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": float(sum(atoms.info.values())), "forces": np.ones((len(atoms), 3))}


@pytest.mark.parametrize("cache", [None, "kept"])
def test_a_calculator_reads_of_info_what_the_settings_name(cache, monkeypatch, tmp_path):
    """Its labels depend on nothing that their names in the cache don't: so a kept one is never that of another."""
    settings = ReferenceSettings(calculator="ase.calculators.emt:EMT", cache=cache, info=("charge", "field"))
    labels._cache.clear()
    monkeypatch.setattr(labels, "make_calculator", lambda *_: Told())
    atoms = slab()
    for field, step in ((10, 100), (20, 100), (20, 200), (10, 300)):
        atoms.info = {"charge": 1, "field": field, "step": step}
        made = label(atoms, settings, tmp_path)
        assert made.get_potential_energy() == 1 + field
        assert made.info == atoms.info


@pytest.mark.parametrize("name", ["step", "temperature", "replica", "energy", "REF_forces", "pbc"])
def test_info_under_a_name_that_frames_of_a_run_have_is_refused(name):
    """A run writes its own values there."""
    with pytest.raises(ValueError, match=f"reference.info names '{name}'"):
        ReferenceSettings(calculator="ase.calculators.emt:EMT", info=("charge", name))


def test_an_array_of_one_number_has_the_hash_of_that_number_as_a_file_gives_it_back(tmp_path):
    atoms = copper()
    atoms.info["charge"] = np.array([1.5])
    write_structures(tmp_path / "a.extxyz", [atoms])
    assert state_hash(read_structures(tmp_path / "a.extxyz")[0], INFO) == state_hash(atoms, INFO)


def test_a_molecule_may_get_a_cell(monkeypatch, tmp_path):
    """As calculators with plane waves do it."""
    settings = ReferenceSettings(calculator="ase.calculators.emt:EMT")
    use(Changing(lambda atoms: atoms.center(vacuum=5.0), before=True), monkeypatch, settings, tmp_path)
    atoms = molecule("H2O")
    np.testing.assert_allclose(label(atoms, settings, tmp_path).get_forces(), emt_forces(atoms), rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------- reference MD

SAMPLING = SamplingSettings(temperature=300.0, frames=2, stride=5, equilibration=5, trajectories=1)


def test_reference_md_holds_fixed_atoms_and_labels_without(tmp_path):
    atoms = slab()
    atoms.set_constraint(FixAtoms([0, 5]))
    for frame in sample(atoms, EMT_CACHED, SAMPLING, tmp_path):
        moved = np.linalg.norm(frame.positions - atoms.positions, axis=1)
        assert set(np.flatnonzero(moved == 0.0)) == {0, 5}
        assert not frame.constraints
        np.testing.assert_allclose(frame.get_forces(), emt_forces(frame), rtol=0, atol=1e-9)


def test_reference_md_moves_with_the_masses_of_the_start_and_keeps_its_state(tmp_path):
    light, heavy = copper(), copper()
    heavy.set_masses([1e9] * 4)
    heavy.info["charge"] = 1
    moved = {}
    for name, atoms in (("light", light), ("heavy", heavy)):
        frame = sample(atoms, EMT_CACHED, SAMPLING, tmp_path)[-1]
        moved[name] = np.abs(frame.positions - atoms.positions).max()
    assert moved["heavy"] < 1e-3 * moved["light"]
    assert frame.info["charge"] == 1
    assert (frame.get_masses() == 1e9).all()


def test_reference_md_with_another_constraint_is_refused(tmp_path):
    atoms = slab()
    atoms.set_constraint(FixBondLength(0, 1))
    with pytest.raises(SettingsError, match=r"FixBondLengths?, but only FixAtoms"):
        sample(atoms, EMT_CACHED, SAMPLING, tmp_path)


def test_reference_md_needs_an_atom_that_moves(tmp_path):
    atoms = slab()
    atoms.set_constraint(FixAtoms(range(len(atoms))))
    with pytest.raises(SettingsError, match="all atoms are fixed"):
        sample(atoms, EMT_CACHED, SAMPLING, tmp_path)


def test_a_calculator_cannot_move_the_atoms_of_reference_md(monkeypatch, tmp_path):
    settings = ReferenceSettings(calculator="ase.calculators.emt:EMT")
    expected = sample(slab(), settings, SAMPLING, tmp_path)
    use(Changing(shift, before=False), monkeypatch, settings, tmp_path)
    for frame, right in zip(sample(slab(), settings, SAMPLING, tmp_path), expected, strict=True):
        np.testing.assert_allclose(frame.positions, right.positions, rtol=0, atol=1e-9)


def test_fixed_atoms_survive_a_file_that_ase_reads(tmp_path):
    atoms = slab()
    atoms.set_constraint(FixAtoms([0, 5]))
    write_structures(tmp_path / "a.extxyz", [atoms])
    for back in (read(tmp_path / "a.extxyz"), read_structures(tmp_path / "a.extxyz")[0]):
        (constraint,) = back.constraints
        assert set(constraint.index) == {0, 5}


def test_fixed_atoms_counted_from_the_end_stay_fixed_in_files(tmp_path):
    atoms = slab()
    atoms.set_constraint([FixAtoms([-1]), FixAtoms([0, -2])])
    expected = [0, len(atoms) - 2, len(atoms) - 1]
    write(tmp_path / "a.traj", atoms)  # keeps negative indices
    back = read_structures(tmp_path / "a.traj")[0]
    write_structures(tmp_path / "a.extxyz", [back])
    for found in (atoms, back, read_structures(tmp_path / "a.extxyz")[0]):
        assert fixed_atoms(found).tolist() == expected


def test_fixed_atoms_that_are_not_there_are_named(tmp_path):
    atoms = slab()
    atoms.set_constraint(FixAtoms([1, 100]))
    for work in (fixed_atoms, lambda atoms: write_structures(tmp_path / "a.extxyz", [atoms])):
        with pytest.raises(DataError, match=f"FixAtoms fixes atom 100, but there are only {len(atoms)} atoms"):
            work(atoms)


# ---------------------------------------------------------------------------------------------- start structures


def test_every_start_structure_needs_atoms_apart():
    """Displaced copies of another one would cost a label each."""
    second = copper()
    second.positions[3] = second.positions[1]
    with pytest.raises(SettingsError, match=r"structure 1, .*atoms 1 \(Cu\) and 3 \(Cu\).*at the same place"):
        check_start([copper(), second], run_settings())


def test_a_test_set_from_a_start_whose_atoms_are_all_fixed_is_refused_before_the_run(tmp_path):
    atoms = copper()
    atoms.set_constraint(FixAtoms(range(4)))
    write_structures(tmp_path / "start.extxyz", [atoms])
    with pytest.raises(SettingsError, match=r"start\.extxyz.*all atoms are fixed"):
        verify(run_settings().model_copy(update={"test": TestSettings(sampling=SAMPLING)}), tmp_path)
    with pytest.raises(SettingsError, match=r"start\.extxyz.*all atoms are fixed"):
        verify(run_settings(), tmp_path)


def test_perturbed_copies_keep_the_state_and_lose_everything_else():
    source = states()["moments"]
    source.set_masses([64.9] * 4)
    source.info |= {"charge": 1, "name": "mine"}
    source.set_constraint(FixAtoms([0]))
    source.calc = EMT()
    settings = StartSettings(file="start.extxyz", count=3, displacement=0.1, strain=0.05)
    for copy in perturb([source], settings, np.random.default_rng(0), INFO):
        assert state_hash(copy, INFO) == state_hash(source, INFO)
        assert copy.info == {"charge": 1}
        assert not copy.constraints
        assert copy.calc is None
        assert np.abs(copy.positions - source.positions).max() > 1e-3
        assert copy.positions[0] @ copy.positions[0] > 0.0  # the fixed atom has moved, too


def run_settings(**start) -> RunSettings:
    return RunSettings.model_validate(
        {
            "run_dir": "run",
            "start": {"file": "start.extxyz"} | start,
            "reference": {"calculator": "ase.calculators.emt:EMT"},
        }
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("charges", r"frames 0 and 1 .* a sum of initial charges of 0 and 0.1 e"),
        ("moments", "different initial magnetic moments"),
        ("non-collinear", "different initial magnetic moments"),
        ("charge", "charge = not given and 1"),
        ("spin", "spin = not given and 1"),
    ],
)
def test_one_composition_in_two_states_is_refused_unless_told(name, message):
    pair = [states()["none"], states()[name]]
    with pytest.raises(SettingsError, match=message):
        check_states(pair, run_settings())
    check_states(pair, run_settings(mixed_states=True))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"frame 0: info\['charge'\] is nan"),
        (1 + 2j, r"frame 0: info\['charge'\] = \(1\+2j\) would be another value"),
        ("a\nb", r"frame 0: .*line break"),
    ],
)
def test_info_that_a_file_cannot_keep_is_refused(value, message):
    """Workers read structures from files."""
    atoms = copper()
    atoms.info["charge"] = value
    with pytest.raises(SettingsError, match=message):
        check_states([atoms], run_settings())


@pytest.mark.parametrize(
    "value",
    [
        *(1, -1.5, True, np.bool_(False), np.float32(0.1), 1e-300, None),
        *("+1", "12", "", "a b", 'q"\\'),
        *([1, 2], (0.1, 0.2), ["a", "b"], [[1.0, 0.5], [0.1, 2.0]], {"a": [1, "x"]}),
        *(np.array([1.5]), np.arange(4), np.eye(3), np.zeros((2, 3, 3))),
    ],
)
def test_info_that_a_file_keeps_passes_and_comes_back(value, tmp_path):
    atoms = copper()
    atoms.info["charge"] = value
    check_states([atoms], run_settings())
    write_structures(tmp_path / "a.extxyz", [atoms])
    assert state_hash(read_structures(tmp_path / "a.extxyz")[0], INFO) == state_hash(atoms, INFO)


def test_states_that_a_model_need_not_tell_apart_pass():
    made = states()
    neutral = copper()
    neutral.info["charge"] = 0
    check_states([made["none"], neutral], run_settings())
    check_states([made["none"], made["tags"], made["masses"]], run_settings())
    other = Atoms("Cu3", made["none"].positions[:3])
    other.info["charge"] = 1
    check_states([made["none"], other], run_settings())  # another composition
    swapped = made["moments"].copy()
    swapped.set_initial_magnetic_moments([-1.0, 1.0, -1.0, 1.0])
    assert not electrons_differ(made["moments"], swapped, INFO)  # the same moments on other atoms
    rounded = made["moments"].copy()
    rounded.set_initial_magnetic_moments([0.97, -1.02, 1.01, -0.98])
    rounded.set_initial_charges([0.004, -0.001, 0.0, 0.002])
    assert not electrons_differ(made["moments"], rounded, INFO)  # as an earlier calculation left them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.set_masses([0.0, 1.0, 1.0, 1.0]), r"frame 0: the mass of atom 0 \(from 0\) is 0 amu"),
        (lambda a: a.set_initial_magnetic_moments([np.nan] * 4), "NaN or infinity in the initial magnetic moments"),
        (lambda a: a.set_constraint(FixBondLength(0, 1)), "FixBondLengths?, but only FixAtoms is supported"),
    ],
)
def test_start_structures_that_cannot_be_labelled_are_refused(change, message):
    atoms = copper()
    change(atoms)
    with pytest.raises(SettingsError, match=message):
        check_states([atoms], run_settings())


def test_bare_shares_nothing_with_its_source():
    source = states()["masses"]
    copy = bare(source, INFO)
    copy.arrays["masses"][:] = 1.0
    assert (source.get_masses() == 64.9).all()


# ---------------------------------------------------------------------------------------------- ready-made references


def water(**info) -> Atoms:
    atoms = molecule("H2O")
    atoms.info |= info
    return atoms


def test_tblite_reads_charge_and_multiplicity_of_the_structure(tmp_path):
    pytest.importorskip("tblite")

    def energy(atoms: Atoms, **arguments) -> float:
        settings = ReferenceSettings(calculator="tblite", arguments=arguments)
        return label(atoms, settings, tmp_path).get_potential_energy()

    neutral, cation = energy(water()), energy(water(), charge=1, multiplicity=2)
    assert cation - neutral > 5.0  # the ionisation energy of water is 12.6 eV
    assert energy(water(charge=1, multiplicity=2)) == pytest.approx(cation, abs=1e-9)
    charged = water()
    charged.set_initial_charges([1.0, 0.0, 0.0])
    charged.set_initial_magnetic_moments([1.0, 0.0, 0.0])
    assert energy(charged) == pytest.approx(cation, abs=1e-9)
    with pytest.raises(LabelError, match=r"two values for the charge: reference\.arguments\.charge is 0, but its info"):
        energy(water(charge=1), charge=0)
    with pytest.raises(LabelError, match="spin = 1 in its info, which means"):
        energy(water(charge=1, spin=1))
    with pytest.raises(LabelError, match="is not a number"):
        energy(water(charge="plus"))


def test_a_sum_of_rounded_charges_is_a_whole_number():
    """tblite gives invalid results for 0.98 e: 77 eV above the cation."""
    for charges, whole in (([0.5, 0.24, 0.24], 1.0), ([-0.8, 0.4, 0.41], 0.0), ([-1.5, 0.25, 0.26], -1.0)):
        atoms = water()
        atoms.set_initial_charges(charges)
        assert total_charge(atoms, None) == whole
        assert total_charge(atoms, whole) == whole
    atoms.set_initial_charges([0.5, 0.0, 0.0])
    for fraction, argument in ((atoms, None), (water(charge=0.5), None), (water(), 0.5)):
        assert total_charge(fraction, argument, whole=False) == 0.5
        with pytest.raises(LabelError, match=r"charge of 0\.5 e, but the reference needs a whole number"):
            total_charge(fraction, argument)


@pytest.mark.parametrize("multiplicity", [0, -3, 2.5])
def test_multiplicities_that_are_none(multiplicity):
    for atoms, argument in ((water(multiplicity=multiplicity), None), (water(), multiplicity)):
        with pytest.raises(LabelError, match=f"multiplicity of {multiplicity:g}; it is 2 S"):
            spin_multiplicity(atoms, argument)


def test_non_collinear_moments_are_no_multiplicity():
    """Their components must not be added up."""
    atoms = water()
    atoms.set_initial_magnetic_moments([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert spin_multiplicity(atoms, None) == 3  # along z
    atoms.set_initial_magnetic_moments([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    with pytest.raises(LabelError, match="non-collinear"):
        spin_multiplicity(atoms, None)
