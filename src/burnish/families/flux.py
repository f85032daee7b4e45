"""FLUX.1 by Black Forest Labs: dev, schnell, Krea, Kontext, Fill, and what was made from them.

A transformer over 2x2 patches of 16-channel latents that predicts velocity; it reads T5 tokens and CLIP's pooled
embedding. FLUX.1-dev besides embeds a guidance scale; without `guidance_B` that embedding is bypassed.

Kontext reads a reference picture's patches after the noisy ones, set apart by the first coordinate of their positions
(arXiv 2506.15742, section 3). Fill reads, beside the noisy latents, those of the picture without its hole (64 channels
of a patch) and the mask, eight by eight pixels of it per latent (256 channels).

Shape letters: B batch, C channels, H W height and width of latents, S prompt tokens, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.families import autoencoder, flux_transformer
from burnish.families.flux_names import TARGETS
from burnish.families.packing import pack, patch_positions, unpack
from burnish.families.pipeline import PipelineFamily
from burnish.families.rows import by_kind
from burnish.families.slots import Config
from burnish.families.sources import read_json
from burnish.families.weights import Layout
from burnish.family import Capabilities, TargetSet
from burnish.noise_schedule import SamplerDefaults, Schedule

LONGEST_PROMPT = 512  # T5 tokens FLUX.1-dev was released with
LONGEST_PROMPT_DISTILLED = 256  # FLUX.1-schnell, which has no guidance embedding
PLAIN, FILL = (64, 64), (384, 64)  # channels of a patch: taken, given
MASK_SIDE = 8  # pixels of the mask per latent, each way; every one is a channel
# Height and width of the references that Kontext was trained with, after the release's `util.py`.
KONTEXT_SIZES = tuple(
    (height, width)
    for width, height in (
        (672, 1568),
        (688, 1504),
        (720, 1456),
        (752, 1392),
        (800, 1328),
        (832, 1248),
        (880, 1184),
        (944, 1104),
        (1024, 1024),
        (1104, 944),
        (1184, 880),
        (1248, 832),
        (1328, 800),
        (1392, 752),
        (1456, 720),
        (1504, 688),
        (1568, 672),
    )
)


class Flux(PipelineFamily):
    """Conditioning, with the released widths:

    `tokens_BSD` (B, 512, 4096; schnell 256): T5's last hidden state, padding included;
    `pooled_BD` (B, 768): CLIP's pooled embedding;
    `guidance_B` (B,), optional: the scale that FLUX.1-dev imitates; given by objective and sampler;
    `tokens_reference_BND` (B, N, 64), Kontext's, optional: patches of the reference's latents, and
    `reference_grid_B2` (B, 2): how many rows and columns of them there are;
    `hole_BCHW` (B, 16 + 64, H, W), Fill's: latents of the picture without its hole, and the mask; without it
    everything is the hole.
    """

    name: ClassVar[str] = "flux"
    title: ClassVar[str] = "FLUX.1"
    pipelines = (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
    )
    slots = flux_transformer.SLOTS
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    export = replace(
        flux_transformer.export_keys("flux-1-dev", "flux1"),
        text_encoders={"text_encoder": "clip_l"},
    )
    latents = flux_transformer.LATENTS
    variants: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "FLUX.1 Kontext": {"model_index": {"_class_name": "FluxKontextPipeline"}},
        "FLUX.1 Fill": {"transformer": {"in_channels": FILL[0], "out_channels": FILL[1]}},
    }

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        return not flux_transformer.is_pruned(config)

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        return not flux_transformer.is_pruned(flux_transformer.shape_of(denoiser))

    def make_schedule(self, config: Config) -> Schedule:
        single_file = not self.configs.get("model_index") and self.source is not None
        if single_file and not self.configs["transformer"].get("guidance_embeds"):
            config = self.configs["scheduler_schnell"]
        return super().make_schedule(config)

    def configure(self) -> None:
        config = self.configs["transformer"]
        taken = flux_transformer.channels(config)
        if taken not in (PLAIN, FILL):
            raise ModelError(
                f"This FLUX.1 takes {taken[0]} channels and gives {taken[1]}: it follows depth or edges, which is "
                "not supported.",
                remedy="Use FLUX.1-dev, -schnell, -Krea-dev, -Kontext-dev or -Fill-dev.",
            )
        embeds, self.fills = bool(config.get("guidance_embeds", False)), taken == FILL
        self.edits = not self.fills and self._is_kontext()
        self.capabilities = Capabilities(
            guidance_embedding=embeds, references=int(self.fills or self.edits), masks=self.fills
        )
        side = int(self.configs["vae"].get("sample_size", 1024))
        guidance = 30.0 if self.fills else 2.5 if self.edits else 3.5
        self.defaults = SamplerDefaults(
            steps=(50 if self.fills else 28) if embeds else 4,
            guidance=guidance if embeds else 0.0,
            size=(side, side),
            negative_prompt=False,
        )
        if not embeds:
            self.export = replace(self.export, modelspec="flux-1-schnell")
        self.prompt_limit = self._longest_prompt(LONGEST_PROMPT if embeds else LONGEST_PROMPT_DISTILLED)

    def _is_kontext(self) -> bool:
        """From the pipeline's class; a single file of Kontext differs from FLUX.1-dev in its name alone."""
        kind = str(self.configs.get("model_index", {}).get("_class_name", ""))
        if kind:
            return kind.startswith("FluxKontext")
        return "kontext" in Path(self.asked.path).name.lower()

    def _longest_prompt(self, longest: int) -> int:
        if self.source is None or not self.source.index:
            return longest
        beside = self.source.path / "tokenizer_2" / "tokenizer_config.json"
        stated = read_json(beside).get("model_max_length", longest) if beside.is_file() else longest
        return min(int(stated), longest)

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

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        """Kontext: of the sizes it was trained with the one nearest in shape, for targets of one megapixel.

        For smaller or larger targets that size grows with them, so that both have about as many patches.
        """
        if not self.edits:
            return target
        # As diffusers picks it: of two that are equally near, the narrower.
        taken = min(KONTEXT_SIZES, key=lambda size: (abs(width / height - size[1] / size[0]), size[1]))
        scale = (target[0] * target[1] / 1024**2) ** 0.5
        multiple = self.latents.pixel_multiple
        taller, wider = (max(multiple, round(side * scale / multiple) * multiple) for side in taken)
        return taller, wider

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        if self.fills and references and mask_B1HW is not None:
            return Conditioning({"hole_BCHW": self._hole(references[0], mask_B1HW)})
        if self.edits and references:
            latents_BCHW = self.encode_pixels(references[0])
            height, width = latents_BCHW.shape[-2:]
            grid = torch.tensor([[height // 2, width // 2]] * len(latents_BCHW))
            return Conditioning({"tokens_reference_BND": pack(latents_BCHW), "reference_grid_B2": grid})
        return Conditioning({})

    def _hole(self, picture_B3HW: Tensor, mask_B1HW: Tensor) -> Tensor:
        """Grey where the mask is at least one half, as diffusers' FluxFillPipeline prepares it."""
        mask_B1HW = (mask_B1HW >= 0.5).to(picture_B3HW.dtype)
        latents_BCHW = autoencoder.encode(self.module("vae"), picture_B3HW * (1 - mask_B1HW))
        channels_BCHW = nn.functional.pixel_unshuffle(mask_B1HW, MASK_SIDE)
        return torch.cat([latents_BCHW, channels_BCHW.to(latents_BCHW)], dim=1)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        grid_B2 = conditioning.on_host("reference_grid_B2") if "reference_grid_B2" in conditioning else None
        if grid_B2 is None:
            return self._predict(None, noisy, t_B, conditioning)
        # The transformer takes one list of positions for the whole batch.
        grids = [(rows, columns) for rows, columns in grid_B2.tolist()]
        return by_kind(grids, noisy, t_B, conditioning, self._predict)

    def _predict(
        self, grid: tuple[int, int] | None, noisy: Tensor, t_B: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Velocity for a batch whose references have the same `grid` of patches, if there are any."""
        more: dict[str, Any] = {}
        if grid is not None:
            more["more_BND"] = conditioning["tokens_reference_BND"][:, : grid[0] * grid[1]]
            more["more_positions_N3"] = patch_positions(*grid, noisy.device, picture=1.0)
        latents = torch.cat([noisy, self._beside(noisy, conditioning)], dim=1) if self.fills else noisy
        patches_BND = flux_transformer.predict(self.denoiser, latents, t_B, conditioning, self.dtype, **more)
        return unpack(patches_BND, *noisy.shape[-2:])

    def _beside(self, noisy: Tensor, conditioning: Conditioning) -> Tensor:
        """Fill's further channels; where no picture was given, nothing but the mask."""
        if "hole_BCHW" in conditioning:
            return conditioning["hole_BCHW"].to(noisy.dtype)
        batch, channels, height, width = noisy.shape
        mask_BCHW = noisy.new_ones(batch, MASK_SIDE**2, height, width)
        return torch.cat([noisy.new_zeros(batch, channels, height, width), mask_BCHW], dim=1)

    def blocks(self) -> list[nn.Module]:
        return flux_transformer.blocks(self.denoiser)
