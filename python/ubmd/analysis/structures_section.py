"""The section of a report on the structures themselves: pictures and a table of the worst, a link to the viewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ubmd.analysis import viewer
from ubmd.analysis.document import Cell, Document, Link, Section
from ubmd.analysis.shown_structures import Shown
from ubmd.analysis.structure_figures import structures_figure
from ubmd.texts import counted, number

_DRAWN = 6
_LISTED = 4


def write_structures(report: Document, structures: Sequence[Shown], folder: Path, u_name: str, error_name: str) -> None:
    """Add the section, and write the viewer's page beside the report where chemiscope is installed.

    Args:
        report: to add to.
        structures: in the order of the viewer's page.
        folder: of the report.
        u_name, error_name: what `Shown.u` and `Shown.error` are, without units.
    """
    if not structures:
        return
    section = report.section("Structures")
    link = viewer.link_to_viewer("open the structures")
    if link:
        title = report.title.replace("Report of", "Structures of", 1)
        report.beside.append(viewer.write_viewer(structures, folder / viewer.PAGE, title, u_name, error_name))
        section.text(f"{_how_many(structures)} can be turned and compared in a page beside this one:", link)
    else:
        section.text(viewer.MISSING)
    kinds = _kinds(structures)
    by_kind = [[k for k in range(len(kinds)) if kinds[k] == kind] for kind in dict.fromkeys(kinds)]
    worst = {_title(structures[k], u_name, error_name): structures[k] for k in _in_turn(by_kind)}
    _pictures(section, worst, folder)
    rows: list[list[Cell]] = [
        [
            Link(str(k), f"{viewer.PAGE}#{k}") if link else str(k),
            structures[k].kind,
            structures[k].place,
            number(structures[k].u, ".3f"),
            number(structures[k].error, ".3f"),
            structures[k].note,
        ]
        for group in by_kind
        for k in group[:_LISTED]
    ]
    head = ["structure", "kind", "origin", f"{u_name} (eV/Å)", f"{error_name} (eV/Å)", "note"]
    keep = [k for k in range(len(head)) if any(row[k] not in ("", "-") for row in rows)]
    section.table([head[k] for k in keep], [[row[k] for k in keep] for row in rows])
    section.text(f"Of each kind the {_LISTED} with the largest errors, or uncertainties where no error is known.")


def _kinds(structures: Sequence[Shown]) -> list[str]:
    return [one.kind for one in structures]


def _how_many(structures: Sequence[Shown]) -> str:
    """'40 labels, 3 rejected structures'."""
    kinds = _kinds(structures)
    return ", ".join(counted(kinds.count(kind), kind) for kind in dict.fromkeys(kinds))


def _in_turn(groups: Sequence[Sequence[int]]) -> list[int]:
    """The first of each group, then the second of each, and so on."""
    return [k for row in zip_longest(*groups) for k in row if k is not None]


def _pictures(section: Section, worst: Mapping[str, Shown], folder: Path) -> None:
    """The first structures, by their titles, whose atoms have uncertainties, or else forces."""
    by_u = {title: (one.atoms, one.atomic_u) for title, one in worst.items() if one.atomic_u is not None}
    by_force = {title: (one.atoms, _lengths(one.forces)) for title, one in worst.items() if one.forces is not None}
    chosen = dict(list((by_u or by_force).items())[:_DRAWN])
    if not chosen:
        return
    name = "$u_i$ (eV/Å)" if by_u else "Force on the atom (eV/Å)"
    path = structures_figure(chosen, folder / "structures.png", name)
    what = "uncertainty" if by_u else "force of the reference"
    section.picture(path, f"Structures with the largest errors or uncertainties, atoms coloured by the {what}")


def _lengths(forces: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the forces on the atoms [N, 3]: [N]."""
    return np.linalg.norm(forces, axis=1)  # type: ignore[no-any-return]


def _title(one: Shown, u_name: str, error_name: str) -> str:
    known = [f"{name} {x:.2g} eV/Å" for name, x in ((u_name, one.u), (error_name, one.error)) if np.isfinite(x)]
    return "\n".join([one.kind, one.place, *known])
