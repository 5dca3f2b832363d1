"""What `ubmd train` and `ubmd info` do for force-constant potentials."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ubmd.cli.tables import fit_tables
from ubmd.cli.training_progress import count_progress
from ubmd.errors import DataError
from ubmd.files import check_outputs, write_text
from ubmd.settings import CRYSTAL_UNCERTAINTY, TrainSettings

if TYPE_CHECKING:
    from ase import Atoms

    from ubmd.potentials.force_constants.fit import CrystalFit


def train_crystal(settings: TrainSettings, base: Path, fresh: bool, console: Console) -> None:
    """Fit, calibrate and export; ``base`` is the folder of the settings file."""
    from ubmd.cli.console import print_remarks, print_taken
    from ubmd.cli.structure_table import describe
    from ubmd.data.labels import dataset_hash
    from ubmd.measure.confidence import promise
    from ubmd.potentials.force_constants.export import export_crystal
    from ubmd.potentials.force_constants.fit import cached_basis, fit_crystal
    from ubmd.potentials.force_constants.ideal import describe_symmetry

    assert settings.crystal is not None
    names = ["basis.npz", "equations.npz", "posterior.npz", "fit.json", "model.pt", "uncertainty.png"]
    check_outputs(settings.output_dir, names, "output_dir")
    ideal, ideal_energy = _ideal(settings.crystal.structure_file(base), settings.labels)
    remarks: list[str] = []
    taken: list[str] = []
    training_set, validation_set = _sets(settings, base, remarks.append, taken.append)
    console.print(describe(training_set, "training set"))
    console.print(describe(validation_set, "validation set"))
    print_taken(taken, console)
    print_remarks(remarks)
    folder = settings.output_dir
    if fresh:
        (folder / "basis.npz").unlink(missing_ok=True)
    start = time.monotonic()
    with console.status("building the cluster basis"):
        crystal = settings.crystal
        basis = cached_basis(
            ideal, crystal.cutoffs, folder / "basis.npz", crystal.decay, crystal.tolerance, crystal.pairs
        )
    for line in describe_symmetry(ideal, basis.lattice, crystal.tolerance):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"cluster basis: {basis.n_parameters} parameters, {time.monotonic() - start:.1f} s", highlight=False)
    energy = None if ideal_energy is None else ideal_energy / (len(ideal) / len(basis.lattice.numbers))
    with count_progress(console) as report:
        fit = fit_crystal(
            basis, training_set, validation_set, settings.crystal, settings.uncertainty, energy, progress=report
        )
    fit.equations.save(folder / "equations.npz")
    fit.posterior.save(folder / "posterior.npz")
    write_text(folder / "fit.json", json.dumps(fit.summary(), indent=2) + "\n")
    provenance = {
        "training_set_hash": dataset_hash(training_set),
        "n_training": len(training_set),
        "settings": _effective(settings),
    }
    record = export_crystal(
        basis,
        fit.posterior,
        folder / "model.pt",
        energy_scale=fit.energy_scale,
        force_scale=fit.force_scale,
        max_displacement=settings.crystal.max_displacement,
        energy=fit.energy,
        provenance=provenance,
    )
    for table in fit_tables(fit):
        console.print(table)
    for line in _remarks(fit):
        console.print(line, highlight=False, soft_wrap=True)
    promised = promise({**record["uncertainty"], "atoms_by": settings.uncertainty.atoms_by})
    console.print(promised, highlight=False, soft_wrap=True, markup=False)
    for name, path in (("picture", _picture(fit, folder / "uncertainty.png")), ("model", folder / "model.pt")):
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)


def _effective(settings: TrainSettings) -> dict[str, Any]:
    """The settings without those that only networks use."""
    unused = set(type(settings.uncertainty).model_fields) - CRYSTAL_UNCERTAINTY
    return settings.model_dump(mode="json", exclude={"model": True, "training": True, "uncertainty": unused})


def _ideal(path: Path, labels: Mapping[str, str]) -> tuple[Atoms, float | None]:
    """The ideal crystal, and its energy (eV) where the file has one; it may lack the keys that ``labels`` name."""
    from ubmd.data.labels import labels_of
    from ubmd.data.structures import read_structures

    structures = read_structures(path, labels, missing_ok=True)
    if len(structures) > 1:
        raise DataError(
            f"{path} holds {len(structures)} structures; crystal.structure must be the ideal crystal alone."
        )
    return structures[0], labels_of(structures[0]).get("energy")


def _sets(
    settings: TrainSettings, base: Path, remark: Callable[[str], None], tell: Callable[[str], None]
) -> tuple[list[Atoms], list[Atoms]]:
    """Training and validation structures."""
    from ubmd.data.split import split
    from ubmd.data.structures import read_contents

    contents = read_contents(base / settings.training_file, settings.labels, remark=remark)
    tell(f"{settings.training_file}: {contents.taken}.")
    if settings.validation_file is None:
        return split(contents.structures, settings.validation_share, settings.seed)
    validation = read_contents(base / settings.validation_file, settings.labels, remark=remark)
    tell(f"{settings.validation_file}: {validation.taken}.")
    return contents.structures, validation.structures


def _remarks(fit: CrystalFit) -> Iterator[str]:
    """Noise, energy, calibration, and what is unusual."""
    posterior = fit.posterior
    limited = " (a lower bound: the labels look free of noise)" if posterior.noise_limited else ""
    yield f"noise or truncation of the forces: {posterior.noise:.3g} eV/Å{limited}"
    if fit.energy:
        yield f"energy of the ideal crystal: {fit.energy:.8g} eV per primitive cell"
    scale = fit.force_scale
    yield (
        f"uncertainties of forces hold at {100 * scale.attainable:.4g} % confidence (factor {scale.scale:.3g} on the "
        f"Bayesian standard deviation)"
    )
    yield from _curvature_remarks(fit)
    if not posterior.converged:
        yield "the evidence has not converged: prior widths and noise may still change"


def _curvature_remarks(fit: CrystalFit) -> Iterator[str]:
    """Whether the ideal crystal is a minimum, in the boxes of the labels and beyond, and what to set if it isn't."""
    from ubmd.potentials.force_constants.curvature import UNSTABLE, commensurate, lowest_curvature, wave_vectors

    if fit.constraint is not None:
        was, now = fit.constraint, fit.validation.force_rmse
        yield (
            f"crystal.stable: {was.rows} inequalities, lowest curvature of the plain fit {was.lowest:.3g} eV/Å^2; "
            f"force RMSE of the validation set {now:.4g} eV/Å with them, {was.validation_force_rmse:.4g} without"
        )
        if fit.posterior.limits is not None:
            least, most = fit.posterior.limits.min(), fit.posterior.limits.max()
            yield (
                "the energy has a lower bound: a wall begins where displacements of neighbours differ by "
                f"{least:.2f} to {most:.2f} Å, as far as those of the labels"
            )
        elif max(fit.basis.orders) > 2:
            yield (
                "orders above 2 have no lower bound: crystal.stable keeps the ideal crystal a minimum, no more; set "
                "crystal.pairs for a bound"
            )
        return
    if 2 not in fit.basis.orders:
        return
    basis, theta = fit.basis, fit.posterior.mean
    found = lowest_curvature(basis, theta, wave_vectors(basis.lattice, fit.boxes))
    inside = lowest_curvature(basis, theta, commensurate(fit.boxes)).curvature
    if found.curvature >= UNSTABLE:
        return
    where = "also in the labels' own box" if inside < UNSTABLE else "in boxes larger than that of the labels"
    cure = "set crystal.stable = true, give crystal.decay, or raise the cutoff of order 2"
    yield (
        f"the ideal crystal is unstable {where}: the energy has a negative curvature ({found.curvature:.3g} eV/Å^2 at "
        f"q = {', '.join(f'{x:.3g}' for x in found.q)}); {cure}"
    )


def _picture(fit: CrystalFit, path: Path) -> Path:
    """Calibrated Bayesian deviation against the true error of the validation forces."""
    from ubmd.analysis.figures import calibration_figure

    errors, scale = fit.validation, fit.force_scale.scale
    panels = {
        "Atoms": (scale * errors.atom_deviation, errors.atom_error),
        "Structures": (scale * errors.largest(errors.atom_deviation), errors.largest(errors.atom_error)),
    }
    names = [
        ("$u_i$, calibrated Bayesian sd (eV/Å)", "RMSE($F_i$) (eV/Å)"),
        ("max $u_i$ (eV/Å)", "max RMSE($F_i$) (eV/Å)"),
    ]
    return calibration_figure(panels, path, names)
