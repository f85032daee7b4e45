"""Stable Diffusion 1.5 and its fine-tunes (arXiv 2112.10752).

A UNet over 4-channel latents that predicts epsilon (some fine-tunes: v) and reads one CLIP of 77 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from burnish.export_keys import ExportKeys
from burnish.families import clip
from burnish.families.latent_diffusion import Layouts, TextEncoderPlace, plain_text_to_image, stage_count
from burnish.families.unet import native_module, native_tensors
from burnish.families.unet_family import UNetFamily
from burnish.noise_schedule import SamplerDefaults

LAYOUTS = Layouts(
    config_file="sd15.json",
    text_encoders=(
        TextEncoderPlace(
            "text_encoder", "tokenizer", "cond_stage_model.", projection=False, padding=clip.END
        ),
    ),
)


class StableDiffusion15(UNetFamily):
    """Conditioning: `tokens_BSD`, CLIP's last hidden state after its final norm, (B, 77, 768)."""

    name: ClassVar[str] = "sd15"
    title: ClassVar[str] = "Stable Diffusion 1.5"
    layouts: ClassVar[Layouts] = LAYOUTS
    export = ExportKeys(
        default="kohya",
        formats=("kohya", "diffusers"),
        modelspec="stable-diffusion-v1",
        base_model_version="sd_v1",
        prefix={"kohya": "lora_unet_", "diffusers": "unet."},
        readers={"kohya": ("ComfyUI", "diffusers", "A1111 and Forge")},
        text_encoders={"text_encoder": "clip_l"},
        native=partial(native_module, top_attends=False),
        tensors=partial(native_tensors, top_attends=False),
    )
    defaults = SamplerDefaults(steps=30, guidance=7.5, size=(512, 512), negative_prompt=True)

    @classmethod
    def fits_config(cls, config: Mapping[str, Any]) -> bool:
        return (
            plain_text_to_image(config, stages=4)
            and config.get("addition_embed_type") is None
            # Stable Diffusion 2 is the same but for these.
            and not config.get("use_linear_projection", False)
        )

    @classmethod
    def fits_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return (
            stage_count(shapes) == 4
            and "add_embedding.linear_1.weight" not in shapes
            and len(shapes.get("down_blocks.0.attentions.0.proj_in.weight", ())) == 4
        )
