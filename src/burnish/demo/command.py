"""`burnish demo`: train the embedded model on the robot through the ordinary run path, measure, show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.config.load import load_config
from burnish.demo.figures import Drawn, Figures, measure
from burnish.demo.robot import ORDINARY_PROMPTS, TEST_PROMPT
from burnish.errors import ConfigError, UserError
from burnish.events import Listener, RunResult

if TYPE_CHECKING:
    from burnish.config.schema import RunConfig

ASSETS = Path(__file__).parent / "assets"
SEEDS = 32  # pictures per figure
STEPS = 16  # of the sampler


@dataclass(frozen=True, slots=True)
class DemoResult:
    run: RunResult
    figures: Figures
    grid: Path
    curve: Path
    report: Path


def export_config(folder: Path) -> list[Path]:
    """Leave the demo's config and pictures in `folder` for the user to change; returns what was written.

    Raises:
        UserError: a file of these names is there already.
    """
    targets = [folder / "demo.yaml", folder / "dataset"]
    for target in targets:
        if target.exists():
            raise UserError(f"{target} exists already", remedy="Name another folder, or move it away.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ASSETS / "demo.yaml", targets[0])
    shutil.copytree(ASSETS / "dataset", targets[1])
    return targets


def run_demo(output: Path, progress: Listener) -> DemoResult:
    """Train in `output`/demo, draw before and after, measure, write the report.

    An earlier demo in the same place is replaced: the point is to see it train.

    Raises:
        UserError: another run than the demo is in that place.
        BurnishError: as `burnish train`.
    """
    from burnish.demo.report import write_report
    from burnish.run import train_run

    config = load_config(ASSETS / "demo.yaml", overrides=[f"save.folder={json.dumps(str(output))}"]).config
    clear_earlier_demo(config)
    result = train_run(config, progress=progress)
    assert result.adapter is not None, "a finished run has an adapter"
    drawn = draw_before_and_after(config, result.adapter, progress.phase)
    figures = measure(drawn)
    grid, curve, report = write_report(result, config, drawn, figures)
    return DemoResult(result, figures, grid, curve, report)


def clear_earlier_demo(config: RunConfig) -> None:
    """Delete what an earlier demo left in the folder of `config`.

    Raises:
        UserError: the folder is being trained in, or holds what the demo did not make.
    """
    from burnish.run import refuse_if_busy
    from burnish.run_folder import RunFolder

    folder = RunFolder(config.save.folder / config.name)
    refuse_if_busy(folder)
    if is_run_of(config, folder.config) and not folder.path.is_symlink():
        shutil.rmtree(folder.path)
    elif folder.config.exists() or any(
        place.is_dir() and any(place.iterdir()) for place in (folder.checkpoints, folder.adapters)
    ):  # without either, a start failed early there, and nothing in it can be lost
        raise UserError(
            f"{folder.path} holds another run than this demo's; nothing in it was touched",
            remedy="Name another folder with --output, or move that run away.",
        )


def is_run_of(config: RunConfig, stored: Path) -> bool:
    """Whether the resolved config of a run folder says the same as `config`, but for where it is saved."""
    if not stored.is_file():
        return False
    try:
        before = load_config(stored).config
    except ConfigError:
        return False
    return before.model_dump(exclude={"save"}) == config.model_dump(exclude={"save"})


def draw_before_and_after(
    config: RunConfig,
    adapter: Path,
    phase: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Drawn:
    """The test prompt with `SEEDS` seeds and all ordinary prompts, by the base model and with the adapter."""
    from PIL import Image

    from burnish.generate import draw_pictures_with
    from burnish.sampling.sampler import PictureRequest

    prompts = [TEST_PROMPT] * SEEDS + list(ORDINARY_PROMPTS)
    requests = [
        PictureRequest(prompt=prompt, seed=index % SEEDS, height=128, width=128, steps=STEPS)
        for index, prompt in enumerate(prompts)
    ]
    sets = []
    for label, adapters in (
        ("drawing without the adapter", ()),
        ("drawing with the adapter", ((adapter, 1.0),)),
    ):
        drawn = draw_pictures_with(
            config.model,
            requests,
            adapters=adapters,
            memory=config.memory,
            device=config.memory.device,
            precision=config.train.precision,
            batch_size=16,
            progress=partial(phase, label),
        )
        sets.append([picture for picture in drawn if isinstance(picture, Image.Image)])
    before, after = sets
    return Drawn(before[:SEEDS], after[:SEEDS], before[SEEDS:], after[SEEDS:])
