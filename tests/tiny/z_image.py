"""Z-Image and Z-Image-Turbo: two refiners, Qwen3, FLUX's VAE; the two differ in their schedule alone."""

from __future__ import annotations

from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny_pipelines import drawn, kl_vae
from tiny_qwen import qwen3, qwen_tokenizer

from burnish.families.z_image import NAMES
from tiny import Case


def _z_image(seed: int, *, shift: float) -> ZImagePipeline:
    tokenizer = qwen_tokenizer(qwen3=True)
    return ZImagePipeline(
        transformer=drawn(
            seed,
            lambda: ZImageTransformer2DModel(
                dim=80,  # wide enough that the blocks outweigh the embedding of time, 1024 wide
                n_layers=2,
                n_refiner_layers=2,
                n_heads=5,
                n_kv_heads=5,
                cap_feat_dim=32,
                axes_dims=[4, 6, 6],
                axes_lens=[1024, 64, 64],
            ),
        ),
        vae=drawn(
            seed + 1,
            lambda: kl_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant=False),
        ),
        text_encoder=drawn(seed + 2, lambda: qwen3(tokenizer)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )


CASES = {
    "z_image": Case(
        "z_image",
        partial(_z_image, shift=6.0),
        guidance=(0.0, 1.0, 4.0),  # the pipeline counts from the prediction with prompt
        native=NAMES,
        upstream="convert_z_image_transformer_checkpoint_to_diffusers",
    ),
    "z_image_turbo": Case("z_image", partial(_z_image, shift=3.0), guidance=(0.0,)),
}
