"""The report folder of a run: pictures, and a text with tables that names them."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ubmd.analysis import figures
from ubmd.analysis.coverage import coverage
from ubmd.analysis.errors import CalibrationData, calibration_data, pearson, share_covered, spearman
from ubmd.analysis.run_data import Frames, read_frames, read_history
from ubmd.analysis.torsions import amide_torsions, count_cis, torsions
from ubmd.calculator import Evaluator
from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.settings import RunSettings


@dataclass
class _Report:
    """Text and pictures, growing section by section."""

    folder: Path
    lines: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)

    def section(self, title: str, *lines: str) -> None:
        self.lines += [f"## {title}", "", *lines, ""]

    def picture(self, path: Path, caption: str) -> None:
        self.pictures.append(path)
        self.lines += [f"![{caption}]({path.name})", ""]


def make_report(run: Path) -> list[Path]:
    """Write report/*.png and report/report.md of a run folder from what is there; returns the files.

    Sections whose data the run does not have (no test set, no torsions, no finished iteration) are left out.

    Raises:
        DataError: the folder holds no run.
    """
    run = Path(run)
    settings = _read_settings(run)
    history = read_history(run)
    report = _Report(run / "report")
    report.lines += [f"# Report of the run {run.resolve().name}", ""]
    if not history:
        report.lines += ["No iteration has finished yet.", ""]
    else:
        _summary(report, settings, history)
        _learning(report, history)
        _calibration(report, run)
        frames = read_frames(run)
        if len(frames):
            _exploration(report, settings, frames)
    return [*report.pictures, _write(report)]


def _read_settings(run: Path) -> RunSettings:
    path = run / "settings.toml"
    if not path.exists():
        raise DataError(f"There is no run in {run}: it has no settings.toml.")
    return RunSettings.model_validate(tomllib.loads(path.read_text()))


def _write(report: _Report) -> Path:
    report.folder.mkdir(parents=True, exist_ok=True)
    path = report.folder / "report.md"
    path.write_text("\n".join(report.lines))
    return path


def _summary(report: _Report, settings: RunSettings, history: list[dict[str, Any]]) -> None:
    """What was run, and one row per iteration."""
    last = history[-1]
    bias = f"strength {settings.bias.force:g}" if settings.bias.force else "none (plain MD)"
    report.lines += [
        f"{last['labels']} labels after {len(history)} iterations and {last['md_steps']:,} MD steps; "
        f"{settings.md.temperature:g} K, bias {bias}, selection {settings.selection.method}, seed {settings.seed}.",
        "",
    ]
    head = ["iteration", "labels", "MD steps", "energy RMSE (meV/atom)", "force RMSE (eV/Å)", "coverage"]
    rows = [
        [
            str(entry["iteration"]),
            str(entry["labels"]),
            f"{entry['md_steps']:,}",
            _number(_test(entry, "energy_rmse_mev_per_atom"), ".2f"),
            _number(_test(entry, "force_rmse"), ".4f"),
            _number(entry.get("coverage"), ".3f"),
        ]
        for entry in history
    ]
    report.section("Iterations", *_table(head, rows), "", "Errors are those of the held-out test set.")


def _learning(report: _Report, history: list[dict[str, Any]]) -> None:
    tested = [entry for entry in history if _test(entry, "force_rmse") is not None]
    if not tested:
        return
    path = figures.learning_curve_figure(
        [entry["labels"] for entry in tested],
        [entry["test"]["energy_rmse_mev_per_atom"] for entry in tested],
        [entry["test"]["force_rmse"] for entry in tested],
        report.folder / "learning_curve.png",
    )
    report.section("Learning curve", "Errors on the held-out test set against the number of labels.")
    report.picture(path, "test errors against labels")


def _calibration(report: _Report, run: Path) -> None:
    """Uncertainty against error of the newest model on the test set."""
    if not ((run / "model.pt").exists() and (run / "test.extxyz").exists()):
        return
    structures = read_structures(run / "test.extxyz", labelled=True)
    evaluator = Evaluator(run / "model.pt")
    data = calibration_data(structures, evaluator.predict(structures))
    cis = count_cis(structures, amide_torsions(structures[0]))
    report.section(
        "Uncertainty against error",
        f"Newest model on the {len(structures)} structures of the test set"
        + (f" ({cis} of them with a cis amide bond)" if amide_torsions(structures[0]) else "")
        + f": energy RMSE {data.energy_rmse:.2f} meV/atom, force RMSE {data.force_rmse:.4f} eV/Å.",
        "",
        *_calibration_table(data, evaluator.metadata["uncertainty"]),
    )
    path = figures.calibration_figure(data.largest_u, data.largest_error, report.folder / "calibration.png")
    report.picture(path, "largest uncertainty against largest error")


def _calibration_table(data: CalibrationData, uncertainty: dict[str, Any]) -> list[str]:
    """Promised and found shares of errors under their uncertainty, and correlations."""
    rows = []
    for name, error, u, record in [
        ("structures: energy error, u (eV/atom)", data.energy_error, data.energy_u, uncertainty["energy"]),
        ("atoms: RMSE(F_i), u_i (eV/Å)", data.atom_error, data.atom_u, uncertainty["forces"]),
        ("structures: max RMSE(F_i), max u_i (eV/Å)", data.largest_error, data.largest_u, uncertainty["forces"]),
    ]:
        rows.append(
            [name, f"{record['attainable']:.3f}", f"{share_covered(error, u):.3f}"]
            + [_number(correlation(u, error), ".2f") for correlation in (pearson, spearman)]
        )
    head = ["what", "promised share", "share found", "Pearson", "Spearman"]
    return [
        *_table(head, rows),
        "",
        "The share counts errors that do not exceed their uncertainty. Calibrated on "
        f"{uncertainty['energy']['n_calibration']} structures like the training data: "
        "a test set from another distribution may have another share.",
    ]


def _exploration(report: _Report, settings: RunSettings, frames: Frames) -> None:
    """Coverage, Ramachandran picture, and the uncertainty along the replicas."""
    chosen = list(settings.variables.torsions.items())[:2]
    if chosen:
        names, indices = [name for name, _ in chosen], [index for _, index in chosen]
        angles = torsions(frames.structures, indices)
        share = coverage(angles)
        report.section(
            "Exploration",
            f"Coverage of ({', '.join(names)}): {share:.3f}, counted over {len(frames)} stored frames "
            f"(every {settings.md.frames_every} steps, and the frames that stopped a replica).",
        )
        if len(names) == 2:
            title = f"{len(frames)} frames, coverage {share:.2f}"
            path = figures.ramachandran_figure(
                angles, frames.iteration, report.folder / "ramachandran.png", names, title
            )
            report.picture(path, "visited torsions")
        path = figures.coverage_figure({"": [frames.coverage_curve(indices)]}, report.folder / "coverage.png")
        report.picture(path, "coverage against MD steps")
        amides = amide_torsions(frames.structures[0])
        if amides:
            report.lines += [f"Frames with a cis amide bond: {count_cis(frames.structures, amides)}.", ""]
    report.section("Uncertainty along the replicas")
    path = figures.uncertainty_figure(
        frames.iteration,
        frames.replica,
        frames.step,
        frames.max_u,
        settings.loop.threshold,
        report.folder / "uncertainty.png",
    )
    report.picture(path, "uncertainty along replicas")


def _test(entry: dict[str, Any], key: str) -> float | None:
    return (entry.get("test") or {}).get(key)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown table with columns of equal width, so that it also reads well as plain text."""
    widths = np.max([[len(cell) for cell in row] for row in [head, *rows]], axis=0)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(head), line(["-" * width for width in widths]), *(line(row) for row in rows)]
