"""Several runs side by side; runs that differ in their seed only are one group, with mean and standard deviation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ubmd.analysis import figures, trajectory_figures
from ubmd.analysis.document import Document, Section
from ubmd.analysis.provenance import setting_texts
from ubmd.analysis.run_data import value_or_nan
from ubmd.analysis.run_groups import ERRORS, Comparison, Curve, Run, group_runs
from ubmd.analysis.trajectory import SHORTEST, Trajectory
from ubmd.files import file_hash, write_text
from ubmd.measure.autocorrelation import mean_autocorrelation
from ubmd.measure.errors import CalibrationData
from ubmd.measure.torsions import torsions
from ubmd.measure.volumes import errors_by_volume, slow_wave, volume_edges
from ubmd.runs.records import IterationEntry, SetName
from ubmd.valid_json import valid_json

_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the MD steps, and of the labels, that every run reached
_COVERAGE = "coverage"
_VOLUMES = "volume range (Å³/atom)"


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    title: str
    values: dict[str, list[float]]
    """group -> one value per run; NaN where a run has none"""

    def cells(self) -> list[str]:
        """One cell per group: the value, or mean ± sample standard deviation."""
        return [_mean(values) for values in self.values.values()]


def compare(
    paths: Sequence[Path], out: Path, names: Sequence[str] | None = None, run_models: bool = False
) -> tuple[list[Row], list[Path]]:
    """Compare runs; writes comparison.html, .md, .json and the figures into ``out``.

    Args:
        paths: run folders.
        out: folder for the results.
        names: of the groups, in the order in which they first appear; by default made from the folders' names.
        run_models: run the model files of folders that don't have what their models say.

    Returns:
        (rows of the table, files written).

    Raises:
        DataError: a folder holds no run, a dynamic one, or nothing to compare yet.
    """
    comparison = group_runs([Run(Path(path), run_models) for path in paths], names)
    rows = _rows(comparison)
    document = Document(f"Comparison of {len(comparison.runs)} runs in {len(comparison.groups)} groups")
    changed = _overview(document, comparison)
    _numbers(document, comparison, rows)
    _pictures(document, comparison, Path(out))
    _dependence(document, rows, changed, Path(out))
    _left_out(document, comparison)
    written = document.write(Path(out), "comparison")
    record = Path(out) / "comparison.json"
    values = valid_json({row.title: row.values for row in rows})
    write_text(record, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return rows, [*document.pictures(), *written, record]


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
    for labels in _shown_labels(comparison):
        rows += _learning_rows(comparison, labels)
    last = comparison.each(lambda run: run.history[-1])
    rows.append(Row("labels at the end", _numbers_of(last, lambda entry: entry.labels)))
    rows.append(Row("MD steps at the end", _numbers_of(last, lambda entry: entry.md_steps)))
    rows.append(Row("coverage at the end", _numbers_of(last, lambda entry: entry.coverage)))
    for k, (title, unit) in enumerate(ERRORS.items()):
        values = _numbers_of(last, lambda entry, k=k: entry.rmse_on(comparison.set_name)[k])  # type: ignore[misc]
        rows.append(Row(f"{title} at the end, {unit}", values))
    measured = comparison.each(lambda run: run.history[-1].errors_on(comparison.set_name))
    behind = {
        name: [value_or_nan(each.structures if each else None) for each in group] for name, group in measured.items()
    }
    rows.append(Row(f"structures behind these errors ({comparison.set_name})", behind))
    rows += _isomer_rows(comparison)
    rows.append(Row("autocorrelation time of positions, ps", comparison.each(lambda run: run.times.positions)))
    rows.append(Row("autocorrelation time of max u, ps", comparison.each(lambda run: run.times.uncertainty)))
    rows.append(Row("wall time until the last model, min", comparison.each(lambda run: run.minutes())))
    return [row for row in rows if any(np.isfinite(v) for values in row.values.values() for v in values)]


def _numbers_of(
    entries: dict[str, list[IterationEntry]], value: Callable[[IterationEntry], float | None]
) -> dict[str, list[float]]:
    """A number of each entry; NaN where it has none."""
    return {name: [value_or_nan(value(entry)) for entry in group] for name, group in entries.items()}


def _isomer_rows(comparison: Comparison) -> list[Row]:
    """Rows of the errors on trans and cis amides; empty unless the test sets have both."""
    found = comparison.each(lambda run: run.isomer_errors())
    return [
        Row(
            f"{title} at the end, {name} amides, {unit}",
            {
                group: [value_or_nan(run[name].rmse[k] if name in run else None) for run in runs]
                for group, runs in found.items()
            },
        )
        for name in ("trans", "cis")
        for k, (title, unit) in enumerate(ERRORS.items())
    ]


def _learning_rows(comparison: Comparison, labels: int) -> list[Row]:
    """Rows of all errors at a number of labels."""
    values = comparison.each(
        lambda run: figures.at_labels(_learning_curve(run, comparison.set_name), [labels])[0, 2:].tolist()
    )
    return [
        Row(f"{title} at {labels} labels, {unit}", {name: [run[k] for run in runs] for name, runs in values.items()})
        for k, (title, unit) in enumerate(ERRORS.items())
    ]


def _explored(comparison: Comparison) -> dict[str, dict[str, list[Curve]]]:
    """What was explored -> group -> growth against MD steps of every run; empty without torsions or moving cells."""
    if not all(len(run.frames) for run in comparison.runs):
        return {}
    found: dict[str, dict[str, list[Curve]]] = {}
    indices = list(comparison.torsions().values())
    if indices:
        found[_COVERAGE] = comparison.each(lambda run: run.frames.coverage_curve(indices))
    if all(run.frames.volumes() is not None for run in comparison.runs):
        found[_VOLUMES] = comparison.each(_volume_curve)
    return found


def _volume_curve(run: Run) -> Curve:
    """(MD steps, largest minus smallest volume so far)."""
    volumes = run.frames.volumes()
    assert volumes is not None
    return run.frames.md_steps, np.maximum.accumulate(volumes) - np.minimum.accumulate(volumes)


def _shown_labels(comparison: Comparison) -> list[int]:
    """Up to five sizes of the data set that every run reached, less one at which all of them end."""
    curves = [_learning_curve(run, comparison.set_name) for run in comparison.runs]
    shared = figures.shared_labels(curves)
    chosen = {int(shared[round(share * (len(shared) - 1))]) for share in (0.0, *_SHARES)} if len(shared) else set()
    at_the_end = {int(curve[-1, 0]) for curve in curves}
    return sorted(chosen - (at_the_end if len(at_the_end) == 1 else set()))


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


def _overview(document: Document, comparison: Comparison) -> dict[str, list[str]]:
    """What was compared, and what makes the groups different: key -> value of each group."""
    section = document.section("Runs")
    rows = [
        [name, str(len(runs)), ", ".join(str(run.settings.seed) for run in runs), _folders(runs)]
        for name, runs in comparison.groups.items()
    ]
    section.table(["group", "runs", "seeds", "folders"], rows)
    first = [setting_texts(runs[0].settings) for runs in comparison.groups.values()]
    every = dict.fromkeys(key for texts in first for key in texts)  # kinds of networks have keys of their own
    keys = [key for key in every if any(a.get(key) != b.get(key) for a, b in pairwise(first))]
    changed = {key: [texts.get(key, "-") for texts in first] for key in keys if key not in ("run_dir", "seed")}
    if changed:
        section = document.section("Settings that differ between the groups")
        section.table(["key", *comparison.groups], [[key, *values] for key, values in changed.items()])
    return changed


def _folders(runs: Sequence[Run]) -> str:
    return ", ".join(run.folder.path.name for run in runs)


def _numbers(document: Document, comparison: Comparison, rows: Sequence[Row]) -> None:
    section = document.section("Numbers")
    section.table(["", *comparison.groups], [[row.title, *row.cells()] for row in rows])
    what = "the test set" if comparison.set_name == "test" else "each run's own validation labels (no common test set)"
    section.text(
        f"Mean ± sample standard deviation over the runs of a group. Errors are those on {what}, interpolated (in "
        "their logarithm) between two models. Coverage and volumes are those of the stored frames, at equal numbers of "
        "MD steps of all replicas together."
    )
    if comparison.set_name != "test":
        return
    missing = [str(run.folder.test) for run in comparison.runs if not run.folder.test.is_file()]
    if missing:
        section.text(f"Caution: it is not known whether the test sets are the same: there is no {', '.join(missing)}.")
    elif not _same_test(comparison):
        section.text("Caution: the runs have different test sets, so their errors are not strictly comparable.")


def _same_test(comparison: Comparison) -> bool:
    """Whether all runs have one test set; no if one of them is missing."""
    files = [run.folder.test for run in comparison.runs]
    return all(path.is_file() for path in files) and len({file_hash(path) for path in files}) == 1


def _pictures(document: Document, comparison: Comparison, out: Path) -> None:
    section = document.section("Learning curves")
    curves = comparison.each(lambda run: _learning_curve(run, comparison.set_name))
    path = figures.group_learning_figure(curves, out / "learning_curves.png")
    bars = "bars: standard deviation over the runs at equal numbers of labels"
    section.picture(path, f"Errors against labels, and against the MD steps before the training; {bars}")
    explored = _explored(comparison)
    if explored:
        _exploration(document.section("Exploration"), comparison, explored, out)
    _autocorrelation(document, comparison, out)
    _slow_waves(document, comparison, out)
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
    _errors_by_volume(document, comparison, out)


def _exploration(
    section: Section, comparison: Comparison, explored: dict[str, dict[str, list[Curve]]], out: Path
) -> None:
    """Growth against simulated time and labels, and histograms of the torsions or volumes of the stored frames."""
    for what, growth in explored.items():
        name, title = ("coverage.png", "Coverage of torsion space") if what == _COVERAGE else ("volumes.png", what)
        pairs = {group: list(zip(comparison.groups[group], curves, strict=True)) for group, curves in growth.items()}
        path = figures.exploration_figure(
            {group: [run.by_time(curve) for run, curve in runs] for group, runs in pairs.items()},
            {group: [run.by_labels(curve) for run, curve in runs] for group, runs in pairs.items()},
            out / name,
            title[0].upper() + title[1:],
        )
        section.picture(path, f"{title} against simulated time and against labels, one thin line per run")
    if _COVERAGE in explored:
        names, indices = list(comparison.torsions()), list(comparison.torsions().values())
        angles = comparison.each(lambda run: torsions(run.frames.structures, indices))
        joined = {name: np.concatenate(values) for name, values in angles.items()}
        path = trajectory_figures.torsion_histogram_figure(joined, out / "torsions.png", names)
        section.picture(path, "Visited torsions: stored frames per cell of the finest level of the coverage")
    if _VOLUMES in explored:
        volumes = comparison.each(lambda run: run.frames.volumes())
        joined = {name: np.concatenate(values) for name, values in volumes.items()}
        path = trajectory_figures.histogram_figure(joined, out / "volume_histogram.png", "Volume (Å³/atom)")
        section.picture(path, "Volumes of the stored frames")


def _autocorrelation(document: Document, comparison: Comparison, out: Path) -> None:
    """Autocorrelation functions of groups with traces of one spacing."""
    groups = {name: [run for run in runs if run.times.trajectories] for name, runs in comparison.groups.items()}
    groups = {name: runs for name, runs in groups.items() if runs}
    spacings = {run.times.spacing for runs in groups.values() for run in runs}
    if len(spacings) != 1:
        return
    spacing = spacings.pop()
    longest = max(2, round(0.5 * max(run.times.longest for runs in groups.values() for run in runs) / spacing))
    series: dict[str, Callable[[Trajectory], Any]] = {
        "Positions": Trajectory.internal_positions,
        "max $u_i$": lambda trace: trace.max_u,
    }
    curves = {
        what: {name: mean_autocorrelation(_series(runs, of), longest) for name, runs in groups.items()}
        for what, of in series.items()
    }
    path = trajectory_figures.autocorrelation_figure(curves, spacing, out / "autocorrelation.png")
    section = document.section("Autocorrelation")
    section.picture(path, "Mean autocorrelation of positions (atoms and components) and of the largest uncertainty")
    counts = ", ".join(
        f"{name}: {sum(r.times.trajectories for r in runs)} ({sum(r.times.duration for r in runs):,.0f} ps)"
        for name, runs in groups.items()
    )
    section.text(
        f"Replicas of at least {SHORTEST:g} ps, recorded every {1000 * spacing:g} fs; {counts}. Positions: after "
        "alignment (molecules) or removal of the cell (crystals). An autocorrelation time is the stride times N / ESS; "
        "the sum over the autocorrelation function ends at its first value that is not positive. It cannot exceed the "
        "length of the trajectories."
    )


def _series(runs: Sequence[Run], of: Callable[[Trajectory], Any]) -> Iterator[Any]:
    """A quantity of all traces that count for autocorrelation times."""
    return (of(trace) for run in runs for trace in run.traces() if trace.duration >= SHORTEST)


def _slow_waves(document: Document, comparison: Comparison, out: Path) -> None:
    """V(t) of each group's longest trace (of several, the one that varies most), and the `slow_wave` fitted to it."""
    waves, rows = {}, []
    for name, runs in comparison.groups.items():
        every = ((trace.spacing, trace.volumes) for run in runs for trace in run.traces())
        series = [(spacing, volumes) for spacing, volumes in every if volumes is not None and len(volumes) > 3]
        if not series:
            continue
        spacing, volumes = max(series, key=lambda pair: (len(pair[1]), np.ptp(pair[1])))
        times = spacing * np.arange(1, len(volumes) + 1)
        fit = slow_wave(times, volumes)
        waves[name] = (times, volumes, fit)
        spread = f"{volumes.min():.0f} to {volumes.max():.0f}"
        rows.append([name, spread, f"{fit.amplitude:.1f}", f"{fit.noise:.1f}", f"{100 * fit.explained:.0f} %"])
    if not waves:
        return
    section = document.section("Volumes against time")
    path = trajectory_figures.slow_wave_figure(waves, out / "volume_against_time.png")
    which = "The longest replica of each group; of several, the one whose volume varies most"
    section.picture(path, f"{which}: V(t), and a wave with a period of twice its length plus white noise")
    section.table(["group", "V (Å³)", "amplitude (Å³)", "noise (Å³)", "variance explained"], rows)


