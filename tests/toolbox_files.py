"""Adapter files of random numbers, in the spellings of several programs, for the layers of a tiny denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def matrices(shapes: Shapes, rank: int = 3, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Down (rank, in, *kernel) and up (out, rank, 1, ...) of each weight, whose product has about its own scale."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (out, *rest) in shapes.items():
        down = torch.randn(rank, *rest, generator=generator) * 0.3
        up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator) * 0.3
        found[name] = (down, up)
    return found


def product(down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """The change, in the shape of the weight."""
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def kohya(
    found: Mapping[str, tuple[Tensor, Tensor]], alpha: float, prefix: str = "lora_unet_"
) -> dict[str, Tensor]:
    """sd-scripts: names with underscores, and alpha."""
    tensors = {}
    for name, (down, up) in found.items():
        stem = prefix + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(found: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    """peft: names with dots, the strength in the matrices."""
    tensors = {}
    for name, (down, up) in found.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    return tensors


def saved(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({key: one.contiguous() for key, one in tensors.items()}, path, dict(metadata or {}))
    return path


def chosen(shapes: Shapes, wanted: Callable[[str], bool] | Iterable[str]) -> dict[str, tuple[int, ...]]:
    names = [name for name in shapes if wanted(name)] if callable(wanted) else list(wanted)
    return {name: shapes[name] for name in names}
