"""`burnish train`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from burnish.cli.edge import as_failure, guarded
from burnish.errors import BurnishError, Interrupted, UserError

if TYPE_CHECKING:
    from burnish.cli.output import Output
    from burnish.config.load import LoadedConfig

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change an option, such as train.steps=100; repeatable."),
]


@guarded
def train(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG...", help="Path of a config, or a name in ./config.")
    ],
    recover: Annotated[
        bool, typer.Option("-r", "--recover", help="Go on with the next config after a failure.")
    ] = False,
    name: Annotated[str | None, typer.Option("-n", "--name", help="Instead of the config's name.")] = None,
    log: Annotated[
        Path | None, typer.Option("-l", "--log", help="Also write the output to this file.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  typer copies it; it never reaches two calls
    check: Annotated[
        bool,
        typer.Option("--check", help="Validate the config and check model, pictures and space; no training."),
    ] = False,
) -> None:
    """Train an adapter, or go on where the run stopped.

    All configs are read before the first one starts, so that a mistake in the last shows at once.
    """
    from burnish.cli.output import Output

    if name is not None and len(configs) > 1:
        raise UserError(f"--name names one run; got {len(configs)} configs", remedy="Run them one at a time.")
    with Output(log) as output:
        loaded, failures = _load_all(configs, overrides, name, recover, output)
        _refuse_same_folder(loaded)
        for one in loaded:
            if not recover:
                _run(one, check, output)
            elif code := _exit_code(one, check, output):
                failures.append(code)
                _release_memory()
        if failures:
            output.say(f"{len(failures)} of {len(configs)} runs failed")
            raise typer.Exit(failures[0])


def _load_all(
    configs: Sequence[str], overrides: Sequence[str], name: str | None, recover: bool, output: Output
) -> tuple[list[LoadedConfig], list[int]]:
    """Every config that loads, and the exit codes of the others.

    What is wrong with those is told, and without `recover` ends the command.
    """
    from burnish.config.load import load_config

    loaded: list[LoadedConfig] = []
    failures: list[int] = []
    for reference in configs:
        try:
            loaded.append(load_config(reference, overrides=overrides, name=name))
        except BurnishError as error:
            output.say_error(error)
            failures.append(error.exit_code)
    if failures and not (recover and loaded):
        raise typer.Exit(failures[0])
    return loaded, failures


def _refuse_same_folder(loaded: Sequence[LoadedConfig]) -> None:
    folders = Counter(one.config.save.folder.absolute() / one.config.name for one in loaded)
    for folder, count in folders.items():
        if count > 1:
            files = ", ".join(
                str(one.path)
                for one in loaded
                if one.config.save.folder.absolute() / one.config.name == folder
            )
            raise UserError(
                f"{files} would write to the same folder {folder}", remedy="Give each its own name."
            )


def _exit_code(loaded: LoadedConfig, check: bool, output: Output) -> int:
    """Run one config, tell why it failed if it did, and return its exit code.

    Only the number leaves here: with the error, its traceback would hold the model until the next run has ended.

    Raises:
        Interrupted: a signal is for all runs, not for one.
        BrokenPipeError: nobody reads what is told.
    """
    try:
        _run(loaded, check, output)
    except (Interrupted, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001  a defect in one run is no reason to leave the others out
        output.end_progress()
        failure = as_failure(error)
        output.say_error(failure)
        return failure.exit_code
    return 0


def _release_memory() -> None:
    if "torch" in sys.modules:
        from burnish.memory.out_of_memory import release_cached_memory

        release_cached_memory()


def _run(loaded: LoadedConfig, check: bool, output: Output) -> None:
    from burnish.run import check_run, train_run

    progress = output.progress()
    if check:
        check_run(loaded.config, progress)
        output.end_progress()
        output.say(f"{loaded.config.name}: config, weights, pictures and captions are in order")
        return
    train_run(loaded.config, progress=progress)
    output.end_progress()
