"""From the same seed our sampler draws what each family's diffusers pipeline draws (fp32, CPU)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from reference import NEGATIVES, PROMPTS, SEEDS, STEPS
from tiny import Case, cases
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.families.registry import detect_family
from burnish.family import Family, ModelSource
from burnish.sampling.sampler import EncodedRequest, PictureRequest, draw_latents, encode_requests

TOLERANCE = 1e-4
TinyFolder = Callable[[str], Path]
CASES = {name: case for name, case in cases().items() if not case.compared_in}


def loaded(folder: Path) -> Family:
    source = ModelSource(str(folder))
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return detect_family(source).load(source, parts, dtype=torch.float32, device="cpu")


def ours(family: Family, case: Case, guidance: float) -> Tensor:
    height, width = case.size
    can = family.capabilities
    # Such models draw nothing without a picture; `case.told` has what the denoiser is told of it.
    pictures = (Path("told"),) * can.own_references
    requests = [
        PictureRequest(
            prompt,
            negative if case.negatives else "",
            seed,
            height,
            width,
            STEPS,
            guidance,
            frames=case.frames,
            references=pictures,
            mask=pictures[0] if can.masks else None,
        )
        for prompt, negative, seed in zip(PROMPTS, NEGATIVES, SEEDS, strict=True)
    ]
    encoded = encode_requests(family, requests)
    if case.told is not None:
        encoded = [told(one, case.told(family)) for one in encoded]
    return torch.stack(draw_latents(family, encoded, device="cpu", dtype=torch.float32))


def told(one: EncodedRequest, more: Conditioning) -> EncodedRequest:
    return replace(
        one,
        conditioning=one.conditioning.merged(more),
        negative=None if one.negative is None else one.negative.merged(more),
    )


def theirs(folder: Path, case: Case, guidance: float, output: str) -> Tensor:
    pipeline = case.pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    height, width = case.size
    call: dict[str, Any] = {case.guidance_argument: guidance, **case.call}
    if case.frames > 1:
        call["num_frames"] = case.frames
    drawn: list[Tensor] = []
    size = len(PROMPTS) if case.batched else 1
    for first in range(0, len(PROMPTS), size):
        chosen = slice(first, first + size)
        answer = pipeline(
            prompt=list(PROMPTS[chosen]),
            height=height,
            width=width,
            num_inference_steps=STEPS,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS[chosen]],
            output_type=output,
            **({"negative_prompt": list(NEGATIVES[chosen])} if case.negatives else {}),
            **call,
        )
        drawn.append(answer.frames if hasattr(answer, "frames") else answer.images)
    found = torch.cat(drawn).detach()
    return case.unpack(pipeline, found) if output == "latent" else found


def assert_same(found: Tensor, reference: Tensor) -> None:
    assert found.shape == reference.shape
    assert reference.std() > 0.1, "the reference is flat: it would not tell a wrong sampler from a right one"
    torch.testing.assert_close(found, reference, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "guidance"), [(name, scale) for name, case in CASES.items() for scale in case.guidance]
)
def test_latents(tiny_folder: TinyFolder, name: str, guidance: float) -> None:
    folder, case = tiny_folder(name), CASES[name]
    assert_same(ours(loaded(folder), case, guidance), theirs(folder, case, guidance, "latent"))


@pytest.mark.parametrize("name", CASES)
def test_pixels(tiny_folder: TinyFolder, name: str) -> None:
    folder, case = tiny_folder(name), CASES[name]
    family = loaded(folder)
    reference = theirs(folder, case, case.guidance[0], "pt")
    latents = ours(family, case, case.guidance[0])
    with torch.no_grad():
        pixels = torch.cat([family.decode_latents(one[None]) for one in latents])
    if pixels.dim() == 5:  # diffusers puts the frames before the channels
        pixels = pixels.transpose(1, 2)
    assert_same((pixels / 2 + 0.5).clamp(0, 1), reference)


def test_a_family_that_has_a_pipeline_is_compared() -> None:
    others = [name for name, case in CASES.items() if not issubclass(case.pipeline, DiffusionPipeline)]
    # A modular pipeline of diffusers; and what diffusers lacks, compared with the published equations.
    assert others == ["anima", "omnigen2"]
    elsewhere = {case.compared_in for name, case in cases().items() if name not in CASES}
    assert all((Path(__file__).parent / file).is_file() for file in elsewhere)
