"""Groups of tasks: submitted, waited for in part or to the end, retried where a worker was lost."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from typing import Any

from ubmd.errors import DataError, LabelError, MachineError, SimulationError, TrainingError, UbmdError
from ubmd.learning.work.workers import Executor, TaskCrashed, TaskFailed, WorkersLost, opened, outcome
from ubmd.runs.event_records import TaskLost
from ubmd.runs.folder import EventLog

_POLL = 1.0  # s between two looks at running tasks
_PAUSE = 1.0  # s before a lost task is tried again; the next pauses are twice as long each
_LONGEST_PAUSE = 60.0

Done = Callable[[Any, Any, UbmdError | None], None]
Lost = Callable[[Any, UbmdError, bool], None]


class TaskGroup:
    """Tasks of one kind, known by their keys.

    A task that raises or takes too long has failed by itself. One whose process crashes is tried again, as it may not
    have been the cause; then it has failed, too. One that is lost by a fault of the machine (`WorkersLost`: a lost
    node, a process killed from outside, no memory for a new one) is retried as often, then returned as undecided.

    Several tasks may share a process (``many``). If that crashes, each is tried again by itself.
    """

    def __init__(
        self,
        workers: Executor,
        function: Callable[..., Any],
        timeout: float | None,
        retries: int = 0,
        at_once: int | None = None,
        lost: Lost = lambda key, error, again: None,
        many: bool = False,
    ) -> None:
        """Nothing is submitted yet.

        Args:
            workers: where the tasks run.
            function: importable by the workers.
            timeout: of each task, s from its start; None: no limit.
            retries: how often a task is tried again whose process crashed or was lost.
            at_once: submit no more than this; None: all, the executor queues them.
            lost: called as (key, error, whether it is tried again) when a task's process crashed or was lost.
            many: ``function`` is called with the arguments of several tasks (a tuple for each) and returns a `Reply`
                for each; see ``add``.
        """
        self._workers = workers
        self._function = function
        self._timeout = timeout
        self._retries = retries
        self._at_once = at_once
        self._lost = lost
        self._many = many
        self._together = 1
        self._alone: set[Hashable] = set()
        self._queue: deque[Hashable] = deque()
        self._resting: dict[Hashable, float] = {}  # lost tasks, and when they may be tried again
        self._arguments: dict[Hashable, tuple[Any, ...]] = {}
        self._running: dict[Future[Any], list[Hashable]] = {}
        self._crashes: dict[Hashable, int] = {}
        self._losses: dict[Hashable, int] = {}

    def add(self, tasks: Mapping[Any, tuple[Any, ...]], together: int = 1) -> None:
        """Submit ``function(*arguments)`` for each key -> arguments that is not already there.

        ``together``: how many tasks a process may run at once, if that leaves none of the workers without any.
        """
        for key, arguments in tasks.items():
            if key not in self._arguments:
                self._arguments[key] = arguments
                self._queue.append(key)
        self._together = max(1, min(together, math.ceil(len(self._queue) / self._workers.processes)))
        self._fill()

    def running(self) -> set[Any]:
        """Keys of submitted tasks that have not ended."""
        return {key for keys in self._running.values() for key in keys}

    def withdraw(self) -> set[Any]:
        """Take back the tasks that are not running; returns their keys."""
        waiting = {*self._queue, *self._resting}
        self._queue.clear()
        self._resting.clear()
        for key in waiting:
            self._forget(key)
        return waiting

    def wait(
        self, done: Done, tick: Callable[[], None] | None = None, enough: Callable[[], bool] | None = None
    ) -> None:
        """Wait for all tasks, or until ``enough()``.

        Args:
            done: called in this thread with (key, result, None) or (key, None, error), in order of completion. A
                `WorkersLost` says nothing about the task itself.
            tick: called about once per second.
            enough: asked after each completion.
        """
        self._collect(0.0, done)  # what has ended since the last call
        while (self._running or self._resting) and not (enough is not None and enough()):
            self._collect(_POLL, done)
            if tick is not None:
                tick()

    def _collect(self, timeout: float, done: Done) -> None:
        if self._running:
            finished, _ = wait(self._running, timeout=timeout, return_when=FIRST_COMPLETED)
            for future in finished:
                self._end(future, done)
        elif self._resting:
            time.sleep(min(timeout, max(0.0, min(self._resting.values()) - time.monotonic())))
        self._fill()

    def _end(self, future: Future[Any], done: Done) -> None:
        keys = self._running.pop(future)
        try:
            result = outcome(future)
        except UbmdError as error:
            shared = isinstance(error, TaskCrashed) and len(keys) > 1
            for key in keys:
                if shared:
                    self._repeat_alone(key, error)
                else:
                    self._settle(key, error, done)
            return
        for key, reply in zip(keys, result if self._many else [(result, "", "", "")], strict=True):
            try:
                value = opened(reply)
            except UbmdError as error:
                self._settle(key, error, done)
            else:
                self._forget(key)
                done(key, value, None)

    def _repeat_alone(self, key: Hashable, error: UbmdError) -> None:
        """One of the tasks in a process has made it crash: which one is seen when each has its own."""
        self._lost(key, error, True)
        self._alone.add(key)
        self._queue.append(key)

    def _settle(self, key: Hashable, error: UbmdError, done: Done) -> None:
        """A task has failed or was lost: try it again, or give it up; errors that end the run are raised."""
        if isinstance(error, TaskCrashed):
            self._crashes[key] = self._crashes.get(key, 0) + 1
            again = self._crashes[key] <= self._retries
            self._lost(key, error, again)
            if again:
                self._queue.appendleft(key)
                return
        elif isinstance(error, WorkersLost):
            self._losses[key] = self._losses.get(key, 0) + 1
            again = self._losses[key] <= self._retries
            self._lost(key, error, again)
            if again:
                pause = min(_PAUSE * 2 ** (self._losses[key] - 1), _LONGEST_PAUSE)
                self._resting[key] = time.monotonic() + pause
                return
        elif not isinstance(error, LabelError | SimulationError | TrainingError | TaskFailed):
            raise error
        self._forget(key)
        done(key, None, error)

    def _forget(self, key: Hashable) -> None:
        """A task that is added again later has all its retries again."""
        self._alone.discard(key)
        for known in (self._arguments, self._crashes, self._losses):
            known.pop(key, None)

    def _fill(self) -> None:
        now = time.monotonic()
        for key in [key for key, due in self._resting.items() if due <= now]:
            del self._resting[key]
            self._queue.append(key)
        while self._queue and (self._at_once is None or len(self._running) < self._at_once):
            keys = self._next()
            self._running[self._submit(keys)] = keys

    def _next(self) -> list[Hashable]:
        """The tasks of the next process."""
        keys = [self._queue.popleft()]
        while self._queue and len(keys) < self._together and not self._alone & {keys[0], self._queue[0]}:
            keys.append(self._queue.popleft())
        return keys

    def _submit(self, keys: list[Hashable]) -> Future[Any]:
        """The tasks' future; a broken executor, or one that can start no thread, loses the tasks."""
        arguments = [self._arguments[key] for key in keys]
        timeout = None if self._timeout is None else self._timeout * len(keys)
        try:
            given = arguments if self._many else arguments[0]
            return self._workers.submit(self._function, *given, timeout=timeout)
        except Exception as error:
            refused: Future[Any] = Future()
            refused.set_exception(error)
            return refused


