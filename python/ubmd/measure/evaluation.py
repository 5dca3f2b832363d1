"""A model on structures: predictions, errors where there are labels, uncertainties everywhere (`ubmd.evaluate`).

An atomic error is RMSE(F_i), the root mean square over x, y, z of an atom's force error: what u_i is calibrated to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from ubmd.calculator import Model, Prediction
from ubmd.data.labels import EV_PER_A3_IN_MPA, LABELS, check_structure, labels_of, sources_of, take_labels
from ubmd.data.periodicity import stress_components
from ubmd.data.structures import read_contents
from ubmd.devices import CPU
from ubmd.errors import ArgumentError, DataError
from ubmd.measure.errors import pearson, share_covered, spearman

Array = NDArray[np.float64]
ATOMS_AT_ONCE = 4096
"""between two reports of progress"""
NO_GROUP = "(none)"
"""group of the frames that lack the key"""


@dataclass(frozen=True)
class Place:
    """Where a frame comes from."""

    file: str
    """empty for structures in memory"""
    number: int
    """in its file or list, from 0"""

    def __str__(self) -> str:
        return f"{self.file}, frame {self.number}" if self.file else f"structure {self.number}"


@dataclass(frozen=True)
class WorstAtom:
    """The atom of a frame with the largest force error, or uncertainty."""

    frame: int
    """index in the `Evaluation`"""
    place: Place
    atom: int
    """in its frame, from 0"""
    element: str
    error: float | None
    """RMSE(F_i) over x, y, z, eV/Å; None without forces to compare with"""
    u: float
    """u_i, eV/Å"""


@dataclass(frozen=True)
class _Difference:
    """Model minus label of one frame, where it has the label."""

    energy: float | None
    """eV/atom"""
    forces: Array | None
    """[n, 3] eV/Å"""
    stress: Array
    """components that the periodicity allows, eV/Å^3; empty without label"""


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Sequence[Prediction]):
    """Predictions of a model for S structures, and how they compare with labels; a sequence of `Prediction`.

    ``evaluation[k]`` is what the model says about ``evaluation.frames[k]``; a slice is an `Evaluation` of its part.
    """

    frames: list[Atoms]
    """copies; labels, where there are any, in a ``SinglePointCalculator``"""
    predictions: list[Prediction]
    """one for each frame"""
    places: list[Place]
    """where each frame comes from"""
    record: Mapping[str, Any]
    """of the model file, as `ubmd info` prints it"""
    skipped: list[Place] = field(default_factory=list)
    """frames that were left out: the model does not know an element"""

    # ------------------------------------------------------------------------------------------ a sequence

    def __len__(self) -> int:
        return len(self.predictions)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...

    @overload
    def __getitem__(self, index: slice) -> Evaluation: ...

    def __getitem__(self, index: int | slice) -> Prediction | Evaluation:
        return self.select(range(len(self))[index]) if isinstance(index, slice) else self.predictions[index]

    def __repr__(self) -> str:
        found = self.errors()
        parts = [f"{len(self)} structures", f"{int(self.labelled.sum())} labelled"]
        for name, unit in (("energy", "meV_per_atom"), ("force", "eV_per_A")):
            value = found[f"{name}_rmse_{unit}"]
            parts += [] if value is None else [f"{name} RMSE {value:.3g} {_TEXTS[unit]}"]
        return f"<Evaluation: {', '.join(parts)}>"

    def select(self, indices: Iterable[int]) -> Evaluation:
        """The evaluation of some of the frames, by their indices."""
        chosen = list(indices)
        return Evaluation(
            [self.frames[k] for k in chosen],
            [self.predictions[k] for k in chosen],
            [self.places[k] for k in chosen],
            self.record,
        )

    def groups(self, key: str) -> dict[str, Evaluation]:
        """Parts with equal ``atoms.info[key]``, e.g. "config_type", in order; frames without it are "(none)".

        >>> {name: part.errors()["force_rmse_eV_per_A"] for name, part in found.groups("config_type").items()}
        {'bulk': 0..., 'strained': 0...}
        """
        members: dict[str, list[int]] = defaultdict(list)
        for k, atoms in enumerate(self.frames):
            members[str(atoms.info.get(key, NO_GROUP))].append(k)
        return {name: self.select(members[name]) for name in sorted(members, key=_by_size)}

    # ------------------------------------------------------------------------------------------ arrays

    @property
    def energy(self) -> Array:
        """Energies [S], eV."""
        return np.array([p.energy for p in self.predictions])

    @property
    def u(self) -> Array:
        """Calibrated uncertainties of the structures [S], eV/atom."""
        return np.array([p.u for p in self.predictions])

    @property
    def max_u(self) -> Array:
        """Largest atomic uncertainty of each structure [S], calibrated, eV/Å."""
        return np.array([p.atomic_u.max() for p in self.predictions])

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which structures [S] have an energy or forces to compare with: ``labelled.all()``, ``labelled.any()``."""
        return np.array([d.energy is not None or d.forces is not None for d in self._differences], dtype=bool)

    @property
    def energy_error(self) -> Array:
        """Model minus label [S], eV/atom; NaN without an energy to compare with."""
        return np.array([np.nan if d.energy is None else d.energy for d in self._differences])

    @property
    def max_force_error(self) -> Array:
        """Largest RMSE(F_i) over x, y, z of each structure [S], eV/Å; NaN without forces to compare with."""
        return np.array([np.nan if errors is None else errors.max() for errors in self.atomic_errors])

    @cached_property
    def atomic_errors(self) -> list[Array | None]:
        """RMSE(F_i) over x, y, z [n] of each structure, eV/Å; None without forces to compare with."""
        forces = (d.forces for d in self._differences)
        return [None if f is None else np.sqrt(np.mean(f**2, axis=1)) for f in forces]

    @cached_property
    def _labels(self) -> list[dict[str, Any]]:
        return [labels_of(atoms) for atoms in self.frames]

    @cached_property
    def _differences(self) -> list[_Difference]:
        return [_difference(*trio) for trio in zip(self.frames, self._labels, self.predictions, strict=True)]

    # ------------------------------------------------------------------------------------------ errors

    def errors(self) -> dict[str, float | int | None]:
        """Errors over all labels that there are, as `ubmd eval --json` prints them; None without such labels.

        Returns:
            ``structures``, ``labelled``, ``atoms``: how many.
            RMSE and MAE: ``energy_{rmse,mae}_meV_per_atom``, ``force_{rmse,mae}_eV_per_A`` (components),
            ``stress_{rmse,mae}_MPa`` (components).
            Relative, in %: ``force_rmse_percent`` of the rms of the labels' force components; ``energy_rmse_percent``
            of the spread of the labels' energies per atom around the mean of their composition.
            Shares of errors that are at most the calibrated uncertainty: ``energy_share_below_u`` (\\|ΔE\\|/n, u),
            ``force_share_below_u`` (RMSE(F_i), u_i, of all atoms), ``max_force_share_below_u`` (largest RMSE(F_i),
            largest u_i, of structures).
            ``max_force_error_eV_per_A``: the largest RMSE(F_i).
            ``max_u_{median,percentile_95,largest}_eV_per_A``: of the largest u_i of the structures, labelled or not.
            ``{spearman,pearson}_max_u_error``: correlation of largest u_i and largest RMSE(F_i) of structures.
        """
        return {
            "structures": len(self),
            "labelled": int(self.labelled.sum()),
            "atoms": sum(len(atoms) for atoms in self.frames),
            **self._energy_errors(),
            **self._force_errors(None),
            **_rmse_and_mae("stress", "MPa", EV_PER_A3_IN_MPA * _joined(d.stress for d in self._differences)),
            **self._structure_shares(),
            **self._uncertainties(),
        }

    def by_element(self) -> dict[str, dict[str, float | int | None]]:
        """Force errors of the atoms of each element, with the keys of `errors`, and ``atoms``, their number.

        ``mean_u_eV_per_A`` and ``max_u_largest_eV_per_A`` are those of their u_i.
        """
        elements = sorted({symbol for atoms in self.frames for symbol in atoms.get_chemical_symbols()})
        return {element: self._force_errors(element) | self._element_uncertainties(element) for element in elements}

    def worst(self, count: int = 5) -> list[WorstAtom]:
        """The frames with the largest force errors, worst first, each with its worst atom; only labelled ones.

        >>> worst = found.worst(2)
        >>> worst[0].error >= worst[1].error
        True
        >>> found.frames[worst[0].frame].symbols[worst[0].atom] == worst[0].element
        True
        """
        known = [(k, errors) for k, errors in enumerate(self.atomic_errors) if errors is not None]
        known.sort(key=lambda pair: -pair[1].max())
        return [self._atom(k, int(np.argmax(errors))) for k, errors in known[:count]]

    def most_uncertain(self, count: int = 5) -> list[WorstAtom]:
        """The frames with the largest atomic uncertainties, each with that atom: labelled or not."""
        order = np.argsort(-self.max_u, kind="stable")[:count].tolist()
        return [self._atom(k, int(np.argmax(self.predictions[k].atomic_u))) for k in order]

    def as_atoms(self) -> list[Atoms]:
        """Copies of the frames with the predictions as results of a ``SinglePointCalculator``, e.g. to be written.

        ``info["uncertainty"]`` (eV/atom) and ``arrays["atomic_uncertainty"]`` (eV/Å) are the uncertainties, as in
        frames of fix ubmd. Labels
        are in ``info["REF_energy"]`` (eV), ``arrays["REF_forces"]`` (eV/Å), ``info["REF_stress"]`` ([3, 3] eV/Å^3).
        Where frames come from files, ``info["source_file"]`` and ``info["source_frame"]`` say from where.
        """
        return [_with_results(*parts) for parts in zip(self.frames, self._labels, self, self.places, strict=True)]

    def _atom(self, frame: int, atom: int) -> WorstAtom:
        errors, u = self.atomic_errors[frame], self.predictions[frame].atomic_u
        element = str(self.frames[frame].symbols[atom])
        error = None if errors is None else float(errors[atom])
        return WorstAtom(frame, self.places[frame], atom, element, error, float(u[atom]))

    def _energy_errors(self) -> dict[str, float | None]:
        errors = self.energy_error[np.isfinite(self.energy_error)]
        by_composition: dict[str, list[float]] = defaultdict(list)
        for atoms, labels in zip(self.frames, self._labels, strict=True):
            if "energy" in labels:
                composition = atoms.symbols.formula.reduce()[0].format("hill")
                by_composition[composition].append(labels["energy"] / len(atoms))
        spread = _joined(np.array(values) - np.mean(values) for values in by_composition.values())
        values = _rmse_and_mae("energy", "meV_per_atom", 1000.0 * errors)
        return values | {"energy_rmse_percent": _percent(errors, spread)}

    def _force_errors(self, element: str | None) -> dict[str, float | int | None]:
        """Errors of all atoms, or of those of one element; ``force_share_below_u`` is of these atoms."""
        errors, labels, atomic, u = [], [], [], []
        for k, (frame, found) in enumerate(zip(self.frames, self._labels, strict=True)):
            forces, of_atoms = self._differences[k].forces, self.atomic_errors[k]
            if forces is not None and of_atoms is not None:
                chosen = slice(None) if element is None else frame.symbols == element
                errors.append(forces[chosen].ravel())
                labels.append(found["forces"][chosen].ravel())
                atomic.append(of_atoms[chosen])
                u.append(self.predictions[k].atomic_u[chosen])
        joined, largest = _joined(errors), _joined(atomic)
        return {
            **_rmse_and_mae("force", "eV_per_A", joined),
            "force_rmse_percent": _percent(joined, _joined(labels)),
            "max_force_error_eV_per_A": float(largest.max()) if len(largest) else None,
            "force_share_below_u": _share(largest, _joined(u)),
        }

    def _element_uncertainties(self, element: str) -> dict[str, float | int | None]:
        u = _joined(p.atomic_u[a.symbols == element] for a, p in zip(self.frames, self, strict=True))
        return {"atoms": len(u), "mean_u_eV_per_A": float(u.mean()), "max_u_largest_eV_per_A": float(u.max())}

    def _structure_shares(self) -> dict[str, float | None]:
        energy, force = np.abs(self.energy_error), self.max_force_error
        known, compared = np.isfinite(energy), np.isfinite(force)
        return {
            "energy_share_below_u": _share(energy[known], self.u[known]),
            "max_force_share_below_u": _share(force[compared], self.max_u[compared]),
        }

    def _uncertainties(self) -> dict[str, float | None]:
        """Distribution of the largest u_i, and how it goes with the largest error."""
        u, known = self.max_u, np.isfinite(self.max_force_error)
        values = [np.median(u), np.percentile(u, 95), u.max()] if len(u) else [None] * 3
        names = [f"max_u_{name}_eV_per_A" for name in ("median", "percentile_95", "largest")]
        pair = u[known], self.max_force_error[known]
        found = [measure(*pair) if known.sum() > 2 else np.nan for measure in (spearman, pearson)]
        correlations = [float(value) if np.isfinite(value) else None for value in found]
        return dict(zip(names, (None if value is None else float(value) for value in values), strict=True)) | dict(
            zip(("spearman_max_u_error", "pearson_max_u_error"), correlations, strict=True)
        )


