"""Executors: the same promises wherever the tasks run."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from processes import HELPERS, is_alive, linux, wait_for
from unkind import crash, double, environment, process_id, raise_sentence, start_programs, wait_forever

from ubmd.errors import LabelError, SettingsError
from ubmd.learning.walk import Walk, drive
from ubmd.learning.work import keeper
from ubmd.learning.work.clusters import parsl_config, tasks_at_once
from ubmd.learning.work.executors import Adapter, make_executor
from ubmd.learning.work.keeper import left_behind
from ubmd.learning.work.workers import Executor, TaskCrashed, TaskTimeout, WorkersLost, outcome
from ubmd.runs.folder import RunFolder
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
    from ubmd.learning.work.executors import Adapter
    from ubmd.learning.work.workers import outcome

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
    names = {"tests": str(HELPERS), "folder": str(tmp_path), "pool": POOLS[how]}
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


SCRIPT_OF_A_DRIVER = """
import sys, time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, {tests!r})
    from unkind import double, start_programs
    from ubmd.learning.work.executors import make_executor
    from ubmd.learning.work.workers import outcome
    from ubmd.settings import WorkerSettings

    folder = Path({folder!r})
    executor = make_executor(WorkerSettings(executor="parsl", processes=2), folder)
    assert outcome(executor.submit(double, 2)) == 4
    executor.submit(start_programs, folder)
    time.sleep(1000)
"""


def processes_of(text: str) -> list[int]:
    """Processes with a text in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def interchanges() -> set[int]:
    """Those of Parsl that this process has started."""
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    return set(map(int, children.split())) & set(processes_of("parsl: HTEX interchange"))


@linux
def test_a_killed_driver_leaves_nothing_of_parsl(tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    names = {"tests": str(HELPERS), "folder": str(tmp_path / "run")}
    (tmp_path / "script.py").write_text(SCRIPT_OF_A_DRIVER.format(**names))
    driver = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], cwd=tmp_path)
    try:
        assert wait_for((tmp_path / "run" / "pids").exists, 120.0)
        children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
        started = [*map(int, children), *map(int, (tmp_path / "run" / "pids").read_text().split())]
        jobs = processes_of(str(tmp_path / "run" / "parsl"))
        titles = [Path(f"/proc/{process}/cmdline").read_bytes() for process in children]
    finally:
        driver.kill()
        driver.wait()
    assert any(title.startswith(b"parsl: HTEX interchange") for title in titles)
    assert jobs
    assert wait_for(lambda: not any(map(is_alive, started + jobs)), 30.0)


@linux
def test_parsl_keeps_a_waiting_job_and_notices_when_its_interchange_dies(tmp_path: Path) -> None:
    """Parsl itself cancels a job that has not started yet when there are fewer tasks than workers, again and again."""
    pytest.importorskip("parsl")
    before = interchanges()
    queue = {"name": "LocalProvider", "worker_init": "sleep 7"}  # longer than Parsl waits between two looks
    made = make_executor(WorkerSettings(executor="parsl", processes=2, options={"provider": queue}), tmp_path)
    try:
        first = made.submit(double, 1)
        assert wait_for(first.done, 120.0)
        assert outcome(first) == 2
        assert len(list((tmp_path / "parsl" / "000" / "submit_scripts").glob("*.sh"))) == 1
        (interchange,) = interchanges() - before
        assert os.getsid(interchange) == interchange  # Ctrl-C in a terminal does not reach it
        running = made.submit(wait_forever, tmp_path / "pid")
        assert wait_for((tmp_path / "pid").exists, 60.0)
        os.kill(interchange, signal.SIGKILL)
        with pytest.raises(WorkersLost, match="the interchange of Parsl has died"):
            outcome(running)
        with pytest.raises(WorkersLost, match="the interchange of Parsl has died"):
            outcome(made.submit(double, 1))
    finally:
        made.stop()
    assert wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())), 30.0)


