"""The whole way: a run trains an adapter, diffusers loads its file, and both draw the same pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from numpy.random import default_rng
from PIL import Image
from reference import HEIGHT, NEGATIVES, PROMPTS, SEEDS, STEPS, WIDTH
from torch import Tensor

from burnish.config.schema import RunConfig
from burnish.events import Listener
from burnish.families.registry import detect_family
from burnish.family import ModelSource
from burnish.generate import attach_adapter
from burnish.run import train_run
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests

GUIDANCE = 3.0
SAVED = {"sd15": "kohya", "sdxl": "kohya", "flux": "diffusers"}


def train(folder: Path, output: Path) -> Path:
    pictures = output / "pictures"
    pictures.mkdir()
    draw = default_rng(1)
    for number in range(3):
        blobs = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype="uint8"))
        blobs.resize((64, 64), Image.Resampling.BICUBIC).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a sks dog on a red chair")
    config = RunConfig.model_validate(
        {
            "name": "trained",
            "model": {"path": str(folder)},
            "method": {"rank": 4, "alpha": 10, "targets": "all"},
            "data": [{"kind": "folder", "path": str(pictures), "resolutions": [64]}],
            "train": {
                "steps": 12,
                "precision": "fp32",
                "optimizer": {"kind": "adamw", "learning_rate": 2e-2},
                "ema": {"decay": 0.5},
            },
            "sample": {"every": 0, "at_start": False},
            "save": {"folder": str(output), "dtype": "float32"},
            "memory": {"device": "cpu", "cache": "ram"},
        }
    )
    adapter = train_run(config, progress=Listener()).adapter
    assert adapter is not None
    return adapter


def ours(folder: Path, adapter: Path) -> Tensor:
    source = ModelSource(str(folder))
    parts = frozenset(("denoiser", "text_encoders"))
    family = detect_family(source).load(source, parts, dtype=torch.float32, device="cpu")
    attach_adapter(family, adapter, note=pytest.fail)
    requests = [
        PictureRequest(prompt, negative, seed, HEIGHT, WIDTH, STEPS, GUIDANCE)
        for prompt, negative, seed in zip(PROMPTS, NEGATIVES, SEEDS, strict=True)
    ]
    return torch.stack(
        draw_latents(family, encode_requests(family, requests), device="cpu", dtype=torch.float32)
    )


def theirs(folder: Path, adapter: Path | None, flux: bool) -> Tensor:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    call = {} if flux else {"negative_prompt": list(NEGATIVES)}
    drawn: Tensor = pipeline(
        prompt=list(PROMPTS),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **call,
    ).images
    if not flux:
        return drawn.detach()
    return pipeline._unpack_latents(drawn, HEIGHT, WIDTH, pipeline.vae_scale_factor).detach()


@pytest.mark.parametrize("name", sorted(SAVED))
def test_a_trained_adapter_draws_the_same_in_diffusers(
    tiny_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = tiny_folder(name)
    adapter = train(folder, tmp_path)
    with_adapter, without = (theirs(folder, file, name == "flux") for file in (adapter, None))
    assert (with_adapter - without).abs().max() > 0.01, "the adapter has no effect to compare"
    torch.testing.assert_close(ours(folder, adapter), with_adapter, atol=1e-4, rtol=0)
