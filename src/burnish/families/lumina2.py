"""Lumina-Image 2.0 by Alpha-VLLM (arXiv 2503.21758).

A transformer over 2x2 patches of FLUX's latents and the caption's tokens in one sequence, with grouped queries. It
reads Gemma 2's states before the last layer. Its time runs the other way (data at 1) and it predicts data - noise.
A system prompt stands before captions, not before negative prompts or the empty one.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import gemma
from burnish.families.masked import trimmed
from burnish.families.native import NativeNames, depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Slot, vae_slot
from burnish.families.weights import Layout
from burnish.family import NegativePrompt, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

PROMPT_TOKENS = 256
# What the model was trained with, for pictures from captions (README of the release).
SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
    "based on textual prompts or user prompts. <Prompt Start> "
)

_ATTENTION = ("*.attn.to_[qkv]", "*.attn.to_out.0")
_FEED_FORWARD = ("*.feed_forward.linear_[123]",)
_MODULATION = "*.norm1.linear"
_OUTSIDE = ("x_embedder", "time_caption_embed.*", "norm_out.*")


def _block(stack: str, *, modulated: bool) -> dict[str, tuple[str, ...] | str]:
    return {
        f"{stack}.attention.qkv": tuple(f"{stack}.attn.to_{x}" for x in "qkv"),
        f"{stack}.attention.out": f"{stack}.attn.to_out.0",
        f"{stack}.attention.q_norm": f"{stack}.attn.norm_q",
        f"{stack}.attention.k_norm": f"{stack}.attn.norm_k",
        f"{stack}.attention_norm1": f"{stack}.norm1.norm" if modulated else f"{stack}.norm1",
        f"{stack}.attention_norm2": f"{stack}.norm2",
        **{f"{stack}.feed_forward.w{n}": f"{stack}.feed_forward.linear_{n}" for n in (1, 2, 3)},
        f"{stack}.adaLN_modulation.1": f"{stack}.norm1.linear",
    }


NAMES = NativeNames(
    table={
        "cap_embedder.0": "time_caption_embed.caption_embedder.0",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
        **_block("context_refiner.#", modulated=False),
        **_block("noise_refiner.#", modulated=True),
        **_block("layers.#", modulated=True),
    },
    signs=("cap_embedder.0.weight", "noise_refiner.0.attention.qkv.weight", "x_embedder.weight"),
    absent=("x_pad_token", "clip_text_pooled_proj.0.weight"),  # Z-Image and NewBie, built on the same plan
)


def _rows(native: Layout) -> dict[str, int]:
    """Key and value have fewer heads than the query, which is as wide as the model."""
    width = native["x_embedder.weight"].shape[0]
    rest = native["noise_refiner.0.attention.qkv.weight"].shape[0] - width
    return {"*.attn.to_k": rest // 2, "*.attn.to_v": rest // 2}


def _find_transformer(layout: Layout) -> Layout | None:
    if "time_caption_embed.caption_embedder.0.weight" in layout:
        # OmniGen2, built on the same plan, has an embedder of references beside it.
        return None if "ref_image_patch_embedder.weight" in layout else layout
    return NAMES.denoiser(layout, _rows)


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    width = layout["x_embedder.weight"].shape[0]
    head_dim = layout["layers.0.attn.norm_q.weight"].shape[0]
    return {
        **shipped,
        "hidden_size": width,
        "num_layers": depth(layout, "layers."),
        "num_refiner_layers": depth(layout, "noise_refiner."),
        "num_attention_heads": width // head_dim,
        "num_kv_heads": layout["layers.0.attn.to_k.weight"].shape[0] // head_dim,
        "cap_feat_dim": layout["time_caption_embed.caption_embedder.0.weight"].shape[0],
    }


class Positions(Lumina2RotaryPosEmbed):  # type: ignore[misc]
    """Diffusers' positions of caption and picture, which also answer where there are no numbers.

    It reads the captions' lengths from the mask; without weights (meta device) every caption is taken to be whole.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        if attention_mask.is_meta:
            attention_mask = torch.ones(attention_mask.shape, dtype=torch.bool)
        return super().forward(hidden_states, attention_mask)


def _transformer(config: dict[str, Any]) -> Lumina2Transformer2DModel:
    model = Lumina2Transformer2DModel.from_config(config)
    its = model.config
    model.rope_embedder = Positions(10_000, its.axes_dim_rope, its.axes_lens, its.patch_size)
    return model


def renormalized_guidance(with_prompt: Tensor, without: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance, each row of each channel then as long as that of the prompt alone.

    As the released sampler does it, along the last axis of the latents (`transport` of the release, CFG-Renorm).
    """
    guided = without + scale * (with_prompt - without)
    shorter: Tensor = with_prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    return guided * shorter


class Lumina2(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 2304) and `mask_BS`, S the longest caption."""

    name: ClassVar[str] = "lumina2"
    title: ClassVar[str] = "Lumina-Image 2.0"
    pipelines = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
    slots = (
        Slot(
            "transformer",
            "denoiser",
            _transformer,
            _find_transformer,
            _transformer_config,
            unused=("norm_final.weight",),
        ),
        vae_slot(),
        gemma.slot(),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            (*_ATTENTION, *_FEED_FORWARD, _MODULATION), "Every layer of the blocks, modulations included."
        ),
    }
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec="lumina-2",
        base_model_version="lumina2",
        prefix={"comfy": "diffusion_model.", "diffusers": "transformer."},
        native=NAMES.native_module,
        tensors=NAMES.tensors,
        words={"text_encoder": "gemma2_2b"},
        # diffusers takes a native file only if it has every layer of every block, and no other.
        complete=(*_ATTENTION, *_FEED_FORWARD, _MODULATION),
        unreadable={"comfy": _OUTSIDE},
    )
    latents = LatentShape(channels=16, compression=8, patch=2)
    defaults = SamplerDefaults(
        steps=30, guidance=4.0, size=(1024, 1024), negative_prompt=True, guide=renormalized_guidance
    )
    prompt_limit = PROMPT_TOKENS

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        width = self.denoiser.config.cap_feat_dim
        return Conditioning(
            {
                "tokens_BSD": torch.randn(batch, PROMPT_TOKENS, width, generator=generator),
                "mask_BS": torch.ones(batch, PROMPT_TOKENS, dtype=torch.bool),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        return gemma.count_tokens(self.tokenizer("text_encoder"), _with_system_prompt(prompt))

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """The system prompt counts among the tokens that are read."""
        encoder = self.module("text_encoder")
        texts = [_with_system_prompt(prompt) for prompt in prompts]
        ids_BS, mask_BS = gemma.token_ids(self.tokenizer("text_encoder"), texts, PROMPT_TOKENS)
        ids_BS, mask_BS = ids_BS.to(encoder.device), mask_BS.to(encoder.device)
        states = encoder(ids_BS, attention_mask=mask_BS, output_hidden_states=True).hidden_states
        tokens_BSD, mask_BS = trimmed(states[-2], mask_BS)
        return Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS})

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        predicted: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=1 - t_B,
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            encoder_attention_mask=conditioning["mask_BS"],
            return_dict=False,
        )[0]
        return -predicted

    def blocks(self) -> list[nn.Module]:
        denoiser = self.denoiser
        return [*denoiser.context_refiner, *denoiser.noise_refiner, *denoiser.layers]


def _with_system_prompt(prompt: str) -> str:
    if not prompt or isinstance(prompt, NegativePrompt):
        return str(prompt)
    return SYSTEM_PROMPT + prompt
