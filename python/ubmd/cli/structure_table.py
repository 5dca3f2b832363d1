"""What a file of structures holds, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from rich.table import Table

from ubmd.data.labels import EV_PER_A3_IN_MPA, labels_of


def describe(structures: Sequence[Atoms], title: str | None = None) -> Table:
    """A table of what was found: counts, elements, labels and ranges with units."""
    labels = [labels_of(atoms) for atoms in structures]
    table = Table(title=title)
    for column in ("quantity", "found", "smallest", "mean", "largest", "unit"):
        table.add_column(column, justify="left" if column in ("quantity", "found", "unit") else "right")
    table.add_row("structures", str(len(structures)))
    table.add_row("elements", _element_counts(structures))
    periodic = sum(bool(atoms.pbc.any()) for atoms in structures)
    table.add_row("periodic", f"{periodic} of {len(structures)}")
    _range_row(table, "atoms", [len(atoms) for atoms in structures], len(structures), "")
    _range_row(table, "volume", [a.get_volume() for a in structures if a.cell.rank == 3], len(structures), "Å^3")
    per_atom = [found["energy"] / len(a) for a, found in zip(structures, labels, strict=True) if "energy" in found]
    _range_row(table, "energy", per_atom, len(structures), "eV/atom")
    norms = [np.linalg.norm(found["forces"], axis=1) for found in labels if "forces" in found]
    _range_row(table, "|force|", norms, len(structures), "eV/Å")
    pressure = [-found["stress"][:3].mean() * EV_PER_A3_IN_MPA for found in labels if "stress" in found]
    _range_row(table, "pressure", pressure, len(structures), "MPa")
    return table


def _element_counts(structures: Sequence[Atoms]) -> str:
    counts: Counter[str] = Counter()
    for atoms in structures:
        counts.update(atoms.get_chemical_symbols())
    order = {symbol: int(Atoms(symbol).numbers[0]) for symbol in counts}
    return ", ".join(f"{symbol} {counts[symbol]}" for symbol in sorted(counts, key=order.__getitem__))


def _range_row(table: Table, name: str, values: Sequence[Any], total: int, unit: str) -> None:
    """A row with the range of one number per structure, or of one array per structure."""
    found = f"{len(values)} of {total}" if unit else ""
    if not values:
        if name in ("energy", "|force|"):
            table.add_row(name, found)
        return
    flat = np.concatenate([np.atleast_1d(np.asarray(value, dtype=float)) for value in values])
    table.add_row(name, found, *(f"{x:.6g}" for x in (flat.min(), flat.mean(), flat.max())), unit)
