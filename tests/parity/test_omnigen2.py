"""OmniGen2 against the published equations written down once more (`omnigen2_reference.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omnigen2_reference import OmniGen2Pipeline, times, velocity
from reference import NEGATIVES, PROMPTS, SEEDS, STEPS
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.families.omnigen2 import OmniGen2
from burnish.families.registry import detect_family
from burnish.family import ModelSource
from burnish.sampling.sampler import EncodedRequest, PictureRequest, draw_latents, encode_requests

TinyFolder = Callable[[str], Path]
SIZE = (32, 48)
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Of |data - noise| summed over the latents of `sample`, as the reference computed it from the tiny weights of seed 0.
SUM_WITHOUT, SUM_WITH = 707.45813, 711.95941


@pytest.fixture
def folder(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("omnigen2")


@pytest.fixture
def family(folder: Path) -> Any:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    return OmniGen2.load(ModelSource(str(folder)), parts, dtype=torch.float32, device="cpu")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    return [random(number, 1, 3, *size).clamp(-1, 1) for number, size in enumerate(sizes)]


def sample() -> tuple[Tensor, Tensor]:
    """Latents (C, H, W) and words (S, D)."""
    return random(1, 16, 8, 12), random(2, 9, 256)


def told(words: Tensor, references: Conditioning | None = None, *, follows: bool = True) -> Conditioning:
    plain = {"tokens_BSD": words[None], "mask_BS": torch.ones(1, len(words), dtype=torch.bool)}
    return Conditioning({**plain, "follows_B": torch.tensor([follows]), **(references or {})})


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_the_prediction_is_that_of_the_equations(family: Any, folder: Path, count: int) -> None:
    pipeline = OmniGen2Pipeline.from_pretrained(folder)
    sizes = [(64, 48), (32, 96), (48, 48), (16, 32), (80, 16)][:count]
    seen = family.encode_references(pictures(*sizes))
    latents, words = sample()
    with torch.no_grad():
        references = [pipeline.encoded(one[0]) for one in pictures(*sizes)]
        expected = velocity(pipeline.transformer, pipeline.config, latents, 0.3, words, references)
        found = family.predict(latents[None], torch.tensor([0.7]), told(words, seen))[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, -expected, atol=1e-4, rtol=0)


def test_the_reference_still_says_what_it_said(folder: Path) -> None:
    pipeline = OmniGen2Pipeline.from_pretrained(folder)
    latents, words = sample()
    references = [random(3, 16, 8, 6), random(4, 16, 4, 12)]
    for seen, wanted in (([], SUM_WITHOUT), (references, SUM_WITH)):
        found = velocity(pipeline.transformer, pipeline.config, latents, 0.3, words, seen)
        assert float(found.abs().sum()) == pytest.approx(wanted, rel=1e-4)


def test_samples_of_one_batch_do_not_see_each_other(family: Any) -> None:
    """Neither padding of words nor that of references, of which each sample has others, changes anything."""
    latents, words = sample()
    rows = [
        told(words, family.encode_references(pictures((64, 48), (32, 96)))),
        told(words[:4], family.encode_references(pictures((48, 32)))),
        told(words[:6], family.encode_references(pictures((48, 32))), follows=False),
    ]
    noisy, t_B = torch.stack([latents, latents + 1, latents - 1]), torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        together = family.predict(noisy, t_B, Conditioning.collate(rows))
        alone = [family.predict(noisy[n : n + 1], t_B[n : n + 1], row)[0] for n, row in enumerate(rows)]
        blind = family.predict(noisy[2:], t_B[2:], told(words[:6]))[0]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[2], blind, atol=1e-5, rtol=0)


def following(family: Any, one: EncodedRequest, seen: Sequence[Tensor]) -> EncodedRequest:
    about = family.encode_references(seen)
    assert one.negative is not None
    return replace(one, conditioning=one.conditioning.merged(about), negative=one.negative.merged(about))


def test_with_references_the_latents_are_those_of_the_equations(family: Any, folder: Path) -> None:
    seen, guidance = pictures((48, 64), (32, 32)), 3.0
    requests = [
        PictureRequest(prompt, negative, seed, *SIZE, STEPS, guidance)
        for prompt, negative, seed in zip(PROMPTS, NEGATIVES, SEEDS, strict=True)
    ]
    plain = encode_requests(family, requests)
    ours = [following(family, one, seen) for one in plain]
    drawn = torch.stack(draw_latents(family, ours, device="cpu", dtype=torch.float32))
    expected = OmniGen2Pipeline.from_pretrained(folder)(
        prompt=PROMPTS,
        negative_prompt=NEGATIVES,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        text_guidance_scale=guidance,
        output_type="latent",
        references=[one[0] for one in seen],
    ).images
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
    without = torch.stack(draw_latents(family, plain, device="cpu", dtype=torch.float32))
    assert (without - drawn).abs().max() > 0.01, "the references have no effect"


@pytest.mark.parametrize(("height", "width"), [(128, 128), (40, 40), (96, 160)])
def test_time_shifts_as_released(family: Any, height: int, width: int) -> None:
    tokens = family.latents.tokens((16, height, width))
    factor = family.schedule.shift.factor(tokens, 28)
    for step, noisy in enumerate(times(28, height, width)[:-1]):
        even = 1 - step / 28
        assert factor * even / (1 + (factor - 1) * even) == pytest.approx(1 - noisy, abs=1e-9)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_holds_the_denoiser(folder: Path, tmp_path: Path, prefix: str) -> None:
    weights = load_file(folder / "transformer" / WEIGHTS)
    save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "omnigen2.safetensors")
    source = ModelSource(str(tmp_path / "omnigen2.safetensors"))
    assert detect_family(source) is OmniGen2
    family = OmniGen2.load(source, frozenset(), dtype=torch.float32, device="cpu")
    config = family.configs["transformer"]
    assert (config["hidden_size"], config["num_layers"], config["num_kv_heads"]) == (72, 3, 2)


@pytest.mark.parametrize(
    ("height", "width", "taken"),
    [(512, 700, (512, 688)), (2000, 1000, (1024, 512)), (1024, 1024, (1024, 1024)), (20, 10, (16, 16))],
)
def test_references_keep_their_size_up_to_a_megapixel(
    family: Any, height: int, width: int, taken: tuple[int, int]
) -> None:
    assert family.reference_size(height, width, (512, 512)) == taken
