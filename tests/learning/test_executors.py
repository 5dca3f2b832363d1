"""Executors: the same promises wherever the tasks run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from test_workers import is_alive, linux, wait_for
from unkind import crash, double, environment, process_id, raise_sentence, start_programs, wait_forever

from ubmd.errors import LabelError, SettingsError
from ubmd.learning.clusters import parsl_config
from ubmd.learning.executors import Adapter, make_executor
from ubmd.learning.workers import Executor, TaskCrashed, TaskTimeout, outcome
from ubmd.settings import RunSettings, WorkerSettings, load_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # of the executors' own code


def threads(folder: Path) -> Executor:
    return Adapter(ThreadPoolExecutor(2), folder, owned=True)


def processes(folder: Path) -> Executor:
    return Adapter(ProcessPoolExecutor(2, multiprocessing.get_context("spawn")), folder, owned=True)


def parsl(folder: Path) -> Executor:
    pytest.importorskip("parsl")
    return make_executor(WorkerSettings(executor="parsl", processes=2), folder)


def executorlib(folder: Path) -> Executor:
    pytest.importorskip("executorlib")
    return make_executor(WorkerSettings(executor="executorlib", processes=2), folder)


@pytest.fixture(scope="module", params=[threads, processes, parsl, executorlib], ids=lambda f: f.__name__)
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    make: Callable[[Path], Executor] = request.param
    made = make(tmp_path_factory.mktemp("executor"))
    yield made
    made.stop()


def test_results_errors_and_one_thread(executor: Executor) -> None:
    futures = [executor.submit(double, k) for k in range(6)]
    assert [outcome(f) for f in futures] == [0, 2, 4, 6, 8, 10]
    assert outcome(executor.submit(environment, "OMP_NUM_THREADS")) == "1"
    assert outcome(executor.submit(process_id, 0)) != os.getpid()
    with pytest.raises(LabelError, match=r"^The water is too deep.$"):
        outcome(executor.submit(raise_sentence))


def test_crashes_and_time_outs_cost_one_task(executor: Executor, tmp_path: Path) -> None:
    futures = [executor.submit(crash, int(signal.SIGSEGV)) if k == 1 else executor.submit(double, k) for k in range(4)]
    slow = executor.submit(wait_forever, tmp_path / "pid", timeout=2.0)
    with pytest.raises(TaskCrashed, match=r"^The worker process was killed by SIGSEGV"):
        outcome(futures[1])
    assert [outcome(f) for k, f in enumerate(futures) if k != 1] == [0, 4, 6]
    with pytest.raises(TaskTimeout, match=r"^It took longer than the limit of 2 s.$"):
        outcome(slow)
    assert wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


@linux
@pytest.mark.parametrize("make", [threads, processes, parsl, executorlib], ids=lambda f: f.__name__)
def test_stop_ends_tasks_and_their_programs(make: Callable[[Path], Executor], tmp_path: Path) -> None:
    executor = make(tmp_path)
    executor.submit(start_programs, tmp_path)
    assert wait_for((tmp_path / "pids").exists, 60.0)
    programs = [int(number) for number in (tmp_path / "pids").read_text().split()]
    executor.stop()
    assert wait_for(lambda: not any(is_alive(program) for program in programs), 30.0)


SCRIPT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, {tests!r})
    from unkind import double, raise_sentence
    from ubmd.errors import LabelError
    from ubmd.learning.executors import Adapter
    from ubmd.learning.workers import outcome

    with {pool} as pool:
        for turn in range(2):
            adapter = Adapter(pool, Path({folder!r}))
            try:
                print([outcome(f) for f in [adapter.submit(double, k) for k in range(4)]], flush=True)
                outcome(adapter.submit(raise_sentence))
            except LabelError as error:
                print(error, flush=True)
            finally:
                adapter.stop()
    print("left the block")
"""
POOLS = {
    **{how: f"ProcessPoolExecutor(2, multiprocessing.get_context({how!r}))" for how in ("spawn", "fork", "forkserver")},
    "loky": "__import__('joblib').externals.loky.get_reusable_executor(max_workers=2)",
}


@pytest.mark.parametrize("how", POOLS)
def test_a_with_block_around_runs_is_left(how: str, tmp_path: Path) -> None:
    if how == "loky":
        pytest.importorskip("joblib")
    names = {"tests": str(Path(__file__).parent), "folder": str(tmp_path), "pool": POOLS[how]}
    (tmp_path / "script.py").write_text(SCRIPT.format(**names))
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    results = ["[0, 2, 4, 6]", "The water is too deep."]
    assert done.stdout.splitlines() == [*results, *results, "left the block"], done.stderr
    assert done.returncode == 0


def test_child_processes_end_with_the_run_if_the_pool_lives_on(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        adapter = Adapter(pool, tmp_path)
        child = outcome(adapter.submit(process_id, 0))
        assert outcome(adapter.submit(process_id, 0)) == child  # kept while the run goes on
        adapter.stop()
        assert wait_for(lambda: not is_alive(child), 30.0)
        again = Adapter(pool, tmp_path)
        assert outcome(again.submit(double, 4)) == 8
        again.stop()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"executor": "parsl", "options": {"no_such_option": 1}}, "workers.options do not suit parsl.*no_such_option"),
        ({"executor": "parsl", "options": {"provider": {"name": "None"}}}, "workers.options do not suit parsl.*None"),
        ({"executor": "parsl", "options": {"provider": {}}}, "workers.options.provider needs a name"),
        ({"executor": "executorlib", "options": {"name": "Nothing"}}, "workers.options do not suit executorlib"),
    ],
)
def test_wrong_options_are_one_sentence(settings: dict, words: str, tmp_path: Path) -> None:
    pytest.importorskip(settings["executor"])
    with pytest.raises(SettingsError, match=words):
        make_executor(WorkerSettings(**settings), tmp_path)


# ------------------------------------------------------------------------------------------ the SLURM example

SLURM = Path(__file__).parents[2] / "lammps_examples" / "slurm" / "slurm.toml"


def test_the_slurm_example_is_what_parsl_wants(tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    settings = load_settings(SLURM, RunSettings)
    assert settings.loop.asynchronous
    (executor,) = parsl_config(settings.workers, tmp_path, "token").executors
    assert executor.max_workers_per_node == 16
    assert "--partition=standard" in executor.provider.scheduler_options
    assert executor.provider.walltime == settings.workers.options["provider"]["walltime"]


def test_check_of_the_slurm_example_with_local_workers(tmp_path: Path) -> None:
    pytest.importorskip("openmm")
    code = "from ubmd.cli.main import app; app()"
    command = [sys.executable, "-c", code, "check", str(SLURM), "--set", "workers.executor=pebble"]
    command += ["--set", "workers.processes=2", "--set", "training.threads=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
