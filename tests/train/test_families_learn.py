"""Every family: a short run lowers the loss, and its adapter does in diffusers' pipeline what it does in ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from numpy.random import default_rng
from PIL import Image
from released_widths import tiny_loaders
from tiny import Case, cases
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.config.schema import RunConfig
from burnish.data.batch import Batch
from burnish.data.prepare import pixels_of
from burnish.events import Listener
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.generate import attach_adapter
from burnish.latent_shape import PictureInfo
from burnish.objective import Denoising
from burnish.run import train_run
from burnish.sampling.sampler import EncodedRequest, PictureRequest, draw_latents, encode_requests

TinyFolder = Callable[[str], Path]
CASES = cases()
CAPTION = "a sks dog on a red chair"
STEPS, GUIDANCE, SIDE, SEED = 2, 3.0, 64, 7


def pictures(folder: Path, side: int) -> list[Image.Image]:
    folder.mkdir()
    draw, drawn = default_rng(1), []
    for number in range(2):
        blobs = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype="uint8"))
        drawn.append(blobs.resize((side, side), Image.Resampling.BICUBIC))
        drawn[-1].save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTION)
    return drawn


def clips(folder: Path, side: int, frames: int, fps: float) -> Tensor:
    """Two lossless clips in which a blob changes from frame to frame; their pixels, (2, 3, T, H, W)."""
    folder.mkdir()
    draw = default_rng(2)
    for number in range(2):
        with av.open(folder / f"{number}.mkv", "w") as file:
            stream = file.add_stream("ffv1", rate=round(fps))
            stream.width, stream.height, stream.pix_fmt = side, side, "bgr0"
            for _ in range(frames):
                blobs = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype="uint8"))
                picture = blobs.resize((side, side), Image.Resampling.BICUBIC)
                file.mux(stream.encode(av.VideoFrame.from_image(picture)))
            file.mux(stream.encode())
        (folder / f"{number}.txt").write_text(CAPTION)
    decoded = []
    for number in range(2):
        with av.open(folder / f"{number}.mkv") as file:
            decoded.append(torch.stack([pixels_of(one.to_image()) for one in file.decode(video=0)], dim=1))
    return torch.stack(decoded)


def train(model: Path, case: Case, folder: Path, **source: object) -> Path:
    config = RunConfig.model_validate(
        {
            "name": "trained",
            "model": {"path": str(model), "family": case.family},
            "method": {"rank": 4, "alpha": 10},
            "data": [
                {"kind": "folder", "path": str(folder / "pictures"), "resolutions": [case.side], **source}
            ],
            "train": {
                "steps": 20,
                "batch_size": 2,
                "precision": "fp32",
                "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
            },
            "sample": {"every": 0, "at_start": False},
            "save": {"folder": str(folder), "dtype": "float32"},
            "memory": {"device": "cpu", "cache": "ram"},
        }
    )
    adapter = train_run(config, progress=Listener()).adapter
    assert adapter is not None
    return adapter


def load(model: Path, case: Case) -> Family:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return family_named(case.family).load(ModelSource(str(model)), parts, dtype=torch.float32, device="cpu")


def still_pixels(family: Family, drawn: list[Image.Image]) -> Tensor:
    pixels = torch.stack([pixels_of(picture) for picture in drawn])
    return pixels.unsqueeze(2) if family.capabilities.video else pixels


def fixed_loss(family: Family, pixels: Tensor) -> float:
    """Of the training pictures or clips, at times from 0.05 to 0.95 and eight draws of noise."""
    drawn = range(len(pixels))
    height, width = pixels.shape[-2:]
    whole = [PictureInfo.whole(height, width)] * len(drawn)
    with torch.no_grad():
        batch = Batch(
            latents_BCHW=family.encode_pixels(pixels),
            conditioning=family.encode_prompts([CAPTION] * len(drawn))
            .merged(family.describe_pictures(whole))
            .merged(first_frames(family, pixels)),
            weight_B=torch.ones(len(drawn)),
            sample_ids=("0", "1"),
            paths=("0", "1"),
            position=0,
        )
        objective, losses = Denoising(family.schedule), []
        for number in range(8):
            noise = torch.randn(batch.latents_BCHW.shape, generator=torch.Generator().manual_seed(number))
            t_B = torch.full((len(drawn),), 0.05 + 0.9 * number / 7)
            t_B = (
                t_B
                if family.schedule.is_flow
                else (t_B * family.schedule.steps).floor() / family.schedule.steps
            )
            losses.append(objective.losses_at(family, batch, noise, t_B).mean())
    return float(torch.stack(losses).mean())


def first_frames(family: Family, pixels: Tensor) -> Conditioning:
    """What training tells of clips (2, 3, T, H, W) by themselves."""
    if not family.capabilities.first_frame or pixels.shape[2] == 1:
        return Conditioning({})
    shown = [pixels[:, :, 0], pixels[:, :, -1]][: family.capabilities.own_references]
    return family.encode_references(shown, frames=pixels.shape[2])


def ours(family: Family, case: Case) -> Tensor:
    can = family.capabilities
    # Such models draw nothing without a picture; `case.told` has what the denoiser is told of it.
    pictures = (Path("told"),) * can.own_references
    request = PictureRequest(
        CAPTION,
        "",
        SEED,
        *case.size,
        STEPS,
        GUIDANCE,
        frames=case.frames,
        references=pictures,
        mask=pictures[0] if can.masks else None,
    )
    encoded = encode_requests(family, [request])
    if case.told is not None:
        encoded = [told(one, case.told(family)) for one in encoded]
    return draw_latents(family, encoded, device="cpu", dtype=torch.float32)[0]


def told(one: EncodedRequest, more: Conditioning) -> EncodedRequest:
    return replace(
        one,
        conditioning=one.conditioning.merged(more),
        negative=None if one.negative is None else one.negative.merged(more),
    )


def theirs(model: Path, adapter: Path | None, case: Case, **parts: nn.Module) -> Tensor:
    """What diffusers draws with an adapter, or with `parts` in place of the pipeline's own."""
    pipeline = case.pipeline.from_pretrained(model)
    if parts:  # `from_pretrained` passes over those that a pipeline calls optional, as Wan's
        pipeline.register_modules(**parts)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        with tiny_loaders(case.loader_widths):
            pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    height, width = case.size
    drawn = pipeline(
        prompt=[CAPTION],
        height=height,
        width=width,
        num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(SEED)],
        output_type="latent",
        **{case.guidance_argument: GUIDANCE},
        **({"negative_prompt": [""]} if case.negatives else {}),
        **({"num_frames": case.frames} if case.frames > 1 else {}),
        **case.call,
    )
    found: Tensor = drawn.frames if hasattr(drawn, "frames") else drawn.images
    return case.unpack(pipeline, found.detach())[0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.learns])
