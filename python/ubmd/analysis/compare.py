"""Several runs side by side; runs that differ in their seed only are one group, with mean and standard deviation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ubmd.analysis import figures
from ubmd.analysis.document import Document
from ubmd.analysis.errors import CalibrationData, calibration_data
from ubmd.analysis.predictions import predict_unseen
from ubmd.analysis.provenance import setting_texts
from ubmd.analysis.run_data import Frames, read_frames
from ubmd.errors import DataError
from ubmd.learning.run_folder import RunFolder, file_hash, read_settings
from ubmd.settings import RunSettings

Curve = tuple[NDArray[Any], NDArray[Any]]

_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the MD steps, and of the labels, that every run reached
# Keys that don't make another group: where things are, how fast they are made, and the seed.
_SAME = ("seed", "run_dir", "workers", "test", "start.file", "training.threads", "training.checkpoint_every")
_ERRORS = {
    "energy RMSE": ("energy_rmse_mev_per_atom", "meV/atom"),
    "force RMSE": ("force_rmse", "eV/Å"),
    "stress RMSE": ("stress_rmse_mpa", "MPa"),
}


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    title: str
    values: dict[str, list[float]]
    """group -> one value per run; NaN where a run has none"""

    def cells(self) -> list[str]:
        """One cell per group: the value, or mean ± sample standard deviation."""
        return [_mean(values) for values in self.values.values()]


class Run:
    """One run, read when needed.

    Raises:
        DataError: the folder holds no run, or none of its iterations has finished.
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.settings: RunSettings = read_settings(self.folder)
        self.history: list[dict[str, Any]] = self.folder.read_history()
        if not self.history:
            raise DataError(f"No iteration of the run in {path} has finished: there is nothing to compare yet.")

    @cached_property
    def frames(self) -> Frames:
        """All stored MD frames."""
        return read_frames(self.folder.path)

    def errors(self) -> CalibrationData | None:
        """Errors and uncertainties on structures that the models have not seen; None if there are none."""
        found = predict_unseen(self.folder, self.history)
        return calibration_data(found.structures, found.predictions) if found else None


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and what they have in common."""

    groups: dict[str, list[Run]]
    set_name: str
    """set whose errors are compared: 'test' if every run has it, else 'valid'"""

    @property
    def runs(self) -> list[Run]:
        """All runs of all groups."""
        return [run for group in self.groups.values() for run in group]

    def each(self, function: Callable[[Run], Any]) -> dict[str, list[Any]]:
        """``function`` of every run, by group."""
        return {name: [function(run) for run in runs] for name, runs in self.groups.items()}


def compare(paths: Sequence[Path], out: Path, names: Sequence[str] | None = None) -> tuple[list[Row], list[Path]]:
    """Compare runs; writes comparison.html, .md, .json and the pictures into ``out``.

    Args:
        paths: run folders.
        out: folder for the results.
        names: of the groups, in the order in which they first appear; by default made from the folders' names.

    Returns:
        (rows of the table, files written).

    Raises:
        DataError: a folder holds no run, or nothing to compare yet.
    """
    comparison = _group([Run(Path(path)) for path in paths], names)
    rows = _rows(comparison)
    document = Document(f"Comparison of {len(comparison.runs)} runs in {len(comparison.groups)} groups")
    _overview(document, comparison)
    _numbers(document, comparison, rows)
    _pictures(document, comparison, Path(out))
    written = document.write(Path(out), "comparison")
    record = Path(out) / "comparison.json"
    record.write_text(json.dumps({row.title: row.values for row in rows}, indent=1, ensure_ascii=False) + "\n")
    return rows, [*document.pictures(), *written, record]


# ------------------------------------------------------------------------------------------ groups


def _group(runs: Sequence[Run], names: Sequence[str] | None) -> Comparison:
    """Runs by their settings without the seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_identity(run.settings), sort_keys=True), []).append(run)
    if names is not None and len(names) != len(groups):
        raise DataError(f"{len(names)} names for {len(groups)} groups: runs that differ in their seed only are one.")
    chosen = list(names) if names is not None else _names(list(groups.values()))
    tested = all(run.history[-1].get("test") for run in runs)
    return Comparison(dict(zip(chosen, groups.values(), strict=True)), "test" if tested else "valid")


