"""8-bit weights with scales beside them, as ComfyUI keeps them (`fp8_scaled` files; QUANTIZATION.md of ComfyUI).

A module's `weight` is float8, `weight_scale` (in older files `scale_weight`) what it is to be multiplied with: one
number, one per row, or one per block of rows and columns. What else is beside them serves ComfyUI's own products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from burnish.families.tensor_info import TensorInfo

_SCALES = ("weight_scale", "scale_weight")
_BESIDE = ("input_scale", "scale_input", "comfy_quant")
_MARK = "scaled_fp8"  # of a whole file
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
_NUMBERS = ("F32", "F16", "BF16")


def scales_in(header: Mapping[str, TensorInfo]) -> dict[str, str | None]:
    """The tensors of a file that are weights, each with the name of its scale where it has one that is understood.

    Scales of other kinds stay among the weights, where no module has a place for them.
    """
    scales: dict[str, str | None] = dict.fromkeys(header)
    for name, info in header.items():
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        if kind in _SCALES and weight in header and _fits(header[weight], info):
            scales[weight] = name
    scaled = {weight.removesuffix("weight") for weight, scale in scales.items() if scale is not None}
    understood = {module + kind for module in scaled for kind in (*_SCALES, *_BESIDE)}
    understood |= {name for name in header if scaled and name.rpartition(".")[2] == _MARK}
    return {name: scale for name, scale in scales.items() if name not in understood}


def _fits(weight: TensorInfo, scale: TensorInfo) -> bool:
    if weight.dtype not in _EIGHT_BITS or scale.dtype not in _NUMBERS or len(weight.shape) != 2:
        return False
    if scale.shape in ((), (1,), (1, 1), weight.shape[:1]):
        return True
    return len(scale.shape) == 2 and not any(
        whole % parts for whole, parts in zip(weight.shape, scale.shape, strict=True)
    )


def spread(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale for each number of a weight of this shape, float32; without copies where one serves a whole row."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape)
    if scale.dim() == 1 or scale.shape[1] == 1:
        rows = scale.reshape(-1, 1).repeat_interleave(shape[0] // len(scale), 0)
        return rows.expand(shape)
    return scale.repeat_interleave(shape[0] // scale.shape[0], 0).repeat_interleave(
        shape[1] // scale.shape[1], 1
    )


def of_rows(scales: Tensor) -> Tensor | None:
    """(N, 1) of scales (N, K) that are the same along each row; None where they are not."""
    first = scales[:, :1]
    same = scales.stride(1) == 0 or scales.shape[1] == 1
    return first.contiguous() if same else None


def moved(scales: Tensor, device: torch.device | str) -> Tensor:
    """Scales (N, K) on a device, still without copies where one serves a whole row."""
    rows = of_rows(scales)
    return scales.to(device) if rows is None else rows.to(device).expand(scales.shape)


def widened(weight: Tensor, scales: Tensor) -> Tensor:
    """The weight in float32."""
    return weight.to(torch.float32) * scales
