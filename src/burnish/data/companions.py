"""Pictures that belong to a sample's own: references that the model is shown, and masks of what it is to fill.

Shape letters: H W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from burnish.data.buckets import Fit
from burnish.randomness import python_random

WHITE = 128  # and above: to be filled
HOLES_VERSION = 1  # part of the cache key of drawn masks: raise it when other holes would be drawn


@dataclass(frozen=True, slots=True)
class Companion:
    """A picture beside the sample's own, and how it is brought to `size` (height, width)."""

    path: Path
    sha256: str
    fit: Fit
    size: tuple[int, int]

    def apply(self, picture: Image.Image, *, flipped: bool) -> Image.Image:
        """As the model sees it; reduced once more where it is taken smaller than the sample's own picture."""
        placed = self.fit.apply(picture, flipped=flipped)
        height, width = self.size
        if placed.size == (width, height):
            return placed
        return placed.resize((width, height), Image.Resampling.LANCZOS)

    def key(self) -> dict[str, object]:
        """What of it an encoding depends on, as JSON."""
        bucket = self.fit.bucket
        return {
            "file": self.sha256,
            "resized": self.fit.resized,
            "crop": [self.fit.top, self.fit.left, bucket.height, bucket.width],
            "size": self.size,
        }


def mask_values(picture: Image.Image) -> Tensor:
    """(1, H, W) float32: 1 where a picture in mode RGB is light, which is to be filled, 0 elsewhere."""
    values_HW = np.asarray(picture.convert("L"))
    return torch.from_numpy((values_HW >= WHITE).astype(np.float32))[None]


def drawn_holes(sha256: str, height: int, width: int) -> Image.Image:
    """A mask of one to four rectangles and ellipses, mode RGB; the same for the same content and size.

    Sides are from an eighth to two thirds of the picture's, so that neither nothing nor everything is to be filled.
    """
    random = python_random("holes", sha256, height, width)
    mask = Image.new("RGB", (width, height), "black")
    ink = ImageDraw.Draw(mask)
    for _ in range(random.randint(1, 4)):
        tall = max(1, round(height * random.uniform(1 / 8, 2 / 3)))
        wide = max(1, round(width * random.uniform(1 / 8, 2 / 3)))
        top, left = random.randint(0, height - tall), random.randint(0, width - wide)
        box = (left, top, left + wide - 1, top + tall - 1)
        shape = ink.rectangle if random.random() < 0.5 else ink.ellipse
        shape(box, fill="white")
    return mask
