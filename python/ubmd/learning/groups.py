"""Groups of tasks: submitted, waited for in part or to the end, tried again where a worker was lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from ubmd.errors import LabelError, SimulationError, TrainingError, UbmdError
from ubmd.learning.workers import Executor, TaskCrashed, TaskFailed, WorkersLost, outcome

_POLL = 1.0  # s between two looks at running tasks
_LOST = 3  # submissions of a task that was lost without having run

Done = Callable[[Any, Any, UbmdError | None], None]


class TaskGroup:
    """Tasks of one kind, known by their keys."""

    def __init__(
        self,
        workers: Executor,
        function: Callable[..., Any],
        timeout: float | None,
        retries: int = 0,
        at_once: int | None = None,
    ) -> None:
        """Nothing is submitted yet.

        Args:
            workers: where the tasks run.
            function: importable by the workers.
            timeout: of each task, s from its start; None: no limit.
            retries: how often a task is tried again whose process crashed or was killed.
            at_once: submit no more than this; None: all, the executor queues them.
        """
        self._workers = workers
        self._function = function
        self._timeout = timeout
        self._retries = retries
        self._at_once = at_once
        self._queue: deque[Hashable] = deque()
        self._arguments: dict[Hashable, tuple[Any, ...]] = {}
        self._running: dict[Future[Any], Hashable] = {}
        self._crashes: dict[Hashable, int] = {}
        self._losses: dict[Hashable, int] = {}

    def add(self, tasks: Mapping[Any, tuple[Any, ...]]) -> None:
        """Submit ``function(*arguments)`` for each key -> arguments that is not already there."""
        for key, arguments in tasks.items():
            if key not in self._arguments:
                self._arguments[key] = arguments
                self._queue.append(key)
        self._fill()

    def running(self) -> set[Any]:
        """Keys of submitted tasks that have not ended."""
        return set(self._running.values())

    def withdraw(self) -> set[Any]:
        """Take back the tasks that were never submitted; returns their keys."""
        waiting = set(self._queue)
        self._queue.clear()
        for key in waiting:
            del self._arguments[key]
        return waiting

    def wait(
        self, done: Done, tick: Callable[[], None] | None = None, enough: Callable[[], bool] | None = None
    ) -> None:
        """Wait for all tasks, or until ``enough()``.

        Args:
            done: called in this thread with (key, result, None) or (key, None, error), in order of completion.
            tick: called about once per second.
            enough: asked after each completion.
        """
        self._collect(0.0, done)  # what has ended since the last call
        while self._running and not (enough is not None and enough()):
            self._collect(_POLL, done)
            if tick is not None:
                tick()

    def _collect(self, timeout: float, done: Done) -> None:
        finished, _ = wait(self._running, timeout=timeout, return_when=FIRST_COMPLETED)
        for future in finished:
            self._end(future, done)
        self._fill()

    def _end(self, future: Future[Any], done: Done) -> None:
        key = self._running.pop(future)
        try:
            result = outcome(future)
        except WorkersLost as error:
            if self._again(key, self._losses, _LOST - 1):
                return
            failure: UbmdError = error
        except TaskCrashed as error:
            if self._again(key, self._crashes, self._retries):
                return
            failure = error
        except (LabelError, SimulationError, TrainingError, TaskFailed) as error:
            failure = error
        else:
            del self._arguments[key]
            done(key, result, None)
            return
        del self._arguments[key]
        done(key, None, failure)

    def _again(self, key: Hashable, counts: dict[Hashable, int], most: int) -> bool:
        """Put a task back in front of the queue, unless it has had its chances."""
        counts[key] = counts.get(key, 0) + 1
        if counts[key] > most:
            return False
        self._queue.appendleft(key)
        return True

    def _fill(self) -> None:
        while self._queue and (self._at_once is None or len(self._running) < self._at_once):
            key = self._queue.popleft()
            future = self._workers.submit(self._function, *self._arguments[key], timeout=self._timeout)
            self._running[future] = key


def run_tasks(
    workers: Executor,
    function: Callable[..., Any],
    arguments: Mapping[int, tuple[Any, ...]],
    timeout: float | None,
    done: Done,
    tick: Callable[[], None] | None = None,
    retries: int = 0,
    at_once: int | None = None,
) -> None:
    """A `TaskGroup` from beginning to end."""
    group = TaskGroup(workers, function, timeout, retries, at_once)
    group.add(arguments)
    group.wait(done, tick)
