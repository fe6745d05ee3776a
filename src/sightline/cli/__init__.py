"""The command line. One file a sub-command, imported when it is called; torch is imported only to do work."""

import os
import sys
from importlib import import_module
from typing import Any

import click

from sightline.memory import keep_freed

COMMANDS = ("list", "explain", "gallery", "evaluate", "train", "segment", "study", "report", "windows")

DEBUG = "SIGHTLINE_DEBUG"
"""Set this environment variable to see the traceback behind a message."""

STOPPED = 130


class Lazy(click.Group):
    """Commands by name, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"sightline.cli._{cmd_name}").command
        return command


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sightline")
def cli() -> None:
    """Show where an image classifier looks, and measure whether the picture is true."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: what the user got wrong is one sentence and exit code 2, Ctrl-C is exit code 130."""
    keep_freed()
    try:
        cli(args=arguments, prog_name="sightline", standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        click.echo(f"sightline: {usage(error)}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("stopped; what was finished is kept, and the same command goes on from there", err=True)
        sys.exit(STOPPED)
    except (LookupError, TypeError, ValueError, OSError, ArithmeticError, ImportError) as error:
        if os.environ.get(DEBUG):
            raise
        click.echo(f"sightline: {told(error)}", err=True)
        sys.exit(2)


def usage(error: click.ClickException) -> str:
    """Return what is wrong with the arguments, and where to read more, on one line."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context is not None else "sightline"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; see `{path} --help`"


def told(error: BaseException) -> str:
    """Return an error's sentence, on one line."""
    text: Any = error.args[0] if isinstance(error, KeyError) and error.args else error
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        text = f"no file {error.filename}"
    return " ".join(str(text).split()) or type(error).__name__
