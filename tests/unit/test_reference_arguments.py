"""Misspelt arguments of a reference are refused, real ones never, others are named; so are those of Calculator."""

import itertools
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.emt import EMT
from small_model import ELEMENTS, SETTINGS, labelled

from ubmd import Calculator
from ubmd.errors import ArgumentError, SettingsError
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.references import make_calculator
from ubmd.references.arguments import check_arguments
from ubmd.references.calculators import READY_MADE, unrecognised_arguments
from ubmd.settings import ReferenceSettings, UncertaintySettings
from ubmd.spelling import distance, nearest


def brute_force_distance(a: str, b: str, most: int) -> int:
    """The fewest edits by trying all of them, up to ``most``."""
    letters = sorted(set(a + b))
    reached = {a}
    for edits in range(most + 1):
        if b in reached:
            return edits
        following = set()
        for word in reached:
            for k in range(len(word) + 1):
                following |= {word[:k] + c + word[k:] for c in letters}
                following |= {word[:k] + c + word[k + 1 :] for c in ["", *letters] if k < len(word)}
                if k + 1 < len(word):
                    following.add(word[:k] + word[k + 1] + word[k] + word[k + 2 :])
        reached = following
    return most + 1


def test_distance_equals_the_fewest_edits_found_by_trying_all() -> None:
    rng = random.Random(4)
    words = ["".join(rng.choices("abc", k=rng.randint(0, 4))) for _ in range(16)]
    for a, b in itertools.product(words, words):
        found, true = distance(a, b), brute_force_distance(a, b, 2)
        # Letters that were swapped are not edited again, so that distance may be larger where both are above one.
        assert found == true if true <= 1 else found >= true, (a, b)
    assert distance("fixed_cutof", "fixed_cutoff") == distance("mehtod", "method") == 1
    assert distance("kitten", "sitting") == 3


def test_short_names_are_taken_for_others_less_readily() -> None:
    assert nearest("r_c", ["rc", "sigma"]) == "rc"
    assert nearest("rcut", ["rc", "sigma"]) == "rc"
    assert nearest("xyz", ["rc", "xc"]) is None
    assert nearest("b", ["a"]) is None
    assert nearest("istart", ["restart"]) == "restart"
    assert nearest("istart", ["restart"], strict=["restart"]) is None


def reference(calculator: str, **arguments: object) -> ReferenceSettings:
    return ReferenceSettings(calculator=calculator, arguments=arguments)


@pytest.mark.parametrize(
    ("calculator", "wrong", "right"),
    [
        ("tblite.ase:TBLite", "methd", "method"),
        ("tblite", "methd", "method"),
        ("tblite", "chrage", "charge"),
        ("openmm", "pbd", "pdb"),
        ("lammps", "command", "commands"),
        ("quickff_mil53", "kspce", "kspace"),
        ("cp2k", "cuttof", "cutoff"),
        ("cp2k", "multiplicty", "multiplicity"),
        ("espresso", "input_dat", "input_data"),
        ("ase.calculators.emt:EMT", "asap_cutof", "asap_cutoff"),
        ("ase.calculators.lj:LennardJones", "simga", "sigma"),
        ("ase.calculators.lj:LennardJones", "rcut", "rc"),
        ("ase.calculators.morse:MorsePotential", "epslion", "epsilon"),
        ("ase.calculators.cp2k:CP2K", "cutof", "cutoff"),
        ("ase.calculators.espresso:Espresso", "kptss", "kpts"),
        ("ase.calculators.espresso:Espresso", "ecutwf", "ecutwfc"),
        ("ase.calculators.vasp:Vasp", "encutt", "encut"),
        ("ase.calculators.vasp:Vasp", "ENCUT", "encut"),  # Vasp writes an INCAR without it
        ("ase.calculators.siesta:Siesta", "mesh_cutof", "mesh_cutoff"),
        ("ase.calculators.tip3p:TIP3P", "widht", "width"),
        ("ase.calculators.dftb:Dftb", "slako_dri", "slako_dir"),
    ],
)
def test_misspelt_arguments_are_refused_with_the_name_that_was_meant(calculator: str, wrong: str, right: str) -> None:
    if calculator.startswith("tblite"):
        pytest.importorskip("tblite")
    with pytest.raises(SettingsError, match=rf"{wrong}.*; did you mean '{right}'\?$"):
        make_calculator(reference(calculator, **{wrong: 1}), Path())


