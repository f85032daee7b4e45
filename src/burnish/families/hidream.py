"""HiDream-I1 by HiDream.ai (arXiv 2505.22705): full, dev and fast.

A transformer over 2x2 patches of FLUX's latents with a feed-forward of experts. Each block reads another hidden state
of Llama 3.1 beside T5's tokens and the states carried over; both CLIPs, with 248 positions, are only read pooled.
Padding is part of what it was trained on, so there is no mask. It predicts data - noise. Dev and fast are distilled
and run without guidance. Release, ComfyUI and diffusers share the names.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, L layers of Llama, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.families.hidream_transformer import transformer
from burnish.families.llama import llama_slot
from burnish.families.native import NativeNames, depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Slot, vae_slot
from burnish.families.sources import locate
from burnish.families.text_slots import clip_slot, t5_slot
from burnish.families.weights import Layout
from burnish.family import (
    Conditioning,
    ExportKeys,
    LatentShape,
    ModelSource,
    Part,
    Prediction,
    SamplerDefaults,
    TargetSet,
)

PROMPT_TOKENS = 128  # of each encoder
HEAD_DIM = 128
DEV_SHIFT = 6.0  # fast has 3, as full
_DISTILLED = "FlowMatchLCMScheduler"  # that of dev and fast; full comes with UniPC

_ATTENTION = ("*.attn1.to_[qkv]", "*.attn1.to_out", "*.attn1.to_[qkv]_t", "*.attn1.to_out_t")
_FEED_FORWARD = ("*.ff_t.w[123]", "*.ff_i.shared_experts.w[123]")
_EXPERTS = "*.ff_i.experts.*.w[123]"
NAMES = NativeNames(
    table={},
    signs=("double_stream_blocks.0.block.adaLN_modulation.1.bias", "caption_projection.0.linear.weight"),
)


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    width = layout["x_embedder.proj.weight"].shape[0]
    last = max(int(name.split(".")[1]) for name in layout if name.startswith("caption_projection."))
    return {
        **shipped,
        "num_layers": depth(layout, "double_stream_blocks."),
        "num_single_layers": depth(layout, "single_stream_blocks."),
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": width // HEAD_DIM,
        "caption_channels": [layout[f"caption_projection.{n}.linear.weight"].shape[1] for n in (last, 0)],
        "text_emb_dim": layout["p_embedder.pooled_embedder.linear_1.weight"].shape[1],
    }


class HiDream(PipelineFamily):
    """Conditioning: `tokens_BSD` of T5 (B, 128, 4096), `tokens_llama_BSLD` of every layer of Llama
    (B, 128, 32, 4096), `pooled_BD` (B, 768 + 1280)."""

    name: ClassVar[str] = "hidream"
    title: ClassVar[str] = "HiDream-I1"
    pipelines = ("HiDreamImagePipeline",)
    spacing = "scheduler"
    slots = (
        Slot("transformer", "denoiser", transformer, NAMES.denoiser, _transformer_config),
        vae_slot(),
        clip_slot("text_encoder", "tokenizer", projection=True),
        clip_slot("text_encoder_2", "tokenizer_2", projection=True, large=True),
        t5_slot("text_encoder_3", "tokenizer_3"),
        llama_slot("text_encoder_4", "tokenizer_4", file_hint="llama_3.1_8b_instruct.safetensors"),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet(
            (*_ATTENTION, *_FEED_FORWARD), "Attention, the shared experts and the feed-forward of text."
        ),
        "all": TargetSet(
            (
                "double_stream_blocks.*",
                "single_stream_blocks.*",
                "caption_projection.*",
                "final_layer.linear",
            ),
            "Every layer of the blocks, experts and modulations included, and the first and last of tokens.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers", "comfy"),
        modelspec="hidream-i1",
        base_model_version="hidream-i1",
        prefix={"diffusers": "transformer.", "comfy": "diffusion_model."},
    )
    latents = LatentShape(channels=16, compression=8, patch=2)
    defaults = SamplerDefaults(steps=50, guidance=5.0, size=(1024, 1024), negative_prompt=True)
    prompt_limit = PROMPT_TOKENS

    @classmethod
    def load(
        cls,
        source: ModelSource,
        parts: frozenset[Part],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        prediction: Prediction | None = None,
    ) -> Self:
        if "text_encoders" in parts and not source.text_encoders and cls.fits(source):
            _require_llama(locate(source))
        return super().load(source, parts, dtype=dtype, device=device, prediction=prediction)

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        double, single = int(config["num_layers"]), int(config["num_single_layers"])
        layers = [int(number) for number in config["llama_layers"]]
        return {
            **config,
            "num_layers": min(depth, double),
            "num_single_layers": min(depth, single),
            "llama_layers": [*layers[: min(depth, double)], *layers[double : double + min(depth, single)]],
        }

    def configure(self) -> None:
        if self.schedule.scheduler.get("_class_name") == _DISTILLED:
            steps = 28 if self.schedule.shift == DEV_SHIFT else 16
            self.defaults = replace(self.defaults, steps=steps, guidance=1.0, negative_prompt=False)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        config = self.denoiser.config
        of_t5, of_llama = config.caption_channels
        layers = max(config.llama_layers) + 1
        shapes = {
            "tokens_BSD": (batch, PROMPT_TOKENS, of_t5),
            "tokens_llama_BSLD": (batch, PROMPT_TOKENS, layers, of_llama),
            "pooled_BD": (batch, config.text_emb_dim),
        }
        return Conditioning({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """Each of the four encoders reads the first 128 tokens of its own."""
        pooled = []
        for folder in ("text_encoder", "text_encoder_2"):
            ids_BS, _ = self._tokens(folder, prompts)
            pooled.append(self.module(folder)(ids_BS).text_embeds)
        ids_BS, mask_BS = self._tokens("text_encoder_3", prompts)
        tokens_BSD = self.module("text_encoder_3")(ids_BS, attention_mask=mask_BS).last_hidden_state
        ids_BS, mask_BS = self._tokens("text_encoder_4", prompts)
        states = self.module("text_encoder_4")(
            ids_BS, attention_mask=mask_BS, output_hidden_states=True
        ).hidden_states
        return Conditioning(
            {
                "tokens_BSD": tokens_BSD.to(self.dtype),
                "tokens_llama_BSLD": torch.stack(states[1:], dim=2),  # the first is that of the embedding
                "pooled_BD": torch.cat(pooled, dim=-1),
            }
        )

    def _tokens(self, folder: str, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokenizer, encoder = self.tokenizer(folder), self.module(folder)
        if folder == "text_encoder_4":
            tokenizer.pad_token = tokenizer.eos_token
        encoded = tokenizer(
            [str(prompt) for prompt in prompts],
            padding="max_length",
            max_length=PROMPT_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        return encoded.input_ids.to(encoder.device), encoded.attention_mask.to(encoder.device)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        llama_BSLD = conditioning["tokens_llama_BSLD"].to(self.dtype)
        predicted: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timesteps=t_B * 1000,
            encoder_hidden_states_t5=conditioning["tokens_BSD"].to(self.dtype),
            encoder_hidden_states_llama3=llama_BSLD.permute(2, 0, 1, 3),
            pooled_embeds=conditioning["pooled_BD"].to(self.dtype),
            return_dict=False,
        )[0]
        return -predicted

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.double_stream_blocks, *self.denoiser.single_stream_blocks]


def _require_llama(path: Path) -> None:
    """HiDream's folder on the Hub comes without Llama, whose owner wants its own licence accepted."""
    missing = [name for name in ("text_encoder_4", "tokenizer_4") if not (path / name).is_dir()]
    if path.is_dir() and missing:
        raise ModelError(
            f"{path} lacks {' and '.join(missing)}: HiDream is released without Llama, which it reads.",
            remedy="Download the model to a folder of your own, and meta-llama/Llama-3.1-8B-Instruct into "
            "`text_encoder_4` below it, with its tokenizer's files also in `tokenizer_4`.",
        )
