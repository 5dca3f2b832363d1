"""Tables of `ubmd eval`: errors, by element and group, the worst atoms, uncertainties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from ubmd.cli.console import shown
from ubmd.potentials.kinds import kind_of_record
from ubmd.texts import counted

Errors = Mapping[str, Any]
_MEANING = "relative: RMSE over spread of energies, over rms force\nmaxima: the largest of each structure"


def accuracy_table(errors: Errors, record: dict[str, Any]) -> Table:
    """Errors of everything that has labels."""
    made_for = ", ".join(_promise(name, record["uncertainty"]) for name in ("energy", "forces"))
    caption = f"confidence of u: {made_for}\n{_MEANING}"
    if kind_of_record(record).of_crystal and errors["stress_rmse_MPa"] is not None:
        caption += "\nstresses of the model do not include that of the ideal crystal"
    total, labelled = errors["structures"], errors["labelled"]
    which = counted(total, "structure") if labelled == total else f"{labelled} of {total} structures with labels"
    table = Table(title=f"errors: {which}", caption=caption)
    for column in ("quantity", "RMSE", "MAE", "unit", "relative", "errors below u"):
        table.add_column(column)
    for name, unit, text, share in (
        ("energy", "meV_per_atom", "meV/atom", _share(errors["energy_share_below_u"], "structures")),
        ("force", "eV_per_A", "eV/Å", _share(errors["force_share_below_u"], "atoms")),
        ("", "", "", _share(errors["max_force_share_below_u"], "maxima")),
        ("stress", "MPa", "MPa", ""),
    ):
        values = [errors.get(f"{name}_{kind}_{unit}") for kind in ("rmse", "mae")]
        relative = errors.get(f"{name}_rmse_percent")
        if values[0] is not None or (not name and share):
            part = "" if relative is None else f"{relative:.3g} %"
            table.add_row(name, *map(_number, values), text, part, share)
    return table


def _promise(name: str, uncertainty: dict[str, Any]) -> str:
    """The confidence that the uncertainty of energy or forces was calibrated for."""
    record = uncertainty[name]
    if record["n_calibration"] == 0:
        return f"{name} not calibrated"
    return f"{name} {100 * min(record['attainable'], 1 - uncertainty['alpha']):.4g} %"


_Column = tuple[str, str, float]
"""key, format and factor"""

_OF_ELEMENTS: dict[str, _Column] = {
    "force\nRMSE\neV/Å": ("force_rmse_eV_per_A", ".4g", 1.0),
    "relative\n%": ("force_rmse_percent", ".3g", 1.0),
    "largest\nerror\neV/Å": ("max_force_error_eV_per_A", ".4g", 1.0),
    "mean\nu_i\neV/Å": ("mean_u_eV_per_A", ".4g", 1.0),
    "largest\nu_i\neV/Å": ("max_u_largest_eV_per_A", ".4g", 1.0),
    "below\nu_i\n%": ("force_share_below_u", ".1f", 100.0),
}
_OF_GROUPS: dict[str, _Column] = {
    "energy\nRMSE\nmeV/atom": ("energy_rmse_meV_per_atom", ".4g", 1.0),
    "force\nRMSE\neV/Å": ("force_rmse_eV_per_A", ".4g", 1.0),
    "relative\n%": ("force_rmse_percent", ".3g", 1.0),
    "stress\nRMSE\nMPa": ("stress_rmse_MPa", ".4g", 1.0),
    "median\nmax u_i\neV/Å": ("max_u_median_eV_per_A", ".3g", 1.0),
    "maxima\nbelow u\n%": ("max_force_share_below_u", ".1f", 100.0),
}
"""headings in lines: the tables fit into 80 columns"""


def element_table(by_element: Mapping[str, Errors]) -> Table:
    """Force errors and uncertainties of each element."""
    return _rows("element", "atoms", by_element, _OF_ELEMENTS)


def group_table(key: str, groups: Mapping[str, Errors]) -> Table:
    """Errors and uncertainties of groups of structures."""
    return _rows(shown(key), "structures", groups, _OF_GROUPS)


def _rows(first: str, count: str, parts: Mapping[str, Errors], columns: Mapping[str, _Column]) -> Table:
    """One row per part; columns without any number are left out."""
    used = {name: c for name, c in columns.items() if any(part[c[0]] is not None for part in parts.values())}
    table = Table(title=f"by {first}")
    table.add_column(first, overflow="fold")
    for column in (count, *used):
        table.add_column(column, justify="right", no_wrap=True)
    for name, part in parts.items():
        values = [
            _number(None if part[key] is None else factor * part[key], form) for key, form, factor in used.values()
        ]
        table.add_row(shown(name), str(part[count]), *values)
    return table


def worst_table(title: str, rows: Sequence[Mapping[str, Any]], files: bool) -> Table:
    """Frames with their worst atom; ``files``: also of which file."""
    compared = any(row["force_error_eV_per_A"] is not None for row in rows)
    table = Table(title=title)
    if files:
        table.add_column("file", overflow="fold")
    for column in ("frame\nfrom 0", "atom\nfrom 0", "element", *(["RMSE(F_i)\neV/Å"] if compared else []), "u_i\neV/Å"):
        table.add_column(column, justify="left" if column == "element" else "right")
    for row in rows:
        where = [*([shown(row["file"])] if files else []), str(row["frame"]), str(row["atom"]), row["element"]]
        errors = [_number(row["force_error_eV_per_A"])] if compared else []
        table.add_row(*where, *errors, _number(row["u_eV_per_A"]))
    return table


def uncertainty_sentences(errors: Errors) -> Iterator[str]:
    """How large the uncertainties are, and how they go with the errors."""
    if not errors["structures"]:
        return
    values = [errors[f"max_u_{name}_eV_per_A"] for name in ("median", "percentile_95", "largest")]
    middle, high, largest = (_number(value, ".3g") for value in values)
    yield (
        f"max u_i of {counted(errors['structures'], 'structure')}: median {middle} eV/Å, 95 % are at most {high} eV/Å, "
        f"the largest is {largest} eV/Å."
    )
    rank, linear = (errors[f"{name}_max_u_error"] for name in ("spearman", "pearson"))
    if rank is not None and linear is not None:
        yield f"Correlation of max u_i and largest force error: Spearman {rank:.2f}, Pearson {linear:.2f}."


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


def _share(share: float | None, of_what: str) -> str:
    return "" if share is None else f"{100 * share:.1f} % of {of_what}"
