"""The sound of LTX-2: stereo waveforms to logarithmic mel spectra to latents, and back by way of a vocoder.

A latent is four spectra of 10 ms; the encoder looks back only, so that the first latent is the first spectrum alone.

Shape letters: B batch, C channels, L moments and F bands of frequency of latents, N samples, S spectra, M their bands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.families.ltx2_names import find_audio_vae, find_vocoder
from burnish.families.slots import Config, Slot
from burnish.latent_shape import AudioShape

Streams = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

WINDOW = 1024  # samples of a spectrum: `preprocessing.stft.filter_length` of the released checkpoints
COMPRESSION = 4  # spectra per latent, and bands per band
_QUIET = 1e-5  # nothing is taken to be quieter
# Slaney's scale (Auditory Toolbox, 1998): even up to 1 kHz, 27 steps for each factor of 6.4 above it.
_EVEN_HZ, _BEND_HZ, _STEP = 200 / 3, 1000.0, math.log(6.4) / 27


def _vocoder(config: dict[str, Any]) -> nn.Module:
    """Since 2.3 a second one adds what lies above 8 kHz."""
    kind = LTX2VocoderWithBWE if config.get("_class_name") == "LTX2VocoderWithBWE" else LTX2Vocoder
    module: nn.Module = kind.from_config(config)
    return module


def _everything(dtype: torch.dtype) -> tuple[str, ...]:
    """The release's trainer computes sound in float32, whatever the rest does."""
    return ("*",)


AUDIO_SLOTS = (
    Slot(
        "audio_vae",
        "vae",
        AutoencoderKLLTX2Audio.from_config,
        find_audio_vae,
        keep_float32=_everything,
        audio=True,
    ),
    Slot("vocoder", "vae", _vocoder, find_vocoder, keep_float32=_everything, audio=True),
)


class LTX2Audio:
    """The audio stream of a family that was loaded with it.

    Args:
        configs: of the modules, by folder.
        module: a loaded module by its folder.
        streams: latents, tokens of sound (B, L, C * F), times, and captions for both -> velocities of both.
    """

    def __init__(self, configs: Mapping[str, Config], module: Callable[[str], Any], streams: Streams) -> None:
        autoencoder, vocoder = configs["audio_vae"], configs["vocoder"]
        rate = int(autoencoder["sample_rate"])
        self.shape = AudioShape(
            channels=int(autoencoder["latent_channels"]),
            bands=int(autoencoder["mel_bins"]) // COMPRESSION,
            per_second=rate / int(autoencoder["mel_hop_length"]) / COMPRESSION,
            sample_rate=rate,
            decoded_rate=int(vocoder["output_sampling_rate"]),
        )
        self._module, self._streams = module, streams

    def encode(self, waveform_B2N: Tensor) -> Tensor:
        _, length, _ = self.shape.of(waveform_B2N.shape[-1] / self.shape.sample_rate)
        return encode(self._module("audio_vae"), waveform_B2N, length)

    def decode(self, latents_BCLF: Tensor) -> Tensor:
        return decode(self._module("audio_vae"), self._module("vocoder"), latents_BCLF)

    def predict(
        self, noisy: Tensor, noisy_audio: Tensor, t_B: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """A token of sound is a moment: all of its channels, band by band."""
        tokens_BLC = noisy_audio.transpose(1, 2).flatten(2)
        captions = conditioning["tokens_BSD"], conditioning["tokens_audio_BSD"]
        velocity, audio_BLC = self._streams(noisy, tokens_BLC, t_B, *captions)
        return velocity, audio_BLC.view(noisy_audio.transpose(1, 2).shape).transpose(1, 2)


@torch.no_grad()
def encode(vae: Any, waveform_B2N: Tensor, length: int) -> Tensor:
    """The first `length` latents of a waveform, (B, C, L, F), in the scale that the denoiser sees."""
    config = vae.config
    spectra_B2SM = log_mel(
        waveform_B2N.to(vae.device, torch.float32), config.sample_rate, config.mel_hop_length, config.mel_bins
    )
    mode_BCLF: Tensor = vae.encode(spectra_B2SM.to(vae.dtype)).latent_dist.mode()
    mean, deviation = _statistics(vae, mode_BCLF)
    return (mode_BCLF[:, :, :length] - mean) / deviation


@torch.no_grad()
def decode(vae: Any, vocoder: Any, latents_BCLF: Tensor) -> Tensor:
    """Latents in the scale that the denoiser sees -> a waveform (B, 2, N)."""
    latents_BCLF = latents_BCLF.to(vae.device, vae.dtype)
    mean, deviation = _statistics(vae, latents_BCLF)
    spectra_B2SM = vae.decode(latents_BCLF * deviation + mean, return_dict=False)[0]
    waveform_B2N: Tensor = vocoder(spectra_B2SM)
    return waveform_B2N


def _statistics(vae: Any, latents_BCLF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel and band, (1, C, 1, F); stored as one row, channel by channel."""
    shape = (1, latents_BCLF.shape[1], 1, latents_BCLF.shape[3])
    return vae.latents_mean.view(shape), vae.latents_std.view(shape)


def log_mel(waveform_B2N: Tensor, rate: int, hop: int, bands: int) -> Tensor:
    """Logarithm of the magnitudes in bands of the mel scale, (B, 2, S, M), a spectrum every `hop` samples.

    torchaudio's MelSpectrogram with power 1, Hann windows, and Slaney's scale and norm, as the release's trainer has it
    (ltx-core, model/audio_vae/ops.py).
    """
    window = torch.hann_window(WINDOW, device=waveform_B2N.device)
    spectra = torch.stft(
        waveform_B2N.flatten(0, 1), WINDOW, hop, window=window, pad_mode="reflect", return_complex=True
    )
    filters_KM = mel_filters(rate, bands).to(waveform_B2N.device)
    spectra_SM = spectra.abs().transpose(1, 2) @ filters_KM
    return spectra_SM.clamp(min=_QUIET).log().view(*waveform_B2N.shape[:2], -1, bands)


def mel_filters(rate: int, bands: int) -> Tensor:
    """Triangles over the frequencies of a spectrum, each of the same area, (WINDOW / 2 + 1, M)."""
    top = _mel(rate / 2)
    corners = torch.tensor([_hertz(top * step / (bands + 1)) for step in range(bands + 2)])
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    frequencies = torch.linspace(0, rate / 2, WINDOW // 2 + 1)[:, None]
    rising, falling = (frequencies - low) / (peak - low), (high - frequencies) / (high - peak)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)


def _mel(hertz: float) -> float:
    if hertz < _BEND_HZ:
        return hertz / _EVEN_HZ
    return _BEND_HZ / _EVEN_HZ + math.log(hertz / _BEND_HZ) / _STEP


def _hertz(mel: float) -> float:
    if mel < _BEND_HZ / _EVEN_HZ:
        return mel * _EVEN_HZ
    return _BEND_HZ * math.exp((mel - _BEND_HZ / _EVEN_HZ) * _STEP)
