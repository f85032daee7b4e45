"""Flex.2-preview by Ostris: Flex.1 that also fills holes and follows a control picture (lines, pose, depth).

Beside the 16 channels of noisy latents it reads 16 of a picture, zero in its hole, one of the hole's mask, and 16 of
the control picture. Where there is no picture, all is hole; where there is no control, its channels are zero. After
`pipeline.py` of https://huggingface.co/ostris/Flex.2-preview.

Shape letters: B batch, C channels, H W height and width of latents, S prompt tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.families import flux_transformer
from burnish.families.flux_names import TARGETS
from burnish.families.packing import unpack
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config
from burnish.families.weights import Layout
from burnish.family import Capabilities, TargetSet
from burnish.noise_schedule import SamplerDefaults

CHANNELS = 16  # of the latents of each picture


class Flex2(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 512, 4096), T5's last hidden state with its padding; `pooled_BD` (B, 768), CLIP's;
    `guidance_B` (B,), optional: without it the guidance embedding is bypassed;
    `beside_BCHW` (B, 16 + 1 + 16, H, W), optional: picture, mask and control."""

    name: ClassVar[str] = "flex2"
    title: ClassVar[str] = "Flex.2"
    # The release is read through a pipeline of its own; copies name the one of diffusers that it derives from.
    pipelines = ("Flex2Pipeline", "FluxControlPipeline", "FluxPipeline")
    slots = flux_transformer.SLOTS
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    export = flux_transformer.export_keys("flex-2-preview", "flex2")
    latents = flux_transformer.LATENTS
    defaults = SamplerDefaults(steps=28, guidance=3.5, size=(1024, 1024), negative_prompt=False)

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        return flux_transformer.is_flex2(config)

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        return cls.accepts({}, flux_transformer.shape_of(denoiser))

    def configure(self) -> None:
        embeds = bool(self.configs["transformer"].get("guidance_embeds", False))
        self.capabilities = Capabilities(guidance_embedding=embeds, references=2, masks=True)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        return flux_transformer.example_conditioning(self, batch, generator)

    def count_tokens(self, prompt: str) -> int:
        return flux_transformer.count_tokens(self, prompt)

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        return flux_transformer.encode_prompts(self, prompts)

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        """With a mask the first picture is the one with the hole and the second the control; without, the first is
        the control. The hole is cut out of the latents, not of the pixels, as in the release."""
        if not references:
            return Conditioning({})
        encoded = [self.encode_pixels(reference) for reference in references]
        beside_BCHW = _nothing(encoded[0])
        if mask_B1HW is not None:
            size = encoded[0].shape[-2:]
            mask_B1HW = nn.functional.interpolate(mask_B1HW.to(encoded[0]), size=size, mode="bilinear")
            beside_BCHW[:, :CHANNELS] = encoded[0] * (1 - mask_B1HW)
            beside_BCHW[:, CHANNELS : CHANNELS + 1] = mask_B1HW
        controls = encoded if mask_B1HW is None else encoded[1:]
        if controls:
            beside_BCHW[:, CHANNELS + 1 :] = controls[0]
        return Conditioning({"beside_BCHW": beside_BCHW})

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        beside_BCHW = conditioning.get("beside_BCHW")
        beside_BCHW = _nothing(noisy) if beside_BCHW is None else beside_BCHW.to(noisy.dtype)
        latents_BCHW = torch.cat([noisy, beside_BCHW], dim=1)
        patches_BND = flux_transformer.predict(self.denoiser, latents_BCHW, t_B, conditioning, self.dtype)
        return unpack(patches_BND, *noisy.shape[-2:])

    def blocks(self) -> list[nn.Module]:
        return flux_transformer.blocks(self.denoiser)


def _nothing(like_BCHW: Tensor) -> Tensor:
    """The channels beside the latents where there is neither a picture nor a control: everything is hole."""
    batch, _, height, width = like_BCHW.shape
    beside_BCHW = like_BCHW.new_zeros(batch, CHANNELS + 1 + CHANNELS, height, width)
    beside_BCHW[:, CHANNELS] = 1.0
    return beside_BCHW
