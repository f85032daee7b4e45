"""Qwen-Image 2.1 and its Turbo release: single-stream blocks, Qwen3-VL with its eyes, an autoencoder with alpha."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline, QwenImage21Transformer2DModel
from tiny_pipelines import drawn
from tiny_qwen import qwen3_vl_lm, qwen3_vl_processor, qwen_tokenizer
from tiny_video_vae import qwen_image21_vae
from torch import Tensor
from transformers import AutoTokenizer

from burnish.families.qwen_image21 import NAMES, TURBO_SIGMAS
from tiny import Case

WIDTH = 32  # of the text encoder


class WithoutVideosAndAlpha(QwenImage21Pipeline):
    """Loads without what needs torchvision, and gives the colours of pictures alone, as Burnish does.

    Args (from_pretrained):
        fewest_pixels: at which prompts are shown a picture.
    """

    @classmethod
    def from_pretrained(cls, folder: Path, *, fewest_pixels: int = 65_536, **options: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(folder / "processor")
        processor = qwen3_vl_processor(tokenizer, fewest_pixels=fewest_pixels)
        return super().from_pretrained(folder, processor=processor, **options)

    def __call__(self, *args: Any, output_type: str = "pil", **options: Any) -> Any:
        answer = super().__call__(*args, output_type=output_type, **options)
        if output_type == "pt":
            answer.images = answer.images[:, :3]
        return answer


def scheduler(*, turbo: bool) -> FlowMatchEulerDiscreteScheduler:
    if turbo:
        return FlowMatchEulerDiscreteScheduler()
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )


def _qwen_image21(seed: int, *, turbo: bool = False) -> QwenImage21Pipeline:
    tokenizer = qwen_tokenizer(qwen3=True)
    return QwenImage21Pipeline(
        transformer=drawn(
            seed,
            lambda: QwenImage21Transformer2DModel(
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=3,
                context_in_dim=WIDTH,
                axes_dims_rope=(4, 6, 6),
            ),
        ),
        vae=drawn(seed + 1, qwen_image21_vae),
        text_encoder=drawn(seed + 2, lambda: qwen3_vl_lm(tokenizer, WIDTH)),
        processor=qwen3_vl_processor(tokenizer),
        scheduler=scheduler(turbo=turbo),
        sample_sigmas=list(TURBO_SIGMAS) if turbo else None,
    )


def unpacked(pipeline: QwenImage21Pipeline, latents_BNC: Tensor) -> Tensor:
    latents: Tensor = pipeline._unpack_latents(latents_BNC, 64, 96, 16)[:, :, 0]
    return latents


CASES = {
    "qwen_image21": Case(
        "qwen_image21",
        _qwen_image21,
        unpack=unpacked,
        guidance_argument="true_cfg_scale",
        batched=False,  # the padding of a shorter prompt moves its picture on
        native=NAMES,
        pipeline=WithoutVideosAndAlpha,
    ),
    "qwen_image21_turbo": Case(
        "qwen_image21",
        partial(_qwen_image21, turbo=True),
        pipeline=WithoutVideosAndAlpha,
        compared_in="test_qwen_image21.py",  # in as many steps as it was made for
        learns=False,  # as the other
    ),
}