# What users really give: none of these may be refused, whatever it resembles ('istart': Vasp's, not a 'restart').
REAL = {
    "ase.calculators.lj:LennardJones": "sigma epsilon rc ro smooth",
    "ase.calculators.vasp:Vasp": "istart encut ispin xc kpts nsw ediff lreal ismear sigma gga ivdw prec algo setups",
    "ase.calculators.dftb:Dftb": "Hamiltonian_SCC Hamiltonian_SCCTolerance Hamiltonian_MaxAngularMomentum_ kpts",
    "ase.calculators.cp2k:CP2K": "inp max_scf basis_set_file multiplicity stress_tensor print_level cutoff xc",
    "ase.calculators.espresso:Espresso": "kpts input_data pseudopotentials ecutwfc nspin kspacing koffset degauss",
    "ase.calculators.orca:ORCA": "charge mult orcasimpleinput orcablocks task",
    "ase.calculators.gaussian:Gaussian": "method basis mem nprocshared chk xc charge mult scf extra label",
    "ase.calculators.nwchem:NWChem": "theory basis xc task memory dft maxiter charge set",
    "ase.calculators.aims:Aims": "xc species_dir kpts k_grid relativistic spin sc_accuracy_rho tier",
    "ase.calculators.abinit:Abinit": "ecut xc kpts natom toldfe pps nband",
    "ase.calculators.octopus:Octopus": "Spacing BoxShape Radius FromScratch Output",
    "ase.calculators.psi4:Psi4": "method basis reference memory num_threads maxiter charge multiplicity symmetry",
    "ase.calculators.eam:EAM": "potential elements form drho dr nrho nr lattice skin cutoff",
    "ase.calculators.lammpsrun:LAMMPS": "pair_style pair_coeff units files masses specorder keep_tmp_files tmp_dir",
    "ase.calculators.castep:Castep": "cut_off_energy xc_functional kpts label",
    "tblite.ase:TBLite": "method charge multiplicity guess initial_guess max_iterations accuracy solvation",
}


@pytest.mark.parametrize("calculator", REAL)
def test_real_arguments_of_programs_are_never_refused(calculator: str) -> None:
    module, _, name = calculator.partition(":")
    kind = getattr(pytest.importorskip(module), name)
    check_arguments(kind, calculator, REAL[calculator].split())


def test_what_is_passed_on_and_not_recognised_is_named() -> None:
    assert unrecognised_arguments(reference("ase.calculators.emt:EMT", fixed_cutof=True), Path()) == ["fixed_cutof"]
    espresso = reference("ase.calculators.espresso:Espresso", ecutwfc=30.0, kpts=[2, 2, 2], my_card=1)
    assert unrecognised_arguments(espresso, Path()) == ["my_card"]
    vasp = reference("ase.calculators.vasp:Vasp", istart=0, ml_mode="run")
    assert unrecognised_arguments(vasp, Path()) == ["ml_mode"]


def test_keywords_of_tblite_go_to_its_library() -> None:
    pytest.importorskip("tblite")
    assert unrecognised_arguments(reference("tblite", charge=1, max_iterations=9, foo=3), Path()) == ["foo"]


def test_arguments_without_a_place_are_refused_with_all_names() -> None:
    with pytest.raises(SettingsError, match=r"no argument 'foo'; known arguments: rc, width\.$"):
        make_calculator(reference("ase.calculators.tip3p:TIP3P", foo=1), Path())
    # of the settings file's folder: ubmd gives it itself
    with pytest.raises(SettingsError, match=r"no argument 'base'; known arguments: atom_style, commands, data"):
        make_calculator(reference("lammps", base="x"), Path())


