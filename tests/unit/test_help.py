"""What `ubmd COMMAND --help` teaches: lines that work as they are, units, files, and names that were misspelt."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from ubmd.cli.main import app
from ubmd.cli.pages import PAGES, reflowed
from ubmd.settings import RunSettings, TrainSettings, UncertaintySettings

GROUP = typer.main.get_command(app)
COMMANDS = {name: command for name, command in GROUP.commands.items() if not command.hidden}  # type: ignore[attr-defined]
CALLBACKS = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}
UNITS = re.compile(r"\b(fs|ps|eV|GPa|MPa|K|THz|no unit)\b|Å")
LONGEST = 76  # characters that a terminal of 80 columns shows in one line


def shown(*words: str, columns: int = 80) -> str:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    return result.output


def command_lines(example: str) -> Iterator[list[str]]:
    """The words of each command of a line, without what the shell keeps for itself."""
    for part in example.partition("#")[0].split("&&"):
        words = shlex.split(part.partition(">")[0])
        assert words[0] == "ubmd"
        yield words[1:]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_command_line(name: str) -> None:
    page = PAGES[name]
    text = shown(name, "--help")
    for example in page.examples:
        assert len(example) <= LONGEST
        assert f"   {example}" in text  # in one line, to be copied
        for first, *rest in command_lines(example):
            COMMANDS[first].make_context(first, list(rest)).close()
    assert any(first == name for example in page.examples for first, *_ in command_lines(example))


def test_a_wrong_example_would_be_found() -> None:
    wrong = (["run", "settings.toml", "--form", "3"], ["eos", "model.pt"], ["phonons", "model.pt", "--relax", "all"])
    for name, *words in wrong:
        with pytest.raises(Exception, match=r"No such option|Missing|is not one of") as error:
            COMMANDS[name].make_context(name, list(words))
        assert error.value.exit_code == 2
        assert CliRunner().invoke(app, [name, *words]).exit_code == 2


def test_settings_of_examples_exist() -> None:
    found = []
    for page in PAGES.values():
        for example in page.examples:
            for key in re.findall(r"--set ([\w.]+)=", example):
                table, _, name = key.rpartition(".")
                models = [UncertaintySettings] if not table else [
                    model.model_fields[table].annotation for model in (RunSettings, TrainSettings)
                    if table in model.model_fields
                ]  # fmt: skip
                assert any(name in model.model_fields for model in models), key
                found.append(key)
    assert len(found) >= 4


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described_and_quantities_have_units(name: str) -> None:
    function = CALLBACKS[name]
    for option in inspect.signature(function, eval_str=True).parameters.values():
        (note,) = option.annotation.__metadata__
        assert note.help, (name, option.name)
        if "float" in str(option.annotation.__origin__):
            assert UNITS.search(note.help), (name, option.name, note.help)


@pytest.mark.parametrize("name", COMMANDS)
def test_files_and_reruns_are_said(name: str) -> None:
    text = " ".join(shown(name, "--help").split())
    assert f"Writes {PAGES[name].writes}" in text
    assert f"Rerun: {PAGES[name].again}" in text
    out = next((o for o in COMMANDS[name].params if o.name in ("out", "output")), None)
    if out is not None and out.opts[0].startswith("--"):
        assert out.opts[0] in PAGES[name].writes


def test_paragraphs_are_broken_by_the_terminal() -> None:
    assert reflowed("one\ntwo\n\nthree\n  four\n  five\n") == "one two\n\nthree\n  four\n  five\n"
    longest = [
        max(len(line.rstrip()) for line in shown("run", "--help", columns=width).splitlines()) for width in (80, 110)
    ]
    assert longest == [80, 110]


def test_the_first_page_fits_a_terminal() -> None:
    text = shown("--help")
    for line in ("ubmd init my.xyz", "ubmd check settings.toml", "ubmd run settings.toml", "ubmd status RUN_DIR"):
        (found,) = (row for row in text.splitlines() if line in row)
        assert len(found.split()) > 5  # with its explanation
    first = shown("--help").partition("A first run:")[2].split("The result is")[0]
    assert all(line.startswith("   ubmd ") for line in first.splitlines() if line.strip())  # none is broken
    assert "Exit status" in text
    places = [text.index(f"│ {name} ") for name in PAGES]
    assert places == sorted(places)


def test_help_of_a_command_in_three_ways() -> None:
    assert shown("help", "run") == shown("run", "--help") == shown("run", "-h")
    assert "First run" in shown("help").replace("A first run", "First run")
    result = CliRunner().invoke(app, ["help", "stauts"])
    assert result.exit_code == 2
    assert "Did you mean 'status'?" in result.output
    result = CliRunner().invoke(app, ["eval", "model.pt", "data.xyz", "--lable", "energy=e"])
    assert result.exit_code == 2
    assert "--label" in result.output
