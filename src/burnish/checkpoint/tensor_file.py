"""Tensors to and from a safetensors file.

The writer is our own because it streams: one tensor in host memory at a time, hashed while it is written, and
every failure is an OSError with its number. safetensors' own `save_file` reports a full disk as text, and
`save` holds the whole file in memory. The layout is that of
https://github.com/huggingface/safetensors#format, and reading is left to the library.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from burnish.atomic import write_all
from burnish.errors import CheckpointError

_CHUNK = 16 * 2**20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Deferred:
    """A tensor that is made when its turn to be written comes, and let go after it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def element_size(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Writable = Tensor | Deferred


def write_tensors(
    descriptor: int, tensors: Mapping[str, Writable], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a whole safetensors file to an open, empty file; the caller flushes it to the disk.

    Returns:
        The sha256 of the bytes as they were handed to the system.

    Raises:
        OSError: as the system says.
        CheckpointError: a name or a dtype that the format cannot hold.
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors files are little-endian; this machine is not")
    digest = hashlib.sha256()
    header = _header(tensors, metadata)
    digest.update(header)
    write_all(descriptor, memoryview(header))
    for name in _in_file_order(tensors):
        tensor = tensors[name]
        _write_tensor(descriptor, tensor.make() if isinstance(tensor, Deferred) else tensor, digest)
    return digest.hexdigest()


def file_size(tensors: Mapping[str, Writable], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes that `write_tensors` will write."""
    return len(_header(tensors, metadata)) + sum(tensor.nbytes for tensor in tensors.values())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is missing or is no whole safetensors file.
    """
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _in_file_order(tensors: Mapping[str, Writable]) -> list[str]:
    # Wide numbers first keeps each tensor aligned to its own item size, as the library's writer does.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Writable], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in _in_file_order(tensors):
        tensor = tensors[name]
        if name == "__metadata__" or tensor.dtype not in _DTYPES:
            raise CheckpointError(f"safetensors cannot hold {name!r} ({tensor.dtype})")
        end = start + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(descriptor: int, tensor: Tensor, digest: hashlib._Hash) -> None:
    if tensor.numel() == 0:
        return
    # A single number may have any stride and be contiguous; to be seen as bytes it must have one of 1.
    dense = tensor.detach().to("cpu").contiguous()
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    data = flat.numpy().data
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        digest.update(chunk)
        write_all(descriptor, chunk)
