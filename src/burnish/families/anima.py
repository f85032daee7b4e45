"""Anima by CircleStone Labs: Cosmos-Predict2's transformer of 2B for still pictures, with a text side of its own.

A prompt is read twice: Qwen3 0.6B gives hidden states, T5's tokenizer alone gives token numbers. A small network, the
text conditioner, embeds the numbers and lets them attend to the states; what comes out, padded with zeros to 512
tokens, is all that the denoiser is told. The conditioner is not trained here and counts as a text encoder, so that its
output is cached. The transformer predicts velocity over 16-channel latents with a time axis of length 1.

The release is a modular pipeline of diffusers (`modular_model_index.json`), or ComfyUI's single file, which holds the
conditioner as `llm_adapter`.

Shape letters: B batch, C channels, H W height and width of latents, S T5 tokens, Q Qwen3 tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, ClassVar

import torch
from diffusers import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import t5, video_vae
from burnish.families.anima_names import (
    NAMES,
    PATCH,
    TARGETS,
    conditioner_config,
    find_conditioner,
    find_transformer,
    transformer_config,
)
from burnish.families.pipeline import PipelineFamily
from burnish.families.qwen import qwen3_slot
from burnish.families.slots import Config, Slot
from burnish.families.token_words import left_blank, written_out
from burnish.families.video_vae import wan_vae_slot
from burnish.family import TargetSet
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import SamplerDefaults
from burnish.placement import Part

PROMPT_TOKENS = 512  # of either tokenizer


def _transformer(config: Config) -> CosmosTransformer3DModel:
    model = CosmosTransformer3DModel.from_config(config)
    # diffusers resizes the mask of padding, which is zero everywhere, by torchvision; `predict` gives it instead.
    model.register_to_config(concat_padding_mask=False)
    return model


class Anima(PipelineFamily):
    """Conditioning: `tokens_BSD` (B, 512, 1024), zeros after the prompt, which the model was trained to read."""

    name: ClassVar[str] = "anima"
    title: ClassVar[str] = "Anima"
    pipelines = ("AnimaModularPipeline",)
    slots = (
        Slot("transformer", "denoiser", _transformer, find_transformer, transformer_config),
        wan_vae_slot(AutoencoderKLQwenImage.from_config, "qwen_image_vae.safetensors"),
        qwen3_slot(file_hint="qwen_3_06b_base.safetensors"),
        Slot(
            "text_conditioner",
            "text_encoders",
            AnimaTextConditioner.from_config,
            find_conditioner,
            conditioner_config,
            tokenizer="t5_tokenizer",
            load_tokenizer=t5.tokenizer_in,
            ship_tokenizer=t5.shipped_tokenizer,
            listed_under="denoiser",  # whose file holds it
        ),
    )
    targets: ClassVar[Mapping[str, TargetSet]] = TARGETS
    export = ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec="anima",
        base_model_version="anima",
        prefix={"comfy": "diffusion_model.", "diffusers": "transformer."},
        native=NAMES.native_module,
        words={"text_encoder": "qwen3_06b"},
    )
    latents = LatentShape(channels=16, compression=8, patch=PATCH)
    defaults = SamplerDefaults(steps=50, guidance=4.0, size=(1024, 1024), negative_prompt=True)
    prompt_limit = PROMPT_TOKENS

    def identity(self, part: Part) -> str:
        """Separate files of text encoders hold Qwen3 alone; the conditioner is in the denoiser's."""
        own = super().identity(part)
        if part != "text_encoders" or self.source is None or not self.source.source.text_encoders:
            return own
        return sha256((own + super().identity("denoiser")).encode()).hexdigest()

    def example_conditioning(
        self, batch: int, latents: Sequence[int], generator: torch.Generator
    ) -> Conditioning:
        width = self.denoiser.config.text_embed_dim
        return Conditioning({"tokens_BSD": torch.randn(batch, PROMPT_TOKENS, width, generator=generator)})

    def count_tokens(self, prompt: str) -> int:
        """Of the tokenizer that makes more of the prompt: either cuts what is too long."""
        readers = [self.tokenizer(folder) for folder in ("text_encoder", "text_conditioner")]
        texts = (written_out(readers[0], prompt), self._for_conditioner(prompt))
        return max(len(reader(text).input_ids) for reader, text in zip(readers, texts, strict=True))

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        conditioner = self.module("text_conditioner")
        states_BQD, mask_BQ = self._states(prompts)
        told = [self._for_conditioner(prompt) for prompt in prompts]
        numbers = _tokens(self.tokenizer("text_conditioner"), told)
        tokens_BSD: Tensor = conditioner(
            source_hidden_states=states_BQD.to(conditioner.dtype),
            target_input_ids=numbers.input_ids.to(conditioner.device),
            target_attention_mask=numbers.attention_mask.to(conditioner.device),
            source_attention_mask=mask_BQ,
        )
        return Conditioning({"tokens_BSD": tokens_BSD})

    def _for_conditioner(self, prompt: str) -> str:
        """The prompt with padding in place of each vector of a new word, of which T5's numbers know nothing; ComfyUI
        does the same (`AnimaTEModel`)."""
        return left_blank(
            self.tokenizer("text_encoder"), prompt, self.tokenizer("text_conditioner").pad_token
        )

    def _states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Qwen3's last hidden states, zero where there is no token, and which of them the conditioner reads.

        An empty prompt has no token. It reads one state of zeros, which adds nothing, as no state at all does; rows
        without any would be undefined in some attention kernels.
        """
        encoder, tokenizer = self.module("text_encoder"), self.tokenizer("text_encoder")
        texts = [written_out(tokenizer, prompt) or tokenizer.pad_token for prompt in prompts]
        tokens = _tokens(tokenizer, texts)
        mask_BQ = tokens.attention_mask.bool().to(encoder.device)
        states_BQD = encoder(
            input_ids=tokens.input_ids.to(encoder.device), attention_mask=mask_BQ
        ).last_hidden_state
        is_said_B = torch.tensor([bool(prompt) for prompt in prompts], device=encoder.device)
        return states_BQD * (mask_BQ & is_said_B[:, None])[..., None], mask_BQ

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return video_vae.encode(self.module("vae"), pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return video_vae.decode(self.module("vae"), latents)

    def predict(self, noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        seen_BCTHW = noisy[:, :, None].to(self.dtype)
        if self.configs["transformer"].get(
            "concat_padding_mask", True
        ):  # 1 where there is no picture: nowhere
            seen_BCTHW = torch.cat([seen_BCTHW, torch.zeros_like(seen_BCTHW[:, :1])], dim=1)
        predicted_BCTHW: Tensor = self.denoiser(
            hidden_states=seen_BCTHW,
            timestep=t_B.float(),
            encoder_hidden_states=conditioning["tokens_BSD"].to(self.dtype),
            return_dict=False,
        )[0]
        return predicted_BCTHW[:, :, 0]

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)


def _tokens(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """Token numbers and mask, (B, longest); padding on the right, where it shifts no position."""
    return tokenizer(
        list(prompts),
        padding="longest",
        padding_side="right",
        max_length=PROMPT_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
