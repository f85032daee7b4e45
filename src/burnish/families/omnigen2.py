"""OmniGen2 by VectorSpaceLab (arXiv 2506.18871): pictures from words, edits, and pictures with given subjects in them.

Its transformer reads the last hidden states of Qwen2.5-VL 3B for the words alone; up to five reference pictures reach
it as latents of FLUX.1's autoencoder. As released, the pass without prompt is one without references too; guidance by
the references themselves, which takes a third pass, is not offered.

Shape letters: B batch, C channels, H W height and width of latents, S words, N patches of references, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log, sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import clip
from burnish.families.masked import is_whole
from burnish.families.native import PREFIXES, depth
from burnish.families.omnigen2_transformer import MAX_REFERENCES, OmniGen2Transformer, grid, patches_of
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen25_vl_slot
from burnish.families.reference_sizes import shrunk
from burnish.families.slots import Config, Slot, vae_slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout, below
from burnish.family import Capabilities, NegativePrompt, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults, Schedule

LONGEST_PROMPT = 1024
SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."
POSITIONS = "tokens_reference_at_BN3"
REFERENCE_AREA, REFERENCE_SIDE = 1024 * 1024, 1024  # pixels; larger references are scaled down to these

_ATTENTION = ("*.attn.to_[qkv]", "*.attn.to_out.0")
_FEED_FORWARD = ("*.feed_forward.linear_[123]",)
_SIGNS = (
    "ref_image_patch_embedder.weight",
    "image_index_embedding",
    "ref_image_refiner.0.attn.to_q.weight",
    "layers.0.attn.to_q.weight",
)
_ABSENT = ("double_stream_layers.0.",)  # Boogu-Image, built on this plan


def _find_transformer(layout: Layout) -> Layout | None:
    for prefix in PREFIXES:
        inside = below(layout, prefix)
        if all(sign in inside for sign in _SIGNS) and not any(n.startswith(_ABSENT) for n in inside):
            return inside
    return None


def _transformer_config(shipped: Config, layout: Layout) -> dict[str, object]:
    width, patch = layout["x_embedder.weight"].shape
    head = layout["layers.0.attn.norm_q.weight"].shape[0]
    return {
        **shipped,
        "in_channels": patch // 4,
        "hidden_size": width,
        "num_layers": depth(layout, "layers."),
        "num_refiner_layers": depth(layout, "noise_refiner."),
        "num_attention_heads": width // head,
        "num_kv_heads": layout["layers.0.attn.to_k.weight"].shape[0] // head,
        "text_feat_dim": layout["time_caption_embed.caption_embedder.0.weight"].shape[0],
    }


class SquareRootShift:
    """The release's: as many times later as the side of a square of these tokens is longer than 20 (320 pixels)."""

    def mu(self, tokens: int, steps: int = 0) -> float:
        return log(sqrt(tokens) / 20)

    def factor(self, tokens: int, steps: int = 0) -> float:
        return exp(self.mu(tokens, steps))


