"""`burnish`: the commands, each in its own module."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from burnish import __version__
from burnish.cli import adapter, configs, demo, doctor, families, generate, plan, runs, train
from burnish.cli.edge import EXIT_CODES

app = typer.Typer(
    name="burnish",
    help="Fine-tune diffusion models on your own pictures; get an adapter that loads where you use it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"burnish {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune diffusion models on your own pictures; get an adapter that loads where you use it."""
    # diffusers imports bitsandbytes, which then misses a kernel for CPUs that nothing here would call.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


app.command("train", epilog=EXIT_CODES)(train.train)
app.command("generate", epilog=EXIT_CODES)(generate.generate)
app.command("plan", epilog=EXIT_CODES)(plan.plan)
app.command("families")(families.show_families)
app.command("doctor", epilog=EXIT_CODES)(doctor.doctor)
app.command("demo", epilog=EXIT_CODES)(demo.demo)
app.add_typer(configs.app, name="config")
app.add_typer(runs.app, name="run")
app.add_typer(adapter.app, name="adapter")
