"""The house: which folder may import which. Data flow one way, and no arrow runs back up.

Every import counts, also those inside functions and those for type checkers; so do the names that a package loads when
they are used.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ubmd

ROOT = Path(ubmd.__file__).parent

FLOORS = (
    ("errors", "spelling", "texts", "valid_json"),
    ("faults",),
    ("files",),
    ("aliases", "attempts", "devices", "imports", "operators", "process"),
    ("settings",),
    ("data",),
    ("selection",),
    ("uncertainty",),
    ("potentials.interface", "potentials.record", "potentials.history"),
    ("potentials.file", "potentials.evaluation", "potentials.deployed", "potentials.baseline"),
    ("potentials.summed",),
    ("potentials.evaluator", "potentials.learner", "potentials.fitting", "potentials.members"),
    ("potentials.starting", "potentials.raw"),
    ("potentials.wrapping",),
    ("potentials.gmnn", "potentials.force_constants", "potentials.given", "potentials.mace"),
    ("potentials.kinds",),
    ("potentials.network_learner",),
    ("calculator",),
    ("measure",),
    ("lammps",),
    ("references",),
    ("runs",),
    ("analysis",),
    ("learning.work",),
    (
        "learning.labels",
        "learning.dataset",
        "learning.start",
        "learning.given",
        "learning.reference",
        "learning.proposal",
    ),
    ("learning.held_out",),
    ("learning.walk",),
    ("learning.loop", "learning.dynamic"),
    ("cli",),
    ("api",),
)
"""From the lowest to the highest; rooms of one floor do not know each other."""

KNOWN: frozenset[tuple[str, str]] = frozenset()
"""Arrows that run back up, (from, to). This list may only shrink."""


def modules() -> dict[str, Path]:
    """All modules by their names without 'ubmd.'; the package itself is ''."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def names_in(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, now or later."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS":
            yield from ast.literal_eval(node.value).values()


def arrows() -> dict[str, set[str]]:
    """Module -> modules of ubmd that it imports. `from ubmd import __version__` loads nothing else and is left out."""
    known = modules()

    def module_of(name: str) -> str:
        name = name.removeprefix("ubmd").removeprefix(".")
        while name not in known:
            name = name.rpartition(".")[0]
        return name

    return {
        name: {module_of(target) for target in names_in(path) if target.split(".")[0] == "ubmd"} - {"", name}
        for name, path in known.items()
    }


def room(module: str) -> str:
    """The room of `FLOORS` that a module is in."""
    rooms = [name for floor in FLOORS for name in floor if module == name or module.startswith(name + ".")]
    assert len(rooms) == 1, f"ubmd.{module} has no place in FLOORS: say which floor it belongs to"
    return rooms[0]


def test_no_arrow_runs_back_up() -> None:
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    doors = {"", *(".".join(name.split(".")[:k]) for name in height for k in range(1, name.count(".") + 1))}
    found = {
        (source, target)
        for source, targets in arrows().items()
        if source not in doors  # a package's own names come from its rooms
        for target in targets - doors
        if room(source) != room(target) and height[room(target)] >= height[room(source)]
    }
    assert found - KNOWN == set(), "these import what is above them, or beside them"
    assert KNOWN - found == set(), "these are mended: take them off the list"
    for door in doors - {""}:  # what a package offers is its own, or from below
        top = max(height[name] for name in height if name.startswith(door + "."))
        assert all(height[room(target)] <= top for target in arrows()[door]), f"ubmd.{door} offers what is above it"


def test_no_circle() -> None:
    graph, seen = arrows(), dict[str, int]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in seen:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            seen[module] = len(path)

    for module in graph:
        visit(module, ())


def test_every_room_is_there() -> None:
    assert {name for floor in FLOORS for name in floor} <= {
        ".".join(module.split(".")[:k]) for module in modules() for k in (1, 2)
    }


@pytest.mark.parametrize(
    ("library", "rooms"), [("rich", {"cli"}), ("typer", {"cli"}), ("matplotlib", {"analysis", "potentials.history"})]
)
def test_drawing_stays_where_people_look(library: str, rooms: set[str]) -> None:
    users = {
        room(module)
        for module, path in modules().items()
        if any(name.split(".")[0] == library for name in names_in(path))
    }
    assert users == rooms


def test_library_calls_leave_their_process_as_it_is() -> None:
    """The command, and workers of ours, may tell theirs how to keep memory, and how many threads there are."""
    setters = ("keep_freed_memory(", "set_num_threads(", "mallopt", "signal.signal(", "os.chdir(")
    users = {module for module, path in modules().items() if any(text in path.read_text("utf-8") for text in setters)}
    programs = "cli.main", "cli.entry", "potentials.mace.inside"  # the last in another Python
    assert users == {"process", *programs, *(f"learning.work.{n}" for n in ("tasks", "inside", "keeper"))}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ubmd", ("torch", "ase", "numpy", "pydantic")),
        ("from ubmd import load_settings", ("torch", "ase", "numpy")),
        ("from ubmd.learning import RunFolder, Workers, check, run", ("matplotlib", "rich", "typer")),
        ("import ubmd.learning.dynamic.engine", ("matplotlib", "rich", "typer")),
        ("import ubmd.learning.work.tasks, ubmd.references", ("torch", "matplotlib", "rich", "typer")),
        ("import ubmd.cli.train, ubmd.cli.run, ubmd.cli.crystal", ("torch", "ase", "numpy", "matplotlib")),
    ],
)
def test_light_imports(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print(*(name for name in {absent!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_public_names_stay_where_they_are() -> None:
    from ubmd.learning import check, run

    assert callable(ubmd.Calculator)
    assert callable(ubmd.load_settings)
    assert callable(run)
    assert callable(check)