def _identity(settings: RunSettings) -> dict[str, str]:
    """Every key that makes a group, with its value as text."""
    return {
        key: value
        for key, value in setting_texts(settings).items()
        if not any(key == name or key.startswith(name + ".") for name in _SAME)
    }


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Folder names; without the seed's number at their end for several runs of one group."""
    names = []
    for runs in groups:
        own = [run.folder.path.resolve().name for run in runs]
        bare = {re.sub(r"[ _.-]*(seed|s|run)?[ _.-]*\d+$", "", name) or name for name in own}
        names.append(bare.pop() if len(bare) == 1 and len(own) > 1 else own[0])
    return [name if names.count(name) == 1 else f"{name} ({k + 1})" for k, name in enumerate(names)]


# ------------------------------------------------------------------------------------------ numbers


def _rows(comparison: Comparison) -> list[Row]:
    """The table."""
    rows = []
    for what, curves in _explored(comparison).items():
        common = min(int(steps[-1]) for group in curves.values() for steps, _ in group)
        for mark in (round(share * common) for share in _SHARES):
            values = {
                name: [float(np.interp(mark, np.append(0, x), np.append(0.0, y))) for x, y in group]
                for name, group in curves.items()
            }
            rows.append(Row(f"{what} after {mark:,} MD steps", values))
    for labels in _common_labels(comparison):
        rows += _error_rows(comparison, f"at {labels} labels", lambda run, at=labels: _entry_at(run, at))  # type: ignore[misc]
    final = {"labels": "labels", "MD steps": "md_steps", "coverage": "coverage"}
    for title, key in final.items():
        values = comparison.each(lambda run, key=key: _float(run.history[-1].get(key)))  # type: ignore[misc]
        rows.append(Row(f"{title} at the end", values))
    rows += _error_rows(comparison, "at the end", lambda run: run.history[-1])
    seconds = comparison.each(lambda run: sum(sum((e.get("seconds") or {}).values()) for e in run.history) / 60)
    rows.append(Row("wall time of the iterations, min", seconds))
    return [row for row in rows if any(np.isfinite(v) for values in row.values.values() for v in values)]


def _error_rows(comparison: Comparison, when: str, entry: Callable[[Run], dict[str, Any]]) -> list[Row]:
    """Rows of all errors in some entry of the histories."""
    return [
        Row(
            f"{title} {when}, {unit}",
            comparison.each(lambda run, key=key: _float((entry(run).get(comparison.set_name) or {}).get(key))),  # type: ignore[misc]
        )
        for title, (key, unit) in _ERRORS.items()
    ]


def _explored(comparison: Comparison) -> dict[str, dict[str, list[Curve]]]:
    """What was explored -> group -> growth against MD steps of every run; empty without torsions or moving cells."""
    runs = comparison.runs
    if not all(len(run.frames) for run in runs):
        return {}
    found: dict[str, dict[str, list[Curve]]] = {}
    torsions = runs[0].settings.variables.torsions
    if len(torsions) >= 2 and all(run.settings.variables.torsions == torsions for run in runs):
        indices = list(torsions.values())[:2]
        found["coverage"] = comparison.each(lambda run: run.frames.coverage_curve(indices))
    if all(run.frames.volumes() is not None for run in runs):
        found["volume range (Å³/atom)"] = comparison.each(_volume_curve)
    return found


def _volume_curve(run: Run) -> Curve:
    """(MD steps, largest minus smallest volume so far)."""
    volumes = run.frames.volumes()
    assert volumes is not None
    return run.frames.md_steps, np.maximum.accumulate(volumes) - np.minimum.accumulate(volumes)


def _common_labels(comparison: Comparison) -> list[int]:
    """Up to five sizes of the data set at which every run has a model, less one at which all of them end."""
    sizes = [{entry["labels"] for entry in run.history} for run in comparison.runs]
    common = sorted(set.intersection(*sizes))
    chosen = {common[round(share * (len(common) - 1))] for share in (0.0, *_SHARES)} if common else set()
    at_the_end = {run.history[-1]["labels"] for run in comparison.runs}
    return sorted(chosen - (at_the_end if len(at_the_end) == 1 else set()))


