"""Stable Diffusion 2.0 and 2.1 and their fine-tunes, by Stability AI (https://github.com/Stability-AI/stablediffusion).

A UNet as that of Stable Diffusion 1 over 4-channel latents, predicting v at 768 pixels and epsilon at 512 (the `base`
models), that reads the last but one layer of OpenCLIP's ViT-H text encoder after its final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch

from burnish.export_keys import ExportKeys
from burnish.families.latent_diffusion import (
    UNET_PREFIX,
    Checkpoint,
    Layouts,
    Parts,
    TextEncoderPlace,
    plain_text_to_image,
    stage_count,
)
from burnish.families.unet import native_module, native_tensors
from burnish.families.unet_family import UNetFamily
from burnish.families.weights import below, read_tensor
from burnish.noise_schedule import Prediction, SamplerDefaults, Schedule

LAYERS_READ = 23  # of 24; diffusers' folders hold no more
LAYOUTS = Layouts(
    config_file="sd2.json",
    text_encoders=(
        TextEncoderPlace(
            "text_encoder",
            "tokenizer",
            "cond_stage_model.",
            projection=False,
            padding="!",
            layers=LAYERS_READ,
        ),
    ),
)
# A single file does not say what its UNet predicts. ComfyUI (`supported_models.py`, class SD20) tells the released
# models apart by how far the biases of the last block's first norm are spread.
_TELLING = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD = 0.09


class StableDiffusion2(UNetFamily):
    """Conditioning: `tokens_BSD`, (B, 77, 1024)."""

    name: ClassVar[str] = "sd2"
    title: ClassVar[str] = "Stable Diffusion 2"
    layouts: ClassVar[Layouts] = LAYOUTS
    export = ExportKeys(
        default="kohya",
        formats=("kohya", "diffusers"),
        modelspec="stable-diffusion-v2-512",
        base_model_version="sd_v2",
        prefix={"kohya": "lora_unet_", "diffusers": "unet."},
        readers={"kohya": ("ComfyUI", "diffusers", "A1111 and Forge")},
        text_encoders={"text_encoder": "clip_h"},
        native=partial(native_module, top_attends=False),
        tensors=partial(native_tensors, top_attends=False),
    )
    defaults = SamplerDefaults(steps=30, guidance=7.5, size=(512, 512), negative_prompt=True)

    def __init__(
        self, parts: Parts, schedule: Schedule, dtype: torch.dtype, checkpoint: Checkpoint | None
    ) -> None:
        super().__init__(parts, schedule, dtype, checkpoint)
        if schedule.prediction == "v":
            self.defaults = replace(self.defaults, size=(768, 768))
            self.export = replace(
                self.export, modelspec="stable-diffusion-v2-768-v", base_model_version="sd_v2_v"
            )

    @classmethod
    def fits_config(cls, config: Mapping[str, Any]) -> bool:
        return (
            plain_text_to_image(config, stages=4)
            and config.get("addition_embed_type") is None
            and bool(config.get("use_linear_projection", False))
        )

    @classmethod
    def fits_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return (
            stage_count(shapes) == 4
            and "add_embedding.linear_1.weight" not in shapes
            and len(shapes.get("down_blocks.0.attentions.0.proj_in.weight", ())) == 2
        )

    @classmethod
    def schedule_in(cls, checkpoint: Checkpoint, prediction: Prediction | None) -> Schedule:
        if prediction is None and not checkpoint.path.is_dir() and "v_pred" not in checkpoint.single_file:
            layout = below(checkpoint.single_file, UNET_PREFIX) or checkpoint.single_file
            told = layout.get(_TELLING)
            spread = 0.0 if told is None else float(read_tensor(told).float().std(correction=0))
            prediction = "v" if spread > _SPREAD else "epsilon"
        return checkpoint.schedule(prediction)
