"""Goedecker-Teter-Hutter pseudopotentials for Quantum ESPRESSO, from the file GTH_POTENTIALS of CP2K's data.

Both programs use the same formulas (S. Goedecker, M. Teter, J. Hutter, Phys. Rev. B 54, 1703 (1996); C. Hartwigsen,
S. Goedecker, J. Hutter, Phys. Rev. B 58, 3641 (1998); M. Krack, Theor. Chem. Acc. 114, 145 (2005)), so only the order
of the numbers in the file changes. pw.x reads a file whose name ends in '.gth' in the layout of ABINIT's pspcod 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ase.data import atomic_numbers

from ubmd.errors import SettingsError

PREFIX = "gth:"
"""Marks a pseudopotential that is to be converted: 'gth:PBE', 'gth:PADE-q4'."""

FOLDERS = (Path("/usr/share/cp2k"), Path("/usr/local/share/cp2k"), Path("/opt/cp2k/data"))
"""Where CP2K's data are looked for."""

PSPXC = {"PADE": 7, "LDA": 7, "PBE": 11, "BLYP": 18}
"""Number of the functional in the converted file; CP2K's Padé form is a fit to Perdew and Wang's LDA (pw.x: 'PW')."""


@dataclass(frozen=True)
class Channel:
    """Projectors of one angular momentum: radius (Bohr) and coefficients, the upper triangle row by row (Hartree)."""

    radius: float
    rows: list[list[float]]


@dataclass(frozen=True)
class Pseudopotential:
    """One entry of GTH_POTENTIALS; lengths in Bohr, energies in Hartree."""

    element: str
    name: str
    """as in the file, e.g. 'GTH-PBE-q4'"""
    functional: str
    valence: int
    radius: float
    """of the local part"""
    local: list[float]
    channels: list[Channel]
    """l = 0, 1, ..."""

    def text(self) -> str:
        """The file for pw.x (its name must end in '.gth')."""
        lmax = len(self.channels) - 1
        # lloc above lmax: the local part is not one of the channels
        lines = [
            f"{self.element} {self.name}",
            f"{atomic_numbers[self.element]} {self.valence} 0   znucl zion pspdat",
            f"10 {PSPXC[self.functional]} {lmax} {lmax + 1} 2001 0   pspcod pspxc lmax lloc mmax r2well",
            f"{self.radius} {_joined([len(self.local), *self.local])}   rloc nloc c1 ...",
            f"{len(self.channels)}   nnonloc",
        ]
        for momentum, channel in enumerate(self.channels):
            count = len(channel.rows)
            first, *others = channel.rows or [[]]
            lines.append(f"{channel.radius} {_joined([count, *first])}   r_l n_l h_11 ... of l = {momentum}")
            lines += [_joined(row) for row in others]
            if momentum > 0:  # spin-orbit coefficients, which CP2K's potentials lack
                lines += [_joined([0.0] * (count - k)) for k in range(count)]
        return "\n".join(lines) + "\n"


def read_gth(path: Path, element: str, name: str) -> Pseudopotential:
    """The entry of an element; ``name`` is the functional, perhaps with the valence: 'PBE' or 'PADE-q4'.

    Raises:
        SettingsError: the file has no such entry, or pw.x does not know the functional.
    """
    functional, _, valence = name.partition("-q")
    if functional not in PSPXC:
        raise SettingsError(
            f"reference.arguments.pseudopotentials: 'gth:{name}' of {element} is unknown to pw.x; its GTH functionals "
            f"are {', '.join(PSPXC)}, perhaps with the number of valence electrons, e.g. 'gth:PBE-q4'."
        )
    wanted = f"GTH-{functional}-q{valence}" if valence else f"GTH-{functional}"
    words = _entry(path, element, wanted)
    try:
        return _parse(element, functional, words)
    except (ValueError, StopIteration):
        raise SettingsError(f"The entry {wanted} of {element} in {path} is damaged; reinstall cp2k-data.") from None


def find_potentials(file: str | Path | None, base: Path) -> Path:
    """GTH_POTENTIALS: the given file (relative to ``base``), else that of CP2K's data on this machine.

    Raises:
        SettingsError: it is not found.
    """
    if file is not None:
        path = (base / Path(file).expanduser()).resolve()
        if not path.is_file():
            raise SettingsError(f"reference.arguments.gth_file: there is no file {path}.")
        return path
    for folder in FOLDERS:
        if (folder / "GTH_POTENTIALS").is_file():
            return folder / "GTH_POTENTIALS"
    raise SettingsError(
        "GTH pseudopotentials are taken from CP2K's file GTH_POTENTIALS, which is not on this machine: install it "
        "(Debian: apt-get install cp2k-data) or name it in reference.arguments.gth_file."
    )


def _entry(path: Path, element: str, wanted: str) -> list[str]:
    """Words of an entry, from its full name on."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        parts = line.partition("#")[0].split()
        if not parts:
            continue
        if parts[0] in atomic_numbers:
            if words:
                break
            if parts[0] == element and wanted in parts[1:]:
                words = [parts[1]]
        elif words:
            words += parts
    if not words:
        raise SettingsError(f"reference.arguments.pseudopotentials: {path} has no {wanted} for {element}.")
    return words


def _parse(element: str, functional: str, words: list[str]) -> Pseudopotential:
    name, electrons = words[0], []
    # The electrons by angular momentum end where the first radius, with its decimal point, stands.
    rest = iter(words[1:])
    for word in rest:
        if "." in word:
            radius = float(word)
            break
        electrons.append(int(word))
    else:
        raise ValueError
    local = [float(next(rest)) for _ in range(int(next(rest)))]
    channels = [_channel(rest) for _ in range(int(next(rest)))]
    while channels and not channels[-1].rows:
        channels.pop()  # without projectors it does nothing
    return Pseudopotential(element, name, functional, sum(electrons), radius, local, channels)


def _channel(words: Iterator[str]) -> Channel:
    radius, count = float(next(words)), int(next(words))
    return Channel(radius, [[float(next(words)) for _ in range(k, count)] for k in range(count)])


def _joined(numbers: list[float]) -> str:
    return " ".join(str(number) for number in numbers)
