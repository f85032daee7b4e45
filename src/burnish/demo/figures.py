"""What the demo draws before and after, and the figures that tell whether it worked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from burnish.demo.robot import PASS_SCORE, robot_scores

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares of pictures that show the robot, in [0, 1]."""

    before: float  # the test prompt, base model
    after: float  # the test prompt, with the adapter
    ordinary: float  # prompts that name no robot, with the adapter
    seeds: int
    best_before: float  # highest score, see robot.robot_scores
    mean_after: float


@dataclass(frozen=True, slots=True)
class Drawn:
    """What base model and adapter make of the same prompts and seeds."""

    robots_before: Sequence[Image.Image]
    robots_after: Sequence[Image.Image]
    ordinary_before: Sequence[Image.Image]
    ordinary_after: Sequence[Image.Image]


def measure(drawn: Drawn) -> Figures:
    """Shares of robots by the deterministic picture measure of robot.py."""
    before, after, ordinary = (
        robot_scores(np.stack([np.asarray(picture) for picture in pictures]))
        for pictures in (drawn.robots_before, drawn.robots_after, drawn.ordinary_after)
    )
    return Figures(
        before=float((before >= PASS_SCORE).mean()),
        after=float((after >= PASS_SCORE).mean()),
        ordinary=float((ordinary >= PASS_SCORE).mean()),
        seeds=len(after),
        best_before=float(before.max()),
        mean_after=float(after.mean()),
    )
