"""Make the golden files: runs that were killed in every stage, and model files with what they say.

python tests/golden/make.py --folder SCRATCH [--only loop force_constants ...]

Starts ``ubmd run`` in a process of its own, watches its folder from outside, stops driver and workers in the wanted
stage (SIGSTOP), checks that they are there, and kills them (SIGKILL). Then the folder is kept, and the same command is
run again up to the next stage. Run it with the version of ubmd that the files shall come from; see README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
UBMD = [sys.executable, "-c", "from ubmd.cli.entry import main; main()"]
TRIES = 40
LIMIT = 240.0  # s that a run may take to come to a stage
Event = dict[str, Any]


class View:
    """What an onlooker sees of a run folder."""

    def __init__(self, folder: Path, unit: str) -> None:
        """``unit``: what a turn is called in events, 'iteration' or 'round'."""
        self.folder = folder
        self.unit = unit
        self._size, self._events = -1, []

    def events(self) -> list[Event]:
        """Whole lines of events.jsonl."""
        path = self.folder / "events.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size != self._size:
            lines = path.read_text().splitlines(keepends=True) if size else []
            self._events = [json.loads(line) for line in lines if line.endswith("\n") and line.startswith("{")]
            self._size = size
        return self._events

    def stage(self, name: str, number: int | None) -> bool:
        """Whether this stage has begun since the run was started or resumed, and has not ended; some are nested."""
        mine = [e for e in self.events() if e["event"] == "run_started" or self._is_of(e, name, number)]
        return bool(mine) and mine[-1]["event"] == "stage_started"

    def _is_of(self, event: Event, name: str, number: int | None) -> bool:
        stages = ("stage_started", "stage_done")
        return event["event"] in stages and event["stage"] == name and event.get(self.unit) == number

    def has(self, event: str, number: int, count: int = 1) -> bool:
        """Whether exactly so many events of this kind have come for a turn."""
        return sum(e["event"] == event and e.get(self.unit) == number for e in self.events()) == count

    def count(self, pattern: str) -> int:
        """Files or folders of this name."""
        return sum(1 for _ in self.folder.glob(pattern))

    def turn(self, number: int) -> str:
        """Folder of a turn, relative to the run's."""
        return f"iterations/iter_{number:03d}" if self.unit == "iteration" else f"rounds/round_{number:04d}"

    def history(self) -> int:
        """Number of entries in history.json."""
        path = self.folder / "history.json"
        return len(json.loads(path.read_text())) if path.exists() else 0


@dataclass(frozen=True)
class Stop:
    """Where a run is killed."""

    name: str
    """of the kept folder"""
    when: Callable[[View], bool]
    seconds: float = 0.0
    """that each call of the reference takes longer, so that there is time to look"""
    processes: int = 2


# ------------------------------------------------------------------------------------------ conditions


def labelling(number: int, view: View) -> bool:
    """One label of a turn is there, others are not."""
    folder = "start" if number < 0 else f"{view.turn(number)}/labels"
    labels, wanted = view.count(f"{folder}/.label_*.seal"), view.count(f"{folder}/candidate_*.extxyz")
    return 1 <= labels < wanted and view.stage("label", number)


def appending(number: int, count: int, view: View) -> bool:
    """The data set has some labels of a turn, not all."""
    return view.has("label_appended", number, count)


def within(stage: str, number: int | None, view: View) -> bool:
    """A stage has begun that leaves nothing before its end."""
    return view.stage(stage, number)


def training(number: int, view: View) -> bool:
    """There is a checkpoint, and training goes on."""
    folder = f"{view.turn(number)}/train" if view.unit == "iteration" else f"{view.turn(number)}"
    stage = "train" if view.unit == "iteration" else "learn"
    return view.stage(stage, number) and bool(
        view.count(f"{folder}/**/checkpoint.pt") and not view.count(f"{folder}/weights.pt")
    )


