"""A whole denoiser as files that others load: diffusers' folder of a part, and a single file in the release's names.

Tensors are cast and stacked one after the other, on their way to the disk; nothing is in memory twice. What was written
is read back and compared, bit by bit, before it takes the place of what was there.

The folder is that of diffusers' `save_pretrained` (`configuration_utils.py`, `models/modeling_utils.py`): config.json,
and the weights in one file or in several with an index. The single file is one that ComfyUI's
`models/diffusion_models` takes (`comfy/sd.py`, `load_diffusion_model_state_dict`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from burnish.atomic import cannot_write, fsync_folder, remove, replace_folder, temporary_name, write_durably
from burnish.checkpoint.tensor_file import Deferred, write_tensors
from burnish.errors import ExportError, ModelError, NonFiniteLoss
from burnish.family import Family, ModelSource

SHARD = 10 * 10**9  # bytes; diffusers' own limit
WEIGHTS = "diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"

Values = Mapping[str, Tensor]
Stored = Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True, slots=True)
class Written:
    """Files that read back as trained."""

    format: str
    tensors: int
    dtype: str
    gib: float

    def facts(self) -> dict[str, object]:
        """For status files and reports."""
        return asdict(self)


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    values: Values,
    dtype: torch.dtype,
    *,
    shard: int = SHARD,
    weights: str = WEIGHTS,
) -> Written:
    """Write a part of a diffusers model: `folder` is what its class's `from_pretrained` is given.

    Args:
        config: the denoiser's.
        values: its state, by its own names; on any device.
        shard: bytes of a file at the most, unless a tensor is larger.
        weights: what the file of weights is called; transformers' parts say `model`.

    Raises:
        ExportError: it does not read back as written.
        NonFiniteLoss: a weight is NaN or infinite in `dtype` (law L5).
        DiskFull: it does not fit. After any error, what was there before is as it was.
    """
    tensors = {name: deferred((name,), values, dtype) for name in values}
    shards = _shards(tensors, shard, weights)
    with apart(folder, total_bytes(tensors)) as temporary:
        write_durably(temporary / "config.json", _config_file(config))
        for name, inside in shards.items():
            write_file(temporary / name, inside)
        if len(shards) > 1:
            write_durably(temporary / _index_name(weights), _index(shards, tensors).encode())
        compare(folder, _in_folder(temporary, weights), values, dtype)
        replace_folder(temporary, folder)
    return Written("diffusers", len(tensors), told_dtype(dtype), total_bytes(tensors) / 2**30)


def write_single_file(
    path: Path, family: Family, part: str, values: Values, dtype: torch.dtype, metadata: Mapping[str, str]
) -> Written:
    """Write the denoiser `part` in the names of the original release.

    Raises:
        ExportError: the family has no such names, or its own reader does not find what was written.
        NonFiniteLoss, DiskFull: as `write_folder`.
    """
    if family.export.tensors is None:
        raise ExportError(
            f"{family.title} has no names for a single file", remedy="Set save.format: diffusers."
        )
    native = family.export.tensors({name: tuple(one.shape) for name, one in values.items()})
    tensors = {name: deferred(one.holds, values, dtype, one.halves_swapped) for name, one in native.items()}
    with apart(path, total_bytes(tensors)) as temporary:
        written = temporary / path.name
        write_file(written, tensors, {"format": "pt", **metadata})
        compare(path, _of_family(family, part, written), values, dtype)
        os.replace(written, path)
        fsync_folder(path.parent)
    return Written("comfy", len(tensors), told_dtype(dtype), total_bytes(tensors) / 2**30)


@contextmanager
def apart(final: Path, needed: int) -> Iterator[Path]:
    """A folder to write to, beside the place of what is made; gone in the end."""
    temporary = final.parent / temporary_name(final.name)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        temporary.mkdir()
        yield temporary
    except OSError as error:
        remove(temporary)  # before free space is counted, which it takes part of
        raise cannot_write(error, final, needed=needed) from error
    finally:
        remove(temporary)


def deferred(holds: tuple[str, ...], values: Values, dtype: torch.dtype, swapped: bool = False) -> Deferred:
    first = values[holds[0]]
    rows = sum(values[name].shape[0] for name in holds) if first.dim() else 0
    shape = (rows, *first.shape[1:]) if first.dim() else ()
    kept = dtype if first.is_floating_point() else first.dtype
    return Deferred(shape, kept, partial(_made, holds, values, dtype, swapped))


@torch.no_grad()
def _made(holds: tuple[str, ...], values: Values, dtype: torch.dtype, swapped: bool) -> Tensor:
    """A tensor as it stands in the file, on the CPU.

    Raises:
        NonFiniteLoss: a value is NaN or infinite, or would be in `dtype`.
    """
    parts = [_as_written(values[name], dtype) for name in holds]
    for name, part in zip(holds, parts, strict=True):
        if part.is_floating_point() and not part.isfinite().all():
            raise NonFiniteLoss(
                f"{name} is not finite in {dtype}; the model was not written",
                remedy="Go back to an earlier checkpoint and lower train.optimizer.learning_rate; with "
                "save.dtype: float16, values above 65504 need bfloat16 or float32.",
            )
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return torch.cat(whole.chunk(2)[::-1]) if swapped else whole


def _as_written(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On its device and then to the CPU: half of the bytes go over where it is narrowed."""
    tensor = tensor.detach()
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu()


