"""From latents to pictures, clips, and clips with sound."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from burnish.family import Audio, Family

_log = logging.getLogger(__name__)

WARNING = "warning"  # key of `Image.info` where a picture says what went wrong with it
Latents = Tensor | tuple[Tensor, Tensor]  # of a picture or clip; of a clip and its sound


@dataclass(frozen=True)
class Sound:
    """A stereo waveform in [-1, 1], (2, N), and how many samples play per second."""

    samples: npt.NDArray[np.float32]
    rate: int


@dataclass(frozen=True)
class Clip:
    """More than one frame, and how many play per second."""

    frames: tuple[Image.Image, ...]
    fps: float
    sound: Sound | None = field(default=None, compare=False)


Drawn = Image.Image | Clip


@torch.no_grad()
def decode_pictures(family: Family, latents: Sequence[Latents]) -> list[Drawn]:
    """RGB pictures of latents (C, H, W), or (C, T, H, W), one at a time to bound memory; needs the VAE.

    Latents of more than one frame become a clip, with its sound where there are latents of it. A picture with values
    that are no numbers is drawn grey there, sound is silent there, and `info["warning"]` (of the first frame) says so.
    """
    return [_decoded(family, one) for one in latents]


def _decoded(family: Family, latents: Latents) -> Drawn:
    if not isinstance(latents, tuple):
        return _drawn(family.decode_latents(latents[None])[0], family.defaults.fps)
    frames, audio = latents
    drawn = _drawn(family.decode_latents(frames[None])[0], family.defaults.fps)
    assert isinstance(drawn, Clip), "a still has no sound"
    assert family.audio is not None, "only a family with sound draws it"
    sound, broken = _sound(family.audio, audio, len(drawn.frames) / drawn.fps)
    if broken:
        _warn(drawn.frames[0], f"{broken} of {sound.samples.size} samples of sound")
    return replace(drawn, sound=sound)


def _drawn(pixels: Tensor, fps: float) -> Drawn:
    if pixels.dim() == 3:
        return _picture(pixels)
    frames = tuple(_picture(pixels[:, index]) for index in range(pixels.shape[1]))
    return frames[0] if len(frames) == 1 else Clip(frames, fps)


def _picture(pixels_3HW: Tensor) -> Image.Image:
    pixels_3HW = pixels_3HW.float()
    broken = int((~torch.isfinite(pixels_3HW)).any(0).sum())
    share = ((pixels_3HW.nan_to_num(0.0, 0.0, 0.0) + 1) / 2).clamp(0, 1)
    picture = Image.fromarray((share * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    if broken:
        _warn(picture, f"{broken} of {pixels_3HW[0].numel()} pixels")
    return picture


def _sound(audio: Audio, latents_CLF: Tensor, seconds: float) -> tuple[Sound, int]:
    """Not longer than the frames, and how many samples are no numbers."""
    rate = audio.shape.decoded_rate
    waveform_2N = audio.decode(latents_CLF[None])[0, :, : round(seconds * rate)].float()
    broken = int((~torch.isfinite(waveform_2N)).sum())
    samples = waveform_2N.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1).cpu().numpy()
    return Sound(np.ascontiguousarray(samples), rate), broken


def _warn(picture: Image.Image, what: str) -> None:
    warning = (
        f"{what} are not finite; the weights or the adapter are broken, "
        "or the number type is too small for the model (float16 often is: take bf16 or fp32)"
    )
    _log.warning("%s", warning)
    picture.info[WARNING] = warning
