"""Modules without weights made ready for a trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from burnish.family import Family
from burnish.memory.quantized import large_linears, repeated_parts, replace_linears


def keep_weights(family: Family, kept_as: str) -> None:
    """Put the denoiser's large frozen layers into a format, as loading does."""
    blocks = family.blocks()
    for denoiser in family.denoisers.values():
        # As on a card with the kernels: elsewhere the products are made in the run's number type.
        replace_linears(denoiser, large_linears(denoiser, blocks, kept_as), kept_as, eight_bit=True)


def keep_texts(family: Family, kept_as: str) -> None:
    """The same of the text encoders' layers."""
    encoders = {part: one for part, one in family.loaded.items() if part not in family.denoisers}
    for encoder in encoders.values():
        layers = large_linears(encoder, repeated_parts(encoder), kept_as)
        replace_linears(encoder, layers, kept_as, eight_bit=True)


def without_data(module: nn.Module) -> None:
    """Replace what is on the meta device by fake tensors; to be called under FakeTensorMode."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                if parameter not in made:  # embeddings can be shared
                    made[parameter] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False
                    )
                one._parameters[name] = made[parameter]
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, value in vars(one).items():  # rotary tables that are no buffers
            if isinstance(value, Tensor | list | tuple):
                setattr(one, name, tree_map_only(Tensor, _off_meta, value))


def _off_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


def modules_of(family: Family) -> list[nn.Module]:
    """Every module that a family holds."""
    return list(family.loaded.values())
