"""CP2K as a reference: density-functional labels through ASE's interface to cp2k_shell."""

from __future__ import annotations

import re
import shlex
import subprocess
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

from ase import Atoms

from ubmd.errors import LabelError, SettingsError
from ubmd.references.electrons import spin_multiplicity, total_charge
from ubmd.references.programs import ProgramCalculator, command_line, failed
from ubmd.spelling import nearest

DEFAULTS: dict[str, Any] = {
    "xc": "PBE",
    "dispersion": True,
    "basis_set": "DZVP-MOLOPT-SR-GTH",
    "basis_set_file": "BASIS_MOLOPT",
    "potential": "GTH-PBE",
    "potential_file": "POTENTIAL",
    "cutoff": 400.0,
    "rel_cutoff": 50.0,
    "eps_scf": 1e-6,
    "max_scf": 20,
    "outer_scf": 10,
}
"""Settings of the input template; energies in Ry, eps_scf as in CP2K."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "basis_set": "TZVP-MOLOPT-PBE-GTH-q$valence",
        "basis_set_file": "BASIS_MOLOPT_UZH",
        "potential": "GTH-PBE-q$valence",
        "potential_file": "POTENTIAL_UZH",
        "cutoff": 1000.0,
    },
}
"""'paper': PBE-D3(BJ) with TZVP sets and 1000 Ry, the level of the MIL-53(Al) labels of Zaverkin et al.,
npj Comput. Mater. 10, 83 (2024)."""

VALENCE = {"H": 1, "B": 3, "C": 4, "N": 5, "O": 6, "F": 7, "Na": 9, "Mg": 10, "Al": 3, "Si": 4, "P": 5, "S": 6, "Cl": 7}
"""Electrons that GTH-PBE potentials treat; $valence in names of basis sets and potentials."""

_INPUT = Template("""
&FORCE_EVAL
  &DFT
    BASIS_SET_FILE_NAME $basis_set_file
    POTENTIAL_FILE_NAME $potential_file
    &MGRID
      CUTOFF [Ry] $cutoff
      REL_CUTOFF [Ry] $rel_cutoff
    &END MGRID
    &QS
      EPS_DEFAULT 1.0E-12
    &END QS
    &SCF
      EPS_SCF $eps_scf
      MAX_SCF $max_scf
      &OT
        MINIMIZER DIIS
        PRECONDITIONER FULL_SINGLE_INVERSE
      &END OT
      &OUTER_SCF
        EPS_SCF $eps_scf
        MAX_SCF $outer_scf
      &END OUTER_SCF
    &END SCF
    &XC
      &XC_FUNCTIONAL $xc
      &END XC_FUNCTIONAL
$dispersion
    &END XC
  &END DFT
  &SUBSYS
$kinds
  &END SUBSYS
&END FORCE_EVAL
""")
_DISPERSION = Template("""
      &VDW_POTENTIAL
        POTENTIAL_TYPE PAIR_POTENTIAL
        &PAIR_POTENTIAL
          TYPE DFTD3(BJ)
          PARAMETER_FILE_NAME dftd3.dat
          REFERENCE_FUNCTIONAL $xc
        &END PAIR_POTENTIAL
      &END VDW_POTENTIAL
