"""Ideogram 4, with the transformer of the pass without words; the text encoder is read at thirteen depths of 36."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
from tiny_flux2_vae import flux2_vae
from tiny_pipelines import drawn
from tiny_qwen import qwen3_vl, qwen_tokenizer
from torch import Tensor

from burnish.families.ideogram4_names import NAMES
from tiny import Case

WIDTH, LAYERS, READ = 16, 36, 13
# Qwen3-VL's, whose messages are lists of parts.
CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _ideogram4(seed: int) -> Ideogram4Pipeline:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    return Ideogram4Pipeline(
        transformer=drawn(seed, _transformer),
        unconditional_transformer=drawn(seed + 3, _transformer),
        vae=drawn(seed + 1, flux2_vae),
        text_encoder=drawn(seed + 2, lambda: qwen3_vl(tokenizer, WIDTH, LAYERS)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _transformer() -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=3,
        intermediate_size=160,
        adaln_dim=24,
        llm_features_dim=READ * WIDTH,
        mrope_section=(6, 5, 5),
    )


def _unpacked(pipeline: Ideogram4Pipeline, latents: Tensor) -> Tensor:
    return latents.transpose(1, 2).unflatten(2, (4, 6))


CASES = {
    "ideogram4": Case(
        "ideogram4",
        _ideogram4,
        call={"guidance_schedule": None, "max_sequence_length": 256},
        unpack=_unpacked,
        guidance=(1.0, 7.0),
        negatives=False,
        native=NAMES,
        vae_places_first=True,
        on_meta=False,  # diffusers asks for the device's automatic casts, which meta lacks
    ),
}
