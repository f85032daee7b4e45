"""The demo's before-and-after grid, its loss curve and its report page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from burnish.atomic import atomic_write_text
from burnish.demo.robot import ORDINARY_PROMPTS, TEST_PROMPT
from burnish.run_folder import RunFolder

if TYPE_CHECKING:
    from burnish.config.schema import RunConfig
    from burnish.demo.figures import Drawn, Figures
    from burnish.events import RunResult

COLUMNS = 8
CELL, GAP, MARGIN, HEADING = 128, 4, 20, 40
INK, MUTED, PAPER, ACCENT, PALE = "#16202c", "#5d6b7a", "#ffffff", "#c2571a", "#d9dee5"


def write_report(
    result: RunResult, config: RunConfig, drawn: Drawn, figures: Figures
) -> tuple[Path, Path, Path]:
    """Write before_after.png, loss.png and report.html into the run folder; returns their paths."""
    folder = RunFolder(result.folder)
    grid, curve, page = (folder.path / name for name in ("before_after.png", "loss.png", "report.html"))
    before_and_after(drawn, figures).save(grid)
    loss_curve(folder.metrics("loss"), curve)
    template = Environment(
        loader=PackageLoader("burnish.demo", "assets"), autoescape=True, undefined=StrictUndefined
    ).get_template("report.html.jinja")
    status = folder.status()
    losses = [value for _, value in folder.metrics("loss")]
    adapter = result.adapter
    assert adapter is not None, "a finished run has an adapter"
    text = template.render(
        figures=figures,
        percent=lambda share: f"{round(100 * share)} %",
        count=lambda share, of: f"{round(share * of)} of {of}",
        ordinary_count=len(ORDINARY_PROMPTS),
        test_prompt=TEST_PROMPT,
        steps=result.step,
        minutes=sum(value for _, value in folder.metrics("seconds")) / 60,
        first_loss=sum(losses[:20]) / max(1, len(losses[:20])),
        last_loss=sum(losses[-20:]) / max(1, len(losses[-20:])),
        adapter=os.path.relpath(adapter, result.folder),
        adapter_mib=adapter.stat().st_size / 2**20,
        verification=status.adapters.get(adapter.name, {}) if status else {},
        config_text=folder.config.read_text(),
        sample_grid=os.path.relpath(folder.samples / "grid.png", result.folder),
        report=json.loads(folder.data_report.read_text()),
        name=config.name,
    )
    atomic_write_text(page, text)
    return grid, curve, page


def before_and_after(drawn: Drawn, figures: Figures) -> Image.Image:
    """Four bands: the test prompt before and after, ordinary prompts before and after."""
    bands = [
        (
            f"Before: \u201c{TEST_PROMPT}\u201d: {round(figures.before * figures.seeds)} of {figures.seeds} "
            "show the robot",
            drawn.robots_before,
        ),
        (
            f"After: the same prompt and seeds with the adapter: {round(figures.after * figures.seeds)} "
            f"of {figures.seeds}",
            drawn.robots_after,
        ),
        ("Before: prompts without a robot", drawn.ordinary_before[:COLUMNS]),
        (
            f"After: the same with the adapter: {round(figures.ordinary * len(drawn.ordinary_after))} of "
            f"{len(drawn.ordinary_after)} turned into a robot",
            drawn.ordinary_after[:COLUMNS],
        ),
    ]
    rows = sum(-(-len(pictures) // COLUMNS) for _, pictures in bands)
    width = 2 * MARGIN + COLUMNS * CELL + (COLUMNS - 1) * GAP
    height = 2 * MARGIN + len(bands) * HEADING + rows * (CELL + GAP)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(17), MARGIN
    for title, pictures in bands:
        pen.text((MARGIN, top + 10), title, fill=ACCENT if title.startswith("After") else INK, font=font)
        top += HEADING
        for first in range(0, len(pictures), COLUMNS):
            for column, picture in enumerate(pictures[first : first + COLUMNS]):
                sheet.paste(picture, (MARGIN + column * (CELL + GAP), top))
            top += CELL + GAP
    return sheet


def loss_curve(points: Sequence[tuple[int, float]], path: Path) -> None:
    """The loss of every step, pale, and its mean over 20 steps."""
    from matplotlib.figure import Figure

    steps = [step for step, _ in points]
    losses = [value for _, value in points]
    smooth = [
        sum(losses[max(0, i - 19) : i + 1]) / len(losses[max(0, i - 19) : i + 1]) for i in range(len(losses))
    ]
    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=PALE, linewidth=1, label="each step")
    axes.plot(steps, smooth, color=ACCENT, linewidth=2, label="mean of 20 steps")
    axes.set(xlabel="step", ylabel="loss", xlim=(0, max(steps, default=1)), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)
