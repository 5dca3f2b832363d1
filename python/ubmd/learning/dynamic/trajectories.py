"""The engine of dynamic training: start -> (learn -> move -> signals -> label) -> ... -> report.

A run is a function of its settings: it is always walked from the beginning, and stages whose results are in the folder
are passed over, as in `ubmd.learning.loop.loop`. So a killed run continues where it was, and ends with the labels of an
uninterrupted one. A round is synchronous: all replicas run, side by side, until they ask or reach the end of their
segment; then those that asked are labelled, the model learns, and all trajectories go on where they were.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import Executor as StandardExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms

from ubmd.attempts import steps_so_far
from ubmd.data.labels import dataset_hash
from ubmd.data.state import structures_hash, take_state
from ubmd.data.structures import read_structures
from ubmd.errors import SimulationError, UbmdError
from ubmd.files import check_space, content_hash, copy_file, read_json, write_json
from ubmd.lammps.engine import PieceResult, PieceTask
from ubmd.lammps.trajectory import PIECES, TrajectoryState, read_piece, write_state
from ubmd.lammps.triggers import load_trigger, make_trigger
from ubmd.learning.dynamic.check import check_box, ideal_box, input_files
from ubmd.learning.labels import reference_key
from ubmd.learning.reference import look_at_reference, remarks
from ubmd.learning.walk import LARGEST_FRUITLESS, START, Walk, drive
from ubmd.learning.work.groups import note_losses, nothing_ended, run_tasks
from ubmd.learning.work.tasks import MDJob, run_md
from ubmd.learning.work.workers import Executor, WorkersLost
from ubmd.potentials.interface import converged
from ubmd.potentials.kinds import kind_of_settings
from ubmd.potentials.learner import Learner
from ubmd.runs.dynamic_history import ErrorSeries, error_file
from ubmd.runs.folder import Listener, RunFolder
from ubmd.runs.inputs import input_hashes
from ubmd.runs.manifest import open_run
from ubmd.runs.records import RoundEntry
from ubmd.runs.seeds import Stage, random_generator
from ubmd.runs.stages import Stages
from ubmd.settings.dynamic import DynamicRunSettings
from ubmd.settings.marks import key_values
from ubmd.uncertainty.conformal import conformal_scale

_LARGEST_SEED = 900_000_000  # of LAMMPS's random-number generators
_SIGNAL_FRAMES = 16  # most frames that the signals look at


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
        LabelError: the reference fails for all start structures, or for whole rounds again and again.
        SimulationError: no trajectory can be run.
        StorageError: the disk is full.
        MachineError: no task comes to an end, by a fault of the machine or cluster.
    """
    folder, base = RunFolder(Path(settings.run_dir).absolute()), Path(base).absolute()
    check_box(settings, base)  # before the folder is made: what is wrong here stays wrong
    drive(folder, settings.workers, executor, lambda workers: Engine(settings, base, folder, workers, listener))
    return Path(settings.run_dir)


@dataclass
class _Round:
    """One round: where it works, and what it starts from."""

    number: int
    once: Stages
    labels: int
    """that the model has learnt"""
    model: Path
    """folder of the model: this round's, or that of an earlier one if nothing was learnt since"""
    refit: bool
    keys: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.once.folder