def _errors_by_volume(document: Document, comparison: Comparison, out: Path) -> None:
    """Errors in bins of the volume, where all runs have one test set whose cells differ."""
    if comparison.set_name != "test" or not _same_test(comparison) or not all(run.unseen for run in comparison.runs):
        return
    first = comparison.runs[0].unseen
    edges = volume_edges(first.structures) if first else None
    if edges is None:
        return
    bins = comparison.each(
        lambda run: errors_by_volume(run.unseen.structures, run.unseen.predictions, edges)  # type: ignore[union-attr]
    )
    section = document.section("Errors by volume")
    path = trajectory_figures.volume_error_figure(bins, out / "errors_by_volume.png")
    section.picture(path, "Root mean square errors of the newest models on the test set, by volume of the cell")
    counts = next(iter(bins.values()))[0]
    section.table(["volume (Å³)", "structures"], [[f"{b.low:.0f} to {b.high:.0f}", str(b.structures)] for b in counts])


def _left_out(document: Document, comparison: Comparison) -> None:
    """What is not shown, and why."""
    reasons = [run.lacks for run in comparison.runs if run.lacks]
    if reasons:
        section = document.section("Not shown")
        section.text(
            "Errors of isomers, uncertainty against error, and errors by volume require predictions of the models."
        )
        for reason in reasons:
            section.text(reason)


