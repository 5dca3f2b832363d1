"""The models of dynamic training: made when they are needed, calibrated by the labels of earlier rounds."""

from __future__ import annotations

from typing import Any

from ase import Atoms

from ubmd.files import read_json, write_json
from ubmd.learning.dynamic.rounds import Past, Round
from ubmd.potentials.learner import Learner
from ubmd.runs.folder import EventLog
from ubmd.settings.dynamic import DynamicRunSettings
from ubmd.uncertainty.conformal import ConformalScale, conformal_scale


class Models:
    """The models of a run; the learner holds one of them."""

    def __init__(self, settings: DynamicRunSettings, learner: Learner, past: Past, events: EventLog) -> None:
        self._settings = settings
        self._learner = learner
        self._past = past
        self._events = events
        self._loaded = ""  # key of the model that the learner holds

    def make(self, now: Round) -> None:
        """Make sure that the files of a round's model are there."""
        owner = now.owner
        files = [owner.folder / name for name in self._learner.files]

        def work() -> None:
            labels = self._past.dataset[: owner.labels]
            previous = owner.previous.folder if owner.previous else None
            scale = float(self._scale(owner.number)) if self._settings.dynamic.calibrate else 1.0
            summary = self._learner.learn(labels, owner.folder, previous, scale, self._show_epoch)
            self._loaded = owner.keys["learn"]
            write_json(owner.folder / "fit.json", {"model": summary, "learnt": self._learnt(owner)})

        owner.once.run("learn", owner.keys["learn"], [*files, owner.folder / "fit.json"], work)

    def _show_epoch(self, row: dict[str, Any]) -> None:
        self._events.show("epoch", **row)

    def load(self, now: Round) -> None:
        """Load the model of a round into the learner."""
        owner = now.owner
        if self._loaded != owner.keys["learn"]:
            self.make(owner)
        if self._loaded != owner.keys["learn"]:
            summary = read_json(owner.folder / "fit.json")["model"]
            self._learner.load(owner.folder, summary, self._past.dataset[: owner.labels])
            self._loaded = owner.keys["learn"]

    def _learnt(self, owner: Round) -> list[dict[str, Any]]:
        """The labels that are new to a model, with errors before and after; the learner holds the model."""
        first = owner.previous.labels if owner.previous else 0
        asked = (item for entry in self._past.history[: owner.number] for item in entry.asked)
        before = {item.label: item.as_json() for item in asked}
        new = self._past.dataset[first : owner.labels]
        rows = []
        for k, (atoms, after) in enumerate(zip(new, self._learner.judge(new), strict=True), start=first):
            row = before.get(k) or _unasked(k, atoms)
            row.pop("rejected", None)
            rows.append(row | {"error_after": after.error, "true_after": after.true, "rms_after": after.rms})
        return rows

    def remove_old(self, now: Round) -> None:
        """Models before the newest are not needed, and can be made again; the newest is where the next one starts."""
        for earlier in self._past.rounds[: now.owner.number]:
            for name in self._learner.files:
                (earlier.folder / name).unlink(missing_ok=True)

    def next_scale(self) -> float | None:
        """Conformal factor that the next model gets."""
        return self._scale() if self._settings.dynamic.calibrate else None

    def _scale(self, number: int | None = None) -> float:
        """Conformal factor (until a round); 1 before the first label that was predicted."""
        found = self.conformal(number)
        return found.scale if found else 1.0

    def conformal(self, number: int | None = None) -> ConformalScale | None:
        """From labels that were predicted before they were learnt (until a round); None before the first."""
        pairs = []
        for entry in self._past.history[:number]:
            scale = (entry.model.force_scale or 1.0) if self._learner.scale_in_errors else 1.0
            pairs += [
                (item.true_before, item.error_before / scale)
                for item in entry.asked
                if item.true_before is not None and item.error_before is not None
            ]
        pairs = pairs[-self._settings.dynamic.calibration_window :]
        if not pairs:
            return None
        true, predicted = zip(*pairs, strict=True)
        return conformal_scale(true, predicted, self._settings.uncertainty.alpha)


def _unasked(label: int, atoms: Atoms) -> dict[str, Any]:
    """A start label, as 'learnt' has it."""
    nothing = dict.fromkeys(("threshold", "error_before", "true_before", "rms_before", "drop"))
    where = {"replica": int(atoms.info["replica"]), "temperature": None, "step": 0, "rule": "start"}
    return {"label": label, **where, **nothing}
