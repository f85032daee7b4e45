"""What HiDream-I1 and HiDream-E1 (arXiv 2505.22705) share: modules, names, prompts, prediction.

A transformer over 2x2 patches of FLUX's latents with a feed-forward of experts. Each block reads another hidden state
of Llama 3.1 beside T5's tokens and the states carried over; both CLIPs, with 248 positions, are only read pooled.
Padding is part of what it was trained on, so there is no mask. It predicts data - noise. Release, ComfyUI and
diffusers share the names.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, L layers of Llama, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.export_keys import ExportKeys
from burnish.families.hidream_transformer import transformer
from burnish.families.llama import llama_slot
from burnish.families.native import NativeNames, depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.slots import Slot, vae_slot
from burnish.families.text_slots import clip_slot, t5_slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape

PROMPT_TOKENS = 128  # of each encoder
HEAD_DIM = 128
I1_PIPELINE, E1_PIPELINE = "HiDreamImagePipeline", "HiDreamImageEditingPipeline"
_RESOLUTION = (128, 128)  # rows and columns of latents that I1's config foresees

_ATTENTION = ("*.attn1.to_[qkv]", "*.attn1.to_out", "*.attn1.to_[qkv]_t", "*.attn1.to_out_t")
_FEED_FORWARD = ("*.ff_t.w[123]", "*.ff_i.shared_experts.w[123]")
NAMES = NativeNames(
    table={},
    signs=("double_stream_blocks.0.block.adaLN_modulation.1.bias", "caption_projection.0.linear.weight"),
)
TARGETS: Mapping[str, TargetSet] = {
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
LATENTS = LatentShape(channels=16, compression=8, patch=2)


def export_keys(modelspec: str) -> ExportKeys:
    return ExportKeys(
        default="diffusers",
        formats=("diffusers", "comfy"),
        modelspec=modelspec,
        base_model_version=modelspec,
        prefix={"diffusers": "transformer.", "comfy": "diffusion_model."},
        readers={"comfy": ("ComfyUI", "diffusers")},
        tensors=NAMES.tensors,
        words={
            "text_encoder": "clip_l",
            "text_encoder_2": "clip_g",
            "text_encoder_3": "t5xxl",
            "text_encoder_4": "llama",
        },
    )


def transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
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


def slots(
    make: Callable[[dict[str, Any]], nn.Module] = transformer,
    config_of: Callable[[Mapping[str, Any], Layout], dict[str, Any]] = transformer_config,
) -> tuple[Slot, ...]:
    return (
        Slot("transformer", "denoiser", make, NAMES.denoiser, config_of),
        vae_slot(),
        clip_slot("text_encoder", "tokenizer", projection=True),
        clip_slot("text_encoder_2", "tokenizer_2", projection=True, large=True),
        t5_slot("text_encoder_3", "tokenizer_3"),
        llama_slot("text_encoder_4", "tokenizer_4", file_hint="llama_3.1_8b_instruct.safetensors"),
    )


def edits(index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a diffusers folder is of HiDream-E1: its index names the editing pipeline, or its transformer is told of
    more latents than I1's, two pictures side by side."""
    return index.get("_class_name") == E1_PIPELINE or holds_two_pictures(config)


def holds_two_pictures(config: Mapping[str, Any]) -> bool:
    rows, columns = config.get("max_resolution") or _RESOLUTION
    return rows != columns or rows * columns > _RESOLUTION[0] * _RESOLUTION[1]


def file_edits(layout: Layout) -> bool:
    """Whether a single file is of HiDream-E1, whose tensors have I1's names and shapes: its name has to say it, as
    ComfyUI's do (hidream_e1_full_bf16, hidream_e1_1_bf16)."""
    name = next(iter(layout.values())).file.name.lower()
    return "hidream_e1" in name.replace("-", "_")


def with_depth(config: dict[str, Any], depth: int) -> dict[str, Any]:
    double, single = int(config["num_layers"]), int(config["num_single_layers"])
    layers = [int(number) for number in config["llama_layers"]]
    return {
        **config,
        "num_layers": min(depth, double),
        "num_single_layers": min(depth, single),
        "llama_layers": [*layers[: min(depth, double)], *layers[double : double + min(depth, single)]],
    }


def example_conditioning(denoiser: Any, batch: int, generator: torch.Generator) -> Conditioning:
    config = denoiser.config
    of_t5, of_llama = config.caption_channels
    layers = max(config.llama_layers) + 1
    shapes = {
        "tokens_BSD": (batch, PROMPT_TOKENS, of_t5),
        "tokens_llama_BSLD": (batch, PROMPT_TOKENS, layers, of_llama),
        "pooled_BD": (batch, config.text_emb_dim),
    }
    return Conditioning({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def encode_prompts(family: PipelineFamily, prompts: Sequence[str]) -> Conditioning:
    """Each of the four encoders reads the first 128 tokens of its own."""
    pooled = []
    for folder in ("text_encoder", "text_encoder_2"):
        ids_BS, _ = _tokens(family, folder, prompts)
        pooled.append(family.module(folder)(ids_BS).text_embeds)
    ids_BS, mask_BS = _tokens(family, "text_encoder_3", prompts)
    tokens_BSD = family.module("text_encoder_3")(ids_BS, attention_mask=mask_BS).last_hidden_state
    ids_BS, mask_BS = _tokens(family, "text_encoder_4", prompts)
    states = family.module("text_encoder_4")(
        ids_BS, attention_mask=mask_BS, output_hidden_states=True
    ).hidden_states
    return Conditioning(
        {
            "tokens_BSD": tokens_BSD.to(family.dtype),
            "tokens_llama_BSLD": torch.stack(states[1:], dim=2),  # the first is that of the embedding
            "pooled_BD": torch.cat(pooled, dim=-1),
        }
    )


def _tokens(family: PipelineFamily, folder: str, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    tokenizer, encoder = family.tokenizer(folder), family.module(folder)
    if folder == "text_encoder_4":
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(
        [written_out(tokenizer, str(prompt)) for prompt in prompts],
        padding="max_length",
        max_length=PROMPT_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids.to(encoder.device), encoded.attention_mask.to(encoder.device)


def predict(
    denoiser: Any, noisy_BCHW: Tensor, t_B: Tensor, conditioning: Conditioning, dtype: torch.dtype
) -> Tensor:
    """Velocity (B, C, H, W)."""
    llama_BSLD = conditioning["tokens_llama_BSLD"].to(dtype)
    predicted: Tensor = denoiser(
        hidden_states=noisy_BCHW.to(dtype),
        timesteps=t_B * 1000,
        encoder_hidden_states_t5=conditioning["tokens_BSD"].to(dtype),
        encoder_hidden_states_llama3=llama_BSLD.permute(2, 0, 1, 3),
        pooled_embeds=conditioning["pooled_BD"].to(dtype),
        return_dict=False,
    )[0]
    return -predicted


def require_llama(path: Path) -> None:
    """HiDream's folder on the Hub comes without Llama, whose owner wants its own licence accepted.

    Raises:
        ModelError: this folder is without it, too.
    """
    missing = [name for name in ("text_encoder_4", "tokenizer_4") if not (path / name).is_dir()]
    if path.is_dir() and missing:
        raise ModelError(
            f"{path} lacks {' and '.join(missing)}: HiDream is released without Llama, which it reads.",
            remedy="Download meta-llama/Llama-3.1-8B-Instruct, and name its folder under `model.text_encoders`.",
        )
