"""The trajectories of dynamic training: every round has a segment of each, run in workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms

from ubmd.attempts import steps_so_far
from ubmd.data.state import take_state
from ubmd.errors import SimulationError, UbmdError
from ubmd.files import check_space, read_json, write_json
from ubmd.lammps.engine import PieceResult, PieceTask
from ubmd.lammps.trajectory import PIECES, TrajectoryState, read_piece, write_state
from ubmd.lammps.triggers import load_trigger, make_trigger
from ubmd.learning.dynamic.models import Models
from ubmd.learning.dynamic.rounds import Past, Round
from ubmd.learning.work.groups import note_losses, nothing_ended, run_tasks
from ubmd.learning.work.tasks import MDJob, run_md
from ubmd.learning.work.workers import Executor, WorkersLost
from ubmd.potentials.learner import Learner
from ubmd.runs.folder import EventLog
from ubmd.runs.records import Learnt, Piece
from ubmd.runs.seeds import Stage, random_generator
from ubmd.settings.dynamic import DynamicRunSettings

_LARGEST_SEED = 900_000_000  # of LAMMPS's random-number generators
_SIGNAL_FRAMES = 16  # maximum number of frames that the signals use


class Trajectories:
    """The trajectories of a run, segment by segment."""

    def __init__(
        self,
        settings: DynamicRunSettings,
        box: Atoms,
        learner: Learner,
        models: Models,
        past: Past,
        workers: Executor,
        events: EventLog,
    ) -> None:
        """``box``: where all begin; ``learner``: that of the ``models``, which they move with."""
        self._settings = settings
        self._dynamic = settings.dynamic
        self._box = box
        self._learner = learner
        self._models = models
        self._past = past
        self._workers = workers
        self._events = events

    def lengths(self, number: int) -> dict[int, int]:
        """Steps of the segment in a round of each replica that continues."""
        ends = dict.fromkeys(range(self._dynamic.trajectories), 0)
        for entry in self._past.history[:number]:
            ends |= {result.replica: result.end for result in entry.replicas}
        left = {r: self._dynamic.steps - ends[r] for r in range(self._dynamic.trajectories)}
        return {r: min(self._dynamic.segment, steps) for r, steps in left.items() if steps > 0}

    def move(self, now: Round) -> list[Piece]:
        """A segment of every trajectory; leaves piece_RRR.npz, and pieces.json with the results."""
        target, lengths = now.folder / "pieces.json", self.lengths(now.number)

        def work() -> None:
            self._models.make(now)
            results = self._run_pieces(now, self._tasks(now, lengths))
            write_json(target, [result.model_dump() for result in results])

        now.once.run("move", now.keys["move"], [target, *(piece_file(now, r) for r in lengths)], work)
        return [Piece.read(result) for result in read_json(target)]

    def _tasks(self, now: Round, lengths: dict[int, int]) -> dict[int, PieceTask]:
        """The segments of a round; writes the states that they start from."""
        dynamic, bias = self._dynamic, self._settings.bias
        self._models.load(now)
        noise, labelled_range = self._learner.noise, self._labelled_range(now)
        tasks = {}
        for r, steps in lengths.items():
            start = now.folder / f"start_{r:03d}.npz"
            write_state(start, self._state(now, r))
            seed = random_generator(self._settings.seed, now.number, Stage.MD, r).integers(1, _LARGEST_SEED)
            tasks[r] = PieceTask(
                replica=r,
                model=now.owner.folder / "model.pt",
                start=start,
                result=piece_file(now, r),
                steps=steps,
                timestep=dynamic.timestep,
                temperature=dynamic.temperature_of(r),
                damping=dynamic.damping,
                check_every=dynamic.check_every,
                frames=dynamic.frames,
                precision=dynamic.precision,
                device=dynamic.device,
                force=bias.force if bias else 0.0,
                species=bias.species if bias else {},
                window=bias.window if bias else 1,
                noise=noise,
                lattice=self._learner.lattice,
                langevin_seed=int(seed),
                labelled_range=labelled_range,
            )
        return tasks

    def _labelled_range(self, now: Round) -> Path | None:
        """File of the range of the labels that the round's model has learnt, for dynamic.trigger.extrapolation."""
        if self._dynamic.trigger.extrapolation is None:
            return None
        found = self._learner.labelled_range(self._past.dataset[: now.labels])
        assert found is not None  # the settings allow it only for force constants
        path = now.folder / "labelled_range.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
        return path

    def _state(self, now: Round, replica: int) -> TrajectoryState:
        """The state a trajectory continues from: its last, with a refit passed to its trigger; or again the box."""
        earlier = [
            (self._past.rounds[entry.round], result)
            for entry in self._past.history[: now.number]
            for result in entry.replicas
            if result.replica == replica
        ]
        if not earlier:
            return self._fresh_state(now, replica, 0)
        last, result = earlier[-1]
        if self._starts_anew(last, result):
            return self._fresh_state(now, replica, result.end)
        self.ensure_pieces(last)
        state, _ = read_piece(piece_file(last, replica))
        if not now.refit:
            return state
        trigger = load_trigger(state.trigger)
        trigger.refitted(self._error_after(now, replica))
        return replace(state, trigger=trigger.state())

    def _fresh_state(self, now: Round, replica: int, step: int) -> TrajectoryState:
        rng = random_generator(self._settings.seed, now.number, Stage.START, replica + 1)
        temperature, trigger = self._dynamic.temperature_of(replica), make_trigger(self._dynamic.trigger)
        return replace(TrajectoryState.begin(self._box, temperature, trigger, rng), step=step)

    def _starts_anew(self, last: Round, result: Piece) -> bool:
        """Whether a trajectory is abandoned: its state is invalid, or its frame was rejected by the reference."""
        if result.ended == "failed" or (result.ended == "guard" and result.end == result.begin):
            return True
        asked = self._past.history[last.number].asked
        return any(item.replica == result.replica and item.rejected for item in asked)

    def _error_after(self, now: Round, replica: int) -> float:
        """The error that remains after the refit: on the replica's own label, else the mean over the new labels."""
        learnt = [Learnt.read(row) for row in read_json(now.owner.folder / "fit.json")["learnt"]]
        own = [row for row in learnt if row.replica == replica and row.rule != "start"]
        return float(np.mean([row.error_after for row in own or learnt if row.error_after is not None]))

    def ensure_pieces(self, last: Round) -> None:
        """Run an earlier round's segments again if one of them was lost or damaged."""
        self.move(last)

    def _run_pieces(self, now: Round, tasks: dict[int, PieceTask]) -> list[PieceResult]:
        """Segments in workers; those that an interrupted stage had finished are not run again."""
        jobs = {r: MDJob(PIECES, task, now.keys["move"], _note_of(task)) for r, task in tasks.items()}
        results = {r: kept for r, job in jobs.items() if (kept := job.kept())}
        errors: list[UbmdError] = []
        gone: dict[int, UbmdError] = {}

        def end(r: int, result: PieceResult) -> None:
            results[r] = result
            self._events.write("piece_done", round=now.number, **result.model_dump())

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
            self._events.show("md_steps", round=now.number, steps=steps, limits=[t.steps for t in tasks.values()])

        missing = {r: (job,) for r, job in jobs.items() if r not in results}
        lost = note_losses(self._events, "piece of replica", round=now.number)
        retries = self._settings.workers.retries
        run_tasks(self._workers, run_md, missing, self._dynamic.timeout, done, tick, retries, lost=lost)
        if len(errors) == len(tasks):
            raise SimulationError(f"No trajectory could be run; the first error: {errors[0]}")
        if gone and len(gone) == len(missing):
            raise nothing_ended("segment of a trajectory", next(iter(gone.values())))
        for r, error in gone.items():  # they stay where they are, and continue in the next round
            rest(r, error, "segment")
        return [results[r] for r in sorted(results)]

    def frame(self, now: Round, replica: int) -> Atoms:
        """The structure at the end of a segment."""
        state, _ = read_piece(piece_file(now, replica))
        atoms = state.atoms()
        take_state(atoms, self._box, self._settings.reference.info)
        return atoms

    def fresh_frames(self, now: Round, results: list[Piece]) -> tuple[list[Atoms], int]:
        """(evenly chosen frames since the last refit, steps of all replicas since then)."""
        rounds = self._past.rounds[now.owner.number : now.number]
        pieces = [(r, self._past.history[r.number].replicas) for r in rounds] + [(now, results)]
        frames, steps = [], 0
        for where, ended in pieces:
            for result in ended:
                steps += result.end - result.begin
                if where is not now:
                    self.ensure_pieces(where)
                state, data = read_piece(piece_file(where, result.replica))
                frames += [replace(state, positions=positions).atoms() for positions in data.frames]
        count = min(_SIGNAL_FRAMES, len(frames))
        return [frames[(k + 1) * len(frames) // count - 1] for k in range(count)], steps


def piece_file(now: Round, replica: int) -> Path:
    """File of a replica's segment in a round."""
    return now.folder / f"piece_{replica:03d}.npz"


def asks(result: Piece) -> bool:
    """Whether a segment ended with a frame to label; at a displacement limit before the first check none is new."""
    return result.ended == "asked" or (result.ended == "guard" and result.end > result.begin)


def _note_of(task: PieceTask) -> Path:
    """File that records how a segment has ended."""
    return task.result.with_suffix(".json")
