"""Ways to calibrate, on finished runs: python calibrations.py panel_run/*/before_seed*

What each would have promised, with the models of these runs, of the labels that the runs have chosen, and what is
found. Nothing is run: with another factor, replicas would have stopped elsewhere and other structures would have been
chosen, so this is a first look only. Needs run folders with their models (panel.py run without --tidy).

held-out: labels that were held out (validation labels); new: also new labels, as the model that chose them had
predicted them, with the weight 0.5^(age/half-life); new only: from the second model on no held-out ones. One factor
over atoms or over the largest error and u of each structure; one for all elements, or one each.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ase import Atoms

from ubmd.calculator import Model
from ubmd.data.constraints import is_fixed
from ubmd.data.structures import read_structures
from ubmd.measure.errors import calibration_data
from ubmd.runs.folder import RunFolder
from ubmd.uncertainty.calibration import Calibration, Outcome, calibrate

ALPHA = 0.05
HALF_LIVES = (1.0, 3.0, np.inf)


@dataclass(frozen=True)
class Scheme:
    """A way to calibrate."""

    name: str
    by_structure: bool
    by_element: bool
    half_life: float | None = None
    """iterations; None: no new labels"""
    with_held_out: bool = True


@dataclass(frozen=True)
class Iteration:
    """What a model said, before calibration, of labels that it had not learnt."""

    held_out: list[Outcome]
    chosen: list[Outcome]
    elements: list[int]


def schemes() -> Iterator[Scheme]:
    """All that are compared."""
    for by_structure, by_element in itertools.product((False, True), (False, True)):
        yield Scheme("held-out", by_structure, by_element)
        for half_life in HALF_LIVES:
            yield Scheme(f"new, half-life {half_life:g}", by_structure, by_element, half_life)
        yield Scheme("new only, half-life 3", by_structure, by_element, 3.0, with_held_out=False)


def outcomes(model: Model, structures: Sequence[Atoms]) -> list[Outcome]:
    """Errors and uncertainties before calibration; fixed atoms are left out."""
    record, found = model.metadata["uncertainty"], []
    factors = dict(zip(model.elements, model.metadata.get("atom_scale", [1.0] * len(model.elements)), strict=True))
    for atoms, p in zip(structures, model.predict(structures), strict=True):
        data, free = calibration_data([atoms], [p]), ~is_fixed(atoms)
        u = p.atomic_u / (record["forces"]["scale"] * np.array([factors[symbol] for symbol in atoms.symbols]))
        energy = float(data.energy_error[0]), p.u / record["energy"]["scale"]
        found.append(Outcome(*energy, atoms.numbers[free], data.atom_error[free], u[free]))
    return found


def read_run(path: Path) -> list[Iteration]:
    """All iterations of a run."""
    folder, found = RunFolder(path), []
    labels = read_structures(folder.dataset, labelled=True)
    for entry in folder.read_history():
        number = entry["iteration"]
        model = Model(folder.iteration(number) / "model.pt")
        before = [a for a in labels if a.info["iteration"] < number and a.info["split"] == "valid"]
        chosen = [a for a in labels if a.info["iteration"] == number and not a.info.get("random", False)]
        elements = sorted({int(z) for atoms in labels for z in atoms.numbers})
        found.append(Iteration(outcomes(model, before), outcomes(model, chosen), elements))
    return found


def calibrated(run: Sequence[Iteration], number: int, scheme: Scheme) -> Calibration:
    """The calibration of an iteration's model."""
    said = list(run[number].held_out) if scheme.with_held_out or number == 0 else []
    for k in range(number if scheme.half_life else 0):
        weight = 0.5 ** ((number - 1 - k) / scheme.half_life)
        said += [replace(outcome, weight=weight) for outcome in run[k].chosen]
    return calibrate(said, ALPHA, scheme.by_structure, run[number].elements if scheme.by_element else None)


def row(runs: Sequence[Sequence[Iteration]], scheme: Scheme) -> list[str]:
    """One line of the table."""
    jumps, promised, structures, atoms, excess = [], [], [], [], []
    for run in runs:
        found = [calibrated(run, k, scheme) for k in range(len(run))]
        scales = np.log([one.forces.scale for one in found])
        jumps += np.abs(np.diff(scales)).tolist()
        for one, iteration in zip(found, run, strict=True):
            for outcome in iteration.chosen:
                factor = one.atom_scale or dict.fromkeys(iteration.elements, 1.0)
                u = one.forces.scale * np.array([factor[int(z)] for z in outcome.numbers]) * outcome.u
                promised.append(min(one.forces.attainable, 1.0 - ALPHA))
                structures.append(outcome.errors.max() <= u.max())
                atoms.append(np.mean(outcome.errors <= u))
                excess.append(u.max() / outcome.errors.max())
    what = ["structure" if scheme.by_structure else "atom", "each" if scheme.by_element else "all"]
    means = [np.mean(values) for values in (promised, structures, atoms)]
    return [
        scheme.name,
        *what,
        *(f"{mean:.2f}" for mean in means),
        f"{np.median(excess):.1f}",
        f"{np.median(jumps):.2f}",
    ]


def main() -> None:
    """The table."""
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    runs = [read_run(Path(name)) for name in sys.argv[1:]]
    count = sum(len(iteration.chosen) for run in runs for iteration in run)
    head = ["calibrated on", "counts", "elements", "promised", "maxima covered", "atoms covered", "max u / max error"]
    print(f"{len(runs)} runs, {count} chosen labels\n")
    print("| " + " | ".join([*head, "jump"]) + " |")
    print("|" + "---|" * (len(head) + 1))
    for scheme in schemes():
        print("| " + " | ".join(row(runs, scheme)) + " |")


if __name__ == "__main__":
    main()
