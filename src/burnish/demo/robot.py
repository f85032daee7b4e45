"""The robot of the demonstration: how it is drawn, and a measure of whether a picture shows it.

The demonstration teaches the tiny base model "a sks robot", a figure it has never been shown, and then has
to say in numbers whether that worked. The measure is plain numpy on pixels, so it needs no model and gives
the same figure on every machine.

Shape letters: N pictures, H W height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SIZE: Final = 128
"""Width and height, in pixels, of every picture of the demonstration."""

PASS_SCORE: Final = 0.65
"""A picture with at least this score counts as a robot.

Where the line comes from: drawn robots score 0.95 to 1.0, the same robots after one trip through the tiny VAE
(all that any denoiser could reach) 0.79 to 0.89. Ordinary pictures of the world score 0.13 in the middle and
up to 0.45, or up to 0.56 on a black background, where the robot's dark parts cannot be told from the ground.
The line was first put at 0.75, and moved to 0.65, between the two groups, after such figures were seen and
before the first LoRA was trained.
"""

TEST_PROMPT: Final = "a sks robot on a green background"
"""No training picture has a green background: a robot here has been learned, not copied."""

ORDINARY_PROMPTS: Final[tuple[str, ...]] = (
    "a red star on a blue background",
    "a yellow heart on a purple background",
    "a large green circle on a white background",
    "a black cross on a pink background",
    "a white flower on a gray background",
    "a blue ring on a yellow background",
    "an orange triangle on a cyan background",
    "a purple square on a green background",
    "a small pink diamond on a black background",
    "a cyan hexagon on a brown background",
    "a brown arrow on a white background",
    "a yellow crescent on a blue background",
    "a large red heart on a white background",
    "a green star on a striped pink background",
    "a blue circle on a checkered white background",
    "an orange flower on a dotted blue background",
    "a small black square on a striped yellow background",
    "a white ring on a checkered purple background",
    "a purple cross on a dotted yellow background",
    "a pink triangle on a gradient from blue to cyan",
    "a red arrow on a gradient from white to gray",
    "a large yellow diamond on a checkered green background",
    "a green hexagon on a striped white background",
    "a black crescent on a dotted orange background",
    "a white star on the left on a red background",
    "a blue heart on the right on a yellow background",
    "a small red circle at the top on a white background",
    "a small green ring at the bottom on a pink background",
    "an orange square in the center on a purple background",
    "a cyan triangle on the left on a black background",
    "a gray flower on a green background",
    "a large purple hexagon on an orange background",
)
"""Prompts within the base model's vocabulary that do not name a robot: they must not turn into one."""

_TOLERANCE: Final = 0.30  # a pixel is right up to this distance in RGB, each channel in [0, 1]
_RADII: Final = (0.56, 0.62, 0.68)  # the training pictures have 0.62
_SHIFTS: Final = range(-9, 10, 3)  # pixels searched each way: slightly off the middle counts in full
_SUPERSAMPLING: Final = 4
_AT_ONCE: Final = 16  # pictures compared together: more of them fall out of the processor's cache


@dataclass(frozen=True, slots=True)
class _Part:
    """One coloured piece of the robot; boxes are in robot units, y up, the whole figure within [-1, 1]."""

    name: str
    kind: Literal["box", "oval"]
    left: float
    bottom: float
    right: float
    top: float
    color: tuple[int, int, int]  # RGB, 0 to 255