def _dependence(document: Document, rows: Sequence[Row], changed: dict[str, list[str]], out: Path) -> None:
    """What the groups reach against the one number in which they differ, e.g. the bias strength."""
    if len(changed) != 1:
        return
    key, texts = next(iter(changed.items()))
    try:
        x = [float(text) for text in texts]
    except ValueError:
        return
    if len(x) < 3:
        return
    chosen = [row for row in rows if row.title.endswith("MD steps") or row.title.startswith(("coverage at", *ERRORS))]
    chosen = [row for row in chosen if "labels" not in row.title]
    chosen = [row for row in chosen if "after" not in row.title or row is _last_of(chosen, row)]
    chosen += [row for row in rows if row.title.startswith("autocorrelation")]
    values = {row.title: list(row.values.values()) for row in chosen}
    path = trajectory_figures.dependence_figure(x, values, key, out / "dependence.png")
    document.section(f"Dependence on {key}").picture(path, "Mean ± standard deviation; dots are runs")


def _last_of(rows: Sequence[Row], row: Row) -> Row:
    """The last row of the same quantity."""
    return [other for other in rows if other.title.split(" after ")[0] == row.title.split(" after ")[0]][-1]


def _learning_curve(run: Run, set_name: SetName) -> NDArray[np.float64]:
    """[K, 5]: labels, MD steps before the training, RMSE of energy (meV/atom), force (eV/Å) and stress (MPa)."""
    before = [0, *(entry.md_steps for entry in run.history)]
    rows = [
        [entry.labels, before[k], *map(value_or_nan, entry.rmse_on(set_name))] for k, entry in enumerate(run.history)
    ]
    return np.array(rows, dtype=np.float64)


def _pooled(errors: Sequence[CalibrationData]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(largest u, largest error) of the structures of all runs of a group."""
    return np.concatenate([e.largest_u for e in errors]), np.concatenate([e.largest_error for e in errors])
