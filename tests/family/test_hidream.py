"""HiDream: experts that learn, the distilled releases, and Llama, which the release does not hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from tiny.hidream import hidream

from burnish.errors import ModelError
from burnish.families.hidream import HiDream
from burnish.families.hidream_transformer import RoutedExperts
from burnish.family import ModelSource
from burnish.placement import Part
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests

TinyFolder = Callable[[str], Path]
WIDTH = 16


def load(folder: Path, *parts: Part) -> HiDream:
    return HiDream.load(ModelSource(str(folder)), frozenset(parts), dtype=torch.float32, device="cpu")


@pytest.fixture
def distilled(tmp_path: Path) -> Path:
    hidream(0, distilled=True).save_pretrained(tmp_path / "dev")
    return tmp_path / "dev"


def experts(*, training: bool) -> MOEFeedForwardSwiGLU:
    torch.manual_seed(0)
    made = MOEFeedForwardSwiGLU(WIDTH, 4 * WIDTH, num_routed_experts=4, num_activated_experts=2)
    return made.train(training)


def test_experts_answer_as_diffusers_does_with_and_without_gradients() -> None:
    states_BSD = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    ours = RoutedExperts(experts(training=False))
    torch.testing.assert_close(ours(states_BSD), experts(training=False)(states_BSD))

    theirs = experts(training=True)
    theirs(states_BSD).square().sum().backward()
    ours(states_BSD).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_an_expert_without_tokens_gets_no_gradient_and_does_no_harm() -> None:
    states_BSD = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    ours = RoutedExperts(experts(training=False))
    ours(states_BSD).square().sum().backward()
    used = [
        expert.w1.weight.grad is not None and bool(expert.w1.weight.grad.any()) for expert in ours.experts
    ]
    assert sum(used) == 2


def test_full_is_guided_and_the_distilled_ones_are_not(tiny_folder: TinyFolder, distilled: Path) -> None:
    full, dev = load(tiny_folder("hidream")), load(distilled)
    assert (full.defaults.negative_prompt, full.defaults.guidance, full.schedule.shift) == (True, 5.0, 3.0)
    assert (dev.defaults.negative_prompt, dev.defaults.guidance, dev.schedule.shift) == (False, 1.0, 6.0)


def test_what_a_distilled_one_draws_depends_on_its_seed_alone(distilled: Path) -> None:
    family = load(distilled, "denoiser", "text_encoders")
    one, other = (PictureRequest("a cat", seed=seed, height=64, width=64, steps=3) for seed in (1, 2))

    def drawn(*requests: PictureRequest) -> list[torch.Tensor]:
        return draw_latents(family, encode_requests(family, requests), device="cpu", dtype=torch.float32)

    together = drawn(one, other)
    torch.testing.assert_close(together[0], drawn(one)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1], drawn(other)[0], atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_first_step_of_a_distilled_one_is_that_of_diffusers(distilled: Path) -> None:
    # With one step nothing is drawn but the noise to begin with, which is where diffusers takes no generator.
    family = load(distilled, "denoiser", "text_encoders")
    request = PictureRequest("a cat", seed=1, height=64, width=64, steps=1)
    (found,) = draw_latents(family, encode_requests(family, [request]), device="cpu", dtype=torch.float32)
    pipeline = DiffusionPipeline.from_pretrained(distilled)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.default_sample_size = 8
    expected = pipeline(
        "a cat",
        height=64,
        width=64,
        num_inference_steps=1,
        guidance_scale=0.0,
        generator=[torch.Generator().manual_seed(1)],
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=0)


def test_a_release_without_llama_says_so(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    copy = tmp_path / "released"
    shutil.copytree(tiny_folder("hidream"), copy)
    shutil.rmtree(copy / "text_encoder_4")
    shutil.rmtree(copy / "tokenizer_4")
    load(copy, "denoiser", "vae")
    with pytest.raises(ModelError, match="lacks text_encoder_4 and tokenizer_4") as error:
        load(copy, "text_encoders")
    assert "Llama-3.1-8B-Instruct" in error.value.remedy
