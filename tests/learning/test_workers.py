"""Worker processes: what a failure costs, and what is left of them afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pebble.pool.process
import pytest
from unkind import (
    crash,
    double,
    environment,
    process_id,
    raise_sentence,
    raise_unpicklable,
    shared_memory_of_lammps,
    start_programs,
    torch_threads,
    wait_forever,
)

from ubmd.errors import LabelError
from ubmd.learning.workers import TaskFailed, Workers, outcome

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc, needs PR_SET_PDEATHSIG")


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as pool:
        yield pool


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_results_come_back(workers: Workers) -> None:
    assert [outcome(f) for f in [workers.submit(double, k) for k in range(8)]] == [0, 2, 4, 6, 8, 10, 12, 14]


def test_tasks_run_elsewhere_with_one_thread(workers: Workers) -> None:
    assert outcome(workers.submit(process_id, 0)) != os.getpid()
    assert outcome(workers.submit(environment, "OMP_NUM_THREADS")) == "1"
    assert outcome(workers.submit(torch_threads)) == 1


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGSEGV, "SIGSEGV .a crash in compiled code"), (signal.SIGKILL, "SIGKILL .*memory")]
)
def test_a_crash_costs_one_task(workers: Workers, number: int, words: str) -> None:
    futures = [workers.submit(crash, int(number)) if k == 3 else workers.submit(double, k) for k in range(10)]
    with pytest.raises(TaskFailed, match=f"^The worker process was killed by {words}"):
        outcome(futures[3])
    assert [outcome(f) for k, f in enumerate(futures) if k != 3] == [2 * k for k in range(10) if k != 3]


def test_a_worker_that_still_starts_when_all_stop_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = pebble.pool.process.stop_process

    def hesitate(process: BaseProcess) -> None:
        process.join(3.0)
        stop(process)

    monkeypatch.setattr(pebble.pool.process, "stop_process", hesitate)  # as on a busy machine
    with Workers(1) as one:
        one.submit(double, 1)
        time.sleep(0.02)
    assert capfd.readouterr().err == ""


def test_a_time_out_costs_one_task(workers: Workers, tmp_path: Path) -> None:
    slow = workers.submit(wait_forever, tmp_path / "pid", timeout=1.5)
    others = [workers.submit(double, k, timeout=60) for k in range(4)]
    with pytest.raises(TaskFailed, match=r"^It took longer than the limit of 1.5 s.$"):
        outcome(slow)
    assert [outcome(f) for f in others] == [0, 2, 4, 6]
    assert wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def test_errors_keep_their_sentence(workers: Workers) -> None:
    with pytest.raises(LabelError, match=r"^The water is too deep.$"):
        outcome(workers.submit(raise_sentence))
    with pytest.raises(TaskFailed, match=r"^Unpicklable: 1 and 2$") as caught:
        outcome(workers.submit(raise_unpicklable))
    assert "raise_unpicklable" in caught.value.details


def test_an_idle_worker_that_dies_does_not_end_the_pool() -> None:
    with Workers(1) as pool:
        os.kill(outcome(pool.submit(process_id, 0)), signal.SIGKILL)
        time.sleep(1.0)
        assert outcome(pool.submit(double, 4)) == 8


def descendants(process: int) -> list[int]:
    """A process's children, their children and so on."""
    children = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            children += [int(number) for number in path.read_text().split()]
    return children + [d for child in children for d in descendants(child)]


@linux
@pytest.mark.parametrize("how", ["time-out", "kill", "stop"])
def test_programs_end_with_their_task(tmp_path: Path, how: str) -> None:
    with Workers(1) as pool:
        future = pool.submit(start_programs, tmp_path, timeout=4.0 if how == "time-out" else None)
        assert wait_for((tmp_path / "pids").exists)
        assert wait_for(lambda: len(sleeping(tmp_path)) >= 8)  # the ranks of mpiexec have been started
        programs = sleeping(tmp_path)
        if how == "kill":
            os.kill(programs[0], signal.SIGKILL)
        if how != "stop":
            with pytest.raises(TaskFailed):
                outcome(future)
    assert wait_for(lambda: not any(is_alive(program) for program in programs)), how


@linux
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_the_memory_of_mpi_is_given_back(how: str) -> None:
    with Workers(1) as pool:
        segments = outcome(pool.submit(shared_memory_of_lammps))
        if not segments:
            pytest.skip("this MPI library keeps none")
        if how == "kill":
            os.kill(outcome(pool.submit(process_id, 0)), signal.SIGKILL)
    assert wait_for(lambda: not any(segment.exists() for segment in segments))


def sleeping(folder: Path) -> list[int]:
    """The worker of `start_programs` and all that it started."""
    worker, *programs = map(int, (folder / "pids").read_text().split())
    return [worker, *(p for p in {*programs, *descendants(worker)} if is_alive(p))]


def test_stop_ends_busy_workers(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    with Workers(1) as pool:
        pool.submit(wait_forever, started)
        assert wait_for(lambda: started.exists() and started.read_text() != "")
    assert not is_alive(int(started.read_text()))


@linux
def test_workers_and_their_programs_die_with_a_killed_driver(tmp_path: Path) -> None:
    started = tmp_path / "pids"
    script = (
        "from ubmd.learning.workers import Workers\nfrom unkind import start_programs\nfrom pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    with Workers(1) as pool: pool.submit(start_programs, Path({str(tmp_path)!r})).result()\n"
    )
    (tmp_path / "driver.py").write_text(script)
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *sys.path])
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py"], env=os.environ | {"PYTHONPATH": path})
    try:
        assert wait_for(started.exists)
        assert wait_for(lambda: len(sleeping(tmp_path)) >= 8)
        programs = sleeping(tmp_path)
    finally:
        driver.kill()
        driver.wait()
    assert wait_for(lambda: not any(is_alive(program) for program in programs))


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    """Every worker imports it, and would begin the run once more."""
    script = tmp_path / "drive.py"
    script.write_text(
        "from ubmd.learning.workers import Workers, outcome\n"
        "with Workers(1) as workers:\n"
        "    outcome(workers.submit(abs, -1))\n"
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert found.returncode != 0
    assert f"Put what {script} does below a line if __name__ == '__main__'" in found.stderr.splitlines()[-1]
