"""What activation modes, streaming and offload cost and save: time, peak and losses of steps on the same batch.

    python -m tools.benchmarks.memory_modes --family flux --size 1024 --device cuda > memory.json
    python -m tools.benchmarks.memory_modes --model ./models/flux --steps 8

With `--family` the denoiser has the released widths, `--depth` repeats of each block (all without it) and random
weights; with `--model` those of a diffusers folder or a file. `apart` is the largest difference of a loss from that of
the first row, relative; it has to be 0 or as small as the rounding of the number type. `peak_gib` is that of torch's
allocator, on CUDA.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import ModuleChoice
from burnish.adapters.targeting import choose_modules
from burnish.config.method import Lora
from burnish.families.registry import detect_family, family_named
from burnish.family import Family, ModelSource
from burnish.memory.activation_offload import offload_activations
from burnish.memory.activations import Mode, activation_modes, set_activations
from burnish.memory.streaming import stream_weights
from burnish.memory.transfer import transfer_to
from burnish.model import DTYPES
from burnish.placement import DENOISER


@dataclass(frozen=True, slots=True)
class Setting:
    activations: Mode | float
    stream: float = 0.0
    offload: bool = False


SETTINGS = (
    Setting("keep"),
    Setting("keep-matmul"),
    Setting("keep-attention"),
    Setting(0.5),
    Setting("recompute"),
    Setting("keep", stream=0.5),
    Setting("keep", stream=1.0),
    Setting("recompute", stream=1.0),
    Setting("recompute", offload=True),
    Setting("recompute", stream=1.0, offload=True),
)


def random_family(name: str, depth: int | None, dtype: torch.dtype, device: torch.device) -> Family:
    """The denoiser at released widths, the same numbers each time."""
    family = family_named(name).skeleton(depth, dtype=dtype)
    torch.manual_seed(0)
    for denoiser in family.denoisers.values():
        denoiser.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*denoiser.parameters(), *denoiser.buffers()):
                tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    return family


def loaded_family(path: str, dtype: torch.dtype, device: torch.device) -> Family:
    source = ModelSource(path)
    return detect_family(source).load(source, DENOISER, dtype=dtype, device=device)


def measure(
    family: Family, setting: Setting, size: int, steps: int, device: torch.device
) -> dict[str, object]:
    """Steps with a fixed batch; the first is not timed, as rooms and kernels are made in it."""
    parameters = []
    for denoiser in family.denoisers.values():
        choices: dict[str, ModuleChoice] = choose_modules(
            denoiser, family.targets, family.default_targets, Lora(kind="lora")
        )
        parameters += AdapterSet.attach(denoiser, choices, dropout=0.0, seed=0).named_parameters().values()
    blocks, denoisers = family.blocks(), list(family.denoisers.values())
    set_activations(blocks, activation_modes(setting.activations, len(blocks)))
    if setting.stream:
        stream_weights(denoisers, blocks, setting.stream, transfer_to(device), device)
    if setting.offload:
        offload_activations(denoisers, blocks, transfer_to(device))
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    noisy, t_B, conditioning = family.example(size, size, batch=1)
    target, losses, began = torch.ones_like(noisy), [], 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(steps + 1):
        if step == 1:
            settle(device)
            began = time.perf_counter()
        loss = (family.predict(noisy, t_B, conditioning) - target).float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    settle(device)
    return {
        "activations": setting.activations,
        "stream": setting.stream,
        "offload": setting.offload,
        "ms_per_step": round(1e3 * (time.perf_counter() - began) / steps, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
        if device.type == "cuda"
        else None,
        "losses": [float(loss) for loss in losses],
    }


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    make: Callable[[], Family], settings: Sequence[Setting], size: int, steps: int, device: torch.device
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for setting in settings:
        row = measure(make(), setting, size, steps, device)
        first, losses = (rows or [row])[0]["losses"], row["losses"]
        assert isinstance(first, list)
        assert isinstance(losses, list)
        row["apart"] = max(abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--family", help="released widths with random weights")
    which.add_argument("--model", help="a diffusers folder or a file")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--size", type=int, default=1024, help="pixels, each way")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    device, dtype = torch.device(asked.device), DTYPES[asked.precision]

    def make() -> Family:
        if asked.model is None:
            return random_family(asked.family, asked.depth, dtype, device)
        return loaded_family(str(Path(asked.model)), dtype, device)

    rows = compare(make, SETTINGS, asked.size, asked.steps, device)
    json.dump({"torch": torch.__version__, "device": asked.device, "rows": rows}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
