"""Qwen-Image 2.1 by Alibaba (https://huggingface.co/Qwen/Qwen-Image-2.1), which draws and edits, and its Turbo release.

A transformer of single-stream blocks over 64-channel latents, sixteen times smaller than the picture each way and not
packed, that predicts velocity; see `qwen_image21_sequence`. Prompts are read by Qwen3-VL 8B, whose last states are
taken before its last norm, without those of an instruction at the beginning. It sees the reference pictures, too: in
the denoiser their latents stand where their tokens were. The autoencoder has an alpha channel besides the colours;
pictures here are opaque.

Shape letters: B batch, C channels, H W height and width of latents or pixels, S words of the prompt, N latents of
references, R references, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import qwen_eyes, qwen_image21_sequence, reference_sizes, shifts, video_vae
from burnish.families.native import NativeNames, depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen3_vl_slot
from burnish.families.rows import by_kind
from burnish.families.seen_pictures import picture_of
from burnish.families.slots import Config, Slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import Capabilities, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults

INSTRUCTION = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
TEMPLATE = INSTRUCTION + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
BEFORE_PICTURE, PICTURE, AFTER_PICTURE = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
PROMPT_TOKENS = 1024  # of the caption and the chat around it; the release sets no limit
REFERENCES = 10  # that the release was trained with, at most
REFERENCE_AREA = 1024 * 1024  # pixels at which prompts and denoiser are shown a reference
EYES = qwen_eyes.QWEN3
COLOURS = 3
# Steps of Qwen-Image-2.1-Turbo, of its model_index.json.
TURBO_SIGMAS = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568)

_BLOCK = "transformer_blocks.#.img_mlp"
_ATTENTION = ("transformer_blocks.*.attn.to_[qkv]", "transformer_blocks.*.attn.to_out.0")
_FEED_FORWARD = tuple(f"transformer_blocks.*.img_mlp.{name}" for name in ("proj", "gate_layer", "out"))
# The release has diffusers' names; ComfyUI's files fuse two layers.
NAMES = NativeNames(
    table={f"{_BLOCK}.gate_up": (f"{_BLOCK}.gate_layer", f"{_BLOCK}.proj")},
    signs=("txt_in.text_norm.weight", "modulation.1.weight", "img_in.weight"),
)


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    head_dim = layout["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    width, channels = layout["img_in.weight"].shape
    return {
        **shipped,
        "in_channels": channels,
        "out_channels": layout["proj_out.weight"].shape[0],
        "num_layers": depth(layout, "transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "context_in_dim": layout["txt_in.in_layer.weight"].shape[1],
        "mlp_ratio": layout["transformer_blocks.0.img_mlp.proj.weight"].shape[0] // width,
    }


def _find_vae(layout: Layout) -> Layout | None:
    """Of Wan's layout, but that it takes four channels; a file keeps an axis of time that is one long."""
    found = video_vae.find_wan_vae(layout)
    if found is None or found["encoder.conv_in.weight"].shape[1] != COLOURS + 1:
        return None
    return video_vae.without_time(found)


