"""Wan 2.1 VACE by Alibaba (arXiv 2503.07598): text to video that follows a control clip or picture, 1.3B and 14B.

Wan 2.1's transformer with a second, shorter row of blocks (`vace_blocks`) that reads the control and steers every few
blocks of the first. The control is a clip (depth, pose, a clip with holes) and a mask of what is to be drawn: the
latents of what stays and of what is drawn, and the mask with its 8 x 8 pixels as channels. Adapters are placed on the
first row alone: diffusers refuses files with the second. Without a control the second row is off, and this is Wan 2.1.

Shape letters: B batch, C channels, T frames, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import WanVACETransformer3DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.families import video_vae, wan, wan_names
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config
from burnish.family import Capabilities
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

CONTROL = "control_BCTHW"
SIDE = 8  # pixels per latent, each way


class WanVace(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 512, 4096); with a control `control_BCTHW` (B, 16 + 16 + 64, T, H, W)."""

    name: ClassVar[str] = "wan_vace"
    title: ClassVar[str] = "Wan 2.1 VACE"
    pipelines = ("WanVACEPipeline",)
    spacing = "scheduler"
    slots = (
        wan.transformer_slot(make=WanVACETransformer3DModel.from_config, names=wan_names.VACE_NAMES),
        wan.vae_slot(),
        wan.text_slot(),
    )
    targets = wan_names.TARGETS
    sizes: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers": {
            "transformer": {**wan.SIZE_OF_1_3B, "vace_layers": list(range(0, 30, 2))}
        }
    }
    export = replace(
        wan.keys("wan2.1-vace", "wan2.1_vace", wan_names.VACE_NAMES),
        unreadable={"comfy": ("vace_blocks.*",)},  # diffusers refuses a file with them
    )
    capabilities = Capabilities(references=1, video=True)
    latents = LatentShape(channels=16, compression=SIDE, patch=2, frame_compression=4)
    defaults = SamplerDefaults(
        steps=50, guidance=5.0, size=(480, 832), negative_prompt=True, frames=81, fps=16.0
    )
    prompt_limit = wan.PROMPT_TOKENS

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        shallow = super().with_depth(config, depth)
        steered = [layer for layer in config["vace_layers"] if layer < shallow["num_layers"]]
        return {**shallow, "vace_layers": steered}

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
        """The control is a picture (B, 3, H, W), which then holds for every frame, or a clip (B, 3, T, H, W).

        Without a mask everything is to be drawn.
        """
        if not references:
            return Conditioning({})
        (control,) = references
        if control.dim() == 4:
            control = control[:, :, None].expand(-1, -1, frames, -1, -1)
        batch, _, frames, height, width = control.shape
        drawn_B1HW = control.new_ones(batch, 1, height, width) if mask_B1HW is None else mask_B1HW
        drawn_B1HW = (drawn_B1HW > 0.5).to(control)
        drawn_B1THW = drawn_B1HW[:, :, None].expand(-1, -1, frames, -1, -1)
        stays = self.encode_pixels(control * (1 - drawn_B1THW))
        changes = self.encode_pixels(control * drawn_B1THW)
        mask = _folded(drawn_B1THW, stays.shape[2]).to(stays)
        return Conditioning({CONTROL: torch.cat([stays, changes, mask], dim=1)})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        denoiser = self.denoiser
        control = conditioning.get(CONTROL)
        strength = 0.0 if control is None else 1.0
        if control is None:
            control = noisy.new_zeros(len(noisy), denoiser.config.vace_in_channels, *noisy.shape[2:])
        predicted: Tensor = denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=t_B * 1000,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            control_hidden_states=control.to(self.dtype),
            control_hidden_states_scale=torch.full(
                (len(denoiser.config.vace_layers),), strength, device=noisy.device, dtype=self.dtype
            ),
            return_dict=False,
        )[0]
        return predicted

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.vace_blocks, *self.denoiser.blocks]


def _folded(mask_B1THW: Tensor, length: int) -> Tensor:
    """A mask of pixels as 64 channels of latents, of every fourth frame (`wan/vace.py` of the release)."""
    batch, _, frames, height, width = mask_B1THW.shape
    folded = mask_B1THW.reshape(batch, frames, height // SIDE, SIDE, width // SIDE, SIDE)
    channels = folded.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
    size = (length, height // SIDE, width // SIDE)
    return nn.functional.interpolate(channels, size=size, mode="nearest-exact")