def testing(view: View) -> bool:
    """One trajectory of the test set is there, another one is not."""
    return view.stage("test_set", None) and view.count("test/.trajectory_*.seal") == 1


def moving(number: int, view: View) -> bool:
    """One replica, or piece of a trajectory, has ended, another one is on its way."""
    stage, note, result = ("md", "replica", "frames") if view.unit == "iteration" else ("move", "piece", "piece")
    folder = view.folder / view.turn(number)
    ended = {path.stem.split("_")[1] for path in folder.glob(f"{note}_*.json")}
    begun = {path.name.split(".")[0].split("_")[1] for path in folder.glob(f"{result}_*.attempt")}
    return view.stage(stage, number) and bool(ended) and bool(begun - ended)


def recording(number: int, labels: int, view: View) -> bool:
    """The data set has so many labels, with those of a turn, and the turn's entry in the history is missing."""
    last = "label" if view.unit == "iteration" else "judge"
    done = any((e["event"], e.get("stage"), e.get(view.unit)) == ("stage_done", last, number) for e in view.events())
    frames = (view.folder / "dataset.extxyz").read_text().count("Properties=")
    return done and frames == labels and view.history() == number


def ending(view: View) -> bool:
    """The report has some of its files."""
    return view.count("report/*") > 0 and not view.count("report/report.html")


LOOP = [
    Stop("start_label", partial(labelling, -1), seconds=0.3, processes=1),
    Stop("start_append", partial(appending, -1, 2)),
    Stop("train", partial(training, 0), seconds=0.3),
    Stop("export", partial(within, "export", 0), seconds=0.3),
    Stop("test_set", testing, seconds=0.3),
    Stop("measure", partial(within, "measure", 0)),
    Stop("md", partial(moving, 0)),
    Stop("select", partial(within, "select", 0)),
    Stop("label", partial(labelling, 0), seconds=0.5, processes=1),
    Stop("append", partial(appending, 0, 1)),
    Stop("record", partial(recording, 0, 6)),
    Stop("train_warm", partial(training, 1)),
    Stop("label_late", partial(labelling, 1), seconds=0.5, processes=1),
    Stop("report", ending),
]

FORCE_CONSTANTS = [
    Stop("start_label", partial(labelling, -1), seconds=0.3, processes=1),
    Stop("start_append", partial(appending, -1, 1)),
    Stop("learn", partial(within, "learn", 0), seconds=0.3),
    Stop("test_set", testing, seconds=0.3),
    Stop("measure", partial(within, "measure", 0)),
    Stop("move", partial(moving, 0), processes=1),
    Stop("signals", partial(within, "signals", 0)),
    Stop("label", partial(labelling, 0), seconds=0.5, processes=1),
    Stop("append", partial(appending, 0, 1)),
    Stop("judge", partial(within, "judge", 0)),
    Stop("record", partial(recording, 0, 4)),
    Stop("learn_late", partial(within, "learn", 1)),
    Stop("report", ending),
]
NETWORK = [
    Stop("learn", partial(training, 0)),
    Stop("move", partial(moving, 0), processes=1),
    Stop("label", partial(labelling, 0), seconds=0.5, processes=1),
    Stop("judge", partial(within, "judge", 0)),
    Stop("learn_late", partial(training, 1)),
]


# ------------------------------------------------------------------------------------------ runs


def write_loop(folder: Path) -> None:
    """A loop of three iterations on a Cu/Au cluster."""
    from ase import Atoms
    from ase.cluster import Octahedron
    from ase.io import write

    atoms = Octahedron("Cu", 3, cutoff=1)
    write(folder / "start.extxyz", Atoms(["Au", "Au", *atoms.get_chemical_symbols()[2:]], atoms.positions))
    (folder / "settings.toml").write_text(LOOP_SETTINGS)


