"""Chroma: FLUX.1's blocks without modulation layers, T5 alone."""

from __future__ import annotations

from typing import Any

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import drawn, kl_vae, t5, t5_tokenizer
from torch import Tensor

from burnish.families.chroma import NAMES
from tiny import Case
from tiny.flux import unpack


class MaskedChromaPipeline(ChromaPipeline):
    """ChromaPipeline with a boolean mask, as its authors' own code has it (diffusers issue 12116)."""

    def _get_t5_prompt_embeds(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        embeds, mask = super()._get_t5_prompt_embeds(*arguments, **named)
        return embeds, mask.bool()


def _chroma(seed: int) -> ChromaPipeline:
    tokenizer = t5_tokenizer()
    return ChromaPipeline(
        transformer=drawn(
            seed,
            lambda: ChromaTransformer2DModel(
                patch_size=1,
                in_channels=64,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 6, 6),
                approximator_num_channels=64,
                approximator_hidden_dim=24,
                approximator_layers=2,
            ),
        ),
        vae=drawn(
            seed + 1,
            lambda: kl_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant=False),
        ),
        text_encoder=drawn(seed + 2, lambda: t5(tokenizer)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        image_encoder=None,
        feature_extractor=None,
    )


CASES = {
    "chroma": Case(
        "chroma",
        _chroma,
        unpack=unpack,
        pipeline=MaskedChromaPipeline,
        native=NAMES,
        upstream="convert_chroma_transformer_checkpoint_to_diffusers",
        upstream_widths={3072: 32},
    )
}
