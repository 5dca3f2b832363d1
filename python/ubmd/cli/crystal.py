"""Commands for crystals: phonons with elastic constants, and the equation of state."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ubmd.errors import DataError, SettingsError
from ubmd.files import check_outputs, replacing, write_text
from ubmd.texts import counted

if TYPE_CHECKING:
    from ase import Atoms

    from ubmd.calculator import Calculator
    from ubmd.measure.crystal import LargestUncertainty, Response
    from ubmd.potentials.force_constants.elastic import ElasticConstants
    from ubmd.potentials.force_constants.phonons import Dispersion
    from ubmd.potentials.force_constants.potential import Potential

_DISPLACEMENT, _STRAIN = 0.01, 0.005  # Å; no unit
_IMAGINARY = -0.05  # THz; smaller ones are rounding
_SYMMETRY = 1e-3  # Å, within which symmetry is looked for
_FORCE, _STRESS = 0.01, 0.1  # eV/Å, GPa: a crystal with more is not relaxed
_FAR = 2.0  # times the uncertainty of the crystal at rest: the model extrapolates
_UNKNOWN = 0.5  # eV/Å; a model that is as uncertain of a force has not seen such structures


class Relax(enum.StrEnum):
    """What is relaxed first."""

    positions = "positions"
    cell = "cell"


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(phonons)
    app.command()(eos)


_Structure = typer.Argument(
    help="The crystal, for a network: any file that ASE reads, its primitive cell is enough.", show_default=False
)


def phonons(
    model: Annotated[Path, typer.Argument(help="Model file (model.pt), or the folder of its run.", show_default=False)],
    structure: Annotated[Path | None, _Structure] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures and tables.")] = Path("phonons"),
    path: Annotated[
        str | None, typer.Option(help="Path through the Brillouin zone, e.g. GXWKGL; default: the lattice's own.")
    ] = None,
    points: Annotated[int, typer.Option(min=10, help="Points along the path.")] = 300,
    relax: Annotated[
        Relax | None,
        typer.Option(help="Network: relax the positions first, or the positions and the cell. Default: neither."),
    ] = None,
    supercell: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Network: repetitions of the crystal's cell in which atoms are displaced, e.g. 3,3,3; raise them "
            "until the frequencies stay the same. Default: opposite faces are 12 Å apart or more.",
        ),
    ] = None,
    displacement: Annotated[
        float | None, typer.Option(min=1e-4, max=0.5, help="Network: displacement of an atom, Å. Default: 0.01.")
    ] = None,
    strain: Annotated[
        float | None,
        typer.Option(
            min=1e-5, max=0.05, help="Network: strain (no unit) for the elastic constants, both signs. Default: 0.005."
        ),
    ] = None,
    conductivity: Annotated[
        bool,
        typer.Option(
            "--conductivity",
            help="Force constants: heat conductivity too, with phono3py (pip install 'ubmd\\[phonons]').",
        ),
    ] = False,
    mesh: Annotated[
        int,
        typer.Option(min=1, help="Conductivity: points along each reciprocal vector; raise it until converged."),
    ] = 11,
    temperature: Annotated[
        list[float] | None, typer.Option(min=1.0, help="Conductivity: K; may be repeated. Default: 300.")
    ] = None,
    isotopes: Annotated[
        bool, typer.Option("--isotopes", help="Conductivity: scattering by natural isotopes as well.")
    ] = False,
) -> None:
    """Phonons and elastic constants of a crystal; of force constants, heat conductivity too.

    Small vibrations and strains at 0 K. Long-range forces of polar crystals are missing: no splitting of longitudinal
    and transverse optical branches (LO-TO) at the zone centre.

    A network needs the crystal, relaxed in this network (--relax cell). Forces come from displaced atoms in a supercell
    (phonopy: pip install 'ubmd\\[phonons]'), elastic constants from strained cells whose atoms relax. The largest
    uncertainty of the network on these structures is printed: if it is much larger than at rest, the network
    extrapolates.

    Force constants contain their crystal. With --conductivity, which needs a third order: the relaxation time
    approximation. Seconds for silicon on an 11x11x11 mesh; double the mesh and it takes 64 times as long.
    """
    if _is_force_constants(model):
        from ubmd.potentials.force_constants.potential import load_potential

        given = {"STRUCTURE": structure, "--relax": relax, "--supercell": supercell}
        _refuse(given | {"--displacement": displacement, "--strain": strain})
        potential = load_potential(model)
        check_outputs(out, [], "--out")
        _harmonic(potential, out, path, points)
        if conductivity:
            _conductivity(potential, out, mesh, temperature or [300.0], isotopes)
        return
    if conductivity:
        raise SettingsError(
            "--conductivity is for force constants: train some on this network's crystal (settings with [crystal]), or "
            "use phono3py with ubmd.Calculator."
        )
    repeats = None if supercell is None else _repeats(supercell)
    crystal = _open_crystal(model, structure, "phonons", out)
    if relax is not None:
        crystal.relax("free" if relax == Relax.cell else "fixed")
    crystal.tell_whether_relaxed()
    _network_phonons(crystal, path, points, repeats, displacement or _DISPLACEMENT)
    _network_constants(crystal, strain or _STRAIN)


def eos(
    model: Annotated[
        Path, typer.Argument(help="Model file of a network (model.pt), or the folder of its run.", show_default=False)
    ],
    structure: Annotated[
        Path, typer.Argument(help="The crystal: any file that ASE reads, its primitive cell is enough.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the picture and tables.")] = Path("eos"),
    span: Annotated[
        float, typer.Option(min=0.001, max=0.4, help="Volumes from (1 - span) V0 to (1 + span) V0; no unit.")
    ] = 0.06,
    points: Annotated[int, typer.Option(min=5, help="Number of volumes.")] = 9,
) -> None:
    """Equation of state of a crystal: volume, energy and bulk modulus at 0 K (Birch-Murnaghan).

    The crystal is relaxed in the network, cell and positions; then at each volume the positions and the shape of the
    cell. The largest uncertainty of the network on these structures is printed: if it is much larger than at rest, the
    network extrapolates.
    """
    if _is_force_constants(model):
        raise SettingsError(
            f"{model} is a force-constant potential, valid for a fixed cell only: 'ubmd phonons' prints its elastic "
            "constants and bulk modulus."
        )
    crystal = _open_crystal(model, structure, "eos", out)
    crystal.relax("free")
    crystal.tell_whether_relaxed()
    _state_equation(crystal, span, points)


def _is_force_constants(model: Path) -> bool:
    """Whether a model file or the folder of a run holds force constants; the file is not run."""
    from ubmd.potentials.kinds import kind_of_record
    from ubmd.potentials.record import read_record

    if model.is_dir() and (model / "basis.npz").is_file() and (model / "posterior.npz").is_file():
        return True
    record = read_record(_file_of(model))
    return record is not None and kind_of_record(record).of_crystal


def _file_of(model: Path) -> Path:
    return model / "model.pt" if model.is_dir() else model


def _refuse(options: dict[str, Any]) -> None:
    """SettingsError for the first option that only networks have."""
    for name, value in options.items():
        if value is not None:
            raise SettingsError(
                f"{name} is for networks: a force-constant potential contains its crystal; leave it out."
            )


def _repeats(text: str) -> tuple[int, int, int]:
    """Three numbers of '--supercell 3,3,3'."""
    try:
        a, b, c = (int(part) for part in text.split(","))
    except ValueError:
        a = b = c = 0
    if min(a, b, c) < 1:
        raise SettingsError(f"--supercell {text}: write three numbers of repetitions, as in 3,3,3.")
    return a, b, c


# ----------------------------------------------------------------------------------------------- networks


@dataclass
class _Crystal:
    """A crystal, the network it is in, and where results go."""

    atoms: Atoms
    calculator: Calculator
    out: Path

    def at_rest(self) -> Response:
        """What the network says about the crystal."""
        from ubmd.measure.crystal import respond

        return respond(self.calculator, [self.atoms])[0]

    def relax(self, cell: str) -> None:
        """Relax it, say what has changed, and write it."""
        from ubmd.data.extxyz import write_structures
        from ubmd.measure.crystal import relaxed
        from ubmd.potentials.force_constants.symmetry import group_name

        before = self.atoms
        self.atoms = relaxed(self.calculator, before, cell)
        write_structures(self.out / "relaxed.extxyz", [self.atoms])
        change = 100.0 * (self.atoms.get_volume() / before.get_volume() - 1.0)
        volume = "" if cell == "fixed" else f", volume {change:+.2f} %"
        print(f"Relaxed{volume}: {self.out / 'relaxed.extxyz'}")
        old, new = (group_name(atoms, _SYMMETRY) for atoms in (before, self.atoms))
        if old != new:
            print(f"The relaxation has changed the space group from {old} to {new}.")

    def tell_whether_relaxed(self) -> None:
        """Space group, residual force and stress, and a sentence if they are large."""
        from ubmd.potentials.force_constants.symmetry import group_name

        rest, group = self.at_rest(), group_name(self.atoms, _SYMMETRY) or "unknown (it needs spglib)"
        print(
            f"{self.atoms.get_chemical_formula()}, space group {group}: "
            f"largest force {rest.largest_force:.2g} eV/Å, largest stress {rest.largest_stress:.2g} GPa in this model"
        )
        if rest.largest_force > _FORCE or rest.largest_stress > _STRESS:
            print(
                "It is not relaxed in this model, so phonons and elastic constants are not those of a minimum: add "
                "--relax cell, or --relax positions for this cell."
            )

    def tell_uncertainty(self, what: str, largest: LargestUncertainty | None) -> None:
        """The largest uncertainty on some structures beside that at rest."""
        rest = self.at_rest()
        if largest is None or rest.u is None or rest.atomic_u is None:
            return
        print(
            f"Largest uncertainty on {counted(largest.structures, what)}: {1000 * largest.u:.3g} meV/atom, "
            f"{largest.atomic_u:.3g} eV/Å of a force (crystal at rest: {1000 * rest.u:.3g} and {rest.atomic_u:.3g})"
        )
        if rest.atomic_u > _UNKNOWN:
            print(
                f"The network does not know this crystal (a force is uncertain by more than {_UNKNOWN:g} eV/Å): train "
                "it with labels of this crystal before you use these numbers."
            )
        elif largest.u > _FAR * rest.u or largest.atomic_u > min(_FAR * rest.atomic_u, _UNKNOWN):
            print("The network extrapolates there: train it with such structures before you use these numbers.")


def _open_crystal(model: Path, structure: Path | None, command: str, out: Path) -> _Crystal:
    """The network and the crystal of a command, checked."""
    if structure is None:
        raise SettingsError(f"{model} is a network: name its crystal, as in 'ubmd {command} {model} crystal.cif'.")
    from ubmd.calculator import Calculator
    from ubmd.data.structures import read_structures
    from ubmd.measure.crystal import check_crystal

    structures = read_structures(structure, compare=False)
    if len(structures) > 1:
        raise DataError(f"{structure} holds {len(structures)} structures; give a file with the crystal alone.")
    calculator = Calculator(_file_of(model))
    try:
        check_crystal(structures[0], calculator.evaluator.cutoff)
    except DataError as error:
        raise DataError(f"{structure}: {error}") from None
    check_outputs(out, [], "--out")
    atoms = structures[0].copy()
    atoms.set_constraint()
    return _Crystal(atoms, calculator, out)


def _network_phonons(
    crystal: _Crystal, path: str | None, points: int, repeats: Sequence[int] | None, displacement: float
) -> None:
    from ubmd.cli.console import make_console
    from ubmd.measure.phonons import phonons as compute

    with make_console().status("forces of displaced atoms"):
        found = compute(crystal.calculator, crystal.atoms, repeats, displacement, points, path)
    found.program.save(str(crystal.out / "phonopy.yaml"))
    print(
        f"Supercell {'x'.join(map(str, found.repeats))}: {found.supercell} atoms, displaced by {displacement:g} Å"
        + ("" if repeats else "; raise --supercell until the frequencies stay the same")
    )
    crystal.tell_uncertainty("displaced structure", found.uncertainty)
    _write_phonons(found.bands, found.density, crystal.out)


def _network_constants(crystal: _Crystal, strain: float) -> None:
    from ubmd.cli.console import make_console
    from ubmd.measure.elastic import strained_constants

    with make_console().status("stresses of strained cells"):
        constants, uncertainty = strained_constants(crystal.calculator, crystal.atoms, strain)
    crystal.tell_uncertainty("strained cell", uncertainty)
    _write_constants(constants, crystal.atoms, crystal.out, 1e-3)
    if constants.misfit > 0.02 * abs(constants.matrix).max():
        print(f"C_ij and C_ji differ by up to {constants.misfit:.2g} GPa: relax the crystal, or change --strain.")


def _state_equation(crystal: _Crystal, span: float, points: int) -> None:
    import numpy as np

    from ubmd.analysis.crystal_figures import state_equation_figure
    from ubmd.cli.console import make_console
    from ubmd.measure.elastic import equation_of_state

    with make_console().status(f"relaxing at {points} volumes"):
        state = equation_of_state(crystal.calculator, crystal.atoms, span, points)
    crystal.tell_uncertainty("volume", state.uncertainty)
    fine = np.linspace(state.volumes[0], state.volumes[-1], 200)
    n = state.atoms
    state_equation_figure(
        (state.volumes / n, (state.energies - state.energy) / n),
        (fine / n, (state.energy_at(fine) - state.energy) / n),
        state.atomic_u,
        crystal.out / "eos.png",
    )
    each = np.full(points, np.nan) if state.atomic_u is None else state.atomic_u
    summary = (
        f"V0 = {state.volume / n:.4f} Å^3/atom, E0 = {state.energy / n:.6f} eV/atom, B = {state.modulus:.2f} GPa, "
        f"B' = {state.derivative:.2f}"
    )
    rows = [f"{v / n:.6f} {e / n:.8f} {u:.4g}" for v, e, u in zip(state.volumes, state.energies, each, strict=True)]
    head = "# volume (Å^3/atom) energy (eV/atom) largest uncertainty of a force (eV/Å)"
    write_text(crystal.out / "eos.txt", "\n".join([f"# {summary}", head, *rows, ""]))
    print(f"{summary} (0 K)")
    print(f"The fit is off by {1000 * state.misfit:.2g} meV/atom (rms); {crystal.out / 'eos.png'}, eos.txt")


# ------------------------------------------------------------------------------------------------ results


def _write_phonons(bands: Dispersion, density: tuple[Any, Any], out: Path) -> None:
    """Picture, numbers and the range of the frequencies."""
    import numpy as np

    from ubmd.analysis.crystal_figures import phonon_figure

    phonon_figure({"": bands}, density, out / "phonons.png")
    with replacing(out / "phonons.npz") as file:
        np.savez(
            file,
            distance=bands.distance,
            frequencies=bands.frequencies,
            places=bands.places,
            labels=np.array(bands.labels),
            dos_frequency=density[0],
            dos_states=density[1],
        )
    print(f"Phonons: {bands.frequencies.min():.3f} to {bands.frequencies.max():.3f} THz, in {out / 'phonons.png'}")
    lowest = bands.frequencies.min(axis=1)
    if lowest.min() < _IMAGINARY:
        place = bands.distance[lowest.argmin()]
        label = bands.labels[int(np.abs(bands.places - place).argmin())]
        print(f"Negative frequencies are imaginary (lowest near {label}): the lattice is unstable in this potential.")


def _write_constants(found: ElasticConstants, atoms: Atoms, out: Path, tolerance: float) -> None:
    """elastic.txt, and what is printed of it; three constants suffice for cubic crystals, along their own axes."""
    from ubmd.potentials.force_constants.symmetry import cubic_axes

    rows = [" ".join(f"{value:9.2f}" for value in row) for row in found.matrix]
    head = "Elastic constants (GPa) in Voigt's order xx yy zz yz xz xy, atoms relaxed, 0 K:"
    axes = cubic_axes(atoms, _SYMMETRY)
    cubic = (found if axes is None else found.turned(axes)).cubic(tolerance)
    if cubic is not None:
        three = "C11 = {:.1f}, C12 = {:.1f}, C44 = {:.1f} GPa (atoms relaxed, 0 K)".format(*cubic)
    write_text(out / "elastic.txt", "\n".join([*([three] if cubic else []), head, *rows, ""]))
    print("\n".join([three] if cubic else [head, *rows]))
    if found.stable:
        print(f"Bulk modulus: {found.bulk_modulus:.1f} GPa")
    else:
        print("Some strain lowers the energy: the crystal is mechanically unstable in this potential.")


# --------------------------------------------------------------------------------------- force constants


def _harmonic(potential: Potential, out: Path, path: str | None, points: int) -> None:
    from ase import Atoms

    from ubmd.potentials.force_constants.elastic import elastic_constants
    from ubmd.potentials.force_constants.phonons import HarmonicCrystal

    crystal = HarmonicCrystal.from_basis(*potential)
    print(f"Space group {potential.basis.lattice.space_group or 'unknown: it needs spglib'}")
    _write_phonons(crystal.dispersion(points, path), crystal.density_of_states(), out)
    lattice = potential.basis.lattice
    atoms = Atoms(lattice.numbers, lattice.positions, cell=lattice.cell, pbc=True)
    _write_constants(elastic_constants(*potential), atoms, out, 1e-6)


def _conductivity(potential: Potential, out: Path, mesh: int, temperatures: list[float], isotopes: bool) -> None:
    from ubmd.cli.console import make_console
    from ubmd.potentials.force_constants.phonons import conductivity

    with make_console().status(f"phono3py on a {mesh}x{mesh}x{mesh} mesh"):
        found = conductivity(*potential, temperatures, mesh, isotopes=isotopes, folder=out)
    lines = [
        f"# heat conductivity, W/(m K): relaxation time approximation, mesh {mesh}^3",
        "# T(K) mean xx yy zz yz xz xy",
    ]
    for kelvin, mean, k in zip(found.temperatures, found.mean, found.tensor, strict=True):
        parts = (k[0, 0], k[1, 1], k[2, 2], k[1, 2], k[0, 2], k[0, 1])
        lines.append(f"{kelvin:g} {mean:.3f} " + " ".join(f"{part:.3f}" for part in parts))
        print(f"Heat conductivity at {kelvin:g} K: {mean:.1f} W/(m K) (mean of the three directions)")
    write_text(out / "conductivity.txt", "\n".join([*lines, ""]))
