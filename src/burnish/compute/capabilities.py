"""What a GPU computes in, by compute capability, where its memory is, and what follows for a run.

torch is imported only where a function asks a device, so that the command line can name features without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from burnish import hardware

if TYPE_CHECKING:
    import torch

Capability = tuple[int, int]

# First compute capability with it: CUDA C++ Programming Guide, appendix on compute capabilities; torch's own checks for
# the attention kernels and row-wise fp8 products.
_SINCE: tuple[tuple[str, Capability], ...] = (
    ("fp16", (7, 0)),
    ("bf16", (8, 0)),
    ("TF32", (8, 0)),
    ("8-bit integer products", (8, 0)),
    ("flash attention", (8, 0)),
    ("cuDNN attention", (8, 0)),
    ("fp8 products", (8, 9)),
)
_FLASH_3: Capability = (9, 0)  # Hopper's own instructions: not what came before, not what came after


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A value for an option of the config, `section.name`, and why."""

    option: str
    value: str
    reason: str


def features(capability: Capability) -> tuple[str, ...]:
    """In words, what GPUs of this compute capability have."""
    found = [name for name, since in _SINCE if capability >= since]
    return (*found, *(["FlashAttention 3"] if capability == _FLASH_3 else []))


def recommendations(gpu: hardware.Gpu, *, has_triton: bool | None = None) -> list[Recommendation]:
    """Settings for runs on this GPU that do not depend on the model; none where its capability is not known."""
    if gpu.capability is None:
        return []
    known = features(gpu.capability)
    found = [
        Recommendation("train.precision", "bf16", "no loss scale")
        if "bf16" in known
        else Recommendation("train.precision", "fp16", "it has no bf16")
    ]
    if "fp8 products" in known:
        found.append(Recommendation("memory.weights", "fp8", "half the memory of bf16, products in fp8"))
    elif "8-bit integer products" in known:
        found.append(Recommendation("memory.weights", "int8", "half the memory of bf16, products in int8"))
    if "fp16" in known and (_has_triton() if has_triton is None else has_triton):
        found.append(Recommendation("memory.compile", "true", "faster steps after minutes of compiling"))
    if "flash attention" in known:
        found.append(
            Recommendation("memory.attention", "auto", "takes the fastest kernel at the run's shapes")
        )
    return found


def notes(gpu: hardware.Gpu) -> list[str]:
    """What is particular about where this GPU's memory is."""
    if gpu.is_unified:
        return [
            f"{gpu.name} shares the system's memory: moving weights or activations to the host frees nothing, so leave "
            "streaming and offloading off; close what else uses memory"
        ]
    if gpu.is_coherent:
        return [f"{gpu.name} reads the host's memory at full speed: nothing has to be pinned to be moved"]
    return []


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_tensor_cores(device: torch.device, precision: str) -> bool:
    """Have what is left in float32 of a bf16 or fp16 run computed in TF32 where there is TF32; true if so.

    A run in fp32 was asked to be exact and stays so.
    """
    if device.type != "cuda" or precision == "fp32":
        return False
    import torch

    if "TF32" not in features(torch.cuda.get_device_capability(device)):
        return False
    torch.set_float32_matmul_precision("high")
    return True


def table(gpus: Sequence[hardware.Gpu]) -> list[tuple[str, str]]:
    """Rows for `burnish doctor`: what each GPU has and what is recommended for it."""
    rows = []
    for gpu in gpus:
        if gpu.capability is None:
            continue
        major, minor = gpu.capability
        rows.append(
            (
                f"GPU {gpu.index} has",
                f"compute capability {major}.{minor}: {', '.join(features(gpu.capability))}",
            )
        )
        rows += [
            (f"GPU {gpu.index} wants" if not number else "", f"{one.option}: {one.value} ({one.reason})")
            for number, one in enumerate(recommendations(gpu))
        ]
    return rows
