"""Qwen-Image by Alibaba (arXiv 2508.02324), of August and December 2025.

The denoiser and the rest that its editing releases share is in `qwen_image_model`. It reads the last states of
Qwen2.5-VL 7B, of the caption behind an instruction whose own states are left out.

Shape letters: B batch, S tokens of text, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.families import qwen_image_model, video_vae
from burnish.families.masked import trimmed
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen25_vl_slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import TargetSet

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
INSTRUCTION_TOKENS = 34  # before the caption, by Qwen's tokenizer


class QwenImage(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 3584) and `mask_BS`, S the longest caption and the end of its chat."""

    name: ClassVar[str] = "qwen_image"
    title: ClassVar[str] = "Qwen-Image"
    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    slots = (
        qwen_image_model.transformer_slot(),
        qwen_image_model.vae_slot(),
        qwen25_vl_slot(),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = qwen_image_model.TARGETS
    export = qwen_image_model.export_keys("qwen-image")
    latents = qwen_image_model.LATENTS
    defaults = qwen_image_model.DEFAULTS
    prompt_limit = qwen_image_model.PROMPT_TOKENS

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        return not qwen_image_model.is_for_editing(denoiser)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        return qwen_image_model.example_conditioning(self.denoiser, batch, generator)

    def count_tokens(self, prompt: str) -> int:
        tokenizer = self.tokenizer("text_encoder")
        ids = tokenizer(TEMPLATE.format(written_out(tokenizer, prompt))).input_ids
        return len(ids) - INSTRUCTION_TOKENS

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        encoded = tokenizer(
            [TEMPLATE.format(written_out(tokenizer, prompt)) for prompt in prompts],
            padding=True,
            max_length=INSTRUCTION_TOKENS + self.prompt_limit,
            truncation=True,
            return_tensors="pt",
        )
        mask_BS = encoded.attention_mask.to(encoder.device).bool()
        states_BSD = encoder(encoded.input_ids.to(encoder.device), attention_mask=mask_BS).last_hidden_state
        tokens_BSD, mask_BS = trimmed(states_BSD[:, INSTRUCTION_TOKENS:], mask_BS[:, INSTRUCTION_TOKENS:])
        return Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS})

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        return qwen_image_model.predict(self.denoiser, noisy, t_B, conditioning, self.dtype)

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