def _entry_at(run: Run, labels: int) -> dict[str, Any]:
    return next(entry for entry in run.history if entry["labels"] == labels)


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _mean(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation of the runs that have a value."""
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return "-"
    mean = float(known.mean())
    digits = 0 if abs(mean) >= 1000 or (known == known.round()).all() else 1 if abs(mean) >= 100 else 3
    if len(known) == 1:
        return f"{mean:,.{digits}f}"
    deviation = float(known.std(ddof=1))
    if digits == 0 and 0 < deviation < 10:
        digits = 1
    return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"


# ------------------------------------------------------------------------------------------ document


def _overview(document: Document, comparison: Comparison) -> None:
    """What was compared, and what makes the groups different."""
    section = document.section("Runs")
    rows = [
        [name, str(len(runs)), ", ".join(str(run.settings.seed) for run in runs), _folders(runs)]
        for name, runs in comparison.groups.items()
    ]
    section.table(["group", "runs", "seeds", "folders"], rows)
    first = [setting_texts(runs[0].settings) for runs in comparison.groups.values()]
    keys = [key for key in first[0] if any(a.get(key) != b.get(key) for a, b in pairwise(first))]
    keys = [key for key in keys if key not in ("run_dir", "seed")]
    if keys:
        section = document.section("Settings that differ between the groups")
        section.table(["key", *comparison.groups], [[key, *(texts.get(key, "-") for texts in first)] for key in keys])


def _folders(runs: Sequence[Run]) -> str:
    return ", ".join(run.folder.path.name for run in runs)


def _numbers(document: Document, comparison: Comparison, rows: Sequence[Row]) -> None:
    section = document.section("Numbers")
    section.table(["", *comparison.groups], [[row.title, *row.cells()] for row in rows])
    what = "the test set" if comparison.set_name == "test" else "each run's own validation labels (no common test set)"
    section.text(
        f"Mean ± sample standard deviation over the runs of a group. Errors are those on {what}. Coverage and volumes "
        "count stored frames, at equal numbers of MD steps of all replicas together."
    )
    if comparison.set_name == "test" and len({file_hash(run.folder.test) for run in comparison.runs}) > 1:
        section.text("Careful: the runs have different test sets, so their errors are not quite comparable.")


def _pictures(document: Document, comparison: Comparison, out: Path) -> None:
    section = document.section("Learning curves")
    curves = comparison.each(lambda run: _learning_curve(run, comparison.set_name))
    path = figures.group_learning_figure(curves, out / "learning_curves.png")
    bars = "bars: standard deviation over the runs at equal numbers of labels"
    section.picture(path, f"Errors against labels, and against the MD steps before the training; {bars}")
    explored = _explored(comparison)
    if explored:
        section = document.section("Exploration")
    for what, growth in explored.items():
        name, title = ("coverage.png", "Coverage of torsion space") if what == "coverage" else ("volumes.png", what)
        path = figures.coverage_figure(growth, out / name, what=title[0].upper() + title[1:].rstrip(","))
        section.picture(path, f"{title.rstrip(',')} against MD steps, one thin line per run")
    found = comparison.each(lambda run: run.errors())
    panels = {name: _pooled(errors) for name, errors in found.items() if all(errors)}
    if panels:
        section = document.section("Uncertainty against error")
        path = figures.group_calibration_figure(panels, out / "calibration.png")
        what = (
            "Newest models on their test sets"
            if comparison.set_name == "test"
            else "New labels, by the models that selected them (or test sets, where runs have one)"
        )
        section.picture(path, f"{what}: largest uncertainty of a structure against its largest error")


def _learning_curve(run: Run, set_name: str) -> NDArray[np.float64]:
    """[K, 5]: labels, MD steps before the training, RMSE of energy (meV/atom), force (eV/Å) and stress (MPa)."""
    before = [0, *(entry["md_steps"] for entry in run.history)]
    rows = [
        [entry["labels"], before[k], *(_float((entry.get(set_name) or {}).get(key)) for key, _ in _ERRORS.values())]
        for k, entry in enumerate(run.history)
    ]
    return np.array(rows, dtype=np.float64)


def _pooled(errors: Sequence[CalibrationData]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(largest u, largest error) of the structures of all runs of a group."""
    return np.concatenate([e.largest_u for e in errors]), np.concatenate([e.largest_error for e in errors])
