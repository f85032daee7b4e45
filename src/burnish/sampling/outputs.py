"""Numbered pictures and clips, each with its prompt as .txt and everything that made it as .json."""

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
from burnish.sampling.clip_file import encode_clip
from burnish.sampling.decoding import WARNING, Clip, Drawn
from burnish.sampling.sampler import PictureRequest

_NUMBERED = re.compile(r"(\d+)\.(png|mp4|txt|json)")


def next_number(folder: Path) -> int:
    """One more than the highest number that a picture in `folder`, or what belongs to one, has; 1 to begin with."""
    if not folder.is_dir():
        return 1
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    return max(numbers, default=0) + 1


def write_picture(
    path: Path, drawn: Drawn, request: PictureRequest, *, extra: Mapping[str, object] | None = None
) -> Path:
    """Write a PNG at `path`, or an MP4 beside it, and a .txt and a .json of the same name; each is whole or not there.

    The picture or clip comes last: where it is, the other two are.

    Args:
        extra: further JSON values, such as model and adapters.

    Returns:
        Where it was written: `path`, with .mp4 for a clip.

    Raises:
        DiskFull: no space, or the folder cannot be written.
    """
    frames = drawn.frames if isinstance(drawn, Clip) else (drawn,)
    told = asdict(request)
    if request.strength == 1.0:
        del told["strength"]
    facts: dict[str, object] = {
        **told,
        "references": [str(reference) for reference in request.references],
        "mask": str(request.mask) if request.mask is not None else None,
        "height": frames[0].height,
        "width": frames[0].width,
        "frames": len(frames),
        **({"fps": drawn.fps, "sound": drawn.sound is not None} if isinstance(drawn, Clip) else {}),
        **(extra or {}),
        "versions": {
            "burnish": __version__,
            **{package: version(package) for package in ("torch", "diffusers", "transformers")},
        },
    }
    if warnings := [frame.info[WARNING] for frame in frames if WARNING in frame.info]:
        facts[WARNING] = warnings[0]
    if isinstance(drawn, Clip):
        path, encoded = path.with_suffix(".mp4"), encode_clip(drawn.frames, drawn.fps, drawn.sound)
    else:
        encoded = _as_png(drawn)
    atomic_write_text(path.with_suffix(".txt"), request.prompt + "\n")
    atomic_write_text(path.with_suffix(".json"), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    atomic_write_bytes(path, encoded)
    return path


def _as_png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return data.getvalue()