class Engine(Walk):
    """One walk through a run."""

    unit = "round"
    entry = RoundEntry
    settings: DynamicRunSettings

    def __init__(
        self, settings: DynamicRunSettings, base: Path, folder: RunFolder, workers: Executor, listener: Listener | None
    ) -> None:
        self.box = ideal_box(settings, base)
        record = look_at_reference(folder, settings.reference, base, workers, settings.workers.retries)
        inputs = input_hashes(input_files(settings, base), settings.reference.arguments, base)
        plan, changes = open_run(folder, settings, inputs, reference=record)
        self.settings = plan.at(0)
        self.dynamic = self.settings.dynamic
        super().__init__(base, folder, workers, listener, plan.threads, changes)
        self._remark(remarks(record, settings.reference))
        self._rounds: list[_Round] = []
        self._loaded = ""  # key of the model that the learner holds
        self._series: dict[int, list[ErrorSeries]] = {r: [] for r in range(self.dynamic.trajectories)}
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
                self.events.write("run_done", labels=len(self.dataset), rounds=number + 1, **ended)
                return

    @cached_property
    def learner(self) -> Learner:
        """Made when first needed: a cluster basis may take seconds."""
        kind = kind_of_settings(self.settings).learner_class()
        learner: Learner = kind.make(self.settings, self.base, self.box, self.folder.path, self.threads)
        if known := learner.describe():
            self.events.write("basis", **known)
        return learner

    # -------------------------------------------------------------------------------------- before the rounds

    def _start(self) -> None:
        """Displaced copies of the box are the first labels."""
        _ = self.learner  # a box that doesn't fit the crystal shows before anything is labelled
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

    def _round(self, number: int) -> _Round:
        """What a round starts from, and the keys that follow from it: nothing is computed."""
        before = self._rounds[-1] if self._rounds else None
        refit = before is None or before.labels < len(self.dataset)
        folder = self.folder.path / "rounds" / f"round_{number:04d}"
        once = Stages(folder, self.events, {"round": number, "labels": len(self.dataset)})
        if refit:
            scale = self._scale()
            learn = content_hash([dataset_hash(self.dataset), self._learner_key, scale])
        else:
            assert before is not None
            learn = before.keys["learn"]
        outcome = [len(self.dataset), len(self.rejected)]
        chain = before.keys["move"] if before else structures_hash([self.box], self.settings.reference.info)
        # The tasks of the pieces follow from these and from the chain before.
        move = content_hash([learn, chain, outcome, self._motion_key, self._lengths(number)])
        reference = reference_key(self.settings.reference)
        keys = {"learn": learn, "move": move, "label": content_hash([move, self.dynamic.batch, reference])}
        model = folder if refit else before.model if before else folder
        return _Round(number, once, len(self.dataset), model, refit, keys)

    @cached_property
    def _learner_key(self) -> Any:
        return [self.learner.key(), self.threads]

    @cached_property
    def _motion_key(self) -> Any:
        bias = key_values(self.settings.bias) if self.settings.bias is not None else None
        return [key_values(self.dynamic), bias, self.settings.seed]

    def _lengths(self, number: int) -> dict[int, int]:
        """Steps of the piece in a round of each replica that goes on."""
        ends = dict.fromkeys(range(self.dynamic.trajectories), 0)
        for entry in self.history[:number]:
            ends |= {result["replica"]: result["end"] for result in entry["replicas"]}
        left = {r: self.dynamic.steps - ends[r] for r in range(self.dynamic.trajectories)}
        return {r: min(self.dynamic.segment, steps) for r, steps in left.items() if steps > 0}

    def _pass_over(self, now: _Round) -> None:
        """Take the results of a settled round."""
        entry = self.folder.read_history()[now.number]
        self.history.append(entry)
        self._ensure_pieces(now)
        self._take(now.number, now.folder / "labels")
        self._note_series(now, entry["replicas"])
        self._check_sane(entry["replicas"])

    def _do(self, now: _Round) -> dict[str, Any] | None:
        """One round; why the run ends with it, or None."""
        self._learn(now)
        ended = self._why_finished(now)
        results: list[dict[str, Any]] = []
        signals: dict[str, Any] = {"signals": [], "converged": False, "fresh_steps": 0, "drops": {}, "chosen": []}
        if ended is None:
            results = self._move(now)
            signals = self._signals(now, results)
            ended = self._why_converged(signals)
        asked = []
        if ended is None:
            asked = self._ask(now, results, signals)
        self._record(now, results, signals, asked, ended)
        return ended

    # -------------------------------------------------------------------------------------- learn

    def _learn(self, now: _Round) -> None:
        """Train and export the round's model, unless an earlier round's is still the newest; measure its errors."""
        self._make_model(now)
        if not now.refit:
            return
        if self._held_out is not None:
            self._held_out.finish()
        test = read_structures(self.folder.test, labelled=True, compare=False) if self.settings.test is not None else []
        labels, target = self.dataset[: now.labels], now.folder / "errors.json"

        def measure() -> None:
            self._load(now)
            errors = {"train": self.learner.errors_on(labels)}
            write_json(target, errors | ({"test": self.learner.errors_on(test)} if test else {}))

        now.once.run("measure", content_hash([now.keys["learn"], dataset_hash(test)]), [target], measure)
        for name in self.learner.files:
            copy_file(now.model / name, self.folder.path / name)

    def _make_model(self, now: _Round) -> None:
        """See to it that the files of a round's model are there."""
        owner = self._owner(now)
        files = [owner.folder / name for name in self.learner.files]

        def work() -> None:
            labels = self.dataset[: owner.labels]
            previous = self._previous_model(owner)
            scale = float(self._conformal_of(owner)["scale"]) if self.dynamic.calibrate else 1.0
            summary = self.learner.learn(labels, owner.folder, previous, scale, self._show_epoch)
            self._loaded = owner.keys["learn"]
            write_json(owner.folder / "fit.json", {"model": summary, "learnt": self._learnt(owner)})

        owner.once.run("learn", owner.keys["learn"], [*files, owner.folder / "fit.json"], work)

    def _owner(self, now: _Round) -> _Round:
        """The round whose model this round uses."""
        return next(r for r in reversed(self._rounds[: now.number + 1]) if r.refit)

    def _previous_model(self, owner: _Round) -> Path | None:
        """Folder of the model before this one: where a refit starts from."""
        earlier = [r for r in self._rounds[: owner.number] if r.refit]
        return earlier[-1].folder if earlier else None

    def _show_epoch(self, row: dict[str, Any]) -> None:
        self.events.show("epoch", **row)

    def _load(self, now: _Round) -> None:
        """Let the learner hold the model of a round."""
        owner = self._owner(now)
        if self._loaded != owner.keys["learn"]:
            self._make_model(owner)
        if self._loaded != owner.keys["learn"]:
            summary = read_json(owner.folder / "fit.json")["model"]
            self.learner.load(owner.folder, summary, self.dataset[: owner.labels])
            self._loaded = owner.keys["learn"]

    def _learnt(self, owner: _Round) -> list[dict[str, Any]]:
        """The labels that a model is the first to know, with errors before and after; the learner holds the model."""
        first = next((r.labels for r in reversed(self._rounds[: owner.number]) if r.refit), 0)
        before = {item["label"]: item for item in self._asked_until(owner.number) if item["label"] is not None}
        new = self.dataset[first : owner.labels]
        rows = []
        for k, (atoms, after) in enumerate(zip(new, self.learner.judge(new), strict=True), start=first):
            row = {key: value for key, value in before.get(k, _unasked(k, atoms)).items() if key != "rejected"}
            rows.append(row | {"error_after": after.error, "true_after": after.true, "rms_after": after.rms})
        return rows

    def _asked_until(self, number: int) -> list[dict[str, Any]]:
        return [item for entry in self.history[:number] for item in entry["asked"]]

    # -------------------------------------------------------------------------------------- calibration

    def _scale(self) -> float | None:
        """Conformal factor that the next model gets."""
        return self._conformal()["scale"] if self.dynamic.calibrate else None

    def _conformal_of(self, owner: _Round) -> dict[str, Any]:
        return self._conformal(owner.number)

    def _conformal(self, number: int | None = None) -> dict[str, Any]:
        """Factor from labels that were predicted before they were learnt (until a round); 1 before the first."""
        pairs = []
        for entry in self.history[:number]:
            scale = entry["model"]["force_scale"] if self.learner.scale_in_errors else 1.0
            pairs += [(a["true_before"], a["error_before"] / scale) for a in entry["asked"] if a["label"] is not None]
        pairs = pairs[-self.dynamic.calibration_window :]
        if not pairs:
            return {"scale": 1.0, "count": 0}
        true, predicted = zip(*pairs, strict=True)
        found = conformal_scale(true, predicted, self.settings.uncertainty.alpha)
        return {"scale": found.scale, "alpha": found.alpha, "attainable": found.attainable, "count": found.count}

    # -------------------------------------------------------------------------------------- move

    def _move(self, now: _Round) -> list[dict[str, Any]]:
        """A piece of every trajectory; leaves piece_RRR.npz, and pieces.json with the results."""
        target, lengths = now.folder / "pieces.json", self._lengths(now.number)

        def work() -> None:
            self._make_model(now)
            results = self._run_pieces(now, self._tasks(now, lengths))
            write_json(target, [result.model_dump() for result in results])

        now.once.run("move", now.keys["move"], [target, *(self._piece(now, r) for r in lengths)], work)
        return read_json(target)

    def _piece(self, now: _Round, replica: int) -> Path:
        return now.folder / f"piece_{replica:03d}.npz"

    def _tasks(self, now: _Round, lengths: dict[int, int]) -> dict[int, PieceTask]:
        """The pieces of a round; writes the states that they start from."""
        dynamic, bias = self.dynamic, self.settings.bias
        self._load(now)
        noise = self.learner.noise
        tasks = {}
        for r, steps in lengths.items():
            start = now.folder / f"start_{r:03d}.npz"
            write_state(start, self._state(now, r))
            seed = random_generator(self.settings.seed, now.number, Stage.MD, r).integers(1, _LARGEST_SEED)
            tasks[r] = PieceTask(
                replica=r,
                model=now.model / "model.pt",
                start=start,
                result=self._piece(now, r),
                steps=steps,
                timestep=dynamic.timestep,
                temperature=dynamic.temperature_of(r),
                damping=dynamic.damping,
                check_every=dynamic.check_every,
                frames=dynamic.frames,
                precision=dynamic.precision,
                force=bias.force if bias else 0.0,
                species=bias.species if bias else {},
                window=bias.window if bias else 1,
                noise=noise,
                lattice=self.learner.lattice,
                langevin_seed=int(seed),
            )
        return tasks

    def _state(self, now: _Round, replica: int) -> TrajectoryState:
        """Where a trajectory goes on: where it was, with its trigger told of a refit; or anew from the box."""
        earlier = [
            (self._rounds[entry["round"]], result)
            for entry in self.history[: now.number]
            for result in entry["replicas"]
            if result["replica"] == replica
        ]
        if not earlier:
            return self._fresh_state(now, replica, 0)
        last, result = earlier[-1]
        if self._starts_anew(last, result):
            return self._fresh_state(now, replica, result["end"])
        self._ensure_pieces(last)
        state, _ = read_piece(self._piece(last, replica))
        if not now.refit:
            return state
        trigger = load_trigger(state.trigger)
        trigger.refitted(self._error_after(now, replica))
        return replace(state, trigger=trigger.state())

    def _fresh_state(self, now: _Round, replica: int, step: int) -> TrajectoryState:
        rng = random_generator(self.settings.seed, now.number, Stage.START, replica + 1)
        temperature = self.dynamic.temperature_of(replica)
        return replace(TrajectoryState.begin(self.box, temperature, make_trigger(self.dynamic.trigger), rng), step=step)

    def _starts_anew(self, last: _Round, result: dict[str, Any]) -> bool:
        """Whether a trajectory is given up: it makes no sense, or the reference refuses its frame."""
        if result["ended"] == "failed" or (result["ended"] == "guard" and result["end"] == result["begin"]):
            return True
        asked = self.history[last.number]["asked"]
        return any(item["replica"] == result["replica"] and item["rejected"] for item in asked)

    def _error_after(self, now: _Round, replica: int) -> float:
        """What the refit left of the error: on the replica's own label, else the mean over the new labels."""
        learnt = read_json(self._owner(now).folder / "fit.json")["learnt"]
        own = [row["error_after"] for row in learnt if row["replica"] == replica and row["rule"] != "start"]
        errors = own or [row["error_after"] for row in learnt]
        return float(np.mean(errors))

    def _ensure_pieces(self, last: _Round) -> None:
        """Run an earlier round's pieces again if one of them was lost or damaged."""
        self._move(last)

    def _run_pieces(self, now: _Round, tasks: dict[int, PieceTask]) -> list[PieceResult]:
        """Pieces in workers; those that an interrupted stage had finished are not run again."""
        jobs = {r: MDJob(PIECES, task, now.keys["move"], _note_of(task)) for r, task in tasks.items()}
        results = {r: kept for r, job in jobs.items() if (kept := job.kept())}
        errors: list[UbmdError] = []
        gone: dict[int, UbmdError] = {}

        def end(r: int, result: PieceResult) -> None:
            results[r] = result
            self.events.write("piece_done", round=now.number, **result.model_dump())

        def rest(r: int, error: UbmdError, ended: Literal["segment", "failed"]) -> None:
            check_space(now.folder)
            end(r, jobs[r].salvage(str(error), ended=ended))

        def done(r: int, result: PieceResult | None, error: UbmdError | None) -> None:
            result = result or jobs[r].kept()  # else only the answer was lost
            if result is not None:
                end(r, result)
            elif isinstance(error, WorkersLost):
                gone[r] = error
            else:
                assert error is not None
                errors.append(error)
                rest(r, error, "failed")

        def tick() -> None:
            steps = [
                results[r].end - results[r].begin if r in results else steps_so_far(task.result) or 0
                for r, task in tasks.items()
            ]
            self.events.show("md_steps", round=now.number, steps=steps, limits=[t.steps for t in tasks.values()])

        missing = {r: (job,) for r, job in jobs.items() if r not in results}
        lost = note_losses(self.events, "piece of replica", round=now.number)
        retries = self.settings.workers.retries
        run_tasks(self.workers, run_md, missing, self.dynamic.timeout, done, tick, retries, lost=lost)
        if len(errors) == len(tasks):
            raise SimulationError(f"No trajectory could be run; the first said: {errors[0]}")
        if gone and len(gone) == len(missing):
            raise nothing_ended("piece of a trajectory", next(iter(gone.values())))
        for r, error in gone.items():  # they stay where they are, and go on in the next round
            rest(r, error, "segment")
        return [results[r] for r in sorted(results)]

    # -------------------------------------------------------------------------------------- signals

    def _signals(self, now: _Round, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Signals of convergence on the frames since the last refit, and which of the replicas that asked are labelled.

        Returns:
            signals, converged, fresh_steps, drops (replica -> predicted relative drop), chosen (replicas).
        """
        target = now.folder / "signals.json"
        candidates = [r["replica"] for r in results if self._asks(r)]
        most = self.dynamic.batch or len(candidates)
        limits = self.dynamic.convergence

        def work() -> None:
            self._load(now)
            frames, fresh = self._fresh_frames(now, results)
            signals = self.learner.signals(frames, limits)
            asked = [self._frame(now, r) for r in candidates]
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
        return read_json(target)

    def _asks(self, result: dict[str, Any]) -> bool:
        """Whether a piece ended with a frame to label; a guard before the first check has none that is new."""
        return result["ended"] == "asked" or (result["ended"] == "guard" and result["end"] > result["begin"])

    def _frame(self, now: _Round, replica: int) -> Atoms:
        """The structure at the end of a piece."""
        state, _ = read_piece(self._piece(now, replica))
        atoms = state.atoms()
        take_state(atoms, self.box, self.settings.reference.info)
        return atoms

    def _fresh_frames(self, now: _Round, results: list[dict[str, Any]]) -> tuple[list[Atoms], int]:
        """(evenly chosen frames since the last refit, steps of all replicas since then)."""
        rounds = self._rounds[self._owner(now).number : now.number]
        pieces = [(r, self.history[r.number]["replicas"]) for r in rounds] + [(now, results)]
        frames, steps = [], 0
        for where, ended in pieces:
            for result in ended:
                steps += result["end"] - result["begin"]
                if where is not now:
                    self._ensure_pieces(where)
                state, data = read_piece(self._piece(where, result["replica"]))
                frames += [replace(state, positions=positions).atoms() for positions in data.frames]
        count = min(_SIGNAL_FRAMES, len(frames))
        return [frames[(k + 1) * len(frames) // count - 1] for k in range(count)], steps

    def _why_finished(self, now: _Round) -> dict[str, str] | None:
        """The budget that is used up, if one is."""
        calls = self._calls()
        if calls >= self.dynamic.labels:
            return {"rule": "labels", "reason": f"The reference was asked for {calls} structures (dynamic.labels)."}
        if not self._lengths(now.number):
            return {"rule": "steps", "reason": f"All trajectories have {self.dynamic.steps:,} steps (dynamic.steps)."}
        return None

    def _why_converged(self, signals: dict[str, Any]) -> dict[str, str] | None:
        limits = self.dynamic.convergence
        if not (limits.stop and signals["converged"] and signals["fresh_steps"] >= limits.steps):
            return None
        reasons = " ".join(signal["reason"] for signal in signals["signals"])
        return {"rule": "converged", "reason": f"All signals of convergence hold. {reasons}"}

    def _calls(self) -> int:
        return len(self.dataset) + len(self.rejected)

    # -------------------------------------------------------------------------------------- label

    def _ask(self, now: _Round, results: list[dict[str, Any]], signals: dict[str, Any]) -> list[dict[str, Any]]:
        """Label the chosen frames and append them; returns 'asked' of the round's entry."""
        by_replica = {result["replica"]: result for result in results}
        # Not in the key: a limit that grows later must not change what is already labelled.
        chosen = signals["chosen"][: self.dynamic.labels - self._calls()]
        candidates = []
        for r in chosen:
            atoms, result = self._frame(now, r), by_replica[r]
            atoms.info |= {"iteration": now.number, "replica": r, "step": result["end"], "rule": result["rule"]}
            # Rounded: a model that was made again may differ in its last digits, the data set must not.
            error = float(f"{result['error']:.4g}")
            atoms.info |= {"temperature": result["temperature"], "predicted_error": error}
            candidates.append(atoms)
        first, rejected = len(self.dataset), len(self.rejected)
        self._label(now.number, now.keys["label"], lambda: candidates, now.folder / "labels", now.once)
        labelled, refused = self.dataset[first:], self.rejected[rejected:]
        target = now.folder / "asked.json"

        def judge() -> None:
            self._load(now)
            rows = []
            for k, (atoms, before) in enumerate(zip(labelled, self.learner.judge(labelled), strict=True), start=first):
                row = _asked(atoms, by_replica, signals["drops"]) | {"label": k, "rejected": ""}
                rows.append(row | {"error_before": before.error, "true_before": before.true, "rms_before": before.rms})
            for atoms in refused:
                row = _asked(atoms, by_replica, signals["drops"]) | {"label": None, "rejected": atoms.info["reason"]}
                rows.append(row | {"error_before": row.pop("seen"), "true_before": None, "rms_before": None})
            for row in rows:
                row.pop("seen", None)
            write_json(target, rows)

        now.once.run("judge", now.keys["label"], [target], judge)
        return read_json(target)

    def _check_fruitful(self, labelled: Sequence[Atoms], rejected: Sequence[Atoms]) -> None:
        if labelled or rejected:  # a round in which no trajectory has asked says nothing
            super()._check_fruitful(labelled, rejected)

    # -------------------------------------------------------------------------------------- after a round

    def _record(
        self,
        now: _Round,
        results: list[dict[str, Any]],
        signals: dict[str, Any],
        asked: list[dict[str, Any]],
        ended: dict[str, str] | None,
    ) -> None:
        """One entry of the history, and the error series so far."""
        fit = read_json(self._owner(now).folder / "fit.json")
        last = self.history[-1] if self.history else {"md_steps": 0}
        conformal = self._conformal()
        chosen = {item["replica"] for item in asked}
        entry: dict[str, Any] = {
            "round": now.number,
            "labels": now.labels,
            "calls": self._calls() - len(asked),
            "md_steps": last["md_steps"] + sum(result["end"] - result["begin"] for result in results),
            "refit": now.refit,
            "learnt": fit["learnt"] if now.refit else [],
            "model": fit["model"],
            **read_json(self._owner(now).folder / "errors.json"),
            "conformal": conformal if conformal["count"] else None,
            "replicas": results,
            "asked": asked,
            "passed": [r["replica"] for r in results if self._asks(r) and r["replica"] not in chosen],
            "fresh_steps": signals["fresh_steps"],
            "signals": signals["signals"],
            "converged": signals["converged"],
            "seconds": now.once.seconds(),
        }
        if ended is not None:
            entry["ended"] = ended
        is_new = self._add_to_history(now.number, entry)
        self._note_series(now, results)
        for replica, parts in self._series.items():
            if parts:
                _joined(parts).save(error_file(self.folder.path, replica))
        if is_new:
            self.events.write("round_done", round=now.number, **_shown(entry))
        if ended is None:
            now.once.note("record", now.keys["label"])
            self._remove_old_models(now)
            self._check_sane(results)

    def _remove_old_models(self, now: _Round) -> None:
        """Models before the newest are not needed, and can be made again; the newest is where the next one starts."""
        owner = self._owner(now)
        for earlier in self._rounds[: owner.number]:
            for name in self.learner.files:
                (earlier.folder / name).unlink(missing_ok=True)

    def _note_series(self, now: _Round, results: Sequence[dict[str, Any]]) -> None:
        for result in results:
            path = self._piece(now, result["replica"])
            if not path.exists():
                continue
            _, data = read_piece(path)
            calls = [result["end"]] if self._asks(result) else []
            self._series[result["replica"]].append(
                ErrorSeries(
                    data.steps,
                    data.errors,
                    data.thresholds,
                    data.means,
                    np.full(len(data.steps), now.labels),
                    np.array(calls, dtype=np.int64),
                )
            )

    def _check_sane(self, results: Sequence[dict[str, Any]]) -> None:
        """Give up after several rounds in a row in which every trajectory failed: more of the same would never end."""
        failed = [result["ended"] == "failed" or result["end"] == result["begin"] for result in results]
        self._insane = self._insane + 1 if failed and all(failed) else 0
        if self._insane == LARGEST_FRUITLESS:
            raise SimulationError(
                f"All trajectories failed {LARGEST_FRUITLESS} times in a row; the last reason: {results[-1]['reason']}"
            )

    def _report(self) -> None:
        """Pictures and tables of the run."""
        from ubmd.analysis.dynamic_report import make_dynamic_report

        make_dynamic_report(self.folder.path)


def _note_of(task: PieceTask) -> Path:
    """File that notes how a piece has ended."""
    return task.result.with_suffix(".json")


def _unasked(label: int, atoms: Atoms) -> dict[str, Any]:
    """A start label, as 'learnt' has it."""
    nothing = dict.fromkeys(("threshold", "error_before", "true_before", "rms_before", "drop"))
    where = {"replica": int(atoms.info["replica"]), "temperature": None, "step": 0, "rule": "start"}
    return {"label": label, **where, **nothing}


def _asked(atoms: Atoms, results: dict[int, dict[str, Any]], drops: dict[str, float]) -> dict[str, Any]:
    """What is known of a request before its label."""
    replica = int(atoms.info["replica"])
    result = results[replica]
    return {
        "replica": replica,
        "temperature": result["temperature"],
        "step": result["end"],
        "rule": result["rule"],
        "threshold": result["threshold"],
        "drop": drops.get(str(replica)),
        "seen": result["error"],
    }


def _joined(parts: Sequence[ErrorSeries]) -> ErrorSeries:
    return ErrorSeries(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def _shown(entry: dict[str, Any]) -> dict[str, Any]:
    """What an event says about a round."""
    names = ("labels", "calls", "md_steps", "refit", "test", "train", "fresh_steps", "converged")
    shown = {name: entry[name] for name in names if name in entry}
    gamma, count = (sum((entry["model"].get(name) or {}).values()) for name in ("gamma", "parameters"))
    shown["signals"] = {signal["name"]: [signal["value"], signal["holds"]] for signal in entry["signals"]}
    shown["noise"], shown["determined"] = entry["model"]["noise"], gamma / count if count else None
    shown["learnt"] = [
        {name: row[name] for name in ("label", "error_before", "true_before", "true_after")} for row in entry["learnt"]
    ]
    return shown