LOOP_SETTINGS = """run_dir = "run"
seed = 7
start = {file = "start.extxyz", count = 4, displacement = 0.1}
reference = {calculator = "counted:Counted", timeout = 60.0}
model = {hidden = [16, 16], n_radial = 2}
training = {epochs = 12, checkpoint_every = 3, threads = 1}
uncertainty = {projections = 16}
md = {replicas = 3, steps = 320, timestep = 0.25, frames_every = 80}
bias = {force = 0.5, species = {Au = 0.0}, window = 4, every = 2}
selection = {batch = 2}
loop = {labels = 8, threshold = 1000.0, warm_epochs = 6}
test.sampling = {temperature = 600.0, frames = 3, stride = 3, equilibration = 3}
workers = {processes = 2}
"""


def write_crystal(settings: str, folder: Path) -> None:
    """Copper: the cubic cell of four atoms."""
    from ase.build import bulk
    from ase.io import write

    write(folder / "copper.extxyz", bulk("Cu", a=3.61, cubic=True))
    (folder / "settings.toml").write_text(settings)


FORCE_CONSTANT_SETTINGS = """run_dir = "run"
seed = 5
crystal = {structure = "copper.extxyz", cutoffs = {2 = 3.7, 3 = 2.6}}
start = {count = 2, repeat = [2, 1, 1]}
reference = {calculator = "counted:Counted", noise = 0.01, timeout = 60.0}
test.sampling = {temperature = 600.0, frames = 3, stride = 3, equilibration = 3, trajectories = 2}
workers = {processes = 2}

[dynamic]
temperatures = [300.0, 900.0]
steps = 180
timestep = 2.0
check_every = 2
segment = 60
labels = 7
frames = 4
trigger = {maximum = 0.02, factor = 1.3, wait = 3, floor = 0.0}
convergence = {stop = false}
"""
NETWORK_SETTINGS = """run_dir = "run"
seed = 3
start = {file = "copper.extxyz", count = 3, displacement = 0.05}
reference = {calculator = "counted:Counted", timeout = 60.0}
model = {hidden = [16, 16], n_radial = 2}
training = {epochs = 12, checkpoint_every = 3, threads = 1}
uncertainty = {projections = 16}
workers = {processes = 2}

[dynamic]
temperatures = [300.0, 600.0]
steps = 200
segment = 40
check_every = 4
timestep = 2.0
labels = 7
warm_epochs = 6
trigger = {maximum = 2.0}
"""


@dataclass(frozen=True)
class Kind:
    """One kind of run."""

    unit: str
    write: Callable[[Path], None]
    stops: list[Stop]


KINDS = {
    "loop": Kind("iteration", write_loop, LOOP),
    "force_constants": Kind("round", partial(write_crystal, FORCE_CONSTANT_SETTINGS), FORCE_CONSTANTS),
    "network": Kind("round", partial(write_crystal, NETWORK_SETTINGS), NETWORK),
}


def make_kind(name: str, scratch: Path) -> None:
    """Run without interruption, then with all the kills; both must come to the same labels."""
    kind, base = KINDS[name], scratch / name
    base.mkdir(parents=True)
    whole = new_folder(kind, base / "uninterrupted")
    finish(whole)
    killed, states = new_folder(kind, base / "working"), base / "states"
    states.mkdir()
    for stop in kind.stops:
        reach(kind, killed, stop, base / "copy")
        shutil.copytree(killed, states / stop.name, symlinks=True)
        print(f"{name}: killed in {stop.name}", flush=True)
    finish(killed)
    for file in FINISHED[:2]:
        one, other = whole / "run" / file, killed / "run" / file
        if one.exists() and one.read_bytes() != other.read_bytes():
            raise SystemExit(f"{name}: {file} of the killed run differs from that of the uninterrupted one.")
    keep_finished(whole, states / "finished")
    pack(states, HERE / f"{name}.tar.xz")


