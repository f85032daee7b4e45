"""LoRAs of a file as readers compute them, compared with what was trained. Shares nothing with the writer.

Sources: ComfyUI `comfy/weight_adapter/lora.py` (delta = up @ down over flattened matrices, times alpha / rank, or 1
without alpha); diffusers `utils/peft_utils.py`. A module of the original release that stacks several of diffusers' is
taken apart by its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from burnish.adapters.layer import Adaptable, weight_shape
from burnish.adapters.lora import LoraWeights
from burnish.errors import ExportError
from burnish.export.verify_file import LORA_KEY, expect
from burnish.export_keys import AdapterFormat, ExportKeys, NativeModule


@dataclass(frozen=True, slots=True)
class _Read:
    """One module's adapter as a reader understands it: scale * up @ down."""

    down: Tensor
    up: Tensor
    scale: float


def check_loras(
    path: Path,
    tensors: Mapping[str, Tensor],
    trained: Mapping[str, LoraWeights],
    modules: Mapping[str, Adaptable],
    natives: Mapping[str, NativeModule],
    names: Mapping[str, str],
    format: AdapterFormat,
    keys: ExportKeys,
) -> float:
    """The largest relative difference of a module's delta.

    Args:
        natives: the modules that keys are for, by name.
        names: what stands before the endings of keys -> one of these.

    Raises:
        ExportError: a module is missing or too many, does not fit, or has another effect than was trained.
    """
    found = _as_reader(path, tensors, names, folded=format != "kohya")
    if keys.by_release(format):
        _check_filled(path, found, natives, trained, keys)
        found = _taken_apart(path, found, natives, trained, modules)
    expect(path, "trained but not in the file", [name for name in trained if name not in found])
    expect(path, "in the file but not trained", [name for name in found if name not in trained])

    largest = 0.0
    wrong = []
    for name, read in found.items():
        _check_shape(path, name, read, weight_shape(modules[name]))
        difference, allowed, norm = _difference(read, trained[name])
        if not difference <= allowed:
            wrong.append(f"{name} (by {difference / norm if norm else difference:.2g})")
        largest = max(largest, difference / norm if norm else 0.0)
    expect(path, "with another effect than was trained", wrong)
    return largest


def _as_reader(
    path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str], *, folded: bool
) -> dict[str, _Read]:
    """Each module's adapter; `folded` where readers expect a scale of 1 and no alpha."""
    pieces: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = LORA_KEY.fullmatch(key)
        name = names.get(match["module"]) if match else None
        if match is None or name is None or match.lastgroup is None:
            unknown.append(key)
        else:
            pieces.setdefault(name, {})[match.lastgroup] = tensor
    expect(path, "that belong to no module of the model", unknown)
    expect(
        path,
        "without both matrices",
        [name for name, one in pieces.items() if not {"down", "up"} <= set(one)],
    )
    with_alpha = [name for name, one in pieces.items() if "alpha" in one]
    if folded:
        expect(path, "with an alpha key, for which diffusers refuses the file", with_alpha)
    alphas = {one["alpha"].item() for one in pieces.values() if "alpha" in one}
    if with_alpha:
        expect(path, "whose alpha is missing", [name for name in pieces if name not in with_alpha])
    if len(alphas) > 1:
        raise ExportError(f"{path.name} has more than one alpha ({sorted(alphas)}); diffusers mixes them up")
    return {
        name: _Read(
            one["down"],
            one["up"],
            one["alpha"].item() / one["down"].shape[0] if "alpha" in one else 1.0,
        )
        for name, one in pieces.items()
    }