_TEXTS = {"meV_per_atom": "meV/atom", "eV_per_A": "eV/Å"}


# ------------------------------------------------------------------------------------------ evaluate


def evaluate(
    model: Path | str | Model,
    frames: Path | str | Atoms | Iterable[Atoms],
    *,
    labels: Mapping[str, str] | None = None,
    precision: str | None = None,
    device: str = CPU,
    batch: int = ATOMS_AT_ONCE,
    skip_unknown: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
    remark: Callable[[str], None] = lambda sentence: None,
) -> Evaluation:
    """Energies, forces, stresses and uncertainties of structures, compared with labels where there are any.

    Structures may differ in size, elements, cell and in the labels that they have; there may be none at all.

    >>> import ubmd
    >>> found = ubmd.evaluate("model.pt", "test.extxyz")
    >>> len(found), found[0].forces.shape  # eV/Å
    (6, (4, 3))
    >>> found.errors()["force_rmse_eV_per_A"]
    0...
    >>> bool((found.max_u > 0.0).all())  # the largest atomic uncertainty of each structure, eV/Å
    True
    >>> import ase.io
    >>> ase.io.write("predictions.extxyz", found.as_atoms())

    Args:
        model: a model file, or an ``ubmd.calculator.Model``.
        frames: a file that ASE reads, one structure, or many. Labels are those of a ``SinglePointCalculator``, or under
            the keys that usual packages write, such as ``REF_energy``; of files see `ubmd.data.structures`.
        labels: other keys or units of labels, as in settings: ``{"energy": "qm_energy:Ha"}``.
        precision: "mixed" (the default), "single" or "double", if ``model`` is a file.
        device: "cpu", "cuda" (the first GPU) or "cuda:n", if ``model`` is a file.
        batch: about so many atoms are evaluated between two calls of ``report``.
        skip_unknown: leave out structures with elements that the model does not know.
        report: called with (structures done, all structures).
        remark: called with sentences on what may be a mistake in a file.

    Raises:
        ModelError: missing or corrupt model file.
        SettingsError: torch has no such device.
        DataError: a frame that cannot be read or evaluated, or has a label that cannot be used; it is named with its
            number, from 0.
    """
    evaluator = model if isinstance(model, Model) else Model(model, precision, device)
    if isinstance(frames, Path | str):
        contents = read_contents(frames, labels, partial=True, remark=remark)
        places = [Place(str(frames), number) for number in contents.numbers]
        return evaluate_frames(evaluator, contents.structures, places, batch, skip_unknown, report)
    structures = [_taken(k, atoms, labels) for k, atoms in enumerate([frames] if isinstance(frames, Atoms) else frames)]
    places = [Place("", k) for k in range(len(structures))]
    return evaluate_frames(evaluator, structures, places, batch, skip_unknown, report)


