"""The picture world: what there is to draw, as arrays of scenes; `captions` and `drawing` do the rest.

A scene is one or two flat objects (12 shapes, 12 colours, 3 sizes) on a plain, gradient, striped, dotted or
checkered background. Everything follows from a seed.

Shape letters: N scenes, 2 objects (the second unused in a scene with one), 4 colours (object, object,
background, second background), xy a position with y up in a picture that spans [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SIZE: Final = 128  # width and height of a picture, in pixels
PALETTE: Final = {
    "red": (222, 44, 44),
    "orange": (245, 138, 30),
    "yellow": (250, 214, 48),
    "green": (48, 160, 68),
    "blue": (44, 92, 214),
    "purple": (132, 62, 182),
    "pink": (250, 134, 184),
    "brown": (126, 78, 44),
    "black": (28, 28, 34),
    "white": (246, 246, 246),
    "gray": (140, 142, 146),
    "cyan": (64, 202, 214),
}
COLORS: Final = tuple(PALETTE)
RGB: Final[Floats] = np.array(list(PALETTE.values()), np.float32) / 255
SHAPES: Final = (
    "circle", "square", "triangle", "star", "heart", "ring",
    "cross", "crescent", "flower", "diamond", "hexagon", "arrow",
)  # fmt: skip
BACKGROUNDS: Final = ("plain", "gradient", "striped", "dotted", "checkered")
RELATIONS: Final = ("to the left of", "to the right of", "above", "below", "next to", "and")
PLACES: Final = (
    "",
    "in the center",
    "on the left",
    "on the right",
    "at the top",
    "at the bottom",
    "in the top left corner",
    "in the top right corner",
    "in the bottom left corner",
    "in the bottom right corner",
)
PLACE_DIRECTION: Final[Floats] = np.array(
    [(0, 0), (0, 0), (-1, 0), (1, 0), (0, 1), (0, -1), (-1, 1), (1, 1), (-1, -1), (1, -1)], np.float32
)
SMALL, MEDIUM, LARGE = 0, 1, 2
GRADIENT, STRIPED, DOTTED, CHECKERED = 1, 2, 3, 4

# Radius by number of objects (rows) and size (columns): smallest and largest.
_RADIUS_LOW: Final[Floats] = np.array([[0.20, 0.36, 0.58], [0.18, 0.26, 0.36]], np.float32)
_RADIUS_HIGH: Final[Floats] = np.array([[0.27, 0.46, 0.72], [0.23, 0.33, 0.42]], np.float32)
_SETTLED_RADIUS: Final[Floats] = np.array([0.34, 0.5, 0.7], np.float32)
_SETTLED_RADIUS_OF_TWO: Final = 0.37
_TWO_SHARE: Final = 0.4  # of random scenes
_COLOR_DISTANCE: Final = 0.42  # least RGB distance of an object from its background

HARD_SHAPES: Final = {"star": 2.0, "flower": 2.0, "cross": 1.7, "hexagon": 1.7, "heart": 1.5, "square": 1.3}
"""How much more often than the others a tuning run shows the shapes that the base model gets wrong most."""


class Look(IntEnum):
    """Columns of `Scenes.look`: dice in [0, 1] for what no caption names."""

    ANGLE = 12
    TILT = 13
    FREQUENCY = 14
    PHASE_X = 15
    PHASE_Y = 16
    CONTRAST = 17
    LIGHT = 18
    TURN_0 = 19
    TURN_1 = 20
    SHADOW = 21
    RIM = 22


@dataclass(frozen=True, slots=True)
class Scenes:
    """N scenes: everything that a picture and its caption depend on."""

    two: NDArray[np.bool_]  # (N,) two objects?
    shape: Ints  # (N, 2) index into SHAPES
    size: Ints  # (N, 2) SMALL, MEDIUM or LARGE
    relation: Ints  # (N,) index into RELATIONS: where object 0 is, seen from object 1
    place: Ints  # (N,) index into PLACES; 0 for scenes with two objects
    background: Ints  # (N,) index into BACKGROUNDS
    color: Ints  # (N, 4) index into COLORS
    radius: Floats  # (N, 2)
    position: Floats  # (N, 2, xy)
    words: NDArray[np.float64]  # (N, 16) dice for the caption
    look: Floats  # (N, 24) dice for the picture, see Look
    jitter: Floats  # (N, 4, RGB) small changes of the colours

    def __len__(self) -> int:
        return len(self.two)

    def take(self, index: Ints | NDArray[np.bool_] | slice) -> Self:
        """The scenes at these places."""
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))


def sample_scenes(seed: int, count: int) -> Scenes:
    """Random scenes, two in five of them with two objects."""
    dice = np.random.default_rng(seed)
    two = dice.random(count) < _TWO_SHARE
    shape = dice.integers(0, len(SHAPES), (count, 2))
    size = dice.choice(3, (count, 2), p=(0.28, 0.44, 0.28))
    relation = dice.integers(0, len(RELATIONS), count)
    place = np.where(dice.random(count) < 0.5, 0, dice.integers(1, len(PLACES), count))
    background = dice.choice(5, count, p=(0.4, 0.15, 0.17, 0.14, 0.14))
    words = dice.random((count, 16))
    look = dice.random((count, 24)).astype(np.float32)
    color = _sample_colors(dice, background)
    # a large object fills the picture: no place word
    place = np.where(two | ((size[:, 0] == LARGE) & (place > 1)), 0, place)
    rows = two[:, None].astype(int)
    low, high = _RADIUS_LOW[rows, size], _RADIUS_HIGH[rows, size]
    radius = (low + (high - low) * look[:, 0:2]).astype(np.float32)
    position = _sample_positions(two, place, relation, radius, look)
    jitter = dice.normal(0, 0.018, (count, 4, 3)).astype(np.float32)
    return Scenes(two, shape, size, relation, place, background, color, radius, position, words, look, jitter)


def settle(scenes: Scenes) -> Scenes:
    """The same scenes without the random detail that no caption names.

    Upright shapes at fixed places and sizes, in even light: the prompt then fixes the picture, and a small
    model learns it sharply with far fewer samples.
    """
    look = scenes.look.copy()
    look[:, 12:] = [0.3, 0.5, 0.4, 0.25, 0.25, 0.5, 0.375, 0.5, 0.5, 0.7, 0, 0]  # stripes at 45 degrees
    look[scenes.background == GRADIENT, Look.ANGLE] = 0.6  # upwards
    look[(scenes.background == DOTTED) | (scenes.background == CHECKERED), Look.ANGLE] = 0
    two = scenes.two[:, None]
    radius = np.where(two, np.float32(_SETTLED_RADIUS_OF_TWO), _SETTLED_RADIUS[scenes.size])
    place = PLACE_DIRECTION[scenes.place] * (0.95 - radius[:, :1])
    # "next to" and "and" leave the side open: the first object is on the left then.
    side = np.array([(-1, 0), (1, 0), (0, 1), (0, -1), (-1, 0), (-1, 0)], np.float32)[scenes.relation] * 0.5
    position = np.stack([np.where(two, side, place), -side], 1).astype(np.float32)
    return replace(
        scenes,
        size=np.where(two, MEDIUM, scenes.size),
        radius=radius.astype(np.float32),
        position=position,
        look=look,
        jitter=np.zeros_like(scenes.jitter),
    )


def tuning_scenes(seed: int, count: int, *, two_share: float, hard_shapes: bool = True) -> Scenes:
    """Settled scenes for training.

    Args:
        seed: decides everything.
        count: number of scenes.
        two_share: share of scenes with two objects.
        hard_shapes: draw the shapes of `HARD_SHAPES` more often than the others.
    """
    scenes = sample_scenes(seed, count)
    dice = np.random.default_rng(seed + 1)
    if hard_shapes:
        weight = np.array([HARD_SHAPES.get(shape, 1.0) for shape in SHAPES])
        scenes = replace(scenes, shape=dice.choice(len(SHAPES), (count, 2), p=weight / weight.sum()))
    die = dice.random(count)
    keep, add = two_share / _TWO_SHARE, (two_share - _TWO_SHARE) / (1 - _TWO_SHARE)
    two = np.where(scenes.two, die < keep, die < add)
    return settle(replace(scenes, two=two, place=np.where(two, 0, scenes.place)))


def _sample_colors(dice: np.random.Generator, background: Ints) -> Ints:
    """Colours (N, 4) such that both objects stand out from the background."""
    color = dice.integers(0, len(COLORS), (len(background), 4))
    far = np.linalg.norm(RGB[:, None] - RGB[None], axis=-1) > _COLOR_DISTANCE
    for _ in range(40):
        first, second, ground, ground_2 = color.T
        on_gradient = far[first, ground_2] & far[second, ground_2] & (ground != ground_2)
        good = far[first, ground] & far[second, ground] & ((background != GRADIENT) | on_gradient)
        if good.all():
            break
        color[~good] = dice.integers(0, len(COLORS), (int((~good).sum()), 4))
    return color


def _sample_positions(
    two: NDArray[np.bool_], place: Ints, relation: Ints, radius: Floats, look: Floats
) -> Floats:
    """Positions (N, 2, xy) that agree with the place word or the relation."""
    count = len(two)
    free = 0.96 - radius
    # no place word: near the middle
    position = (look[:, 2:6].reshape(count, 2, 2) * 2 - 1) * 0.45 * free[..., None]
    direction = PLACE_DIRECTION[place]
    wobble = (direction == 0) * (look[:, 2:4] * 2 - 1) * 0.12
    aimed = direction * free[:, :1] * (0.7 + 0.3 * look[:, 6:7]) + wobble
    position[:, 0] = np.where((place > 0)[:, None], aimed, position[:, 0])
    any_side = np.where(relation == 4, (look[:, 7] * 2).astype(int), (look[:, 7] * 4).astype(int))
    side = np.where(relation < 4, relation, any_side)  # object 0 is left, right, above, below
    vertical = side >= 2
    sign = np.where((side == 0) | (side == 3), -1.0, 1.0)
    for which, toward in ((0, sign), (1, -sign)):
        reach = radius[:, which] + 0.03
        along = toward * (reach + look[:, 8 + which] * np.maximum(0.93 - 2 * radius[:, which], 0))
        across = (look[:, 10 + which] * 2 - 1) * 0.3 * free[:, which]
        apart = np.stack([np.where(vertical, across, along), np.where(vertical, along, across)], 1)
        position[:, which] = np.where(two[:, None], apart, position[:, which])
    placed: Any = position.astype(np.float32)
    return placed
