"""Tab completion, asked as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def offered(line: str) -> list[str]:
    """What is offered for the last word of a line."""
    words = line.split(" ")
    asked = {"_UBMD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-c", "from ubmd.cli.entry import main; main()"]
    code = "import sys; sys.argv[0] = 'ubmd'; " + command[2]
    shown = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False, timeout=60
    )
    assert shown.stderr == ""
    return shown.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ubmd stat", ["status"]),
        ("ubmd run settings.toml --fr", ["--from"]),
        ("ubmd run settings.toml --set md.time", ["md.timestep=", "md.timeout="]),
        ("ubmd check settings.toml --set dynamic.trigger.max", ["dynamic.trigger.maximum="]),
        (
            "ubmd train settings.toml --set training.learning_rate_s",
            [f"training.learning_rate_{k}=" for k in ("shift", "scale")],
        ),
        ("ubmd export a b c --set al", ["alpha="]),
        ("ubmd run settings.toml --set nothing.such", []),
    ],
)
def test_words_are_completed(line: str, expected: list[str]) -> None:
    assert offered(line) == expected


def test_bash_is_told_how(tmp_path: os.PathLike[str]) -> None:
    asked = {"_UBMD_COMPLETE": "source_bash"}
    code = "import sys; sys.argv[0] = 'ubmd'; from ubmd.cli.entry import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=True, timeout=60
    )
    assert "complete -o default -F" in shown.stdout
    checked = subprocess.run(["bash", "-n"], input=shown.stdout, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
