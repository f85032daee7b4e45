"""Sources that the base model draws itself, to keep it as it was (prior preservation, arXiv 2208.12242)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from burnish.config.data import Captions, Folder, Generated
from burnish.config.schema import Memory, Model
from burnish.data.folder import list_folder
from burnish.generate import draw_pictures_with
from burnish.sampling.outputs import write_picture
from burnish.sampling.sampler import PictureRequest


def own_folder(source: Generated) -> Folder | None:
    """The pictures of the class that the user has, as a source; None where there are none.

    Raises:
        DataError: `path` is no readable folder.
    """
    if not _count_there(source):
        return None
    return Folder(**{**_shared(source), "path": source.path, "captions": Captions(default=source.prompts[0])})


def missing_count(source: Generated) -> int:
    """How many pictures are to be drawn beside those that are there.

    Raises:
        DataError: `path` is no readable folder.
    """
    return max(0, source.count - _count_there(source))


def _count_there(source: Generated) -> int:
    return 0 if source.path is None else len(list_folder(source.path).pictures)


def drawn_folder(
    source: Generated,
    place: Path,
    model: Model,
    memory: Memory,
    identity: str,
    *,
    device: str,
    precision: str,
    progress: Callable[[int, int], None],
) -> Folder:
    """Draw `source.count` pictures into a folder below `place`, as far as they are not there, and describe it.

    The folder's name is a hash of all that the pictures depend on: another recipe draws elsewhere, and an
    interrupted one goes on.

    Args:
        identity: hash of the base model's weights; other weights mean other pictures.
    """
    side = max(source.resolutions)
    recipe = source.model_dump(mode="json", include={"prompts", "count", "steps", "guidance", "seed"})
    recipe |= {"side": side, "identity": identity, "precision": precision}
    if memory.weights not in ("auto", "native"):
        recipe["weights"] = memory.weights
    text = json.dumps(recipe, sort_keys=True)
    folder = place / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    missing = {
        path: request for path, request in requests_of(source, folder, side).items() if not path.exists()
    }
    pictures = draw_pictures_with(
        model,
        list(missing.values()),
        memory=memory,
        device=device,
        precision=precision,
        batch_size=source.batch_size,
        progress=progress,
    )
    for (path, request), picture in zip(missing.items(), pictures if missing else (), strict=True):
        write_picture(path, picture, request)
    return Folder(**{**_shared(source), "path": folder, "captions": Captions(on_missing="error")})


def _shared(source: Generated) -> dict[str, Any]:
    return {
        **{name: getattr(source, name) for name in Folder.model_fields if hasattr(source, name)},
        "kind": "folder",
    }


def requests_of(source: Generated, folder: Path, side: int) -> dict[Path, PictureRequest]:
    """What to draw, by file; the prompts take turns, and each picture has a seed of its own."""
    return {
        folder / f"{index + 1:06d}.png": PictureRequest(
            prompt=source.prompts[index % len(source.prompts)],
            seed=source.seed + index,
            height=side,
            width=side,
            steps=source.steps,
            guidance=source.guidance,
            frames=1,
        )
        for index in range(source.count)
    }
