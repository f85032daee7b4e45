"""The sound of LTX-2: spectra, latents and waveforms as upstream's, in float32, and only where it is asked for."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Audio, LTX2Pipeline
from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE
from pretend_device import DEVICE, Far, move, pretended
from tiny.ltx2 import BOTH
from tiny_pipelines import drawn
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from burnish.config.schema import Model
from burnish.errors import ModelError, UserError
from burnish.families.ltx2 import LTX2
from burnish.families.ltx2_audio import WINDOW, log_mel, mel_filters
from burnish.family import ModelSource
from burnish.model import choose_model
from burnish.placement import Part

RATE, HOP, BANDS = 16000, 160, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    BOTH.build(0).save_pretrained(folder)
    return folder


def load(folder: Path, *parts: Part, audio: bool = True, dtype: torch.dtype = torch.float32) -> LTX2:
    return LTX2.load(ModelSource(str(folder), audio=audio), frozenset(parts), dtype=dtype, device="cpu")


def waveform(samples: int) -> Tensor:
    return torch.rand(2, 2, samples, generator=torch.Generator().manual_seed(0)) - 0.5


def test_spectra_are_those_of_an_independent_implementation() -> None:
    filters = mel_filter_bank(WINDOW // 2 + 1, BANDS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(RATE, BANDS).numpy(), filters, atol=1e-6)
    sound = waveform(9000)
    found = log_mel(sound, RATE, HOP, BANDS)
    assert found.shape == (2, 2, 1 + 9000 // HOP, BANDS)
    for clip in range(2):
        for side in range(2):
            expected = spectrogram(
                sound[clip, side].numpy().astype(np.float64),
                window_function(WINDOW, "hann"),
                frame_length=WINDOW,
                hop_length=HOP,
                power=1.0,
                mel_filters=filters,
                mel_floor=1e-5,
                log_mel="log",
            )
            np.testing.assert_allclose(found[clip, side].numpy(), expected.T, atol=1e-3)


@pytest.mark.parametrize("frames", [9, 17, 25, 121])
def test_latents_are_the_normed_mode_of_as_many_moments_as_the_pipeline_draws(
    folder: Path, frames: int
) -> None:
    audio = load(folder, "vae").audio
    assert audio is not None
    sound = waveform(round(frames / 24 * RATE))
    found = audio.encode(sound)
    length = round(frames / 24 * RATE / HOP / 4)
    assert tuple(found.shape) == (2, *audio.shape.of(frames / 24)) == (2, 1, length, 16)
    vae = AutoencoderKLLTX2Audio.from_pretrained(folder / "audio_vae")
    with torch.no_grad():
        mode = vae.encode(log_mel(sound, RATE, HOP, BANDS)).latent_dist.mode()[:, :, :length]
    packed = LTX2Pipeline._pack_audio_latents(mode)
    normed = LTX2Pipeline._normalize_audio_latents(packed, vae.latents_mean, vae.latents_std)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), normed, atol=1e-5, rtol=0)
    decoded = audio.decode(found)
    assert decoded.shape[:2] == (2, 2)
    assert decoded.shape[2] / audio.shape.decoded_rate == pytest.approx(frames / 24, abs=0.05)


def test_the_first_moments_do_not_depend_on_later_sound(folder: Path) -> None:
    """So that latents of a longer clip can be cut."""
    audio = load(folder, "vae").audio
    assert audio is not None
    sound = waveform(RATE)
    other = sound.clone()
    other[:, :, RATE // 2 :] = 0
    before, after = audio.encode(sound), audio.encode(other)
    torch.testing.assert_close(before[:, :, :11], after[:, :, :11])
    assert not torch.allclose(before, after)


def test_sound_stays_in_float32(folder: Path) -> None:
    low, full = load(folder, "vae", dtype=torch.bfloat16), load(folder, "vae")
    assert low.module("vae").dtype == torch.bfloat16
    assert low.audio is not None
    assert full.audio is not None
    sound = waveform(6000)
    assert torch.equal(low.audio.encode(sound), full.audio.encode(sound))


def test_the_vocoder_of_2_3_adds_a_second_one(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    vocoder = drawn(
        3,
        lambda: LTX2VocoderWithBWE(
            hidden_channels=64,
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            bwe_hidden_channels=32,
            bwe_resnet_kernel_sizes=[3],
            bwe_resnet_dilations=[[1, 3, 5]],
        ),
    )
    shutil.rmtree(copy / "vocoder")
    vocoder.save_pretrained(copy / "vocoder")
    family = load(copy, "vae")
    assert family.audio is not None
    assert family.audio.shape.decoded_rate == 48000
    latents = torch.randn(1, *family.audio.shape.of(0.4), generator=torch.Generator().manual_seed(1))
    vae = AutoencoderKLLTX2Audio.from_pretrained(folder / "audio_vae")
    with torch.no_grad():
        scaled = latents * vae.latents_std.view(1, 1, 1, -1) + vae.latents_mean.view(1, 1, 1, -1)
        expected = vocoder(vae.decode(scaled).sample)
    torch.testing.assert_close(family.audio.decode(latents), expected, atol=1e-5, rtol=0)


def test_without_sound_its_modules_are_not_needed(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "audio_vae")
    shutil.rmtree(copy / "vocoder")
    assert load(copy, "vae", audio=False).audio is None
    with pytest.raises(ModelError, match="audio_vae"):
        load(copy, "vae")


def test_captions_and_latents_with_sound_are_cached_apart(folder: Path) -> None:
    alone, both = load(folder, audio=False), load(folder)
    assert alone.identity("vae") != both.identity("vae")
    assert alone.identity("text_encoders") != both.identity("text_encoders")
    assert alone.identity("denoiser") == both.identity("denoiser")
    told = load(folder, "text_encoders").encode_prompts(["a dog barks"])
    assert set(told) == {"tokens_BSD", "tokens_audio_BSD"}
    assert set(load(folder, "text_encoders", audio=False).encode_prompts(["a dog"])) == {"tokens_BSD"}


def test_sound_is_refused_of_a_family_without(tiny_sd15: Path) -> None:
    chosen = choose_model(Model(path=str(tiny_sd15), audio=True))
    with pytest.raises(UserError, match=r"model.audio is set, and Stable Diffusion 1.5 makes no sound"):
        chosen.load(dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", ["attention", "attention+mlp", "all"])
def test_gradient_reaches_every_target_of_both_streams(folder: Path, name: str) -> None:
    family = load(folder, "denoiser")
    assert family.audio is not None
    target = family.targets[name].with_audio()
    modules = {
        key: module
        for key, module in family.denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatch(key, rule) for rule in target.patterns)
    }
    assert all(any(fnmatch(key, rule) for key in modules) for rule in target.patterns)
    frames_alone = {key for key in modules if any(fnmatch(key, r) for r in family.targets[name].patterns)}
    assert {key for key in modules if "audio" not in key} == frames_alone
    for module in modules.values():
        module.weight.requires_grad_(True)
    noisy, t_B, told = family.example(64, 64, batch=1, frames=9)
    sound = torch.randn(1, *family.audio.shape.of(9 / 24))
    frames, heard = family.audio.predict(noisy, sound, t_B, told)
    assert (frames.shape, heard.shape) == (noisy.shape, sound.shape)
    (frames.square().mean() + heard.square().mean()).backward()
    assert [k for k, one in modules.items() if one.weight.grad is None or not one.weight.grad.any()] == []


def test_frames_hear_and_sound_sees(folder: Path) -> None:
    family = load(folder, "denoiser")
    assert family.audio is not None
    noisy, t_B, told = family.example(64, 64, batch=1, frames=9)
    sound = torch.randn(1, *family.audio.shape.of(9 / 24))
    frames, heard = family.audio.predict(noisy, sound, t_B, told)
    assert not torch.allclose(family.audio.predict(noisy, sound + 1, t_B, told)[0], frames, atol=1e-6)
    assert not torch.allclose(family.audio.predict(noisy + 1, sound, t_B, told)[1], heard, atol=1e-6)
    assert not torch.allclose(family.predict(noisy, t_B, told), frames, atol=1e-6)


def test_what_is_made_of_sound_is_made_where_the_modules_are(folder: Path) -> None:
    family = load(folder, "denoiser", "vae", "text_encoders")
    assert family.audio is not None
    for module in family.modules.values():
        move(module)
    with pretended():
        latents = family.audio.encode(torch.zeros(1, 2, 6000, device=DEVICE))
        assert isinstance(family.audio.decode(latents), Far)
        noisy, t_B, told = family.example(64, 64, batch=1, frames=9)
        assert all(isinstance(one, Far) for one in family.audio.predict(noisy, latents, t_B, told))
