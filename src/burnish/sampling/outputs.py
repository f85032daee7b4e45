"""Numbered pictures, each with its prompt as .txt and everything that made it as .json."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from burnish import __version__
from burnish.atomic import atomic_write_bytes, atomic_write_text
from burnish.sampling.sampler import WARNING, PictureRequest

_NUMBERED = re.compile(r"(\d+)\.(png|txt|json)")


def next_number(folder: Path) -> int:
    """One more than the highest number that a picture in `folder`, or what belongs to one, has; 1 to begin with."""
    if not folder.is_dir():
        return 1
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    return max(numbers, default=0) + 1


def write_picture(
    path: Path, picture: Image.Image, request: PictureRequest, *, extra: Mapping[str, object] | None = None
) -> None:
    """Write a PNG at `path`, and a .txt and a .json of the same name; each is whole or not there.

    The picture comes last: where it is, the other two are.

    Args:
        extra: further JSON values, such as model and adapters.

    Raises:
        DiskFull: no space, or the folder cannot be written.
    """
    facts: dict[str, object] = {
        **asdict(request),
        "height": picture.height,
        "width": picture.width,
        **(extra or {}),
        "versions": {
            "burnish": __version__,
            **{package: version(package) for package in ("torch", "diffusers", "transformers")},
        },
    }
    if WARNING in picture.info:
        facts[WARNING] = picture.info[WARNING]
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    atomic_write_text(path.with_suffix(".txt"), request.prompt + "\n")
    atomic_write_text(path.with_suffix(".json"), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    atomic_write_bytes(path, encoded.getvalue())
