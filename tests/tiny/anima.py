"""Anima, a modular pipeline of diffusers, called here as the other pipelines are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from diffusers import (
    AnimaAutoBlocks,
    AnimaModularPipeline,
    AnimaTextConditioner,
    ClassifierFreeGuidance,
    ComponentSpec,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available
from tiny_pipelines import drawn, t5_tokenizer
from tiny_qwen import qwen3, qwen_tokenizer
from tiny_video_vae import qwen_image_vae
from transformers import Qwen2Tokenizer, Qwen3Model

from tiny import Case


def _resize_without_torchvision() -> None:
    """Give diffusers' transformer the one function of torchvision that it calls, on its mask of zeros."""
    if not is_torchvision_available():
        transformer_cosmos.transforms = SimpleNamespace(
            InterpolationMode=SimpleNamespace(NEAREST="nearest"),
            functional=SimpleNamespace(
                resize=lambda mask, size, interpolation: torch.nn.functional.interpolate(
                    mask, size, mode=interpolation
                )
            ),
        )


class AnimaPipeline:
    """The modular pipeline with the arguments of the others: the guider is a part of it, not an argument."""

    def __init__(self, modular: AnimaModularPipeline) -> None:
        self.modular = modular

    @property
    def transformer(self) -> CosmosTransformer3DModel:
        return self.modular.transformer

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        _resize_without_torchvision()
        modular = AnimaModularPipeline.from_pretrained(str(folder))
        modular.load_components()
        return cls(modular)

    def save_pretrained(self, folder: Path) -> None:
        self.modular.save_pretrained(str(folder), overwrite_modular_index=True)

    def set_progress_bar_config(self, **options: Any) -> None:
        self.modular.set_progress_bar_config(**options)

    def load_lora_weights(self, folder: Path, weight_name: str) -> None:
        self.modular.load_lora_weights(folder, weight_name=weight_name)

    def __call__(
        self, *, guidance_scale: float, output_type: str, prompt: Sequence[str], **options: Any
    ) -> SimpleNamespace:
        spec = ComponentSpec(
            "guider",
            ClassifierFreeGuidance,
            config={"guidance_scale": guidance_scale},
            default_creation_method="from_config",
        )
        self.modular.update_components(guider=spec.create())
        drawn = self.modular(prompt=list(prompt), output_type="pt", output=["latents", "images"], **options)
        return SimpleNamespace(
            images=drawn["latents"][:, :, 0] if output_type == "latent" else drawn["images"]
        )


def _qwen3(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    encoder = qwen3(tokenizer)
    with torch.no_grad():
        encoder.embed_tokens.weight[
            tokenizer.pad_token_id
        ].normal_()  # new models have zeros there, released ones not
    return encoder


def _anima(seed: int) -> AnimaPipeline:
    tokenizer, t5 = qwen_tokenizer(qwen3=True), t5_tokenizer()
    modular = AnimaAutoBlocks().init_pipeline()
    modular.update_components(
        transformer=drawn(
            seed,
            lambda: CosmosTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=3,
                text_embed_dim=32,
                adaln_lora_dim=8,
                rope_scale=(1.0, 4.0, 4.0),
                extra_pos_embed_type=None,
            ),
        ),
        vae=drawn(seed + 1, qwen_image_vae),
        text_encoder=drawn(seed + 2, lambda: _qwen3(tokenizer)),
        tokenizer=tokenizer,
        t5_tokenizer=t5,
        text_conditioner=drawn(
            seed + 3,
            lambda: AnimaTextConditioner(
                source_dim=32,
                target_dim=32,
                model_dim=32,
                num_layers=2,
                num_attention_heads=2,
                target_vocab_size=len(t5),
            ),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return AnimaPipeline(modular)


CASES = {"anima": Case("anima", _anima, pipeline=AnimaPipeline)}
