"""The test set of a run: a given file, or reference MD. Nothing that the loop decides depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ase import Atoms

from ubmd.data.structures import dataset_hash, read_structures, write_structures
from ubmd.errors import LabelError, SettingsError, UbmdError
from ubmd.learning.run_folder import EventLog, RunFolder, Stages, content_hash, copy_file, read_json, write_json
from ubmd.learning.stages import prepare_folder, run_tasks
from ubmd.learning.tasks import sample_file
from ubmd.learning.workers import Workers
from ubmd.settings import ReferenceSettings, SamplingSettings, TestSettings


def provide(
    test: TestSettings,
    reference: ReferenceSettings,
    start: Atoms,
    folder: RunFolder,
    base: Path,
    workers: Workers,
    events: EventLog,
) -> None:
    """Put the test set into the run folder.

    A file that ``test.file`` names is taken as it is. If it isn't there, reference MD makes it; a note beside it keeps
    the hash of reference, sampling and start structure, so that several runs share it and none takes a wrong one.

    Raises:
        SettingsError: the file was made with other settings.
        LabelError: a trajectory failed.
    """
    key = content_hash(
        [reference.model_dump(mode="json"), test.sampling.model_dump(mode="json"), dataset_hash([start])]
    )
    given = base / test.file if test.file is not None else None
    if given is not None and given.exists():
        _check_note(given, key)
        copy_file(given, folder.test)
        return
    parts = folder.path / "test"

    def make() -> None:
        prepare_folder(parts, key)
        frames = sample_trajectories(start, parts, reference, test.sampling, base, workers, events)
        write_structures(folder.test, frames)

    Stages(folder.path, events, {}).run("test_set", key, [folder.test], make)
    if given is not None:
        given.parent.mkdir(parents=True, exist_ok=True)
        write_json(_note(given), {"made_by": "ubmd run", "key": key})
        copy_file(folder.test, given)


def sample_trajectories(
    start: Atoms,
    folder: Path,
    reference: ReferenceSettings,
    sampling: SamplingSettings,
    base: Path,
    workers: Workers,
    events: EventLog,
) -> list[Atoms]:
    """Reference MD in workers, one task per trajectory, one file each in ``folder``; the frames of all.

    Raises:
        LabelError: a trajectory failed (with its reason).
    """
    source = folder / "start.extxyz"
    write_structures(source, [start])
    # With fewer frames than trajectories the last ones have no share.
    count = min(sampling.trajectories, sampling.frames)
    parts = [folder / f"trajectory_{k:03d}.extxyz" for k in range(count)]
    failed: list[str] = []

    def done(index: int, _: Any, error: UbmdError | None) -> None:
        if error is not None:
            failed.append(f"Trajectory {index} of the test set failed: {error}")
        events.write("trajectory_done", trajectory=index, why=str(error or ""))

    missing = {k: (source, part, reference, sampling, base, k) for k, part in enumerate(parts) if not part.exists()}
    # The time-out of a label holds for every step.
    steps = sampling.equilibration + sampling.frames * sampling.stride
    run_tasks(workers, sample_file, missing, reference.timeout * max(1, steps), done)
    if failed:
        raise LabelError(failed[0])
    return [frame for part in parts for frame in read_structures(part, labelled=True)]


def _check_note(given: Path, key: str) -> None:
    """SettingsError if the file was made by a run with another reference, sampling or start structure."""
    if _note(given).exists() and read_json(_note(given))["key"] != key:
        raise SettingsError(
            f"The test set {given} was made with other reference, sampling or start settings; "
            "delete it, or name another test.file."
        )


def _note(given: Path) -> Path:
    return given.with_name(given.name + ".json")
