"""Before a run: whether settings and structures fit, what would be run, and every stage once in miniature."""

from __future__ import annotations

import csv
import glob
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ase import Atoms

from ubmd.data.constraints import is_fixed
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError, StorageError, UbmdError
from ubmd.learning.given import read_given, set_aside, to_check
from ubmd.learning.loop.verify import existing_folder, state_remarks, verify
from ubmd.learning.work.clusters import tasks_at_once
from ubmd.runs.confidence import confidence
from ubmd.runs.event_records import Remark
from ubmd.runs.folder import Listener, RunFolder
from ubmd.runs.manifest import read_settings
from ubmd.runs.reading import read_events, read_iterations
from ubmd.settings import RunSettings
from ubmd.settings.run import conditions
from ubmd.texts import duration, size

_EPOCHS = 4  # of the miniature; the first is slow and not counted
_STEPS = 10  # few: MD with a model of two structures is stable for a few steps only
_BYTES_PER_RECORDED_ATOM = 12  # of a trace; atoms that do not move are compressed to nothing
_COPIES_OF_LABELS = 4
_BYTES_OF_A_REPORT = 1.6e6  # pictures, twice: the page contains them
_BYTES_OF_A_VIEWER = 4e6  # chemiscope and up to 300 structures, in the report where it is installed
_TYPICAL_BATCH_GAIN = 3.0  # a full mini-batch costs less per structure than the miniature's single ones


