"""Worker processes: what a failure costs, and what is left of them afterwards."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pebble.pool.process
import pytest
from processes import descendants, is_alive, linux, wait_for
from unkind import (
    be_stopped,
    crash,
    double,
    end_quietly,
    environment,
    interrupted,
    process_id,
    raise_sentence,
    raise_unpicklable,
    shared_memory_of_lammps,
    shared_memory_of_ours,
    start_programs,
    torch_threads,
    wait_forever,
)

from ubmd.errors import LabelError
from ubmd.learning.work.inside import guarded
from ubmd.learning.work.workers import TaskCrashed, TaskFailed, Workers, WorkersLost, outcome


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as pool:
        yield pool


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


@linux
def test_time_in_which_a_worker_is_stopped_does_not_count(workers: Workers) -> None:
    assert outcome(workers.submit(be_stopped, 6.0, timeout=4.0)) == 0


@linux
def test_a_worker_that_stays_stopped_is_lost(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ubmd.learning.work.workers._LONGEST_HALT", 1.0)
    with pytest.raises(WorkersLost, match=r"^The worker process was stopped \(SIGSTOP\) for \d+ s\.$"):
        outcome(workers.submit(be_stopped, 1000.0, timeout=100.0))


@linux
def test_time_in_which_all_is_stopped_does_not_count(tmp_path: Path) -> None:
    """As on a laptop that sleeps, or when a batch system suspends the job."""
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, subprocess\n"
        "from ubmd.learning.work.workers import Workers, outcome\n"
        "from unkind import nap, process_id\n"
        "if __name__ == '__main__':\n"
        "    with Workers(1) as pool:\n"
        "        both = f'{outcome(pool.submit(process_id, 0))} {os.getpid()}'\n"
        "        future = pool.submit(nap, 20, timeout=5.0)\n"
        "        words = f'sleep 0.5; kill -STOP {both}; sleep 6; kill -CONT {both}'\n"
        "        subprocess.run(['sh', '-c', words], check=True)\n"
        "        assert outcome(future) is None\n"
    )
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": path}, check=True, timeout=120)


def test_an_interrupt_outside_of_workers_is_nobodys_fault() -> None:
    assert guarded(interrupted)[1:3] == ("WorkersLost", "The task was interrupted.")


@pytest.mark.parametrize("busy", [True, False])
def test_a_worker_that_ends_quietly_is_noticed(busy: bool) -> None:
    """pebble takes it for a finished one."""
    with Workers(1) as pool:
        process = outcome(pool.submit(process_id, 0))
        if busy:
            with pytest.raises(TaskCrashed, match=r"^The worker process ended by itself with exit code 0\.$"):
                outcome(pool.submit(end_quietly))
        else:
            os.kill(process, signal.SIGTERM)
            assert wait_for(lambda: not is_alive(process))
        assert outcome(pool.submit(double, 4)) == 8


def test_nobody_reads_what_a_task_prints(tmp_path: Path) -> None:
    """As behind ``ubmd run | head``, or when the terminal is gone."""
    script = tmp_path / "driver.py"
    script.write_text(
        "from pathlib import Path\nfrom ubmd.learning.work.workers import Workers, outcome\nfrom unkind import say\n"
        "if __name__ == '__main__':\n"
        "    with Workers(1) as pool:\n"
        "        Path('said').write_text(outcome(pool.submit(say, 'hello')))\n"
    )
    path = os.pathsep.join(sys.path)
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, script]
    subprocess.run(words, stdout=writer, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=120)
    os.close(writer)
    assert (tmp_path / "said").read_text() == "hello"


def run_apart(tmp_path: Path, before: str, driver: str) -> subprocess.CompletedProcess[str]:
    """A driver's program with a /dev/shm of its own; ``before``: shell commands that change it."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("only root may mount")
    (tmp_path / "driver.py").write_text(driver)
    path = os.pathsep.join(sys.path)
    command = f"{before}\nexec {sys.executable} {tmp_path / 'driver.py'}"
    words = ["unshare", "-m", "sh", "-ec", command]
    return subprocess.run(
        words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )


DRIVER = """
from ubmd.learning.work.workers import Workers, WorkersLost, outcome
from unkind import double, start_replica_engine
if __name__ == '__main__':
    with Workers(2) as pool:
        for future in [pool.submit({task}) for _ in range(3)]:
            try:
                print(outcome(future))
            except WorkersLost as error:
                print(error)
"""


@linux
@pytest.mark.parametrize(
    ("options", "said"), [("ro,size=8m", "read-only"), ("size=100k", "full")], ids=["read-only", "full"]
)
def test_shared_memory_that_cannot_be_used(tmp_path: Path, options: str, said: str) -> None:
    """MPICH keeps 1 MB there for LAMMPS; other tasks need none."""
    before = f"mount -t tmpfs -o {options} tmpfs /dev/shm"
    found = run_apart(tmp_path, before, DRIVER.format(task="double, 1"))
    assert found.stdout.splitlines() == ["2"] * 3, found.stderr
    found = run_apart(tmp_path, before, DRIVER.format(task="start_replica_engine"))
    line = f"/dev/shm (shared memory), which MPI needs, is {said}: make room in it"
    assert [text.startswith(line) for text in found.stdout.splitlines()] == [True] * 3, found.stdout
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""


@linux
@pytest.mark.parametrize("processes", [1, 3, 5, 7])  # not enough for a thread, a process, pebble's threads, a keeper
def test_no_more_processes(tmp_path: Path, processes: int) -> None:
    """The limit binds no root: another user, who may read this folder all the same."""
    one = "-all,+dac_override"
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", f"--inh-caps={one}", f"--ambient-caps={one}"]
    if not shutil.which("setpriv") or subprocess.run([*user, "ls", tmp_path], check=False).returncode:
        pytest.skip("only root may become another user")
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_NPROC, ({processes}, {processes}))\n"
    (tmp_path / "driver.py").write_text(limit + DRIVER.format(task="double, 1"))
    words = [*user, sys.executable, "-B", tmp_path / "driver.py"]
    path = os.pathsep.join(sys.path)
    found = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 3
    for line in found.stdout.splitlines():
        assert (line == "2" and processes > 3) or re.match(r"^A worker process could not be started: .*ulimit -u", line)
    assert found.stderr == ""


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


@linux
def test_a_worker_with_lammps_leaves_nothing_behind_whatever_kills_it(workers: Workers) -> None:
    """On the nodes of a cluster the keeper may be killed, too."""
    names, energy = outcome(workers.submit(shared_memory_of_ours))
    assert names == []
    assert energy < 0.0


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
        "from ubmd.learning.work.workers import Workers\nfrom unkind import start_programs\nfrom pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    with Workers(1) as pool: pool.submit(start_programs, Path({str(tmp_path)!r})).result()\n"
    )
    (tmp_path / "driver.py").write_text(script)
    path = os.pathsep.join(sys.path)
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py"], env=os.environ | {"PYTHONPATH": path})
    try:
        assert wait_for(started.exists)
        assert wait_for(lambda: len(sleeping(tmp_path)) >= 8)
        programs = sleeping(tmp_path)
    finally:
        driver.kill()
        driver.wait()
    assert wait_for(lambda: not any(is_alive(program) for program in programs))


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """Workers don't import it: that would begin the run once more."""
    script = tmp_path / "drive.py"
    script.write_text(
        "from ubmd.learning.work.workers import Workers, outcome\n"
        "print('begins')\n"
        "with Workers(1) as workers:\n"
        "    print(outcome(workers.submit(abs, -1)))\n"
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout, found.stderr) == (0, "begins\n1\n", "")
