"""What `gpu.py` runs in processes of their own: checks of a device against the CPU, and one size of its table.

python tests/benchmarks/gpu_checks.py PART DEVICE FOLDER [SIZE]. Records are lines of JSON in FOLDER/PART.jsonl.

Where the device is the CPU, too (a rehearsal), its side is computed by plain torch, as on a GPU, without the operators.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and LAMMPS start

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import accuracy
import lammps_runs
import numpy as np
import systems
import torch
from ase import Atoms

import ubmd
import ubmd.operators
from ubmd.potentials.fitting import export_raw
from ubmd.potentials.gmnn import model
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.trainer import train
from ubmd.potentials.raw import read_raw
from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings

Array = np.ndarray
EXACT = 1e-8
"""double precision, largest difference over root mean square: only the order of sums differs"""
ROUGH = {"energy": 1e-4, "forces": 5e-4, "stress": 5e-4, "pressure": 5e-4}
"""mixed precision: float32 has 7 digits, and the order of sums differs; what is not named here: UNCERTAIN"""
UNCERTAIN = 1e-2
STEPS = 3  # of LAMMPS, on both devices from the same start: the bias is on, and differences have not grown yet
EPOCHS = 4
PRECISIONS = ("double", "mixed")
TRAINED = {"float64": 1e-7, "float32": 1e-3}
"""allowed of trainings: Adam divides by the size of gradients, so that rounding grows from step to step"""


@dataclass(frozen=True)
class Record:
    """One quantity of one case, on the device and on the CPU."""

    part: str
    case: str
    precision: str
    quantity: str
    deviation: float
    allowed: float

    @property
    def met(self) -> bool:
        return self.deviation <= self.allowed  # not of NaN

    def line(self) -> str:
        verdict = "" if self.met else "  EXCEEDED"
        return (
            f"{self.part:9} {self.case:24} {self.precision:7} {self.quantity:24} {self.deviation:9.1e} "
            f"(allowed {self.allowed:.0e}){verdict}"
        )


def deviation(found: Array, expected: Array) -> float:
    """Largest difference over the root mean square of what is expected; infinite if the shapes differ."""
    found, expected = np.atleast_1d(found), np.atleast_1d(expected)
    if found.shape != expected.shape:
        return float("inf")
    size = float(np.sqrt(np.mean(expected**2))) or 1.0
    return float(np.abs(found - expected).max(initial=0.0)) / size


def compared(
    part: str, case: str, precision: str, found: Mapping[str, Array], expected: Mapping[str, Array]
) -> Iterator[Record]:
    for quantity, value in expected.items():
        allowed = EXACT if precision in ("double", "float64") else ROUGH.get(quantity, UNCERTAIN)
        yield Record(part, case, precision, quantity, deviation(found[quantity], value), allowed)


# ------------------------------------------------------------------------------------------------- model files


class Springs(torch.nn.Module):
    """A module of another program: smooth pair energies with a table of numbers, and features of them."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = ["Mg", "O"]
        self.cutoff = systems.CUTOFF
        self.layers = 1
        self.register_buffer("table", torch.linspace(1.0, 2.0, 8, dtype=torch.float64))

    def forward(
        self, species: torch.Tensor, edge_index: torch.Tensor, edge_vector: torch.Tensor, n_local: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(E [n_local] in eV, phi [n_local, 8])."""
        r = edge_vector.double().square().sum(1).sqrt()
        inside = (1.0 - (r / self.cutoff).square()).clamp(min=0.0).square()
        each = inside.unsqueeze(1) * torch.sin(r.unsqueeze(1) * self.table)
        each = each * (1.0 + species.index_select(0, edge_index[1]).unsqueeze(1))
        phi = torch.zeros(n_local, 8, dtype=each.dtype, device=each.device).index_add(0, edge_index[0], each)
        return 1e-3 * phi.sum(1), phi


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    device: str
    operators: bool
    folder: Path
    """for its files"""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around everything that makes networks or model files."""
        kept = ubmd.operators.available
        if not self.operators:
            ubmd.operators.available = model.available = lambda: False
        try:
            yield
        finally:
            ubmd.operators.available = model.available = kept


def sides(device: str, folder: Path) -> tuple[Side, Side]:
    """The device, and the CPU that it is compared with."""
    found = Side(device, device != "cpu", folder / "device"), Side("cpu", True, folder / "cpu")
    for side in found:
        side.folder.mkdir(exist_ok=True)
    return found


def labelled_cells(count: int) -> list[Atoms]:
    return systems.rattled(systems.magnesium_oxide().repeat(2), count, systems.ENERGY_SCALE, seed=1)


CASES = {f"{name} posterior": name for name in systems.SYSTEMS} | {
    f"mgo {kind}": "mgo" for kind in ("last-layer", "distance", "ensemble", "own module")
}
"""model file -> its system"""


def write_models(side: Side) -> dict[str, Path]:
    """The files of `CASES`: networks of every kind, and a module of another program; fitted on the side's device."""
    found = {}
    cells = labelled_cells(9)
    with side.active():
        for name in systems.SYSTEMS:
            systems.write_model(side.folder, name, "light128")
            found[f"{name} posterior"] = systems.model_file(side.folder, name, "light128")
        for kind in ("last-layer", "distance", "ensemble"):
            settings = UncertaintySettings(kind=kind, projections=128, alpha=0.3)
            found[f"mgo {kind}"] = path = side.folder / f"{kind}.pt"
            export_model(networks(settings.networks), cells[:6], cells[6:], settings, path, device=side.device)
    found["mgo own module"] = own_module(side)
    return found


def networks(count: int) -> list[GaussianMomentNetwork]:
    elements, settings = list(systems.SYSTEMS["mgo"].elements), ModelSettings(cutoff=systems.CUTOFF)
    return [GaussianMomentNetwork(elements, settings, seed) for seed in range(count)]


def own_module(side: Side) -> Path:
    """A model file of `Springs`."""
    torch.jit.script(Springs()).save(str(side.folder / "springs.raw"))
    raw, cells = read_raw(side.folder / "springs.raw"), labelled_cells(9)
    path, settings = side.folder / "springs.pt", UncertaintySettings(alpha=0.3)
    export_raw(raw, "springs", ModelSettings(), cells[:6], cells[6:], settings, path, device=side.device)
    return path


# ------------------------------------------------------------------------------------------------- Python


def python_checks(device: str, folder: Path) -> Iterator[Record]:
    """Predictions and the gradients of both uncertainties; mixed precision against double, as in `run.py`."""
    both = sides(device, folder)
    files = [write_models(side) for side in both]
    for case, system in CASES.items():
        atoms = systems.rattled(systems.SYSTEMS[system].make(), 1, systems.ENERGY_SCALE, seed=5)[0]
        for precision in PRECISIONS:
            found, expected = (
                quantities(ubmd.Model(own[case], precision, side.device), atoms)
                for own, side in zip(files, both, strict=True)
            )
            yield from compared("python", case, precision, found, expected)
    targets = {"force": 1e-4, "u": 0.01, "ui": 0.01, "bias": 0.02}
    for name in ("mgo", "alanine"):
        frames = systems.rattled(systems.SYSTEMS[name].make(), 3, systems.ENERGY_SCALE, seed=6)
        errors = accuracy.mixed_against_double(files[0][f"{name} posterior"], frames, device)
        for quantity, target in targets.items():
            yield Record("python", f"{name} over double", "mixed", quantity, errors[quantity], target)


def quantities(network: ubmd.Model, atoms: Atoms) -> dict[str, Array]:
    """All that a model says of a structure: energies eV, forces eV/Å, uncertainties and their derivatives."""
    prediction, slopes, strain = network.predict_with_gradient(atoms)
    _, of_atoms, strain_of_atoms = network.atomic_uncertainty_gradient(atoms)
    found = {
        "energy": np.array(prediction.energy),
        "forces": prediction.forces,
        "u": np.array(prediction.u),
        "u_i": prediction.atomic_u,
        "bias forces": slopes,
        "bias forces of u_i": of_atoms,
    }
    if prediction.stress is None or strain is None:
        return found
    return {**found, "stress": prediction.stress, "bias stress": strain, "bias stress of u_i": strain_of_atoms}


# ------------------------------------------------------------------------------------------------- LAMMPS


SHAKE = "displace_atoms all random 0.1 0.1 0.1 1"  # Å
BIASES = {"biased": "force 0.25 stress 0.3", "atomic bias": "uncertainty atomic force 0.25 stress 0.3", "plain": ""}


def lammps_checks(device: str, folder: Path) -> Iterator[Record]:
    """A few steps from the same start: energies, forces, pressure, and all that fix ubmd gives."""
    for name in systems.SYSTEMS:
        systems.write_data(folder, name)
    both = sides(device, folder)
    files = [write_models(side) for side in both]
    more = [("mgo posterior", "atomic bias"), ("mgo ensemble", "atomic bias"), ("mgo ensemble", "plain")]
    for case, bias in [*((case, "biased") for case in CASES), *more]:
        for precision in PRECISIONS:
            found, expected = (
                after_steps(lammps_case(folder, CASES[case], own[case], side.device, precision, BIASES[bias]))
                for own, side in zip(files, both, strict=True)
            )
            yield from compared("lammps", f"{case}, {bias}", precision, found, expected)


def lammps_case(
    folder: Path,
    system: str,
    file: Path,
    device: str,
    precision: str,
    bias: str,
    cells: tuple[int, int, int] = (3, 3, 3),
) -> lammps_runs.Case:
    """A system in LAMMPS; MgO is replicated."""
    periodic = system != "alanine"
    count = 8 * int(np.prod(cells)) if system == "mgo" else len(systems.SYSTEMS[system].make())
    # shaken: in an ideal crystal forces are zero, and with them the spread of an ensemble's
    repeat = f"\nreplicate {cells[0]} {cells[1]} {cells[2]}\n{SHAKE}" if system == "mgo" else ""
    options = f"precision {precision}" + ("" if device == "cpu" else f" device {device}")
    style = f"pair_style ubmd {options}\npair_coeff * * {file} {' '.join(systems.SYSTEMS[system].elements)}"
    bias = bias if periodic else bias.replace(" stress 0.3", "")
    box = f"read_data {folder / f'{system}.data'}{repeat}"
    return lammps_runs.Case(system, count, box, style, bias, tether=2.0, periodic=periodic)


def after_steps(case: lammps_runs.Case) -> dict[str, Array]:
    """The state after `STEPS` steps, atoms in the order of their numbers."""
    instance = lammps_runs.Instance(case)
    lammps = instance.lammps
    instance.first()
    instance.step(STEPS)
    pressure = [lammps.get_thermo(f"p{axes}") for axes in ("xx", "yy", "zz", "xy", "xz", "yz")]
    order = np.argsort(lammps.numpy.extract_atom("id")[: case.n_atoms])
    found = {
        "energy": np.array(lammps.get_thermo("pe")),
        "forces": np.array(lammps.numpy.extract_atom("f"))[: case.n_atoms][order],
        "pressure": np.array(pressure),
    }
    if case.bias:
        each = np.array(lammps.numpy.extract_fix("b", 1, 2))[: case.n_atoms][order]
        found |= {name: np.array(lammps.extract_fix("b", 0, 1, k)) for k, name in enumerate(("u", "largest u_i"))}
        found |= {
            "u_i": each[:, 0],
            "bias forces": each[:, 1:4],
            "bias energy": np.array(lammps.extract_fix("b", 0, 0)),
        }
    instance.close()
    return found


# ------------------------------------------------------------------------------------------------- training


def training_checks(device: str, folder: Path) -> Iterator[Record]:
    """A few epochs from the same weights on both devices, then the models that are calibrated there."""
    for precision, allowed in TRAINED.items():
        (losses, found), (expected_losses, expected) = (trained(side, precision) for side in sides(device, folder))
        yield Record("training", "losses of epochs", precision, "loss", deviation(losses, expected_losses), allowed)
        for quantity, value in expected.items():
            away = deviation(found[quantity], value)
            yield Record("training", "trained and calibrated", precision, quantity, away, allowed)


def trained(side: Side, precision: str) -> tuple[Array, dict[str, Array]]:
    """Losses of all epochs, and what the model says in double precision."""
    cells, folder = labelled_cells(12), side.folder / precision
    options = TrainingSettings(epochs=EPOCHS, batch_size=4, precision=precision, threads=1, device=side.device)
    with side.active():
        begin = time.perf_counter()
        result = train(ModelSettings(cutoff=systems.CUTOFF), options, cells[:8], cells[8:], folder, seed=0)
        seconds = (time.perf_counter() - begin) / EPOCHS
        print(f"12 cells of 64 atoms, {precision}, {side.device}: {seconds:.2f} s per epoch", flush=True)
        settings = UncertaintySettings(projections=128, alpha=0.3)
        export_model(result.model, cells[:8], cells[8:], settings, folder / "model.pt", device=side.device)
    losses = np.array([row["loss"] for row in result.history], dtype=float)
    return losses, quantities(ubmd.Model(folder / "model.pt", "double"), cells[0])


# ------------------------------------------------------------------------------------------------- one size


def one_size(device: str, folder: Path, text: str) -> dict[str, float]:
    """Time per atom and step, and memory per atom, of MgO with nx ny nz cells; biased ones have the loop's defaults."""
    request = json.loads(text)
    bias, every = ("force 0.25", 4) if request["biased"] else ("", 1)
    systems.write_data(folder, "mgo")
    file = systems.model_file(folder, "mgo", "light128")
    case = lammps_case(folder, "mgo", file, device, "mixed", bias, tuple(request["cells"]))
    case = lammps_runs.Case(**{**asdict(case), "every": every})
    memory = memory_of(device)
    before = memory()
    begin = time.perf_counter()
    instance = lammps_runs.Instance(case)
    instance.first()
    setup = time.perf_counter() - begin
    instance.wall_step(case.warm_up)
    trial = instance.wall_step(every) * every
    steps = every * max(1, min(request["most_steps"], round(1.0 / trial)))
    seconds = min(instance.wall_step(steps) for _ in range(2))
    result = {"n_atoms": case.n_atoms, "seconds": seconds, "setup": setup, "bytes": memory() - before}
    instance.close()
    return result


def memory_of(device: str) -> Callable[[], int]:
    """Largest memory so far: of torch on the GPU, or of this process."""
    if device == "cpu":
        return lammps_runs.peak_bytes
    torch.cuda.init()
    place = torch.device("cuda:0" if device == "cuda" else device)
    return lambda: torch.cuda.max_memory_allocated(place)


PARTS = {"python": python_checks, "lammps": lammps_checks, "training": training_checks}


def main(part: str, device: str, folder: Path, *size: str) -> None:
    if part == "size":
        print(json.dumps(one_size(device, folder, *size)), flush=True)
        return
    with (folder / f"{part}.jsonl").open("w") as file:
        for record in PARTS[part](device, folder):
            print(record.line(), flush=True)
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
