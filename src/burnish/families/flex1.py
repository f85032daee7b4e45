"""Flex.1-alpha by Ostris: FLUX.1-schnell pruned to 8 two-stream blocks and trained on, with a guidance embedding.

The embedding was trained last, for sampling without a second pass, and is meant to be bypassed while anything else is
trained (`train.objective.guidance: bypass`). FLUX.1-lite by Freepik has the same shape and is read as well.

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


class Flex1(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 512, 4096), T5's last hidden state with its padding; `pooled_BD` (B, 768), CLIP's;
    `guidance_B` (B,), optional: without it the guidance embedding is bypassed."""

    name: ClassVar[str] = "flex1"
    title: ClassVar[str] = "Flex.1"
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    slots = flux_transformer.SLOTS
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    export = flux_transformer.export_keys("flex-1-alpha", "flex1")
    latents = flux_transformer.LATENTS
    defaults = SamplerDefaults(steps=28, guidance=3.5, size=(1024, 1024), negative_prompt=False)

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        return flux_transformer.is_pruned(config) and not flux_transformer.is_flex2(config)

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        return cls.accepts({}, flux_transformer.shape_of(denoiser))

    def configure(self) -> None:
        embeds = bool(self.configs["transformer"].get("guidance_embeds", False))
        self.capabilities = Capabilities(guidance_embedding=embeds)

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

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        patches_BND = flux_transformer.predict(self.denoiser, noisy, t_B, conditioning, self.dtype)
        return unpack(patches_BND, *noisy.shape[-2:])

    def blocks(self) -> list[nn.Module]:
        return flux_transformer.blocks(self.denoiser)
