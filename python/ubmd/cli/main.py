"""The ``ubmd`` command. Commands import what they need when they run, so that ``ubmd --help`` is fast."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import ubmd
from ubmd.cli import INTERRUPTED
from ubmd.cli.pages import add_pages, reflowed
from ubmd.errors import UbmdError
from ubmd.files import why
from ubmd.process import keep_freed_memory, spin_briefly

spin_briefly()

_HELP = """Uncertainty-biased molecular dynamics: learn interatomic potentials that are accurate everywhere.

A first run:

  ubmd init my.xyz            commented settings.toml; set the reference in it
  ubmd check settings.toml    every stage once, in a minute: finds mistakes
  ubmd run settings.toml      label, train, explore, repeat; rerun to resume
  ubmd status RUN_DIR         where it stands, from any terminal
  ubmd report RUN_DIR         pictures and tables, one HTML page

The result is RUN_DIR/model.pt: run it in LAMMPS with 'pair_style ubmd', or in ASE with ubmd.Calculator.

'ubmd COMMAND --help' has lines to copy, units, defaults, and the files that are written. If anything seems wrong with
the installation, run 'ubmd doctor'.

Exit status: 0; 1 after an error, which is one sentence on stderr; 2 if the command line is wrong; 130 after Ctrl-C.
"""


class _Group(TyperGroup):
    """Errors meant for the user are printed as their message, with exit status 1 and never with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UbmdError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except BrokenPipeError:  # | head: typer exits silently
            raise
        except OSError as error:  # a full disk, a folder that vanished, a file that may not be read
            if error.filename is None and error.strerror is None:
                raise
            what = "" if error.filename is None else f"{error.filename}: "
            print(f"Error: {what}{why(error)}; fix that and rerun the same command.", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print(INTERRUPTED, file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    help=reflowed(_HELP),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ubmd {ubmd.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")] = False,
) -> None:
    """Options before the command."""
    keep_freed_memory()


def _register() -> None:
    from ubmd.cli import analyse, crystal, init, run, train, wrap

    init.register(app)
    run.register(app)
    analyse.register(app)
    train.register(app)
    wrap.register(app)
    crystal.register(app)
    add_pages(app)
    app.command("help", hidden=True)(_help)


def _help(
    context: typer.Context, command: Annotated[str | None, typer.Argument(help="Command to describe.")] = None
) -> None:
    """The same as --help of a command, or of ubmd itself."""
    parent = context.parent
    assert parent is not None
    group: Any = parent.command
    if command is None:
        print(group.get_help(parent))
        return
    name, found, _ = group.resolve_command(parent, [command])
    found.make_context(name, ["--help"], parent=parent)


_register()
