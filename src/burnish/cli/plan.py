"""`burnish plan`."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.edge import guarded
from burnish.cli.train import Overrides

if TYPE_CHECKING:
    from burnish.config.load import LoadedConfig
    from burnish.planner.choose import Choice
    from burnish.run_plan import RunPlan

GIB = 1024**3
NOTHING_FITS = "nothing fits"


@guarded
def plan(
    config: Annotated[str, typer.Argument(help="Path of a config, or a name in ./config.")],
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", help="Plan for this card instead of the one here: 4090, h100, gb10, ... or 24GiB."
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch", help="Compare batch sizes, such as 1,2,4: settings, memory and pictures per second."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    overrides: Overrides = [],  # noqa: B006  typer copies it
) -> None:
    """What a run will take, in memory and time, before anything is loaded; and the settings that fit.

    Needs no GPU and no weights. Times are estimates; memory is counted from the run's own code.
    """
    from burnish.config.load import load_config

    if batch is not None:
        _compare([_with_batch(config, overrides, size, gpu) for size in _sizes(batch)], as_json)
        return
    told = _planned(load_config(config, overrides=overrides), gpu)
    if as_json:
        rows = [{**row, "what": row["what"].strip()} for row in told["rows"]]
        typer.echo(json.dumps({**told, "rows": rows}, indent=2))
    else:
        _show(told)


def _sizes(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and 0 < int(word) <= 4096 for word in words):
        from burnish.errors import UserError

        raise UserError(f"--batch: {text!r} is not a list of batch sizes", remedy="Such as --batch 1,2,4.")
    return sorted({int(word) for word in words})


def _with_batch(config: str, overrides: list[str], size: int, gpu: str | None) -> dict[str, Any]:
    """The plan with this batch size, or why there is none."""
    from burnish.config.load import load_config
    from burnish.errors import UserError

    try:
        told = _planned(load_config(config, overrides=[*overrides, f"train.batch_size={size}"]), gpu)
    except UserError as error:
        if not str(error).startswith(NOTHING_FITS):
            raise
        return {"batch": size, "trouble": str(error)}
    steps = sum(time["seconds"] for time in told["times"]) / len(told["times"])
    return {"batch": size, "pictures_per_second": size * told["accumulate"] / steps, **told}


def _compare(plans: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plans, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for heading in ("batch", "GiB", "s/step", "pictures/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("settings")
    for plan in plans:
        if "trouble" in plan:
            table.add_row(str(plan["batch"]), "", "", "", plan["trouble"])
            continue
        speed = plan["pictures_per_second"]
        seconds = plan["batch"] * plan["accumulate"] / speed
        gib = f"{plan['peak_gib']:.2f}"
        row = (str(plan["batch"]), gib, f"{seconds:.2f}", f"{speed:.2f}", _settings(plan["settings"]))
        table.add_row(*row)
    console = Console(highlight=False)
    fitting = [plan for plan in plans if "trouble" not in plan]
    if fitting:
        room = fitting[0]["budget_gib"]
        console.print(f"{fitting[0]['family']} on {fitting[0]['card']}, {room:.2f} GiB that torch may use")
    console.print(table)


def _planned(loaded: LoadedConfig, gpu: str | None) -> dict[str, Any]:
    """The plan, or the same answer as last time: a plan for a named card depends on nothing but files and versions."""
    kept = _answer_file(loaded, gpu) if gpu is not None else None
    if kept is not None and kept.is_file():
        with suppress(ValueError, OSError):
            told: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            return told
    from burnish.atomic import atomic_write_text
    from burnish.errors import UserError
    from burnish.planning import plan_run
    from burnish.run_plan import budget_of, card_for

    config = loaded.config
    try:
        told = _as_json(plan_run(config, card_for(gpu), budget=budget_of(config.memory.budget)))
    except RuntimeError as error:  # as in settling.py: torch has many words for it
        raise UserError(
            f"a step of this model asks for numbers that only weights have, so it cannot be planned ({error})",
            remedy="The run itself goes on with recomputed activations; memory.activations: keep is for what fits.",
        ) from error
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(kept, json.dumps(told))
    return told


def _answer_file(loaded: LoadedConfig, gpu: str) -> Path:
    from burnish.planner.version import planner_version

    model = loaded.config.model
    named = [Path(model.path), *([model.vae] if model.vae else []), *model.text_encoders]
    facts = [loaded.text, gpu, planner_version(), [_state(path) for path in named]]
    name = hashlib.blake2b(json.dumps(facts).encode(), digest_size=20).hexdigest()
    folder = loaded.config.memory.cache_folder or Path(
        os.environ.get("BURNISH_CACHE") or Path.home() / ".cache" / "burnish"
    )
    return folder.expanduser() / "plans" / "answers" / f"{name}.json"


def _state(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files there; none where nothing is."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return [(str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in files if one.is_file()]


def _show(told: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    compiled = ", compiled" if told["compiled"] else ""
    console.print(f"{told['family']} on {told['card']}: {_settings(told['settings'])}{compiled}")
    memory = Table(box=None)
    memory.add_column("what", no_wrap=True)
    memory.add_column("GiB", justify="right")
    memory.add_column("why")
    for row in told["rows"]:
        memory.add_row(row["what"], f"{row['gib']:.2f}", row["why"])
    room = f"of {told['budget_gib']:.2f} that torch may use here"
    memory.add_row("peak", f"{told['peak_gib']:.2f}", room, style="bold")
    if told["settings"]["host_gib"]:
        memory.add_row(
            "host", f"{told['settings']['host_gib']:.2f}", "streamed or waiting there, in pinned memory"
        )
    console.print(memory)
    times = Table(box=None)
    for heading in ("size", "tokens", "s/step"):
        times.add_column(heading, justify="right", no_wrap=True)
    times.add_column("in a step" if any(time["besides"] for time in told["times"]) else "")
    for time in told["times"]:
        size = "x".join(str(side) for side in time["size"])
        size += f" x{time['frames']}" if time["frames"] > 1 else ""
        times.add_row(size, str(time["tokens"]), f"{time['seconds']:.2f}", time["besides"])
    console.print(times)
    whole = _duration(told["run_seconds"])
    console.print(f"{told['steps']} steps: about {whole}, without samples and the first start")
    others = Table(box=None, title="Other settings", title_justify="left", title_style="")
    for heading in ("", "GiB", "s/step", "settings"):
        others.add_column(heading, justify="right" if heading in ("GiB", "s/step") else "left")
    for word in ("cheaper", "faster"):
        for choice in told[word]:
            row = (f"{choice['peak_gib']:.2f}", f"{choice['seconds']:.2f}", _settings(choice))
            others.add_row(word, *row)
    if others.row_count:
        console.print(others)
    for note in told["notes"]:
        console.print(f"Note: {note}.")


def _settings(choice: dict[str, Any]) -> str:
    kept = choice["activations"]
    blocks = ", ".join(mode if len(kept) == 1 else f"{count} blocks {mode}" for mode, count in kept.items())
    streamed = f", {choice['stream']:.0%} of block weights streamed" if choice["stream"] else ""
    waiting = ", kept in host memory" if choice["offload_activations"] else ""
    parts = f", batches in {choice['batch_parts']} parts" if choice["batch_parts"] > 1 else ""
    return f"weights {choice['weights']}, {blocks}{waiting}{streamed}{parts}"


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
            "offload_activations": settings.offload,
            "batch_parts": settings.parts,
            "peak_gib": choice.peak / GIB,
            "host_gib": (choice.host + choice.waiting) / GIB,
            "streamed_gib": choice.host / GIB,
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
        "steps": plan.steps,
        "accumulate": plan.accumulate,
        "rows": [{"what": row.what, "gib": row.bytes / GIB, "why": row.why} for row in plan.rows],
        "times": [
            {
                "size": [time.shape.height, time.shape.width],
                "frames": time.shape.frames,
                "tokens": time.tokens,
                "seconds": time.seconds,
                "besides": time.besides,
            }
            for time in plan.times
        ],
        "run_seconds": plan.seconds,
        "cheaper": [told(choice) for choice in plan.cheaper],
        "faster": [told(choice) for choice in plan.faster],
        "notes": list(plan.notes),
    }
