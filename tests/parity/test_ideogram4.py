"""Ideogram 4's spacing of steps, its second transformer, and FLUX.2's autoencoder in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu
from safetensors.torch import load_file, save_file

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.families.ideogram4 import Ideogram4, logit_normal_sigmas
from burnish.family import ModelSource, NegativePrompt

TinyFolder = Callable[[str], Path]


def loaded(source: ModelSource, *parts: Any) -> Any:
    return Ideogram4.load(source, frozenset(parts), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(("height", "width"), [(512, 512), (2048, 2048), (1024, 640)])
@pytest.mark.parametrize("steps", [1, 4, 48])
def test_steps_are_spaced_as_released(height: int, width: int, steps: int) -> None:
    tokens = Ideogram4.latents.tokens(Ideogram4.latents.of(height, width))
    expected = _logit_normal_sigmas(steps, _resolution_aware_mu(height, width, 0.0), std=1.5)
    torch.testing.assert_close(torch.tensor(logit_normal_sigmas(tokens, steps)), expected, atol=1e-6, rtol=0)


def test_the_second_transformer_takes_the_rows_without_words_and_can_be_left_out(
    tiny_folder: TinyFolder,
) -> None:
    source = ModelSource(str(tiny_folder("ideogram4")))
    both = loaded(source, "denoiser", "text_encoders")
    assert list(both.denoisers) == ["transformer"]
    first = loaded(replace(source, denoisers=("transformer",)), "denoiser")
    noisy, t_B, _ = both.example(64, 64, batch=2)
    told, blind = both.encode_prompts(["a cat"]), both.encode_prompts([NegativePrompt("a cat")])
    mixed = Conditioning.collate([told, blind])
    with torch.no_grad():
        of_both, of_first = both.predict(noisy, t_B, mixed), first.predict(noisy, t_B, mixed)
        alone = both.predict(noisy[1:], t_B[1:], blind)
    torch.testing.assert_close(of_both[0], of_first[0])
    torch.testing.assert_close(of_both[1:], alone)
    assert (of_both[1] - of_first[1]).abs().max() > 0.01
    with pytest.raises(ModelError, match="is not trained"):
        loaded(replace(source, denoisers=("unconditional_transformer",)))


def test_flux2s_autoencoder_file_keeps_its_statistics_in_flux2s_order(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = tiny_folder("ideogram4")
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    for name in ("bn.running_mean", "bn.running_var"):
        weights[name] = weights[name].reshape(4, -1).T.reshape(-1).contiguous()
    save_file(weights, tmp_path / "flux2-vae.safetensors")
    apart = ModelSource(str(folder), vae=tmp_path / "flux2-vae.safetensors")
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = loaded(ModelSource(str(folder)), "vae").encode_pixels(pixels)
    torch.testing.assert_close(loaded(apart, "vae").encode_pixels(pixels), expected)
