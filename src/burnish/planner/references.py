"""What references, masks and first frames add to a step: the family's own encoding of them, on tensors without data."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from burnish.conditioning import Conditioning
from burnish.family import Family
from burnish.planner.lowering import cuda_lowering
from burnish.planner.recipe import Shape
from burnish.planner.skeletons import modules_of, without_data


def shown(family: Family, shape: Shape, *, cuda: bool = True) -> Conditioning:
    """What the denoiser is told about `shape.references` pictures, each of the target's size before it is scaled.

    Tensors have shapes and types alone (meta device), but those of whole numbers that no pixel decides: they have
    their values.

    Args:
        family: a skeleton with all that sees references.
    """
    if not shape.references:
        return Conditioning({})
    target = (shape.height, shape.width)
    own = family.capabilities.own_references
    sizes = [
        target if number < own else family.reference_size(*target, target)
        for number in range(shape.references)
    ]
    modules = modules_of(family)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            without_data(module)
        dtype = next(modules[0].parameters()).dtype
        pictures = [torch.empty(shape.batch, 3, *size, dtype=dtype) for size in sizes]
        mask = torch.empty(shape.batch, 1, *target) if shape.masked else None
    with cuda_lowering() if cuda else nullcontext(), torch.no_grad():
        told = family.encode_references(pictures, mask_B1HW=mask, frames=shape.frames)
    return Conditioning({name: _told(tensor) for name, tensor in told.items()})


def _told(tensor: Tensor) -> Tensor:
    """On the meta device, since fake tensors of two modes do not mix; what has values stays as it is."""
    if isinstance(tensor, FakeTensor) or tensor.is_floating_point():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor
