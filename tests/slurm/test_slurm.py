"""Runs on a SLURM cluster that loses jobs, nodes, drivers and patience: the data set is that of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from slurm_runs import PARSL, PROCESSES, UBMD, Cluster, Driver, Run, make_values, wait_for

from ubmd.data.structures import read_structures


def parsl_with(**provider: Any) -> dict[str, Any]:
    """Workers whose provider has other arguments."""
    options = PARSL["options"]
    return PARSL | {"options": options | {"provider": options["provider"] | provider}}


def check_equal(run: Run, calm: Run, semaphores: bool = True) -> None:
    """Same data set, same files, nothing rejected; nothing of the run is alive, queued, or in a machine's memory."""
    assert run.folder.dataset.read_bytes() == calm.folder.dataset.read_bytes()
    assert run.rejected() == []
    assert run.files() == calm.files()
    check_nothing_left(run.cluster, semaphores)


def check_nothing_left(cluster: Cluster, semaphores: bool = True) -> None:
    """No job in the queue; no process or shared memory on any machine."""
    assert wait_for(lambda: not cluster.jobs(), 60.0), cluster.ask("squeue")
    assert wait_for(lambda: not cluster.left(semaphores=semaphores), 60.0), cluster.left(semaphores=semaphores)


def test_parsl(cluster: Cluster, calm: Run, tmp_path: Path) -> None:
    """A run through Parsl."""
    run = Run(tmp_path, make_values(0.0, PARSL), cluster)
    run.finish()
    assert {line.split()[2] for line in run.calls.read_text().splitlines()} <= {"n1", "n2"}
    check_equal(run, calm)


@pytest.mark.parametrize(
    "stage", ["label", pytest.param("md", marks=pytest.mark.slow)], ids=["during labels", "during MD"]
)
def test_driver_killed(cluster: Cluster, calm: Run, tmp_path: Path, stage: str) -> None:
    """Driver killed with SIGKILL, then started again."""
    run = Run(tmp_path, make_values(1.0, PARSL), cluster)
    driver = run.start()
    assert wait_for(lambda: run.in_stage(stage) and (stage == "md" or run.count("begin") > 0)), driver.said()
    driver.kill()
    check_nothing_left(cluster)
    run.finish()
    check_equal(run, calm)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_driver_told_to_end(cluster: Cluster, calm: Run, tmp_path: Path, number: int) -> None:
    """Driver ended by a signal with its sentence, then started again."""
    run = Run(tmp_path, make_values(1.0, PARSL), cluster)
    driver = run.start()
    run.wait_for_calls(1)
    driver.signal(number)
    code, said = driver.end()
    assert code == 128 + number, said
    assert "Interrupted; rerun the same command to resume." in said
    assert "Traceback" not in said
    check_nothing_left(cluster)
    run.finish()
    check_equal(run, calm)


@pytest.mark.parametrize(
    "partition",
    [
        pytest.param("nowhere", id="does not exist"),
        pytest.param("closed", id="takes no jobs", marks=pytest.mark.slow),
    ],
)
def test_wrong_partition(cluster: Cluster, calm: Run, tmp_path: Path, partition: str) -> None:
    """Wrong partition; mended, started again."""
    run = Run(tmp_path, make_values(0.0, parsl_with(partition=partition)), cluster)
    check_no_jobs(run)
    run.set(make_values(0.0, PARSL) | {"run_dir": str(run.folder.path)})
    run.finish()
    check_equal(run, calm)


def check_no_jobs(run: Run) -> None:
    """The run ends with one sentence, and nothing is rejected."""
    code, said = run.start().end()
    assert code == 1, said
    assert len([line for line in said.splitlines() if line.startswith("Error: ")]) == 1, said
    assert "Traceback" not in said
    assert run.rejected() == []
    check_nothing_left(run.cluster)


def cancel_running(cluster: Cluster) -> None:
    """Cancel the jobs that run, as an operator or a preemption would."""
    running = cluster.jobs("R")
    assert running, cluster.ask("squeue")
    cluster.ask("scancel", *running)
    assert wait_for(lambda: not set(running) & set(cluster.jobs()), 60.0), cluster.ask("squeue")


@pytest.mark.slow
def test_scancel(cluster: Cluster, calm: Run, tmp_path: Path) -> None:
    """scancel of the job during labels."""
    run = Run(tmp_path, make_values(2.0, PARSL), cluster)
    driver = run.start()
    run.wait_for_calls(1)
    cancel_running(cluster)
    code, said = driver.end()
    assert code == 0, said
    assert run.count("begin") > run.count("end")
    check_equal(run, calm)


@pytest.mark.slow
def test_preemption(cluster: Cluster, tmp_path: Path) -> None:
    """Three jobs cancelled one after the other during labels (preemption)."""
    run = Run(tmp_path, make_values(3.0, PARSL), cluster)
    driver = run.start()
    for _ in range(3):
        run.wait_for_calls(run.count("begin") + 1)
        cancel_running(cluster)
    code, said = driver.end()
    if code != 0:  # every structure was lost as often as it is tried: the run says so, and goes on when started again
        assert code == 1, said
        assert "a fault of the machine or cluster" in said
        run.finish()
    assert run.rejected() == []
    assert len(read_structures(run.folder.dataset, labelled=True)) == 8
    check_nothing_left(cluster)


@pytest.mark.slow
def test_lost_node(cluster: Cluster, calm: Run, tmp_path: Path) -> None:
    """Node that loses power during labels, and comes back."""
    run = Run(tmp_path, make_values(2.0, PARSL), cluster)
    driver = run.start()
    run.wait_for_calls(1)
    node = run.calls.read_text().split()[2]
    cluster.node("kill", node)
    time.sleep(15.0)  # longer than SLURM waits for it
    cluster.node("start", node)
    code, said = driver.end()
    assert code == 0, said
    assert run.count("begin") > run.count("end")
    check_equal(run, calm)


