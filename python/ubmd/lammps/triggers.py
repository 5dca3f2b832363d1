"""When a running trajectory requests a label: rules on the series of its errors, for every kind of model.

A trigger belongs to one trajectory. It sees one error per step (eV/Å: the Bayesian error or a calibrated largest
atomic uncertainty) and is informed of every refit. Its state is a dictionary of JSON values, so that a run continues
after a restart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ubmd.errors import DataError, SettingsError
from ubmd.settings.dynamic import TriggerSettings

WAIT = 10  # steps after a refit before errors are compared with their average, or displacements with the labels'


@dataclass(frozen=True)
class Call:
    """A request for a label, and why."""

    rule: str
    """'absolute', 'average', 'history' or 'extrapolation'"""
    error: float
    threshold: float | None
    """eV/Å; None for 'extrapolation'"""


class Trigger(ABC):
    """One rule; `observe` once per step, `refitted` after each refit.

    Args:
        floor: no call while the error is below floor x noise (c/sqrt(β)): what noise or truncation leaves is not
            learnt by further labels. Models without a noise pass 0 as noise.
        extrapolation: a second rule beside that of the error, whatever that is: a call where displacements of
            neighbours differ this many times as much as in any label, from the `wait`-th step after a refit on. None:
            no such rule.
    """

    kind: ClassVar[str]
    wait: int = WAIT

    def __init__(self, floor: float = 1.0, extrapolation: float | None = None) -> None:
        _positive("floor", floor, zero=True)
        if extrapolation is not None:
            _positive("extrapolation", extrapolation)
        self.floor = floor
        self.extrapolation = extrapolation
        self._checks = 0  # since the refit

    def observe(self, error: float, noise: float = 0.0, reach: float = 0.0) -> Call | None:
        """Take the error of the next step; a `Call` if this step is to be labelled.

        Args:
            error: eV/Å.
            noise: of the labels, eV/Å.
            reach: largest difference of displacements of neighbours over that of all labels.

        Raises:
            DataError: the error is negative or not a finite number.
        """
        if not math.isfinite(error) or error < 0.0:
            raise DataError(f"A trigger got the error {error}: the model or the structure is invalid at this step.")
        call = self._rule(error)
        self._remember(error)
        self._checks += 1
        if call is not None and error >= self.floor * noise:
            return call
        beyond = self.extrapolation is not None and reach > self.extrapolation and self._checks >= self.wait
        return Call("extrapolation", error, None) if beyond else None

    @property
    @abstractmethod
    def threshold(self) -> float:
        """What the next error is compared with, eV/Å (the noise floor left aside)."""

    @property
    def mean(self) -> float:
        """Average error along the trajectory of the current model, eV/Å; NaN for rules without one, and before one."""
        return math.nan

    def refitted(self, error: float) -> None:
        """The model was refitted; ``error`` is that of the labelled structure with the new model."""
        self._checks = 0
        self._learnt(error)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor, `extrapolation` left aside."""

    def state(self) -> dict[str, Any]:
        """JSON values for `load_trigger`; without the second rule those of earlier versions."""
        settings, memory = self.settings(), self._memory()
        if self.extrapolation is not None:
            settings, memory = settings | {"extrapolation": self.extrapolation}, memory | {"checks": self._checks}
        return {"kind": self.kind, "settings": settings, "memory": memory}

    @abstractmethod
    def _learnt(self, error: float) -> None:
        """Take a refit into the state."""

    @abstractmethod
    def _rule(self, error: float) -> Call | None: ...

    @abstractmethod
    def _remember(self, error: float) -> None:
        """Take the error into the state, after the rule has been evaluated."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]: ...

    @abstractmethod
    def _restore(self, memory: Mapping[str, Any]) -> None:
        """Take what `_memory` gave."""


class AbsoluteTrigger(Trigger):
    """Error above a fixed threshold (eV/Å)."""

    kind = "absolute"

    def __init__(self, threshold: float, floor: float = 1.0, extrapolation: float | None = None) -> None:
        super().__init__(floor, extrapolation)
        _positive("threshold", threshold)
        self._threshold = threshold

    @property
    def threshold(self) -> float:
        """The fixed one, eV/Å."""
        return self._threshold

    def _learnt(self, error: float) -> None:
        """Nothing to remember."""

    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"threshold": self.threshold, "floor": self.floor}

    def _rule(self, error: float) -> Call | None:
        return Call("absolute", error, self.threshold) if error > self.threshold else None

    def _remember(self, error: float) -> None:
        """Nothing."""

    def _memory(self) -> dict[str, Any]:
        return {}

    def _restore(self, memory: Mapping[str, Any]) -> None:
        """Nothing."""


class AverageTrigger(Trigger):
    """Error above a maximum, or far above its average along the trajectory of the current model (arXiv:2601.21311).

    First match: error > maximum, at every step; or, from the ``wait``-th step after the last refit on,
    error > factor x mean of the errors before this step since the refit, the last ``window`` of them.

    Args:
        maximum: standard deviation, eV/Å.
        factor: on standard deviations (√3: three times the mean variance).
        window: steps of the average.
        wait: steps after a refit without the second rule.
        floor: see `Trigger`.
    """

    kind = "average"

    def __init__(
        self,
        maximum: float = 0.14,
        factor: float = math.sqrt(3.0),
        window: int = 1000,
        wait: int = WAIT,
        floor: float = 1.0,
        extrapolation: float | None = None,
    ) -> None:
        super().__init__(floor, extrapolation)
        for name, value in (("maximum", maximum), ("factor", factor), ("window", window), ("wait", wait)):
            _positive(name, value)
        self.maximum, self.factor, self.window, self.wait = maximum, factor, window, wait
        self.steps = 0
        self.errors: deque[float] = deque(maxlen=window)

    def _learnt(self, error: float) -> None:
        """The average is that of the current model: it starts again."""
        self.steps = 0
        self.errors.clear()

    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {name: getattr(self, name) for name in ("maximum", "factor", "window", "wait", "floor")}

    @property
    def mean(self) -> float:
        """Average of the errors since the refit, eV/Å."""
        # fsum: a mean that doesn't depend on how often the state was saved
        return math.fsum(self.errors) / len(self.errors) if self.errors else math.nan

    @property
    def threshold(self) -> float:
        """The smaller of both limits that hold for the next step, eV/Å."""
        if self.steps + 1 < self.wait or not self.errors:  # the next one is the first after a refit if steps is 0
            return self.maximum
        return min(self.maximum, self.factor * self.mean)

    def _rule(self, error: float) -> Call | None:
        if error > self.maximum:
            return Call("absolute", error, self.maximum)
        threshold = self.threshold
        return Call("average", error, threshold) if error > threshold else None

    def _remember(self, error: float) -> None:
        self.steps += 1
        self.errors.append(error)

    def _memory(self) -> dict[str, Any]:
        return {"steps": self.steps, "errors": list(self.errors)}

    def _restore(self, memory: Mapping[str, Any]) -> None:
        self.steps = int(memory["steps"])
        self.errors.extend(float(error) for error in memory["errors"])


class HistoryTrigger(Trigger):
    """VASP-like: the threshold is the mean of the last errors right after refits, times a factor.

    Before ``history`` refits the threshold is ``start``: small, so that an untrained model learns at once.
    """

    kind = "history"

    def __init__(
        self,
        start: float = 0.002,
        history: int = 10,
        factor: float = 1.0,
        floor: float = 1.0,
        extrapolation: float | None = None,
    ) -> None:
        super().__init__(floor, extrapolation)
        for name, value in (("start", start), ("history", history), ("factor", factor)):
            _positive(name, value)
        self.start, self.history, self.factor = start, history, factor
        self.after: deque[float] = deque(maxlen=history)

    @property
    def threshold(self) -> float:
        """The present one, eV/Å."""
        if len(self.after) < self.history:
            return self.start
        return self.factor * math.fsum(self.after) / len(self.after)

    def _learnt(self, error: float) -> None:
        """Remember the error that the new model leaves on the structure it has just learnt."""
        self.after.append(error)

    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {name: getattr(self, name) for name in ("start", "history", "factor", "floor")}

    def _rule(self, error: float) -> Call | None:
        return Call("history", error, self.threshold) if error > self.threshold else None

    def _remember(self, error: float) -> None:
        """Errors of steps don't count, only those after refits."""

    def _memory(self) -> dict[str, Any]:
        return {"after": list(self.after)}

    def _restore(self, memory: Mapping[str, Any]) -> None:
        self.after.extend(float(error) for error in memory["after"])


KINDS: dict[str, type[Trigger]] = {kind.kind: kind for kind in (AbsoluteTrigger, AverageTrigger, HistoryTrigger)}


def make_trigger(settings: TriggerSettings) -> Trigger:
    """A fresh trigger."""
    return KINDS[settings.rule](**settings.arguments(), floor=settings.floor, extrapolation=settings.extrapolation)


def load_trigger(state: Mapping[str, Any]) -> Trigger:
    """The trigger that `Trigger.state` describes; raises SettingsError for an unknown kind."""
    if state["kind"] not in KINDS:
        raise SettingsError(f"There is no trigger {state['kind']!r}: choose one of {', '.join(KINDS)}.")
    trigger = KINDS[state["kind"]](**state["settings"])
    trigger._restore(state["memory"])
    trigger._checks = int(state["memory"].get("checks", 0))
    return trigger


def _positive(name: str, value: float, zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0.0 or (value == 0.0 and not zero):
        raise SettingsError(f"The trigger's {name} must be {'zero or ' if zero else ''}above zero, got {value}.")
