"""What the models of Wan have in common (arXiv 2503.20314): their slots, prompts, first frames and prediction.

Used by the families wan21, wan22 and wan_vace. Latents and pixels have a time axis; a picture is a clip of one frame.

Shape letters: B batch, C channels, T frames, H W height and width of latents, S tokens, D width.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ftfy
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.export_keys import ExportKeys
from burnish.families import first_frame, video_vae
from burnish.families.native import NativeNames
from burnish.families.slots import Slot
from burnish.families.sources import locate
from burnish.families.token_words import written_out
from burnish.families.umt5 import umt5_slot
from burnish.families.video_vae import wan_vae_slot
from burnish.families.wan_names import NAMES, config_from_shapes, find_transformer
from burnish.families.weights import Layout, layout_of
from burnish.family import ModelSource

PROMPT_TOKENS = 512
SIZE_OF_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}  # of the denoiser
IMAGE_TOKENS = 257  # CLIP's 16 x 16 patches and its summary


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
        native_kohya=("ComfyUI", "diffusers"),
        tensors=names.tensors,
        labels=labels or {},
        words={"text_encoder": "umt5xxl"},
    )


def transformer_slot(
    folder: str = "transformer",
    *,
    make: Any = WanTransformer3DModel.from_config,
    names: NativeNames = NAMES,
    optional: bool = False,
) -> Slot:
    """The denoiser in `folder`, found in single files under either set of names."""
    return Slot(
        folder,
        "denoiser",
        make,
        partial(find_transformer, names),
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


def tidy_prompt(prompt: str) -> str:
    """A prompt as the released pipelines clean it: broken characters mended, white space made single."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended.strip()).strip()


def encode_prompts(prompts: Sequence[str], encoder: Any, tokenizer: Any) -> Conditioning:
    """UMT5's last hidden states as `tokens_BSD` (B, 512, 4096), zeros after the prompt's end, which are read."""
    encoded = tokenizer(
        [written_out(tokenizer, tidy_prompt(prompt)) for prompt in prompts],
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

    slot = vae_slot("wan2.2_vae.safetensors or wan_2.1_vae.safetensors")

    def make(config: Mapping[str, Any]) -> nn.Module:
        return slot.make(config.get("48", config))  # as released with the denoiser whose config ships

    return replace(slot, config_of=config_of, make=make)


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
