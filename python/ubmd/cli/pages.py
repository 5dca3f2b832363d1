"""What `ubmd COMMAND --help` says besides what the command does: lines to copy, files, and what a rerun does."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

import typer
from typer.models import CommandInfo


class Page(NamedTuple):
    """The help of a command, besides its docstring."""

    panel: str
    """of `ubmd --help`"""
    examples: tuple[str, ...]
    """command lines; what follows '#' is for the reader, and shells ignore it"""
    writes: str
    again: str
    """what the same command does when it is run again"""


_LEARN, _MODELS, _ANALYSIS, _OTHER = "Learn a potential", "Models", "Analysis", "Installation and files"
_NOTHING = "nothing; it only prints."
_REPLACES = "replaces these files."

PAGES = {
    "init": Page(
        _LEARN,
        (
            "ubmd init my.xyz --short           # settings.toml for these structures",
            "ubmd init my.xyz my.toml           # every key, in another file",
            "ubmd init labelled.xyz train.toml --train",
        ),
        "settings.toml, or the file that you name.",
        "refuses: files are never overwritten.",
    ),
    "check": Page(
        _LEARN,
        ("ubmd check settings.toml", "ubmd check settings.toml --set md.steps=50000"),
        "nothing that stays, unless a stage fails (exit status 1).",
        "checks again.",
    ),
    "run": Page(
        _LEARN,
        (
            "ubmd run settings.toml",
            "ubmd run settings.toml --set loop.labels=128     # more labels than before",
            "ubmd run settings.toml --from 3 --set md.steps=40000",
        ),
        "run_dir of the settings (relative to the working directory): model.pt (the newest), dataset.extxyz (all "
        "labels), report/report.html, history.json, events.jsonl, one folder per iteration.",
        "resumes; finished stages are not repeated.",
    ),
    "status": Page(
        _LEARN,
        ("ubmd status runs/my", "ubmd status runs/a runs/b runs/c       # one row each"),
        "nothing; a run in progress is not disturbed. Scripts read history.json and events.jsonl in the folder "
        "(ubmd schema history, ubmd schema events).",
        "shows what is new.",
    ),
    "report": Page(
        _LEARN,
        ("ubmd report runs/my",),
        "the folder report in the run's folder: report.html, report.md, pictures.",
        _REPLACES,
    ),
    "compare": Page(
        _LEARN,
        (
            "ubmd compare runs/a runs/b",
            "ubmd compare runs/a_0 runs/a_1 runs/b_0 --name biased --name unbiased",
        ),
        "comparison.html, comparison.md, comparison.json and pictures in the folder --out.",
        _REPLACES,
    ),
    "train": Page(
        _MODELS,
        (
            "ubmd init labelled.xyz train.toml --train && ubmd train train.toml",
            "ubmd train train.toml --set training.epochs=2000 --label energy=my_key:Ha",
        ),
        "output_dir of the settings (relative to the working directory): model.pt, the training's checkpoint, log and "
        "pictures.",
        "resumes; --fresh starts from scratch.",
    ),
    "eval": Page(
        _MODELS,
        (
            "ubmd eval model.pt test.xyz",
            "ubmd eval model.pt test.xyz --by config_type --out evaluation",
            "ubmd eval model.pt a.xyz b.xyz --json > errors.json",
        ),
        "in the folder --out, if it is given: errors.json, predictions.extxyz, worst.extxyz, pictures (parity.png, "
        "calibration.png, uncertainties.png).",
        _REPLACES,
    ),
    "export": Page(
        _MODELS,
        ("ubmd export weights.pt train.xyz valid.xyz --set alpha=0.5 --out new.pt",),
        "the model file --out.",
        "replaces it.",
    ),
    "wrap": Page(
        _MODELS,
        (
            "ubmd wrap module.pt labelled.xyz --set alpha=0.1     # TorchScript",
            "ubmd wrap module.pt train.xyz --held-out valid.xyz --out new.pt",
            "ubmd wrap my.model labelled.xyz --python mace-env/bin/python    # MACE",
        ),
        "the model file --out. What the module must do is in 'Your own model' of python/USAGE.md.",
        "replaces it.",
    ),
    "phonons": Page(
        _MODELS,
        (
            "ubmd phonons model.pt crystal.cif --relax cell            # a network",
            "ubmd phonons model.pt crystal.cif --supercell 5,5,5 --path GXWKGL",
            "ubmd phonons runs/silicon --conductivity --temperature 600      # K",
        ),
        "in the folder --out: phonons.png (dispersion, density of states), phonons.npz (the same, THz), elastic.txt "
        "(GPa). Of a network also phonopy.yaml, to continue with phonopy, and with --relax relaxed.extxyz. With "
        "--conductivity conductivity.txt, and phono3py.yaml, fc2.hdf5, fc3.hdf5, to continue with phono3py.",
        _REPLACES,
    ),
    "eos": Page(
        _MODELS,
        ("ubmd eos model.pt crystal.cif", "ubmd eos runs/my crystal.cif --span 0.03 --points 11 --out eos_of_my"),
        "in the folder --out: eos.png, eos.txt (volumes, energies, uncertainties), relaxed.extxyz.",
        _REPLACES,
    ),
    "table": Page(
        _ANALYSIS,
        (
            "ubmd table runs/a_seed0 runs/a_seed1",
            "ubmd table runs/a runs/b --name biased --name unbiased --out rows.md",
        ),
        "the file --out, if it is given.",
        "replaces it.",
    ),
    "trajectory": Page(
        _ANALYSIS,
        (
            "ubmd trajectory md.lammpstrj --spacing 5       # fs between frames",
            "ubmd trajectory md.xyz --spacing 2 --torsion a=4,6,8,14 --torsion b=6,8,14,9",
        ),
        "pictures in the folder --out.",
        _REPLACES,
    ),
    "calibration": Page(
        _ANALYSIS,
        (
            "ubmd calibration labelled.xyz",
            "ubmd calibration my.xyz --training 200 --calibrating 40 --kind posterior",
        ),
        "calibration.html, calibration.md, pictures and one folder per split in the folder --out.",
        "resumes an interrupted study.",
    ),
    "info": Page(
        _OTHER,
        ("ubmd info model.pt", "ubmd info runs/my --json > record.json"),
        _NOTHING,
        "prints the same.",
    ),
    "schema": Page(
        _OTHER,
        ("ubmd schema > run.schema.json      # for editors: completes, checks", "ubmd schema train"),
        _NOTHING,
        "prints the same.",
    ),
    "doctor": Page(_OTHER, ("ubmd doctor",), "nothing. Exit status 1 if a check fails.", "checks again."),
}


def add_pages(app: typer.Typer) -> None:
    """Complete the help of each command, and put them in the order of the pages."""
    app.registered_commands.sort(key=lambda command: list(PAGES).index(_name(command)))
    for command in app.registered_commands:
        function = command.callback
        page = PAGES[_name(command)]
        command.rich_help_panel = page.panel
        command.help = "\n\n".join(
            [
                reflowed(inspect.getdoc(function) or ""),
                "\n".join(["Examples:", *(f"  {line}" for line in page.examples)]),
                f"Writes {page.writes}",
                f"Rerun: {page.again}",
            ]
        )


def _name(command: CommandInfo) -> str:
    assert command.callback is not None
    return command.name or command.callback.__name__


def reflowed(text: str) -> str:
    """Paragraphs as one line each: the terminal breaks them where it ends. Indented lines stay."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)
