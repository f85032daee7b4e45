"""Wan 2.2 by Alibaba (https://github.com/Wan-Video/Wan2.2): A14B text or image to video, 5B text and image to video.

A14B is two of Wan 2.1's transformers, one for high noise (`transformer`) and one for low (`transformer_2`); the time
decides, row by row. Each can be trained alone (`model.denoisers`), at the times it is for. 5B is one transformer over
48-channel latents of a VAE that is sixteen times smaller; it goes on from a first frame by taking its latents in clean,
at time 0, in place of the noisy ones.

Shape letters: B batch, C channels, T frames, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.families import video_vae, wan, wan_names
from burnish.families.pipeline import PipelineFamily
from burnish.families.rows import by_kind
from burnish.families.slots import Config, not_in_files
from burnish.families.sources import locate
from burnish.families.weights import Layout
from burnish.family import Capabilities, ModelSource
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

CHANNELS, WIDE_CHANNELS = 16, 48
I2V_CHANNELS = 36  # noisy latents, which frames are known, latents of the first frame
T2V_BOUNDARY, I2V_BOUNDARY = 0.875, 0.9  # the time from which on `transformer` works; below, `transformer_2`
HIGH, LOW = "transformer", "transformer_2"
FIRST_FRAME = "first_frame_BCTHW"


class Wan22(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 512, 4096); with a first frame `first_frame_BCTHW`, of A14B (B, 20, T, H, W)
    with four channels of which frames are known, of 5B its latents (B, 48, 1, H, W)."""

    name: ClassVar[str] = "wan22"
    title: ClassVar[str] = "Wan 2.2"
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    spacing = "scheduler"
    slots = (
        wan.transformer_slot(HIGH),
        replace(wan.transformer_slot(LOW, optional=True), find=not_in_files),
        wan.either_vae_slot(),
        wan.text_slot(),
    )
    targets = wan_names.TARGETS
    export = wan.keys("wan2.2", "wan2.2", labels={HIGH: "high_noise", LOW: "low_noise"})
    capabilities = Capabilities(references=1, first_frame=True, video=True)  # of image to video
    variants: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "Wan 2.2 5B, image to video": {"model_index": {"_class_name": "WanImageToVideoPipeline"}},
        "Wan 2.2 A14B T2V": {"transformer": {"in_channels": CHANNELS, "out_channels": CHANNELS}},
        "Wan 2.2 A14B I2V": {"transformer": {"in_channels": I2V_CHANNELS, "out_channels": CHANNELS}},
    }
    latents = LatentShape(channels=WIDE_CHANNELS, compression=16, patch=2, frame_compression=4)
    defaults = SamplerDefaults(
        steps=50, guidance=5.0, size=(704, 1280), negative_prompt=True, frames=121, fps=24.0
    )
    prompt_limit = wan.PROMPT_TOKENS

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        if config.get("image_dim") is not None:
            return False
        two = index.get("boundary_ratio") is not None and config["in_channels"] in (CHANNELS, I2V_CHANNELS)
        return two or (bool(index.get("expand_timesteps")) and config["in_channels"] == WIDE_CHANNELS)

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        config = wan_names.config_from_shapes({}, denoiser)
        shapes = (config["in_channels"], config["out_channels"])
        return config["image_dim"] is None and shapes in (
            (WIDE_CHANNELS, WIDE_CHANNELS),
            (I2V_CHANNELS, CHANNELS),
        )

    @classmethod
    def detect(cls, source: ModelSource) -> bool:
        # A file of one of the two text-to-video experts is built like Wan 2.1's, unless the config tells which it is.
        if source.denoisers and locate(source).is_file():
            slot = cls.denoiser_slots()[0]
            found = wan.layout_of_file(source, slot)
            return found is not None and "condition_embedder.image_embedder.norm1.weight" not in found
        return super().detect(source)

    def configure(self) -> None:
        chosen = self.asked.denoisers
        config = self.configs[chosen[0] if chosen else HIGH]
        self.index: Config = self.configs["model_index"]
        self.is_wide = config["out_channels"] == WIDE_CHANNELS
        self.goes_on = config["in_channels"] == I2V_CHANNELS or (
            self.is_wide
            and (self.asked.first_frame or self.index.get("_class_name") == "WanImageToVideoPipeline")
        )
        if not self.goes_on:
            self.capabilities = Capabilities(video=True)
        if self.is_wide:
            return
        if self.source is not None and not self.index and not chosen:
            raise ModelError(
                f"{self.source.path} holds one of the two denoisers of {self.title} and does not tell which.",
                remedy=f"Set `model.denoisers: [{HIGH}]` for the one for high noise, `[{LOW}]` for low noise.",
            )
        self.capabilities = replace(self.capabilities, picks_by_time=len(chosen) != 1)
        released = I2V_BOUNDARY if self.goes_on else T2V_BOUNDARY
        self.boundary = float(self.index.get("boundary_ratio") or released)
        if tuple(chosen) in ((HIGH,), (LOW,)):
            times = (self.boundary, 1.0) if chosen[0] == HIGH else (0.0, self.boundary)
            self.schedule = replace(self.schedule, times=times)
        self.latents = LatentShape(channels=CHANNELS, compression=8, patch=2, frame_compression=4)
        self.defaults = SamplerDefaults(
            steps=40,
            guidance=3.5 if self.goes_on else 4.0,
            size=(720, 1280),
            negative_prompt=True,
            frames=81,
            fps=16.0,
        )

    @property
    def denoiser(self) -> Any:
        """The first of those that are loaded."""
        return self.module(HIGH if HIGH in self.modules or LOW not in self.modules else LOW)

    def example(
        self, height: int, width: int, batch: int, frames: int = 1
    ) -> tuple[Tensor, Tensor, Conditioning]:
        noisy, t_B, conditioning = super().example(height, width, batch, frames)
        return noisy, t_B if self.is_wide else torch.full_like(t_B, (1 + self.boundary) / 2), conditioning

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        return Conditioning(
            {"tokens_BSD": wan.example_tokens(batch, self.denoiser.config.text_dim, generator)}
        )

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        return wan.encode_prompts(prompts, self.module("text_encoder"), self.tokenizer("text_encoder"))

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        if not self.goes_on or not references:
            return Conditioning({})
        (first_B3HW,) = references
        if self.is_wide:
            return Conditioning({FIRST_FRAME: self.encode_pixels(first_B3HW[:, :, None])})
        latents = self.encode_pixels(wan.clip_of(first_B3HW, frames))
        return Conditioning({FIRST_FRAME: wan.with_known_first(latents, 4)})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        """By the denoiser that each row's time is for; the only one that is loaded serves all times."""
        if self.is_wide:
            first = conditioning.get(FIRST_FRAME) if noisy.shape[2] > 1 else None
            return wan.predict_after(self.denoiser, noisy, t_B, conditioning, first, self.dtype)
        if len(self.denoisers) == 1:
            return self._predict_with(self.denoiser, noisy, t_B, conditioning)
        is_high_B = conditioning.get("time_B", t_B) >= self.boundary
        chosen = [HIGH if is_high else LOW for is_high in is_high_B.tolist()]

        def predicted(folder: str, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
            return self._predict_with(self.module(folder), noisy, t_B, conditioning)

        return by_kind(chosen, noisy, t_B, conditioning, predicted)

    def _predict_with(self, denoiser: Any, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        if self.goes_on:
            batch, _, *size = noisy.shape
            known = conditioning.get(FIRST_FRAME)
            if known is None:
                known = noisy.new_zeros(batch, I2V_CHANNELS - CHANNELS, *size)
            noisy = torch.cat([noisy, known.to(noisy.dtype)], dim=1)
        return wan.predict_after(denoiser, noisy, t_B, conditioning, None, self.dtype)

    def blocks(self) -> list[nn.Module]:
        loaded: Sequence[Any] = list(self.denoisers.values())
        return [block for denoiser in loaded for block in denoiser.blocks]