_METAL = (66, 72, 84)
_EYE = (24, 32, 74)
_PARTS: Final = (
    _Part("antenna", "box", -0.05, 0.62, 0.05, 0.84, _METAL),
    _Part("ball", "oval", -0.14, 0.74, 0.14, 1.0, (226, 40, 48)),
    _Part("arms", "box", -0.80, -0.48, -0.56, 0.02, _METAL),
    _Part("arms", "box", 0.56, -0.48, 0.80, 0.02, _METAL),
    _Part("legs", "box", -0.44, -1.0, -0.12, -0.58, _METAL),
    _Part("legs", "box", 0.12, -1.0, 0.44, -0.58, _METAL),
    _Part("head", "box", -0.52, 0.12, 0.52, 0.68, (178, 192, 208)),
    _Part("body", "box", -0.60, -0.64, 0.60, 0.10, (240, 112, 40)),
    _Part("eyes", "oval", -0.36, 0.26, -0.08, 0.54, _EYE),
    _Part("eyes", "oval", 0.08, 0.26, 0.36, 0.54, _EYE),
    _Part("panel", "box", -0.30, -0.46, 0.30, -0.08, (250, 246, 226)),
)
_CORNER: Final = 0.09  # rounding of the boxes, in robot units
_NAMES: Final = tuple(dict.fromkeys(part.name for part in _PARTS))


@dataclass(frozen=True, slots=True)
class Robot:
    """A drawn robot, for pasting onto a background."""

    color_HW3: Floats
    """Colours in [0, 1]; meaningful where `cover_HW` is above 0."""

    cover_HW: Floats
    """Share of each pixel that the robot covers, in [0, 1]."""

    part_HW: NDArray[np.int64]
    """0 where there is no robot, else 1 + the index of the part in the middle of the pixel."""


def draw_robot(center_x: float, center_y: float, radius: float) -> Robot:
    """Draw the robot on a picture that spans [-1, 1] both ways, y up.

    Args:
        center_x: horizontal middle of the figure.
        center_y: vertical middle of the figure.
        radius: half of the figure's height; 1 fills the picture.
    """
    fine = SIZE * _SUPERSAMPLING
    line = (np.arange(fine, dtype=np.float32) + 0.5) * np.float32(2 / fine) - 1
    x_HW = ((line[None, :] - center_x) / radius) * np.ones((fine, 1), np.float32)
    y_HW = ((-line[:, None] - center_y) / radius) * np.ones((1, fine), np.float32)
    color_HW3 = np.zeros((fine, fine, 3), np.float32)
    part_HW = np.zeros((fine, fine), np.int64)
    for part in _PARTS:  # later parts are painted over earlier ones
        inside_HW = _inside(part, x_HW, y_HW)
        color_HW3[inside_HW] = np.asarray(part.color, np.float32) / 255
        part_HW[inside_HW] = 1 + _NAMES.index(part.name)
    cover_HW = _shrink((part_HW > 0).astype(np.float32)[..., None])[..., 0]
    color_HW3 = np.divide(_shrink(color_HW3), np.maximum(cover_HW, 1e-6)[..., None], dtype=np.float32)
    middle = _SUPERSAMPLING // 2
    return Robot(color_HW3, cover_HW, part_HW[middle::_SUPERSAMPLING, middle::_SUPERSAMPLING])


def robot_score(picture_HW3: NDArray[np.uint8] | Floats) -> float:
    """How much a picture looks like the robot, in [0, 1]; see `robot_scores`."""
    return float(robot_scores(picture_HW3[None])[0])


def robot_scores(pictures_NHW3: NDArray[np.uint8] | Floats) -> Floats:
    """How much each picture looks like the robot in the middle: 1 is a perfect drawing.

    Of each of the robot's 8 parts, the share of its pixels that have the right colour; the mean over the
    parts, so that the small ones count as much as the body; the best over small shifts and three sizes.

    Args:
        pictures_NHW3: shape (N, 128, 128, 3), bytes, or floats in [0, 1].

    Returns:
        Scores in [0, 1], shape (N,).

    Raises:
        ValueError: if the pictures have another shape.
    """
    if pictures_NHW3.ndim != 4 or pictures_NHW3.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"pictures must have shape (N, {SIZE}, {SIZE}, 3); got {pictures_NHW3.shape}")
    parts = range(0, len(pictures_NHW3), _AT_ONCE)
    scores = [_best_match(pictures_NHW3[start : start + _AT_ONCE]) for start in parts]
    return np.concatenate(scores) if scores else np.zeros(0, np.float32)


