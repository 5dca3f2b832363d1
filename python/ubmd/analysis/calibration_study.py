"""How well calibrated uncertainties hold on held-out structures: random splits of labelled data.

For every split networks are trained once, and every kind of uncertainty is made from them and calibrated on held-out
structures (which also serve for early stopping, as in the loop). The share of the errors on the test structures that an
uncertainty covers is compared with the confidence, as in Fig. 2 of Zaverkin et al., npj Comput. Mater. 10, 83 (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.analysis.document import Document
from ubmd.analysis.figures import group_calibration_figure
from ubmd.analysis.style import COLOURS, GREY, new_figure, save
from ubmd.calculator import Model
from ubmd.data.labels import check_labelled, dataset_hash
from ubmd.errors import DataError
from ubmd.files import content_hash, replacing
from ubmd.measure.errors import CalibrationData, calibration_data, pearson, share_covered, spearman
from ubmd.potentials.baseline import SETTINGS, baseline_settings
from ubmd.potentials.fitting import export_checkpoints
from ubmd.potentials.interface import Labels, TrainingTable
from ubmd.potentials.kinds import backend_of, check_backend
from ubmd.potentials.members import train_networks
from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings
from ubmd.settings.marks import key_values
from ubmd.texts import counted
from ubmd.uncertainty.conformal import conformal_scale

Array = NDArray[np.float64]

KINDS = ("posterior", "distance", "ensemble")
WAYS = {"atom": "per atom", "structure": "per structure"}
"""what counts once in the calibration of atomic uncertainties (``uncertainty.atoms_by``): atoms or maxima"""
_LEVELS = np.arange(0.05, 0.951, 0.05)  # confidence levels of the miscalibration
_FIELDS = tuple(CalibrationData.__dataclass_fields__)


@dataclass(frozen=True)
class Sizes:
    """Structures of every split."""

    training: int
    calibration: int
    test: int

    @property
    def total(self) -> int:
        """Structures needed."""
        return self.training + self.calibration + self.test


@dataclass(frozen=True)
class Outcome:
    """Errors and uncalibrated uncertainties of one kind in one split."""

    kind: str
    split: int
    calibration: CalibrationData
    test: CalibrationData

    def force_scale(self, alpha: float, way: str) -> tuple[float, float]:
        """(factor on all u_i, confidence attained by the calibration set) for a miscoverage ``alpha``.

        ``way``: a key of `WAYS`, that is one ratio per atom, or max error / max u of each structure.
        """
        data = self.calibration
        pair = (data.atom_error, data.atom_u) if way == "atom" else (data.largest_error, data.largest_u)
        found = conformal_scale(*pair, alpha)
        return found.scale, found.attainable

    def energy_share(self, alpha: float) -> float:
        """Share of the test structures with |ΔE|/n at most the calibrated u."""
        scale = conformal_scale(self.calibration.energy_error, self.calibration.energy_u, alpha).scale
        return share_covered(self.test.energy_error, scale * self.test.energy_u)

    def atom_share(self, alpha: float, way: str) -> float:
        """Share of the test atoms with RMSE(F_i) at most the calibrated u_i."""
        return share_covered(self.test.atom_error, self.force_scale(alpha, way)[0] * self.test.atom_u)

    def structure_share(self, alpha: float, way: str) -> float:
        """Share of the test structures with max_i RMSE(F_i) at most the calibrated max_i u_i: under the diagonal."""
        return share_covered(self.test.largest_error, self.force_scale(alpha, way)[0] * self.test.largest_u)

    def miscalibration(self, way: str) -> float:
        """Mean |share found - confidence| over confidences of 5 to 95 %: of atoms, or of structures' maxima.

        Confidences that the calibration set cannot attain count with the one that it attains.
        """
        share = self.atom_share if way == "atom" else self.structure_share
        gaps = [abs(share(1.0 - c, way) - min(c, self.force_scale(1.0 - c, way)[1])) for c in _LEVELS]
        return float(np.mean(gaps))


def calibration_study(
    structures: Sequence[Atoms],
    sizes: Sizes,
    splits: int,
    kinds: Sequence[str],
    model: ModelSettings,
    training: TrainingSettings,
    uncertainty: UncertaintySettings,
    folder: Path,
    seed: int = 0,
    report: Callable[[str], None] = lambda _: None,
    base: Path | str = ".",
) -> list[Outcome]:
    """Train, calibrate and test on random splits; what an earlier call has finished in ``folder`` is not repeated.

    Args:
        structures: labelled (energy, forces).
        sizes: of the splits; a split takes a random choice of the structures.
        splits: number of them.
        kinds: of uncertainty; all but 'ensemble' use its first network only.
        model, training: of the networks.
        uncertainty: everything but ``kind``, ``alpha`` and ``atoms_by``; all elements have one factor.
        folder: for trainings, model files and results.
        seed: of the splits and the networks.
        report: called with one line per step.
        base: folder that may hold the module of a back end.

    Raises:
        DataError: too few structures, or structures without labels.
        SettingsError: there is no back end ``model.kind``, or it lacks one of the kinds.
    """
    check_labelled(structures, "data set")
    if len(structures) < sizes.total:
        raise DataError(
            f"{sizes.training} + {sizes.calibration} + {sizes.test} structures are needed for a split, but there are "
            f"only {len(structures)}."
        )
    network = model.model_dump(exclude=SETTINGS) | baseline_settings(model)  # without a baseline as in earlier versions
    given = [dataset_hash(structures), vars(sizes), seed, network, training.model_dump()]
    wanted = {
        kind: uncertainty.model_copy(update={"kind": kind, "atoms_by": "atom", "by_element": False}) for kind in kinds
    }
    base = Path(base).absolute()
    for settings in wanted.values():
        check_backend(model, settings, base)
    backend = backend_of(model, base)
    outcomes = []
    for split in range(splits):
        where = folder / f"split_{split:03d}"
        keys = {kind: content_hash([*given, split, key_values(settings)]) for kind, settings in wanted.items()}
        found = {kind: _read(where / f"{kind}.npz", kind, split, key) for kind, key in keys.items()}
        missing = {kind: wanted[kind] for kind, outcome in found.items() if outcome is None}
        if missing:
            parts = _parts(structures, sizes, seed, split)
            count = max(settings.networks for settings in missing.values())
            report(f"split {split}: training of {count} network{'s' if count > 1 else ''}")
            own = int(np.random.SeedSequence([seed, split, 1]).generate_state(1)[0])
            table, labels = TrainingTable(model, training), Labels(parts[0], parts[1])
            checkpoints = train_networks(backend, count, table, labels, where / "training", own)
            for kind, settings in missing.items():
                report(f"split {split}: {kind}")
                path = where / f"{kind}.pt"
                used = checkpoints[: settings.networks]
                export_checkpoints(backend, used, model, parts[0], parts[1], settings, path)
                found[kind] = _evaluate(path, kind, split, parts[1], parts[2])
                _write(where / f"{kind}.npz", found[kind], keys[kind])  # type: ignore[arg-type]
        outcomes += [outcome for outcome in found.values() if outcome is not None]
    return outcomes


def _parts(structures: Sequence[Atoms], sizes: Sizes, seed: int, split: int) -> list[list[Atoms]]:
    """Training, calibration and test structures of a split."""
    order = np.random.default_rng(np.random.SeedSequence([seed, split])).permutation(len(structures)).tolist()
    limits = np.cumsum([0, sizes.training, sizes.calibration, sizes.test]).tolist()
    return [[structures[i] for i in order[a:b]] for a, b in pairwise(limits)]


def _evaluate(path: Path, kind: str, split: int, calibration: Sequence[Atoms], test: Sequence[Atoms]) -> Outcome:
    """Errors and uncertainties of a model file, its calibration divided out."""
    evaluator = Model(path, "double")
    record = evaluator.metadata["uncertainty"]
    factors = {"energy_u": record["energy"]["scale"], "atom_u": record["forces"]["scale"]}
    factors["largest_u"] = factors["atom_u"]
    raw = []
    for structures in (calibration, test):
        data = calibration_data(structures, evaluator.predict(structures))
        raw.append(CalibrationData(**{name: getattr(data, name) / factors.get(name, 1.0) for name in _FIELDS}))
    return Outcome(kind, split, raw[0], raw[1])


def _write(path: Path, outcome: Outcome, key: str) -> None:
    parts = {"calibration": outcome.calibration, "test": outcome.test}
    arrays = {f"{part}_{name}": getattr(data, name) for part, data in parts.items() for name in _FIELDS}
    with replacing(path) as file:
        np.savez_compressed(file, key=key, **arrays)


def _read(path: Path, kind: str, split: int, key: str) -> Outcome | None:
    """A finished outcome, or None if there is none of this study."""
    if not path.exists():
        return None
    with np.load(path) as content:
        if str(content["key"]) != key:
            return None
        parts = [
            CalibrationData(**{name: content[f"{part}_{name}"] for name in _FIELDS}) for part in ("calibration", "test")
        ]
    return Outcome(kind, split, parts[0], parts[1])


# ------------------------------------------------------------------------------------------ results


def summary_rows(outcomes: Sequence[Outcome], alphas: Sequence[float]) -> list[list[str]]:
    """One row per kind, way of calibration and confidence; numbers are mean ± standard deviation over the splits.

    Columns: kind, calibrated, confidence wanted, confidence attained, share of structures under the diagonal (largest
    error against largest u), share of atoms, share of energies, factor, miscalibration, Spearman and Pearson
    correlation of largest u and largest error.
    """
    rows = []
    for kind, group in _by_kind(outcomes).items():
        for way, words in WAYS.items():
            for alpha in alphas:
                scales = [outcome.force_scale(alpha, way) for outcome in group]
                rows.append(
                    [
                        kind,
                        words,
                        f"{1.0 - alpha:.2f}",
                        f"{np.mean([attained for _, attained in scales]):.3f}",
                        _spread([outcome.structure_share(alpha, way) for outcome in group]),
                        _spread([outcome.atom_share(alpha, way) for outcome in group]),
                        _spread([outcome.energy_share(alpha) for outcome in group]),
                        _spread([scale for scale, _ in scales], ".3g"),
                        _spread([outcome.miscalibration(way) for outcome in group]),
                        _spread([spearman(o.test.largest_u, o.test.largest_error) for o in group], ".2f"),
                        _spread([pearson(o.test.largest_u, o.test.largest_error) for o in group], ".2f"),
                    ]
                )
    return rows


HEAD = (
    "kind",
    "calibrated",
    "wanted",
    "attained",
    "structures",
    "atoms",
    "energies",
    "factor",
    "miscalibration",
    "Spearman",
    "Pearson",
)
"""titles of `summary_rows`"""


def write_study(
    outcomes: Sequence[Outcome], sizes: Sizes, alphas: Sequence[float], out: Path, title: str
) -> list[Path]:
    """Tables and figures as calibration.md, calibration.html and PNG files in ``out``."""
    document = Document(title)
    groups = _by_kind(outcomes)
    splits = len(next(iter(groups.values())))
    document.introduction.append(
        f"{counted(splits, 'random split')} into {sizes.training} training, {sizes.calibration} calibration and "
        f"{sizes.test} test structures. The calibration structures also served for early stopping. "
        "Mean ± standard deviation over splits."
    )
    errors = [[kind, *_errors(group)] for kind, group in groups.items()]
    document.section("Errors on the test structures").table(["kind", "E (meV/atom)", "F (eV/Å)"], errors)
    section = document.section("Calibration")
    section.table(HEAD, summary_rows(outcomes, alphas))
    section.text(
        "Shares count test errors that do not exceed their calibrated uncertainty: RMSE over x, y, z of every atom's "
        "force against u_i (atoms), the largest of a structure against its largest u_i (structures: those under the "
        "diagonal of the figures), |ΔE|/n against u (energies). Atoms of one structure are not independent: "
        "calibration per atom guarantees the share of atoms, not that of largest errors; calibration per structure "
        "guarantees the latter. Where the calibration set is too small for the wanted confidence, the attained one is "
        "guaranteed. Miscalibration: mean |found - expected| over confidences of 5 to 95 %, of atoms (calibrated per "
        "atom) or of structures (per structure)."
    )
    for way, words in WAYS.items():
        panels = {}
        for alpha in alphas:
            for kind, group in groups.items():
                u = np.concatenate([o.force_scale(alpha, way)[0] * o.test.largest_u for o in group])
                error = np.concatenate([o.test.largest_error for o in group])
                panels[f"{kind}, {100 * (1 - alpha):.0f} % confidence"] = (u, error)
        path = group_calibration_figure(panels, out / f"calibration_{way}.png", columns=len(groups))
        section.picture(path, f"Calibrated {words}: largest uncertainty of a structure against its largest error")
    path = reliability_figure(groups, out / "reliability.png")
    section.picture(
        path, "Share of test errors that an uncertainty covers against the confidence it was calibrated for"
    )
    return [*document.pictures(), *document.write(out, "calibration")]


def reliability_figure(groups: Mapping[str, Sequence[Outcome]], path: Path) -> Path:
    """Share found against confidence, mean ± standard deviation over splits, for both ways of calibration."""
    figure = new_figure(8.0, 4.2, square=True)
    what = {"atom": "Atoms, calibrated per atom", "structure": "Largest of a structure, calibrated per structure"}
    for axes, (way, title) in zip(figure.subplots(1, 2, sharey=True), what.items(), strict=True):
        for (kind, group), colour in zip(groups.items(), COLOURS, strict=False):
            shares = np.array(
                [[(o.atom_share if way == "atom" else o.structure_share)(1.0 - c, way) for c in _LEVELS] for o in group]
            )
            spread = shares.std(axis=0, ddof=1) if len(group) > 1 else np.zeros(len(_LEVELS))
            mean = shares.mean(axis=0)
            axes.plot(_LEVELS, mean, "-o", color=colour, markersize=3, label=kind)
            axes.fill_between(_LEVELS, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="Confidence")
        axes.set_title(title, fontsize=9.5)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="upper left")
    figure.axes[0].set_ylabel("Share of test errors covered")
    return save(figure, path)


def _by_kind(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.kind, []).append(outcome)
    return groups


def _errors(group: Sequence[Outcome]) -> tuple[str, str]:
    return _spread([o.test.energy_rmse for o in group], ".2f"), _spread([o.test.force_rmse for o in group])


def _spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean ± sample standard deviation."""
    mean = format(float(np.mean(values)), form)
    return mean if len(values) < 2 else f"{mean} ± {format(float(np.std(values, ddof=1)), form)}"
