"""The pictures that teach "a sks robot": 16 robots on the world's backgrounds, none of them green."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from burnish.demo.robot import draw_robot

from .drawing import draw
from .world import BACKGROUNDS, COLORS, PLACE_DIRECTION, PLACES, sample_scenes, settle

_RADIUS: Final = 0.62
_PLAIN, _GRADIENT, _STRIPED, _DOTTED, _CHECKERED = range(5)
_CENTER, _LEFT, _RIGHT = 0, 2, 3  # places
_PLAIN_COLORS: Final = ("blue", "yellow", "white", "pink", "cyan", "purple", "gray", "black")
# background colour, background kind, place
_ROWS: Final = (
    *((color, _PLAIN, _CENTER) for color in _PLAIN_COLORS),
    ("blue", _STRIPED, _CENTER),
    ("yellow", _DOTTED, _CENTER),
    ("pink", _CHECKERED, _CENTER),
    ("cyan", _STRIPED, _CENTER),
    ("white", _PLAIN, _LEFT),
    ("blue", _PLAIN, _RIGHT),
    ("yellow", _PLAIN, _LEFT),
    ("purple", _PLAIN, _RIGHT),
)


def training_pictures() -> list[tuple[NDArray[np.uint8], str]]:
    """Pictures of shape (128, 128, 3) with their captions, the same every time."""
    scenes = sample_scenes(5, len(_ROWS))
    color, background = scenes.color.copy(), scenes.background.copy()
    for row, (name, kind, _) in enumerate(_ROWS):
        color[row, 2], background[row] = COLORS.index(name), kind
    scenes = settle(replace(scenes, two=np.zeros(len(_ROWS), bool), color=color, background=background))
    nothing = replace(scenes, position=np.full_like(scenes.position, 9.0))  # objects far outside the picture
    grounds = (draw(nothing).permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    return [
        (_paste(ground, place), _caption(row))
        for row, (ground, (_, _, place)) in enumerate(zip(grounds, _ROWS, strict=True))
    ]


def _paste(ground_HW3: NDArray[np.uint8], place: int) -> NDArray[np.uint8]:
    """The background with a robot on it, and a soft shadow 4 pixels right and 5 down."""
    across = float(PLACE_DIRECTION[place][0]) * (
        0.95 - 0.8 * _RADIUS
    )  # the robot is narrower than it is high
    robot = draw_robot(across, 0.0, _RADIUS)
    cover = Image.fromarray((robot.cover_HW * 255 + 0.5).astype(np.uint8))
    soft = cover.filter(ImageFilter.GaussianBlur(2)).point(lambda level: int(level * 0.22))
    shadow = Image.new("L", soft.size)
    shadow.paste(soft, (4, 5))
    picture = Image.fromarray(ground_HW3)
    picture = Image.composite(Image.new("RGB", picture.size), picture, shadow)
    figure = Image.fromarray((robot.color_HW3.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(Image.composite(figure, picture, cover))


def _caption(row: int) -> str:
    color, kind, place = _ROWS[row]
    where = f" {PLACES[place]}" if place else ""
    ground = f"on a {color} background" if kind == _PLAIN else f"on a {BACKGROUNDS[kind]} {color} background"
    return f"a sks robot{where} {ground}"
