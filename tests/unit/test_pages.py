"""The pages (*.md): links lead somewhere; commands, options, settings and files that they name exist."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from ubmd.cli.main import app
from ubmd.settings import RunSettings, TrainSettings
from ubmd.settings.dynamic import DynamicRunSettings

ROOT = Path(__file__).parents[2]
FOLDERS = (".github", "cpp", "lammps_examples", "python", "tests")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")) if "_run" not in str(page.parent)),
]
OUTPUT = {"timing"}
"""second words of lines that ubmd prints, not of commands"""


def blocks(text: str, language: str = "") -> list[str]:
    """Fenced blocks, of one language or of any."""
    return re.findall(rf"^```{language or '.*'}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Code within lines."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after 'ubmd' of every command that a page names."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(text)]:
        for words in re.findall(r"(?:^|&& |do )ubmd ([a-z]+\b[^#&;]*)", line):
            if words.split()[0] not in OUTPUT:
                yield words.split()


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@cache
def settings_keys() -> dict[str, set[str]]:
    """Keys of every table of the settings files."""
    found: dict[str, set[str]] = {}
    for model in (RunSettings, DynamicRunSettings, TrainSettings):
        schema: dict[str, Any] = model.model_json_schema()
        for name, field in schema["properties"].items():
            for table in re.findall(r"'#/\$defs/(\w+)'", str(field)):
                found.setdefault(name, set()).update(schema["$defs"][table].get("properties", {}))
    return found


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_commands_and_their_options_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in command_lines(page.read_text()):
        assert words[0] in commands, words
        known = {name for option in commands[words[0]].params for name in (*option.opts, *option.secondary_opts)}
        options = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
        assert options <= known | {"--help"}, words


def test_settings_exist(page: Path) -> None:
    text = page.read_text()
    pattern = r"(?:^|--set ['\"]?)([a-z]+)\.(?!toml|pt|tar|md)([a-z_0-9]+)(?=[ =.]|$)"  # no names of files
    named = [found for code in [*spans(text), *blocks(text)] for found in re.findall(pattern, code)]
    for block in blocks(text, "toml"):
        named += [(table, key) for table, keys in tomllib.loads(block).items() for key in keys]
    wrong = [f"{table}.{key}" for table, key in named if key not in settings_keys().get(table, {key})]
    assert not wrong


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_files_that_the_architecture_names_exist() -> None:
    codes = spans((ROOT / "python/README.md").read_text())
    names = [code for code in codes if re.fullmatch(r"[a-z_]+/[a-z_/]+\.(py|h|cpp)", code)]
    assert len(names) > 20
    for name in names:
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "python/ubmd", ROOT / "cpp/lammps")), name