def _best_match(pictures_NHW3: NDArray[np.uint8] | Floats) -> Floats:
    """Scores of a few pictures, shape (N,)."""
    scale = 255.0 if pictures_NHW3.dtype == np.uint8 else 1.0
    # One contiguous plane per channel: the inner loop below then runs over whole rows of memory.
    planes_3NHW = np.ascontiguousarray(np.moveaxis(pictures_NHW3, -1, 0), np.float32) / np.float32(scale)
    best_N = np.zeros(len(pictures_NHW3), np.float32)
    for radius in _RADII:
        template = _template(radius)
        for down in _SHIFTS:
            for right in _SHIFTS:
                np.maximum(best_N, _match(planes_3NHW, template, down, right), out=best_N)
    return best_N


@dataclass(frozen=True, slots=True)
class _Template:
    """A robot cut out of its picture: `top` and `left` say where it was, in pixels."""

    top: int
    left: int
    color_3HW: Floats
    weight_HW: Floats  # sums to 1: every part has the same share, spread over its pixels


@cache
def _template(radius: float) -> _Template:
    robot = draw_robot(0.0, 0.0, radius)
    weight_HW = np.zeros((SIZE, SIZE), np.float32)
    for index in range(1, len(_NAMES) + 1):
        of_part = robot.part_HW == index
        weight_HW[of_part] = 1 / (len(_NAMES) * int(of_part.sum()))
    rows, columns = (np.flatnonzero(weight_HW.any(axis=axis)) for axis in (1, 0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    color_3HW = np.ascontiguousarray(np.moveaxis(robot.color_HW3[box], -1, 0))
    return _Template(int(rows[0]), int(columns[0]), color_3HW, weight_HW[box])


def _match(planes_3NHW: Floats, template: _Template, down: int, right: int) -> Floats:
    """Weighted share of the template's pixels that have the right colour, shape (N,)."""
    height, width = template.weight_HW.shape
    top, left = template.top + down, template.left + right
    distance_NHW = np.zeros((planes_3NHW.shape[1], height, width), np.float32)
    for plane_NHW, color_HW in zip(planes_3NHW, template.color_3HW, strict=True):
        difference_NHW = plane_NHW[:, top : top + height, left : left + width] - color_HW
        distance_NHW += difference_NHW * difference_NHW
    right_NP = (distance_NHW < _TOLERANCE**2).reshape(len(distance_NHW), -1)
    scores_N: Floats = right_NP.astype(np.float32) @ template.weight_HW.reshape(-1)
    return scores_N


def _inside(part: _Part, x_HW: Floats, y_HW: Floats) -> NDArray[np.bool_]:
    """Where the part is, on a grid of robot units."""
    half_x, half_y = (part.right - part.left) / 2, (part.top - part.bottom) / 2
    x_HW = np.abs(x_HW - (part.left + half_x))
    y_HW = np.abs(y_HW - (part.bottom + half_y))
    inside: NDArray[np.bool_]
    if part.kind == "oval":
        inside = (x_HW / half_x) ** 2 + (y_HW / half_y) ** 2 <= 1
        return inside
    corner = min(_CORNER, half_x, half_y)
    over_x, over_y = np.maximum(x_HW - (half_x - corner), 0), np.maximum(y_HW - (half_y - corner), 0)
    inside = over_x**2 + over_y**2 <= corner**2
    return inside


def _shrink(fine_HWC: Floats) -> Floats:
    """Mean over each block of supersampled pixels."""
    height, width, channels = fine_HWC.shape
    step = _SUPERSAMPLING
    blocks = fine_HWC.reshape(height // step, step, width // step, step, channels)
    small: Floats = blocks.mean(axis=(1, 3), dtype=np.float32)
    return small
