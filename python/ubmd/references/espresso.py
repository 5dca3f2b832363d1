"""Quantum ESPRESSO as a reference: plane-wave DFT labels with pw.x through ASE."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from ase import Atoms

from ubmd.data.periodicity import has_stress
from ubmd.errors import LabelError, SettingsError
from ubmd.references.electrons import total_charge
from ubmd.references.gth import PREFIX, find_potentials, read_gth
from ubmd.references.programs import ProgramCalculator, command_line, failed, folder_of

CONV_THR = 1e-8
"""Default of conv_thr, Ry: pw.x's own 1e-6 leaves 1e-4 eV/Å in the forces."""


def espresso(
    pseudopotentials: Mapping[str, str],
    pseudo_dir: str | Path | None = None,
    input_data: Mapping[str, Any] | None = None,
    kpts: Sequence[int] | None = None,
    kspacing: float | None = None,
    koffset: Sequence[int] = (0, 0, 0),
    command: str = "pw.x",
    launcher: str = "",
    threads: int = 1,
    gth_file: str | Path | None = None,
    base: Path = Path(),
) -> ProgramCalculator:
    """Plane-wave DFT with pw.x (energy in eV, with the entropy of smeared electrons; forces eV/Å; stress eV/Å^3).

    A label whose SCF does not converge is rejected.

    Args:
        pseudopotentials: file of each element, e.g. {Si = "Si.pz-vbc.UPF"}; or 'gth:' and a functional, e.g.
            {Sn = "gth:PBE", Se = "gth:PBE"} (LDA: "gth:PADE"), for Goedecker-Teter-Hutter potentials, which are
            converted from CP2K's data (Debian: cp2k-data).
        pseudo_dir: folder of the files, relative to the settings file; GTH potentials need none.
        input_data: pw.x input, nested or flat, e.g. {ecutwfc = 30.0, occupations = "smearing", degauss = 0.01} (Ry);
            a charge of the structure must agree with tot_charge;
            forces and stress are always computed, conv_thr is 1e-8 Ry if not given.
        kpts: Monkhorst-Pack grid (3 numbers); without it and without kspacing only Γ, with its faster routines.
        kspacing: largest distance between k points, 1/Å, instead of a grid.
        koffset: 1 shifts the grid by half a step.
        command: pw.x or its path.
        launcher: starts it with several ranks, e.g. 'mpiexec -n 4' (of the MPI that it was built with: an
            environment with ubmd has an mpiexec of its own, so give the full path).
        threads: OpenMP threads per rank.
        gth_file: CP2K's GTH_POTENTIALS, if it is not in one of its usual places.
        base: folder that ``pseudo_dir`` and ``gth_file`` are relative to.

    Raises:
        SettingsError: pw.x or a pseudopotential is missing.
    """
    words = command_line(command, launcher, threads, "quantum-espresso")
    potentials = _potentials(pseudopotentials, pseudo_dir, gth_file, Path(base))
    data = deepcopy(dict(input_data or {}))
    options = {"kpts": kpts, "kspacing": kspacing, "koffset": tuple(koffset)}

    def run(atoms: Atoms, scratch: Path) -> dict[str, Any]:
        return _run(atoms, scratch, words, potentials, data, options)

    return ProgramCalculator(run)


def _potentials(
    names: Mapping[str, str], pseudo_dir: str | Path | None, gth_file: str | Path | None, base: Path
) -> dict[str, Path | str]:
    """Of each element the file, or the text of a converted one."""
    potentials: dict[str, Path | str] = {}
    for element, name in names.items():
        if name.startswith(PREFIX):
            entry = read_gth(find_potentials(gth_file, base), element, name.removeprefix(PREFIX))
            potentials[element] = entry.text()
            continue
        if pseudo_dir is None:
            raise SettingsError(f"reference.arguments.pseudo_dir: name the folder of {name}.")
        path = Path(folder_of(base, pseudo_dir, "pseudo_dir")) / name
        if not path.is_file():
            raise SettingsError(f"reference.arguments.pseudopotentials: there is no file {name} in {path.parent}.")
        potentials[element] = path
    return potentials


def _gather(potentials: Mapping[str, Path | str], folder: Path) -> dict[str, str]:
    """Put all pseudopotentials into one folder, as pw.x needs them; their names by element."""
    names = {}
    for element, potential in potentials.items():
        if isinstance(potential, str):
            names[element] = f"{element}.gth"
            (folder / names[element]).write_text(potential, encoding="utf-8")
        else:
            names[element] = potential.name
            if not (folder / potential.name).exists():
                (folder / potential.name).symlink_to(potential)
    return names


def _run(
    atoms: Atoms,
    scratch: Path,
    words: list[str],
    potentials: Mapping[str, Path | str],
    data: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Results of one calculation; LabelError with the reason if it fails."""
    from ase.calculators.espresso import Espresso, EspressoProfile
    from ase.io.espresso import Namelist

    if not has_stress(atoms):
        raise LabelError(
            "Quantum ESPRESSO computes periodic cells; put the molecule into a cell with pbc, or give all three cell "
            "vectors of the slab a length."
        )
    missing = sorted(set(atoms.get_chemical_symbols()) - set(potentials))
    if missing:
        raise LabelError(f"Quantum ESPRESSO has no pseudopotential for {missing[0]} (reference.arguments).")
    namelist = Namelist(deepcopy(data))
    namelist.to_nested("pw")
    namelist["control"].update({"tprnfor": True, "tstress": True, "outdir": "./scratch", "disk_io": "none"})
    # Without it pw.x prints "convergence has been achieved" after the last step, whatever the accuracy.
    namelist["electrons"]["scf_must_converge"] = True
    namelist["electrons"].setdefault("conv_thr", CONV_THR)
    calculator = Espresso(
        profile=EspressoProfile(command=shlex.join(words), pseudo_dir=str(scratch)),
        directory=scratch,
        pseudopotentials=_gather(potentials, scratch),
        input_data=namelist,
        **options,
    )
    total_charge(
        atoms, float(namelist["system"].get("tot_charge", 0.0)), whole=False
    )  # only whether the structure agrees
    output = scratch / "espresso.pwo"
    try:
        calculator.calculate(atoms, ["energy", "forces", "stress"], [])
    except Exception as error:
        raise failed("Quantum ESPRESSO", error, output, _reason) from error
    reason = _reason(output.read_text(errors="replace"))
    if reason:
        raise LabelError(reason)
    return _complete(dict(calculator.results), output)


def _complete(results: dict[str, Any], output: Path) -> dict[str, Any]:
    for name in ("energy", "forces", "stress"):
        if results.get(name) is None:
            raise LabelError(f"Quantum ESPRESSO gave no {name}; run it manually and see {output.name}.")
    return results


def _reason(output: str) -> str:
    """Why the numbers of this output must not be used, or an empty text."""
    if "convergence NOT achieved" in output:
        return (
            "Quantum ESPRESSO's SCF did not converge (reference.arguments.input_data: electron_maxstep, mixing_beta, "
            "conv_thr)."
        )
    error = re.search(r"Error in routine (.*?)%%%", output, re.DOTALL)
    if error:
        return f"Quantum ESPRESSO stopped: {' '.join(error.group(1).split())[:300]}"
    return ""
