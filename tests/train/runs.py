"""Small real runs: pictures drawn by a seed, a config for a tiny pipeline, what a run left behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from burnish.checkpoint.store import CheckpointStore, Loaded
from burnish.config.schema import RunConfig

SUBJECTS = (
    "a red chair",
    "a black cat",
    "two people walking",
    "blue sky",
    "a street at night",
    "a woman, portrait",
)


def picture_folder(folder: Path, count: int = 6, size: int = 64) -> Path:
    """`count` pictures of random blobs with captions, the same each time."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(5)
    for number in range(count):
        coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(
            f"a sks {SUBJECTS[number % len(SUBJECTS)]}, high quality, soft light"
        )
    return folder


def short_prompts(pipeline: Path, folder: Path, tokens: int = 16) -> Path:
    """A copy of a FLUX pipeline that pads captions to `tokens` rather than 512: the same code, in less time."""
    shutil.copytree(pipeline, folder)
    path = folder / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": tokens}))
    return folder


def run_config(
    model: Path, pictures: Path, output: Path, overrides: Mapping[str, Any] | None = None, name: str = "tiny"
) -> RunConfig:
    """A config for a tiny pipeline in float32; `overrides` are dotted paths."""
    values: dict[str, Any] = {
        "name": name,
        "seed": 11,
        "model": {"path": str(model)},
        "method": {"rank": 4, "alpha": 2, "dropout": 0.1, "targets": "attention"},
        "data": [
            {
                "kind": "folder",
                "path": str(pictures),
                "resolutions": [64],
                "flip": True,
                "captions": {"dropout": 0.1, "shuffle_tags": True, "keep_tags": 1, "variants": 3},
            }
        ],
        "train": {
            "steps": 8,
            "batch_size": 2,
            "precision": "fp32",
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
        },
        "sample": {"every": 0, "at_start": False},
        "save": {"folder": str(output), "every": 1000, "dtype": "float32"},
        "memory": {"device": "cpu", "cache": "ram"},
    }
    for path, value in (overrides or {}).items():
        set_path(values, path.split("."), value)
    return RunConfig.model_validate(values)


def set_path(values: Any, keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values[int(key)] if isinstance(values, list) else values.setdefault(key, {})
    values[keys[-1]] = value


def last_checkpoint(output: Path, name: str = "tiny") -> Loaded:
    store = CheckpointStore(output / name / "checkpoints")
    loaded = store.load_newest(verify="full")
    assert loaded is not None
    return loaded


def digest(loaded: Loaded) -> str:
    """One hash over every tensor of a checkpoint."""
    total = hashlib.sha256()
    for file in sorted(loaded.tensors):
        for name in sorted(loaded.tensors[file]):
            total.update(f"{file}/{name}".encode())
            total.update(loaded.tensors[file][name].contiguous().cpu().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
