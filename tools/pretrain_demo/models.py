"""The tiny pipeline: its parts, how its latents are packed, and the conditioning training must reproduce.

Shape letters: B batch, C channels, H W height and width, S tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .tokenizers import T5_LENGTH, train_tokenizers
from .world import SIZE

GRID: Final = SIZE // 16  # packed latents are GRID x GRID tokens: 8x from the VAE, 2x from packing
LATENT_CHANNELS: Final = 16
_POOLED_WIDTH, _TEXT_WIDTH = 64, 96


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """The whole pipeline with random weights, in float32 (5.1 million parameters)."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = train_tokenizers()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_build_vae(),
        transformer=_build_denoiser(),
        text_encoder=_build_clip(clip_tokenizer),
        text_encoder_2=_build_t5(t5_tokenizer),
        tokenizer=clip_tokenizer,
        tokenizer_2=t5_tokenizer,
    )


def load_pipeline(folder: Path) -> FluxPipeline:
    """A saved pipeline in float32, whatever precision it was saved in."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.tokenizer_2.model_max_length = T5_LENGTH  # folders of the first stages still say 512
    return pipeline


def _build_vae() -> AutoencoderKL:
    """998 771 parameters, 8x smaller, 16 channels; scale and shift are measured after training."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 32, 64, 64],
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def _build_denoiser() -> FluxTransformer2DModel:
    """3 587 136 parameters: 2 double and 4 single blocks of width 160."""
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_POOLED_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    modulations = ("norm.linear", "norm1.linear", "norm1_context.linear")
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(modulations) or name == "proj_out"):
            nn.init.zeros_(module.weight)  # every block starts as the identity (adaLN-zero)
            nn.init.zeros_(module.bias)
    return denoiser


def _build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_POOLED_WIDTH,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=2,
        hidden_act="quick_gelu",
        projection_dim=_POOLED_WIDTH,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=_TEXT_WIDTH,
        d_kv=24,
        d_ff=192,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


class TextToVelocity(nn.Module):
    """Denoiser and T5 (and CLIP, when it is trained too) as one module, conditioned as the pipeline does it.

    The text's position numbers are all zero in FLUX, so only T5 knows the order of the words: with T5 frozen,
    "a star above a ring" could not be told from "a ring above a star" unless T5 already knew how.
    """

    def __init__(self, pipeline: FluxPipeline, *, train_clip: bool) -> None:
        super().__init__()
        self.denoiser = pipeline.transformer
        self.t5 = pipeline.text_encoder_2
        self.clip = pipeline.text_encoder if train_clip else None

    def forward(self, noisy_BSC: Tensor, t_B: Tensor, pooled_BD: Tensor, t5_ids_BS: Tensor) -> Tensor:
        """Velocity `noise - data`, shape (B, S, C), in the precision of the weights."""
        device, dtype = noisy_BSC.device, self.denoiser.dtype
        text_positions = torch.zeros(t5_ids_BS.shape[1], 3, device=device)
        return self.denoiser(
            hidden_states=noisy_BSC.to(dtype),
            timestep=t_B.to(dtype),
            pooled_projections=pooled_BD.to(dtype),
            encoder_hidden_states=self.t5(input_ids=t5_ids_BS)[0],
            txt_ids=text_positions,
            img_ids=_image_positions(device),
            return_dict=False,
        )[0]


def _image_positions(device: torch.device) -> Tensor:
    """Row and column of every packed token, shape (S, 3), as FluxPipeline numbers them."""
    positions = torch.zeros(GRID, GRID, 3, device=device)
    positions[..., 1] = torch.arange(GRID, device=device)[:, None]
    positions[..., 2] = torch.arange(GRID, device=device)[None, :]
    return positions.view(-1, 3)


def pack(latents_BCHW: Tensor) -> Tensor:
    """Latents as FLUX's tokens: each 2x2 block of pixels becomes one token, shape (B, H*W/4, 4C)."""
    batch, channels, height, width = latents_BCHW.shape
    blocks = latents_BCHW.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


_fused_attention = F.scaled_dot_product_attention


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    """Softmax attention written out, for inputs of shape (B, heads, S, D).

    With a mask, as CLIP has, the usual function computes it.
    """
    if attn_mask is not None or is_causal or dropout_p:
        return _fused_attention(query, key, value, attn_mask, dropout_p, is_causal, **others)
    batch, heads, tokens, width = query.shape
    query, key, value = (tensor.reshape(batch * heads, -1, width) for tensor in (query, key, value))
    weights = torch.bmm(query * width**-0.5, key.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, value).reshape(batch, heads, tokens, width)


@contextmanager
def fast_cpu_attention(device: torch.device) -> Iterator[None]:
    """Use `plain_attention` inside this block on a CPU.

    torch's fused CPU attention spends 39 % of a training step in its backward pass; at 96 tokens, plain
    matrix products make the whole step 1.6 times as fast in bfloat16 (2 cores, torch 2.13).
    """
    if device.type != "cpu":
        yield
        return
    F.scaled_dot_product_attention = plain_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _fused_attention
