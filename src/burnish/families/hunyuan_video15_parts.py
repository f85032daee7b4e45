"""The modules of HunyuanVideo 1.5 as they are made here: time in float32, clips one at a time, Qwen by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from burnish.families import qwen
from burnish.families.slots import Slot
from burnish.families.text_slots import language_model_slot
from burnish.families.weights import Layout, below


def transformer_slot() -> Slot:
    return Slot("transformer", "denoiser", _make_transformer)


def vae_slot() -> Slot:
    return Slot("vae", "vae", _make_vae)


class Time(nn.Module):
    """In place of diffusers' HunyuanVideo15TimeEmbedding, with the same sub-modules: waves of time in float32.

    Diffusers takes time itself in the number type of the weights, by which bfloat16 would confuse neighbouring steps.
    """

    def __init__(self, released: nn.Module) -> None:
        super().__init__()
        self.time_proj = released.get_submodule("time_proj")
        self.timestep_embedder = released.get_submodule("timestep_embedder")

    def forward(self, timestep_B: Tensor, timestep_r: Tensor | None = None) -> Tensor:
        weight = self.timestep_embedder.get_submodule("linear_1").get_parameter("weight")
        embedded_BD: Tensor = self.timestep_embedder(self.time_proj(timestep_B.float()).to(weight.dtype))
        return embedded_BD


def _make_transformer(config: Mapping[str, Any]) -> HunyuanVideo15Transformer3DModel:
    transformer: HunyuanVideo15Transformer3DModel = HunyuanVideo15Transformer3DModel.from_config(dict(config))
    transformer.time_embed = Time(transformer.time_embed)
    return transformer


def _make_vae(config: Mapping[str, Any]) -> AutoencoderKLHunyuanVideo15:
    vae: AutoencoderKLHunyuanVideo15 = AutoencoderKLHunyuanVideo15.from_config(dict(config))
    vae.use_slicing = True  # diffusers' mask of its attention is of one clip
    return vae


def text_slot() -> Slot:
    """Qwen2.5-VL's language model by itself, as the release keeps it."""

    def tidy(layout: Layout) -> Layout:
        return below(layout, "model.") or layout

    return language_model_slot(
        "text_encoder",
        "tokenizer",
        config=Qwen2_5_VLTextConfig,
        model=Qwen2_5_VLTextModel,
        signs=("layers.0.self_attn.q_proj.bias", "embed_tokens.weight"),
        tidy=tidy,
        ship_tokenizer=qwen.shipped_tokenizer,
    )
