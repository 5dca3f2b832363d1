"""What a label's unit is in ubmd's: eV, eV/Å, eV/Å^3. The names of units are those of `ubmd.settings.labels`."""

from __future__ import annotations

from ase import units

from ubmd.settings.labels import Source

_ENERGIES = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
    "Ha": units.Hartree,
    "Ry": units.Rydberg,
}
_LENGTHS = {"Å": 1.0, "nm": units.nm, "Bohr": units.Bohr}
_PRESSURES = {"GPa": 1.0, "MPa": 1e-3, "kbar": 0.1, "bar": 1e-4, "Pa": 1e-9}  # GPa


def factor(source: Source) -> float:
    """By what a label in the unit of its source is multiplied; negative if its sign is the opposite."""
    size = _size(source.unit)
    return -size if source.opposite else size


def _size(unit: str) -> float:
    if unit in _PRESSURES:
        return float(_PRESSURES[unit] * units.GPa)
    if unit in _ENERGIES:
        return float(_ENERGIES[unit])
    energy, _, length = unit.rpartition("/")
    if length.endswith("^3"):
        return float(_ENERGIES[energy] / _LENGTHS[length.removesuffix("^3")] ** 3)
    return float(_ENERGIES[energy] / _LENGTHS[length])
