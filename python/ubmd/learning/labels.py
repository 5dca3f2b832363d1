"""Labels of a batch, made in workers: each is kept as soon as it is known; a failure costs one structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ubmd.data.extxyz import write_structures
from ubmd.data.labels import labels_of
from ubmd.data.state import bare, structures_hash
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, UbmdError, one_line
from ubmd.files import (
    check_space,
    content_hash,
    is_intact,
    is_sealed,
    read_json,
    seal,
    write_json,
)
from ubmd.learning.work.groups import Lost, nothing_ended, run_tasks
from ubmd.learning.work.tasks import label_file
from ubmd.learning.work.workers import Executor, WorkersLost
from ubmd.settings import ReferenceSettings
from ubmd.settings.marks import key_values

# Earlier versions rejected structures for good when a machine had lost them; their reasons begin like this.
_OLD_LOSSES = ("The executor lost the task (", "The worker process was lost (", "The worker process was stopped.")


def label_batch(
    candidates: Sequence[Atoms],
    folder: Path,
    settings: ReferenceSettings,
    base: Path,
    workers: Executor,
    report: Callable[[int, str], None],
    known: Sequence[Atoms] = (),
    retries: int = 0,
    lost: Lost = lambda key, error, again: None,
) -> None:
    """Label structures in workers; a failure of any kind costs one structure.

    Every label (``label_RRR.extxyz``, sealed) and every reason (``rejected_RRR.json``) is kept in ``folder`` as soon as
    it is known: an interrupted batch continues there. Structures that the machine lost repeatedly while others
    were completed are postponed (``postponed_RRR.json``): neither labelled nor rejected. For the results see
    `read_batch` and `read_postponed`.

    Args:
        candidates: what to label; their info is kept.
        folder: for the files of this batch.
        settings: the reference.
        base: folder that its file arguments are relative to.
        workers: where to run.
        report: called as (index, reason or empty text) after each label.
        known: labels that the data set already has; a lost or damaged file is written again from them.
        retries: how often a structure is tried again whose worker crashed or was lost.
        lost: called when that happens; see `TaskGroup`.

    Raises:
        SettingsError: the reference's calculator cannot be made at all.
        StorageError: the disk is full; no structure is rejected for that.
        MachineError: not a single structure was completed, by a fault of the machine.
    """
    keys = [label_key(candidate, settings) for candidate in candidates]
    files = [(folder / f"candidate_{k:03d}.extxyz", folder / f"label_{k:03d}.extxyz") for k in range(len(candidates))]
    reasons = [folder / f"rejected_{k:03d}.json" for k in range(len(candidates))]
    for candidate, (source, _) in zip(candidates, files, strict=True):
        write_structures(source, [candidate])
    mend_batch(folder, known, settings)
    for note in folder.glob("postponed_*.json"):  # of a driver that was killed here: requested again now
        note.unlink()
    missing = {}
    for k, (source, target) in enumerate(files):
        if is_sealed(target, keys[k]) or _read_reason(reasons[k], keys[k]):
            continue
        missing[k] = (source, target, keys[k], settings, base)

    postponed: dict[int, UbmdError] = {}

    def done(index: int, _: None, error: UbmdError | None) -> None:
        if isinstance(error, WorkersLost) and is_sealed(files[index][1], keys[index]):
            error = None  # only the reply was lost
        if isinstance(error, WorkersLost):
            postponed[index] = error
            return
        if error is not None:
            check_space(folder)
            write_json(reasons[index], {"reason": str(error), "key": keys[index]})
        report(index, str(error or ""))

    run_tasks(workers, label_file, missing, settings.timeout, done, retries=retries, lost=lost)
    if postponed:
        check_space(folder)
    if postponed and len(postponed) == len(missing):
        raise nothing_ended("label", next(iter(postponed.values())))
    for index, error in postponed.items():
        write_json(folder / f"postponed_{index:03d}.json", {"reason": str(error)})


def label_key(candidate: Atoms, settings: ReferenceSettings) -> str:
    """Hash of everything that determines a label."""
    return content_hash([structures_hash([candidate], settings.info), reference_key(settings)])


def reference_key(settings: ReferenceSettings) -> str:
    """Hash of the reference without what belongs to a machine, or to the structures, rather than to the label."""
    return content_hash(key_values(settings))


def mend_batch(folder: Path, known: Sequence[Atoms], settings: ReferenceSettings) -> None:
    """Write lost or damaged label files of a batch again from the labels that the data set has."""
    at = {_place(atoms, settings.info): atoms for atoms in known}
    for source in folder.glob("candidate_*.extxyz"):
        number = source.stem.removeprefix("candidate_")
        target = folder / f"label_{number}.extxyz"
        if is_intact(target) or _has_verdict(folder, number):
            continue
        try:
            candidate = read_structures(source)[0]
        except DataError:
            continue
        place = _place(candidate, settings.info)
        if place in at:
            write_structures(target, [_with_labels_of(candidate, at[place])])
            seal(target, label_key(candidate, settings))


def forget_rejections(folder: Path) -> None:
    """Let `label_batch` try again what it has rejected."""
    for path in folder.glob("rejected_*.json"):
        path.unlink()


def free_lost(folder: Path) -> bool:
    """Let `label_batch` request again what an earlier version rejected for a fault of the machine; was there any?"""
    freed = False
    for path in folder.glob("rejected_*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if str(read_json(path)["reason"]).startswith(_OLD_LOSSES):
                path.unlink()
                freed = True
    return freed


def batch_is_whole(folder: Path) -> bool:
    """Whether every structure of a labelled batch still has its undamaged label, or a note why it has none."""
    numbers = (source.stem.removeprefix("candidate_") for source in folder.glob("candidate_*.extxyz"))
    return all(is_intact(folder / f"label_{number}.extxyz") or _has_verdict(folder, number) for number in numbers)


def _has_verdict(folder: Path, number: str) -> bool:
    """Whether a note says why a structure has no label."""
    return any((folder / f"{kind}_{number}.json").exists() for kind in ("rejected", "postponed"))


def read_batch(folder: Path) -> tuple[list[Atoms], list[Atoms]]:
    """(labelled structures, rejected ones with their reason in ``info``) of a finished `label_batch`, in its order."""
    labelled, rejected = [], []
    for source in sorted(folder.glob("candidate_*.extxyz")):
        number = source.stem.removeprefix("candidate_")
        label, reason = folder / f"label_{number}.extxyz", folder / f"rejected_{number}.json"
        if reason.exists():
            atoms = read_structures(source)[0]
            atoms.info["reason"] = one_line(read_json(reason)["reason"])
            rejected.append(atoms)
        elif label.exists():
            labelled += read_structures(label)
    return labelled, rejected


def read_postponed(folder: Path) -> list[Atoms]:
    """Structures that a finished `label_batch` has postponed, in its order."""
    notes = sorted(folder.glob("postponed_*.json"))
    sources = [note.with_name(note.stem.replace("postponed", "candidate") + ".extxyz") for note in notes]
    return [read_structures(source)[0] for source in sources]


def _read_reason(path: Path, key: str) -> str:
    """Why a structure was rejected; empty if it was not, or if the file is damaged or about another one."""
    try:
        kept = read_json(path)
    except (OSError, ValueError):
        return ""
    return str(kept["reason"]) if kept.get("key") == key else ""


def _place(atoms: Atoms, info: Sequence[str]) -> str:
    """Hash of a structure and its state, without labels."""
    return structures_hash([bare(atoms, info)], info)


def _with_labels_of(candidate: Atoms, known: Atoms) -> Atoms:
    copy: Atoms = candidate.copy()
    copy.calc = SinglePointCalculator(copy, **labels_of(known))
    return copy
