"""The schedules of learning. Which one a settings file or a run folder is of is decided here, and nowhere else."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubmd.imports import Lazy
from ubmd.runs.folder import RunFolder
from ubmd.settings import RunSettings
from ubmd.settings.dynamic import DynamicRunSettings

Settings = type[RunSettings] | type[DynamicRunSettings]


@dataclass(frozen=True)
class Schedule:
    """One schedule of learning. Its parts lie above this module, which imports none of them: a call loads them.

    Settings are those of the schedule; ``base`` is the folder that files in them are relative to.
    """

    name: str
    """in sentences: 'a dynamic run'"""
    schema: str
    """what `ubmd schema` calls its settings"""
    table: str | None
    """the table of a settings file that selects this schedule; None: it is the one of all other files"""
    settings: Settings
    takes_back: bool
    """whether its run can be taken back to an earlier iteration (``--from``)"""
    check_shows: str
    """what is printed after a check that found no mistake"""
    to_fill_in: str
    """what a new settings file lacks, besides run_dir and the reference"""

    verify: Callable[[Any, Path, Callable[[str], None], Callable[[str], None]], Any]
    """(settings, base, remark, tell) before a run: calls ``remark`` with sentences on labels that may be a mistake, and
    ``tell`` with where labels were taken from"""
    check: Callable[[Any, Path], Iterator[str]]
    """(settings, base) -> sentences on what would be run"""
    run: Callable[..., Path]
    """(settings, base, listener) -> folder of the run; with ``from_iteration`` if it can be taken back"""
    timeline: Callable[..., Any]
    """(settings, events) -> a `ubmd.runs.timeline.RunTimeline`"""
    report: Callable[[Path, bool], list[Path]]
    """(run folder, whether model files may be run) -> files of the report, the page last"""

    progress: Callable[[Any, Any], Any]
    """(console, timeline) -> the listener of the command line, a context"""
    status: Callable[[Path], Any]
    """run folder -> what `ubmd status` shows"""
    status_row: Callable[[Path], Any]
    """run folder -> its row where `ubmd status` shows several"""
    template: Callable[..., str]
    """(name of a new settings file, values to fill in) -> its text; the values may be left out"""
    short_template: Callable[..., str]
    """the same with the keys that most people set"""
    propose: Callable[[Any, Path, str], Any]
    """(structures, their file, its name without ending) -> values to fill in"""


LOOP = Schedule(
    name="loop",
    schema="run",
    table=None,
    settings=RunSettings,
    takes_back=True,
    check_shows="All stages work.",
    to_fill_in="start.file",
    verify=Lazy("ubmd.learning.loop.verify:verify"),
    check=Lazy("ubmd.learning.loop.check:check"),
    run=Lazy("ubmd.learning.loop.loop:run"),
    timeline=Lazy("ubmd.learning.loop.timeline:Timeline"),
    report=Lazy("ubmd.analysis.report:make_report"),
    progress=Lazy("ubmd.cli.loop_progress:make_progress"),
    status=Lazy("ubmd.cli.loop_status:status"),
    status_row=Lazy("ubmd.cli.loop_status:row"),
    template=Lazy("ubmd.cli.template:run_template"),
    short_template=Lazy("ubmd.cli.template:short_template"),
    propose=Lazy("ubmd.learning.proposal:propose_run"),
)
DYNAMIC = Schedule(
    name="dynamic",
    schema="dynamic",
    table="dynamic",
    settings=DynamicRunSettings,
    takes_back=False,
    check_shows="",
    to_fill_in="crystal",
    verify=Lazy("ubmd.learning.dynamic.check:verify"),
    check=Lazy("ubmd.learning.dynamic.check:check"),
    run=Lazy("ubmd.learning.dynamic.engine:run"),
    timeline=Lazy("ubmd.learning.dynamic.timeline:DynamicTimeline"),
    report=Lazy("ubmd.analysis.dynamic_report:make_dynamic_report"),
    progress=Lazy("ubmd.cli.dynamic_progress:make_progress"),
    status=Lazy("ubmd.cli.dynamic_status:status"),
    status_row=Lazy("ubmd.cli.dynamic_status:row"),
    template=Lazy("ubmd.cli.template:dynamic_template"),
    short_template=Lazy("ubmd.cli.template:short_dynamic_template"),
    propose=Lazy("ubmd.learning.proposal:propose_dynamic"),
)
SCHEDULES = (LOOP, DYNAMIC)


def schedule_of_file(path: Path) -> Schedule:
    """Schedule of a settings file.

    One that cannot be read counts as one of the loop: whoever loads it says what is wrong.
    """
    try:
        return schedule_of_tables(tomllib.loads(Path(path).read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return LOOP


def schedule_of_run(folder: RunFolder) -> Schedule:
    """Schedule of the run in a folder; without a run that of the loop, whose parts say that there is none.

    Raises:
        DataError: the manifest is damaged.
    """
    return schedule_of_tables(folder.read_manifest()["settings"]) if folder.manifest.exists() else LOOP


def schedule_of_tables(names: Container[str]) -> Schedule:
    """Schedule of settings that have tables and keys of these names."""
    return next((schedule for schedule in SCHEDULES if schedule.table is not None and schedule.table in names), LOOP)
