"""AuraFlow: joint and single blocks, learned positions, register tokens; a UMT5 with Llama's tokenizer."""

from __future__ import annotations

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tiny_llama import llama_tokenizer
from tiny_pipelines import drawn, kl_vae
from tiny_umt5 import umt5

from burnish.families.auraflow import NAMES
from tiny import Case


def _auraflow(seed: int) -> AuraFlowPipeline:
    tokenizer = llama_tokenizer()
    return AuraFlowPipeline(
        transformer=drawn(
            seed,
            lambda: AuraFlowTransformer2DModel(
                sample_size=8,
                num_mmdit_layers=2,
                num_single_dit_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=32,
                pos_embed_max_size=24 * 24,
            ),
        ),
        vae=drawn(seed + 1, lambda: kl_vae(latent_channels=4, scaling_factor=0.13025, force_upcast=True)),
        text_encoder=drawn(seed + 2, lambda: umt5(tokenizer)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


CASES = {
    "auraflow": Case(
        "auraflow",
        _auraflow,
        native=NAMES,
        upstream="convert_auraflow_transformer_checkpoint_to_diffusers",
    ),
}
