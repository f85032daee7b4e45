"""At which size a reference picture is taken, where several families do alike; sizes are (height, width) in pixels."""

from __future__ import annotations

from math import inf, sqrt


def shrunk(height: int, width: int, *, area: int, multiple: int, side: float = inf) -> tuple[int, int]:
    """Its own size in whole multiples, but with no more pixels than `area` and no longer a side than `side`."""
    scale = min(1.0, sqrt(area / (height * width)), side / max(height, width))
    rows, columns = (max(int(length * scale) // multiple, 1) for length in (height, width))
    return rows * multiple, columns * multiple


def of_area(area: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of that area in the shape of height x width, in multiples of 32 (Qwen-Image's rule)."""
    wide = sqrt(area * (width / height))
    tall = wide / (width / height)
    return max(round(tall / 32), 1) * 32, max(round(wide / 32), 1) * 32
