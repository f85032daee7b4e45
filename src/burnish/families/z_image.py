"""Z-Image by Tongyi-MAI (arXiv 2511.22699): the base model, and Turbo, distilled to eight steps without guidance.

A transformer over one sequence of 2x2 patches of FLUX's latents and the caption's tokens, each refined by two blocks
of its own first. It reads the states of Qwen3 4B before the last layer, of the caption in a chat. Its time runs the
other way (data at 1) and it predicts data - noise.

Shape letters: B batch, C channels, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families.guidance import beyond_the_prompt
from burnish.families.masked import lengths, trimmed
from burnish.families.native import NativeNames, depth
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen3_slot
from burnish.families.slots import Config, Slot, vae_slot
from burnish.families.token_words import written_out
from burnish.families.weights import Layout
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults, Schedule

PROMPT_TOKENS = 512  # with those of the chat around the caption
TURBO_SHIFT = 3.0  # the base model was released with 6

_ATTENTION = ("*.attention.to_[qkv]", "*.attention.to_out.0")
_FEED_FORWARD = ("*.feed_forward.w[123]",)


def _attention(stack: str) -> dict[str, tuple[str, ...] | str]:
    return {
        f"{stack}.qkv": tuple(f"{stack}.to_{x}" for x in "qkv"),
        f"{stack}.out": f"{stack}.to_out.0",
        f"{stack}.q_norm": f"{stack}.norm_q",
        f"{stack}.k_norm": f"{stack}.norm_k",
    }


NAMES = NativeNames(
    table={
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **_attention("layers.#.attention"),
        **_attention("noise_refiner.#.attention"),
        **_attention("context_refiner.#.attention"),
    },
    signs=("x_pad_token", "cap_embedder.1.weight", "layers.0.attention.qkv.weight"),
    absent=("siglip_embedder.0.weight",),  # the release that reads pictures
)


def _find_transformer(layout: Layout) -> Layout | None:
    if {"x_pad_token", "all_x_embedder.2-1.weight", "layers.0.attention.to_q.weight"} <= set(layout):
        return layout
    return NAMES.denoiser(layout)


def _transformer_config(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    width = layout["all_x_embedder.2-1.weight"].shape[0]
    heads = width // layout["layers.0.attention.norm_q.weight"].shape[0]
    return {
        **shipped,
        "dim": width,
        "n_layers": depth(layout, "layers."),
        "n_refiner_layers": depth(layout, "noise_refiner."),
        "n_heads": heads,
        "n_kv_heads": heads,
        "cap_feat_dim": layout["cap_embedder.1.weight"].shape[1],
    }


class ZImage(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, S, 2560) and `mask_BS`, S the longest caption."""

    name: ClassVar[str] = "z_image"
    title: ClassVar[str] = "Z-Image"
    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    slots = (
        Slot(
            "transformer",
            "denoiser",
            ZImageTransformer2DModel.from_config,
            _find_transformer,
            _transformer_config,
            unused=("norm_final.weight",),
        ),
        vae_slot(),
        qwen3_slot(),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = {
        "attention": TargetSet(_ATTENTION, "Query, key, value and output of attention."),
        "attention+mlp": TargetSet((*_ATTENTION, *_FEED_FORWARD), "Attention and feed-forward layers."),
        "all": TargetSet(
            (
                *_ATTENTION,
                *_FEED_FORWARD,
                "*.adaLN_modulation.0",
                "all_x_embedder.*",
                "cap_embedder.1",
                "all_final_layer.*.linear",
            ),
            "Every layer of the blocks, modulations included, and the first and last of tokens.",
        ),
    }
    export = ExportKeys(
        default="diffusers",
        formats=("diffusers", "comfy", "kohya"),  # comfy, with fused queries, loads in ComfyUI alone
        modelspec="z-image",
        base_model_version="z_image",
        prefix={"diffusers": "transformer.", "comfy": "diffusion_model.", "kohya": "lora_unet_"},
        native=NAMES.native_module,
        native_kohya=("ComfyUI", "diffusers"),
        tensors=NAMES.tensors,
        words={"text_encoder": "qwen3_4b"},
        lokr="diffusion_model.",
        # In 0.42 diffusers takes the underscores of these names for dots.
        unreadable={"kohya": ("all_x_embedder.*", "all_final_layer.*")},
    )
    latents = LatentShape(channels=16, compression=8, patch=2)
    defaults = SamplerDefaults(
        steps=50,
        guidance=4.0,
        size=(1024, 1024),
        negative_prompt=True,
        guide=beyond_the_prompt,
        guides_above=0.0,
    )
    prompt_limit = PROMPT_TOKENS

    def make_schedule(self, config: Config) -> Schedule:
        """A single file does not tell whether it is Turbo, unless by its name."""
        single = self.source is not None and not self.source.index
        if single and self.source is not None and "turbo" in Path(self.source.source.path).name.lower():
            config = {**config, "shift": TURBO_SHIFT}
        return super().make_schedule(config)

    def configure(self) -> None:
        if self.schedule.shift == TURBO_SHIFT:
            self.defaults = replace(self.defaults, steps=9, guidance=0.0)
            self.export = replace(self.export, modelspec="z-image-turbo")

    @classmethod
    def with_depth(cls, config: dict[str, Any], depth: int) -> dict[str, Any]:
        return {k: min(depth, v) if k in ("n_layers", "n_refiner_layers") else v for k, v in config.items()}

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

    def _chat(self, prompt: str) -> str:
        tokenizer = self.tokenizer("text_encoder")
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": written_out(tokenizer, prompt)}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        return text

    def count_tokens(self, prompt: str) -> int:
        return len(self.tokenizer("text_encoder")(self._chat(prompt)).input_ids)

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        encoder = self.module("text_encoder")
        encoded = self.tokenizer("text_encoder")(
            [self._chat(prompt) for prompt in prompts],
            padding=True,
            max_length=PROMPT_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        mask_BS = encoded.attention_mask.to(encoder.device).bool()
        states = encoder(
            encoded.input_ids.to(encoder.device), attention_mask=mask_BS, output_hidden_states=True
        ).hidden_states
        tokens_BSD, mask_BS = trimmed(states[-2], mask_BS)
        return Conditioning({"tokens_BSD": tokens_BSD, "mask_BS": mask_BS})

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        tokens_BSD = conditioning["tokens_BSD"].to(self.dtype)
        # Each caption goes in by itself: the denoiser pads to whole 32s with a token that it was trained with.
        captions = [tokens_BSD[row, :length] for row, length in enumerate(lengths(conditioning))]
        predicted = self.denoiser(
            list(noisy.to(self.dtype)[:, :, None].unbind()), 1 - t_B, captions, return_dict=False
        )[0]
        return -torch.stack(predicted)[:, :, 0]

    def blocks(self) -> list[nn.Module]:
        denoiser = self.denoiser
        return [*denoiser.noise_refiner, *denoiser.context_refiner, *denoiser.layers]
