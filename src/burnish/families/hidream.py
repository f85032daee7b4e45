"""HiDream-I1 by HiDream.ai (arXiv 2505.22705): full, dev and fast.

What it shares with the editing release is in `hidream_model.py`. Dev and fast are distilled and run without guidance.

Shape letters: B batch, S tokens, L layers of Llama, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.families import hidream_model
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config
from burnish.families.sources import locate
from burnish.families.weights import Layout
from burnish.family import ModelSource, TargetSet
from burnish.noise_schedule import Prediction, SamplerDefaults
from burnish.placement import Part, Places, Shrink

DEV_SHIFT = 6.0  # fast has 3, as full
_DISTILLED = "FlowMatchLCMScheduler"  # that of dev and fast; full comes with UniPC


class HiDream(PipelineFamily):
    """Conditioning: `tokens_BSD` of T5 (B, 128, 4096), `tokens_llama_BSLD` of every layer of Llama
    (B, 128, 32, 4096), `pooled_BD` (B, 768 + 1280)."""

    name: ClassVar[str] = "hidream"
    title: ClassVar[str] = "HiDream-I1"
    pipelines = (hidream_model.I1_PIPELINE,)
    spacing = "scheduler"
    slots = hidream_model.slots()
    targets: ClassVar[Mapping[str, TargetSet]] = hidream_model.TARGETS
    export = hidream_model.export_keys("hidream-i1")
    latents = hidream_model.LATENTS
    defaults = SamplerDefaults(steps=50, guidance=5.0, size=(1024, 1024), negative_prompt=True)
    prompt_limit = hidream_model.PROMPT_TOKENS

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        return not hidream_model.edits(index, config)

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        return not hidream_model.file_edits(denoiser)

    @classmethod
    def load(
        cls,
        source: ModelSource,
        parts: frozenset[Part],
        *,
        dtype: torch.dtype,
        device: Places,
        prediction: Prediction | None = None,
        shrink: Mapping[Part, Shrink] | None = None,
    ) -> Self:
        if "text_encoders" in parts and not source.text_encoders and cls.fits(source):
            hidream_model.require_llama(locate(source))
        return super().load(source, parts, dtype=dtype, device=device, prediction=prediction, shrink=shrink)

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        return hidream_model.with_depth(config, depth)

    def configure(self) -> None:
        if self.schedule.scheduler.get("_class_name") == _DISTILLED:
            steps = 28 if self.schedule.shift == DEV_SHIFT else 16
            self.defaults = replace(self.defaults, steps=steps, guidance=1.0, negative_prompt=False)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        return hidream_model.example_conditioning(self.denoiser, batch, generator)

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        return hidream_model.encode_prompts(self, prompts)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        return hidream_model.predict(self.denoiser, noisy, t_B, conditioning, self.dtype)

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.double_stream_blocks, *self.denoiser.single_stream_blocks]
