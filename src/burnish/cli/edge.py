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

from burnish.errors import BurnishError, Interrupted, OutOfMemory

EXIT_CODES = (
    "Exit codes: 0 done; 1 the run failed; 2 the input can be corrected (config, data, model, adapter); "
    "3 the machine cannot (memory, disk, a package); 130 or 143 stopped by SIGINT or SIGTERM, state saved."
)
STOPPED_BY_KEYBOARD = 130
LESS_MEMORY = (
    "Close what else uses this memory, or ask for less: to train, memory.activations: recompute, train.batch_size: 1, "
    "a smaller number in data.resolutions; to draw, --batch-size 1 and a smaller --size."
)

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
        except KeyboardInterrupt as error:
            show_error("interrupted")
            raise typer.Exit(STOPPED_BY_KEYBOARD) from error
        except Exception as error:
            failure = as_failure(error)
            report(failure)
            raise typer.Exit(failure.exit_code) from error

    return wrapper


def as_failure(error: Exception) -> BurnishError:
    """`error` as the user is told it: unless it was raised on purpose, memory ran out or it is a defect.

    The traceback of a defect is written to a file. The result holds nothing of `error` unless it is `error`.
    """
    if isinstance(error, BurnishError):
        return error
    if is_out_of_memory(error):
        reason = str(error).strip().partition("\n")[0]
        return OutOfMemory(f"memory ran out: {reason or type(error).__name__}", remedy=LESS_MEMORY)
    return BurnishError(defect_message(error, write_traceback(error)))


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:  # then it was not torch that ran out; a message is not worth its import
        return False
    from burnish.memory import out_of_memory

    return out_of_memory.is_out_of_memory(error)


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
