"""Pictures as Qwen2.5-VL and Qwen3-VL see them: sized, normed and cut into patches, without torchvision.

The same numbers as transformers' `Qwen2VLImageProcessor` on Pillow gives, with the settings that Qwen-Image's
releases come with.

Shape letters: H W height and width, N patches, D width of a patch, K pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MERGED = 2  # patches each way that become one token
FRAMES = 2  # a still picture counts twice in a patch


@dataclass(frozen=True, slots=True)
class Eyes:
    """What the generations of Qwen-VL differ in."""

    patch: int  # pixels each way
    fewest: int  # pixels of a picture
    most: int
    mean: tuple[float, float, float]  # by colour
    deviation: tuple[float, float, float]


QWEN25 = Eyes(
    patch=14,
    fewest=56 * 56,
    most=12_845_056,
    # Of the pictures that CLIP was trained on.
    mean=(0.48145466, 0.4578275, 0.40821073),
    deviation=(0.26862954, 0.26130258, 0.27577711),
)
QWEN3 = Eyes(patch=16, fewest=65_536, most=16_777_216, mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))


def patches(pictures: Sequence[Image.Image], eyes: Eyes = QWEN25) -> tuple[Tensor, Tensor]:
    """What the vision transformer reads, (N, D) float32, and for each picture (frames, rows, columns), (K, 3)."""
    seen, grids = [], []
    for picture in pictures:
        height, width = seen_size(picture.height, picture.width, eyes)
        values_HW3 = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        pixels_HW3 = torch.from_numpy(values_HW3.copy()).float() / 255
        normed_HW3 = (pixels_HW3 - torch.tensor(eyes.mean)) / torch.tensor(eyes.deviation)
        rows, columns = height // eyes.patch, width // eyes.patch
        # Patches in the order in which they are merged to tokens, colours outermost within a patch.
        blocks = normed_HW3.reshape(
            rows // MERGED, MERGED, eyes.patch, columns // MERGED, MERGED, eyes.patch, 3
        )
        blocks = blocks.permute(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
        seen.append(blocks.expand(-1, -1, -1, -1, -1, FRAMES, -1, -1).reshape(rows * columns, -1))
        grids.append([1, rows, columns])
    return torch.cat(seen), torch.tensor(grids)


def tokens(grids_K3: Tensor) -> list[int]:
    """Tokens that each picture becomes."""
    return [int(count) // MERGED**2 for count in grids_K3.prod(1).tolist()]


def seen_size(height: int, width: int, eyes: Eyes = QWEN25) -> tuple[int, int]:
    """The nearest size of whole tokens, with neither too few nor too many pixels."""
    factor = eyes.patch * MERGED
    rows, columns = (round(length / factor) for length in (height, width))
    pixels = rows * columns * factor**2
    if pixels > eyes.most:
        shrink = sqrt(height * width / eyes.most)
        rows, columns = (max(1, floor(length / shrink / factor)) for length in (height, width))
    elif pixels < eyes.fewest:
        grow = sqrt(eyes.fewest / (height * width))
        rows, columns = (ceil(length * grow / factor) for length in (height, width))
    return rows * factor, columns * factor