def _taken(number: int, atoms: Atoms, mapping: Mapping[str, str] | None) -> Atoms:
    """A copy of a structure in memory, its labels where those of files are."""
    if not isinstance(atoms, Atoms):
        raise ArgumentError(f"Structure {number} is a {type(atoms).__name__}, not ase.Atoms.")
    try:
        labels_of(atoms)  # takes no labels that belong to other positions
        return take_labels(atoms, sources_of(mapping), number=number).atoms
    except DataError as error:
        raise DataError(f"structure {number}: {error}") from None


def evaluate_frames(
    evaluator: Model,
    frames: Sequence[Atoms],
    places: Sequence[Place],
    batch: int = ATOMS_AT_ONCE,
    skip_unknown: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """`evaluate` for structures whose labels are in place, and that come from these ``places``."""
    kept: list[tuple[Atoms, Place]] = []
    skipped: list[Place] = []
    for atoms, place in zip(frames, places, strict=True):
        unknown = sorted(set(atoms.get_chemical_symbols()) - set(evaluator.elements))
        if unknown and not skip_unknown:
            raise DataError(
                f"{place}: the model does not know {', '.join(unknown)}, only {', '.join(evaluator.elements)}; remove "
                "the frame, or leave out all such frames (--skip-unknown; in Python skip_unknown=True)."
            )
        _check(atoms, place)
        if unknown:
            skipped.append(place)
        else:
            kept.append((atoms, place))
    structures, origins = [atoms for atoms, _ in kept], [place for _, place in kept]
    predictions: list[Prediction] = []
    for part in _parts(structures, batch):
        predictions += _predicted(evaluator, structures[part], origins[part])
        report(len(predictions), len(structures))
    return Evaluation(structures, predictions, origins, evaluator.metadata, skipped)


def _check(atoms: Atoms, place: Place) -> None:
    """DataError that names the frame if it cannot be evaluated."""
    try:
        check_structure(atoms)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _parts(structures: Sequence[Atoms], atoms: int) -> Iterator[slice]:
    """Consecutive parts with about so many atoms, at least one structure each."""
    start = count = 0
    for k, structure in enumerate(structures, 1):
        count += len(structure)
        if count >= atoms or k == len(structures):
            yield slice(start, k)
            start, count = k, 0


def _predicted(evaluator: Model, frames: list[Atoms], places: list[Place]) -> list[Prediction]:
    """Finite predictions; an error names the frame."""
    try:
        predictions = evaluator.predict(frames)
    except DataError:
        for atoms, place in zip(frames, places, strict=True):  # once more, to know which one it is
            try:
                evaluator.predict_one(atoms)
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
        raise
    for place, p in zip(places, predictions, strict=True):
        for name, value in (("energy", p.energy), ("forces", p.forces), ("uncertainty", [p.u, *p.atomic_u])):
            if not np.isfinite(value).all():
                raise DataError(
                    f"{place}: the model gives no finite {name}; look for atoms that are too close, or remove the "
                    "frame."
                )
    return predictions


# ------------------------------------------------------------------------------------------ parts


def _difference(atoms: Atoms, labels: Mapping[str, Any], p: Prediction) -> _Difference:
    stress = "stress" in labels and p.stress is not None
    return _Difference(
        energy=(p.energy - labels["energy"]) / len(atoms) if "energy" in labels else None,
        forces=p.forces - labels["forces"] if "forces" in labels else None,
        stress=stress_components(p.stress - labels["stress"], atoms) if stress else np.empty(0),
    )


def _with_results(atoms: Atoms, labels: Mapping[str, Any], p: Prediction, place: Place) -> Atoms:
    """See `Evaluation.as_atoms`."""
    copy: Atoms = atoms.copy()
    results = {name: getattr(p, name) for name in LABELS}
    copy.calc = SinglePointCalculator(copy, **{name: value for name, value in results.items() if value is not None})
    copy.info["uncertainty"] = p.u
    copy.info["max_uncertainty"] = float(p.atomic_u.max())
    copy.set_array("atomic_uncertainty", p.atomic_u)
    if "energy" in labels:
        copy.info["REF_energy"] = labels["energy"]
    if "forces" in labels:
        copy.set_array("REF_forces", labels["forces"])
    if "stress" in labels:
        copy.info["REF_stress"] = voigt_6_to_full_3x3_stress(labels["stress"])
    if place.file:
        copy.info |= {"source_file": place.file, "source_frame": place.number}
    return copy


def _by_size(name: str) -> tuple[float, str]:
    """Numbers by their size, then texts."""
    try:
        return float(name), name
    except ValueError:
        return np.inf, name


def _joined(arrays: Iterable[Array]) -> Array:
    return np.concatenate([np.empty(0), *arrays])


def _rmse_and_mae(name: str, unit: str, errors: Array) -> dict[str, float | None]:
    rmse, mae = (float(np.sqrt(np.mean(errors**2))), float(np.mean(np.abs(errors)))) if errors.size else (None, None)
    return {f"{name}_rmse_{unit}": rmse, f"{name}_mae_{unit}": mae}


def _percent(errors: Array, labels: Array) -> float | None:
    """RMSE relative to the rms of labels, %; None where that is zero."""
    rms = float(np.sqrt(np.mean(labels**2))) if labels.size else 0.0
    return 100.0 * float(np.sqrt(np.mean(errors**2))) / rms if rms > 1e-12 else None


def _share(error: Array, u: Array) -> float | None:
    return share_covered(error, u) if len(error) else None
