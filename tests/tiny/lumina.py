"""Lumina-Image 2.0: grouped queries, two refiners, Gemma 2, FLUX's VAE."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from tiny_gemma import gemma2, gemma_tokenizer
from tiny_pipelines import drawn, kl_vae

from burnish.families.lumina2 import NAMES
from tiny import Case


def _lumina2(seed: int) -> Lumina2Pipeline:
    tokenizer = gemma_tokenizer()
    return Lumina2Pipeline(
        transformer=drawn(
            seed,
            lambda: Lumina2Transformer2DModel(
                sample_size=8,
                hidden_size=48,
                num_layers=2,
                num_refiner_layers=2,
                num_attention_heads=3,  # as released, three queries to a key
                num_kv_heads=1,
                multiple_of=32,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(300, 64, 64),
                cap_feat_dim=32,
            ),
        ),
        vae=drawn(
            seed + 1,
            lambda: kl_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant=False),
        ),
        text_encoder=drawn(seed + 2, lambda: gemma2(tokenizer)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


_WIDTHS = {2304: 48, 768: 16}
CASES = {
    "lumina2": Case(
        "lumina2",
        _lumina2,
        native=NAMES,
        upstream="convert_lumina2_to_diffusers",
        upstream_widths=_WIDTHS,
        loader_widths={"_convert_non_diffusers_lumina2_lora_to_diffusers": _WIDTHS},
    ),
}
