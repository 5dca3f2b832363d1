"""Outputs in the layouts of VASP and CP2K, with given numbers; both print stresses that are positive if compressed."""

from __future__ import annotations

import numpy as np
from ase import Atoms

KBAR = 1602.176634  # of one eV/Å^3
GPA = 160.2176634
HARTREE, BOHR = 27.211386245981, 0.529177210544


def rows(values: np.ndarray, form: str = "14.8f") -> str:
    return "\n".join(" " + " ".join(f"{x:{form}}" for x in row) for row in np.atleast_2d(values))


def outcar(atoms: Atoms, energy: float, free_energy: float, forces: np.ndarray, stress: np.ndarray) -> str:
    """OUTCAR of one ionic step; stress [3, 3] in eV/Å^3, tension positive."""
    kinds = list(dict.fromkeys(atoms.get_chemical_symbols()))
    counts = [int((atoms.symbols == kind).sum()) for kind in kinds]
    kbar = -KBAR * stress
    voigt = [kbar[0, 0], kbar[1, 1], kbar[2, 2], kbar[0, 1], kbar[1, 2], kbar[2, 0]]
    cell = np.hstack([np.asarray(atoms.cell), np.asarray(atoms.cell.reciprocal())])
    return "\n".join(
        [
            " vasp.6.3.2 27Jun22 (build Jul 01 2022 10:00:00) complex",
            *(f" POTCAR:    PAW_PBE {kind} 01Jan2000" for kind in [*kinds, *kinds]),  # VASP lists them twice
            *(f"   VRHFIN ={kind}: d10 p1" for kind in kinds),
            "   ISPIN  =      1    spin polarized calculation?",
            "   ions per type =   " + " ".join(f"{count:8d}" for count in counts),
            "   k-points           NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands NBANDS= 10",
            " k-points in reciprocal lattice and weights: Gamma",
            "   0.00000000  0.00000000  0.00000000       1.000",
            "",
            "--------------------------------------- Iteration      1(  12)  ---------------------------------------",
            "  FORCE on cell =-STRESS in cart. coord.  units (eV):",
            "  Direction    XX          YY          ZZ          XY          YZ          ZX",
            "  in kB  " + " ".join(f"{x:12.5f}" for x in voigt),
            f"  external pressure = {np.trace(kbar) / 3:12.2f} kB  Pullay stress =        0.00 kB",
            "",
            " VOLUME and BASIS-vectors are now :",
            f"  volume of cell :   {atoms.get_volume():12.2f}",
            "      direct lattice vectors                 reciprocal lattice vectors",
            rows(cell, "13.9f"),
            "",
            " POSITION                                       TOTAL-FORCE (eV/Angst)",
            " -----------------------------------------------------------------------------------",
            rows(np.hstack([atoms.positions, forces])),
            " -----------------------------------------------------------------------------------",
            "    total drift:                                0.000000      0.000000      0.000000",
            "",
            "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)",
            "  ---------------------------------------------------",
            f"  free  energy   TOTEN  = {free_energy:18.8f} eV",
            "",
            f"  energy  without entropy={free_energy + 0.1:18.8f}  energy(sigma->0) ={energy:18.8f}",
            "",
        ]
    )


def vasprun(atoms: Atoms, energy: float, free_energy: float, forces: np.ndarray, stress: np.ndarray) -> str:
    """vasprun.xml of one ionic step; arguments as for `outcar`."""

    def array(name: str, values: np.ndarray) -> str:
        lines = "".join(f"<v>{' '.join(f'{x:.8f}' for x in row)}</v>" for row in values)
        return f'<varray name="{name}">{lines}</varray>'

    kinds = list(dict.fromkeys(atoms.get_chemical_symbols()))
    listed = "".join(f"<rc><c>{s}</c><c>{kinds.index(s) + 1}</c></rc>" for s in atoms.get_chemical_symbols())
    types = "".join(
        f"<rc><c>{(atoms.symbols == k).sum()}</c><c>{k}</c><c>1.0</c><c>1.0</c><c>PAW_PBE {k}</c></rc>" for k in kinds
    )
    basis, places = array("basis", np.asarray(atoms.cell)), array("positions", atoms.get_scaled_positions(wrap=False))
    structure = f"<structure><crystal>{basis}</crystal>{places}</structure>"
    energies = f'<energy><i name="e_fr_energy">{free_energy:.8f}</i><i name="e_0_energy">{energy:.8f}</i></energy>'
    step = f"<scstep>{energies}</scstep>{structure}{array('forces', forces)}{array('stress', -KBAR * stress)}{energies}"
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<modeling><generator/><incar/>'
        '<kpoints><generation param="Gamma"/><varray name="kpointlist"><v>0 0 0</v></varray>'
        '<varray name="weights"><v>1.0</v></varray></kpoints><parameters/>'
        f"<atominfo><atoms>{len(atoms)}</atoms><types>{len(kinds)}</types>"
        f'<array name="atoms"><set>{listed}</set></array>'
        f'<array name="atomtypes"><set>{types}</set></array></atominfo>'
        f'<structure name="initialpos"><crystal>{basis}</crystal>{places}</structure>'
        f"<calculation>{step}</calculation></modeling>\n"
    )


def cp2k_output(atoms: Atoms, energy: float, forces: np.ndarray, stress: np.ndarray | None) -> str:
    """Output of CP2K 7 for one structure; stress [3, 3] in eV/Å^3, tension positive."""
    kinds = list(dict.fromkeys(atoms.get_chemical_symbols()))
    numbers = [kinds.index(symbol) + 1 for symbol in atoms.get_chemical_symbols()]
    lines = [
        " DBCSR| CPU Multiplication driver                                           XSMM",
        " CP2K| version string:                                          CP2K version 7.1",
        *(
            f" CELL| Vector {n} [angstrom]: {rows(v)} |{n}| = 1.0"
            for n, v in zip("abc", np.asarray(atoms.cell), strict=True)
        ),
        *(f"  {k + 1}. Atomic kind: {kind}   Number of atoms: 1" for k, kind in enumerate(kinds)),
        " MODULE QUICKSTEP:  ATOMIC COORDINATES IN angstrom",
        "",
        "  Atom  Kind  Element       X           Y           Z          Z(eff)       Mass",
        "",
    ]
    for k, (kind, position) in enumerate(zip(numbers, atoms.positions, strict=True)):
        lines.append(f" {k + 1} {kind} {atoms.symbols[k]} {atoms.numbers[k]} {rows(position)}  11.00  63.55")
    lines += ["", "  *** SCF run converged in    12 steps ***", ""]
    lines += [f" ENERGY| Total FORCE_EVAL ( QS ) energy (a.u.):  {energy / HARTREE:.12f}", ""]
    lines += [" ATOMIC FORCES in [a.u.]", "", " # Atom   Kind   Element          X              Y              Z"]
    for k, (kind, force) in enumerate(zip(numbers, forces * BOHR / HARTREE, strict=True)):
        lines.append(f" {k + 1} {kind} {atoms.symbols[k]} {rows(force, '.12f')}")
    lines += [" SUM OF ATOMIC FORCES           0.0 0.0 0.0 0.0", ""]
    if stress is not None:
        lines += [" STRESS TENSOR [GPa]", "", "            X               Y               Z"]
        lines += [f"  {name} {rows(row, '.10f')}" for name, row in zip("XYZ", -GPA * stress, strict=True)]
        lines += ["", "  1/3 Trace(stress tensor):  0.0", ""]
    return "\n".join(lines) + "\n"
