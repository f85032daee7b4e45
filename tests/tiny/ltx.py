"""LTX-Video: the VAE of the first release, and that of 0.9.5 with residual stages and a decoder that is told a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tiny_pipelines import drawn, t5, t5_tokenizer
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.families.ltx import NAMES
from burnish.family import Family
from tiny import Case


def first_vae() -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        block_out_channels=(4, 8, 8, 8),
        decoder_block_out_channels=(4, 8, 8, 8),
        layers_per_block=(2, 1, 1, 1, 1),
        decoder_layers_per_block=(2, 1, 1, 1, 1),
    )


def later_vae() -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        block_out_channels=(4, 8, 8, 8, 8),
        down_block_types=("LTXVideo095DownBlock3D",) * 4,
        spatio_temporal_scaling=(True,) * 4,
        layers_per_block=(2, 1, 1, 1, 1),
        downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        decoder_block_out_channels=(8, 16, 32),
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_layers_per_block=(1, 1, 2, 1),
        decoder_inject_noise=(False,) * 4,
        upsample_residual=(True,) * 3,
        upsample_factor=(2,) * 3,
        timestep_conditioning=True,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )


def with_statistics(make: Callable[[], AutoencoderKLLTXVideo]) -> AutoencoderKLLTXVideo:
    """Mean and deviation of the latents, which are weights, as no other VAE's."""
    vae = make()
    vae.latents_mean.normal_(0, 0.2)
    vae.latents_std.uniform_(0.6, 1.4)
    return vae


def _ltx(
    seed: int, *, vae: Callable[[], AutoencoderKLLTXVideo], kind: type[DiffusionPipeline] = LTXPipeline
) -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 128
    return kind(
        transformer=drawn(
            seed,
            lambda: LTXVideoTransformer3DModel(
                num_attention_heads=32,
                attention_head_dim=2,
                cross_attention_dim=64,
                num_layers=3,
                caption_channels=32,
            ),
        ),
        vae=drawn(seed + 1, lambda: with_statistics(vae)),
        text_encoder=drawn(seed + 2, lambda: t5(tokenizer)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
    )


def unpacked(frames: int, height: int, width: int) -> Callable[[DiffusionPipeline, Tensor], Tensor]:
    """The pipeline's row of tokens as latents of a clip of that size in pixels."""

    def unpack(pipeline: DiffusionPipeline, tokens: Tensor) -> Tensor:
        unpacked: Tensor = pipeline._unpack_latents(tokens, (frames - 1) // 8 + 1, height // 32, width // 32)
        return torch.as_tensor(unpacked)

    return unpack


class FirstFrameAsItIs(LTXImageToVideoPipeline):
    """Takes the first frame's latents for their mode, where diffusers draws them from the noise's generator."""

    def prepare_latents(
        self, image: Tensor, batch: int, channels: int, height: int, width: int, frames: int, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        dtype, device, generator, _ = rest
        shape = (batch, channels, (frames - 1) // 8 + 1, height // 32, width // 32)
        first = self.vae.encode(image[:, :, None]).latent_dist.mode()
        first = self._normalize_latents(first, self.vae.latents_mean, self.vae.latents_std)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents[:, :, :1] = first
        kept = torch.zeros(batch, 1, *shape[2:])
        kept[:, :, 0] = 1
        return self._pack_latents(latents), self._pack_latents(kept).squeeze(-1)


def _picture() -> Image.Image:
    coarse = Image.frombytes("RGB", (3, 2), bytes(range(0, 252, 14)))
    return coarse.resize((96, 64), Image.Resampling.BICUBIC)


def told_the_first_frame(family: Family) -> Conditioning:
    pixels_HW3 = torch.tensor(list(_picture().tobytes()), dtype=torch.float32).view(64, 96, 3)
    return family.encode_references([pixels_HW3.permute(2, 0, 1)[None] / 127.5 - 1], frames=17)


CASES = {
    "ltx": Case(
        "ltx",
        partial(_ltx, vae=first_vae),
        size=(64, 96),
        frames=17,
        unpack=unpacked(17, 64, 96),
        native=NAMES,
        upstream="convert_ltx_transformer_checkpoint_to_diffusers",
    ),
    "ltx_still": Case(
        "ltx",
        partial(_ltx, vae=later_vae),
        size=(128, 96),
        call={"num_frames": 1},
        unpack=unpacked(1, 128, 96),
    ),
    "ltx_first_frame": Case(
        "ltx",
        partial(_ltx, vae=first_vae, kind=LTXImageToVideoPipeline),
        size=(64, 96),
        frames=17,
        call={"image": [_picture()] * 2},
        told=told_the_first_frame,
        unpack=unpacked(17, 64, 96),
        pipeline=FirstFrameAsItIs,
        learns=False,  # of a still nothing is left to learn but what the other cases learn
    ),
}
