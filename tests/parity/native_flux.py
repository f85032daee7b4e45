"""Writes a FLUX.1 of diffusers as Black Forest Labs and ComfyUI write it; knows nothing of Burnish.

Names and order of rows after https://github.com/black-forest-labs/flux, `src/flux/model.py`,
`modules/layers.py` (linear1 = query, key, value, mlp; the last modulation is shift, scale) and
`modules/autoencoder.py`.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor

Weights = dict[str, Tensor]


def native_transformer(transformer: FluxTransformer2DModel) -> Weights:
    source = transformer.state_dict()
    native: Weights = {}

    def put(target: str, *modules: str, kinds: tuple[str, ...] = ("weight", "bias")) -> None:
        for kind in kinds:
            native[f"{target}.{kind}"] = torch.cat([source[f"{module}.{kind}"] for module in modules])

    def put_norms(target: str, query: str, key: str) -> None:
        native[f"{target}.query_norm.scale"] = source[f"{query}.weight"].clone()
        native[f"{target}.key_norm.scale"] = source[f"{key}.weight"].clone()

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    embeddings = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if transformer.config.guidance_embeds:
        embeddings["guidance_in"] = "guidance_embedder"
    for target, module in embeddings.items():
        put(f"{target}.in_layer", f"time_text_embed.{module}.linear_1")
        put(f"{target}.out_layer", f"time_text_embed.{module}.linear_2")
    for number in range(transformer.config.num_layers):
        block, old = f"double_blocks.{number}", f"transformer_blocks.{number}"
        put(f"{block}.img_mod.lin", f"{old}.norm1.linear")
        put(f"{block}.txt_mod.lin", f"{old}.norm1_context.linear")
        put(f"{block}.img_attn.qkv", *(f"{old}.attn.to_{letter}" for letter in "qkv"))
        put(f"{block}.txt_attn.qkv", *(f"{old}.attn.add_{letter}_proj" for letter in "qkv"))
        put(f"{block}.img_attn.proj", f"{old}.attn.to_out.0")
        put(f"{block}.txt_attn.proj", f"{old}.attn.to_add_out")
        put_norms(f"{block}.img_attn.norm", f"{old}.attn.norm_q", f"{old}.attn.norm_k")
        put_norms(f"{block}.txt_attn.norm", f"{old}.attn.norm_added_q", f"{old}.attn.norm_added_k")
        for side, feed_forward in (("img", "ff"), ("txt", "ff_context")):
            put(f"{block}.{side}_mlp.0", f"{old}.{feed_forward}.net.0.proj")
            put(f"{block}.{side}_mlp.2", f"{old}.{feed_forward}.net.2")
    for number in range(transformer.config.num_single_layers):
        block, old = f"single_blocks.{number}", f"single_transformer_blocks.{number}"
        put(f"{block}.modulation.lin", f"{old}.norm.linear")
        put(f"{block}.linear1", *(f"{old}.attn.to_{letter}" for letter in "qkv"), f"{old}.proj_mlp")
        put(f"{block}.linear2", f"{old}.proj_out")
        put_norms(f"{block}.norm", f"{old}.attn.norm_q", f"{old}.attn.norm_k")
    put("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):
        scale, shift = source[f"norm_out.linear.{kind}"].chunk(2)
        native[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    return native


def native_vae(vae: AutoencoderKL) -> Weights:
    stages = len(vae.config.block_out_channels)
    native: Weights = {}
    for name, tensor in vae.state_dict().items():
        side, rest = name.split(".", 1)
        if rest.startswith(("down_blocks", "up_blocks")):
            way, number, kind, index, inner = rest.split(".", 4)
            # The original counts the decoder's stages from the picture.
            stage = int(number) if way == "down_blocks" else stages - 1 - int(number)
            stem = f"{way.removesuffix('_blocks')}.{stage}"
            if kind == "resnets":
                rest = f"{stem}.block.{index}.{inner.replace('conv_shortcut', 'nin_shortcut')}"
            else:
                rest = f"{stem}.{kind.removesuffix('rs')}.{inner}"
        elif rest.startswith("mid_block.resnets"):
            _, _, index, inner = rest.split(".", 3)
            rest = f"mid.block_{int(index) + 1}.{inner}"
        elif rest.startswith("mid_block.attentions"):
            inner, kind = rest.removeprefix("mid_block.attentions.0.").rsplit(".", 1)
            names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
            rest = f"mid.attn_1.{names[inner]}.{kind}"
            if inner != "group_norm" and kind == "weight":
                tensor = tensor[:, :, None, None]  # a 1x1 convolution
        else:
            rest = rest.replace("conv_norm_out", "norm_out")
        native[f"{side}.{rest}"] = tensor.contiguous()
    return native
