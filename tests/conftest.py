"""One thread per process: tests run many small models side by side, and repeat bit for bit. Also the tiers of tests.

What tests share is in `helpers`, and is imported from there by the name of its file, also by worker processes, which
inherit the path. Two more folders are in the path: `golden`, whose modules lie beside the scripts that made the golden
runs, and `slurm`, whose cluster is started by the path of its file.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / folder) for folder in ("helpers", "golden", "slurm")]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Background jobs of a script ignore Ctrl-C, and those of nohup SIGHUP. A program inherits what is ignored, but not a
# handler: pytest goes on as it should, and what tests start can be interrupted.
for name in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(name) is signal.SIG_IGN:
        signal.signal(name, lambda *_: None)

TIERS = {"lammps": "lammps", "learning": "loop", "slurm": "loop"}  # folder: marker of its tests that are not quick


def pytest_configure(config: pytest.Config) -> None:
    """Tests that are named by a path run in every tier but `slow`, unless -m says otherwise."""
    options = config.getini("addopts")
    named = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    if config.option.markexpr == options[options.index("-m") + 1] and any(HERE in path.parents for path in named):
        config.option.markexpr = "not slow"


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests the marker of their folder, unless they are marked as quick; put the longest files first.

    With pytest-xdist a long file that comes last would leave the other cores without work.
    """
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in TIERS and not item.get_closest_marker("quick"):
            item.add_marker(TIERS[folder])
    longest = ("test_quickstart.py", "test_soak.py")
    rank = {name: number for number, name in enumerate((*longest, "slow", "learning", "slurm", "lammps", "unit"))}
    items.sort(key=lambda item: min(rank.get(part, len(rank)) for part in item.path.relative_to(HERE).parts))