def write_file(
    path: Path, tensors: Mapping[str, Deferred], metadata: Mapping[str, str] | None = None
) -> None:
    with open(path, "xb", buffering=0) as file:
        write_tensors(file.fileno(), tensors, metadata or {"format": "pt"})
        os.fsync(file.fileno())


def _shards(tensors: Mapping[str, Deferred], most: int, weights: str) -> dict[str, dict[str, Deferred]]:
    """The tensors by the file that they go to, in order."""
    filled: list[dict[str, Deferred]] = [{}]
    for name, tensor in tensors.items():
        if filled[-1] and total_bytes(filled[-1]) + tensor.nbytes > most:
            filled.append({})
        filled[-1][name] = tensor
    if len(filled) == 1:
        return {f"{weights}.safetensors": filled[0]}
    count = len(filled)
    return {f"{weights}-{n:05d}-of-{count:05d}.safetensors": one for n, one in enumerate(filled, 1)}


def _config_file(config: Mapping[str, Any]) -> bytes:
    """As `save_pretrained` writes it, without what diffusers notes for itself."""
    told = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    return (json.dumps(told, indent=2, sort_keys=True) + "\n").encode()


def _index(shards: Mapping[str, Mapping[str, Deferred]], tensors: Mapping[str, Deferred]) -> str:
    places = {name: file for file, inside in shards.items() for name in inside}
    return json.dumps({"metadata": {"total_size": total_bytes(tensors)}, "weight_map": places}, indent=2)


def total_bytes(tensors: Mapping[str, Deferred]) -> int:
    return sum(one.nbytes for one in tensors.values())


def told_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _index_name(weights: str) -> str:
    return INDEX.replace(WEIGHTS, weights)


def _in_folder(folder: Path, weights: str) -> Stored:
    """What a diffusers folder holds, by the files that its index, if any, names."""
    index = folder / _index_name(weights)
    files = [f"{weights}.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            found |= {name: partial(_tensor_in, folder / file, name) for name in opened.keys()}  # noqa: SIM118
    return found


def _tensor_in(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _of_family(family: Family, part: str, file: Path) -> Stored:
    """What the family's own reader of single files finds."""
    several = len(family.denoisers) > 1
    try:
        return family.stored(ModelSource(str(file), denoisers=(part,) if several else ()))
    except ModelError as error:
        raise ExportError(f"a single file of {family.title} does not read back: {error.message}") from error


def compare(path: Path, stored: Stored, values: Values, dtype: torch.dtype) -> None:
    """Raises:
    ExportError: what is stored is not what was trained.
    """
    try:
        differing = [
            name for name in values.keys() & stored.keys() if not _same(stored[name](), values[name], dtype)
        ]
    except (SafetensorError, ModelError) as error:
        raise ExportError(f"{path} does not read back: {error}") from error
    wrong = {
        "trained but not in the file": sorted(values.keys() - stored.keys()),
        "in the file but not trained": sorted(stored.keys() - values.keys()),
        "with other values than were trained": sorted(differing),
    }
    for what, names in wrong.items():
        if names:
            raise ExportError(
                f"{path.name} does not read back as trained; {len(names)} tensors {what}, such as {names[0]}",
                remedy="The file was not kept. The checkpoint beside it is not affected.",
            )


def _same(stored: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    wanted = _as_written(value, dtype)
    return stored.dtype == wanted.dtype and torch.equal(stored, wanted)
