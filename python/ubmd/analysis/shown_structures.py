"""Which structures of a run its report shows, and what is known of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.analysis.predictions import Unseen
from ubmd.analysis.run_data import Frames, value_or_nan
from ubmd.measure.errors import calibration_data
from ubmd.runs.records import RoundEntry

Array = NDArray[np.float64]
_Key = tuple[int, int, int]  # iteration, replica, step of a frame

TEST, LABEL, REJECTED, FRAME = "test structure", "label", "rejected structure", "uncertain frame"
_LIMITS = {TEST: 120, LABEL: 120, REJECTED: 30, FRAME: 30}
_MOST_ATOMS = 20_000
RULE = (
    "Of each kind those with the largest uncertainty or error are shown, and others evenly spaced in that order: at "
    f"most {_LIMITS[LABEL]} labels, {_LIMITS[TEST]} test structures, {_LIMITS[REJECTED]} rejected structures and "
    f"{_LIMITS[FRAME]} frames, fewer where they have more than {_MOST_ATOMS:,} atoms together."
)


@dataclass(frozen=True)
class Shown:
    """A structure of a report; what is not known is NaN, None or empty."""

    atoms: Atoms = field(repr=False)
    kind: str
    """TEST, LABEL, REJECTED or FRAME"""
    place: str = ""
    """where it comes from, such as 'iteration 2, replica 0, step 300'"""
    iteration: float = np.nan
    u: float = np.nan
    """largest uncertainty of an atom, or predicted largest error, eV/Å"""
    error: float = np.nan
    """true error that u is about, eV/Å"""
    energy: float = np.nan
    """of the reference, eV/atom"""
    atomic_u: Array | None = None
    """uncertainty of each atom [N], eV/Å"""
    forces: Array | None = None
    """of the reference [N, 3], eV/Å"""
    note: str = ""
    """such as why it was rejected"""
    atomic_error: Array | None = None
    """RMSE(F_i) of each atom [N], eV/Å"""

    @property
    def rank(self) -> tuple[float, float]:
        """Structures with smaller values come first: large errors, then, where there are none, large uncertainties."""
        return (-np.nan_to_num(self.error, nan=-1.0), -np.nan_to_num(self.u, nan=-1.0))


def structures_of_loop(
    labels: Sequence[Atoms], rejected: Sequence[Atoms], frames: Frames, unseen: Unseen | None
) -> list[Shown]:
    """Labels, test structures, rejected structures and the most uncertain other frames of an active-learning loop.

    Args:
        labels: the data set.
        rejected: structures without a label; ``info["reason"]`` says why.
        frames: of the MD.
        unseen: labelled structures with predictions of a model that was not trained on them.
    """
    keys = zip(frames.iteration.tolist(), frames.replica.tolist(), frames.step.tolist(), strict=True)
    uncertainties: dict[_Key, Atoms] = dict(zip(keys, frames.structures, strict=True))
    shown = _unseen(unseen) if unseen else []
    predicted = {_key(one.atoms) for one in shown if one.kind == LABEL}
    shown += [_labelled(atoms, LABEL, uncertainties) for atoms in labels if _key(atoms) not in predicted]
    shown += [_labelled(atoms, REJECTED, uncertainties) for atoms in rejected]
    taken = {_key(atoms) for atoms in (*labels, *rejected)}
    others = [(key, atoms) for key, atoms in uncertainties.items() if key not in taken]
    others.sort(key=lambda pair: -_largest(_uncertainty(pair[1], len(pair[1]))))
    shown += [_frame(key, atoms) for key, atoms in others[: _LIMITS[FRAME]]]
    return thinned(shown)


def structures_of_dynamic_run(
    labels: Sequence[Atoms], rejected: Sequence[Atoms], history: Sequence[RoundEntry]
) -> list[Shown]:
    """Labels, with the errors before they were learnt, and rejected structures of a dynamic run."""
    asked = {item.label: item for entry in history for item in entry.asked if item.label is not None}
    shown = [_labelled(atoms, REJECTED, {}, "round") for atoms in rejected]
    for atoms in labels:
        item = asked.get(int(atoms.info.get("label", -1)))
        u, error = (value_or_nan(value) for value in (item.error_before, item.true_before)) if item else (np.nan,) * 2
        shown.append(_labelled(atoms, LABEL, {}, "round", u, error))
    return thinned(shown)


def thinned(structures: Sequence[Shown]) -> list[Shown]:
    """What `RULE` says, kind by kind, the largest error or uncertainty first; without atoms that flew to infinity."""
    drawable = [one for one in structures if len(one.atoms) and np.isfinite(one.atoms.positions).all()]
    groups = {kind: sorted((s for s in drawable if s.kind == kind), key=lambda s: s.rank) for kind in _LIMITS}
    chosen = _thin(groups, 1.0)
    atoms = sum(len(one.atoms) for one in chosen)
    return _thin(groups, _MOST_ATOMS / atoms) if atoms > _MOST_ATOMS else chosen


def _thin(groups: Mapping[str, Sequence[Shown]], factor: float) -> list[Shown]:
    chosen: list[Shown] = []
    for group in groups.values():
        if group:
            limit = max(1, int(factor * min(len(group), _LIMITS[group[0].kind])))
            first = -(-limit // 3) if limit < len(group) else limit
            rest = np.linspace(first, len(group) - 1, limit - first).round().astype(int)
            chosen += [group[k] for k in (*range(first), *rest.tolist())]
    return chosen


def _unseen(unseen: Unseen) -> list[Shown]:
    """Structures with predictions: test structures, or labels that stand in for them."""
    data = calibration_data(unseen.structures, unseen.predictions)
    errors = np.split(data.atom_error, np.cumsum([len(atoms) for atoms in unseen.structures])[:-1])
    shown = []
    for k, (atoms, prediction) in enumerate(zip(unseen.structures, unseen.predictions, strict=True)):
        is_label = "label" in atoms.info
        shown.append(
            Shown(
                atoms,
                LABEL if is_label else TEST,
                _place(atoms) if is_label else f"structure {k} of the test set",
                _number(atoms, "iteration") if is_label else np.nan,
                float(data.largest_u[k]),
                float(data.largest_error[k]),
                float(atoms.get_potential_energy()) / len(atoms),
                np.asarray(prediction.atomic_u, dtype=np.float64),
                np.asarray(atoms.get_forces()),
                atomic_error=errors[k],
            )
        )
    return shown


def _labelled(
    atoms: Atoms,
    kind: str,
    frames: Mapping[_Key, Atoms],
    turn: str = "iteration",
    u: float = np.nan,
    error: float = np.nan,
) -> Shown:
    """A label or rejected structure, with the uncertainty of the frame that it was."""
    frame = frames.get(_key(atoms))
    atomic_u = _uncertainty(frame, len(atoms)) if frame is not None else None
    results = atoms.calc.results if atoms.calc is not None else {}
    return Shown(
        atoms,
        kind,
        _place(atoms, turn),
        _number(atoms, "iteration"),
        u if np.isfinite(u) else _largest(atomic_u),
        error,
        float(results.get("energy", np.nan)) / max(len(atoms), 1),
        atomic_u,
        np.asarray(results["forces"]) if "forces" in results else None,
        str(atoms.info.get("reason", "")),
    )


def _frame(key: _Key, atoms: Atoms) -> Shown:
    atomic_u = _uncertainty(atoms, len(atoms))
    place = "iteration {}, replica {}, step {:,}".format(*key)
    return Shown(atoms, FRAME, place, float(key[0]), _largest(atomic_u), atomic_u=atomic_u)


def _uncertainty(frame: Atoms, atoms: int) -> Array | None:
    """As a frame has them [N], if they are numbers: frames may come from anyone."""
    values = frame.arrays.get("atomic_uncertainty")
    if values is None or values.shape != (atoms,) or values.dtype.kind not in "if" or not np.isfinite(values).all():
        return None
    return np.asarray(values, dtype=np.float64)


def _largest(atomic_u: Array | None) -> float:
    return float(np.max(atomic_u)) if atomic_u is not None and len(atomic_u) else np.nan


def _key(atoms: Atoms) -> _Key:
    """(iteration, replica, step) of a structure: which frame it was."""
    name = "first_iteration" if "first_iteration" in atoms.info else "iteration"  # some wait for an iteration
    return (int(atoms.info.get(name, -1)), int(atoms.info.get("replica", -1)), int(atoms.info.get("step", -1)))


def _place(atoms: Atoms, turn: str = "iteration") -> str:
    iteration, replica, step = _key(atoms)
    if iteration < 0:
        return f"start structure {replica}"
    return f"{turn} {iteration}, replica {replica}, step {step:,}"


def _number(atoms: Atoms, key: str) -> float:
    return float(atoms.info.get(key, np.nan))
