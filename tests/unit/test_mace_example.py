"""Scripts of lammps_examples/mace that count: processor time by stage, minutes until a model existed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "lammps_examples" / "mace"
RUN = """
import json, os, subprocess, sys
def say(**event):
    with open("events.jsonl", "a") as file: file.write(json.dumps(event) + "\\n")
burn = "import time\\nwhile time.process_time() < 1.0: pass\\ntime.sleep(1.2)"
say(event="run_started", process=os.getpid())
say(event="stage_started", stage="train", iteration=2)
subprocess.run([sys.executable, "-c", burn])
say(event="stage_done", stage="train", iteration=2)
say(event="run_done")
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_time_of_what_a_run_starts_is_that_of_its_stage(tmp_path: Path) -> None:
    """A stage whose work is done by a process of its own, as a training of MACE."""
    run = subprocess.Popen([sys.executable, "-c", RUN], cwd=tmp_path)
    watcher = [sys.executable, EXAMPLE / "processor_time.py", tmp_path, tmp_path / "time.json"]
    subprocess.run(watcher, check=True, timeout=120)
    assert run.wait() == 0
    times = json.loads((tmp_path / "time.json").read_text())
    assert times["train"]["2"] >= 0.9
    assert sum(times.get("other", {}).values()) < 0.9


def test_minutes_are_those_before_a_model_existed() -> None:
    times = {
        "label": {"-1": 60.0, "0": 6.0, "1": 0.6},
        "train": {"0": 120.0, "1": 12.0},
        "md": {"0": 180.0, "1": 18.0},
        "measure": {"0": 6000.0},
        "export": {"0": 30.0},
    }
    minutes = load("compare").minutes
    assert minutes(times, 0) == pytest.approx({"train": 2.0, "md": 0.0, "rest": 1.5})
    assert minutes(times, 1) == pytest.approx({"train": 2.2, "md": 3.0, "rest": 1.6})
