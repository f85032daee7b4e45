"""Whether training with weights in fewer bits learns as well: the embedded demo in each format, against two seeds.

    python -m tools.benchmarks.weight_formats --formats fp8 int8 nf4 --steps 300

The same pictures, noise and times for every run but the second native one, which has another seed. The curve is the
training loss averaged over windows of steps; `learned` is the share of pictures that show the new thing (docs of
`burnish demo`). All layers of the blocks are kept in the format, however small, and products are 8-bit on a CPU, too.
JSON on the standard output, progress on the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from burnish.config.data import Folder, Generated
from burnish.config.load import load_config
from burnish.config.schema import Memory, RunConfig
from burnish.demo.command import ASSETS, draw_before_and_after
from burnish.demo.figures import measure
from burnish.events import Listener
from burnish.memory import quantized
from burnish.model import choose_model
from burnish.preparation import draw_source
from burnish.run import train_run
from burnish.run_folder import RunFolder


def with_pictures_drawn(config: RunConfig, place: Path) -> RunConfig:
    """The config with the base model's own pictures as a folder, so that every run sees the same."""
    family = choose_model(config.model).load(dtype=torch.float32, device="cpu")
    sources: list[Folder] = []
    for source in config.data:
        drawn = (
            draw_source(config, source, place, family, Listener())
            if isinstance(source, Generated)
            else source
        )
        sources.append(drawn)
    return config.model_copy(update={"data": sources})


def run(config: RunConfig, place: Path, weights: str, seed: int, *, learned: bool) -> dict[str, Any]:
    """One run's losses, and whether it learned the new thing."""
    name = f"{weights}-{seed}"
    memory = Memory.model_validate({**config.memory.model_dump(), "weights": weights, "cache_folder": place})
    save = config.save.model_copy(update={"folder": place})
    config = config.model_copy(update={"name": name, "seed": seed, "memory": memory, "save": save})
    print(name, file=sys.stderr)
    result = train_run(config, progress=Listener())
    losses = [value for _, value in RunFolder(place / name).metrics("loss")]
    found: dict[str, Any] = {"losses": losses, "learned": None}
    if learned and result.adapter is not None:
        found["learned"] = measure(draw_before_and_after(config, result.adapter)).after
    return found


def windows(losses: list[float], size: int) -> list[float]:
    cut = [losses[first : first + size] for first in range(0, len(losses) - size + 1, size)]
    return [sum(window) / size for window in cut]


def compared(curves: dict[str, list[float]], first: str, second: str) -> dict[str, float]:
    """Mean distance of each curve from the first one, over that of the second."""
    distances = {
        name: sum(abs(a - b) for a, b in zip(curve, curves[first], strict=True)) / len(curve)
        for name, curve in curves.items()
    }
    return {name: distance / distances[second] for name, distance in distances.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["fp8", "int8"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--window", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs=2, default=[7, 8])
    parser.add_argument("--learned", action="store_true", help="Also draw, which takes as long again.")
    arguments = parser.parse_args()
    quantized.SMALLEST = 0

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        overrides = [
            f"train.steps={arguments.steps}",
            "train.schedule.warmup_steps=5",
            "sample.prompts=[]",
            f"save.every={arguments.steps}",
        ]
        config = with_pictures_drawn(load_config(ASSETS / "demo.yaml", overrides=overrides).config, place)
        one = partial(run, config, place, learned=arguments.learned)
        first, second = arguments.seeds
        runs = {"native": one("native", first), "native, other seed": one("native", second)}
        runs |= {weights: one(weights, first) for weights in arguments.formats}
    curves = {name: windows(found["losses"], arguments.window) for name, found in runs.items()}
    print(
        json.dumps(
            {
                "steps": arguments.steps,
                "curves": {name: [round(loss, 5) for loss in curve] for name, curve in curves.items()},
                "distance from native over that of the other seed": compared(
                    curves, "native", "native, other seed"
                ),
                "learned": {name: found["learned"] for name, found in runs.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
