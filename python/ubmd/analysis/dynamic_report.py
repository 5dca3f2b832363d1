"""The report of a dynamic run: a page like that of `ubmd.analysis.report`, for trajectories with requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ubmd.analysis import crystal_figures, figures
from ubmd.analysis.document import Document
from ubmd.analysis.run_data import RunData, value_or_nan
from ubmd.analysis.run_report import rejected_section, write_report
from ubmd.analysis.shown_structures import structures_of_dynamic_run
from ubmd.analysis.structures_section import write_structures
from ubmd.analysis.viewer import link_to_viewer
from ubmd.data.structures import read_structures
from ubmd.errors import UbmdError
from ubmd.lammps.trajectory import read_piece
from ubmd.measure.errors import share_covered, spearman
from ubmd.potentials.kinds import kind_of_settings
from ubmd.runs.dynamic_history import read_errors
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import read_settings_of
from ubmd.runs.reading import read_rounds
from ubmd.runs.records import ForceErrors, RoundEntry, SignalEntry
from ubmd.runs.stage_names import stage_name
from ubmd.settings.dynamic import DynamicRunSettings
from ubmd.texts import number, order_name, wall_time

_MOST_PANELS = 6  # trajectories in the picture of errors
_MOST_FRAMES = 24  # structures that the shares of the orders are measured on

SIGNALS = {
    "determined": "Share of parameters\ndetermined by the labels, γ/P",
    "below noise": "Rms uncertainty of\nnew frames (eV/Å)",
    "little to gain": "Predicted drop of the mean\nerror by the best label",
}


def make_dynamic_report(run: Path, run_models: bool = False) -> list[Path]:
    """Write report/*.png, report.md and report.html of a dynamic run from what is there; returns the files.

    ``run_models`` has no effect (`ubmd.analysis.report.make_report` has it too): this report runs no model file.

    Raises:
        DataError: the folder holds no dynamic run.
    """
    data = _Run(RunFolder(Path(run)))
    sections = (_numbers, _learning, _calibration, _structures, _trajectories, _signals, _parameters, _phonons, _labels)
    return write_report(data, "dynamic run", "No round has finished yet.", _summary, sections, (_rejected, _times))


class _Run(RunData[DynamicRunSettings, RoundEntry]):
    """A dynamic run."""

    def __init__(self, folder: RunFolder) -> None:
        settings = read_settings_of(folder, DynamicRunSettings)
        super().__init__(folder, settings, read_rounds(folder), settings.dynamic.timestep)

    @property
    def models(self) -> list[RoundEntry]:
        """The first entry of every model."""
        return [entry for entry in self.history if entry.refit]

    @property
    def is_crystal(self) -> bool:
        return kind_of_settings(self.settings).of_crystal

    @cached_property
    def potential(self) -> Any:
        """Basis, parameters and posterior; None for networks, or before the first model."""
        files = (self.folder.path / name for name in ("basis.npz", "posterior.npz"))
        if not self.is_crystal or not all(path.is_file() for path in files):  # never from model.pt, which is a program
            return None
        from ubmd.potentials.force_constants.potential import load_potential

        return load_potential(self.folder.path)


def _summary(data: _Run) -> str:
    last, dynamic = data.last, data.settings.dynamic
    heat = " and ".join(f"{t:g}" for t in dynamic.temperatures)
    bias = f"bias force {data.settings.bias.force:g}" if data.settings.bias else "no bias (plain MD)"
    ended, factor = last.ended, dynamic.trigger.extrapolation
    beyond = "" if factor is None else f", and displacements beyond {factor:g} times those of the labels"
    return (
        f"{last.labels} labels ({last.calls} reference calculations) after {len(data.history)} rounds and "
        f"{last.md_steps:,} MD steps ({data.picoseconds(last.md_steps):,.1f} ps) of "
        f"{dynamic.trajectories} {'trajectory' if dynamic.trajectories == 1 else 'trajectories'} at {heat} K; {bias}; "
        f"trigger '{dynamic.trigger.rule}'{beyond}; seed {data.settings.seed}. "
        + (f"Finished: {ended.reason}" if ended else "The run has not finished.")
    )


def _numbers(report: Document, data: _Run) -> None:
    """The result in a few rows."""
    last, model = data.last, data.last.model
    rows = [["labels", str(last.labels)], ["reference calculations", str(last.calls)]]
    for name, errors in (("test set", last.test), ("training labels", last.train)):
        if errors:
            share = f" ({100 * errors.relative:.2f} % of their rms)" if errors.relative else ""
            title = f"force RMSE, {name} ({errors.structures} structures)"
            rows.append([title, f"{errors.force_rmse:.5f} eV/Å{share}"])
    if data.is_crystal:
        gamma, counts = sum(model.gamma.values()), sum(model.parameters.values())
        rows.append(["noise or truncation error of the forces, 1/√β", f"{model.noise:.5f} eV/Å"])
        rows.append(
            ["parameters determined by the labels, γ/P", f"{gamma:.1f} of {counts} ({100 * gamma / counts:.1f} %)"]
        )
        if model.energy is not None:
            rows.append(["energy of the ideal crystal", f"{model.energy:.6f} eV per primitive cell"])
    if data.settings.dynamic.calibrate:
        rows.append(["conformal factor of the predicted errors", number(model.force_scale, ".3f")])
    pieces = [piece for entry in data.history for piece in entry.replicas]
    far = [piece.max_displacement for piece in pieces if piece.max_displacement]
    if far:
        rows.append(["largest displacement of an atom", f"{max(far):.3f} Å"])
    speed = [piece.ms_per_step for piece in pieces if piece.ms_per_step]
    if speed:
        rows.append(["time of an MD step", f"{np.median(speed):.3g} ms (median over the segments)"])
    guards = sum(piece.ended == "guard" for piece in pieces)
    failed = sum(piece.ended == "failed" for piece in pieces)
    rows.append(["segments ended by the displacement limit; failed", f"{guards}; {failed}"])
    report.section("Result").table(["what", "value"], rows)


def _learning(report: Document, data: _Run) -> None:
    """Errors against reference calculations."""
    sets: dict[str, list[tuple[RoundEntry, ForceErrors | None]]] = {
        "test set": [(entry, entry.test) for entry in data.models],
        "training labels": [(entry, entry.train) for entry in data.models],
    }
    known = {
        name: [(entry.calls, errors.force_rmse) for entry, errors in pairs if errors] for name, pairs in sets.items()
    }
    curves = {name: ([x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in known.items() if pairs}
    if not curves:
        return
    noise = data.last.model.noise if data.is_crystal else None
    rms = data.last.test.force_rms if data.last.test else None
    path = crystal_figures.dynamic_learning_figure(curves, data.picture("learning_curve.png"), noise, rms)
    section = report.section("Errors against reference calculations")
    section.picture(path, "Root mean square error of the force components after each refit")
    if "test set" not in curves:
        section.text("The run has no test set ([test] in the settings): training errors say little about accuracy.")


def _calibration(report: Document, data: _Run) -> None:
    """Each label's error as it was predicted before the model learnt it."""
    bare, scaled, true = [], [], []
    for entry in data.history:
        factor = value_or_nan(entry.conformal.scale if entry.conformal else None)
        used = entry.model.force_scale or 1.0 if data.is_crystal else 1.0
        for item in entry.asked:
            if item.error_before is not None and item.true_before is not None:  # it has a label
                bare.append(item.error_before / used)
                scaled.append(item.error_before / used * factor)
                true.append(item.true_before)
    if not bare:
        return
    u, v, e = np.array(bare), np.array(scaled), np.array(true)
    known = np.isfinite(v)
    first = "Bayesian error, not calibrated" if data.is_crystal else "Calibrated at export"
    panels = {first: (u, e)}
    if known.any():
        panels["Conformal, from earlier labels"] = (v[known], e[known])
    names = [("Predicted largest error (eV/Å)", "True largest error (eV/Å)")] * len(panels)
    path = figures.calibration_figure(panels, data.picture("calibration.png"), names)
    section = report.section("Predicted against true error")
    caption = "Every point is a label, predicted by the model that requested it, before training on it"
    section.picture(path, caption, link_to_viewer("The structures behind the points"))
    ratio = np.median(e / u)
    section.text(
        f"{len(u)} labels: the largest error of a force component is {ratio:.2f} times the predicted one (median), and "
        f"at most the predicted one for {100 * share_covered(e, u):.0f} %; rank correlation {spearman(u, e):.2f}."
    )
    if data.is_crystal:
        components = 3 * len(read_structures(data.folder.dataset)[0])
        deviations, noise = np.sqrt(2 * np.log(components)), data.last.model.noise
        section.text(
            "The Bayesian error is the largest standard deviation of a force component. Of "
            f"{components} normal errors the largest is about {deviations:.1f} deviations, and true errors also "
            f"contain the noise or truncation floor ({noise:.4f} eV/Å per component)."
        )
    conformal = data.last.conformal
    if conformal:
        section.text(
            f"The conformal factor of the newest {conformal.count} labels is {number(conformal.scale, '.2f')}: "
            f"predicted errors times this cover {100 * min(1 - conformal.alpha, conformal.attainable):.0f} % of the "
            "true ones. Reference calculations are requested where the predicted error is large, so the labels are "
            "more difficult than the trajectory."
        )


def _structures(report: Document, data: _Run) -> None:
    """Labels and rejected structures."""
    labels = read_structures(data.folder.dataset, compare=False) if data.folder.dataset.exists() else []
    shown = structures_of_dynamic_run(labels, data.rejected, data.history)
    write_structures(report, shown, data.folder.report, "predicted error", "true error")


def _trajectories(report: Document, data: _Run) -> None:
    """Errors along the trajectories."""
    series = {replica: one for replica, one in read_errors(data.folder.path).items() if len(one.step)}
    if not series:
        return
    shown = list(series)[:_MOST_PANELS]
    panels = {}
    for replica in shown:
        one, kelvin = series[replica], data.settings.dynamic.temperature_of(replica)
        title = f"Trajectory {replica}, {kelvin:g} K: {len(one.calls)} requests"
        times = data.picoseconds(one.step)
        panels[title] = (times, one.error, one.threshold, one.mean, data.picoseconds(one.calls))
    path = crystal_figures.trajectory_figure(panels, data.picture("trajectories.png"))
    section = report.section("Errors along the trajectories")
    left = f" ({len(shown)} of {len(series)} trajectories)" if len(shown) < len(series) else ""
    section.picture(path, f"Predicted error at every check, and requests for reference calculations{left}")


def _signals(report: Document, data: _Run) -> None:
    """Signals of convergence by number of labels, the last ones of every model."""
    newest: dict[int, dict[str, SignalEntry]] = {}
    for entry in data.history:
        if {signal.name for signal in entry.signals} >= set(SIGNALS):
            newest[entry.labels] = {signal.name: signal for signal in entry.signals}
    if not newest:
        return
    labels = sorted(newest)
    curves = {
        title: ([newest[k][name].value for k in labels], [newest[k][name].threshold for k in labels])
        for name, title in SIGNALS.items()
    }
    error = None
    tested = [(entry.labels, entry.test.force_rmse) for entry in data.models if entry.test]
    if tested:
        error = ([x for x, _ in tested], [y for _, y in tested], "test set")
    path = crystal_figures.signals_figure(labels, curves, error, data.picture("signals.png"))
    section = report.section("Convergence without further labels")
    section.picture(path, "Signals of convergence (dashed: thresholds) and the true error")
    rows = [[signal.name, "yes" if signal.holds else "no", signal.reason] for signal in newest[labels[-1]].values()]
    section.table(["signal", "holds", "observed"], rows)
    ended = data.last.ended
    if ended:
        section.text(f"The run ended by the rule '{ended.rule}': {ended.reason}")


def _parameters(report: Document, data: _Run) -> None:
    """Parameters by order, and what each order contributes to the force."""
    if data.potential is None:
        return
    from ubmd.potentials.force_constants.potential import anharmonicity, order_shares
    from ubmd.potentials.force_constants.regression import Posterior

    posterior = Posterior.load(data.folder.path / "posterior.npz")
    found, what = newest_structures(data.folder, data.history)
    shares = {name: share for name, frames in found.items() if (share := order_shares(data.potential, frames))}
    section = report.section("Orders")
    gamma, counts, alpha = posterior.gamma, posterior.counts, posterior.alpha
    measured = next(iter(shares.values()), {})
    rows = [
        [
            order_name(order),
            f"{data.potential.basis.all_cutoffs[order]:g}",
            str(counts[order]),
            f"{gamma[order]:.1f}",
            f"{100 * gamma[order] / counts[order]:.1f}",
            f"{alpha[order] ** -0.5:.3g}",
            number(measured.get(order), ".4f"),
        ]
        for order in posterior.counts
    ]
    head = ["order", "cutoff (Å)", "parameters P", "γ", "γ/P (%)", "prior width (eV/Å^order)", "share of the force"]
    section.table(head, rows)
    if shares:
        path = crystal_figures.order_shares_figure(shares, data.picture("orders.png"))
        section.picture(path, f"Rms force of each order over the rms of the whole force, on {what}")
        beyond = anharmonicity(data.potential, next(iter(found.values())))
        section.text(
            f"All orders above the second together: {100 * beyond:.1f} % of the rms force (the degree of anharmonicity "
            "in the sense of Knoop et al., Phys. Rev. Mater. 4, 083809 (2020), on the forces of the potential itself)."
        )


def newest_structures(folder: RunFolder, history: Sequence[RoundEntry]) -> tuple[dict[str, list[Atoms]], str]:
    """(frames of the newest segments by temperature, else the test set or the labels; a description of them)."""
    found: dict[str, list[Atoms]] = {}
    for entry in reversed(history):
        for result in entry.replicas:
            name = f"{result.temperature:g} K"
            path = folder.path / "rounds" / f"round_{entry.round:04d}" / f"piece_{result.replica:03d}.npz"
            if len(found.setdefault(name, [])) < _MOST_FRAMES and path.exists():
                found[name] += _frames(path)
    found = {name: frames[:_MOST_FRAMES] for name, frames in sorted(found.items()) if frames}
    if found:
        return found, f"frames of the newest trajectories ({', '.join(found)})"
    source, what = (folder.test, "the test set") if folder.test.exists() else (folder.dataset, "the labels")
    return {"": read_structures(source, compare=False)[:_MOST_FRAMES]}, what


def _frames(path: Path) -> list[Atoms]:
    try:
        state, piece = read_piece(path)
    except UbmdError:
        return []  # damaged: the run computes it again when it is resumed
    box = state.atoms()
    return [Atoms(box.numbers, positions, cell=box.cell, pbc=True) for positions in piece.frames]


def _phonons(report: Document, data: _Run) -> None:
    """Dispersion and elastic constants of the newest model."""
    if data.potential is None or 2 not in data.potential.basis.orders:
        return
    from ubmd.potentials.force_constants.elastic import elastic_constants
    from ubmd.potentials.force_constants.phonons import HarmonicCrystal

    crystal = HarmonicCrystal.from_basis(*data.potential)
    bands = crystal.dispersion(200)
    path = crystal_figures.phonon_figure({"": bands}, crystal.density_of_states(), data.picture("phonons.png"))
    section = report.section("Phonons and elastic constants")
    section.picture(path, "Phonons of the ideal lattice (second order; no long-ranged forces of polar crystals)")
    if bands.frequencies.min() < -0.05:
        section.text("Negative values stand for imaginary frequencies: the ideal lattice is not stable at 0 K.")
    found = elastic_constants(*data.potential)
    cubic = found.cubic()
    if cubic is not None:
        section.table(["C11 (GPa)", "C12 (GPa)", "C44 (GPa)"], [[f"{value:.1f}" for value in cubic]])
    else:
        names = ("xx", "yy", "zz", "yz", "xz", "xy")
        rows = [[name, *(f"{c:.1f}" for c in row)] for name, row in zip(names, found.matrix, strict=True)]
        section.table(["C (GPa)", *names], rows)
    section.text("Elastic constants of the static lattice with relaxed atoms, by the long-wave limit.")


def _labels(report: Document, data: _Run) -> None:
    """One row per label."""
    rows = []
    for entry in data.models:
        for item in entry.learnt:
            errors = (item.threshold, item.error_before, item.true_before, item.error_after, item.true_after)
            rows.append(
                [
                    str(item.label),
                    item.rule,
                    number(item.temperature, "g") if item.rule != "start" else "-",
                    f"{item.replica}",
                    f"{item.step:,}",
                    *(number(error, ".4f") for error in errors),
                    number(None if item.drop is None else 100 * item.drop, ".1f"),
                ]
            )
    if not rows:
        return
    section = report.section("Labels", folded=len(rows) > 25)
    head = ["label", "requested by", "T (K)", "trajectory", "step", "threshold", "predicted", "true", "predicted after"]
    section.table([*head, "true after", "predicted drop (%)"], rows)
    section.text(
        "Errors in eV/Å: predicted and true largest error of a force component before and after training on the label; "
        "the predicted drop is the relative reduction of the mean error."
    )


def _rejected(report: Document, data: _Run) -> None:
    section = rejected_section(report, data) if data.history else None
    if section is not None:
        rows = [[str(a.info.get("iteration", "-")), str(a.info.get("reason", ""))] for a in data.rejected]
        section.table(["round", "reason"], rows)


def _times(report: Document, data: _Run) -> None:
    """Wall time by stage."""
    total: dict[str, float] = {}
    for entry in data.history:
        for stage, seconds in entry.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    whole = sum(total.values())
    if whole > 0.0:
        rows = [
            [stage_name(stage), wall_time(seconds), f"{100 * seconds / whole:.1f} %"]
            for stage, seconds in total.items()
        ]
        report.section("Time").table(["stage", "wall time", "share"], rows)