def test_twenty_steps_lower_the_loss_and_diffusers_draws_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, name: str
) -> None:
    case, model = CASES[name], tiny_folder(name)
    drawn = pictures(tmp_path / "pictures", case.side)
    adapter = train(model, case, tmp_path)
    family = load(model, case)
    pixels = still_pixels(family, drawn)
    before, plain = fixed_loss(family, pixels), ours(family, case)
    attach_adapter(family, adapter, note=pytest.fail)
    assert fixed_loss(family, pixels) < 0.97 * before
    with_adapter = ours(family, case)
    assert (with_adapter - plain).abs().max() > 0.01, "the adapter has no effect to compare"
    if case.loads_adapters:
        torch.testing.assert_close(with_adapter, theirs(model, adapter, case), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, case in CASES.items()
        if case.learns and case.frames > 1 and (not case.told or "image" in case.call)
    ],
)
def test_twenty_steps_on_clips_lower_the_loss(tiny_folder: TinyFolder, tmp_path: Path, name: str) -> None:
    case, model = CASES[name], tiny_folder(name)
    family = load(model, case)
    pixels = clips(tmp_path / "pictures", case.side, case.frames, family.defaults.fps)
    assert pixels.shape == (2, 3, case.frames, case.side, case.side)
    adapter = train(model, case, tmp_path, frames=[case.frames])
    before = fixed_loss(family, pixels)
    attach_adapter(family, adapter, note=pytest.fail)
    assert fixed_loss(family, pixels) < 0.97 * before