@linux
def test_a_process_of_any_name_is_found_by_the_keeper() -> None:
    name = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff'); print(flush=True); input()"  # PR_SET_NAME
    environment = os.environ | {"UBMD_TEST": "5f3a"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", name], env=environment, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert left_behind(None, b"UBMD_TEST=5f3a") == [process.pid]
        process.kill()


@linux
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_batch_system_cannot_end_the_keeper_before_it_has_cleaned_up(ending: signal.Signals) -> None:
    """A job that is cancelled gets SIGTERM in all its processes, some time before SIGKILL."""
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as worker:
        memory = Path(f"/dev/shm/mpich_shm_{worker.pid:x}_0")
        memory.touch()
        command = [sys.executable, "-I", "-S", keeper.__file__, str(worker.pid), "UBMD_TEST=90c1", "session"]
        with subprocess.Popen(command) as watching:
            status = Path(f"/proc/{watching.pid}/status")
            try:
                assert wait_for(lambda: int(re.search(r"SigIgn:\s*(\w+)", status.read_text())[1], 16) >> ending - 1 & 1)
                watching.send_signal(ending)
                assert memory.exists()
            finally:
                worker.kill()
            assert watching.wait(timeout=30) == 0
    assert not memory.exists()


def test_jobs_that_never_start_lose_the_task_with_what_they_said(tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    provider = {"name": "LocalProvider", "worker_init": "echo 'srun: error: no such node' >&2; exit 3"}
    made = make_executor(WorkerSettings(executor="parsl", options={"provider": provider}), tmp_path)
    with pytest.raises(WorkersLost, match=r"^The executor lost the task .*srun: error: no such node"):
        outcome(made.submit(double, 1))
    made.stop()


def test_an_executor_that_is_broken_loses_the_task(tmp_path: Path) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    adapter = Adapter(pool, tmp_path)
    with pytest.raises(WorkersLost, match="cannot schedule new futures after shutdown"):
        outcome(adapter.submit(double, 1))
    adapter.stop()


def test_what_dead_drivers_wanted_is_not_wanted_any_more(tmp_path: Path) -> None:
    """The next driver of the run removes their files: what they left on other machines ends."""
    folder = RunFolder(tmp_path / "run")
    dead = Adapter(ThreadPoolExecutor(2), folder.path)
    running = dead.submit(wait_forever, tmp_path / "pid")
    assert wait_for((tmp_path / "pid").exists, 60.0)

    def begin(_: Executor) -> Walk:
        with pytest.raises(WorkersLost):
            outcome(running)
        raise SettingsError("That is all.")

    with pytest.raises(SettingsError, match="That is all"):
        drive(folder, WorkerSettings(), None, begin)
    assert not list(folder.path.glob(".wanted-*"))
    dead.stop()


# ------------------------------------------------------------------------------------------ options

PROVIDER = "workers.options.provider"


def slurm(**options: object) -> dict:
    return {"provider": {"name": "SlurmProvider"} | options}


@pytest.mark.parametrize(
    ("executor", "options", "words"),
    [
        ("parsl", {"cores_per_workers": 1}, "workers.options has no option 'cores_per_workers' (perhaps 'cores_per_"),
        ("parsl", {"poll_period": "1"}, "workers.options.poll_period = '1' must be of type int."),
        ("parsl", {"address": "192.0.2.250"}, "workers.options.address = '192.0.2.250' must be an IP address of this"),
        ("parsl", {"address": "login1"}, "workers.options.address = 'login1' must be an IP address of this machine"),
        ("parsl", {"worker_port": "54000"}, "workers.options.worker_port = '54000' must be of type Optional[int]."),
        ("parsl", {"provider": "SlurmProvider"}, f"{PROVIDER} must be a table with a name"),
        ("parsl", {"provider": {}}, f"{PROVIDER}.name is missing: give a name, such as 'SlurmProvider'."),
        ("parsl", {"provider": {"name": "SlurmProvidr"}}, "(perhaps 'SlurmProvider'?)."),
        ("parsl", slurm(partitions="a"), f"{PROVIDER} has no option 'partitions' (perhaps 'partition'?); see the docu"),
        ("parsl", slurm(max_blocks="2"), f"{PROVIDER}.max_blocks = '2' must be of type int."),
        ("parsl", slurm(launcher="SrunLaunchr"), f"{PROVIDER}.launcher = 'SrunLaunchr' must be one of "),
        ("parsl", slurm(launcher={"name": "SrunLauncher", "override": ""}), "(perhaps 'overrides'?)"),
        ("parsl", slurm(walltime="4h"), f"{PROVIDER}.walltime = '4h' must be hours, minutes and seconds, such as "),
        ("parsl", slurm(walltime=datetime.time(4)), f"{PROVIDER}.walltime = 04:00:00 must be in quotes."),
        ("executorlib", {"name": "SlurmClusterExecutor"}, "for tasks in jobs of their own, set workers.executor = 'pa"),
        ("executorlib", {"name": "SlurmJobExecutr"}, "(perhaps 'SlurmJobExecutor'?)"),
        ("executorlib", {"name": "SlurmJobExecutor"}, "'SlurmJobExecutor' works inside a SLURM job: start the run in"),
        ("executorlib", {"max_worker": 2}, "workers.options has no option 'max_worker' (perhaps 'max_workers'?)"),
    ],
)
def test_wrong_options_are_one_sentence(
    executor: str, options: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(executor)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SettingsError) as caught:
        make_executor(WorkerSettings(executor=executor, options=options), tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_parsl_is_told_unless_the_options_say_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("parsl")

    def made(options: dict, processes: int | None = None) -> Any:
        return parsl_config(WorkerSettings(executor="parsl", processes=processes, options=options), tmp_path, "token")

    (here,) = made({}).executors
    assert (here.address, here.encrypted, here.drain_period) == ("127.0.0.1", True, None)
    (there,) = made(slurm(walltime="10:00:00"), 16).executors
    assert there.max_workers_per_node == 16
    assert there.address
    assert there.drain_period == 27000  # s, of 36000
    assert there.label == "ubmd-token"
    own = {"address": "127.0.0.2", "encrypted": False, "drain_period": 60, "worker_port_range": [50000, 50010]}
    (chosen,) = made(slurm() | own).executors
    assert (chosen.address, chosen.encrypted, chosen.drain_period) == ("127.0.0.2", False, 60)
    assert chosen.worker_port_range == (50000, 50010)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"processes": 3}, 3),
        ({"executor": "parsl", "processes": 16}, 16),
        ({"executor": "parsl", "processes": 16, "options": slurm(nodes_per_block=2, max_blocks=3)}, 96),
        ({"executor": "parsl", "options": {"max_workers_per_node": 4} | slurm(max_blocks=2)}, 8),
        ({"executor": "parsl", "options": {"cores_per_worker": 4} | slurm(cores_per_node=32)}, 8),
        ({"executor": "executorlib", "options": {"max_workers": 5}}, 5),
        ({"executor": "executorlib", "options": {"max_cores": 8, "resource_dict": {"cores": 2}}}, 4),
    ],
)
def test_tasks_at_once_are_those_of_all_nodes(settings: dict, expected: int) -> None:
    assert tasks_at_once(WorkerSettings(**settings)) == expected


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
