"""Krea 2: a single-stream transformer over 2x2 patches of 16-channel latents that predicts velocity.

It reads twelve hidden states of Qwen3-VL per token, which a small network of its own first joins. Text tokens sit at
the origin of the rotary positions, so that padding which the mask hides can be left out altogether. The distilled
release (`is_distilled`) samples in 8 steps without guidance at a fixed shift.

Shape letters: B batch, C channels, H W height and width of latents, S prompt tokens, L hidden states, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import clip, video_vae
from burnish.families.guidance import beyond_the_prompt
from burnish.families.packing import pack, patch_positions, unpack
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen3_vl_slot
from burnish.families.slots import Slot
from burnish.families.token_words import written_out
from burnish.families.video_vae import wan_vae_slot
from burnish.families.weights import Layout
from burnish.family import Capabilities, TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import ResolutionShift, SamplerDefaults

TOKENS = 512  # of the prompt and what closes it
READ_LAYERS = (
    2,
    5,
    8,
    11,
    14,
    17,
    20,
    23,
    26,
    29,
    32,
    35,
)  # of Qwen3-VL 4B, unless model_index.json says otherwise
DISTILLED_SHIFT = 1.15  # mu of the distilled release, whatever the size

# As released: what stands before and after a caption. The first has 34 tokens, which are not kept.
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
BEFORE_TOKENS, _AFTER_TOKENS = 34, 5

_ATTENTION = tuple(f"transformer_blocks.*.attn.{name}" for name in ("to_[qkv]", "to_gate", "to_out.0"))
_FEED_FORWARD = tuple(f"transformer_blocks.*.ff.{name}" for name in ("gate", "up", "down"))


def _find_transformer(layout: Layout) -> Layout | None:
    signs = {
        "text_fusion.projector.weight",
        "txt_in.linear_1.weight",
        "transformer_blocks.0.attn.to_gate.weight",
    }
    return layout if signs <= set(layout) else None


class Krea2(PipelineFamily):
    """Conditioning: `tokens_BSLD` (B, S, 12, 2560), as long as the prompt, and its `mask_BS`."""

    name: ClassVar[str] = "krea2"
    title: ClassVar[str] = "Krea 2"
    pipelines = ("Krea2Pipeline",)
    slots = (
        Slot(
            "transformer",
            "denoiser",
            Krea2Transformer2DModel.from_config,
            _find_transformer,
            keep_float32=lambda dtype: ("*norm*.weight",),  # as diffusers does: they compute in float32
        ),
        wan_vae_slot(AutoencoderKLQwenImage.from_config, "qwen_image_vae.safetensors"),
        qwen3_vl_slot(),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value, gate and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            ("transformer_blocks.*", "text_fusion.*_blocks.*", "img_in", "txt_in.*", "final_layer.linear"),
            "Every layer of the blocks and of the network that joins the text's hidden states, and the first "
            "and last layer.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers",),
        modelspec="krea-2",
        base_model_version="krea2",
        prefix={"diffusers": "transformer."},
        words={"text_encoder": "qwen3vl_4b"},
    )
    capabilities = Capabilities()
    latents = LatentShape(channels=16, compression=8, patch=2)
    prompt_limit = TOKENS

    def configure(self) -> None:
        index = self.configs["model_index"]
        distilled = bool(index.get("is_distilled", False))
        self.read_layers = tuple(index.get("text_encoder_select_layers") or READ_LAYERS)
        self.defaults = SamplerDefaults(
            steps=8 if distilled else 28,
            guidance=0.0 if distilled else 4.5,
            size=(1024, 1024),
            negative_prompt=True,
            guide=beyond_the_prompt,
            guides_above=0.0,
        )
        if distilled:
            fixed = ResolutionShift(base_shift=DISTILLED_SHIFT, max_shift=DISTILLED_SHIFT)
            self.schedule = replace(self.schedule, shift=fixed)

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        config = self.denoiser.config
        shape = (batch, 64, config.num_text_layers, config.text_hidden_dim)
        return Conditioning(
            {
                "tokens_BSLD": torch.randn(shape, generator=generator),
                "mask_BS": torch.ones(batch, 64, dtype=torch.bool),
            }
        )

    def count_tokens(self, prompt: str) -> int:
        """Of the caption and what closes it, as Qwen reads them."""
        tokenizer = self.tokenizer("text_encoder")
        asked = clip.count_tokens(tokenizer, BEFORE + prompt) - BEFORE_TOKENS
        return asked + clip.count_tokens(tokenizer, _AFTER)

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        asked = tokenizer(
            [BEFORE + written_out(tokenizer, prompt) for prompt in prompts],
            truncation=True,
            padding="max_length",
            max_length=TOKENS + BEFORE_TOKENS - _AFTER_TOKENS,
            return_tensors="pt",
        )
        closing = tokenizer([_AFTER] * len(prompts), return_tensors="pt")
        ids_BS = torch.cat([asked.input_ids, closing.input_ids], dim=1).to(encoder.device)
        mask_BS = torch.cat([asked.attention_mask, closing.attention_mask], dim=1).bool()
        # What closes the prompt stands after the padding and is counted as if there were none.
        positions_BS = (mask_BS.long().cumsum(dim=-1) - 1).clamp(min=0)
        states = encoder(
            input_ids=ids_BS,
            attention_mask=mask_BS.to(encoder.device),
            position_ids=positions_BS.expand(3, -1, -1).to(encoder.device),
            output_hidden_states=True,
        ).hidden_states
        tokens_BSLD = torch.stack([states[number] for number in self.read_layers], dim=2)
        kept = []
        for tokens_SLD, mask_S in zip(
            tokens_BSLD[:, BEFORE_TOKENS:], mask_BS[:, BEFORE_TOKENS:], strict=True
        ):
            read_BSLD = tokens_SLD[mask_S.nonzero()[:, 0].to(encoder.device)][None]
            told = {
                "tokens_BSLD": read_BSLD,
                "mask_BS": read_BSLD.new_ones(read_BSLD.shape[:2], dtype=torch.bool),
            }
            kept.append(Conditioning(told))
        return Conditioning.collate(kept)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens_BSLD = conditioning["tokens_BSLD"].to(self.dtype)
        text_S3 = torch.zeros(tokens_BSLD.shape[1], 3, device=noisy.device)
        picture_N3 = patch_positions(height // 2, width // 2, noisy.device)
        patches_BND: Tensor = self.denoiser(
            hidden_states=pack(noisy).to(self.dtype),
            encoder_hidden_states=tokens_BSLD,
            timestep=t_B.to(self.dtype),
            position_ids=torch.cat([text_S3, picture_N3]),
            encoder_attention_mask=conditioning["mask_BS"].bool(),
            return_dict=False,
        )[0]
        return unpack(patches_BND, height, width)

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