""")
_NOT_CONVERGED = re.compile(r"SCF run NOT converged|SCF loop FAILED to converge")


def cp2k(
    preset: str = "default",
    template: str | Path | None = None,
    command: str = "cp2k_shell",
    launcher: str = "",
    threads: int = 1,
    charge: float | None = None,
    multiplicity: int | None = None,
    base: Path = Path(),
    **settings: Any,
) -> ProgramCalculator:
    """Gaussian and plane waves DFT with CP2K (energy in eV, forces in eV/Å, stress in eV/Å^3).

    Every label starts a new cp2k_shell in its own folder, from the atomic guess: 0.7 s more than keeping it, but
    labels do not depend on each other. A label whose SCF does not converge is rejected (CP2K 2023 and older return
    its numbers as if nothing had happened).

    The built-in input is for systems with a band gap (orbital transformation, Γ point). Give ``template`` for
    anything else.

    Args:
        preset: 'default' (PBE-D3(BJ), DZVP-MOLOPT-SR, 400 Ry) or 'paper' (TZVP of the UZH family, 1000 Ry).
        template: CP2K input file with FORCE_EVAL, relative to the settings file; coordinates, cell and run type are
            added. It replaces the built-in input, so that no preset or setting applies.
        command: cp2k_shell, or 'cp2k.psmp -s'.
        launcher: starts it with several ranks, e.g. 'mpiexec -n 4' (of the MPI that CP2K was built with).
        threads: OpenMP threads per rank.
        charge: total charge, e; default: that of the structure (``info['charge']`` or the sum of initial charges).
        multiplicity: 2 S + 1; other than 1 makes the calculation spin-polarised; default: that of the structure
            (``info['multiplicity']`` or the sum of the initial moments). Moments of single atoms are not passed on.
        base: folder that ``template`` is relative to.
        settings: changes to the preset, see `DEFAULTS`; 'dispersion' is true or false, 'basis_set' and 'potential'
            are names for all elements ($valence: number of valence electrons) or tables by element.

    Raises:
        SettingsError: CP2K is not installed, or an argument is not known.
    """
    if preset not in PRESETS:
        raise SettingsError(f"reference.arguments.preset = {preset!r} is unknown; use {' or '.join(sorted(PRESETS))}.")
    unknown = sorted(set(settings) - set(DEFAULTS))
    if unknown:
        meant = nearest(unknown[0], DEFAULTS)
        hint = f"did you mean {meant!r}?" if meant else f"known arguments: {', '.join(DEFAULTS)}."
        raise SettingsError(f"reference.arguments.{unknown[0]} is unknown to cp2k; {hint}")
    chosen = DEFAULTS | PRESETS[preset] | settings
    text = None if template is None else _read(Path(base) / template)
    words = command_line(command, launcher, threads, "cp2k")

    def run(atoms: Atoms, folder: Path) -> dict[str, Any]:
        source = _input(chosen, sorted(set(atoms.get_chemical_symbols()))) if text is None else text
        return _run(atoms, folder, words, source, total_charge(atoms, charge), spin_multiplicity(atoms, multiplicity))

    return ProgramCalculator(run)


def _run(
    atoms: Atoms, folder: Path, words: list[str], source: str, charge: float, multiplicity: int | None
) -> dict[str, Any]:
    """Results of one calculation; LabelError with the reason if it fails."""
    from ase.calculators.cp2k import CP2K

    if not atoms.cell.rank == 3:
        raise LabelError("CP2K needs a cell, even for molecules; set one in the start structure.")
    output = folder / "cp2k.out"
    calculator = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a shell that is gone: the reason below says more
            # exec: the shell that ASE starts becomes the program, so that ending it ends the program
            calculator = CP2K(
                command=f"cd {shlex.quote(str(folder))} && exec {shlex.join(words)} 2>cp2k.err",
                inp=source,
                charge=charge,
                multiplicity=multiplicity,
                uks=multiplicity not in (None, 1),
                poisson_solver=None if "&POISSON" in source.upper() else "auto",
                **dict.fromkeys(("xc", "basis_set", "basis_set_file", "potential_file", "pseudo_potential")),
                cutoff=None,
                max_scf=None,
            )
            calculator.calculate(atoms, ["energy", "forces", "stress"])
            results = dict(calculator.results)
            calculator.close()  # flushes the output
    except Exception as error:
        if "already present" in str(error):  # ASE adds coordinates, cell and run type
            raise SettingsError(f"reference.arguments.template: {error}; leave that keyword out.") from error
        raise failed("CP2K", error, output, _reason, _end(calculator)) from error
    finally:
        _end(calculator)
    reason = _reason(output.read_text(errors="replace"))
    if reason:
        raise LabelError(reason)
    return results


def _end(calculator: Any) -> int:
    """Make sure that no process is left, whatever has happened; the exit code of one that had ended by itself, or 0."""
    shell: Any = getattr(calculator, "_shell", None)
    child = getattr(shell, "_child", None)
    if child is None:
        return 0
    code = None
    with suppress(subprocess.TimeoutExpired):  # its pipe breaks a moment before it has ended
        code = child.wait(0.5)
    child.kill()
    child.communicate()
    shell._child, shell.isready = None, False
    return code or 0


def _reason(output: str) -> str:
    """Why the numbers of this output must not be used, or an empty text."""
    if _NOT_CONVERGED.search(output):
        return "CP2K's SCF did not converge (reference.arguments: max_scf, outer_scf, eps_scf)."
    abort = re.search(r"\[ABORT\](.*?)\n[ *]*\n", output, re.DOTALL)
    if abort:
        # the text stands to the right of a little drawing
        said = " ".join(line[9:].strip(" *") for line in abort.group(1).splitlines()[1:])
        return f"CP2K stopped: {' '.join(said.split())[:300]}"
    return ""


def _input(settings: Mapping[str, Any], symbols: list[str]) -> str:
    """The built-in input for these elements."""
    kinds = [
        f"    &KIND {symbol}\n      BASIS_SET {_name(settings['basis_set'], symbol)}\n"
        f"      POTENTIAL {_name(settings['potential'], symbol)}\n    &END KIND"
        for symbol in symbols
    ]
    dispersion = _DISPERSION.substitute(xc=settings["xc"]) if settings["dispersion"] else ""
    return _INPUT.substitute(settings, dispersion=dispersion, kinds="\n".join(kinds))


def _name(names: str | Mapping[str, str], symbol: str) -> str:
    """The basis set or potential of an element."""
    name = names if isinstance(names, str) else names.get(symbol)
    if name is None or ("$valence" in name and symbol not in VALENCE):
        raise SettingsError(f"reference.arguments: give the basis_set and the potential of {symbol} for CP2K by name.")
    return name.replace("$valence", str(VALENCE.get(symbol)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"reference.arguments.template cannot be read: {error}.") from None
