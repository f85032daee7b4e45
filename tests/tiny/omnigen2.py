"""OmniGen2, which diffusers lacks: the folder of the release, and the published equations beside it."""

from __future__ import annotations

from omnigen2_reference import OmniGen2Pipeline
from tiny_pipelines import drawn, kl_vae
from tiny_qwen import qwen25_vl, qwen_tokenizer

from burnish.families.omnigen2_transformer import OmniGen2Transformer
from tiny import Case

CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "hidden_size": 72,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "num_attention_heads": 6,  # as released, three queries to a key
    "num_kv_heads": 2,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "axes_dim_rope": [4, 4, 4],
    "axes_lens": [300, 64, 64],
    "text_feat_dim": 256,
    "timestep_scale": 1000.0,
}


def _omnigen2(seed: int) -> OmniGen2Pipeline:
    tokenizer = qwen_tokenizer()
    transformer = drawn(seed, lambda: OmniGen2Transformer(**CONFIG))
    return OmniGen2Pipeline(
        transformer={name: tensor.detach() for name, tensor in transformer.state_dict().items()},
        config=CONFIG,
        vae=drawn(
            seed + 1,
            lambda: kl_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant=False),
        ),
        mllm=drawn(seed + 2, lambda: qwen25_vl(tokenizer)),
        tokenizer=tokenizer,
    )


CASES = {
    "omnigen2": Case(
        "omnigen2",
        _omnigen2,
        pipeline=OmniGen2Pipeline,
        size=(32, 48),
        guidance_argument="text_guidance_scale",
        loads_adapters=False,
        idle=("ref_image_refiner.*",),  # without references
    )
}
