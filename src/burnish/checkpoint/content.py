"""What goes into a checkpoint, looked at before anything is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from burnish.atomic import Json
from burnish.checkpoint.tensor_file import file_size
from burnish.errors import CheckpointError, NonFiniteLoss

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_MUST_BE_FINITE = ("adapter", "ema")  # what is exported and sampled; an optimizer may hold its own infinities
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # torch.isfinite does not take them
_BLOCK = 4096  # a file takes whole blocks


def refuse_non_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Nothing broken is saved as a success (law L5).

    Raises:
        NonFiniteLoss: a tensor of "adapter" or "ema" holds NaN or infinity; names the tensor.
    """
    for file in _MUST_BE_FINITE:
        for name, tensor in tensors.get(file, {}).items():
            finite = torch.isfinite(tensor.float() if tensor.dtype in _FLOAT8 else tensor)
            if finite.all():
                continue
            broken = finite.numel() - int(finite.sum())
            raise NonFiniteLoss(
                f"{file} tensor {name}: {broken} of {finite.numel()} values are NaN or infinite; not saved",
                remedy="The last checkpoint is still good. Lower the learning rate or set "
                "`train.on_nonfinite: {kind: rollback}`.",
            )


def required_bytes(tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Json]) -> int:
    """Bytes one checkpoint takes on the disk."""
    files = named_files(tensors)
    sizes = [*(file_size(content) for content in files.values()), len(state_bytes(state)), 2 * _BLOCK]
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes)


def named_files(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    for name in tensors:
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{name!r} is no name for a file of a checkpoint; use a-z, 0-9 and _")
    return {f"{name}.safetensors": content for name, content in tensors.items()}


def state_bytes(state: Mapping[str, Json]) -> bytes:
    try:
        return (json.dumps(dict(state), sort_keys=True, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise CheckpointError(f"the state cannot be saved as JSON: {error}") from error
