"""Painting scenes with signed distance functions, many at once and on any device.

Shape letters: N pictures, H W height and width in pixels, xy a position with y up, all in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .world import CHECKERED, DOTTED, GRADIENT, RGB, SHAPES, SIZE, STRIPED, Look, Scenes


def draw(scenes: Scenes, device: torch.device | str = "cpu") -> Tensor:
    """Pictures of the scenes, shape (N, 3, 128, 128), in [0, 1]."""
    line = (torch.arange(SIZE, device=device, dtype=torch.float32) + 0.5) * (2 / SIZE) - 1
    x_1HW, y_1HW = line.view(1, 1, -1), -line.view(1, -1, 1)
    color = np.clip(RGB[scenes.color] + scenes.jitter, 0, 1)
    color[:, 2:] = color[:, 2:] * 0.85 + 0.15  # backgrounds are a little paler than objects
    color_N43 = torch.from_numpy(color).to(device)
    look = torch.from_numpy(scenes.look).to(device)
    image = _draw_background(scenes, color_N43, look, x_1HW, y_1HW)
    for which in (0, 1):
        image = _paint_object(image, scenes, which, color_N43[:, which], look, x_1HW, y_1HW)
    return image.clamp(0, 1)


def _die(look: Tensor, column: int) -> Tensor:
    """One column of the dice, shape (N, 1, 1)."""
    return look[:, column].view(-1, 1, 1)


def _draw_background(scenes: Scenes, color_N43: Tensor, look: Tensor, x_1HW: Tensor, y_1HW: Tensor) -> Tensor:
    """Shape (N, 3, H, W)."""
    kind = torch.from_numpy(scenes.background).to(look.device).view(-1, 1, 1)
    first, second = color_N43[:, 2, :, None, None], color_N43[:, 3, :, None, None]
    angle = torch.floor(_die(look, Look.ANGLE) * 4) * (math.pi / 4) + (_die(look, Look.TILT) - 0.5) * 0.1
    along = x_1HW * angle.cos() + y_1HW * angle.sin()
    across = y_1HW * angle.cos() - x_1HW * angle.sin()
    speed = math.pi * (2.2 + 1.8 * _die(look, Look.FREQUENCY))
    edge = SIZE / (2 * speed)  # makes the edge of a pattern one pixel wide
    wave_x = torch.sin(speed * along + 6.3 * _die(look, Look.PHASE_X))
    wave_y = torch.sin(speed * across + 6.3 * _die(look, Look.PHASE_Y))
    stripes = wave_x * edge * 0.7 + 0.5
    dots = (wave_x + wave_y - 1.05) * edge * 0.6 + 0.5
    checks = wave_x * wave_y * edge * 0.7 + 0.5
    pattern = torch.where(kind == STRIPED, stripes, torch.where(kind == DOTTED, dots, checks)).clamp(0, 1)
    strength = (0.26 + 0.14 * _die(look, Look.CONTRAST)) * ((kind >= STRIPED) & (kind <= CHECKERED))
    brightness = (first * first.new_tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    tint = torch.where(brightness > 0.62, first * 0.55, first * 0.45 + 0.55)  # darker on pale, paler on dark
    patterned = first + (tint - first) * (pattern * strength * 1.6).clamp(max=1).unsqueeze(1)
    ramp = ((along * 0.8 + 1) / 2).clamp(0, 1)
    blended = first + (second - first) * ramp.unsqueeze(1)
    return torch.where((kind == GRADIENT).unsqueeze(1), blended, patterned)


def _paint_object(
    image: Tensor,
    scenes: Scenes,
    which: int,
    color_N3: Tensor,
    look: Tensor,
    x_1HW: Tensor,
    y_1HW: Tensor,
) -> Tensor:
    """The pictures with object `which` and its shadow painted on, where the scene has it."""
    device = image.device
    position = torch.from_numpy(scenes.position[:, which]).to(device)
    radius = torch.from_numpy(scenes.radius[:, which]).to(device).view(-1, 1, 1)
    turn = (_die(look, Look.TURN_0 + which) - 0.5) * 0.36
    x_NHW = (x_1HW - position[:, 0].view(-1, 1, 1)) / radius
    y_NHW = (y_1HW - position[:, 1].view(-1, 1, 1)) / radius
    x_NHW, y_NHW = x_NHW * turn.cos() + y_NHW * turn.sin(), y_NHW * turn.cos() - x_NHW * turn.sin()
    used = np.ones(len(scenes), bool) if which == 0 else scenes.two
    distance, from_shadow = torch.full_like(x_NHW, 9.0), torch.full_like(x_NHW, 9.0)
    for number, shape in enumerate(SHAPES):
        rows = torch.from_numpy(np.flatnonzero(used & (scenes.shape[:, which] == number))).to(device)
        if len(rows):
            x, y = x_NHW[rows], y_NHW[rows]
            distance[rows] = signed_distance(shape, x, y)
            from_shadow[rows] = signed_distance(shape, x - 0.10, y + 0.13)
    pixels_per_unit = radius * (SIZE / 2)
    shadow = (0.5 - from_shadow / 0.22).clamp(0, 1) * (0.34 * _die(look, Look.SHADOW))
    image = image * (1 - shadow.unsqueeze(1))
    light_angle = _die(look, Look.LIGHT) * 6.283
    light = 1 + 0.15 * (x_NHW * light_angle.cos() + y_NHW * light_angle.sin()).clamp(-1, 1)
    has_rim = _die(look, Look.RIM) > 0.5
    rim = 1 - has_rim * 0.38 * ((distance + 0.13) * pixels_per_unit + 0.5).clamp(0, 1)
    paint = (color_N3[:, :, None, None] * (light * rim).unsqueeze(1)).clamp(0, 1)
    cover = (0.5 - distance * pixels_per_unit).clamp(0, 1).unsqueeze(1)  # anti-aliased over one pixel
    return image + (paint - image) * cover


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to a shape of radius about 1: negative inside, in units of the radius."""
    return _DISTANCE[shape](x, y)


