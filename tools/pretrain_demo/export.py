"""From trained float32 weights to the folder that the package ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import torch
from PIL import Image

from .dataset import training_pictures
from .models import load_pipeline

LARGEST_BYTES: Final = 11_000_000


def export(source: Path, out: Path) -> int:
    """Write the pipeline in float16; a README.md that is already in `out` stays.

    Returns:
        Size of the folder, in bytes.

    Raises:
        ValueError: if the folder is larger than the package allows.
    """
    readme = out / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    shutil.rmtree(out, ignore_errors=True)
    load_pipeline(source).to(torch.float16).save_pretrained(out)
    for path in out.rglob("*.json"):
        _forget_source(path)
    if text:
        readme.write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > LARGEST_BYTES:
        raise ValueError(f"{out} has {size / 1e6:.1f} MB; at most {LARGEST_BYTES / 1e6:.0f} MB may ship")
    return size


def _forget_source(path: Path) -> None:
    """Remove the name of the folder that a config was loaded from: it says something about this machine only."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_dataset(out: Path) -> int:
    """Write the pictures of "a sks robot", each with its caption beside it.

    Returns:
        Number of pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    examples = training_pictures()
    for number, (picture_HW3, caption) in enumerate(examples):
        Image.fromarray(picture_HW3).save(out / f"{number:02d}.png")
        (out / f"{number:02d}.txt").write_text(caption + "\n", encoding="utf-8")
    return len(examples)
