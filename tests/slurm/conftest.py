"""A real SLURM, where it is wanted (UBMD_TEST_SLURM=1) and possible: one machine, root, Debian's packages.

``--slurm-table FILE`` writes what ran, as a table in Markdown.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import one_machine
import pytest
from slurm_runs import PROCESSES, Cluster, Run, make_values


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--slurm-table``."""
    parser.addoption("--slurm-table", metavar="FILE", help="write a table of the SLURM cases that ran")


@pytest.fixture(scope="session")
def machine() -> Iterator[Cluster]:
    """The cluster, for all tests."""
    if os.environ.get("UBMD_TEST_SLURM") != "1":
        pytest.skip("set UBMD_TEST_SLURM=1 to test with a real SLURM")
    if importlib.util.find_spec("parsl") is None:
        pytest.skip("parsl is not installed")
    if reason := one_machine.why_not():
        pytest.skip(f"no SLURM here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="ubmd_slurm_"))  # not below pytest's, which munge cannot reach
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(machine: Cluster) -> Iterator[Cluster]:
    """The cluster with an empty queue, and nothing left of earlier runs."""
    yield machine
    machine.clear()


@pytest.fixture(scope="session")
def calm(machine: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that all others must equal: undisturbed, with processes of one machine."""
    run = Run(tmp_path_factory.mktemp("calm"), make_values(0.0, PROCESSES), machine)
    run.finish()
    return run


_HEAD = "| case | outcome |"
_outcomes: dict[str, str] = {}  # of the cases that ran


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Function) -> None:
    """Tests are known by the first lines of their docstrings, and by their parameters."""
    case = (item.function.__doc__ or item.name).splitlines()[0].rstrip(".")
    parameters = f" ({item.callspec.id})" if hasattr(item, "callspec") else ""
    item.user_properties.append(("case", case + parameters))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember how a case ended."""
    case = dict(report.user_properties).get("case")
    if case and (report.failed or (report.when == "call" and report.passed)):
        _outcomes[case] = "failed" if report.failed else _outcomes.get(case, "passed")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table; rows of cases that did not run this time stay."""
    file = session.config.getoption("--slurm-table", None)
    if file is None or not _outcomes:
        return
    versions = [f"SLURM {one_machine.version()}", *(f"{name} {_version(name)}" for name in ("Parsl", "executorlib"))]
    known = Path(file).read_text().splitlines() if Path(file).exists() else []
    rows = dict(line.strip("| ").split(" | ") for line in known if line.startswith("| ") and line != _HEAD) | _outcomes
    lines = [_HEAD, "|---|---|", *(f"| {case} | {outcome} |" for case, outcome in sorted(rows.items()))]
    Path(file).write_text(f"{', '.join(versions)}; {datetime.now(UTC):%d %B %Y}:\n\n" + "\n".join(lines) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
