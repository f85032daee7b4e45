"""How well the planner foresees a step's peak: predicted beside real, for families, activation settings and formats.

    python -m tools.benchmarks.planner --families flux sdxl sd3 qwen_image z_image
    python -m tools.benchmarks.planner --families sd3 --depth 2 --size 256 --batch 2        # on a CPU

Real is what a step of Burnish's loop held at most, nothing compiled, of random weights: on a GPU the caching
allocator's maximum, on a CPU what torch's allocator held above what was there before the step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from burnish.planner.recipe import Shape
from tools.benchmarks import harness
from tools.benchmarks.harness import ACTIVATIONS, Activations, Model, Settings


def row(model: Model, shape: Shape, settings: Settings, device: torch.device) -> dict[str, Any]:
    """One setting's figures; `off` is real / predicted - 1."""
    cuda = device.type == "cuda"
    peak, resident = harness.predicted_bytes(model, shape, settings, cuda=cuda)
    predicted = peak if cuda else peak - resident
    told: dict[str, Any] = {"family": model.name, "weights": settings.weights}
    told |= {"activations": settings.activations, "predicted_bytes": predicted}
    try:
        with tempfile.TemporaryDirectory() as cache:
            step, attention = harness.burnish_step(model, shape, settings, device, Path(cache))
            with attention.installed():
                step()  # the optimizer's state is there from the second on
                real = harness.peak_bytes(step, device)
    except torch.OutOfMemoryError as error:
        return {**told, "trouble": str(error).splitlines()[0]}
    finally:
        harness.give_back()
    return {**told, "real_bytes": real, "off": round(real / predicted - 1, 4)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser_for(__doc__, of_a_model=True)
    parser.add_argument("--families", nargs="+", default=["flux", "sdxl", "sd3", "qwen_image", "z_image"])
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), type=harness.activations_of)
    parser.add_argument("--weights", nargs="+", default=["native"])
    told = parser.parse_args(arguments)
    device, shape = torch.device(told.device), harness.shape_of(told)
    settings: list[tuple[str, Activations]] = [(w, a) for w in told.weights for a in told.activations]
    rows = [
        # Torch's own kernel: the trace counts what flash attention keeps.
        row(harness.model_of(told, family), shape, Settings(weights, activations, attention="torch"), device)
        for family in told.families
        for weights, activations in settings
    ]
    worst = max((abs(one["off"]) for one in rows if "off" in one), default=None)
    sizes = {"size": told.size, "frames": told.frames, "batch": told.batch, "depth": told.depth}
    harness.tell(device, {"rows": rows, "worst": worst, **sizes})


if __name__ == "__main__":
    main()