def run_tasks(
    workers: Executor,
    function: Callable[..., Any],
    arguments: Mapping[int, tuple[Any, ...]],
    timeout: float | None,
    done: Done,
    tick: Callable[[], None] | None = None,
    retries: int = 0,
    at_once: int | None = None,
    lost: Lost = lambda key, error, again: None,
) -> None:
    """A `TaskGroup` from beginning to end."""
    group = TaskGroup(workers, function, timeout, retries, at_once, lost)
    group.add(arguments)
    group.wait(done, tick)


def note_losses(events: EventLog, what: str, **context: Any) -> Lost:
    """Writes an event for every process that crashes or is lost.

    Args:
        events: of the run.
        what: the kind of the tasks ('label', 'replica', ...); their number is the key, or the last item of it.
        context: more for the event, such as the iteration.
    """

    def lost(key: Any, error: UbmdError, again: bool) -> None:
        number = key[-1] if isinstance(key, tuple) else key
        crashed = isinstance(error, TaskCrashed)
        events.write("task_lost", what=what, index=number, why=str(error), again=again, crashed=crashed, **context)

    return lost


def describe_loss(event: TaskLost) -> str:
    """One line about such an event."""
    name = event.what if event.what == "reference" else f"{event.what} {event.index}"
    if event.again:
        return f"{name}: {event.why} It is tried again."
    return f"{name}: {event.why}" + ("" if event.crashed else " It is postponed.")


def describe_losses(losses: Sequence[TaskLost]) -> list[str]:
    """A line on the losses since the newest start of a run, if there were any."""
    lines = []
    for loss in losses:
        with suppress(DataError):  # damaged
            lines.append(describe_loss(loss))
    return [f"Processes lost since its last start: {len(lines)}; the last was that of {lines[-1]}"] if lines else []


def nothing_ended(what: str, error: UbmdError) -> MachineError:
    """The error that ends a run in which no task of a kind was completed."""
    return MachineError(
        f"No {what} could be run because of a fault of the machine or cluster; the first was lost with: {error} "
        "Nothing is rejected or lost: once the cause is fixed, rerun the same command to resume."
    )
