"""CogView4, with a GLM whose heads turn half of their width."""

from __future__ import annotations

from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from tiny_llama import llama_tokenizer
from tiny_pipelines import drawn, kl_vae
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerBase

from tiny import Case


def _glm(tokenizer: PreTrainedTokenizerBase) -> GlmModel:
    return GlmModel(
        GlmConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            attention_bias=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _cogview4(seed: int) -> CogView4Pipeline:
    tokenizer = llama_tokenizer()
    tokenizer.padding_side = "left"
    return CogView4Pipeline(
        transformer=drawn(
            seed,
            lambda: CogView4Transformer2DModel(
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                text_embed_dim=32,
                time_embed_dim=16,
                condition_dim=8,
                rope_axes_dim=(8, 8),
            ),
        ),
        vae=drawn(seed + 1, lambda: kl_vae(latent_channels=16, scaling_factor=1.0, quant=False)),
        text_encoder=drawn(seed + 2, lambda: _glm(tokenizer)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, time_shift_type="linear", use_dynamic_shifting=True
        ),
    )


# Prompts of a batch are filled up to the longest with tokens that count.
CASES = {"cogview4": Case("cogview4", _cogview4, batched=False)}