class OmniGen2(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 2048), as long as the prompt, its `mask_BS`, and `follows_B`, whether the
    references are looked at; with these `tokens_reference_BND` (B, N, 64) and `tokens_reference_at_BN3`: number of
    the picture from 1, row, column.
    """

    name: ClassVar[str] = "omnigen2"
    title: ClassVar[str] = "OmniGen2"
    pipelines = ("OmniGen2Pipeline", "OmniGen2ChatPipeline")
    slots = (
        Slot(
            "transformer",
            "denoiser",
            OmniGen2Transformer.from_config,
            _find_transformer,
            _transformer_config,
        ),
        vae_slot(),
        qwen25_vl_slot("mllm", "processor"),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            (*_ATTENTION, *_FEED_FORWARD, "*.norm1.linear", "x_embedder", "norm_out.linear_2"),
            "Every layer of the blocks, modulations included, and the first and last layer.",
        ),
    }
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec="omnigen2",
        base_model_version="omnigen2",
        # ComfyUI's, and those of the release's own pipeline.
        prefix={"comfy": "diffusion_model.", "diffusers": "transformer."},
        readers={"comfy": ("ComfyUI",), "diffusers": ("OmniGen2's own pipeline",)},
        words={"mllm": "qwen25_3b"},
    )
    latents = LatentShape(channels=16, compression=8, patch=2)
    capabilities = Capabilities(references=MAX_REFERENCES)
    defaults = SamplerDefaults(steps=28, guidance=4.0, size=(1024, 1024), negative_prompt=True)
    prompt_limit = LONGEST_PROMPT

    def make_schedule(self, config: Config) -> Schedule:
        """The scheduler is the release's own class, which counts from noise at 0; diffusers' of that name is the same
        with the shift given to it."""
        shifts = bool(config.get("dynamic_time_shift", True))
        told = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": shifts}
        schedule = super().make_schedule(told)
        return replace(schedule, shift=SquareRootShift()) if shifts else schedule

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        shape = (batch, 64, self.denoiser.config.text_feat_dim)
        return Conditioning(
            {
                "tokens_BSD": torch.randn(shape, generator=generator),
                "mask_BS": torch.ones(batch, 64, dtype=torch.bool),
                "follows_B": torch.ones(batch, dtype=torch.bool),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        return clip.count_tokens(self.tokenizer("mllm"), _instructed(prompt))

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """The instruction and the marks of the chat count among the tokens that are read."""
        encoder, tokenizer = self.module("mllm"), self.tokenizer("mllm")
        rows = []
        for prompt in prompts:
            text = written_out(tokenizer, _instructed(prompt))
            ids = tokenizer(text, truncation=True, max_length=LONGEST_PROMPT).input_ids
            ids_BS = torch.tensor([ids], device=encoder.device)
            tokens_BSD = encoder(input_ids=ids_BS, output_hidden_states=True).hidden_states[-1]
            follows_B = torch.tensor([not isinstance(prompt, NegativePrompt)], device=encoder.device)
            mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
            rows.append(Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS, "follows_B": follows_B}))
        return Conditioning.collate(rows)

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        """Its own size in whole patches, but of a megapixel and a side of 1024 pixels at most."""
        multiple = self.latents.pixel_multiple
        return shrunk(height, width, area=REFERENCE_AREA, side=REFERENCE_SIDE, multiple=multiple)

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        if not references:
            return Conditioning({})
        tokens, positions = [], []
        for number, pixels_B3HW in enumerate(references, start=1):
            latents_BCHW = self.encode_pixels(pixels_B3HW)
            at_N2 = grid(latents_BCHW.shape[2] // 2, latents_BCHW.shape[3] // 2, latents_BCHW.device)
            at_N3 = torch.cat([torch.full_like(at_N2[:, :1], number), at_N2], dim=1)
            tokens.append(patches_of(latents_BCHW, 2))
            positions.append(at_N3.expand(len(pixels_B3HW), -1, -1))
        return Conditioning(
            {
                "tokens_reference_BND": torch.cat(tokens, dim=1),
                POSITIONS: torch.cat(positions, dim=1),
            }
        )

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        at_BN3, references_BND = conditioning.get(POSITIONS), conditioning.get("tokens_reference_BND")
        if at_BN3 is not None and references_BND is not None:
            at_BN3 = at_BN3 * conditioning["follows_B"][:, None, None]
            references_BND = references_BND.to(self.dtype)
        predicted: Tensor = self.denoiser(
            noisy.to(self.dtype),
            1 - t_B,
            conditioning["tokens_BSD"].to(self.dtype),
            None if is_whole(conditioning) else conditioning["mask_BS"].bool(),
            references_BND,
            at_BN3,
            _columns(conditioning),
        )
        return -predicted

    def blocks(self) -> list[nn.Module]:
        """Without the refiners of references, which do not run where there are none."""
        denoiser = self.denoiser
        return [*denoiser.context_refiner, *denoiser.noise_refiner, *denoiser.layers]


def _columns(conditioning: Conditioning) -> list[slice]:
    """Where the patches of the first, second, ... reference are, in whichever rows have them."""
    at_BN3 = conditioning.on_host(POSITIONS) if POSITIONS in conditioning else None
    if at_BN3 is None or not at_BN3.shape[1]:
        return []
    numbers = range(1, int(at_BN3[..., 0].max()) + 1)
    found = [(at_BN3[..., 0] == number).any(dim=0).nonzero().flatten().tolist() for number in numbers]
    return [slice(columns[0], columns[-1] + 1) for columns in found]


def _instructed(prompt: str) -> str:
    """A prompt in the chat as released."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
