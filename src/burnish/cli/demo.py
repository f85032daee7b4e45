"""`burnish demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.edge import guarded


@guarded
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run is made in here.")] = Path("runs"),
    export: Annotated[
        Path | None,
        typer.Option(
            "--export-config", metavar="FOLDER", help="Only leave the config and the pictures here."
        ),
    ] = None,
) -> None:
    """Train the model inside the package on 16 pictures, and show before and after. No download, no GPU."""
    from burnish.cli.output import Output
    from burnish.demo.command import export_config, run_demo
    from burnish.demo.robot import ORDINARY_PROMPTS, TEST_PROMPT

    if export is not None:
        for path in export_config(export):
            typer.echo(f"wrote {path}")
        typer.echo(f"change them, then: burnish train {export / 'demo.yaml'}")
        return
    with Output() as out:
        result = run_demo(output, out.progress())
        out.end_progress()
        figures = result.figures
        count, ordinary = figures.seeds, len(ORDINARY_PROMPTS)
        out.say("")
        out.say(f'robots for "{TEST_PROMPT}", {count} seeds')
        out.say(f"  before training   {round(figures.before * count):2d} of {count}")
        out.say(f"  after             {round(figures.after * count):2d} of {count}")
        out.say("prompts without a robot that turned into one")
        out.say(f"  after             {round(figures.ordinary * ordinary):2d} of {ordinary}")
        out.say("")
        out.say(f"adapter:          {result.run.adapter}")
        out.say(f"before and after: {result.grid}")
        out.say(f"loss curve:       {result.curve}")
        out.say(f"report:           {result.report}  (open it in a browser)")
