"""Triggers on made-up series of errors."""

import json
import math

import pytest

from ubmd.errors import DataError, SettingsError
from ubmd.lammps.triggers import AbsoluteTrigger, AverageTrigger, HistoryTrigger, Trigger, load_trigger


def calls(trigger: Trigger, errors: list[float], noise: float = 0.0) -> list[int]:
    """Steps (from 0) that call, without refits."""
    return [step for step, error in enumerate(errors) if trigger.observe(error, noise) is not None]


def test_absolute() -> None:
    assert calls(AbsoluteTrigger(0.1), [0.05, 0.11, 0.1, 0.3]) == [1, 3]


def test_average_waits_compares_with_the_past_and_starts_anew() -> None:
    """A jump is missed before the tenth step after a refit, seen from it on, and measured against the past alone."""
    trigger = AverageTrigger(maximum=1.0, factor=2.0)
    assert calls(trigger, [0.1] * 8 + [0.25]) == []  # step 9 after the refit
    trigger.refitted(0.0)
    assert calls(trigger, [0.1] * 9 + [0.25]) == [9]
    trigger.refitted(0.0)
    assert calls(trigger, [0.1] * 9 + [0.19, 0.25]) == [10]
    call = trigger.observe(0.9)
    assert call is not None
    assert call.rule == "average"
    assert call.threshold == pytest.approx(2.0 * (0.9 + 0.19 + 0.25) / 11)
    trigger.refitted(0.01)
    assert calls(trigger, [0.9] * 9 + [0.01]) == []  # the level of before is forgotten


def test_average_checks_the_maximum_always_and_first() -> None:
    trigger = AverageTrigger(maximum=0.14)
    call = trigger.observe(0.2)
    assert call is not None
    assert (call.rule, call.threshold) == ("absolute", 0.14)


def test_average_forgets_beyond_its_window() -> None:
    """Errors that fell long ago don't keep the average high: 0.3 is a jump against the last 20 steps."""
    errors = [1.0] * 100 + [0.1] * 20 + [0.3]
    assert calls(AverageTrigger(maximum=9.0, window=20), errors) == [120]
    assert calls(AverageTrigger(maximum=9.0, window=1000), errors) == []


def test_default_factor_is_three_in_variance() -> None:
    below, above = 0.1 * math.sqrt(2.99), 0.1 * math.sqrt(3.01)
    assert calls(AverageTrigger(maximum=9.0), [0.1] * 20 + [below]) == []
    assert calls(AverageTrigger(maximum=9.0), [0.1] * 20 + [above]) == [20]


@pytest.mark.parametrize("trigger", [AverageTrigger(maximum=0.14), AbsoluteTrigger(0.01), HistoryTrigger()])
def test_no_call_below_the_noise(trigger: Trigger) -> None:
    """Steady growth calls without a noise; with one only from c x noise on."""
    errors = [0.001 * 1.2**k for k in range(40)]
    noisy = calls(load_trigger(trigger.state()), errors, noise=0.5)
    assert noisy == [k for k in noisy if errors[k] >= 0.5]
    assert noisy
    assert min(calls(trigger, errors)) < min(noisy)
    doubled = trigger.state()
    doubled["settings"]["floor"] = 2.0
    assert min(calls(load_trigger(doubled), errors, noise=0.25)) == min(noisy)


def test_history_learns_its_threshold() -> None:
    """The start holds until the history is full; then the mean of the last errors after refits."""
    trigger = HistoryTrigger(start=0.002, history=3, factor=1.5)
    for error in (0.02, 0.04):
        assert trigger.observe(0.01) is not None
        trigger.refitted(error)
    assert trigger.threshold == 0.002
    trigger.refitted(0.06)
    assert trigger.threshold == pytest.approx(0.06)
    assert calls(trigger, [0.05, 0.07]) == [1]
    trigger.refitted(0.08)  # 0.02 drops out
    assert trigger.threshold == pytest.approx(0.09)


def test_state_survives_a_restart() -> None:
    """A trigger restored from JSON in the middle of a series makes the same calls as one that went through."""
    errors = [0.05 + 0.04 * math.sin(0.37 * k) + 0.002 * k % 0.05 for k in range(200)]
    for make in (
        lambda: AverageTrigger(window=30, factor=1.3),
        lambda: HistoryTrigger(0.01, 3),
        lambda: AbsoluteTrigger(0.08),
    ):
        straight, broken = make(), make()
        seen: list[list[bool]] = [[], []]
        for step, error in enumerate(errors):
            if step % 7 == 3:
                broken = load_trigger(json.loads(json.dumps(broken.state())))  # type: ignore[assignment]
            for trigger, record in zip((straight, broken), seen, strict=True):
                record.append(trigger.observe(error) is not None)
                if step % 40 == 39:
                    trigger.refitted(0.5 * error)
        assert seen[0] == seen[1]
        assert 0 < sum(seen[0]) < len(errors)


@pytest.mark.parametrize(
    "make",
    [lambda **more: AverageTrigger(maximum=9.0, factor=9.0, **more), lambda **more: AbsoluteTrigger(9.0, **more)],
)
def test_displacements_beyond_the_labels_call_too(make) -> None:
    """From the tenth check after a refit on, whatever the noise; kept by a restart."""
    trigger = make(extrapolation=1.15)
    reaches = [1.2] * 9 + [1.1, 1.14, 1.16, 1.0]
    seen = []
    for step, reach in enumerate(reaches):
        if step == 7:
            trigger = load_trigger(json.loads(json.dumps(trigger.state())))
        call = trigger.observe(0.1, noise=5.0, reach=reach)
        seen.append(call.rule if call is not None else "")
    assert seen == [""] * 11 + ["extrapolation", ""]
    trigger.refitted(0.05)
    assert trigger.observe(0.1, reach=2.0) is None
    plain = make()
    assert all(plain.observe(0.1, reach=5.0) is None for _ in range(30))
    assert "extrapolation" not in plain.state()["settings"]
    assert "checks" not in plain.state()["memory"]  # as earlier versions wrote it


def test_refusals() -> None:
    with pytest.raises(DataError, match="invalid at this step"):
        AbsoluteTrigger(0.1).observe(math.nan)
    with pytest.raises(SettingsError, match="threshold"):
        AbsoluteTrigger(0.0)
    with pytest.raises(SettingsError, match="choose one of absolute"):
        load_trigger({"kind": "oracle", "settings": {}, "memory": {}})


def test_the_threshold_that_is_shown_is_the_one_that_decides() -> None:
    trigger = AverageTrigger(maximum=0.2, factor=2.0, wait=3, floor=0.0)
    seen = []
    for error in (0.05, 0.15, 0.19, 0.21):
        seen.append((trigger.threshold, trigger.mean))
        call = trigger.observe(error)
        assert (call is not None) == (error > seen[-1][0])
    assert [round(threshold, 9) for threshold, _ in seen] == [0.2, 0.2, 0.2, 0.2]
    assert math.isnan(seen[0][1])
    assert seen[3][1] == pytest.approx(0.13)
    trigger = AverageTrigger(maximum=0.2, factor=1.1, wait=3, floor=0.0)
    for error in (0.05, 0.15):
        assert trigger.observe(error) is None
    assert trigger.threshold == pytest.approx(0.11)
    assert trigger.observe(0.12).threshold == pytest.approx(0.11)
    assert math.isnan(AbsoluteTrigger(0.1).mean)
