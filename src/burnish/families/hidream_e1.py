"""HiDream-E1 by HiDream.ai (arXiv 2505.22705; HiDream-ai/HiDream-E1 on GitHub): pictures that words change.

HiDream-I1's denoiser, which sees the picture as it was to the right of the one that is drawn, both of one size, and of
whose answer the left half counts; zeros there are no picture. The releases differ in what they are made for:
E1-Full for squares of 768 and captions of the form "Editing Instruction: ... Target Image Description: ...", E1.1 for
a megapixel of any shape and plain instructions.

With guidance there are three passes: with the picture, with and without the prompt, and with the prompt alone. As
released, the last steps can be left to HiDream-I1 ("refine strength"); that second model is left out.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, L layers of Llama, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.families import hidream_model
from burnish.families.guidance import no_longer_than_prompted
from burnish.families.hidream_transformer import HiDreamTransformer, transformer
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Config
from burnish.families.sources import index_file, locate, read_json
from burnish.families.weights import Layout, layout_of
from burnish.family import Capabilities, ModelSource, TargetSet
from burnish.noise_schedule import Prediction, SamplerDefaults
from burnish.placement import Part, Places, Shrink

# Rows and columns of latents of two pictures side by side, for which the releases fill up what is not square.
FULL, E1_1 = (96, 192), (128, 256)


def _resolution(config: Config) -> tuple[int, int]:
    """As the config says; E1.1's where it is I1's, which the script of E1.1 loads and then overrules."""
    if not hidream_model.holds_two_pictures(config):
        return E1_1
    rows, columns = config["max_resolution"]
    return rows, columns


def _transformer(config: dict[str, Any]) -> HiDreamTransformer:
    return transformer({**config, "max_resolution": _resolution(config)})


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    name = next(iter(layout.values())).file.name.lower().replace("-", "_")
    resolution = FULL if "e1_full" in name else E1_1
    return {**hidream_model.transformer_config(shipped, layout), "max_resolution": resolution}


class HiDreamE1(PipelineFamily):
    """Conditioning: `tokens_BSD` of T5 (B, 128, 4096), `tokens_llama_BSLD` of every layer of Llama
    (B, 128, 32, 4096), `pooled_BD` (B, 768 + 1280), and `reference_BCHW`, latents of the picture as it was."""

    name: ClassVar[str] = "hidream_e1"
    title: ClassVar[str] = "HiDream-E1"
    pipelines = (hidream_model.I1_PIPELINE, hidream_model.E1_PIPELINE)
    spacing = "scheduler"
    slots = hidream_model.slots(_transformer, _transformer_config)
    targets: ClassVar[Mapping[str, TargetSet]] = hidream_model.TARGETS
    export = hidream_model.export_keys("hidream-e1")
    latents = hidream_model.LATENTS
    capabilities = Capabilities(references=1)
    defaults = SamplerDefaults(
        steps=28,
        guidance=3.0,
        reference_guidance=1.5,
        size=(1024, 1024),
        negative_prompt=True,
        guide=no_longer_than_prompted,
    )
    prompt_limit = hidream_model.PROMPT_TOKENS

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        return hidream_model.edits(index, config)

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        return hidream_model.file_edits(denoiser)

    @classmethod
    def fits(cls, source: ModelSource) -> bool:
        """Of files that do not say so in their name, `model.family` has to."""
        path = locate(source)
        if path.is_dir():
            return cls.detect(source)
        return hidream_model.NAMES.denoiser(layout_of([path])) is not None

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
        path = locate(source)
        if cls.fits(source):
            if "text_encoders" in parts and not source.text_encoders:
                hidream_model.require_llama(path)
        elif _is_i1(path):
            raise ModelError(
                f"{source.path} is not HiDream-E1, as far as its configs say: they are those of HiDream-I1.",
                remedy="If `transformer` holds the weights of E1, put their config.json beside them, or name "
                f"{hidream_model.E1_PIPELINE} as `_class_name` in model_index.json.",
            )
        return super().load(source, parts, dtype=dtype, device=device, prediction=prediction, shrink=shrink)

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        return hidream_model.with_depth(config, depth)

    def configure(self) -> None:
        rows, columns = _resolution(self.configs["transformer"])
        if rows * columns <= FULL[0] * FULL[1]:
            self.defaults = replace(self.defaults, guidance=5.0, reference_guidance=4.0, size=(768, 768))

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        return hidream_model.example_conditioning(self.denoiser, batch, generator)

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        return hidream_model.encode_prompts(self, prompts)

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        if not references:
            return Conditioning({})
        return Conditioning({"reference_BCHW": self.encode_pixels(references[0])})

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        reference = conditioning.get("reference_BCHW")
        beside = torch.zeros_like(noisy) if reference is None else reference.to(noisy.dtype)
        both = torch.cat([noisy, beside], dim=-1)
        predicted = hidream_model.predict(self.denoiser, both, t_B, conditioning, self.dtype)
        return predicted[..., : noisy.shape[-1]]

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.double_stream_blocks, *self.denoiser.single_stream_blocks]


def _is_i1(path: Path) -> bool:
    index = index_file(path) if path.is_dir() else path
    return path.is_dir() and index.is_file() and read_json(index)["_class_name"] == hidream_model.I1_PIPELINE
