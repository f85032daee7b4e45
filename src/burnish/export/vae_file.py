"""A VAE as a single file in the names of latent diffusion: what ComfyUI's and A1111's folders of VAEs take.

Names after `AutoencoderKL` of CompVis/latent-diffusion (`ldm/modules/diffusionmodules/model.py`), without a prefix, as
released VAEs have them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from burnish.atomic import fsync_folder
from burnish.export.denoiser_file import (
    Stored,
    Values,
    Written,
    apart,
    compare,
    deferred,
    told_dtype,
    total_bytes,
    write_file,
)
from burnish.families.autoencoder import diffusers_names, original_names
from burnish.families.weights import layout_of, read_tensor


def write_vae_file(path: Path, values: Values, dtype: torch.dtype, metadata: Mapping[str, str]) -> Written:
    """Write a VAE's state, by diffusers' names, and read it back.

    Raises:
        ExportError: it does not read back as written.
        NonFiniteLoss: a weight is NaN or infinite in `dtype` (law L5).
        DiskFull: it does not fit. After any error, what was there before is as it was.
    """
    renamed = original_names(values)
    original = {new: _as_kept(new, values[name]) for name, new in renamed.items()}
    tensors = {name: deferred((name,), original, dtype) for name in original}
    with apart(path, total_bytes(tensors)) as temporary:
        written = temporary / path.name
        write_file(written, tensors, {"format": "pt", **metadata})
        compare(path, _stored(written), values, dtype)
        os.replace(written, path)
        fsync_folder(path.parent)
    return Written("comfy", len(tensors), told_dtype(dtype), total_bytes(tensors) / 2**30)


def _as_kept(name: str, tensor: Tensor) -> Tensor:
    """Projections of attention are convolutions of 1 x 1 in the original."""
    is_projection = ".attn_1." in name and tensor.dim() == 2
    return tensor[:, :, None, None] if is_projection else tensor


def _stored(path: Path) -> Stored:
    """What our own reader of VAEs finds.

    Raises:
        ModelError: the file is damaged.
    """
    return {name: partial(read_tensor, piece) for name, piece in diffusers_names(layout_of([path])).items()}