def _taken_apart(
    path: Path,
    stacks: Mapping[str, _Read],
    natives: Mapping[str, NativeModule],
    trained: Mapping[str, LoraWeights],
    modules: Mapping[str, Adaptable],
) -> dict[str, _Read]:
    """The adapters of diffusers' trained modules; whatever is beside them in a stack must be exactly zero."""
    found = {}
    stray = []
    for name, stack in stacks.items():
        up, inner = stack.up, 0
        if natives[name].halves_swapped:
            half = up.shape[0] // 2
            up = torch.cat([up[half:], up[:half]])
        shapes = [weight_shape(modules[part]) for part in natives[name].holds]
        heights = [shape[0] for shape in shapes]
        ranks = [trained[part].rank if part in trained else 0 for part in natives[name].holds]
        total, rank = sum(heights), sum(ranks) or stack.up.shape[1]
        if up.shape[0] != total or tuple(stack.down.shape) != (rank, *shapes[0][1:]):
            raise ExportError(
                f"{path.name}: {name} has matrices {tuple(stack.down.shape)} and {tuple(stack.up.shape)}; "
                f"{(rank, *shapes[0][1:])} and {(total, rank)} were expected"
            )
        for part, rank, rows in zip(natives[name].holds, ranks, torch.split(up, heights), strict=True):
            own = slice(inner, inner + rank)
            if torch.cat([rows[:, :inner], rows[:, inner + rank :]], dim=1).count_nonzero():
                stray.append(part)
            if rank:
                found[part] = _Read(stack.down[own], rows[:, own], stack.scale)
            inner += rank
    expect(path, "affected by what was trained for others, or not at all", stray)
    return found


def _check_filled(
    path: Path,
    stacks: Mapping[str, _Read],
    natives: Mapping[str, NativeModule],
    trained: Mapping[str, LoraWeights],
    keys: ExportKeys,
) -> None:
    """Modules without any trained part are there where a reader needs them, and only there."""
    needed = {
        name
        for name, native in natives.items()
        if any(fnmatchcase(part, pattern) for part in native.holds for pattern in keys.complete)
    }
    empty = {name for name in stacks if not any(part in trained for part in natives[name].holds)}
    expect(path, "needed by readers but not in the file", sorted(needed - set(stacks)))
    expect(path, "in the file but neither trained nor needed", sorted(empty - needed))


def _check_shape(path: Path, name: str, read: _Read, weight: tuple[int, ...]) -> None:
    """(rank, in, *kernel) and (out, rank, 1, ...) for a weight (out, in, *kernel)."""
    rank = read.down.shape[0]
    down, up = (rank, *weight[1:]), (weight[0], rank, *(1 for _ in weight[2:]))
    if (tuple(read.down.shape), tuple(read.up.shape)) != (down, up):
        raise ExportError(
            f"{path.name}: {name} has matrices {tuple(read.down.shape)} and {tuple(read.up.shape)}; "
            f"the model's weight {weight} needs {down} and {up}"
        )


def _difference(read: _Read, trained: LoraWeights) -> tuple[float, float, float]:
    """Norm of (read delta - trained delta), the norm that rounding explains, and that of the trained delta.

    All without the deltas themselves, which are as large as the model: the difference is again a product of
    thin factors, (up' - up) down' + up (down' - down), written so that nothing large cancels. Rounding to a
    type with unit roundoff u moves each factor's entries by up to u, independently, so that the product moves
    by about u * sqrt(2 sum_k |up_k|^2 |down_k|^2); 3 in place of sqrt(2) leaves room, and the delta's own norm
    covers factors whose entries all round alike.
    """
    read_up, read_down = read.scale * read.up.double().flatten(1), read.down.double().flatten(1)
    up, down = trained.scale * trained.up.double().flatten(1), trained.down.double().flatten(1)
    if read_up.shape != up.shape or read_down.shape != down.shape:
        return float("inf"), 0.0, 0.0
    difference = _product_norm(
        torch.cat([read_up - up, up], dim=1), torch.cat([read_down, read_down - down], dim=0)
    )
    norm = _product_norm(up, down)

    info = torch.finfo(read.down.dtype)
    independent = float((up.square().sum(0) * down.square().sum(1)).sum().sqrt())
    rounding = 3 * max(info.eps / 2, 1e-7) * max(independent, norm)
    # Below the smallest normal number the error is absolute: half of the smallest step.
    step = info.smallest_normal * info.eps / 2 * max(1.0, trained.scale, abs(read.scale))
    underflow = step * float(up.numel() ** 0.5 * down.norm() + down.numel() ** 0.5 * up.norm())
    return difference, rounding + underflow, norm


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of left @ right, from the small Gram matrices of both."""
    squared = ((left.T @ left) * (right @ right.T)).sum()
    return float(squared.clamp(min=0).sqrt())
