"""Pictures by way of Pillow, whose resizing encoders of pictures were trained with.

Shape letters: B batch, H W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def through_pillow(pixels_B3HW: Tensor, side: int, see: Callable[[Image.Image], Tensor]) -> Tensor:
    """What `see` makes of each picture, (B, 3, side, side) float32, where the pixels are.

    Args:
        pixels_B3HW: in [-1, 1]; rounded to 8 bits. Of a plan's, which have no data, the shape is answered alone.
        see: picture -> (3, side, side).
    """
    if isinstance(pixels_B3HW, FakeTensor):
        return pixels_B3HW.new_empty(len(pixels_B3HW), 3, side, side, dtype=torch.float32)
    return torch.stack([see(picture_of(one)) for one in pixels_B3HW]).to(pixels_B3HW.device)


def picture_of(pixels_3HW: Tensor) -> Image.Image:
    """Pixels in [-1, 1] as an RGB picture of 8 bits."""
    values_3HW = ((pixels_3HW.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values_3HW.permute(1, 2, 0).numpy())
