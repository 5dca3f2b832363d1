"""Tables on the terminal: structures, accuracy, what a model or a run is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ubmd.cli.console import shown
from ubmd.measure.confidence import shortfall
from ubmd.potentials.kinds import kind_of_record
from ubmd.texts import order_name

if TYPE_CHECKING:
    from ubmd.potentials.force_constants.fit import CrystalFit


def confidence_remarks(metadata: Mapping[str, Any]) -> list[str]:
    """A sentence on a model file that was calibrated on too few structures; none for others, and for crystals."""
    record = metadata.get("uncertainty", {})
    if "alpha" not in record or kind_of_record(dict(metadata)).of_crystal:
        return []
    # files of other programs may lack parts of the record
    attained = [record.get(name, {}).get("attainable", 1.0) for name in ("energy", "forces")]
    sentence = shortfall(attained[0], attained[1], record["alpha"])
    return [sentence] if sentence else []


def info_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield prefix + key, " ".join(str(item) for item in value)
        else:
            yield prefix + key, f"{value:.6g}" if isinstance(value, float) else str(value)


def fit_tables(fit: CrystalFit) -> list[Table]:
    """Parameters by order, and errors."""
    posterior, validation = fit.posterior, fit.validation
    orders = _orders_table(fit.basis.all_cutoffs, posterior.counts, posterior.gamma, posterior.alpha, fit.order_shares)
    errors = Table(title="errors")
    for column in ("set", "structures", "force RMSE, eV/Å", "of the rms force", "energy RMSE, meV/atom", "z-score"):
        errors.add_column(column, justify="left" if column == "set" else "right")
    rmse, rms = fit.training_force_rmse, fit.training_rms_force
    count = fit.equations.sums["forces"].structures
    errors.add_row("training", str(count), f"{rmse:.4g}", f"{100 * rmse / rms:.3g} %", "", "")
    energy = validation.energy_rmse
    errors.add_row(
        "validation",
        str(len(validation.sizes)),
        f"{validation.force_rmse:.4g}",
        f"{100 * validation.force_rmse / validation.rms_force:.3g} %",
        "" if energy is None else f"{1000 * energy:.4g}",
        f"{validation.z_score(posterior.noise):.3g}",
    )
    return [orders, errors]


def _orders_table(
    cutoffs: Mapping[int, float],
    counts: Mapping[int, int],
    gamma: Mapping[int, float],
    alpha: Mapping[int, float],
    shares: Mapping[int, float] | None = None,
) -> Table:
    """One row per order; ``shares`` of the rms force are known right after a training only."""
    columns = ["order", "cutoff, Å", "parameters", "determined by the data", "prior width, eV/Å^order"]
    table = Table(title="parameters by order")
    for column in [*columns, *(["rms force, share of the labels'"] if shares else [])]:
        table.add_column(column, justify="right")
    for order, count in counts.items():
        known = f"{gamma[order]:.1f} = {100 * gamma[order] / count:.3g} %"
        row = [order_name(order), f"{cutoffs[order]:g}", str(count), known, f"{alpha[order] ** -0.5:.3g}"]
        table.add_row(*row, *([f"{100 * shares[order]:.3g} %"] if shares else []))
    total, all_known = sum(counts.values()), sum(gamma.values())
    table.add_section()
    table.add_row("all", "", str(total), f"{all_known:.1f} = {100 * all_known / total:.3g} %")
    return table


def info_tables(metadata: dict[str, Any], title: str) -> list[Table]:
    """The record of a crystal's file: what a reader wants first, parameters by order, then the rest."""
    lattice, regression, uncertainty = metadata["lattice"], metadata["regression"], metadata["uncertainty"]
    elements = [metadata["elements"][k] for k in lattice["species"]]
    head = info_table(title, ("what", "value"))
    limit, noise = lattice["max_displacement"], regression["noise"]["forces"]
    rows = {
        "kind": "force constants of a crystal",
        "space group": metadata.get("space_group") or "not recorded",
        "primitive cell": f"{len(elements)} atoms: {' '.join(elements)}",
        "parameters P": str(uncertainty["projections"]),
        "determined by the data γ/P": f"{100 * regression['determined']:.3g} %",
        "noise or truncation": f"{noise:.3g} eV/Å",
        "largest displacement": f"{limit:.3g} Å (simulations stop beyond it)",
        "energy of the ideal crystal": f"{lattice['energy']:.8g} eV per primitive cell",
    }
    for row in rows.items():
        head.add_row(*map(shown, row))
    by_order = (
        {int(order): value for order, value in record.items()}
        for record in (
            metadata["cutoffs"],
            metadata["parameters"],
            regression["gamma"],
            regression["prior_precision"],
        )
    )
    rest = info_table("record", ("key", "value"))
    beside = {"cutoffs", "parameters", "lattice", "space_group"}
    kept = {key: value for key, value in metadata.items() if key not in beside}
    kept["lattice"] = {key: value for key, value in lattice.items() if key != "sites"}
    for row in flat(kept):
        rest.add_row(*map(shown, row))
    return [head, _orders_table(*by_order), rest]
