"""Sliders on the embedded demo model: what is drawn at several strengths, against a measure and the formula."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from runs import run_config
from torch import Tensor

from burnish.config.schema import Model
from burnish.events import Listener
from burnish.family import Family
from burnish.generate import attach_adapter, draw_pictures_with
from burnish.model import choose_model
from burnish.run import train_run
from burnish.sampling.sampler import PictureRequest

SIDE = 128
TARGET, LARGE, SMALL = (f"a {size}red circle on a white background" for size in ("", "large ", "small "))
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def trained(output: Path, source: dict[str, Any], **more: Any) -> Path:
    values = {
        "data": [{"resolutions": [SIDE], **source}],
        "model.path": "demo",
        "method": {"rank": 4, "targets": "attention"},
        "train.batch_size": 2,
        "train.optimizer.learning_rate": 2e-3,
        "train.schedule": {"kind": "constant"},
        "train.validation": {"every": 100, "pictures": 1, "times": [0.5]},
        **more,
    }
    result = train_run(run_config(Path("demo"), output, output, values, "slider"), progress=Listener())
    assert result.best_loss is not None  # held out: its own loss, at fixed noise
    assert result.adapter is not None
    return result.adapter


def redness(adapter: Path, strength: float) -> float:
    """Share of what is red in two pictures of the target."""
    requests = [
        PictureRequest(prompt=TARGET, seed=seed, height=SIDE, width=SIDE, steps=10) for seed in (0, 1)
    ]
    drawn = draw_pictures_with(
        Model(path="demo"),
        requests,
        adapters=[(adapter, strength)],
        device="cpu",
        precision="fp32",
        batch_size=2,
    )
    return float(np.mean([red(picture) for picture in drawn if isinstance(picture, Image.Image)]))


def red(picture: Image.Image) -> float:
    red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0)
    return float(((red > 128) & (green < 128) & (blue < 128)).mean())


def says(family: Family, prompt: str, noisy: Tensor, t_B: Tensor) -> Tensor:
    told = family.encode_prompts([prompt]).rows([0] * len(noisy))
    return family.predict(noisy, t_B, told)


@torch.no_grad()
def test_prompts_make_a_slider_that_goes_where_the_formula_says(tmp_path: Path) -> None:
    slider = {"target": TARGET, "positive": LARGE, "negative": SMALL, "guidance": 2.0}
    source = {"kind": "generated", "count": 5, "steps": 5, "batch_size": 5, "slider": slider}
    with torch.enable_grad():
        adapter = trained(tmp_path, source, **{"train.steps": 24})
    shares = [redness(adapter, strength) for strength in STRENGTHS]
    assert all(one < other for one, other in pairwise(shares)), shares
    assert shares[1] < 0.7 * shares[2] < shares[2] < 0.7 * shares[3]

    # What it was taught, at latents that it was not taught at: noise, as the sampler begins with.
    family = choose_model(Model(path="demo")).load(
        "denoiser", "text_encoders", dtype=torch.float32, device="cpu"
    )
    noisy = torch.randn(4, *family.latents.of(SIDE, SIDE), generator=torch.Generator().manual_seed(3))
    t_B = torch.full((4,), 0.999)
    before, large, small = (says(family, one, noisy, t_B) for one in (TARGET, LARGE, SMALL))
    attached = attach_adapter(family, adapter, print)
    for strength in (1.0, -1.0):
        wanted = strength * 2.0 * (large - small)
        attached.multiplier = strength
        moved = says(family, TARGET, noisy, t_B) - before
        assert torch.cosine_similarity(moved.flatten(), wanted.flatten(), 0) > 0.5
        assert (moved - wanted).square().mean() < 0.8 * wanted.square().mean()


@pytest.fixture(scope="module")
def circles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of large and small red circles at the same places."""
    folder = tmp_path_factory.mktemp("circles")
    for number, (x, y) in enumerate([(64, 64), (56, 70), (70, 58)]):
        for name, radius in (("large", 48), ("small", 14)):
            picture = Image.new("RGB", (SIDE, SIDE), "white")
            ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill="red")
            (folder / name).mkdir(exist_ok=True)
            picture.save(folder / name / f"{number}.png")
    return folder


def test_pairs_of_pictures_make_a_slider(circles: Path, tmp_path: Path) -> None:
    source = {
        "path": str(circles / "large"),
        "captions": {"default": TARGET},
        "slider": {"kind": "pictures", "opposite": str(circles / "small")},
    }
    prompts = [{"prompt": TARGET, "seed": 0, "strength": strength} for strength in (-2.0, 0.0, 2.0)]
    sample = {"every": 0, "at_start": False, "size": SIDE, "steps": 8, "prompts": prompts}
    adapter = trained(tmp_path, source, **{"train.steps": 40, "sample": sample})
    drawn = sorted((tmp_path / "slider" / "samples").glob("step-*.png"))
    low, off, high = (red(Image.open(path)) for path in drawn)
    assert low < 0.7 * off < off < 0.7 * high
    assert [json.loads(path.with_suffix(".json").read_text())["strength"] for path in drawn] == [-2, 0, 2]
    shares = [redness(adapter, strength) for strength in STRENGTHS]
    assert all(one <= other for one, other in pairwise(shares)), shares
    assert shares[1] < 0.7 * shares[2] < shares[2] < 0.7 * shares[3], shares
