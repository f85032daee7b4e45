"""Qwen-Image and its editing releases: double-stream blocks, Qwen2.5-VL, the VAE with a time axis."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny_pipelines import drawn
from tiny_qwen import qwen25_vl, qwen_tokenizer
from torch import Tensor

from burnish.families.qwen_image_model import NAMES
from tiny import Case

WIDTH = 256  # of the text encoder


def transformer(seed: int, *, zero_cond_t: bool = False) -> QwenImageTransformer2DModel:
    return drawn(
        seed,
        lambda: QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        ),
    )


def vae(seed: int) -> AutoencoderKLQwenImage:
    """With the released means and deviations of the latents."""
    return drawn(seed, lambda: AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1))


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )


def _qwen_image(seed: int) -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        transformer=transformer(seed),
        vae=vae(seed + 1),
        text_encoder=drawn(seed + 2, lambda: qwen25_vl(tokenizer, WIDTH)),
        tokenizer=tokenizer,
        scheduler=scheduler(),
    )


class EditWithoutProcessor(QwenImageEditPipeline):
    """Loads without the released processor, which needs torchvision; what it does is in `tiny_qwen.Processor`."""

    _optional_components: ClassVar[list[str]] = ["processor"]


class EditPlusWithoutProcessor(QwenImageEditPlusPipeline):
    """As `EditWithoutProcessor`."""

    _optional_components: ClassVar[list[str]] = ["processor"]


def _edit(seed: int, *, kind: type[DiffusionPipeline], zero_cond_t: bool) -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    return kind(
        transformer=transformer(seed, zero_cond_t=zero_cond_t),
        vae=vae(seed + 1),
        text_encoder=drawn(seed + 2, lambda: qwen25_vl(tokenizer, WIDTH)),
        tokenizer=tokenizer,
        processor=None,
        scheduler=scheduler(),
    )


def unpacked(pipeline: DiffusionPipeline, patches_BND: Tensor) -> Tensor:
    latents: Tensor = pipeline._unpack_latents(patches_BND, 64, 96, 8)[:, :, 0]
    return latents


# The text's tokens leave after the last block: what they are there has no effect.
IDLE = tuple(
    f"transformer_blocks.1.{name}"
    for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
)
CASES = {
    "qwen_image": Case(
        "qwen_image",
        _qwen_image,
        unpack=unpacked,
        guidance_argument="true_cfg_scale",
        idle=IDLE,
        native=NAMES,
    ),
    **{
        name: Case(
            "qwen_image_edit",
            partial(_edit, kind=kind.__base__, zero_cond_t=name.endswith("2511")),
            idle=IDLE,
            pipeline=kind,
            compared_in="test_qwen_image_edit.py",
            learns=False,  # there, too
        )
        for name, kind in {
            "qwen_image_edit": EditWithoutProcessor,
            "qwen_image_edit_2509": EditPlusWithoutProcessor,
            "qwen_image_edit_2511": EditPlusWithoutProcessor,
        }.items()
    },
}
