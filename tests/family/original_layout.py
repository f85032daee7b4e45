"""Writes diffusers weights of Stable Diffusion 1 and XL as the original single files.

Module by module from the other side than the reader: it walks the blocks as `UNetModel` of generative-models builds
them and asks for each the diffusers module that does the same work, where the reader rewrites names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def unet_in_original_names(weights: Weights, stages: int, layers: int) -> Weights:
    """A UNet of `stages` stages with `layers` residual blocks each."""
    out: Weights = {}

    def put(original: str, ours: str) -> bool:
        kinds = [kind for kind in ("weight", "bias") if f"{ours}.{kind}" in weights]
        out.update({f"{original}.{kind}": weights[f"{ours}.{kind}"] for kind in kinds})
        return bool(kinds)

    def put_resnet(original: str, ours: str) -> None:
        put(f"{original}.in_layers.0", f"{ours}.norm1")
        put(f"{original}.in_layers.2", f"{ours}.conv1")
        put(f"{original}.emb_layers.1", f"{ours}.time_emb_proj")
        put(f"{original}.out_layers.0", f"{ours}.norm2")
        put(f"{original}.out_layers.3", f"{ours}.conv2")
        put(f"{original}.skip_connection", f"{ours}.conv_shortcut")

    def put_attention(original: str, ours: str) -> bool:
        found = {name: t for name, t in weights.items() if name.startswith(f"{ours}.")}
        out.update({original + name[len(ours) :]: tensor for name, tensor in found.items()})
        return bool(found)

    put("time_embed.0", "time_embedding.linear_1")
    put("time_embed.2", "time_embedding.linear_2")
    put("label_emb.0.0", "add_embedding.linear_1")
    put("label_emb.0.2", "add_embedding.linear_2")
    put("input_blocks.0.0", "conv_in")
    number = 1
    for stage in range(stages):
        for layer in range(layers):
            put_resnet(f"input_blocks.{number}.0", f"down_blocks.{stage}.resnets.{layer}")
            put_attention(f"input_blocks.{number}.1", f"down_blocks.{stage}.attentions.{layer}")
            number += 1
        if put(f"input_blocks.{number}.0.op", f"down_blocks.{stage}.downsamplers.0.conv"):
            number += 1
    put_resnet("middle_block.0", "mid_block.resnets.0")
    put_attention("middle_block.1", "mid_block.attentions.0")
    put_resnet("middle_block.2", "mid_block.resnets.1")
    number = 0
    for stage in range(stages):
        for layer in range(layers + 1):
            put_resnet(f"output_blocks.{number}.0", f"up_blocks.{stage}.resnets.{layer}")
            attends = put_attention(f"output_blocks.{number}.1", f"up_blocks.{stage}.attentions.{layer}")
            if layer == layers:  # the upsampler is the last module of a stage's last block
                put(
                    f"output_blocks.{number}.{2 if attends else 1}.conv",
                    f"up_blocks.{stage}.upsamplers.0.conv",
                )
            number += 1
    put("out.0", "conv_norm_out")
    put("out.2", "conv_out")
    assert len(out) == len(weights)
    return out


def vae_in_original_names(weights: Weights, stages: int, layers: int) -> Weights:
    """A KL-VAE of `stages` stages with `layers` residual blocks each (the decoder has one more)."""
    out: Weights = {}

    def put(original: str, ours: str, as_convolution: bool = False) -> None:
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in weights:
                tensor = weights[f"{ours}.{kind}"]
                out[f"{original}.{kind}"] = (
                    tensor[..., None, None] if as_convolution and tensor.dim() == 2 else tensor
                )

    def put_resnet(original: str, ours: str) -> None:
        for module in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{original}.{module}", f"{ours}.{module}")
        put(f"{original}.nin_shortcut", f"{ours}.conv_shortcut")

    for side in ("encoder", "decoder"):
        put(f"{side}.conv_in", f"{side}.conv_in")
        put(f"{side}.conv_out", f"{side}.conv_out")
        put(f"{side}.norm_out", f"{side}.conv_norm_out")
        put_resnet(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        put_resnet(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        attention = f"{side}.mid_block.attentions.0"
        put(f"{side}.mid.attn_1.norm", f"{attention}.group_norm")
        for original, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            put(f"{side}.mid.attn_1.{original}", f"{attention}.{ours}", as_convolution=True)
    for stage in range(stages):
        for layer in range(layers):
            put_resnet(f"encoder.down.{stage}.block.{layer}", f"encoder.down_blocks.{stage}.resnets.{layer}")
        put(f"encoder.down.{stage}.downsample.conv", f"encoder.down_blocks.{stage}.downsamplers.0.conv")
        mirrored = stages - 1 - stage
        for layer in range(layers + 1):
            put_resnet(f"decoder.up.{stage}.block.{layer}", f"decoder.up_blocks.{mirrored}.resnets.{layer}")
        put(f"decoder.up.{stage}.upsample.conv", f"decoder.up_blocks.{mirrored}.upsamplers.0.conv")
    put("quant_conv", "quant_conv")
    put("post_quant_conv", "post_quant_conv")
    assert len(out) == len(weights)
    return out


def vae_in_old_diffusers_names(weights: Weights) -> Weights:
    """As diffusers wrote the attention of a VAE up to version 0.16."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    out = dict(weights)
    for name in weights:
        for new_part, old_part in old.items():
            if f".attentions.0.{new_part}." in name:
                out[name.replace(new_part, old_part)] = out.pop(name)
    assert set(out) != set(weights)
    return out


def clip_in_open_clip_names(weights: Weights) -> Weights:
    """A CLIPTextModelWithProjection as OpenCLIP's `CLIP.text` has it: stacked q, k, v and x @ projection."""
    out = {
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": weights["text_model.final_layer_norm.weight"],
        "ln_final.bias": weights["text_model.final_layer_norm.bias"],
        "text_projection": weights["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for layer in _layers(weights):
        ours, original = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            stacked = [weights[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            out[f"{original}.attn.in_proj_{kind}"] = torch.cat(stacked)
            out[f"{original}.attn.out_proj.{kind}"] = weights[f"{ours}.self_attn.out_proj.{kind}"]
            out[f"{original}.mlp.c_fc.{kind}"] = weights[f"{ours}.mlp.fc1.{kind}"]
            out[f"{original}.mlp.c_proj.{kind}"] = weights[f"{ours}.mlp.fc2.{kind}"]
            out[f"{original}.ln_1.{kind}"] = weights[f"{ours}.layer_norm1.{kind}"]
            out[f"{original}.ln_2.{kind}"] = weights[f"{ours}.layer_norm2.{kind}"]
    return out


def _layers(weights: Weights) -> Iterator[int]:
    layer = 0
    while f"text_model.encoder.layers.{layer}.mlp.fc1.weight" in weights:
        yield layer
        layer += 1


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}
