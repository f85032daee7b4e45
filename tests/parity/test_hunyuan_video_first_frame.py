"""HunyuanVideo's image to video draws what its pipeline draws from the same first frame, in both ways it is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_rules import load
from numpy.random import default_rng
from PIL import Image
from reference import PROMPTS, SEEDS, STEPS
from released_widths import tiny_loaders
from tiny import cases
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from burnish.conditioning import Conditioning
from burnish.data.prepare import pixels_of
from burnish.events import Listener
from burnish.families import clip_vision, hunyuan_first_frame, llava
from burnish.families.registry import detect_family, families
from burnish.family import ModelSource, NegativePrompt
from burnish.generate import attach_adapter
from burnish.run import train_run
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests, with_references

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from runs import run_config
from test_families_learn import clips

TinyFolder = Callable[[str], Path]
SIZE, FRAMES = (32, 48), 9
RELEASES = ("hunyuan_video_i2v", "hunyuan_video_i2v_concat")
FRAME = hunyuan_first_frame.FIRST_FRAME


def picture(seed: int, height: int, width: int) -> Image.Image:
    blobs = Image.fromarray(default_rng(seed).integers(0, 256, (4, 4, 3), dtype="uint8"))
    return blobs.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        picture(number, *SIZE).save(file)
    return files


def loaded(folder: Path) -> Any:
    source = ModelSource(str(folder))
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return detect_family(source).load(source, parts, dtype=torch.float32, device="cpu")


def ours(family: Any, pictures: list[Path], true_guidance: float = 1.0) -> Tensor:
    requests = [
        PictureRequest(
            prompt,
            "blurry",
            seed,
            *SIZE,
            STEPS,
            family.defaults.guidance,
            frames=FRAMES,
            references=(file,),
            true_guidance=true_guidance,
        )
        for prompt, seed, file in zip(PROMPTS, SEEDS, pictures, strict=True)
    ]
    encoded = with_references(family, encode_requests(family, requests), device="cpu")
    return torch.stack(draw_latents(family, encoded, device="cpu", dtype=torch.float32))


def theirs(
    name: str,
    folder: Path,
    pictures: list[Path],
    output: str,
    adapter: Path | None = None,
    rows: slice = slice(None),
    **call: Any,
) -> Tensor:
    pipeline = cases()[name].pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        with tiny_loaders(cases()[name].loader_widths):
            load(pipeline, adapter)
    drawn: Tensor = pipeline(
        image=[Image.open(file) for file in pictures[rows]],
        prompt=list(PROMPTS[rows]),
        height=SIZE[0],
        width=SIZE[1],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=cases()[name].guidance[0],
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS[rows]],
        output_type=output,
        **call,
    ).frames.detach()
    return drawn


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", RELEASES)
def test_latents_are_those_of_the_pipeline(tiny_folder: TinyFolder, pictures: list[Path], name: str) -> None:
    folder = tiny_folder(name)
    assert_same(ours(loaded(folder), pictures), theirs(name, folder, pictures, "latent"))


def test_guidance_of_the_release_that_embeds_none_is_that_of_the_pipeline(
    tiny_folder: TinyFolder, pictures: list[Path]
) -> None:
    name = "hunyuan_video_i2v_concat"
    folder = tiny_folder(name)
    # The pipeline shows one black picture to all negative prompts, so it takes one prompt at a time.
    expected = [
        theirs(
            name,
            folder,
            pictures,
            "latent",
            rows=slice(row, row + 1),
            true_cfg_scale=4.0,
            negative_prompt=["blurry"],
        )
        for row in range(len(PROMPTS))
    ]
    assert_same(ours(loaded(folder), pictures, 4.0), torch.cat(expected))


@pytest.mark.parametrize("name", RELEASES)
def test_pixels_are_those_of_the_pipeline(tiny_folder: TinyFolder, pictures: list[Path], name: str) -> None:
    folder = tiny_folder(name)
    family = loaded(folder)
    with torch.no_grad():
        pixels = family.decode_latents(ours(family, pictures)).transpose(1, 2)
    assert_same((pixels / 2 + 0.5).clamp(0, 1), theirs(name, folder, pictures, "pt"))


@pytest.mark.parametrize("name", RELEASES)
def test_prompt_and_denoiser_both_see_the_picture(tiny_folder: TinyFolder, name: str) -> None:
    family = loaded(tiny_folder(name))
    assert [kind for kind in families().values() if kind.detect(ModelSource(str(tiny_folder(name))))] == [
        type(family)
    ]
    first, second = (pixels_of(picture(seed, *SIZE)) for seed in (5, 6))
    prompts = [family.encode_prompts(["a cat"], [[one]]) for one in (first, second)]
    assert not torch.allclose(prompts[0]["tokens_BSD"], prompts[1]["tokens_BSD"], atol=1e-3)
    shown = [family.encode_references([one[None]], frames=FRAMES) for one in (first, second)]
    noisy, t_B, _ = family.example(*SIZE, batch=1, frames=FRAMES)
    answers = [family.predict(noisy, t_B, prompts[0].merged(one))[:, :, 1:] for one in shown]
    assert not torch.allclose(*answers, atol=1e-4)
    alone = family.predict(noisy, t_B, prompts[0])
    assert not torch.allclose(answers[0], alone[:, :, 1:], atol=1e-4)
    # What is to be kept away from is read beside a black picture, whatever is shown.
    kept_away = family.encode_prompts([NegativePrompt("a cat")], [[first]])
    black = family.encode_prompts(["a cat"], [[torch.full((3, 40, 40), -1.0)]])
    torch.testing.assert_close(kept_away["tokens_BSD"], black["tokens_BSD"])


def test_a_picture_by_itself_is_no_first_frame(tiny_folder: TinyFolder) -> None:
    """It would be told what it is to learn."""
    for name in RELEASES:
        family = loaded(tiny_folder(name))
        noisy, t_B, told = family.example(*SIZE, batch=2)
        shown = family.encode_references([torch.stack([pixels_of(picture(5, *SIZE))] * 2)])
        assert torch.equal(family.predict(noisy, t_B, told.merged(shown)), family.predict(noisy, t_B, told))
        moved = family.predict(noisy, t_B / 2, told)
        assert not torch.allclose(moved, family.predict(noisy, t_B, told), atol=1e-4)


def test_long_and_short_captions_are_read_as_alone(tiny_folder: TinyFolder) -> None:
    family = loaded(tiny_folder("hunyuan_video_i2v"))
    seen = [pixels_of(picture(seed, *SIZE)) for seed in (1, 2)]
    captions = ["a cat", "a dog on a red chair " * 4]
    together = family.encode_prompts(captions, [[one] for one in seen])
    rows = [family.encode_prompts([text], [[one]]) for text, one in zip(captions, seen, strict=True)]
    collated = Conditioning.collate(rows)
    for key in ("tokens_BSD", "mask_BS"):
        torch.testing.assert_close(together[key], collated[key], atol=1e-5, rtol=1e-4)
    cut = family.encode_prompts(["a cat " * 400], [[seen[0]]])
    patches = llava.PATCHES // hunyuan_first_frame.EVERY["token_replace"]
    assert cut["mask_BS"].sum() == patches + family.prompt_limit - hunyuan_first_frame.ANSWER_TOKENS


@pytest.mark.parametrize("size", [(336, 336), (64, 48), (400, 700)])
def test_pictures_are_seen_as_by_transformers(size: tuple[int, int]) -> None:
    seen = picture(4, *size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    expected = processor(seen, return_tensors="pt").pixel_values
    torch.testing.assert_close(
        clip_vision.prepared(pixels_of(seen)[None], llava.SIDE), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", RELEASES)
def test_clips_are_learned_from_their_first_frame_and_diffusers_draws_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, pictures: list[Path], name: str
) -> None:
    folder, heard = tiny_folder(name), Losses()
    clips(tmp_path / "clips", 64, 5, 24.0)
    source = {"path": str(tmp_path / "clips"), "resolutions": [64], "frames": [5]}
    config = run_config(
        folder,
        tmp_path / "clips",
        tmp_path / "runs",
        {
            "data": [source],
            "train.steps": 20,
            "train.batch_size": 2,
            "train.optimizer": {"kind": "adamw", "learning_rate": 1e-2},
            "save.dtype": "float32",
        },
    )
    adapter = train_run(config, progress=heard).adapter
    assert adapter is not None
    assert np.mean(heard.found[-5:]) < 0.97 * np.mean(heard.found[:5])
    family = loaded(folder)
    plain = ours(family, pictures)
    attach_adapter(family, adapter, note=pytest.fail)
    with_adapter = ours(family, pictures)
    assert (with_adapter - plain).abs().max() > 0.01
    assert_same(with_adapter, theirs(name, folder, pictures, "latent", adapter))


class Losses(Listener):
    def __init__(self) -> None:
        self.found: list[float] = []

    def stepped(self, report: Any) -> None:
        self.found.append(report.loss)
