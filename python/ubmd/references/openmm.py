"""Molecular force fields through OpenMM, as an ASE calculator for a molecule in vacuum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import openmm
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from openmm import app, unit

from ubmd.errors import LabelError, SettingsError

_ENERGY = units.kJ / units.mol  # 1 kJ/mol in eV
_LENGTH = units.nm  # 1 nm in Å


class OpenMM(Calculator):
    """Energy (eV) and forces (eV/Å) of a force field, without cutoff and without constraints.

    The Reference platform computes in float64, so labels are exact to rounding.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE declares it so)
    writes_files = False

    def __init__(
        self,
        pdb: str | Path,
        forcefield: Sequence[str] = ("amber19/protein.ff19SB.xml",),
        cmap: bool = True,
        platform: str = "Reference",
    ) -> None:
        """Build the force field for the topology of a PDB file.

        Args:
            pdb: file with residues and atom names; its positions are not used.
            forcefield: OpenMM force-field files, by path or as shipped with OpenMM.
            cmap: keep the torsion-torsion correction maps (False: as codes without CMAP see ff19SB).
            platform: OpenMM platform; 'Reference' is float64.

        Raises:
            SettingsError: a file is missing, or the force field has no template for a residue.
        """
        super().__init__()
        topology = _read_topology(Path(pdb))
        self.symbols = [atom.element.symbol for atom in topology.atoms()]
        system = _make_system(topology, forcefield)
        if not cmap:
            _remove_cmap(system)
        # The time step is never used: the context only evaluates forces.
        integrator = openmm.VerletIntegrator(0.001)
        self._context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform))

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results`` with energy and forces; LabelError if the atoms are not those of the PDB file."""
        super().calculate(atoms, properties, system_changes)
        structure = cast(Atoms, self.atoms)
        self._check(structure)
        self._context.setPositions(structure.positions / _LENGTH)
        state = self._context.getState(getEnergy=True, getForces=True)
        energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        self.results: dict[str, Any] = {"energy": energy * _ENERGY, "forces": forces * (_ENERGY / _LENGTH)}

    def _check(self, atoms: Atoms) -> None:
        if atoms.pbc.any():
            raise LabelError("The OpenMM reference computes molecules in vacuum; set pbc of the structure to false.")
        found = atoms.get_chemical_symbols()
        if len(found) != len(self.symbols):
            raise LabelError(
                f"The structure has {len(found)} atoms but the PDB file {len(self.symbols)}; use one system."
            )
        for index, (symbol, expected) in enumerate(zip(found, self.symbols, strict=True)):
            if symbol != expected:
                raise LabelError(
                    f"Atom {index} (from 0) is {symbol} in the structure but {expected} in the PDB file; "
                    "put the atoms in the same order."
                )


def _read_topology(path: Path) -> app.Topology:
    try:
        return app.PDBFile(str(path)).topology
    except FileNotFoundError:
        raise SettingsError(
            f"There is no PDB file {path}; reference.arguments.pdb is relative to the settings file."
        ) from None


def _make_system(topology: app.Topology, forcefield: Sequence[str]) -> openmm.System:
    names = [forcefield] if isinstance(forcefield, str) else list(forcefield)
    try:
        field = app.ForceField(*names)
        # No constraints and no removal of motion of the centre: the plain potential energy surface.
        return field.createSystem(
            topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False, removeCMMotion=False
        )
    except ValueError as error:
        raise SettingsError(f"The force field {names} does not cover the PDB file: {error}") from error


def _remove_cmap(system: openmm.System) -> None:
    maps = [i for i, force in enumerate(system.getForces()) if isinstance(force, openmm.CMAPTorsionForce)]
    for index in reversed(maps):
        system.removeForce(index)
