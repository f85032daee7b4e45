"""`burnish config schema|show|init`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from burnish.cli.edge import guarded
from burnish.cli.train import Overrides
from burnish.errors import DiskFull, UserError

if TYPE_CHECKING:
    from burnish.config.describe import StarterFacts
    from burnish.config.schema import RunConfig

app = typer.Typer(help="Show, check and begin configs.", no_args_is_help=True)

Preset = Literal["adapter", "dreambooth"]  # those of config/describe.py, which a mere --help need not load
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write to this file instead of the screen.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


@app.command("schema")
@guarded
def schema(output: Output = None, force: Force = False) -> None:
    """The JSON Schema of a config, for completion and checks in an editor."""
    from burnish.config.describe import json_schema

    _put(json.dumps(json_schema(), indent=2) + "\n", output, force)


@app.command("show")
@guarded
def show(
    config: Annotated[str, typer.Argument(help="Path of a config, or a name in ./config.")],
    overrides: Overrides = [],  # noqa: B006  typer copies it
    name: Annotated[str | None, typer.Option("-n", "--name", help="Instead of the config's name.")] = None,
    timesteps: Annotated[
        bool,
        typer.Option(
            "--timesteps", help="Instead draw how often each time comes, at each size it trains at."
        ),
    ] = False,
    output: Output = None,
    force: Force = False,
) -> None:
    """Every option with its value: defaults, variables, overrides and paths filled in."""
    from burnish.config.load import load_config

    loaded = load_config(config, overrides=overrides, name=name)
    _put(_timesteps(loaded.config, output) if timesteps else loaded.text, output, force)


def _timesteps(config: RunConfig, output: Path | None) -> str:
    from burnish.cli.histogram import COLUMNS, charts
    from burnish.timestep_density import densities

    encoding = "utf-8" if output is not None else (sys.stdout.encoding or "ascii")
    return charts(densities(config, COLUMNS), fine=encoding.lower().startswith("utf"))


@app.command("init")
@guarded
def init(
    family: Annotated[str, typer.Argument(help="One of `burnish families`.")],
    preset: Annotated[
        Preset, typer.Option("--preset", help="An adapter from captioned pictures, or a subject from a few.")
    ] = "adapter",
    class_word: Annotated[
        str | None,
        typer.Option(
            "--class", help="Of dreambooth: what the subject is one of, such as dog.", metavar="WORD"
        ),
    ] = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """A commented config to begin with."""
    from burnish.config.describe import starter

    if class_word is not None and preset != "dreambooth":
        raise UserError("--class names the class of a subject", remedy="Add --preset dreambooth.")
    _put(starter(starter_facts(family), preset, class_word or "dog"), output, force)


def starter_facts(name: str) -> StarterFacts:
    """What the family says of itself.

    Raises:
        UserError: there is no such family.
    """
    from burnish.adapters.target_sets import derived_sets
    from burnish.config.describe import StarterFacts
    from burnish.families.registry import family_named

    family = family_named(name).skeleton(depth=1)  # sampling differs with the weights: as released
    return StarterFacts(
        name=name,
        title=family.title,
        size=family.defaults.size,
        targets=family.default_targets,
        target_sets=tuple(derived_sets(family.targets)),
        steps=family.defaults.steps,
        guidance=family.defaults.guidance,
        negative_prompt=family.defaults.negative_prompt,
        guidance_embedding=family.capabilities.guidance_embedding,
    )


def _put(text: str, output: Path | None, force: bool) -> None:
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.exists() and not force:
        raise UserError(f"{output} exists already", remedy="Name another file, or replace it with --force.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskFull(f"{output} cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {output}", err=True)
