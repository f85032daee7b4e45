"""What Qwen-Image (arXiv 2508.02324) and its editing releases share: denoiser, VAE, names, prediction, guidance.

A transformer of double-stream blocks over 2x2 patches of 16-channel latents that predicts velocity. Reference
pictures follow the picture as further patches; their place in the order tells them apart.

Shape letters: B batch, C channels, H W height and width of latents, S tokens of text, N patches of references,
R references, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import packing, video_vae
from burnish.families.guidance import renormalized_patches
from burnish.families.masked import is_whole
from burnish.families.native import NativeNames, depth
from burnish.families.rows import by_kind
from burnish.families.slots import Slot
from burnish.families.weights import Layout
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

_Sizes = tuple[tuple[int, int], ...]  # rows and columns of patches, by reference

PROMPT_TOKENS = 1024  # of the caption; what stands before it is read besides
EXAMPLE_TOKENS = 64
REFERENCE, SIZES = "tokens_reference_BND", "tokens_reference_size_BR2"
# ComfyUI's file of the edit release of November 2025: references are told that they hold no noise.
_ZERO_TIME = "__index_timestep_zero__"

_ATTENTION = ("*.attn.to_[qkv]", "*.attn.to_out.0", "*.attn.add_[qkv]_proj", "*.attn.to_add_out")
_FEED_FORWARD = ("*.img_mlp.net.0.proj", "*.img_mlp.net.2", "*.txt_mlp.net.0.proj", "*.txt_mlp.net.2")
# The release and ComfyUI have diffusers' names.
NAMES = NativeNames(
    table={}, signs=("txt_norm.weight", "img_in.weight", "transformer_blocks.0.img_mod.1.weight")
)
TARGETS: Mapping[str, TargetSet] = {
    "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
    "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
    "all": TargetSet(
        ("transformer_blocks.*", "img_in", "txt_in", "proj_out"),
        "Every layer of the blocks, modulations included, and the first and last of tokens.",
    ),
}
LATENTS = LatentShape(channels=16, compression=8, patch=2)
DEFAULTS = SamplerDefaults(
    steps=50, guidance=4.0, size=(1328, 1328), negative_prompt=True, guide=renormalized_patches
)


def export_keys(modelspec: str) -> ExportKeys:
    return ExportKeys(
        default="diffusers",
        formats=("diffusers", "comfy", "kohya"),
        modelspec=modelspec,
        base_model_version="qwen_image",
        prefix={"diffusers": "transformer.", "comfy": "diffusion_model.", "kohya": "lora_unet_"},
        readers={"comfy": ("ComfyUI", "diffusers")},
        native=NAMES.native_module,
        native_kohya=("ComfyUI", "diffusers"),
        tensors=NAMES.tensors,
        words={"text_encoder": "qwen25_7b"},
    )


def transformer_slot() -> Slot:
    return Slot(
        "transformer",
        "denoiser",
        QwenImageTransformer2DModel.from_config,
        NAMES.denoiser,
        _transformer_config,
        unused=(_ZERO_TIME,),
    )


def vae_slot() -> Slot:
    """Its separate file is named as Wan's VAE, from which it was trained."""
    return video_vae.wan_vae_slot(AutoencoderKLQwenImage.from_config, "qwen_image_vae.safetensors")


def tells_references_apart(layout: Layout) -> bool:
    """Whether a single file is of a release that knows references to hold no noise."""
    return _ZERO_TIME in layout


def is_for_editing(layout: Layout) -> bool:
    """Whether a single file is of an editing release, whose tensors have the same names and shapes.

    One of them is marked by a tensor; of the others the file's name has to say it, as ComfyUI's do.
    """
    return tells_references_apart(layout) or "edit" in next(iter(layout.values())).file.name.lower()


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    head_dim = layout["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    width, patch = layout["img_in.weight"].shape
    return {
        **shipped,
        "in_channels": patch,
        "num_layers": depth(layout, "transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": layout["txt_in.weight"].shape[1],
        "zero_cond_t": tells_references_apart(layout),
    }


def example_conditioning(denoiser: Any, batch: int, generator: torch.Generator) -> Conditioning:
    width = denoiser.config.joint_attention_dim
    return Conditioning(
        {
            "tokens_BSD": torch.randn(batch, EXAMPLE_TOKENS, width, generator=generator),
            "mask_BS": torch.ones(batch, EXAMPLE_TOKENS, dtype=torch.bool),
        }
    )


def described_references(references_BCHW: Sequence[Tensor]) -> Conditioning:
    """Latents of references as patches (B, N, 64), and the rows and columns of patches of each (B, R, 2)."""
    if not references_BCHW:
        return Conditioning({})
    batch = len(references_BCHW[0])
    sizes = [[length // 2 for length in latents.shape[2:]] for latents in references_BCHW]
    return Conditioning(
        {
            REFERENCE: torch.cat([packing.pack(latents) for latents in references_BCHW], dim=1),
            SIZES: torch.tensor(sizes, device=references_BCHW[0].device).expand(batch, -1, -1).contiguous(),
        }
    )


def predict(
    denoiser: Any, noisy: Tensor, t_B: Tensor, conditioning: Conditioning, dtype: torch.dtype
) -> Tensor:
    """Velocity (B, C, H, W)."""

    def predicted(sizes: _Sizes, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        return _predict(denoiser, dtype, sizes, noisy, t_B, conditioning)

    # The denoiser takes one set of positions: rows whose references differ in size do not go together.
    return by_kind(_sizes(conditioning, len(noisy)), noisy, t_B, conditioning, predicted)


def _sizes(conditioning: Conditioning, batch: int) -> list[_Sizes]:
    """Rows and columns of the references of each row of the batch."""
    sizes_BR2 = conditioning.on_host(SIZES) if SIZES in conditioning else None
    if sizes_BR2 is None:
        return [()] * batch
    # Rows of zeros are padding.
    return [tuple((rows, columns) for rows, columns in one if rows) for one in sizes_BR2.tolist()]


def _predict(
    denoiser: Any, dtype: torch.dtype, sizes: _Sizes, noisy: Tensor, t_B: Tensor, conditioning: Conditioning
) -> Tensor:
    """Of rows that all have references of these `sizes`."""
    height, width = noisy.shape[2:]
    patches_BND = packing.pack(noisy)
    shapes = [(1, height // 2, width // 2), *((1, rows, columns) for rows, columns in sizes)]
    drawn = patches_BND.shape[1]
    if sizes:
        there = sum(rows * columns for rows, columns in sizes)
        reference_BND = conditioning[REFERENCE][:, :there].to(patches_BND.dtype)
        patches_BND = torch.cat([patches_BND, reference_BND], dim=1)
    predicted_BND: Tensor = denoiser(
        hidden_states=patches_BND.to(dtype),
        timestep=t_B.to(torch.float32),
        encoder_hidden_states=conditioning["tokens_BSD"].to(dtype),
        encoder_hidden_states_mask=None if is_whole(conditioning) else conditioning["mask_BS"],
        img_shapes=[shapes] * len(noisy),
        return_dict=False,
    )[0]
    return packing.unpack(predicted_BND[:, :drawn], height, width)
