"""Qwen-Image-Edit by Alibaba: the first release, of one picture, and those of 2509 and 2511, of several.

Qwen-Image's denoiser, with the references' latents after those of the picture that is drawn. The prompts see the
references too: Qwen2.5-VL reads them in the chat before the caption, scaled down in the later releases. The release
of 2511 tells the denoiser that references hold no noise.

Shape letters: B batch, C channels, H W height and width of latents or pixels, S tokens of text, N patches of
references, R references, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.families import qwen_eyes, qwen_image_model, reference_sizes, video_vae
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen25_vl_slot
from burnish.families.seen_pictures import picture_of
from burnish.families.slots import Config
from burnish.families.sources import locate
from burnish.families.token_words import written_out
from burnish.families.weights import Layout, layout_of
from burnish.family import Capabilities, ModelSource, TargetSet

TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new "
    "image that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
INSTRUCTION_TOKENS = 64  # before the pictures and the caption, by Qwen's tokenizer
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
REFERENCES = 3  # that the releases of 2509 and 2511 were trained with, at most
REFERENCE_AREA = 1024 * 1024  # pixels at which the denoiser is told of a reference
PROMPT_AREA = 384 * 384  # pixels at which the prompt sees it, in the later releases

# ComfyUI's name of the first release, which has no number.
_FIRST_FILE = re.compile(r"qwen_image_edit_(bf16|fp16|fp8)", re.IGNORECASE)


class QwenImageEdit(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 3584) and `mask_BS`, S the longest of pictures, caption and the end of its
    chat; with references `tokens_reference_BND` (B, N, 64) and `tokens_reference_size_BR2`, in patches.
    """

    name: ClassVar[str] = "qwen_image_edit"
    title: ClassVar[str] = "Qwen-Image-Edit"
    pipelines = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline")
    slots = (
        qwen_image_model.transformer_slot(),
        qwen_image_model.vae_slot(),
        qwen25_vl_slot(eyes=True),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = qwen_image_model.TARGETS
    export = qwen_image_model.export_keys("qwen-image-edit")
    latents = qwen_image_model.LATENTS
    capabilities = Capabilities(references=REFERENCES, prompts_see_references=True)
    defaults = replace(qwen_image_model.DEFAULTS, steps=40, size=(1024, 1024))
    prompt_limit = qwen_image_model.PROMPT_TOKENS
    variants: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "Qwen-Image-Edit of August 2025": {"model_index": {"_class_name": "QwenImageEditPipeline"}},
    }

    @classmethod
    def accepts_file(cls, denoiser: Layout) -> bool:
        return qwen_image_model.is_for_editing(denoiser)

    @classmethod
    def fits(cls, source: ModelSource) -> bool:
        """Of files that do not say so in their name, `model.family` has to."""
        path = locate(source)
        if path.is_dir():
            return cls.detect(source)
        return qwen_image_model.NAMES.denoiser(layout_of([path])) is not None

    def configure(self) -> None:
        index = self.configs["model_index"]
        if index:
            self.sees_one = index["_class_name"] != "QwenImageEditPlusPipeline"
        else:
            file = Path(self.asked.path).name
            self.sees_one = _FIRST_FILE.match(file) is not None
        if self.sees_one:
            self.capabilities = replace(self.capabilities, references=1)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        return qwen_image_model.example_conditioning(self.denoiser, batch, generator)

    def count_tokens(self, prompt: str) -> int:
        """Without pictures, which have no part in the limit."""
        tokenizer = self.tokenizer("text_encoder")
        ids = tokenizer(TEMPLATE.format(written_out(tokenizer, prompt))).input_ids
        return len(ids) - INSTRUCTION_TOKENS

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        """References as by `reference_size`; none for a caption alone."""
        shown = references or [()] * len(prompts)
        return Conditioning.collate(
            [self._encode(prompt, seen) for prompt, seen in zip(prompts, shown, strict=True)]
        )

    def _encode(self, prompt: str, references: Sequence[Tensor]) -> Conditioning:
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        pictures = [self._for_prompt(picture_of(pixels_3HW)) for pixels_3HW in references]
        before, told = "", {}
        counts: list[int] = []
        if pictures:
            patches_ND, grids_K3 = qwen_eyes.patches(pictures)
            counts = qwen_eyes.tokens(grids_K3)
            before = "".join(self._mention(number, count) for number, count in enumerate(counts, start=1))
            told = {
                "pixel_values": patches_ND.to(encoder.device),
                "image_grid_thw": grids_K3.to(encoder.device),
            }
        ids_BS = tokenizer(
            TEMPLATE.format(before + written_out(tokenizer, prompt)),
            truncation=True,
            max_length=INSTRUCTION_TOKENS + len(tokenizer(before).input_ids) + self.prompt_limit,
            return_tensors="pt",
        ).input_ids.to(encoder.device)
        if pictures:
            # Their places are counted by rows and columns, as in training; transformers 5 has to be told.
            told["mm_token_type_ids"] = (ids_BS == encoder.config.image_token_id).int()
        states_BSD = encoder(ids_BS, attention_mask=torch.ones_like(ids_BS), **told).last_hidden_state
        tokens_BSD = states_BSD[:, INSTRUCTION_TOKENS:].contiguous()
        mask_BS = torch.ones(tokens_BSD.shape[:2], dtype=torch.bool, device=tokens_BSD.device)
        return Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS})

    def _mention(self, number: int, count: int) -> str:
        """A picture in the chat, `count` tokens long."""
        picture = PICTURE.replace("<|image_pad|>", "<|image_pad|>" * count)
        return picture if self.sees_one else f"Picture {number}: {picture}"

    def _for_prompt(self, picture: Image.Image) -> Image.Image:
        if self.sees_one:
            return picture
        height, width = reference_sizes.of_area(PROMPT_AREA, picture.height, picture.width)
        return picture.resize((width, height), Image.Resampling.LANCZOS)

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        """A megapixel in its own shape, whatever the target's."""
        return reference_sizes.of_area(REFERENCE_AREA, height, width)

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        return qwen_image_model.described_references([self.encode_pixels(pixels) for pixels in references])

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        return qwen_image_model.predict(self.denoiser, noisy, t_B, conditioning, self.dtype)

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
