"""What the denoiser trains on: scenes drawn, encoded and worded once, then kept in memory.

Shape letters: N scenes, S tokens, C channels of a packed latent, D width of the pooled prompt.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from .captions import training_captions
from .drawing import draw
from .models import GRID, pack
from .optim import LOW
from .tokenizers import tokenize
from .world import Floats, Scenes, tuning_scenes

_DRAWN_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Pool:
    """N training examples on the training device."""

    latents_NSC: Tensor  # float16, packed and scaled as the denoiser sees them
    clip_ids_NS: Tensor
    t5_ids_NS: Tensor
    weight_NS: Tensor  # of each latent token in the loss; the mean is 1

    def __len__(self) -> int:
        return len(self.latents_NSC)


def build_pool(
    pipeline: FluxPipeline,
    *,
    seed: int,
    scenes: int,
    two_share: float,
    complete_share: float,
    focus: float,
    device: torch.device,
) -> Pool:
    """Draw and encode settled scenes.

    Args:
        pipeline: its VAE and tokenizers are used.
        seed: of scenes and captions.
        scenes: how many; about 5 ms each on two CPU cores.
        two_share: share with two objects.
        complete_share: share of captions that name every attribute.
        focus: extra weight, in the loss, of latent tokens on or beside an object; 3 makes them count 4 times.
        device: where the pool lives.
    """
    world = tuning_scenes(seed, scenes, two_share=two_share)
    captions = training_captions(world, seed, complete_share=complete_share)
    ids = tokenize(pipeline.tokenizer, pipeline.tokenizer_2, captions)
    return Pool(
        latents_NSC=encode_scenes(pipeline.vae, world, device),
        clip_ids_NS=torch.from_numpy(ids.clip_NS).to(device),
        t5_ids_NS=torch.from_numpy(ids.t5_NS).to(device),
        weight_NS=torch.from_numpy(_object_weights(world, focus)).to(device),
    )


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, world: Scenes, device: torch.device) -> Tensor:
    """Packed latents in the scale the denoiser sees, float16, shape (N, S, C)."""
    encoder = copy.deepcopy(vae.encoder).to(device, LOW).to(memory_format=torch.channels_last)
    latents = []
    for start in range(0, len(world), _DRAWN_AT_ONCE):
        pictures = draw(world.take(slice(start, start + _DRAWN_AT_ONCE)), device) * 2 - 1
        moments = encoder(pictures.to(LOW).contiguous(memory_format=torch.channels_last))
        mean = moments.float().chunk(2, 1)[0].contiguous()
        latents.append(pack((mean - vae.config.shift_factor) * vae.config.scaling_factor).half())
    return torch.cat(latents)


def _object_weights(world: Scenes, focus: float) -> Floats:
    """Weight of every latent token, shape (N, S): the small objects are what a prompt is mostly about."""
    line = (np.arange(GRID) + 0.5) * 2 / GRID - 1
    weight_NHW = np.ones((len(world), GRID, GRID), np.float32)
    for which in (0, 1):
        x, y = world.position[:, which].T[..., None, None]
        off_x = np.abs(line[None, None, :] - x)
        off_y = np.abs(-line[None, :, None] - y)
        near = np.maximum(off_x, off_y) <= world.radius[:, which, None, None] + 0.15
        used = world.two[:, None, None] if which else True
        weight_NHW += np.float32(focus) * (near & used)
    flat: Floats = (weight_NHW / weight_NHW.mean()).reshape(len(world), -1)
    return flat
