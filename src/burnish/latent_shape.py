"""Sizes: of a training picture on its way to latents, of those latents, and of a clip's sound.

Conventions: sizes in pixels as (height, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PictureInfo:
    """How a training picture came about, in pixels as (height, width); SDXL is told these."""

    original: tuple[int, int]
    crop: tuple[int, int]  # top and left of the crop, in the resized picture
    target: tuple[int, int]  # what the VAE saw

    @classmethod
    def whole(cls, height: int, width: int) -> PictureInfo:
        """For generation: as if the picture had this size from the start."""
        return cls((height, width), (0, 0), (height, width))


@dataclass(frozen=True, slots=True)
class LatentShape:
    """How pixels become latents."""

    channels: int
    compression: int  # pixels per latent, each way
    patch: int = 1  # latents per token, each way
    frame_compression: int | None = None  # frames per latent frame after the first; None: no time axis
    noise_last: bool = False  # the released sampler draws noise place by place, channels innermost
    token_multiple: int = 1  # a height and a width must be so many tokens, or a multiple

    @property
    def pixel_multiple(self) -> int:
        """Heights and widths must be multiples of this."""
        return self.compression * self.patch * self.token_multiple

    def of(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(C, H, W) of the latents of a picture, (C, T, H, W) where the family has a time axis.

        Raises:
            ValueError: so many frames are not wholly encoded, or there is no time axis for them.
        """
        size = (height // self.compression, width // self.compression)
        if self.frame_compression is None:
            if frames != 1:
                raise ValueError(f"{frames} frames for a family of still pictures")
            return self.channels, *size
        if frames < 1 or (frames - 1) % self.frame_compression:
            raise ValueError(
                f"{frames} frames; the VAE takes 1 and then multiples of {self.frame_compression}"
            )
        return self.channels, (frames - 1) // self.frame_compression + 1, *size

    def tokens(self, latents: Sequence[int]) -> int:
        """Tokens that the denoiser makes of latents of this shape, (..., H, W) or (..., T, H, W)."""
        *_, height, width = latents
        frames = 1 if self.frame_compression is None else latents[-3]
        return frames * (height // self.patch) * (width // self.patch)


@dataclass(frozen=True, slots=True)
class AudioShape:
    """How the sound of a clip, a stereo waveform, becomes latents (C, L, F): channels, moments, bands of frequency."""

    channels: int
    bands: int
    per_second: float  # moments
    sample_rate: int  # of the waveform that is encoded, per second
    decoded_rate: int  # of the waveform that comes back

    def of(self, seconds: float) -> tuple[int, int, int]:
        """(C, L, F) of a clip that is shown for so long."""
        return self.channels, round(seconds * self.per_second), self.bands
