"""Sources that the base model draws itself, to keep it as it was (prior preservation, arXiv 2208.12242)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from burnish.atomic import atomic_write_text
from burnish.config.data import Captions, Folder, Generated
from burnish.config.schema import Model
from burnish.generate import draw_pictures_with
from burnish.sampling.sampler import PictureRequest

DONE = "drawn.json"


def drawn_folder(
    source: Generated,
    folder: Path,
    model: Model,
    identity: str,
    *,
    device: str,
    precision: str,
    progress: Callable[[int, int], None],
) -> Folder:
    """Draw the pictures of `source` into `folder`, unless the same were drawn there before, and describe them.

    Args:
        identity: hash of the base model's weights; other weights mean other pictures.
    """
    recipe = {"identity": identity, "precision": precision, **source.model_dump(mode="json")}
    done = folder / DONE
    if not done.exists() or json.loads(done.read_text()) != recipe:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        draw_into(source, folder, model, device=device, precision=precision, progress=progress)
        atomic_write_text(done, json.dumps(recipe))  # last: a folder without it is drawn again
    shared = {name: getattr(source, name) for name in Folder.model_fields if hasattr(source, name)}
    return Folder(**{**shared, "kind": "folder", "path": folder, "captions": Captions(on_missing="error")})


def draw_into(
    source: Generated,
    folder: Path,
    model: Model,
    *,
    device: str,
    precision: str,
    progress: Callable[[int, int], None],
) -> None:
    side = source.resolutions[0]
    prompts = [source.prompts[index % len(source.prompts)] for index in range(source.count)]
    requests = [
        PictureRequest(
            prompt=prompt,
            seed=source.seed + index,
            height=side,
            width=side,
            steps=source.steps,
            guidance=source.guidance,
        )
        for index, prompt in enumerate(prompts)
    ]
    pictures = draw_pictures_with(
        model, requests, device=device, precision=precision, batch_size=source.batch_size, progress=progress
    )
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True), 1):
        picture.save(folder / f"{index:06d}.png")
        (folder / f"{index:06d}.txt").write_text(prompt, encoding="utf-8")
