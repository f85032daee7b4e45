"""The figures: how often a pipeline folder draws what the prompt says, as the checker sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor

from .captions import judged_caption
from .checker import WEIGHTS, Verdict, judge, load_checker
from .drawing import draw
from .models import load_pipeline
from .tokenizers import T5_LENGTH
from .world import SHAPES, SIZE, Scenes, sample_scenes, settle

JUDGED_SEED: Final = 990_001
"""Scenes that no training run draws; the prototype was judged by prompts from the same seed."""

_BATCH: Final = 25


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the pictures are sampled."""

    steps: int = 16
    true_cfg_scale: float = 1.0
    text_length: int = T5_LENGTH


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares in [0, 1] for one set of prompts."""

    prompts: int
    shape: float
    color: float
    shape_and_color: float
    all_objects: float
    all_objects_and_relation: float
    background_color: float
    background_kind: float


def judged_scenes(single: int, two: int) -> tuple[Scenes, Scenes]:
    """The first scenes of the judged seed with one object, and with two; settled, as in training."""
    scenes = settle(sample_scenes(JUDGED_SEED, 4 * (single + two) + 100))
    return scenes.take(np.flatnonzero(~scenes.two)[:single]), scenes.take(np.flatnonzero(scenes.two)[:two])


def evaluate(
    model: Path, *, single: int, two: int, sampling: Sampling, checker_weights: Path = WEIGHTS
) -> dict[str, object]:
    """Figures for drawn pictures (how good the checker is) and for the pipeline's own.

    Args:
        model: pipeline folder.
        single: number of prompts with one object.
        two: number of prompts with two objects.
        sampling: steps, guidance and text length.
        checker_weights: of the checker.
    """
    pipeline = load_pipeline(model)
    checker = load_checker(checker_weights)
    singles, twos = judged_scenes(single, two)
    report: dict[str, object] = {}
    for name, scenes in (("one object", singles), ("two objects", twos)):
        if not len(scenes):
            continue
        real = judge(checker, draw(scenes), scenes)
        report[f"{name}, drawn pictures"] = figures(real)
        verdicts = judge(checker, sample(pipeline, prompts(scenes), sampling), scenes)
        report[name] = figures(verdicts)
        if name == "one object":
            report["shape and colour, by shape"] = by_shape(verdicts, scenes)
    return report


def prompts(scenes: Scenes) -> list[str]:
    """The complete caption of every scene."""
    return [judged_caption(scenes, index) for index in range(len(scenes))]


@torch.no_grad()
def sample(pipeline: FluxPipeline, texts: Sequence[str], sampling: Sampling, seed: int = 0) -> Tensor:
    """Pictures in [0, 1], shape (N, 3, 128, 128); the noise of picture n comes from seed `seed + n`."""
    pictures = []
    for start in range(0, len(texts), _BATCH):
        part = list(texts[start : start + _BATCH])
        result = pipeline(
            part,
            negative_prompt=[""] * len(part) if sampling.true_cfg_scale > 1 else None,
            true_cfg_scale=sampling.true_cfg_scale,
            height=SIZE,
            width=SIZE,
            num_inference_steps=sampling.steps,
            max_sequence_length=sampling.text_length,
            generator=[torch.Generator().manual_seed(seed + start + row) for row in range(len(part))],
            output_type="pt",
        )
        pictures.append(result.images.float())
    return torch.cat(pictures)


def figures(verdicts: Sequence[Verdict]) -> Figures:
    """Shares over all verdicts."""

    def share(seen: list[bool]) -> float:
        return round(float(np.mean(seen)), 3)

    colors = [verdict.background_color for verdict in verdicts]
    return Figures(
        prompts=len(verdicts),
        shape=share([verdict.shape for verdict in verdicts]),
        color=share([verdict.color for verdict in verdicts]),
        shape_and_color=share([verdict.both for verdict in verdicts]),
        all_objects=share([verdict.all_objects for verdict in verdicts]),
        all_objects_and_relation=share([verdict.relation for verdict in verdicts]),
        background_color=share([color for color in colors if color is not None]),
        background_kind=share([verdict.background_kind for verdict in verdicts]),
    )


def by_shape(verdicts: Sequence[Verdict], scenes: Scenes) -> dict[str, str]:
    """For every shape, how many of its prompts were followed in shape and colour, as "followed/asked"."""
    counts = {}
    for number, shape in enumerate(SHAPES):
        of_shape = [
            verdict.both
            for verdict, drawn in zip(verdicts, scenes.shape[:, 0], strict=True)
            if drawn == number
        ]
        counts[shape] = f"{sum(of_shape)}/{len(of_shape)}"
    return counts
