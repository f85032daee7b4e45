"""What the diffusers pipelines themselves draw, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

PROMPTS = ("a photo of a sks dog on a red chair", "two people walking, blue sky")
NEGATIVES = ("blurry, low quality", "")
SEEDS = (7, 1234)
HEIGHT, WIDTH, STEPS = 64, 96, 4


def with_scheduler(folder: Path, copy: Path, kind: type[SchedulerMixin], **changes: Any) -> Path:
    """A copy of a pipeline's folder with another scheduler made from the released one's settings."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
    pipeline.save_pretrained(copy)
    return copy


def pipeline_output(
    folder: Path,
    *,
    output: str,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = SEEDS,
    **call: Any,
) -> Tensor:
    """Latents or pixels in [0, 1] (B, C, H, W) of the pipeline in `folder`, fp32 on the CPU."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn: Tensor = pipeline(
        prompt=list(prompts),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type=output,
        **call,
    ).images
    return drawn.detach()
