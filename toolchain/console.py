"""What every command shares: where text and JSON go, the spinner, and how errors end a command."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from runtimes import Error
from toolchain.as_json import dumps
from toolchain.errors import DataError, RecipeError
from toolchain.progress import Status, silent
from toolchain.storage import REASONS

#: Results go to standard output, everything else to standard error, so that a pipe gets results only.
#: A pipe has no width: tables are not folded to 80 columns there.
out = Console(soft_wrap=False, highlight=False, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False, soft_wrap=True)


#: The option of every command that may read a folder of images.
Preprocessing = Annotated[
    str | None,
    typer.Option(
        help="of images: a zoo name whose preprocessing is right, or a .json file",
        show_default="what the model or artifact says",
    ),
]


@contextlib.contextmanager
def status(text: str) -> Iterator[Status]:
    """A spinner with a text, and a bar while the share that is done is known. Silent where standard error is no
    terminal, gone when the block ends."""
    if not err.is_terminal:
        yield silent
        return
    bar = BarColumn(bar_width=30)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), bar, console=err, transient=True
    ) as shown:
        task = shown.add_task(text, total=None)

        def update(text: str, share: float | None = None) -> None:
            shown.update(task, description=text, total=None if share is None else 1.0, completed=share or 0.0)

        yield update


def print_json(value: Any) -> None:
    """One line of strict JSON on standard output."""
    sys.stdout.write(dumps(value) + "\n")


def parse_dims(texts: Iterable[str] | None) -> dict[str, int]:
    """Reads what ``--dim`` was given: ``NAME=SIZE`` each. Raises RecipeError."""
    sizes = {}
    for text in texts or ():
        name, _, size = text.partition("=")
        if not name or not size.isdigit():
            raise RecipeError(f"not a dimension: {text!r}", where="--dim", hint="write NAME=SIZE, such as sequence=128")
        sizes[name] = int(size)
    return sizes


def require_count(number: int | None, option: str, most: int) -> None:
    """Raises DataError unless an option that counts samples is left out, or 1 to ``most``."""
    if number is not None and not 1 <= number <= most:
        raise DataError(f"{number} is not a number of samples", where=option, hint=f"1 to {most:,}")


class Exit(Exception):
    """Ends a command with an exit code; what there was to say has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_app(app: Callable[..., Any], arguments: list[str]) -> int:
    """Runs a command line of a typer app and returns the exit code. ``--debug`` may stand anywhere in it."""
    debug = "--debug" in arguments
    rest = [argument for argument in arguments if argument != "--debug"]
    return run(lambda: _invoke(app, rest), debug=debug)


def _invoke(app: Callable[..., Any], arguments: list[str]) -> None:
    # standalone, so that wrong usage is reported in typer's own way, with exit code 2; a finished command exits with 0
    try:
        app(arguments, prog_name="toolchain")
    except SystemExit as done:
        if done.code == 130:  # typer's own way of ending after Ctrl-C, without a word
            raise KeyboardInterrupt from done
        if done.code not in (0, None):
            raise Exit(done.code if isinstance(done.code, int) else 1) from done


def run(command: Callable[[], Any], *, debug: bool) -> int:
    """Runs a command and turns what it raises into text and an exit code: 2 for our typed errors, 130 for Ctrl-C,
    1 for a defect of ours."""
    try:
        command()
    except Exit as done:
        return done.code
    except Error as error:
        if debug:
            traceback.print_exc()
        err.print(Text(f"error: {error}", style="red"))
        return 2
    except KeyboardInterrupt:
        err.print(Text("interrupted; nothing half-written was left", style="red"))
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        sys.stdout = None  # or the interpreter complains at exit
        return 0
    except OSError as error:
        if error.errno not in REASONS:
            return _defect(error, debug)
        if debug:
            traceback.print_exc()
        err.print(Text(f"error: {REASONS[error.errno or 0]}\n  at:   {error.filename or 'unknown'}", style="red"))
        return 2
    except Exception as error:  # noqa: BLE001 - the last line of defence: a user gets a sentence, not a page
        return _defect(error, debug)
    return 0


def _defect(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    err.print(
        Text(
            f"error: unexpected {type(error).__name__}: {error}\n"
            "  next: this is a defect in the toolchain; run it again with --debug and report the traceback",
            style="red",
        )
    )
    return 1
