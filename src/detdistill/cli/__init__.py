"""The command line: `detdistill --help`.

Nothing here imports torch before a command needs it, so that help answers at once.
"""

from __future__ import annotations

import io
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from detdistill.cli import analysis, datasets, doctor, export, studies, training, using, weights
from detdistill.errors import UserError, UserNotice, is_first_here, tells
from detdistill.writing import disk_faults_told

# click's `UsageError`, of which typer may carry a copy of its own under a private name.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """Turns bad input into one sentence, Ctrl+C and SIGTERM into a way to go on."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Reads what stands before the command; exit code 2 for bad input."""
        with _plain_usage():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; exit code 2 for bad input, 130 when interrupted."""
        try:
            with _plain_usage(ctx), warnings.catch_warnings(), disk_faults_told():
                _plain_notices()
                return super().invoke(ctx)
        except UserError as error:
            if tells(error):
                typer.echo(f"detdistill: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            if is_first_here():
                typer.echo(f"\ndetdistill: {_how_to_continue(ctx.obj or [])}", err=True)
            raise typer.Exit(130) from None


@contextmanager
def _plain_usage(ctx: Any = None) -> Iterator[None]:
    """Tells of a wrong option or command in one sentence, not in a block of three lines.

    `ctx` is that of the program, when the command is known.
    """
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # it shows the help
            raise
        if is_first_here():
            typer.echo(f"detdistill: {_usage_sentence(error, ctx)}", err=True)
        raise typer.Exit(2) from None


def _usage_sentence(error: Any, ctx: Any) -> str:
    told = " ".join(error.format_message().split()).rstrip(".?").replace("Value error, ", "")
    told = re.sub(r"[.]? (Did|Choose) ", lambda match: f"; {match[1].lower()} ", told)
    command = ["detdistill"]
    if error.ctx is not None:
        command = [error.ctx.command_path]
    elif ctx is not None and ctx.invoked_subcommand:
        command.append(ctx.invoked_subcommand)
    return f"{told[0].lower()}{told[1:]}; see {' '.join(command)} --help"


def _plain_notices() -> None:
    """Notices as plain sentences on stderr, each once; other warnings as Python shows them."""
    show, told = warnings.showwarning, set[str]()

    def tell(message: Any, category: Any, *place: Any) -> None:
        if not issubclass(category, UserNotice):
            show(message, category, *place)
        elif is_first_here() and str(message) not in told:
            told.add(str(message))
            typer.echo(f"detdistill: {message}", err=True)

    warnings.simplefilter("always", UserNotice)
    warnings.showwarning = tell  # type: ignore[assignment]


def _how_to_continue(arguments: list[str]) -> str:
    """What to tell a user who stopped the command with these arguments."""
    command = shlex.join(["detdistill", *arguments])
    if arguments[:1] in (["train"], ["distill"]):
        again = command if "--resume" in arguments else f"{command} --resume"
        return f"stopped; this goes on from the last checkpoint: {again}"
    if arguments[:1] in (["compare"], ["demo"]):
        return f"stopped; the same command goes on where it was: {command}"
    return "stopped"


def _group(text: str | None = None) -> typer.Typer:
    # Plain help: importing rich would double the time that --help takes.
    return typer.Typer(
        help=text, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )


app = typer.Typer(
    help="Distil object detectors and measure what it gained.",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(studies.demo)
app.command("doctor")(doctor.doctor)
app.command("train")(training.train)
app.command("distill")(training.distill)
app.command("compare")(studies.compare)
app.command("eval")(using.evaluate)
app.command("predict")(using.predict)
app.command("export")(export.export)
app.command("analyze")(analysis.analyze)
app.command("list")(using.list_names)
app.command("fetch")(weights.fetch)
app.command("convert")(weights.convert)
_recipes = _group("Work with the bundled recipes.")
_recipes.command("copy")(using.copy_recipe)
_recipes.callback()(lambda: None)  # keeps `copy` a command of its own although it is the only one
app.add_typer(_recipes, name="recipe")
_data = _group("Make, convert and split data sets.")
_data.command("builtin")(datasets.builtin_data)
_data.command("convert")(datasets.convert_data)
_data.command("split")(datasets.split_data)
app.add_typer(_data, name="data")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits; `argv` without the program's name."""
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # tables hold ± and Δ
    with _termination_as_interruption():
        app(args=arguments, prog_name="detdistill", obj=arguments)


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """SIGTERM, by which batch systems and `kill` stop a program, says how to go on like Ctrl+C.

    Unless someone has decided what it does; other threads than the first may not.
    """
    first = threading.current_thread() is threading.main_thread()
    if not first or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
