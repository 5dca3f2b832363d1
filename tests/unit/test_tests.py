"""Where tests keep what they share: in tests/helpers, in conftest.py if it is a fixture, never in another test."""

import ast
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))
# Scripts that are started by their path, and what they import from beside them.
PROGRAMS = ("golden", "benchmarks")
CLUSTER = Path("slurm", "one_machine.py")  # .ci/run starts it


def imported(path: Path) -> set[str]:
    """Names of the modules that a file of the tests imports, now or later."""
    found = set()
    for node in ast.walk(ast.parse((TESTS / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def fixtures(path: Path) -> set[str]:
    """Names of the fixtures that a file defines."""
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any("pytest.fixture" in ast.unparse(d) for d in f.decorator_list)}


def test_no_test_imports_another_test() -> None:
    tests = {path.stem for path in FILES if path.name.startswith("test_")} | {"conftest"}
    guilty = {str(path): {name for name in imported(path) if set(name.split(".")) & tests} for path in FILES}
    assert {path: names for path, names in guilty.items() if names} == {}


def test_helpers_are_in_their_folder() -> None:
    others = [p for p in FILES if p.parts[0] not in ("helpers", *PROGRAMS) and p != CLUSTER]
    assert [str(p) for p in others if not p.name.startswith("test_") and p.name != "conftest.py"] == []
    assert [str(p) for p in FILES if p.parts[0] == "helpers" and p.name.startswith("test_")] == []


def test_fixtures_of_a_folder_are_defined_once() -> None:
    shared = {path.parent: fixtures(path) for path in FILES if path.name == "conftest.py"}
    again = {str(path): fixtures(path) & shared.get(path.parent, set()) for path in FILES if path.name != "conftest.py"}
    assert {path: names for path, names in again.items() if names} == {}
    assert [str(p) for p in FILES if p.parts[0] == "helpers" and fixtures(p)] == []


def test_the_path_is_set_once() -> None:
    found = [str(path) for path in FILES if "\nsys.path" in (TESTS / path).read_text(encoding="utf-8")]
    assert found == ["conftest.py"]


def test_tests_named_by_a_path_run_in_every_tier_but_slow() -> None:
    """One file of tests that are not quick, and one of slow ones."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    files = ["tests/lammps/test_units.py", "tests/unit/test_crystal_oracles.py"]
    shown = subprocess.run([*command, *files], cwd=TESTS.parent, capture_output=True, text=True, check=True).stdout
    found = {line.partition("::")[0] for line in shown.splitlines() if "::" in line}
    assert found == {"tests/lammps/test_units.py"}, shown
