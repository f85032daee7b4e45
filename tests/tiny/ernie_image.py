"""ERNIE-Image, without the model that rewrites prompts."""

from __future__ import annotations

from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tiny_flux2_vae import flux2_vae
from tiny_mistral import mistral3, mistral_tokenizer
from tiny_pipelines import drawn

from tiny import Case


def _ernie_image(seed: int) -> ErnieImagePipeline:
    tokenizer = mistral_tokenizer()
    return ErnieImagePipeline(
        transformer=drawn(
            seed,
            lambda: ErnieImageTransformer2DModel(
                hidden_size=32,
                num_attention_heads=2,
                num_layers=3,
                ffn_hidden_size=96,
                text_in_dim=24,
                rope_axes_dim=(4, 6, 6),
            ),
        ),
        vae=drawn(seed + 1, flux2_vae),
        text_encoder=drawn(seed + 2, lambda: mistral3(tokenizer, width=24, layers=3).model),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        pe=None,
        pe_tokenizer=None,
    )


CASES = {
    # Its positions are computed under `torch.autocast(device_type="meta")`, which torch does not know.
    "ernie_image": Case("ernie_image", _ernie_image, vae_epsilon=1e-5, on_meta=False),
}
