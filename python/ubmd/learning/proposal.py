"""Settings that fit a user's own structures, each with its reason; `ubmd init FILE` writes them.

The displacements of the start copies were measured (2026-11-30): first models of ethanol (GFN2-xTB), copper and a
copper-gold alloy (EMT), small networks, 250 epochs, a threshold of 1.5 eV/Å, 300 K, at most 2000 steps; medians of six
replicas, seed by seed. With 8 copies and shifts of 0.02 Å: 422, 14, 14 steps (ethanol), 10 to 12 (metals); with 5 % of
the shortest distance: 2000, 218, 30 (ethanol), 1730 to 2000 (metals). With 14 % and more, stretched bonds of ethanol
were hard to learn, and replicas stopped at once. With 16 copies and 5 %: 1870, 864, 496 (ethanol).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.emt import parameters as emt_parameters

from ubmd.data.constraints import is_fixed
from ubmd.data.geometry import heights, neighbours
from ubmd.data.labels import labels_of
from ubmd.data.periodicity import describe_periodicity
from ubmd.errors import SettingsError
from ubmd.measure.confidence import structures_needed
from ubmd.settings import LoopSettings, ModelSettings, UncertaintySettings

_SEARCHED = (3.0, 6.0, 12.0)  # Å, for the shortest distance: the first that finds a pair is enough
_CONSIDERED = 50  # structures: files may hold thousands
_SHARE = 0.05  # of the shortest distance, by which start copies are displaced
_SMALL = 30  # atoms, up to which one structure says little about the scale of uncertainties
_BIG = 100  # atoms, above which a structure has many environments of its own
_MOST_ATOMS = 250  # in a repeated box
_SAME_SHELL = 0.3  # Å
_BATCHES = 20  # of new labels, for a run that begins with many


@dataclass(frozen=True)
class Suggestion:
    """A value for one setting."""

    value: Any
    reason: str
    """what follows 'Here:' in a comment"""


Suggestions = dict[str, Suggestion]
"""dotted key -> suggestion"""


def propose_run(structures: Sequence[Atoms], file: Path, stem: str) -> Suggestions:
    """Settings of an active-learning loop that starts from these structures.

    Args:
        structures: of the file, at least one.
        file: what start.labels is to be, if they all have energy and forces, or start.file.
        stem: name of the file without its ending, for the folder of the run.
    """
    atoms = list(structures[:_CONSIDERED])
    most, (distance, _) = max(len(each) for each in atoms), _shortest(atoms)
    batch = 8 if most <= _BIG else 4
    light = distance < 1.3
    return {
        "run_dir": Suggestion(f"{stem}_run", "made in the folder in which you call ubmd run"),
        **(_start_labels(structures, file, batch) if _are_labelled(structures) else _start_copies(structures, file)),
        "reference.calculator": Suggestion("ase.calculators.emt:EMT", _reference(atoms)),
        "model.cutoff": _cutoff(atoms),
        "md.ensemble": _ensemble(atoms),
        "md.timestep": _timestep(atoms),
        "md.temperature": Suggestion(300.0, "room temperature; take that of your own simulations, or a little more"),
        "md.replicas": Suggestion(
            8 if most <= 2 * _BIG else 4, f"trajectories of {most} atoms that explore independently of each other"
        ),
        "selection.batch": Suggestion(batch, f"each structure shows {most} environments of atoms"),
        "loop.threshold": Suggestion(
            1.5 if light else 1.0,
            f"above the thermal forces of {'stiff bonds' if light else 'bonds as soft as these'} at 300 K; if replicas "
            "of the first models stop within 50 steps, raise it",
        ),
    }


def _are_labelled(structures: Sequence[Atoms]) -> bool:
    return len(structures) > 1 and all({"energy", "forces"} <= labels_of(atoms).keys() for atoms in structures)


def _start_labels(structures: Sequence[Atoms], file: Path, batch: int) -> Suggestions:
    """A start from labels: none are made, but a few again."""
    count, first = len(structures), structures[0]
    more = {"loop.labels": Suggestion(count + _BATCHES * batch, f"{_BATCHES * batch} more than there are")}
    return {
        "start.labels": Suggestion(
            str(file),
            f"{count} structures with energy and forces, the first {first.get_chemical_formula()}, "
            f"{describe_periodicity(first)}. The run begins with these labels; a few are made again, so the reference "
            "below has to be the one that made them. MD starts from the first of them, or from start.file",
        ),
        **(more if count + batch > LoopSettings().labels else {}),
    }


def _start_copies(structures: Sequence[Atoms], file: Path) -> Suggestions:
    """A start from displaced copies of these structures."""
    atoms, first = list(structures[:_CONSIDERED]), structures[0]
    distance, pair = _shortest(atoms)
    many = f"{len(structures)} structures, " if len(structures) > 1 else ""
    return {
        "start.file": Suggestion(str(file), f"{many}{first.get_chemical_formula()}, {describe_periodicity(first)}"),
        "start.count": _count(max(len(each) for each in atoms)),
        "start.displacement": Suggestion(
            displacement(atoms),
            f"5 % of the shortest distance, {distance:.2f} Å ({pair}): about the thermal motion at 300 K. After "
            "smaller shifts the first replicas soon leave what the model knows; larger ones stretch bonds too far",
        ),
        "start.strain": _strain(atoms),
    }


def propose_training(structures: Sequence[Atoms], file: Path, stem: str) -> Suggestions:
    """Settings of `ubmd train` for these structures, which should be labelled; arguments as in `propose_run`."""
    count = len(structures)
    wanted = structures_needed(UncertaintySettings().alpha)
    share = round(min(0.2, max(0.1, wanted / count)) + 0.0005, 3) if count > 1 else 0.1
    held_out = max(1, round(share * count))
    few = "" if held_out >= wanted else f"; with fewer than {wanted} their confidence is below 95 %"
    labelled = sum({"energy", "forces"} <= labels_of(atoms).keys() for atoms in structures)
    return {
        "training_file": Suggestion(str(file), f"{count} structures, {labelled} with energy and forces"),
        "validation_share": Suggestion(
            share, f"{held_out} of {count} structures, which also calibrate the uncertainties{few}"
        ),
        "output_dir": Suggestion(f"{stem}_model", "made in the folder in which you call ubmd train"),
        "model.cutoff": _cutoff(structures[:_CONSIDERED]),
    }


def propose_dynamic(structures: Sequence[Atoms], file: Path, stem: str) -> Suggestions:
    """Settings of dynamic training for a crystal; arguments as in `propose_run`.

    Raises:
        SettingsError: the first structure is not periodic in all directions.
    """
    atoms = structures[0]
    if not atoms.pbc.all():
        raise SettingsError(
            f"--dynamic is for crystals, but {file} is {describe_periodicity(atoms)}; leave out --dynamic."
        )
    repeat, widths = _repeat(atoms)
    shells = _shells(atoms)
    second = round(min(5.0, 0.5 * float((widths * repeat).min())) - 0.005, 2)
    third, fourth = (round(min(second, _after(shells, k)), 2) for k in (2, 1))
    step = _timestep([atoms])
    return {
        "run_dir": Suggestion(f"{stem}_run", "made in the folder in which you call ubmd run"),
        "crystal.structure": Suggestion(str(file), f"{atoms.get_chemical_formula()}; it has to be relaxed"),
        "crystal.cutoffs": Suggestion(
            {"2": second, "3": third, "4": fourth},
            "order 2 within half the box, order 3 up to the second shell of neighbours, order 4 up to the first",
        ),
        "start.repeat": Suggestion(
            tuple(int(k) for k in repeat),
            f"a box of {len(atoms) * int(repeat.prod())} atoms, {(widths * repeat).min():.1f} Å wide",
        ),
        "reference.calculator": Suggestion("ase.calculators.emt:EMT", _reference([atoms])),
        "dynamic.temperatures": Suggestion((300.0,), "room temperature; take those of your own simulations"),
        "dynamic.timestep": step,
    }


def displacement(structures: Sequence[Atoms]) -> float:
    """Shift of start copies, ± Å, after which first models know the thermal motion at 300 K."""
    return min(max(round(_SHARE * _shortest(structures)[0], 2), 0.02), 0.2)


# ------------------------------------------------------------------------------------------ reasons


def _shortest(structures: Sequence[Atoms]) -> tuple[float, str]:
    """(shortest distance of all structures, Å; its elements as 'C-H'); 1 Å where there is no pair."""
    best, pair = math.inf, "no two atoms are near each other"
    for atoms in structures:
        for cutoff in _SEARCHED:
            first, second, vectors = neighbours(atoms, cutoff)
            if not len(vectors):
                continue
            lengths = np.linalg.norm(vectors, axis=1)
            k = int(np.argmin(lengths))
            if lengths[k] < best:
                best = float(lengths[k])
                pair = "-".join(sorted((str(atoms.symbols[first[k]]), str(atoms.symbols[second[k]]))))
            break
    return (best, pair) if math.isfinite(best) else (1.0, pair)


def _count(atoms: int) -> Suggestion:
    if atoms > _SMALL:
        return Suggestion(8, "one of them calibrates the first uncertainties")
    return Suggestion(16, "two of them calibrate the first uncertainties; with 8, a single structure would")


def _half_width(structures: Sequence[Atoms]) -> float:
    """Half the shortest perpendicular width of the cells along their periodic directions, Å; inf without any."""
    widths = [heights(np.asarray(atoms.cell)[atoms.pbc]) for atoms in structures if atoms.pbc.any()]
    return 0.5 * float(np.concatenate(widths).min()) if widths else math.inf


def _cutoff(structures: Sequence[Atoms]) -> Suggestion:
    cutoff = ModelSettings().cutoff
    half = _half_width(structures)
    if math.isinf(half):
        across = max(float(np.linalg.norm(np.ptp(atoms.positions, axis=0))) for atoms in structures)
        return Suggestion(cutoff, f"the molecule is about {across:.1f} Å across; shorter: fewer labels, faster")
    known = f"half the shortest perpendicular width of the cell, {half:.2f} Å"
    if cutoff <= half:
        return Suggestion(cutoff, f"below {known}: no atom sees two images of another")
    return Suggestion(
        cutoff,
        f"above {known}: atoms see periodic images, which move alike. The model then learns this cell well and larger "
        "ones less; a larger cell shows more",
    )


def _ensemble(structures: Sequence[Atoms]) -> Suggestion:
    first = structures[0]
    if any(is_fixed(atoms).any() for atoms in structures):
        return Suggestion("nvt", "some atoms are fixed, which does not go with a barostat")
    if not all(atoms.pbc.any() for atoms in structures):
        return Suggestion("nvt", "there is no cell that a barostat could move")
    if not first.pbc.all():
        return Suggestion("nvt", f"{describe_periodicity(first)}; the cell keeps its size")
    return Suggestion(
        "nvt",
        'the cell stays as it is. For other volumes take "npt", with md.damping = 0.1, start.strain = 0.02 and '
        "bias.stress = 0.1",
    )


def _strain(structures: Sequence[Atoms]) -> Suggestion:
    if any(is_fixed(atoms).any() for atoms in structures):
        return Suggestion(0.0, "a strain would move the fixed atoms")
    if not any(atoms.pbc.any() for atoms in structures):
        return Suggestion(0.0, "there is no cell to strain")
    return Suggestion(0.0, 'none, since the cell stays as it is in nvt; 0.02 with md.ensemble = "npt"')


def _timestep(structures: Sequence[Atoms]) -> Suggestion:
    """By the lightest mass: the fastest vibrations."""
    mass, symbol = min((float(m), str(s)) for a in structures for m, s in zip(a.get_masses(), a.symbols, strict=True))
    step = 0.5 if mass < 3.0 else 1.0 if mass < 22.0 else 2.0
    return Suggestion(
        step, f"the lightest atom is {symbol}, {mass:.3g} u (0.5 fs below 3 u, 1 fs below 22 u, else 2 fs)"
    )


def _reference(structures: Sequence[Atoms]) -> str:
    """What to write instead of the example."""
    elements = {str(symbol) for atoms in structures for symbol in atoms.symbols}
    lacking = sorted(elements - set(emt_parameters))
    toy = f"does not know {', '.join(lacking)}" if lacking else "is a toy for first trials"
    if all(atoms.pbc.any() for atoms in structures):
        others = '"espresso", "cp2k", "lammps", a foundation model ("sevennet", "chgnet")'
    else:
        others = '"tblite" (with arguments = {method = "GFN2-xTB"}), "cp2k", "openmm"'
    return f"this line is to be filled in: EMT {toy}. Choose {others} or your own ASE calculator"


def _repeat(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """(repetitions [3] that make a box of 10 Å or more, if it stays small enough; widths [3] of the cell, Å)."""
    widths = heights(np.asarray(atoms.cell))
    repeat = np.ones(3, dtype=int)
    while True:
        axis = int(np.argmin(widths * repeat))
        larger = repeat + np.eye(3, dtype=int)[axis]
        if (widths * repeat)[axis] >= 10.0 or len(atoms) * larger.prod() > _MOST_ATOMS:
            return repeat, widths
        repeat = larger


def _shells(atoms: Atoms) -> list[tuple[float, float]]:
    """(nearest, furthest) distances of the shells of neighbours up to 8 Å."""
    _, _, vectors = neighbours(atoms, 8.0)
    lengths = np.sort(np.linalg.norm(vectors, axis=1))
    parts = np.split(lengths, np.flatnonzero(np.diff(lengths) > _SAME_SHELL) + 1) if len(lengths) else []
    return [(float(part[0]), float(part[-1])) for part in parts]


def _after(shells: Sequence[tuple[float, float]], number: int) -> float:
    """A distance between a shell (from 1) and the next one, Å; 4 where there are too few."""
    return 0.5 * (shells[number - 1][1] + shells[number][0]) if len(shells) > number else 4.0
