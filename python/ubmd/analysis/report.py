"""The report of a run: one HTML file with everything in it, the same as Markdown, and the figures as PNG files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest  # type: ignore[import-untyped]

from ubmd.analysis import figures
from ubmd.analysis.document import Document, Section
from ubmd.analysis.predictions import NotKept, Unseen, predict_unseen
from ubmd.analysis.run_data import Frames, RunData, count_endings, read_frames, stage_seconds, value_or_nan
from ubmd.analysis.run_report import rejected_section, write_report
from ubmd.analysis.shown_structures import structures_of_loop
from ubmd.analysis.structures_section import write_structures
from ubmd.analysis.trajectory import SHORTEST, correlation_times, read_traces
from ubmd.analysis.viewer import link_to_viewer
from ubmd.data.structures import read_structures
from ubmd.measure.confidence import shortfall
from ubmd.measure.coverage import coverage
from ubmd.measure.errors import CalibrationData, calibration_data, parity_data, pearson, share_covered, spearman
from ubmd.measure.isomers import amide_torsions, count_cis
from ubmd.measure.torsions import torsions
from ubmd.runs.convergence import plateau, quiet
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import read_settings
from ubmd.runs.reading import read_iterations
from ubmd.runs.records import IterationEntry, NewLabels, SetName
from ubmd.runs.stage_names import stage_name
from ubmd.settings import RunSettings
from ubmd.settings.run import conditions
from ubmd.texts import counted, number, wall_time

_SETS: dict[SetName, str] = {
    "test": "test set",
    "valid": "validation labels",
    "calib": "calibration labels",
    "train": "training labels",
}


def make_report(run: Path, run_models: bool = False) -> list[Path]:
    """Write report/*.png, report.md and report.html of a run folder from what is there; returns the files.

    Sections whose data the run does not have (no test set, no torsions, no finished iteration) are left out.
    ``run_models``: run the newest model files where the folder lacks their predictions, as in folders of earlier
    versions; only for model files that are trusted, because they are programs.

    Raises:
        DataError: the folder holds no run.
    """
    data = _Run(RunFolder(Path(run)), run_models)
    sections = (
        _iterations,
        _learning,
        _accuracy,
        _new_labels,
        _structures,
        _exploration,
        _uncertainty,
        _replicas,
        _convergence,
    )
    return write_report(data, "run", "No iteration has finished yet.", _summary, sections, (_failures, _times))


class _Run(RunData[RunSettings, IterationEntry]):
    """A loop."""

    def __init__(self, folder: RunFolder, run_models: bool) -> None:
        settings = read_settings(folder)
        super().__init__(folder, settings, read_iterations(folder), settings.md.timestep)
        self.run_models = run_models

    @cached_property
    def frames(self) -> Frames:
        return read_frames(self.folder.path)

    @cached_property
    def unseen(self) -> Unseen | NotKept | None:
        """Predictions for structures that the models were not trained on, or why there are none."""
        try:
            return predict_unseen(self.folder, self.history, self.run_models)
        except NotKept as error:
            return error


def _summary(data: _Run) -> str:
    last, settings = data.last, data.settings
    return (
        f"{last.labels} labels after {len(data.history)} iterations and {last.md_steps:,} MD steps "
        f"({data.picoseconds(last.md_steps):,.1f} ps); {conditions(settings)}; "
        f"uncertainty {settings.uncertainty.kind}, selection {settings.selection.method}, seed {settings.seed}. "
        + _ending(data)
    )


def _ending(data: _Run) -> str:
    """Why the run ended, if it did: its last iteration has no replicas."""
    last, wanted = data.last, data.settings.loop.labels
    if last.ended:
        return f"Finished: {last.ended.reason}"
    if last.replicas:
        return "The run has not finished."
    if last.labels >= wanted:
        return f"Finished: the data set has {last.labels} labels (loop.labels = {wanted})."
    return "Finished before loop.labels was reached."


def _iterations(report: Document, data: _Run) -> None:
    """One row per iteration."""
    rejected = Counter(int(atoms.info.get("iteration", -1)) for atoms in data.rejected)
    rows = [
        [
            str(entry.iteration),
            str(entry.labels),
            str(rejected[entry.iteration] or ""),
            f"{entry.md_steps:,}",
            *(text for name in _SHOWN for text in _errors(entry, name)),
            number(entry.max_u, ".2f"),
            number(entry.coverage, ".3f"),
        ]
        for entry in data.history
    ]
    head = ["iteration", "labels", "rejected", "MD steps"]
    head += [f"{name}: {what}" for name in _SHOWN.values() for what in (*_ERRORS, _COUNT)]
    head += ["max u (eV/Å)", "coverage"]
    keep = [k for k in range(len(head)) if _says_something(head[k], [row[k] for row in rows])]
    section = report.section("Iterations")
    section.table([head[k] for k in keep], [[row[k] for k in keep] for row in rows])
    section.text(
        "Root mean square errors of energies (E), components of forces (F) and stress (S). Validation: labels that "
        f"were held out from training, for early stopping and calibration{_on_the_test_set(data)}."
    )
    kept = data.settings.loop.keep_models
    numbers = [entry.iteration for entry in data.history]
    missing = [k for k in numbers if not (data.folder.iteration(k) / "model.pt").exists()]
    if kept is not None and missing:
        section.text(
            f"Model files and weights of {counted(len(missing), 'iteration')}, {missing[0]} to {missing[-1]}, are not "
            f"kept (loop.keep_models = {kept})."
        )


_FORMS = (".2f", ".4f", ".1f")  # of energy, forces, stress
_ERRORS = ("E (meV/atom)", "F (eV/Å)", "S (MPa)")
_COUNT = "structures"
_SHOWN: dict[SetName, str] = {"valid": "validation", "test": "test"}


def _says_something(head: str, column: list[str]) -> bool:
    """Whether a column has values; numbers of structures also have to change, as those of a test set do not."""
    found = set(column) - {"", "-"}
    return len(found) > (1 if head.endswith(_COUNT) else 0)


def _on_the_test_set(data: _Run) -> str:
    """What the test set is, and how many structures it has; nothing where there is none."""
    errors = data.last.errors_on("test")
    return f"; test: the test set, which nothing depends on{errors.behind}" if errors else ""


def _errors(entry: IterationEntry, name: SetName) -> list[str]:
    """Energy, forces, stress, and the number of structures that they were measured on."""
    errors = entry.errors_on(name)
    return [*map(number, entry.rmse_on(name), _FORMS), str(errors.structures) if errors and errors.structures else "-"]


def _learning(report: Document, data: _Run) -> None:
    """Errors against labels and against MD steps."""
    by_labels: dict[str, Sequence[Any]] = {}
    by_steps: dict[str, Sequence[Any]] = {}
    for key, name in _SETS.items():
        entries = [entry for entry in data.history if entry.errors_on(key)]
        if not entries:
            continue
        errors = list(zip(*([value_or_nan(value) for value in entry.rmse_on(key)] for entry in entries), strict=True))
        by_labels[name] = ([entry.labels for entry in entries], *errors)
        # A model was trained on what the iterations before it found.
        before = [0, *(entry.md_steps for entry in data.history)]
        by_steps[name] = ([before[entry.iteration] / 1000.0 for entry in entries], *errors)
    if not by_labels:
        return
    section = report.section("Learning curves")
    path = figures.learning_curve_figure(by_labels, data.picture("learning_curve.png"))
    section.picture(path, "Errors against the number of labels")
    path = figures.learning_curve_figure(
        by_steps, data.picture("learning_curve_steps.png"), "MD steps of all replicas (thousands)"
    )
    section.picture(path, "Errors against the MD steps before the training")


def _accuracy(report: Document, data: _Run) -> None:
    """Parity and calibration of the newest model on the test set, or of earlier models on the labels they chose."""
    found = data.unseen
    if isinstance(found, NotKept):
        report.section("Model against reference").text(str(found))
    if not isinstance(found, Unseen):
        return
    structures, predictions, promise, what = found.structures, found.predictions, found.promise, found.what
    errors = calibration_data(structures, predictions)
    section = report.section("Model against reference")
    section.text(
        f"{what}: energy RMSE {errors.energy_rmse:.2f} meV/atom, force RMSE {errors.force_rmse:.4f} eV/Å "
        f"({counted(len(structures), 'structure')})."
    )
    path = figures.parity_figure(parity_data(structures, predictions), data.picture("parity.png"))
    section.picture(path, "Model against reference; the line is perfect agreement")
    section = report.section("Uncertainty against error")
    _calibration_table(section, errors, promise)
    path = figures.calibration_figure(
        {
            "Atoms": (errors.atom_u, errors.atom_error),
            "Largest of each structure": (errors.largest_u, errors.largest_error),
        },
        data.picture("calibration.png"),
        [("$u_i$ (eV/Å)", "RMSE($F_i$) (eV/Å)"), ("max $u_i$ (eV/Å)", "max RMSE($F_i$) (eV/Å)")],
    )
    caption = "Calibrated uncertainty against error; in the green half the error is below the uncertainty"
    section.picture(path, caption, link_to_viewer("The structures behind the points"))


def _new_labels(report: Document, data: _Run) -> None:
    """What the calibration promised of new labels, and what was found."""
    rows = [(entry.iteration, entry.chosen) for entry in data.history if entry.chosen is not None]
    drawn = [entry.drawn for entry in data.history if entry.drawn is not None]
    if not rows:
        return
    section = report.section("New labels: promised and found")
    headings = ["iteration", "promised share", "found", "share of atoms", "median max u_i", "median max RMSE(F_i)"]
    section.table(
        headings,
        [
            [str(k), f"{one.promised:.3f}", f"{one.covered} of {one.structures}", f"{one.share_of_atoms:.3f}"]
            + [number(value, ".3f") for value in (one.max_u, one.max_error)]
            for k, one in rows
        ],
    )
    section.text(
        "Structures that were selected, as the model that selected them had predicted them: found are those whose "
        f"largest force error does not exceed their largest u_i (eV/Å). {_pooled([one for _, one in rows])}"
    )
    if drawn:
        section.text(f"Frames that were drawn at random (selection.random), beside them: {_pooled(drawn)}")


def _pooled(found: Sequence[NewLabels]) -> str:
    """All iterations together, with the 95 % interval of Wilson."""
    covered, count = sum(one.covered for one in found), sum(one.structures for one in found)
    promised = sum(one.promised * one.structures for one in found) / count
    interval = binomtest(covered, count).proportion_ci(method="wilson")
    share = f"{covered / count:.2f}, 95 % interval {interval.low:.2f} to {interval.high:.2f}"
    return f"In all iterations {covered} of {count} ({share}); promised: {promised:.2f}."


def _structures(report: Document, data: _Run) -> None:
    """Labels, test structures, rejected and uncertain structures."""
    labels = read_structures(data.folder.dataset, compare=False) if data.folder.dataset.exists() else []
    unseen = data.unseen if isinstance(data.unseen, Unseen) else None
    shown = structures_of_loop(labels, data.rejected, data.frames, unseen)
    write_structures(report, shown, data.folder.report, "max u", "max RMSE(F)")


def _calibration_table(section: Section, data: CalibrationData, uncertainty: dict[str, Any]) -> None:
    """Expected and observed shares of errors under their uncertainty, and correlations."""
    rows = []
    wanted = 1.0 - uncertainty["alpha"]
    for name, error, u, record in [
        ("structures: energy error, u (eV/atom)", data.energy_error, data.energy_u, uncertainty["energy"]),
        ("atoms: RMSE(F_i), u_i (eV/Å)", data.atom_error, data.atom_u, uncertainty["forces"]),
        ("structures: max RMSE(F_i), max u_i (eV/Å)", data.largest_error, data.largest_u, uncertainty["forces"]),
    ]:
        rows.append(
            [name, f"{min(record['attainable'], wanted):.3f}", f"{share_covered(error, u):.3f}"]
            + [number(correlation(u, error), ".2f") for correlation in (pearson, spearman)]
        )
    section.table(["what", "expected share", "observed share", "Pearson", "Spearman"], rows)
    section.text(
        "The share counts errors that do not exceed their uncertainty. "
        f"{_calibrated_on(uncertainty)}: a test set from another distribution may have another share. "
        + shortfall(uncertainty["energy"]["attainable"], uncertainty["forces"]["attainable"], uncertainty["alpha"])
    )


def _calibrated_on(uncertainty: dict[str, Any]) -> str:
    count, held_out = uncertainty["energy"]["n_calibration"], uncertainty.get("held_out")
    if held_out is None:
        return f"Calibrated on {counted(count, 'structure')} like the training data"
    new = f"{counted(count - held_out, 'new label')} as the models that selected them had predicted them"
    return f"Calibrated on {counted(held_out, 'structure')} like the training data and {new}"


def _exploration(report: Document, data: _Run) -> None:
    """Torsions and volumes that the replicas have visited."""
    frames, settings = data.frames, data.settings
    if not len(frames):
        return
    chosen = list(settings.variables.torsions.items())[:2]
    volumes = frames.volumes()
    if not chosen and volumes is None:
        return
    section = report.section("Exploration")
    counted = (
        f"{len(frames)} stored frames (every {settings.md.frames_every} steps, and the frames that stopped a replica)"
    )
    if chosen:
        _torsions(section, data, [name for name, _ in chosen], [index for _, index in chosen], counted)
    if volumes is not None:
        section.text(f"Volumes from {volumes.min():.3f} to {volumes.max():.3f} Å³/atom in {counted}.")
        path = figures.volume_figure(frames.md_steps, volumes, frames.iteration, data.picture("volumes.png"))
        section.picture(path, "Cell volumes against MD steps, and their histogram")


def _torsions(section: Section, data: _Run, names: list[str], indices: list[Any], counted: str) -> None:
    frames = data.frames
    angles = torsions(frames.structures, indices)
    share = coverage(angles)
    section.text(f"Coverage of ({', '.join(names)}): {share:.3f}, counted over {counted}.")
    if len(names) == 2:
        title = f"{len(frames)} frames, coverage {share:.2f}"
        path = figures.ramachandran_figure(angles, frames.iteration, data.picture("ramachandran.png"), names, title)
        section.picture(path, "Visited torsions")
    path = figures.coverage_figure({"": [frames.coverage_curve(indices)]}, data.picture("coverage.png"))
    section.picture(path, "Coverage against MD steps")
    amides = amide_torsions(frames.structures[0])
    if amides:
        section.text(f"Frames with a cis amide bond: {count_cis(frames.structures, amides)}.")


def _uncertainty(report: Document, data: _Run) -> None:
    """u along the replicas."""
    frames = data.frames
    if not len(frames):
        return
    endings = {
        (entry.iteration if result.iteration is None else result.iteration, result.replica): result.stopped
        for entry in data.history
        for result in entry.replicas
    }
    path = figures.uncertainty_figure(
        frames.iteration,
        frames.replica,
        data.picoseconds(frames.step),
        frames.max_u,
        data.settings.loop.threshold,
        data.picture("uncertainty.png"),
        endings,
    )
    section = report.section("Uncertainty along the replicas")
    section.picture(path, "Largest uncertainty of an atom; one line per replica")
    times = correlation_times(read_traces(data.folder.path))
    if times.trajectories:
        section.text(
            f"Autocorrelation times: {number(times.positions, '.3g')} ps of positions, "
            f"{number(times.uncertainty, '.3g')} ps of the largest uncertainty, from {times.trajectories} replicas of "
            f"at least {SHORTEST:g} ps ({times.duration:,.0f} ps together, recorded every {1000 * times.spacing:g} fs)."
        )


def _replicas(report: Document, data: _Run) -> None:
    """How replicas ended, and why those that failed did."""
    entries = [entry for entry in data.history if entry.replicas]
    if not entries:
        return
    section = report.section("How the replicas ended")
    counts = [count_endings(entry) for entry in entries]
    path = figures.replicas_figure(
        [entry.iteration for entry in entries],
        {name: [count[name] for count in counts] for name in figures.ENDINGS},
        [data.picoseconds(np.mean([r.steps for r in entry.replicas])) for entry in entries],
        data.picture("replicas.png"),
    )
    section.picture(path, "Replicas that reached the step limit, passed the threshold, or failed")
    reasons = [(entry.iteration, r.reason) for entry in entries for r in entry.replicas if r.reason]
    _reasons(section, "why replicas failed", reasons)


def _convergence(report: Document, data: _Run) -> None:
    """What the stop rules observe, in use or not."""
    loop, history = data.settings.loop, data.history
    calls = history[-1].labels + len(data.rejected)
    budget = loop.label_budget
    explored = [entry for entry in history if entry.replicas]
    calm = next((n for n in range(len(explored), 0, -1) if quiet(explored, n)), 0)
    seen = plateau(history, loop.plateau_iterations, float("inf"))
    spreads = (
        f"fewer than {loop.plateau_iterations + 1} models with new labels"
        if seen is None
        else f"over the last {loop.plateau_iterations + 1} models the force error of held-out labels varies by "
        f"{100 * seen.evidence['spread']['force_rmse']:.0f} %, their calibration factor by "
        f"{100 * seen.evidence['spread']['force_factor']:.0f} % (tolerance {100 * loop.plateau_tolerance:g} %)"
    )
    rows = [
        ["labels", "yes", f"{history[-1].labels} of {loop.labels}"],
        [
            "label budget",
            "yes" if budget else "no",
            f"{calls} reference calculations" + (f" of {budget}" if budget else ""),
        ],
        [
            "quiet",
            "yes" if loop.stop_when_quiet else "no",
            f"{calm} last iterations (of {loop.quiet_iterations}) in which every replica reached the step limit",
        ],
        ["plateau", "yes" if loop.stop_at_plateau else "no", spreads],
    ]
    section = report.section("Convergence")
    section.table(["stop rule", "in use", "observed"], rows)
    known = [
        (entry, entry.calibration.force_factor)
        for entry in history
        if entry.calibration and entry.calibration.force_factor
    ]
    if len(known) > 1:
        held_out: SetName = "calib" if all(entry.calib for entry, _ in known) else "valid"
        path = figures.convergence_figure(
            [entry.labels for entry, _ in known],
            [value_or_nan(entry.rmse_on(held_out)[1]) for entry, _ in known],
            [factor for _, factor in known],
            data.picture("convergence.png"),
        )
        section.picture(path, "Force error and calibration factor of held-out labels; both level off at convergence")
    if history[-1].ended:
        section.text(f"The run ended by the rule '{history[-1].ended.rule}'.")


def _failures(report: Document, data: _Run) -> None:
    """Rejected labels with their reasons."""
    rejected = data.rejected
    labelled = data.last.labels if data.history else 0
    section = rejected_section(report, data) if rejected or labelled else None
    if section is None:
        return
    total = labelled + len(rejected)
    section.text(
        f"{len(rejected)} of {total} structures got no label ({100 * len(rejected) / total:.1f} %); "
        f"they are in {data.folder.rejected.name}."
    )
    _reasons(section, "reason", [(int(a.info.get("iteration", -1)), str(a.info.get("reason", ""))) for a in rejected])


def _reasons(section: Section, title: str, found: Sequence[tuple[int, str]]) -> None:
    """A table of sentences that differ in their numbers only, most frequent first, with one example each."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for iteration, reason in found:
        groups.setdefault(re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", reason), []).append((iteration, reason))
    rows = []
    for group in sorted(groups.values(), key=len, reverse=True):
        first, last = min(group)[0], max(group)[0]
        where = [("start" if k < 0 else str(k)) for k in (first, last)]
        rows.append([str(len(group)), where[0] if first == last else " to ".join(where), group[-1][1]])
    if rows:
        section.table(["count", "iterations", f"{title} (the newest)"], rows)


def _times(report: Document, data: _Run) -> None:
    """Wall time per stage, and what a label, an MD step and a training cost."""
    names, seconds = stage_seconds(data.folder.path, data.history)
    total = sum(float(values.sum()) for values in seconds.values())
    if not total:
        return
    section = report.section("Time and cost")
    rows = [
        [
            stage_name(stage),
            wall_time(float(values.sum())),
            f"{100 * values.sum() / total:.1f} %",
            _cost(data, stage, values),
        ]
        for stage, values in seconds.items()
    ]
    section.table(["stage", "wall time", "share", "that is"], [*rows, ["all stages", wall_time(total), "100.0 %", ""]])
    path = figures.time_figure(names, seconds, data.picture("time.png"))
    section.picture(path, "Wall time of each iteration by stage; 'start' is what came before the first one")


def _cost(data: _Run, stage: str, values: np.ndarray) -> str:
    """A stage's cost per label, MD step or training."""
    labels, md_steps = (data.last.labels, data.last.md_steps) if data.history else (0, 0)
    if stage == "label" and labels:
        return f"{values.sum() / labels:.3g} s per label"
    if stage == "md" and md_steps:
        busy = sum(result.seconds for entry in data.history for result in entry.replicas)
        return (
            f"{1000 * busy / md_steps:.3g} ms per step of a replica, "
            f"{1000 * values.sum() / md_steps:.3g} ms of wall time"
        )
    if stage == "train" and np.count_nonzero(values):
        return f"{values.sum() / np.count_nonzero(values):.3g} s per training"
    return ""