OWN = """
from functools import partial
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

class Renamed(EMT):
    def __init__(self, base="b", model_paths=None, **kwargs):
        if "model_path" in kwargs:  # the old name still works
            model_paths = kwargs.pop("model_path")
        self.paths = model_paths
        super().__init__(**kwargs)

def Factory(scale_factor=1.0, **kwargs):
    return EMT(**kwargs)

Partial = partial(LennardJones, sigma=2.0)

def Popping(**settings):
    settings.pop("functional", None)
    return EMT(asap_cutoff=settings["sharp"] if "sharp" in settings else False)
"""


def test_own_calculators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a class all constructors count that ``**kwargs`` reach; an old name that the source mentions is no mistake."""
    (tmp_path / "own_arguments.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    renamed = reference("own_arguments:Renamed", model_path="m", base="c", asap_cutoff=True)
    assert make_calculator(renamed, tmp_path).paths == "m"
    assert unrecognised_arguments(renamed, tmp_path) == []
    with pytest.raises(SettingsError, match=r"did you mean 'model_paths'\?"):
        make_calculator(reference("own_arguments:Renamed", modle_paths="m"), tmp_path)
    with pytest.raises(SettingsError, match=r"did you mean 'asap_cutoff'\?"):
        make_calculator(reference("own_arguments:Renamed", asap_cutof=True), tmp_path)
    with pytest.raises(SettingsError, match=r"did you mean 'scale_factor'\?"):
        make_calculator(reference("own_arguments:Factory", scalefactor=2.0), tmp_path)
    assert isinstance(make_calculator(reference("own_arguments:Factory"), tmp_path), EMT)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [("Partial", "epsilom", "epsilon"), ("Popping", "functionl", "functional"), ("Popping", "sharpp", "sharp")],
)
def test_names_behind_keywords_are_known(
    name: str, wrong: str, right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a partial those of its function; those that a function takes out of its ``**kwargs``."""
    (tmp_path / "own_arguments.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_arguments", raising=False)
    with pytest.raises(SettingsError, match=rf"{wrong}.*did you mean '{right}'\?"):
        make_calculator(reference(f"own_arguments:{name}", **{wrong: 1.0}), tmp_path)
    assert unrecognised_arguments(reference(f"own_arguments:{name}", **{right: 1.0}), tmp_path) == []


def test_names_of_ready_made_references_are_corrected() -> None:
    for name in READY_MADE:
        with pytest.raises(SettingsError, match=rf"did you mean '{name}'\?"):
            make_calculator(reference(name[:-1]), Path())


# --- ubmd.Calculator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("precison", r"did you mean 'precision'\?"),
        ("bias", r"known keywords: path, precision, bias_force, device, atoms, label, directory\."),
        ("bias_forc", r"did you mean 'bias_force'\?"),
        ("restart", "known keywords: "),  # ASE would look for a file that nothing here writes
        ("devise", r"did you mean 'device'\?"),
    ],
)
def test_calculator_refuses_keywords_that_it_does_not_know(keyword: str, hint: str, tmp_path: Path) -> None:
    for kind in (ArgumentError, TypeError, SettingsError):  # before the model is read
        with pytest.raises(kind, match=rf"ubmd.Calculator has no keyword '{keyword}'; {hint}"):
            Calculator(tmp_path / "none.pt", **{keyword: 1})
    assert "known" in str(pickle.loads(pickle.dumps(ArgumentError("known"))))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    structures = [labelled(molecule("CH3CONH2"), k) for k in range(4)]
    model = GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=3)
    export_model(model, structures[:2], structures[2:], UncertaintySettings(projections=4), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_calculator_takes_what_ase_gives_all_its_calculators(model_file: Path, tmp_path: Path) -> None:
    atoms = molecule("CH3CONH2")
    calculator = Calculator(model_file, atoms=atoms, label="x", directory=str(tmp_path))
    assert np.isfinite(atoms.get_forces()).all()
    assert atoms.calc is calculator
    before = atoms.get_potential_energy()
    with pytest.raises(ArgumentError, match="cannot change bias_force; make a new calculator"):
        calculator.set(bias_force=3.0)  # ASE would keep the number and never use it
    assert atoms.get_potential_energy() == before
