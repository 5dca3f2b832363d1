"""How the report of a run is put together, of either kind: its page, its figures, and where the run comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ubmd.analysis.document import Document, Section
from ubmd.analysis.provenance import add_provenance
from ubmd.analysis.run_data import RunData

D = TypeVar("D", bound=RunData[Any, Any])


def write_report(
    data: D,
    kind: str,
    nothing_yet: str,
    summary: Callable[[D], str],
    sections: Sequence[Callable[[Document, D], None]],
    always: Sequence[Callable[[Document, D], None]],
) -> list[Path]:
    """Write report/*.png, structures.html, report.md and report.html into a run folder.

    Args:
        data: of the run.
        kind: what its title calls the run.
        nothing_yet: sentence for a run without a history.
        summary: of a run with a history.
        sections: add what needs a history, in order.
        always: add what does not.

    Returns:
        The files: pictures in order, structures.html if it can be made, report.md, report.html.
    """
    report = Document(f"Report of the {kind} {data.folder.path.resolve().name}")
    if data.history:
        report.introduction.append(summary(data))
        for add in sections:
            add(report, data)
    else:
        report.introduction.append(nothing_yet)
    for add in always:
        add(report, data)
    add_provenance(report, data.folder, data.settings)
    return [*report.pictures(), *report.beside, *report.write(data.folder.report, "report")]


def rejected_section(report: Document, data: RunData[Any, Any]) -> Section | None:
    """The section on rejected labels; None if there are none, which it then says."""
    section = report.section("Rejected labels")
    if data.rejected:
        return section
    section.text("None: every structure that was sent to the reference got its label.")
    return None
