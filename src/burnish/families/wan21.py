"""Wan 2.1 by Alibaba (arXiv 2503.20314): text to video (1.3B and 14B), image to video and first and last frame to video
(14B), and stills.

A transformer over patches of 1x2x2 latents that predicts velocity, with UMT5's tokens beside it. The image-to-video
model is told the clip's first frame twice: as latents of a clip that is grey after it, stacked on the noisy ones with
four channels of which frames are known, and as CLIP's view of it, to which every block attends. That of first and last
frames (FLF2V) is told both so, CLIP's views with a position.

Shape letters: B batch, C channels, T frames, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.families import clip_vision, video_vae, wan, wan_names
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config, Slot
from burnish.families.weights import Layout
from burnish.family import Capabilities, ModelSource
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults
from burnish.placement import Part

CHANNELS = 16
I2V_CHANNELS = 36  # noisy latents, which frames are known, latents of the first frame

_TEXT_TO_VIDEO: Config = {"in_channels": CHANNELS, "image_dim": None, "added_kv_proj_dim": None}


class Wan21(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 512, 4096); of image to video `first_frame_BCTHW` (B, 20, T, H, W) and
    `clip_BSD` (B, 257, 1280, of two frames 514), without which nothing is known of those frames."""

    name: ClassVar[str] = "wan21"
    title: ClassVar[str] = "Wan 2.1"
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    spacing = "scheduler"
    slots = (wan.transformer_slot(), wan.vae_slot(), wan.text_slot(), clip_vision.vision_slot())
    targets = wan_names.TARGETS
    capabilities = Capabilities(references=1, first_frame=True, video=True)  # of image to video
    variants: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "Wan 2.1 T2V": {"transformer": _TEXT_TO_VIDEO},
        "Wan 2.1 FLF2V": {"transformer": {"pos_embed_seq_len": 2 * wan.IMAGE_TOKENS}},
    }
    sizes: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"transformer": _TEXT_TO_VIDEO},
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"transformer": {**_TEXT_TO_VIDEO, **wan.SIZE_OF_1_3B}},
    }
    export = wan.keys("wan2.1", "wan2.1")
    latents = LatentShape(channels=CHANNELS, compression=8, patch=2, frame_compression=4)
    defaults = SamplerDefaults(
        steps=50, guidance=5.0, size=(480, 832), negative_prompt=True, frames=81, fps=16.0
    )
    prompt_limit = wan.PROMPT_TOKENS

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        later = index.get("boundary_ratio") is not None or index.get("expand_timesteps")
        sees_frame = config.get("image_dim") is not None
        return not later and config["in_channels"] == (I2V_CHANNELS if sees_frame else CHANNELS)

    @classmethod
    def detect(cls, source: ModelSource) -> bool:
        return not source.denoisers and super().detect(source)  # this is one of Wan 2.2's two, then

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        config = wan_names.config_from_shapes({}, denoiser)
        return config["out_channels"] == CHANNELS and cls.accepts({}, config)

    def configure(self) -> None:
        self.goes_on = self.configs["transformer"]["in_channels"] == I2V_CHANNELS
        self.arrives = self.configs["transformer"].get("pos_embed_seq_len") is not None
        if self.arrives:
            self.capabilities = replace(self.capabilities, references=2, last_frame=True)
        if not self.goes_on:
            self.capabilities = Capabilities(video=True)

    def _is_released_with(self, slot: Slot) -> bool:
        """Going on from a frame takes CLIP's picture encoder, which text to video comes without."""
        return self.goes_on if slot.folder == "image_encoder" else super()._is_released_with(slot)

    def identity(self, part: Part) -> str:
        # CLIP's picture encoder works in the VAE's stage, and can lie among the text encoders' files.
        if part != "vae" or not self.goes_on:
            return super().identity(part)
        both = super().identity("vae") + super().identity("text_encoders")
        return hashlib.sha256(both.encode()).hexdigest()

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
        first_B3HW, *rest = references
        last_B3HW = rest[0] if self.arrives else None
        latents = self.encode_pixels(wan.clip_of(first_B3HW, frames, last_B3HW))
        known = wan.with_known_first(latents, 4, last=self.arrives)
        shown = [first_B3HW] if last_B3HW is None else [first_B3HW, last_B3HW]
        seen = [clip_vision.hidden_states(self.module("image_encoder"), one) for one in shown]
        return Conditioning({"first_frame_BCTHW": known, "clip_BSD": torch.cat(seen, dim=1)})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        options: dict[str, Any] = {}
        if self.goes_on:
            noisy, seen_BSD = self._with_first_frame(noisy, conditioning)
            options["encoder_hidden_states_image"] = seen_BSD.to(self.dtype)
        predicted: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=t_B * 1000,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            return_dict=False,
            **options,
        )[0]
        return predicted

    def _with_first_frame(self, noisy: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        batch, _, *size = noisy.shape
        known = conditioning.get("first_frame_BCTHW")
        seen = conditioning.get("clip_BSD")
        if known is None:
            known = noisy.new_zeros(batch, I2V_CHANNELS - CHANNELS, *size)
        if seen is None:
            width = self.denoiser.config.image_dim
            seen = noisy.new_zeros(batch, wan.IMAGE_TOKENS * (2 if self.arrives else 1), width)
        if self.arrives:  # the network folds them back, two pictures to a row
            seen = seen.reshape(2 * batch, wan.IMAGE_TOKENS, -1)
        return torch.cat([noisy, known.to(noisy.dtype)], dim=1), seen

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.blocks)
