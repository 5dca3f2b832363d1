"""The engine of dynamic training: start -> (learn -> move -> signals -> label) -> ... -> report.

A run is a function of its settings: it is always executed from the beginning, skipping stages whose results are in the
folder, as in `ubmd.learning.loop.loop`. So a killed run continues where it stopped, and ends with the labels of an
uninterrupted one. A round is synchronous: all replicas run, side by side, until they request a label or reach the end
of their segment; then the requested labels are made, the model learns, and all trajectories continue.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import Executor as StandardExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from ase import Atoms

from ubmd.data.labels import dataset_hash
from ubmd.data.state import structures_hash
from ubmd.data.structures import read_structures
from ubmd.errors import SimulationError
from ubmd.files import content_hash, copy_file, read_json, write_json
from ubmd.learning.dynamic.check import check_box, ideal_box, input_files
from ubmd.learning.dynamic.models import Models
from ubmd.learning.dynamic.rounds import Past, Round, RoundSignals
from ubmd.learning.dynamic.series import Series
from ubmd.learning.dynamic.trajectories import Trajectories, asks
from ubmd.learning.labels import reference_key
from ubmd.learning.reference import look_at_reference, remarks
from ubmd.learning.start import check_md_device
from ubmd.learning.walk import LARGEST_FRUITLESS, START, Walk, drive
from ubmd.learning.work.workers import Executor
from ubmd.potentials.interface import converged
from ubmd.potentials.kinds import backend_files, kind_of_settings
from ubmd.potentials.learner import Learner
from ubmd.references.labels import force_jumps
from ubmd.runs.folder import Listener, RunFolder
from ubmd.runs.inputs import input_hashes
from ubmd.runs.manifest import open_run
from ubmd.runs.records import Ending, Piece, Request, RoundEntry
from ubmd.runs.seeds import Stage, random_generator
from ubmd.runs.stages import Stages
from ubmd.settings.dynamic import DynamicRunSettings
from ubmd.settings.marks import key_values


def run(
    settings: DynamicRunSettings,
    base: Path | str = ".",
    listener: Listener | None = None,
    executor: StandardExecutor | None = None,
) -> Path:
    """Start or resume the run in ``settings.run_dir``; returns that folder when it has ended.

    Args:
        settings: of the run.
        base: folder that files in the settings are relative to (the settings file's).
        listener: called with every event, also with those that are too many for events.jsonl (MD steps, epochs).
        executor: where tasks run, any ``concurrent.futures.Executor``; None: as ``settings.workers`` says.

    Raises:
        SettingsError: the settings cannot work, or don't continue the run in the folder.
        LabelError: the reference fails for all start structures, or for several whole rounds in a row.
        SimulationError: no trajectory can be run.
        StorageError: the disk is full.
        MachineError: no task could be completed, by a fault of the machine or cluster.
    """
    folder, base = RunFolder(Path(settings.run_dir).absolute()), Path(base).absolute()
    check_box(settings, base)  # before the folder is made: what is wrong here stays wrong
    if executor is None:
        check_md_device(settings.dynamic.device, "dynamic.device", settings.workers)
    drive(folder, settings.workers, executor, lambda workers: DynamicRun(settings, base, folder, workers, listener))
    return Path(settings.run_dir)


class DynamicRun(Walk[RoundEntry]):
    """One execution of a run, from its beginning."""

    unit = "round"
    settings: DynamicRunSettings

    def __init__(
        self, settings: DynamicRunSettings, base: Path, folder: RunFolder, workers: Executor, listener: Listener | None
    ) -> None:
        self.box = ideal_box(settings, base)
        record = look_at_reference(folder, settings.reference, base, workers, settings.workers.retries)
        inputs = input_hashes(input_files(settings, base), settings.reference.arguments, base)
        own = backend_files(settings.model, base)
        plan, changes = open_run(folder, settings, inputs, reference=record, backend=own)
        self.settings = plan.at(0)
        self.dynamic = self.settings.dynamic
        super().__init__(base, folder, workers, listener, plan.threads, changes, RoundEntry)
        self._remark(remarks(record, settings.reference))
        self._rounds: list[Round] = []
        self._past = Past(self.dataset, self.history, self._rounds)
        self._series = Series(self.dynamic.trajectories)
        self._insane = 0

    def run(self) -> None:
        """From the start structures to the report."""
        self.events.write(
            "run_started",
            process=os.getpid(),
            labels_wanted=self.dynamic.labels,
            steps_wanted=self.dynamic.steps * self.dynamic.trajectories,
        )
        self._start()
        self._begin_test_set(self.box)
        for number in itertools.count():
            now = self._round(number)
            self._rounds.append(now)
            if self._is_settled(now.number, now.once, ("record", "judge"), now.keys["label"]):
                self._pass_over(now)
                continue
            ended = self._do(now)
            if ended is not None:
                self._report()
                self.events.write("run_done", labels=len(self.dataset), rounds=number + 1, **ended.as_json())
                return

    @cached_property
    def learner(self) -> Learner:
        """Made when first needed: a cluster basis may take seconds."""
        kind = kind_of_settings(self.settings).learner_class()
        learner = kind.make(self.settings, self.base, self.box, self.folder.path, self.threads)
        if known := learner.describe():
            self.events.write("basis", **known)
        return learner

    @cached_property
    def _models(self) -> Models:
        return Models(self.settings, self.learner, self._past, self.events)

    @cached_property
    def _trajectories(self) -> Trajectories:
        settings, learner, models = self.settings, self.learner, self._models
        return Trajectories(settings, self.box, learner, models, self._past, self.workers, self.events)

    # -------------------------------------------------------------------------------------- before the rounds

    def _start(self) -> None:
        """Displaced copies of the box are the first labels."""
        _ = self.learner  # a box that doesn't fit the crystal is noticed before anything is labelled
        rng = random_generator(self.settings.seed, 0, Stage.START)
        candidates = []
        for k in range(self.settings.start.count):
            atoms = self.box.copy()
            atoms.positions += rng.normal(0.0, self.settings.start.displacement, atoms.positions.shape)
            atoms.info |= {"iteration": START, "replica": k, "step": 0, "rule": "start"}
            candidates.append(atoms)
        self.least_labels = self.learner.least_labels
        self._label_start(candidates)

    # -------------------------------------------------------------------------------------- rounds

    def _round(self, number: int) -> Round:
        """What a round starts from, and the keys that follow from it: nothing is computed."""
        before = self._rounds[-1] if self._rounds else None
        refit = before is None or before.labels < len(self.dataset)
        folder = self.folder.path / "rounds" / f"round_{number:04d}"
        once = Stages(folder, self.events, {"round": number, "labels": len(self.dataset)})
        if refit:
            scale = self._models.next_scale()
            learn = content_hash([dataset_hash(self.dataset), self._learner_key, scale])
        else:
            assert before is not None
            learn = before.keys["learn"]
        outcome = [len(self.dataset), len(self.rejected)]
        chain = before.keys["move"] if before else structures_hash([self.box], self.settings.reference.info)
        # The tasks of the segments follow from these and from the chain before.
        move = content_hash([learn, chain, outcome, self._motion_key, self._trajectories.lengths(number)])
        reference = reference_key(self.settings.reference)
        keys = {"learn": learn, "move": move, "label": content_hash([move, self.dynamic.batch, reference])}
        return Round(number, once, len(self.dataset), before, refit, keys)

    @cached_property
    def _learner_key(self) -> Any:
        return [self.learner.key(), self.threads]

    @cached_property
    def _motion_key(self) -> Any:
        bias = key_values(self.settings.bias) if self.settings.bias is not None else None
        return [key_values(self.dynamic), bias, self.settings.seed]

    def _pass_over(self, now: Round) -> None:
        """Take the results of a settled round."""
        entry = self._recall(now.number)
        self._trajectories.ensure_pieces(now)
        self._take(now.number, now.folder / "labels")
        self._series.add(now, entry.replicas)
        self._check_sane(entry.replicas)

    def _do(self, now: Round) -> Ending | None:
        """Run one round; returns why the run ends with it, or None."""
        self._learn(now)
        ended = self._why_finished(now)
        results: list[Piece] = []
        signals = RoundSignals()
        if ended is None:
            results = self._trajectories.move(now)
            signals = self._signals(now, results)
            ended = self._why_converged(signals)
        asked = self._ask(now, results, signals) if ended is None else []
        self._record(now, results, signals, asked, ended)
        return ended

    # -------------------------------------------------------------------------------------- learn

    def _learn(self, now: Round) -> None:
        """Train and export the round's model, unless an earlier round's is still the newest; measure its errors."""
        self._models.make(now)
        if not now.refit:
            return
        if self._held_out is not None:
            self._held_out.finish()
        test = read_structures(self.folder.test, labelled=True, compare=False) if self.settings.test is not None else []
        labels, target = self.dataset[: now.labels], now.folder / "errors.json"

        def measure() -> None:
            self._models.load(now)
            errors = {"train": self.learner.errors_on(labels)}
            write_json(target, errors | ({"test": self.learner.errors_on(test)} if test else {}))

        now.once.run("measure", content_hash([now.keys["learn"], dataset_hash(test)]), [target], measure)
        for name in self.learner.files:
            copy_file(now.owner.folder / name, self.folder.path / name)

    # -------------------------------------------------------------------------------------- signals

    def _signals(self, now: Round, results: list[Piece]) -> RoundSignals:
        """Signals of convergence on the frames since the last refit, and what the requested labels would gain."""
        target = now.folder / "signals.json"
        candidates = [r.replica for r in results if asks(r)]
        most = self.dynamic.batch or len(candidates)
        limits = self.dynamic.convergence

        def work() -> None:
            self._models.load(now)
            frames, fresh = self._trajectories.fresh_frames(now, results)
            signals = self.learner.signals(frames, limits)
            asked = [self._trajectories.frame(now, r) for r in candidates]
            drops = self.learner.drops(asked, frames) if asked else []
            order = list(range(len(candidates)))
            if len(candidates) > most:
                rng = random_generator(self.settings.seed, now.number, Stage.SELECT)
                order = self.learner.choose(asked, most, rng)
            write_json(
                target,
                {
                    "signals": [signal.as_json() for signal in signals],
                    "converged": bool(converged(signals)),
                    "fresh_steps": fresh,
                    "drops": dict(zip(map(str, candidates), drops, strict=True)) if drops is not None else {},
                    "chosen": [candidates[k] for k in order],
                },
            )

        key = content_hash([now.keys["move"], key_values(limits), most])
        now.once.run("signals", key, [target], work)
        return RoundSignals.read(read_json(target))

    def _why_finished(self, now: Round) -> Ending | None:
        """The budget that is used up, if one is."""
        calls = self._calls()
        if calls >= self.dynamic.labels:
            return Ending(rule="labels", reason=f"The reference was asked for {calls} structures (dynamic.labels).")
        if not self._trajectories.lengths(now.number):
            return Ending(rule="steps", reason=f"All trajectories have {self.dynamic.steps:,} steps (dynamic.steps).")
        return None

    def _why_converged(self, signals: RoundSignals) -> Ending | None:
        limits = self.dynamic.convergence
        if not (limits.stop and signals.converged and signals.fresh_steps >= limits.steps):
            return None
        reasons = " ".join(signal.reason for signal in signals.signals)
        return Ending(rule="converged", reason=f"All signals of convergence hold. {reasons}")

    def _calls(self) -> int:
        return len(self.dataset) + len(self.rejected)

    # -------------------------------------------------------------------------------------- label

    def _ask(self, now: Round, results: list[Piece], signals: RoundSignals) -> list[Request]:
        """Label the chosen frames and append them; returns 'asked' of the round's entry."""
        by_replica = {result.replica: result for result in results}
        # Not in the key: a limit that grows later must not change what is already labelled.
        chosen = signals.chosen[: self.dynamic.labels - self._calls()]
        candidates = []
        for r in chosen:
            atoms, result = self._trajectories.frame(now, r), by_replica[r]
            atoms.info |= {"iteration": now.number, "replica": r, "step": result.end, "rule": result.rule}
            # Rounded: a model that was made again may differ in its last digits, the data set must not.
            error = float(f"{result.error:.4g}")
            atoms.info |= {"temperature": result.temperature, "predicted_error": error}
            candidates.append(atoms)
        first, rejected = len(self.dataset), len(self.rejected)
        self._label(now.number, now.keys["label"], lambda: candidates, now.folder / "labels", now.once)
        labelled, refused = self.dataset[first:], self.rejected[rejected:]
        target = now.folder / "asked.json"

        def judge() -> None:
            self._models.load(now)
            rows = []
            for k, (atoms, before) in enumerate(zip(labelled, self.learner.judge(labelled), strict=True), start=first):
                row = _asked(atoms, by_replica, signals.drops) | {"label": k, "rejected": ""}
                rows.append(row | {"error_before": before.error, "true_before": before.true, "rms_before": before.rms})
            for atoms in refused:
                row = _asked(atoms, by_replica, signals.drops) | {"label": None, "rejected": atoms.info["reason"]}
                rows.append(row | {"error_before": row.pop("seen"), "true_before": None, "rms_before": None})
            for row in rows:
                row.pop("seen", None)
            write_json(target, rows)

        now.once.run("judge", now.keys["label"], [target], judge)
        return [Request.read(row) for row in read_json(target)]

    def _refuse(self, labelled: list[Atoms]) -> dict[int, str]:
        """Labels of trajectories that had left the crystal."""
        return force_jumps(labelled, self.dataset) if self.learner.lattice else {}

    def _check_fruitful(self, labelled: Sequence[Atoms], rejected: Sequence[Atoms]) -> None:
        if labelled or rejected:  # a round in which no trajectory has asked says nothing
            super()._check_fruitful(labelled, rejected)

    # -------------------------------------------------------------------------------------- after a round

    def _record(
        self, now: Round, results: list[Piece], signals: RoundSignals, asked: list[Request], ended: Ending | None
    ) -> None:
        """One entry of the history, and the error series so far."""
        fit = read_json(now.owner.folder / "fit.json")
        before = self.history[-1].md_steps if self.history else 0
        conformal = self._models.conformal()
        chosen = {item.replica for item in asked}
        entry: dict[str, Any] = {
            "round": now.number,
            "labels": now.labels,
            "calls": self._calls() - len(asked),
            "md_steps": before + sum(result.end - result.begin for result in results),
            "refit": now.refit,
            "learnt": fit["learnt"] if now.refit else [],
            "model": fit["model"],
            **read_json(now.owner.folder / "errors.json"),
            "conformal": asdict(conformal) if conformal else None,
            "replicas": [one.as_json() for one in results],
            "asked": [one.as_json() for one in asked],
            "passed": [r.replica for r in results if asks(r) and r.replica not in chosen],
            "fresh_steps": signals.fresh_steps,
            "signals": [one.as_json() for one in signals.signals],
            "converged": signals.converged,
            "seconds": now.once.seconds(),
        }
        if ended is not None:
            entry["ended"] = ended.as_json()
        is_new = self._add_to_history(now.number, entry)
        self._series.add(now, results)
        self._series.save(self.folder.path)
        if is_new:
            self.events.write("round_done", round=now.number, **_shown(self.history[-1]))
        if ended is None:
            now.once.note("record", now.keys["label"])
            self._models.remove_old(now)
            self._check_sane(results)

    def _check_sane(self, results: Sequence[Piece]) -> None:
        """Stop after several rounds in a row in which every trajectory failed: the run would never end."""
        failed = [result.ended == "failed" or result.end == result.begin for result in results]
        self._insane = self._insane + 1 if failed and all(failed) else 0
        if self._insane == LARGEST_FRUITLESS:
            raise SimulationError(
                f"All trajectories failed {LARGEST_FRUITLESS} times in a row; the last reason: {results[-1].reason}"
            )

    def _report(self) -> None:
        """Pictures and tables of the run."""
        from ubmd.analysis.dynamic_report import make_dynamic_report

        make_dynamic_report(self.folder.path)


def _asked(atoms: Atoms, results: dict[int, Piece], drops: dict[str, float]) -> dict[str, Any]:
    """What is known about a request before its label."""
    replica = int(atoms.info["replica"])
    result = results[replica]
    return {
        "replica": replica,
        "temperature": result.temperature,
        "step": result.end,
        "rule": result.rule,
        "threshold": result.threshold,
        "drop": drops.get(str(replica)),
        "seen": result.error,
    }


def _shown(entry: RoundEntry) -> dict[str, Any]:
    """What an event says about a round."""
    whole, model = entry.as_json(), entry.model
    names = ("labels", "calls", "md_steps", "refit", "test", "train", "fresh_steps", "converged")
    shown = {name: whole[name] for name in names if name in whole}
    gamma, count = sum(model.gamma.values()), sum(model.parameters.values())
    shown["signals"] = {signal.name: [signal.value, signal.holds] for signal in entry.signals}
    shown["noise"], shown["determined"] = model.noise, gamma / count if count else None
    shown["learnt"] = [
        {
            "label": row.label,
            "error_before": row.error_before,
            "true_before": row.true_before,
            "true_after": row.true_after,
        }
        for row in entry.learnt
    ]
    return shown