def _fold(x: Tensor, y: Tensor, sectors: int) -> tuple[Tensor, Tensor]:
    """Fold the plane into one of `sectors` equal sectors around +y: distance along its axis, and off it."""
    radius = torch.hypot(x, y)
    angle = torch.remainder(torch.atan2(x, y) + math.pi / sectors, 2 * math.pi / sectors) - math.pi / sectors
    return radius * angle.cos(), (radius * angle.sin()).abs()


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y + 0.15
    return torch.maximum(0.866 * x.abs() + 0.5 * y, -y) - 0.52


def _star(x: Tensor, y: Tensor) -> Tensor:
    along, off = _fold(x, y, 5)
    inner_x, inner_y = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    normal_x, normal_y = inner_y, 1 - inner_x
    return ((along - 1) * normal_x + off * normal_y) / math.hypot(normal_x, normal_y)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    # after Inigo Quilez, "2D distance functions", the heart
    px, py = x.abs() * 0.6, y * 0.6 + 0.55
    lobe = torch.hypot(px - 0.25, py - 0.75) - math.sqrt(2) / 4
    middle = 0.5 * (px + py).clamp(min=0)
    tip = torch.minimum(torch.hypot(px, py - 1), torch.hypot(px - middle, py - middle)) * torch.sign(px - py)
    return torch.where(px + py > 1, lobe, tip) / 0.6


def _cross(x: Tensor, y: Tensor) -> Tensor:
    ax, ay = x.abs(), y.abs()
    return torch.minimum(torch.maximum(ax - 0.28, ay - 0.88), torch.maximum(ax - 0.88, ay - 0.28))


def _flower(x: Tensor, y: Tensor) -> Tensor:
    along, off = _fold(x, y, 6)
    return torch.minimum(torch.hypot(along - 0.58, off) - 0.32, torch.hypot(x, y) - 0.45)


def _arrow(x: Tensor, y: Tensor) -> Tensor:  # points up
    head = torch.maximum(0.78 * x.abs() + 0.62 * y - 0.56, 0.02 - y)
    return torch.minimum(head, torch.maximum(x.abs() - 0.26, (y + 0.42).abs() - 0.48))


_DISTANCE: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.88,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.76,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.66).abs() - 0.22,
    "cross": _cross,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.9, 0.74 - torch.hypot(x - 0.42, y)),
    "flower": _flower,
    "diamond": lambda x, y: (x.abs() / 0.62 + y.abs() / 0.95 - 1) * 0.52,
    "hexagon": lambda x, y: torch.maximum(x.abs() * 0.866 + y.abs() * 0.5, y.abs()) - 0.8,
    "arrow": _arrow,
}
