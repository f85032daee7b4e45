"""Aspect-ratio buckets: which size a picture is trained at, and how it is brought there without enlarging it.

Sizes are in pixels as (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from burnish.latent_shape import PictureInfo

LEAST_AREA = 0.7  # of a bucket, as a share of resolution squared


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size that batches share."""

    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture is brought to a bucket: reduced to `resized`, then cut at `top`, `left`."""

    bucket: Bucket
    original: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int

    def describe(self, *, flipped: bool) -> PictureInfo:
        """What SDXL is told; in a mirrored picture the cut starts as far from the other side."""
        left = self.resized[1] - self.bucket.width - self.left if flipped else self.left
        return PictureInfo(self.original, (self.top, left), (self.bucket.height, self.bucket.width))

    def apply(self, picture: Image.Image, *, flipped: bool) -> Image.Image:
        """The picture at bucket size; Lanczos with antialiasing where it is reduced."""
        height, width = self.resized
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        box = (self.left, self.top, self.left + self.bucket.width, self.top + self.bucket.height)
        picture = picture.crop(box)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else picture

    @property
    def cut_share(self) -> float:
        """Share of the picture's area that is cut away, in [0, 1)."""
        return 1 - self.bucket.area / (self.resized[0] * self.resized[1])


@lru_cache(maxsize=256)
def buckets_for(resolution: int, step: int, max_aspect: float) -> tuple[Bucket, ...]:
    """All bucket sizes of one resolution: sides are multiples of `step`, the area at most resolution squared.

    For each short side the longest long side within both limits, where that comes near the full area; and
    the largest square. A resolution below `step` has none.
    """
    area, side = resolution * resolution, resolution // step * step
    if not side:
        return ()
    found = {Bucket(side, side)}
    for short in range(step, side, step):
        long = min(area // short, math.floor(short * max_aspect)) // step * step
        # A small bucket of the very aspect of a picture would waste most of its resolution.
        if long >= short and short * long >= LEAST_AREA * area:
            found.update((Bucket(short, long), Bucket(long, short)))
    return tuple(sorted(found))


def fit(height: int, width: int, resolution: int, step: int, max_aspect: float) -> Fit | None:
    """The bucket of the closest aspect; where that would enlarge, the largest bucket inside the picture.

    None where the picture is smaller than the smallest bucket, `step` by `step`.
    """
    candidates = buckets_for(resolution, step, max_aspect)
    if not candidates:
        return None
    aspect = math.log(width / height)
    best = min(candidates, key=lambda bucket: (abs(math.log(bucket.aspect) - aspect), -bucket.area))
    if best.height > height or best.width > width:
        inside = _largest_inside(height, width, resolution, step, max_aspect)
        if inside is None:
            return None
        best = inside
    return _cover(height, width, best)


def fits(
    height: int, width: int, resolutions: Sequence[int], step: int, max_aspect: float
) -> tuple[tuple[int, Fit], ...]:
    """One fit per resolution, as (resolution, fit); a bucket that two resolutions share is there once."""
    found: dict[Bucket, tuple[int, Fit]] = {}
    for resolution in sorted(set(resolutions), reverse=True):
        placed = fit(height, width, resolution, step, max_aspect)
        if placed is not None:
            found.setdefault(placed.bucket, (resolution, placed))
    return tuple(found.values())


def wanted_bucket(height: int, width: int, resolution: int, step: int, max_aspect: float) -> Bucket | None:
    """The bucket this picture would have if it were large enough: for the report of lost resolution."""
    placed = fit(height * resolution, width * resolution, resolution, step, max_aspect)
    return placed.bucket if placed else None


def _largest_inside(height: int, width: int, resolution: int, step: int, max_aspect: float) -> Bucket | None:
    aspect = math.log(width / height)
    inside = [
        bucket
        for side in range(step, min(height, resolution * resolution // step) + 1, step)
        if (bucket := _widest(side, width, resolution, step, max_aspect)) is not None
    ]
    if not inside:
        return None
    return max(inside, key=lambda bucket: (bucket.area, -abs(math.log(bucket.aspect) - aspect)))


def _widest(height: int, width: int, resolution: int, step: int, max_aspect: float) -> Bucket | None:
    longest = min(width, resolution * resolution // height, math.floor(height * max_aspect)) // step * step
    return Bucket(height, longest) if longest >= step and height <= longest * max_aspect else None


def cover(height: int, width: int, bucket: Bucket) -> Fit:
    """Scaled to cover `bucket`, up as well as down, and cut in the middle."""
    scale = max(bucket.height / height, bucket.width / width)
    resized = max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))
    top, left = (resized[0] - bucket.height) // 2, (resized[1] - bucket.width) // 2
    return Fit(bucket, (height, width), resized, top, left)


def _cover(height: int, width: int, bucket: Bucket) -> Fit:
    scale = max(bucket.height / height, bucket.width / width)
    resized = (
        min(height, max(bucket.height, round(height * scale))),
        min(width, max(bucket.width, round(width * scale))),
    )
    top, left = (resized[0] - bucket.height) // 2, (resized[1] - bucket.width) // 2
    return Fit(bucket, (height, width), resized, top, left)
