"""Commands for force-constant potentials: phonons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ubmd.files import check_outputs, replacing, write_text

if TYPE_CHECKING:
    from ubmd.potentials.force_constants.potential import Potential


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(phonons)


def phonons(
    model: Annotated[
        Path,
        typer.Argument(help="Model file of force constants (model.pt), or the folder of its run.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures and tables.")] = Path("phonons"),
    path: Annotated[
        str | None, typer.Option(help="Path through the Brillouin zone, e.g. GXWKGL; default: the lattice's own.")
    ] = None,
    points: Annotated[int, typer.Option(min=10, help="Points along the path.")] = 300,
    conductivity: Annotated[
        bool,
        typer.Option("--conductivity", help="Heat conductivity too, with phono3py (pip install 'ubmd\\[phonons]')."),
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
    """Phonons, elastic constants and heat conductivity of a force-constant potential.

    Writes phonons.png (dispersion and density of states), phonons.npz (the numbers) and elastic.txt. These follow from
    the second order alone: small vibrations of the ideal lattice, without the long-range forces of polar crystals.

    With --conductivity: the relaxation time approximation from second and third order, in conductivity.txt, and
    phono3py.yaml, fc2.hdf5, fc3.hdf5, to continue with phono3py itself (other meshes, full solution, cumulative ...).
    Needs a third order. Takes seconds for silicon on an 11x11x11 mesh; double the mesh and it takes 64 times as long.

      ubmd phonons runs/silicon --conductivity --temperature 300 --temperature 600 --out phonons
    """
    from ubmd.potentials.force_constants.potential import load_potential

    potential = load_potential(model)
    check_outputs(out, [], "--out")
    _harmonic(potential, out, path, points)
    if conductivity:
        _conductivity(potential, out, mesh, temperature or [300.0], isotopes)


def _harmonic(potential: Potential, out: Path, path: str | None, points: int) -> None:
    import numpy as np

    from ubmd.analysis.crystal_figures import phonon_figure
    from ubmd.potentials.force_constants.elastic import elastic_constants
    from ubmd.potentials.force_constants.phonons import HarmonicCrystal

    crystal = HarmonicCrystal.from_basis(*potential)
    print(f"Space group {potential.basis.lattice.space_group or 'unknown: it needs spglib'}")
    bands = crystal.dispersion(points, path)
    frequency, states = crystal.density_of_states()
    phonon_figure({"": bands}, (frequency, states), out / "phonons.png")
    with replacing(out / "phonons.npz") as file:
        np.savez(
            file,
            distance=bands.distance,
            frequencies=bands.frequencies,
            places=bands.places,
            labels=np.array(bands.labels),
            dos_frequency=frequency,
            dos_states=states,
        )
    print(f"Phonons: {bands.frequencies.min():.3f} to {bands.frequencies.max():.3f} THz, in {out / 'phonons.png'}")
    if bands.frequencies.min() < -0.05:
        print("Negative frequencies are imaginary: the ideal lattice is unstable in this potential.")
    found = elastic_constants(*potential)
    rows = [" ".join(f"{value:9.2f}" for value in row) for row in found.matrix]
    head = "Elastic constants (GPa) in Voigt's order xx yy zz yz xz xy, atoms relaxed, 0 K:"
    cubic = found.cubic()
    if cubic is not None:
        head = "C11 = {:.1f}, C12 = {:.1f}, C44 = {:.1f} GPa (atoms relaxed, 0 K)".format(*cubic)
    write_text(out / "elastic.txt", "\n".join([head, *rows, ""]))
    print("\n".join([head, *([] if cubic else rows)]))


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
