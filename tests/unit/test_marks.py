"""What settings affect: said where they are declared, and what follows for runs that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from ubmd.errors import SettingsError
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import open_run
from ubmd.settings import LoopSettings, ReferenceSettings, RunSettings, Table, TrainingSettings
from ubmd.settings.dynamic import DynamicRunSettings, DynamicSettings
from ubmd.settings.marks import ELSEWHERE, LATE, NOTHING, Mark, is_set, key_values, late, mark_at, marks, with_late

MAY_CHANGE = {
    RunSettings: """run_dir workers loop.labels loop.stop_when_quiet loop.quiet_iterations loop.label_budget
        loop.stop_at_plateau loop.plateau_iterations loop.plateau_tolerance training.checkpoint_every start.file
        start.trust loop.keep_models labels reference.timeout reference.cache reference.environment md.timeout
        md.trace_every md.together test
        variables model.python training.device md.device""",
    DynamicRunSettings: """run_dir workers labels dynamic.labels dynamic.steps dynamic.convergence dynamic.timeout
        training.checkpoint_every crystal.structure start.file reference.timeout reference.cache reference.environment
        test model.python training.device dynamic.device""",
}


@pytest.mark.parametrize("kind", MAY_CHANGE)
def test_what_may_change_when_a_run_goes_on(kind: type[Table]) -> None:
    assert {key for key, mark in marks(kind) if mark.affects == "nothing"} == set(MAY_CHANGE[kind].split())


def test_what_not_even_a_run_that_is_taken_back_may_change() -> None:
    fixed = {key for key, mark in marks(RunSettings) if mark.affects == "first labels"}
    names = ("labels", "model", "energy_shifts", "count", "displacement", "strain", "mixed_states")
    start = {f"start.{name}" for name in names}
    assert fixed == start | {"reference.calculator", "reference.arguments"}
    assert mark_at(RunSettings, "reference.arguments.method").affects == "first labels"
    assert mark_at(RunSettings, "variables.torsions.phi").affects == "nothing"
    assert mark_at(RunSettings, "md.steps").affects == "labels"


def test_keys_of_stages_have_what_they_had() -> None:
    reference = ReferenceSettings(
        calculator="emt", timeout=1.0, cache="cache", environment={"A": "b"}, info=("charge",)
    )
    every = set(ReferenceSettings.model_fields)
    assert set(key_values(reference)) == every - {"timeout", "cache", "environment", "info", "noise"}
    assert key_values(reference.model_copy(update={"noise": 0.1}))["noise"] == 0.1
    assert set(key_values(TrainingSettings())) == set(TrainingSettings.model_fields) - {
        "threads",
        "checkpoint_every",
        "device",
        "fixed_forces",
        "mode",
    }
    others = {
        "labels",
        "steps",
        "convergence",
        "timeout",
        "device",
        "batch",
        "warm_epochs",
        "calibrate",
        "calibration_window",
    }
    dynamic = DynamicSettings(temperatures=[300.0], labels=9)
    assert set(key_values(dynamic)) == set(DynamicSettings.model_fields) - others


class Tables(Table):
    """A table as a later version may have it."""

    old: int = 1
    new: Annotated[int, LATE] = Field(2)
    aside: Annotated[int, ELSEWHERE] = 3
    cheap: Annotated[int, NOTHING] = 4
    better: Annotated[bool, late(False)] = True


class Whole(Table):
    """With such a table in it."""

    part: Tables = Tables()


def test_a_setting_that_came_later_leaves_old_keys_as_they_are() -> None:
    before = Tables(better=False)
    assert key_values(before) == key_values(Tables(new=2, aside=5, cheap=6, better=False)) == {"old": 1}
    assert key_values(Tables(new=7, better=False)) == {"old": 1, "new": 7}
    assert key_values(Whole(part=before)) == {"part": {"old": 1, "aside": 3, "cheap": 4}}


def test_a_late_setting_with_another_default_is_off_in_runs_without_it() -> None:
    """It does enter the keys of runs that have it."""
    assert key_values(Tables()) == {"old": 1, "better": True}
    assert with_late({"part": {"old": 5}}, Whole) == {"part": {"old": 5, "better": False}}
    assert with_late({"part": {"better": True}}, Whole) == {"part": {"better": True}}
    assert with_late({}, Whole) == {}


def test_a_run_keeps_the_defaults_that_it_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.dataset.write_text("a label\n")

    def settings(**loop: float) -> RunSettings:
        values = {"run_dir": folder.path, "start": {"file": "start.extxyz"}, "reference": {"calculator": "emt"}}
        return RunSettings.model_validate(values | {"loop": loop} if loop else values)

    default = LoopSettings.model_fields["threshold"].default
    # An earlier version, whose default was another one: to its run this is a value like any other.
    open_run(folder, settings(threshold=default + 1.0), {})
    with pytest.raises(SettingsError, match=r"loop.threshold = "):
        open_run(folder, settings(), {})
    monkeypatch.setattr(LoopSettings.model_fields["threshold"], "metadata", [Mark(version=2)])
    plan, changes = open_run(folder, settings(), {})
    assert plan.at(0).loop.threshold == default + 1.0
    assert changes == {}
    assert f"threshold = {default + 1.0}" in folder.settings.read_text()
    with pytest.raises(SettingsError, match=r"loop.threshold = "):  # who says it means it
        open_run(folder, settings(threshold=default), {})


def test_a_run_of_this_version_has_no_older_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    monkeypatch.setattr(LoopSettings.model_fields["threshold"], "metadata", [Mark(version=2)])
    values = {"run_dir": folder.path, "start": {"file": "start.extxyz"}, "reference": {"calculator": "emt"}}
    open_run(folder, RunSettings.model_validate(values | {"loop": {"threshold": 9.0}}), {})
    assert folder.read_manifest()["defaults"]["loop.threshold"] == 2
    folder.dataset.write_text("a label\n")
    with pytest.raises(SettingsError, match=r"loop.threshold = 9.0, now it is"):
        open_run(folder, RunSettings.model_validate(values), {})


def test_what_is_set() -> None:
    values = {"run_dir": "run", "start": {"file": "start.extxyz"}, "reference": {"calculator": "emt"}}
    settings = RunSettings.model_validate(values)
    assert is_set(settings, "start.file")
    assert not is_set(settings, "start.count")
    assert not is_set(settings, "loop.threshold")
    assert is_set(RunSettings.model_validate(values | {"loop": {"threshold": 1.0}}), "loop.threshold")