@pytest.mark.slow
def test_walltime(cluster: Cluster, calm: Run, tmp_path: Path) -> None:
    """Walltime of a job reached during labels (1 minute, the shortest)."""
    run = Run(tmp_path, make_values(25.0, parsl_with(walltime="00:01:00", max_blocks=1)), cluster)
    code, said = run.start().end(900.0)
    assert code == 0, said
    jobs = {line.split()[1] for line in run.calls.read_text().splitlines()}
    assert len(jobs) > 1
    check_equal(run, calm)


@pytest.mark.slow
def test_queue(cluster: Cluster, calm: Run, tmp_path: Path) -> None:
    """Queue longer than the time-out of a label."""
    cluster.ask("sbatch", "--exclusive", "-N2", "-o", "/dev/null", "--wrap", "sleep 1000")
    assert wait_for(lambda: bool(cluster.jobs("R")), 60.0)
    (other,) = cluster.jobs("R")
    run = Run(tmp_path, make_values(0.0, PARSL, reference={"timeout": 20.0}), cluster)
    driver = run.start()
    assert wait_for(lambda: bool(cluster.jobs("PD")), 120.0), driver.said()
    time.sleep(40.0)
    assert cluster.jobs("PD")
    assert not driver.ended(), driver.said()
    cluster.ask("scancel", other)
    code, said = driver.end()
    assert code == 0, said
    check_equal(run, calm)


@pytest.mark.slow
def test_check(cluster: Cluster, tmp_path: Path) -> None:
    """ubmd check through SLURM, with nodes that have a /tmp of their own."""
    run = Run(tmp_path, make_values(0.0, PARSL), cluster)
    before = {path.name for path in tmp_path.iterdir()}
    code, said = run.start(*UBMD, "check", str(run.settings)).end()
    assert code == 0, said
    assert "All stages work." in said
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("driver")} - before <= {"calls"}
    check_nothing_left(cluster)


@pytest.mark.slow
def test_executorlib(cluster: Cluster, calm: Run, tmp_path: Path) -> None:
    """executorlib's SlurmJobExecutor inside a job of two nodes."""
    pytest.importorskip("executorlib")
    workers = {"executor": "executorlib", "retries": 2, "options": {"name": "SlurmJobExecutor", "max_workers": 2}}
    run = Run(tmp_path, make_values(0.0, workers), cluster)
    allocation = ["salloc", "-N2", "-n4", "--exclusive", *UBMD, "run", str(run.settings)]
    code, said = run.start(*allocation).end()
    assert code == 0, said
    check_equal(run, calm)


# ------------------------------------------------------------------------------------------ random blows

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGSTOP)
ENDINGS = (1, -signal.SIGKILL, *(128 + number for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)))
TARGETS = ("driver", "group", "worker", "step")


def strike(run: Run, driver: Driver, target: str, number: int, rng: random.Random) -> bool:
    """Send a signal to the driver, its process group, a worker process on a node, or a job's step; was there one?"""
    if target in ("driver", "group"):
        driver.signal(number, group=target == "group")
        return True
    hit = run.cluster.workers() if target == "worker" else run.cluster.jobs("R")
    if hit and target == "worker":
        with suppress(ProcessLookupError):
            os.kill(rng.choice(hit), number)
    elif hit:
        run.cluster.signal_step(rng.choice(hit), number)
    return bool(hit)


def wake(run: Run, driver: Driver) -> None:
    """End what SIGSTOP began."""
    driver.signal(signal.SIGCONT, group=True)
    for worker in run.cluster.workers():
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)
    for job in run.cluster.jobs("R"):
        run.cluster.signal_step(job, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_blows(cluster: Cluster, tmp_path: Path) -> None:
    """Ten random blows: KILL, TERM, HUP, INT, STOP to driver, its process group, a worker, a job's step."""
    rng = random.Random(17)
    # Every signal twice, every target at least twice.
    plan = zip(rng.sample(SIGNALS * 2, 10), rng.sample(TARGETS * 2 + TARGETS[:2], 10), strict=True)
    calm, run = (
        Run(tmp_path / name, make_values(2.0, workers, loop={"labels": 20}), cluster)
        for name, workers in (("calm", PROCESSES), ("struck", PARSL | {"retries": 50}))
    )
    calm.finish()
    driver, dealt = run.start(), []
    for number, target in plan:
        while not wait_for(lambda: bool(cluster.workers()) or driver.ended()) or driver.ended():  # noqa: B023
            driver = go_on(run, driver)
        time.sleep(rng.uniform(0.0, 10.0))
        if strike(run, driver, target, number, rng):
            dealt.append((number.name, target))
        if number == signal.SIGSTOP:
            time.sleep(rng.uniform(1.0, 15.0))
            wake(run, driver)
    while driver.end(900.0)[0] != 0:
        driver = go_on(run, driver)
    assert len(dealt) >= 8, dealt
    check_equal(run, calm, semaphores=False)
    assert wait_for(lambda: not cluster.left(keepers=True, semaphores=False), 180.0), cluster.left(keepers=True)


def go_on(run: Run, driver: Driver) -> Driver:
    """The next driver, after one that a blow has ended."""
    code, said = driver.end()
    assert code in ENDINGS, said  # not 0: there must be something left to hit
    assert "Traceback" not in said
    assert run.rejected() == []
    check_nothing_left(run.cluster, semaphores=False)
    return run.start()
