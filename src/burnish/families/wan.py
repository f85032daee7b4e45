"""What the models of Wan have in common (arXiv 2503.20314): the network's two sets of names, its slots, its prompts.

Used by the families wan21, wan22 and wan_vace. Latents and pixels have a time axis; a picture is a clip of one frame.

Shape letters: B batch, C channels, T frames, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ftfy
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from burnish.families import first_frame, video_vae
from burnish.families.native import NativeNames, depth
from burnish.families.slots import Slot
from burnish.families.sources import locate
from burnish.families.umt5 import umt5_slot
from burnish.families.video_vae import wan_vae_slot
from burnish.families.weights import Layout, layout_of
from burnish.family import Conditioning, ExportKeys, ModelSource, TargetSet

PROMPT_TOKENS = 512
HEAD_DIM = 128
FREQUENCIES = 256  # of the time embedding, whatever the model's size
IMAGE_TOKENS = 257  # CLIP's 16 x 16 patches and its summary

_BLOCK = "blocks.#"
_ATTENTION = {
    **{f"{theirs}.{x}": f"{ours}.to_{x}" for theirs, ours in (("self_attn", "attn1"),) for x in "qkv"},
    **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    **{f"self_attn.norm_{x}": f"attn1.norm_{x}" for x in "qk"},
    **{f"cross_attn.norm_{x}": f"attn2.norm_{x}" for x in "qk"},
    **{f"cross_attn.{x}_img": f"attn2.add_{x}_proj" for x in "kv"},
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # the release counts the norm before the feed-forward, which has no weights, as the second
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
TABLE: Mapping[str, str] = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    **{f"{_BLOCK}.{theirs}": f"{_BLOCK}.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"vace_{_BLOCK}.{theirs}": f"vace_{_BLOCK}.{ours}" for theirs, ours in _ATTENTION.items()},
    f"vace_{_BLOCK}.before_proj": f"vace_{_BLOCK}.proj_in",
    f"vace_{_BLOCK}.after_proj": f"vace_{_BLOCK}.proj_out",
}
_SIGNS = (
    "blocks.0.self_attn.q.weight",
    "blocks.0.cross_attn.q.weight",
    "time_projection.1.weight",
    "head.modulation",
)
_VACE_SIGN = "vace_patch_embedding.weight"
_OUR_SIGNS = {"blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight", "scale_shift_table"}
# Relatives with layers of their own: Fun Control's camera, Animate's face, S2V's audio, MultiTalk's speakers.
_RELATIVES = (
    "control_adapter.conv.weight",
    "face_adapter.k_norm.weight",
    "casual_audio_encoder.encoder.conv1.weight",
)
NAMES = NativeNames(table=TABLE, signs=_SIGNS, absent=(_VACE_SIGN, *_RELATIVES))
VACE_NAMES = NativeNames(table=TABLE, signs=(*_SIGNS, _VACE_SIGN))

_LAYERS = ("blocks.*.attn[12].*",)
_FEED_FORWARD = ("blocks.*.ffn.net.0.proj", "blocks.*.ffn.net.2")
TARGETS: Mapping[str, TargetSet] = {
    "attention": TargetSet(_LAYERS, "Query, key, value and output of both attentions."),
    "attention+mlp": TargetSet((*_LAYERS, *_FEED_FORWARD), "Attention and feed-forward layers."),
    "all": TargetSet(
        (
            "blocks.*",
            "condition_embedder.text_embedder.*",
            "condition_embedder.time_proj",
            "proj_out",
        ),
        "Every layer of the blocks, the embedding of text, the modulations of time, and the last layer.",
    ),
}


def keys(
    modelspec: str, version: str, names: NativeNames = NAMES, labels: Mapping[str, str] | None = None
) -> ExportKeys:
    """The release's own names, which ComfyUI and diffusers read both; diffusers' names only diffusers reads."""
    return ExportKeys(
        default="comfy",
        formats=("comfy", "diffusers"),
        modelspec=modelspec,
        base_model_version=version,
        prefix={"comfy": "diffusion_model.", "diffusers": "transformer."},
        native=names.native_module,
        labels=labels or {},
    )


def transformer_slot(
    folder: str = "transformer",
    *,
    make: Any = WanTransformer3DModel.from_config,
    names: NativeNames = NAMES,
    optional: bool = False,
) -> Slot:
    """The denoiser in `folder`, found in single files under either set of names."""

    def find(layout: Layout) -> Layout | None:
        named = set(layout)
        if (
            named >= _OUR_SIGNS
            and (_VACE_SIGN in named) == (names is VACE_NAMES)
            and named.isdisjoint(_RELATIVES)
        ):
            return layout
        return names.denoiser(layout)

    return Slot(
        folder,
        "denoiser",
        make,
        find,
        config_from_shapes,
        # As diffusers keeps them: times and modulations lose too much in bfloat16.
        keep_float32=lambda dtype: (
            "*time_embedder*",
            "*scale_shift_table",
            "*norm1.*",
            "*norm2.*",
            "*norm3.*",
        ),
        optional=optional,
    )


def vae_slot(hint: str = "wan_2.1_vae.safetensors") -> Slot:
    return wan_vae_slot(AutoencoderKLWan.from_config, hint)


def text_slot() -> Slot:
    return umt5_slot("text_encoder", "tokenizer")


def config_from_shapes(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The shipped config with the widths and depths of a layout (diffusers' names)."""
    width, channels, *patch = layout["patch_embedding.weight"].shape
    image = layout.get("condition_embedder.image_embedder.norm1.weight")
    positions = layout.get("condition_embedder.image_embedder.pos_embed")
    has_image_keys = "blocks.0.attn2.add_k_proj.weight" in layout
    config = {
        **shipped,
        "num_layers": depth(layout, "blocks."),
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": channels,
        "out_channels": layout["proj_out.weight"].shape[0] // (patch[0] * patch[1] * patch[2]),
        "patch_size": patch,
        "text_dim": layout["condition_embedder.text_embedder.linear_1.weight"].shape[1],
        "ffn_dim": layout["blocks.0.ffn.net.0.proj.weight"].shape[0],
        "freq_dim": layout["condition_embedder.time_embedder.linear_1.weight"].shape[1],
        "image_dim": None if image is None else image.shape[0],
        "added_kv_proj_dim": width if has_image_keys else None,
        "pos_embed_seq_len": None if positions is None else positions.shape[1],
    }
    if _VACE_SIGN not in layout:
        return config
    # Every so many blocks one is steered: the release spaces them evenly, from the first.
    steered, layers = depth(layout, "vace_blocks."), int(config["num_layers"])
    return {
        **config,
        "vace_layers": list(range(0, layers, -(-layers // steered))),
        "vace_in_channels": layout[_VACE_SIGN].shape[1],
    }


def tidy_prompt(prompt: str) -> str:
    """A prompt as the released pipelines clean it: broken characters mended, white space made single."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended.strip()).strip()


@torch.no_grad()
def encode_prompts(prompts: Sequence[str], encoder: Any, tokenizer: Any) -> Conditioning:
    """UMT5's last hidden states as `tokens_BSD` (B, 512, 4096), zeros after the prompt's end, which are read."""
    encoded = tokenizer(
        [tidy_prompt(prompt) for prompt in prompts],
        padding="max_length",
        max_length=PROMPT_TOKENS,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask_BS = encoded.attention_mask.to(encoder.device)
    hidden_BSD = encoder(encoded.input_ids.to(encoder.device), mask_BS).last_hidden_state
    return Conditioning({"tokens_BSD": hidden_BSD * mask_BS[..., None].to(hidden_BSD.dtype)})


def example_tokens(batch: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, PROMPT_TOKENS, width, generator=generator)


def clip_of(first: Tensor, frames: int, last: Tensor | None = None) -> Tensor:
    """A picture (B, 3, H, W) as the first frame of a clip (B, 3, T, H, W) that is grey after it, up to the last."""
    clip_B3THW = first.new_zeros(first.shape[0], 3, frames, *first.shape[-2:])
    clip_B3THW[:, :, 0] = first
    if last is not None and frames > 1:
        clip_B3THW[:, :, -1] = last
    return clip_B3THW


def with_known_first(latents_BCTHW: Tensor, frame_compression: int, *, last: bool = False) -> Tensor:
    """Latents of a clip behind the channels that say which of their frames are known: the first, or also the last.

    One channel for each frame that a latent frame stands for (`wan/image2video.py`, `first_last_frame2video.py`).
    """
    batch, _, length, height, width = latents_BCTHW.shape
    known = latents_BCTHW.new_zeros(batch, frame_compression, length, height, width)
    known[:, :, 0] = 1
    if last and length > 1:
        known[:, -1, -1] = 1
    return torch.cat([known, latents_BCTHW], dim=1)


def either_vae_slot() -> Slot:
    """Wan 2.1's VAE or Wan 2.2's of 48 channels, told apart in single files by their latents.

    The shipped configs hold both, by the number of channels.
    """

    def config_of(shipped: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        channels = layout["post_quant_conv.weight"].shape[0]
        return video_vae.config_from_shapes(shipped[str(channels)], layout)

    return replace(vae_slot("wan2.2_vae.safetensors or wan_2.1_vae.safetensors"), config_of=config_of)


def layout_of_file(source: ModelSource, slot: Slot) -> Layout | None:
    """A denoiser in a single file under diffusers' names; None where it holds none."""
    return slot.find(layout_of([locate(source)]))


def predict_after(
    denoiser: Any,
    noisy: Tensor,
    t_B: Tensor,
    conditioning: Conditioning,
    first_BC1HW: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Velocity of noisy latents (B, C, T, H, W); with a first frame its latents go in clean, at time 0.

    What comes out at the first frame then leads straight to it.
    """
    given, time = noisy, t_B * 1000
    if first_BC1HW is not None:
        given = first_frame.put_in(first_BC1HW, noisy)
        _, _, frames, height, width = noisy.shape
        later_N = torch.ones(frames, height // 2, width // 2, device=noisy.device, dtype=time.dtype)
        later_N[0] = 0
        time = time[:, None] * later_N.flatten()
    velocity: Tensor = denoiser(
        hidden_states=given.to(dtype),
        timestep=time,
        encoder_hidden_states=conditioning["tokens_BSD"].to(dtype),
        return_dict=False,
    )[0]
    if first_BC1HW is None:
        return velocity
    return first_frame.leading_to(first_BC1HW, velocity, noisy, t_B)