def new_folder(kind: Kind, folder: Path) -> Path:
    """A folder with everything that a run starts from."""
    folder.mkdir()
    shutil.copy(HERE / "counted.py", folder)
    kind.write(folder)
    return folder


def finish(folder: Path) -> None:
    """Run to the end."""
    subprocess.run([*UBMD, "run", "settings.toml"], cwd=folder, env=environment(0.0), check=True, capture_output=True)


def environment(seconds: float) -> dict[str, str]:
    """One thread, and slow labels."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "COUNTED_SECONDS": str(seconds)}


def reach(kind: Kind, folder: Path, stop: Stop, copy: Path) -> None:
    """Kill the run at a stop; again from where it was if it was faster than we are."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, symlinks=True)
    for _ in range(TRIES):
        if run_until(kind, folder, stop):
            return
        print(f"{stop.name}: missed", flush=True)
        shutil.rmtree(folder)
        shutil.copytree(copy, folder, symlinks=True)
    raise SystemExit(f"The run could not be killed in {stop.name}.")


def run_until(kind: Kind, folder: Path, stop: Stop, words: Sequence[str] = ()) -> bool:
    """Start the run, kill it when it is at the stop; whether it was still there when it stood still.

    ``words``: of another command than ``ubmd run``.
    """
    words = words or ["run", "settings.toml", "--set", f"workers.processes={stop.processes}"]
    command = [*UBMD, *words]
    view = View(folder / "run", kind.unit)
    with subprocess.Popen(command, cwd=folder, env=environment(stop.seconds), stdout=subprocess.DEVNULL) as driver:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and driver.poll() is None and not looks(stop, view):
            time.sleep(0.0003)  # some stages take milliseconds
        send(driver.pid, signal.SIGSTOP)
        workers = list(descendants(driver.pid))
        for worker in workers:
            send(worker, signal.SIGSTOP)
        there = driver.poll() is None and looks(stop, view)
        for process in [driver.pid, *workers]:
            send(process, signal.SIGKILL)
        driver.wait()
    while any(is_alive(worker) for worker in workers):
        time.sleep(0.01)
    return there


def looks(stop: Stop, view: View) -> bool:
    """Whether a run is at a stop, as far as can be told: files come and go meanwhile."""
    try:
        return stop.when(view)
    except (OSError, ValueError):
        return False


def send(process: int, number: signal.Signals) -> None:
    """A signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(process, number)


def is_alive(process: int) -> bool:
    """Whether a process has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(process: int) -> Iterator[int]:
    """Children and their children; not those that only clean up after a process."""
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"keeper.py" not in command and b"resource_tracker" not in command:
                    yield child
                yield from descendants(child)


# ------------------------------------------------------------------------------------------ archives


FINISHED = ("dataset.extxyz", "test.extxyz", "history.json", "events.jsonl")


def keep_finished(whole: Path, target: Path) -> None:
    """Labels, history and events of the uninterrupted run."""
    (target / "run").mkdir(parents=True)
    for name in FINISHED:
        if (whole / "run" / name).exists():
            shutil.copy(whole / "run" / name, target / "run")


def pack(states: Path, archive: Path) -> None:
    """All states in one file, without what names the machine: notes of locks, paths in logs of LAMMPS."""
    for lock in states.rglob(".lock"):
        lock.write_text("")
    for log in [*states.rglob("*.log"), *states.rglob("log.lammps")]:
        log.write_text(re.sub(r"/\S*/(?=run/)", "", log.read_text()))
    with tarfile.open(archive, "w:xz", preset=9) as file:
        for path in sorted(states.rglob("*")):
            if "__pycache__" not in path.parts:
                file.add(path, str(path.relative_to(states)), recursive=False, filter=anonymous)
    print(f"{archive}: {archive.stat().st_size / 1e3:.0f} kB", flush=True)


def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the owner."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the runs")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    for name in options.only:
        make_kind(name, options.folder.absolute())


if __name__ == "__main__":
    main()
