"""The example that distils a foundation model, in little, with CHGNet: a loop, its test sets, and the comparison."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ubmd.data.structures import read_structures

EXAMPLE = Path(__file__).resolve().parents[2] / "lammps_examples" / "distil"
SMALL = (
    *("run_dir='student'", "reference.calculator='chgnet'", "start.count=6", "selection.batch=4", "loop.labels=10"),
    *("training.epochs=60", "loop.warm_epochs=30", "md.replicas=2", "md.steps=200", "uncertainty.projections=64"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("chgnet") is None, reason="the package chgnet is not installed"),
    pytest.mark.skipif(find_spec("phonopy") is None, reason="the package phonopy is not installed"),
]


def call(*command: str, cwd: Path) -> str:
    """Standard output of Python with these words, which has to succeed."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_student_is_compared_with_its_teacher(tmp_path: Path) -> None:
    changes = [word for change in SMALL for word in ("--set", change)]
    main = "from ubmd.cli.entry import main; main()"
    call("-c", main, "run", str(EXAMPLE / "distil.toml"), *changes, cwd=tmp_path)
    report = (tmp_path / "student" / "report" / "report.md").read_text()
    assert "chgnet; chgnet " in report
    assert "model 0.3.0" in report
    call(str(EXAMPLE / "make_test_set.py"), "--reference", "chgnet", "--frames", "1", cwd=tmp_path)
    assert len(read_structures(tmp_path / "test.extxyz", labelled=True)) == 3
    assert len(read_structures(tmp_path / "outside.extxyz", labelled=True)) == 4
    out = call(str(EXAMPLE / "compare.py"), "student", "--reference", "chgnet", "--rounds", "1", cwd=tmp_path)
    assert out.strip() == (tmp_path / "compare.txt").read_text().strip()
    found = json.loads((tmp_path / "compare.json").read_text())
    cold, wurtzite = (found["errors"][name]["force_rmse_eV_per_A"] for name in ("300 K", "wurtzite"))
    assert cold < 0.3
    assert wurtzite > cold
    teacher, student = found["properties"]["chgnet"], found["properties"]["student"]
    assert 4.1 < teacher["a, Å"] < 4.4
    assert student["a, Å"] == pytest.approx(teacher["a, Å"], abs=0.1)
    assert min(found["microseconds"]["teacher"]) > 0.0
    assert (tmp_path / "compare.png").stat().st_size > 5000
