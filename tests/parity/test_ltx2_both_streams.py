"""LTX-2 with its sound draws what LTX2Pipeline draws: latents of both streams, and the waveform (fp32, CPU)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2Pipeline
from reference import NEGATIVES, PROMPTS, SEEDS, STEPS
from tiny import Case
from tiny.ltx2 import BOTH, BOTH_2_3
from torch import Tensor

from burnish.families.ltx2 import LTX2
from burnish.families.registry import detect_family
from burnish.family import ModelSource
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests

TOLERANCE = 1e-4
Built = Callable[[Case], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folders: dict[int, Path] = {}

    def folder_of(case: Case) -> Path:
        if id(case) not in folders:
            folders[id(case)] = tmp_path_factory.mktemp("both")
            case.build(0).save_pretrained(folders[id(case)])
        return folders[id(case)]

    return folder_of


def loaded(folder: Path) -> LTX2:
    source = ModelSource(str(folder), audio=True)
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    family = detect_family(source).load(source, parts, dtype=torch.float32, device="cpu")
    assert isinstance(family, LTX2)
    return family


def ours(family: LTX2, case: Case, guidance: float) -> tuple[Tensor, Tensor]:
    requests = [
        PictureRequest(prompt, negative, seed, *case.size, STEPS, guidance, frames=case.frames)
        for prompt, negative, seed in zip(PROMPTS, NEGATIVES, SEEDS, strict=True)
    ]
    drawn = draw_latents(family, encode_requests(family, requests), device="cpu", dtype=torch.float32)
    pairs = [one for one in drawn if isinstance(one, tuple)]
    assert len(pairs) == len(PROMPTS)
    frames, sounds = zip(*pairs, strict=True)
    return torch.stack(frames), torch.stack(sounds)


def theirs(folder: Path, case: Case, guidance: float, output: str) -> tuple[LTX2Pipeline, Any]:
    pipeline = LTX2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    height, width = case.size
    answer = pipeline(
        prompt=list(PROMPTS),
        negative_prompt=list(NEGATIVES),
        height=height,
        width=width,
        num_frames=case.frames,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        audio_guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type=output,
        **case.call,
    )
    return pipeline, answer


def assert_same(found: Tensor, reference: Tensor, least: float = 0.1) -> None:
    assert found.shape == reference.shape
    assert reference.std() > least, (
        "the reference is flat: it would not tell a wrong sampler from a right one"
    )
    torch.testing.assert_close(found, reference, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("case", "guidance"), [(BOTH, 1.0), (BOTH, 4.0), (BOTH_2_3, 3.0)])
def test_latents_of_both(built: Built, case: Case, guidance: float) -> None:
    family = loaded(built(case))
    frames, sound = ours(family, case, guidance)
    pipeline, answer = theirs(built(case), case, guidance, "latent")
    assert_same(frames, case.unpack(pipeline, answer.frames))
    mean, deviation = (
        values.view(1, sound.shape[1], 1, -1)
        for values in (pipeline.audio_vae.latents_mean, pipeline.audio_vae.latents_std)
    )
    assert_same(sound, (answer.audio - mean) / deviation)


@pytest.mark.parametrize("case", [BOTH, BOTH_2_3])
def test_the_waveform(built: Built, case: Case) -> None:
    family = loaded(built(case))
    assert family.audio is not None
    _, sound = ours(family, case, 1.0)
    pipeline, answer = theirs(built(case), case, 1.0, "pt")
    waveform = family.audio.decode(sound)
    assert family.audio.shape.decoded_rate == pipeline.vocoder.config.output_sampling_rate
    seconds = waveform.shape[-1] / family.audio.shape.decoded_rate
    assert seconds == pytest.approx(case.frames / 24, abs=0.05)
    assert_same(waveform, answer.audio, least=1e-3)