class QwenImage21(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 4096) and `mask_BS`, S the longest caption and what stands around it in the
    chat, without the pictures' own tokens; with references `tokens_place_BR`, how many words come before each,
    `tokens_reference_BNC` (B, N, 64) and `tokens_reference_size_BR2`, in latents.
    """

    name: ClassVar[str] = "qwen_image21"
    title: ClassVar[str] = "Qwen-Image 2.1"
    pipelines = ("QwenImage21Pipeline",)
    slots = (
        Slot(
            "transformer",
            "denoiser",
            QwenImage21Transformer2DModel.from_config,
            NAMES.denoiser,
            _transformer_config,
        ),
        Slot(
            "vae",
            "vae",
            AutoencoderKLQwenImage21.from_config,
            _find_vae,
            video_vae.config_from_shapes,
            file_hint="qwen_image_2.1_vae_bf16.safetensors",
        ),
        qwen3_vl_slot(
            tokenizer="processor", eyes=True, last_norm=False, file_hint="qwen3vl_8b_bf16.safetensors"
        ),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            ("transformer_blocks.*", "modulation.1", "img_in", "txt_in.*", "norm_out.linear", "proj_out"),
            "Every layer of the blocks, the modulation that they share, and the first and last of tokens.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers", "comfy"),
        modelspec="qwen-image-2.1",
        base_model_version="qwen_image_2.1",
        prefix={"diffusers": "transformer.", "comfy": "diffusion_model."},
        native=NAMES.native_module,
        tensors=NAMES.tensors,
        words={"text_encoder": "qwen3vl_8b"},
    )
    latents = LatentShape(channels=64, compression=16, token_multiple=2)
    capabilities = Capabilities(references=REFERENCES, prompts_see_references=True)
    defaults = SamplerDefaults(steps=40, guidance=1.0, size=(1024, 1024), negative_prompt=True)
    prompt_limit = PROMPT_TOKENS
    variants: ClassVar[Mapping[str, Mapping[str, Config]]] = {
        "Qwen-Image-2.1-Turbo": {
            "model_index": {"sample_sigmas": list(TURBO_SIGMAS)},
            "scheduler": {"use_dynamic_shifting": False, "shift_terminal": None},
        },
    }

    @classmethod
    def accepts(cls, index: Config, config: Config) -> bool:
        """All but the picture that is drawn is as at time 0."""
        return bool(config.get("causal_condition", True))

    def configure(self) -> None:
        sigmas = self.configs["model_index"].get("sample_sigmas")
        if sigmas:
            self.defaults = replace(self.defaults, steps=len(sigmas))
            self.schedule = replace(self.schedule, sigmas=partial(shifts.along, tuple(sigmas)))

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        shape = (batch, 64, self.denoiser.config.context_in_dim)
        return Conditioning(
            {
                "tokens_BSD": torch.randn(shape, generator=generator),
                "mask_BS": torch.ones(shape[:2], dtype=torch.bool),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        """Without pictures, which have no part in the limit."""
        tokenizer = self.tokenizer("text_encoder")
        read, instruction = (
            tokenizer(text).input_ids
            for text in (TEMPLATE.format(written_out(tokenizer, prompt) or " "), INSTRUCTION)
        )
        return len(read) - len(instruction)

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
        before, told = "", dict[str, Tensor]()
        if references:
            pictures = [picture_of(pixels_3HW) for pixels_3HW in references]
            patches_ND, grids_K3 = qwen_eyes.patches(pictures, EYES)
            before = " ".join(
                f"<image{number}>{BEFORE_PICTURE}{PICTURE * count}{AFTER_PICTURE}"
                for number, count in enumerate(qwen_eyes.tokens(grids_K3), start=1)
            )
            told = {"pixel_values": patches_ND, "image_grid_thw": grids_K3}
        instruction = len(tokenizer(INSTRUCTION).input_ids)
        ids_BS = tokenizer(
            TEMPLATE.format(before + (written_out(tokenizer, prompt) or " ")),
            truncation=True,
            max_length=instruction + len(tokenizer(before).input_ids) + self.prompt_limit,
            return_tensors="pt",
        ).input_ids
        is_word_S = ids_BS[0] != encoder.config.image_token_id
        told |= {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
        if references:
            told["mm_token_type_ids"] = (~is_word_S).int()[None]
        device = encoder.device
        states_BSD = encoder(**{name: one.to(device) for name, one in told.items()}).last_hidden_state
        kept_S = is_word_S.clone()
        kept_S[:instruction] = False
        tokens_BSD = states_BSD[:, kept_S.nonzero()[:, 0].to(device)]
        mask_BS = torch.ones(tokens_BSD.shape[:2], dtype=torch.bool, device=device)
        found = Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS})
        if not references:
            return found
        starts = (ids_BS[0] == encoder.config.vision_start_token_id).nonzero()[: len(references), 0]
        return found.merged({qwen_image21_sequence.PLACES: kept_S.cumsum(0)[starts][None].to(device)})

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        """A megapixel in its own shape, whatever the target's."""
        return reference_sizes.of_area(REFERENCE_AREA, height, width)

    def encode_references(
        self, references: Sequence[Tensor], *, mask_B1HW: Tensor | None = None, frames: int = 1
    ) -> Conditioning:
        return qwen_image21_sequence.described([self.encode_pixels(pixels) for pixels in references])

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        opaque = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
        return video_vae.encode(self.module("vae"), opaque)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)[:, :COLOURS]

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        # Words move the pictures on: rows with captions of other lengths do not go together.
        layouts = qwen_image21_sequence.layouts(conditioning)
        predict = partial(qwen_image21_sequence.predict, self.denoiser, self.dtype)
        return by_kind(layouts, noisy, t_B, conditioning, predict)

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
