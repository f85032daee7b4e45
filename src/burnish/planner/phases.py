"""What happens beside training steps: captions and pictures encoded, samples drawn and decoded. Bytes on the device.

Each phase holds only the parts it needs, so the peak of a run is the largest of its phases, not their sum.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.conditioning import Conditioning
from burnish.family import Family
from burnish.placement import Part
from burnish.planner.live_bytes import LiveBytes
from burnish.planner.lowering import cuda_lowering
from burnish.planner.recipe import Shape
from burnish.planner.skeletons import keep_texts, modules_of, without_data
from burnish.planner.trace import batch_without_data, sound_of

VAE: frozenset[Part] = frozenset({"vae"})
# A text encoder's layer, per token of a batch: hidden states, query, key, value, and the feed-forward's two halves,
# in units of the hidden width; and the stack of all layers' outputs, which several families read.
LAYER_WIDTHS = 16


@dataclass(frozen=True, slots=True)
class Phase:
    """Peak bytes of a phase, and of them the weights."""

    peak: int
    weights: int


def caption_phase(family: Family, kept_as: str | None, tokens: int) -> Phase:
    """Text encoders, all loaded at once, with one caption; activations by a rule, since they are small beside weights.

    Args:
        family: a skeleton with the text encoders.
    """
    if kept_as is not None:
        keep_texts(family, kept_as)
    weights = activations = 0
    for encoder in modules_of(family):
        weights += held(encoder)
        widest = max((one.numel() for one in encoder.parameters()), default=0) if kept_as else 0
        # The narrow side of a layer: the wide one is inside of a feed-forward, or all layers' outputs side by side.
        width = max((min(one.shape) for one in encoder.parameters() if one.dim() == 2), default=0)
        depth = max((len(one) for one in encoder.modules() if isinstance(one, nn.ModuleList)), default=1)
        activations = max(activations, tokens * width * (LAYER_WIDTHS + depth) * 2 + 2 * widest)
    return Phase(weights + activations, weights)


def encoding_phase(family: Family, shape: Shape, *, cuda: bool = True) -> Phase:
    """The VAE with one picture or clip. `family`: a skeleton with the VAE."""
    size = (shape.height, shape.width)
    still = family.latents.frame_compression is None
    pixels = (1, 3, *size) if still else (1, 3, shape.frames, *size)
    return _traced(family, pixels, family.encode_pixels, cuda=cuda)


def decoding_phase(family: Family, shape: Shape, *, cuda: bool = True) -> Phase:
    """The VAE with the latents of one sample. `family`: a skeleton with the VAE."""
    latents = (1, *family.latents.of(shape.height, shape.width, shape.frames))
    return _traced(family, latents, family.decode_latents, cuda=cuda)


def drawing_phase(family: Family, shape: Shape, told: Conditioning, *, cuda: bool = True) -> Phase:
    """One prediction of the denoiser as the sampler asks for it, told of references as by `told`.

    Args:
        family: a skeleton with the denoiser.
    """
    noisy, times_B, conditioning = family.example(shape.height, shape.width, shape.batch, shape.frames)
    conditioning = conditioning.merged(told)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for denoiser in family.denoisers.values():
            without_data(denoiser)
        batch = batch_without_data(noisy, conditioning, sound_of(family, shape))
    counted = LiveBytes(fake)
    counted.follow([list(one.parameters()) + list(one.buffers()) for one in family.denoisers.values()])
    weights = counted.current
    with cuda_lowering() if cuda else nullcontext(), torch.no_grad(), counted:
        times_B = torch.full(times_B.shape, 0.5)
        if family.audio is not None and batch.audio_BCLF is not None:
            family.audio.predict(batch.latents_BCHW, batch.audio_BCLF, times_B, batch.conditioning)
        else:
            family.predict(batch.latents_BCHW, times_B, batch.conditioning)
    return Phase(counted.peak, weights)


def _traced(family: Family, shape: tuple[int, ...], work: object, *, cuda: bool) -> Phase:
    assert callable(work)
    modules = modules_of(family)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for module in modules:
            without_data(module)
        given: Tensor = torch.empty(shape, dtype=next(modules[0].parameters()).dtype)
    counted = LiveBytes(fake)
    counted.follow([[*module.parameters(), *module.buffers()] for module in modules])
    weights = counted.current
    counted.follow(given)
    with cuda_lowering() if cuda else nullcontext(), torch.no_grad(), counted:
        work(given)
    return Phase(counted.peak, weights)


def held(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, those that several names share counted once."""
    tensors = {id(one): one for one in [*module.parameters(), *module.buffers()]}
    return sum(one.numel() * one.element_size() for one in tensors.values())
