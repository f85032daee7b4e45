"""The edge of the command line: errors become one readable message and an exit code, here and nowhere else."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from burnish.errors import BurnishError, Interrupted

EXIT_CODES = (
    "Exit codes: 0 done; 1 the run failed; 2 the input can be corrected (config, data, model, adapter); "
    "3 the machine cannot (memory, disk, a package); 130 or 143 stopped by SIGINT or SIGTERM, state saved."
)
STOPPED_BY_KEYBOARD = 130

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def guarded(command: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Wrap a command: what it raises is told in a few lines on stderr, and its exit code follows errors.py."""

    @functools.wraps(command)
    def wrapper(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        try:
            return command(*arguments, **options)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except BurnishError as error:
            report(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            show_error("interrupted")
            raise typer.Exit(STOPPED_BY_KEYBOARD) from error
        except Exception as error:  # whatever is left is a defect: told, with its traceback kept
            show_error(defect_message(error, write_traceback(error)))
            raise typer.Exit(1) from error

    return wrapper


def report(error: BurnishError) -> None:
    """Print an error that was raised on purpose."""
    show_error(str(error), is_failure=not isinstance(error, Interrupted))


def show_error(text: str, *, is_failure: bool = True) -> None:
    """`text` on stderr, its first line red where there is colour; nothing in it is taken for markup."""
    from rich.console import Console
    from rich.text import Text

    first, _, rest = text.partition("\n")
    shown = Text(first, style="bold red" if is_failure else "bold")
    if rest:
        shown.append(f"\n{rest}", style="not bold default")
    Console(stderr=True, highlight=False, soft_wrap=True).print(shown)


def write_traceback(error: BaseException) -> str:
    """The full traceback into a file only this user can read; returns where, or why not."""
    name = f"burnish-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-"
    try:
        descriptor, path = tempfile.mkstemp(prefix=name, suffix=".log", text=True)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{' '.join(sys.argv)}\n\n")
            file.writelines(traceback.format_exception(error))
    except OSError as failure:
        return f"(no file: {failure})\n{''.join(traceback.format_exception(error))}"
    return path


def defect_message(error: BaseException, where: str) -> str:
    return (
        f"unexpected {type(error).__name__}: {error}\n"
        f"  This is a defect in Burnish or in a library it uses. The traceback is in {where}"
    )