def miniature(settings: RunSettings, run_dir: Path, given: Path | None = None, count: int = 0) -> RunSettings:
    """The same settings, but two start labels, a few epochs, ten MD steps, one more label, no test set.

    ``given``: a file with ``count`` of the labels of ``start.labels``, instead of labels of copies.
    """
    copies = 0 if given is not None and count > 1 else 2
    start: dict[str, Any] = {"count": copies} | ({} if given is None else {"labels": given})
    labels = copies + 1 + (0 if given is None else count)
    return settings.model_copy(
        update={
            "run_dir": run_dir,
            "start": settings.start.model_copy(update=start),
            "training": settings.training.model_copy(update={"epochs": _EPOCHS}),
            "md": settings.md.model_copy(update={"replicas": 1, "steps": _STEPS, "frames_every": _STEPS // 2}),
            # A window that fills within the few steps, so that the bias is really applied.
            "bias": settings.bias.model_copy(update={"window": 2, "every": 1}),
            "selection": settings.selection.model_copy(update={"batch": 1, "duplicate_tolerance": 0.0}),
            "loop": settings.loop.model_copy(
                # A model of two structures is uncertain about everything: no threshold here.
                update={"labels": labels, "warm_epochs": _EPOCHS, "stop_when_quiet": False, "threshold": 1e9}
            ),
            # Nor does its structure have to be a realistic one, as long as the reference accepts it.
            "reference": settings.reference.model_copy(update={"force_limit": 1e3, "energy_limit": 1e3}),
            "test": None,
        }
    )


def check(settings: RunSettings, base: Path, listener: Listener | None = None) -> Iterator[str]:
    """Sentences: what would be run; then, from a miniature run in a folder beside the run's, what it would cost.

    Raises:
        UbmdError: the first mistake.
    """
    remarks: list[str] = []
    told: list[str] = []
    structures = verify(settings, base, remarks.append, told.append)
    given, _ = set_aside(read_given(settings, base), settings.reference)
    yield from plan(settings, base, structures, given)
    yield from (f"Labels of {sentence}" for sentence in told)
    yield from (f"Remark: {sentence}" for sentence in remarks)
    yield "Now every stage in miniature …"
    from ubmd.learning.loop.loop import run

    with _folder_beside(settings) as path:
        folder = RunFolder(run(_miniature_with(given, settings, path), base, listener))
        yield from _findings(folder)
        yield from _costs(settings, len(given), structures[0], folder)


def _miniature_with(given: Sequence[Atoms], settings: RunSettings, run_dir: Path) -> RunSettings:
    """The miniature, with those of the given labels that a run labels again."""
    if not given:
        return miniature(settings, run_dir)
    chosen, path = [given[k] for k in to_check(given)], run_dir / "have" / Path(settings.start.labels or "").name
    path.parent.mkdir()
    write_structures(path, chosen)
    shifted = settings.start.model_copy(update={"energy_shifts": {}})  # they are in these labels
    return miniature(settings.model_copy(update={"start": shifted}), run_dir, path, len(chosen))


@contextmanager
def _folder_beside(settings: RunSettings) -> Iterator[Path]:
    """A folder for the miniature run, where nodes of a cluster see it as they will see the run's.

    If the miniature fails, other than by a mistake in the settings, it is kept until the next check: its logs may say
    more than the error.
    """
    run_dir = Path(settings.run_dir).absolute()
    parent = next((p for p in (existing_folder(run_dir.parent), run_dir) if os.access(p, os.W_OK | os.X_OK)), None)
    prefix = f".{run_dir.name}.check-"
    for old in parent.glob(f"{glob.escape(prefix)}????????") if parent else ():
        if not RunFolder(old).is_locked():
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    keep = False
    try:
        yield folder
    except UbmdError as error:
        keep = not isinstance(error, SettingsError | StorageError)
        if keep:
            error.args = (
                f"{str(error).rstrip('.')}. Its files stay in {folder} until the next check.",
                *error.args[1:],
            )
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def plan(settings: RunSettings, base: Path, structures: list[Atoms], given: Sequence[Atoms] = ()) -> Iterator[str]:
    """What the run would do, in sentences."""
    md, loop, start = settings.md, settings.loop, settings.start
    formulas = sorted({atoms.get_chemical_formula() for atoms in structures})
    found = f"({', '.join(formulas[:4])}{', …' if len(formulas) > 4 else ''})"
    parts = [f"Start: {len(structures)} structure{'s' if len(structures) > 1 else ''} in {start.source} {found}"]
    if given:
        again = "" if start.trust else f", of which {len(to_check(given))} are labelled again"
        parts.append(f"{len(given)} labels in {start.labels}{again}")
    if start.count:
        parts.append(f"{start.count} perturbed copies are labelled")
    yield f"{'; '.join(parts)}. Labels are made by {settings.reference.calculator}."
    yield from state_remarks(structures, settings)
    calls = _test_calls(settings, base)
    if calls:
        yield f"Test set: reference MD, {calls:,} reference calculations."
    rounds = _iterations(settings, len(given))
    yield (
        f"Then about {rounds} iterations: train, {md.replicas} replicas of at most {md.steps:,} steps "
        f"({md.steps * md.timestep / 1000:,.4g} ps; {conditions(settings)}), each until max u passes "
        f"{loop.threshold:g} eV/Å; {settings.selection.batch} new labels ({settings.selection.method})."
    )
    yield (
        f"It ends at {loop.labels} labels, after at most {rounds * md.replicas * md.steps:,} MD steps if every "
        "batch is full; rejected labels, and frames that are too much alike, add iterations."
    )


def _iterations(settings: RunSettings, given: int) -> int:
    """Iterations with MD, if every label succeeds; ``given``: labels that are there already."""
    return max(0, math.ceil((settings.loop.labels - settings.start.count - given) / settings.selection.batch))


def _test_calls(settings: RunSettings, base: Path) -> int:
    """Reference calculations that a test set takes; 0 if there is none, or its file is there."""
    if settings.test is None or (settings.test.file is not None and (base / settings.test.file).exists()):
        return 0
    sampling = settings.test.sampling
    return sampling.frames * sampling.stride + sampling.trajectories * sampling.equilibration


def _findings(folder: RunFolder) -> Iterator[str]:
    """What the miniature run found."""
    labels = read_structures(folder.dataset)
    first, made = read_iterations(folder)[0], sum("given" not in atoms.info for atoms in labels)
    own = set(confidence(read_iterations(folder)[:1], read_settings(folder)))  # of the miniature's few labels
    remarks = (event.text for event in read_events(folder) if isinstance(event, Remark))
    yield from (f"Remark: {text}" for text in remarks if text not in own)
    replica, seconds = first.replicas[0], first.seconds
    dynamics = f"MD: {replica.steps} steps, {replica.stopped}"
    if replica.reason:
        dynamics += f" ({replica.reason})"
    yield f"Reference: {made} structure{'s' if made > 1 else ''} labelled."
    yield f"Training: {_EPOCHS} epochs of one structure in {seconds['train']:.1f} s."
    yield f"Export: {seconds['export']:.1f} s."
    share = f"bias {replica.bias_share:.3g} of the forces"
    yield f"{dynamics}; largest uncertainty {replica.max_u:.3g} eV/Å; {share}."


def _costs(settings: RunSettings, given: int, atoms: Atoms, folder: RunFolder) -> Iterator[str]:
    """Time and disk of the whole run, from the miniature's speeds; rough, and MD as if no replica stopped early."""
    processes = tasks_at_once(settings.workers)
    rounds, batch = _iterations(settings, given), settings.selection.batch
    history = read_iterations(folder)
    label = min(entry.seconds["label"] for entry in history if "label" in entry.seconds)
    reference = label * (math.ceil(settings.start.count / processes) + rounds * math.ceil(batch / processes))
    step = history[0].replicas[0].ms_per_step / 1000.0
    at_once = max(1, processes // settings.md.ranks)
    dynamics = step * settings.md.steps * rounds * math.ceil(settings.md.replicas / at_once)
    training = _training_time(settings, given, folder)
    here = settings.workers.executor == "pebble"
    where = f"on this machine ({processes} processes)" if here else f"with {processes} tasks at once"
    if training is None:
        known = "training not known (this kind of network keeps no times of epochs)"
    else:
        known = f"training {duration(training)}; together at most {duration(reference + dynamics + training)}"
    yield f"Rough time {where}: labels {duration(reference)}, MD at most {duration(dynamics)}, {known}."
    least, most = _disk(settings, given, atoms, folder)
    free = shutil.disk_usage(existing_folder(Path(settings.run_dir))).free
    warning = (
        "" if most < free else f" But only {size(free)} are free: choose a larger md.frames_every, or another disk."
    )
    yield f"Rough disk space: {size(least)} to {size(most)}, depending on how long replicas run.{warning}"


def _disk(settings: RunSettings, given: int, atoms: Atoms, folder: RunFolder) -> tuple[float, float]:
    """(least, most) bytes of the whole run: all replicas stop at once, or run to their step limit."""
    md, rounds, first = settings.md, _iterations(settings, given), folder.iteration(0)
    frame = _bytes(first.glob("frames_*.extxyz")) / max(1, read_iterations(folder)[0].replicas[0].frames)
    frames = md.steps // md.frames_every + 2  # with the first, and one that stops a replica
    records = md.steps // md.trace_every if md.trace_every else 0
    free = int((~is_fixed(atoms)).sum())
    trajectory = frames * frame + records * _BYTES_PER_RECORDED_ATOM * free
    models = _bytes(first.rglob("*.pt"))
    other = _bytes(path for path in first.rglob("*") if path.suffix != ".pt" and not path.name.startswith("frames_"))
    # A label is in a selection, twice in its batch, and in the data set; a test set in the run and in its parts.
    labels = _COPIES_OF_LABELS * max(settings.loop.labels, given) * frame
    test = 2 * settings.test.sampling.frames * frame if settings.test is not None else 0.0
    viewer = _BYTES_OF_A_VIEWER if find_spec("chemiscope") else 0.0
    at_end = _BYTES_OF_A_REPORT + viewer + _bytes([folder.model])
    kept = min(rounds + 1, settings.loop.keep_models or rounds + 1)
    least = kept * models + (rounds + 1) * other + labels + test + at_end
    return least, least + rounds * md.replicas * trajectory


def _training_time(settings: RunSettings, given: int, folder: RunFolder) -> float | None:
    """All trainings of the run and what they need besides epochs, s; None for a back end that keeps no times."""
    log = next(iter(sorted(folder.iteration(0).glob("train/**/log.csv"))), None)
    if log is None:
        return None
    with log.open() as handle:
        per_epoch = [float(row["seconds"]) for row in csv.DictReader(handle)]
    per_structure = min(per_epoch) / _TYPICAL_BATCH_GAIN
    networks, took = settings.uncertainty.networks, read_iterations(folder)[0].seconds
    # MACE, for instance, starts its own Python several times.
    apart = max(0.0, took["train"] + took["export"] - networks * sum(per_epoch))
    total = 0.0
    first = settings.start.count + given
    for k in range(_iterations(settings, given) + 1):
        labels = min(max(settings.loop.labels, first), first + k * settings.selection.batch)
        warm = k > 0 and settings.loop.warm_start
        total += labels * settings.epochs(labels, settings.selection.batch if warm else None) * per_structure
    return total * networks + (_iterations(settings, given) + 1) * apart


def _bytes(paths: Iterable[Path]) -> int:
    """Bytes of files together."""
    return sum(path.stat().st_size for path in paths if path.is_file())
