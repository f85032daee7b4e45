"""`burnish plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.edge import guarded
from burnish.cli.train import Overrides

if TYPE_CHECKING:
    from burnish.planner.choose import Choice
    from burnish.planning import RunPlan

GIB = 1024**3


@guarded
def plan(
    config: Annotated[str, typer.Argument(help="Path of a config, or a name in ./config.")],
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", help="Plan for this card instead of the one here: 4090, h100, gb10, ... or 24GiB."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    overrides: Overrides = [],  # noqa: B006  typer copies it
) -> None:
    """What a run will take, in memory and time, before anything is loaded; and the settings that fit.

    Needs no GPU and no weights. Times are estimates; memory is counted from the run's own code.
    """
    from burnish.config.load import load_config
    from burnish.planning import budget_of, card_for, plan_run

    loaded = load_config(config, overrides=overrides).config
    card = card_for(gpu)
    planned = plan_run(loaded, card, budget=budget_of(loaded.memory.budget))
    if as_json:
        typer.echo(json.dumps(_as_json(planned), indent=2))
    else:
        _show(planned)


def _show(plan: RunPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{plan.family} on {plan.card}: {_settings(plan.choice)}{', compiled' if plan.compiled else ''}"
    )
    memory = Table(box=None)
    memory.add_column("what", no_wrap=True)
    memory.add_column("GiB", justify="right")
    memory.add_column("why")
    for row in plan.rows:
        memory.add_row(row.what, f"{row.bytes / GIB:.2f}", row.why)
    memory.add_row(
        "peak", f"{plan.peak / GIB:.2f}", f"of {plan.budget / GIB:.2f} that torch may use here", style="bold"
    )
    if plan.choice.host:
        memory.add_row("host", f"{plan.choice.host / GIB:.2f}", "streamed weights, in pinned memory")
    console.print(memory)
    times = Table(box=None)
    for heading in ("size", "tokens", "s/step"):
        times.add_column(heading, justify="right")
    for time in plan.times:
        shape = time.shape
        size = f"{shape.height}x{shape.width}" + (f" x{shape.frames}" if shape.frames > 1 else "")
        times.add_row(size, str(time.tokens), f"{time.seconds:.2f}")
    console.print(times)
    console.print(f"{plan.steps} steps: about {_duration(plan.seconds)}, without samples and the first start")
    others = Table(box=None, title="Other settings", title_justify="left", title_style="")
    for heading in ("", "GiB", "s/step", "settings"):
        others.add_column(heading, justify="right" if heading in ("GiB", "s/step") else "left")
    for word, choices in (("cheaper", plan.cheaper), ("faster", plan.faster)):
        for choice in choices:
            others.add_row(
                word, f"{choice.peak / GIB:.2f}", f"{choice.seconds * plan.accumulate:.2f}", _settings(choice)
            )
    if others.row_count:
        console.print(others)
    for note in plan.notes:
        console.print(f"Note: {note}.")


def _settings(choice: Choice) -> str:
    settings = choice.settings
    blocks = ", ".join(
        mode if len(settings.kept) == 1 else f"{count} blocks {mode}" for mode, count in settings.kept.items()
    )
    streamed = f", {settings.stream:.0%} of block weights streamed" if settings.stream else ""
    return f"weights {settings.weights}, {blocks}{streamed}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _as_json(plan: RunPlan) -> dict[str, Any]:
    def told(choice: Choice) -> dict[str, Any]:
        settings = choice.settings
        return {
            "weights": settings.weights,
            "activations": settings.kept,
            "stream": settings.stream,
            "peak_gib": choice.peak / GIB,
            "host_gib": choice.host / GIB,
            "seconds": choice.seconds * plan.accumulate,
        }

    return {
        "family": plan.family,
        "card": plan.card,
        "budget_gib": plan.budget / GIB,
        "peak_gib": plan.peak / GIB,
        "compiled": plan.compiled,
        "text_encoder_weights": plan.text_encoder_weights,
        "settings": told(plan.choice),
        "rows": [{"what": row.what.strip(), "gib": row.bytes / GIB, "why": row.why} for row in plan.rows],
        "times": [
            {
                "size": [time.shape.height, time.shape.width],
                "frames": time.shape.frames,
                "tokens": time.tokens,
                "seconds": time.seconds,
            }
            for time in plan.times
        ],
        "run_seconds": plan.seconds,
        "cheaper": [told(choice) for choice in plan.cheaper],
        "faster": [told(choice) for choice in plan.faster],
        "notes": list(plan.notes),
    }
