"""Safetensors files read and written tensor by tensor.

A tensor is read with plain reads into memory of its own, not mapped: mapped pages stay in the process while the file
is open and count as its memory, so that a large file would seem to be held as a whole. The format is that of
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from burnish.atomic import cannot_write, fsync_folder, remove, temporary_name, write_all
from burnish.errors import AdapterError, UserError
from burnish.families.sources import read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 16 * 2**20
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would change line ends
HASH = "sshs_model_hash"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class TensorFile:
    """A safetensors file, open for reading; a context manager.

    Raises:
        ModelError: the file is missing, cut off, a pickle, or anything else than a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        read_header(path)  # which checks every name, type and span
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed with this object
        length = int.from_bytes(self._file.read(8), "little")
        entries = json.loads(bytes(filled(self._file, 8, length).numpy()))
        told = entries.pop("__metadata__", None) or {}
        self.metadata: dict[str, str] = {str(key): str(value) for key, value in told.items()}
        unknown = [name for name, entry in entries.items() if entry["dtype"] not in DTYPES]
        if unknown:
            kind = entries[unknown[0]]["dtype"]
            self.close()
            raise AdapterError(
                f"{path}: {unknown[0]} holds numbers of type {kind}, which PyTorch does not have",
                remedy="Use the bfloat16 or float16 file of the same model.",
            )
        self.tensors = {name: _stored(entry, 8 + length) for name, entry in _by_place(entries)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        stored = self.tensors[name]
        return self._read(stored, stored.begin, stored.shape)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some rows of a tensor; the others are not read."""
        stored = self.tensors[name]
        row = stored.nbytes // max(stored.shape[0], 1)
        return self._read(stored, stored.begin + begin * row, (end - begin, *stored.shape[1:]))

    def _read(self, stored: Stored, begin: int, shape: tuple[int, ...]) -> Tensor:
        raw = filled(self._file, begin, prod(shape) * stored.dtype.itemsize)
        return raw.view(stored.dtype).reshape(shape)


def filled(file: FileIO, begin: int, count: int) -> Tensor:
    """So many bytes from there on, uint8.

    Raises:
        UserError: the file has become shorter.
    """
    raw = torch.empty(count, dtype=torch.uint8)
    view = raw.numpy().data
    file.seek(begin)
    while len(view):
        read = file.readinto(view[:_CHUNK])
        if not read:
            raise UserError(f"{file.name} became shorter while it was read")
        view = view[read:]
    return raw


def _by_place(entries: dict[str, dict[str, object]]) -> list[tuple[str, dict[str, object]]]:
    return sorted(entries.items(), key=lambda item: item[1]["data_offsets"])  # type: ignore[arg-type, return-value]


def _stored(entry: Mapping[str, object], start: int) -> Stored:
    shape, offsets = entry["shape"], entry["data_offsets"]
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    return Stored(DTYPES[str(entry["dtype"])], tuple(shape), start + offsets[0], start + offsets[1])


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def refuse_existing(path: Path, *, force: bool) -> None:
    """Before any work is done.

    Raises:
        UserError: there is something at `path` and it may not be replaced, or it is no name for such a file.
    """
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path} does not end in .safetensors", remedy="Only that format is written.")
    if path.is_dir():
        raise UserError(f"{path} is a folder", remedy="Name a file.")
    if path.exists() and not force:
        raise UserError(f"{path} exists already", remedy="Name another file, or add --force to replace it.")


def write_stream(
    path: Path, plan: Sequence[Planned], metadata: Mapping[str, str], make: Callable[[str], Tensor]
) -> None:
    """Write a file of which one tensor at a time is in memory; whole or not at all, durably.

    Where `metadata` has an `sshs_model_hash` it becomes the SHA-256 of what was written behind the header, as
    `file_hashes` of the export has it.

    Args:
        make: name -> the tensor, of the type and shape that were planned.

    Raises:
        DiskFull: as for any file.
        UserError: a tensor came out of another shape than planned, or holds NaN or infinity.
    """
    # Wide numbers first keep each tensor aligned to its own item size; else the order is the plan's.
    ordered = sorted(plan, key=lambda one: -one.dtype.itemsize)
    told = dict(metadata) | ({HASH: "0" * 64} if HASH in metadata else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path, sum(one.nbytes for one in ordered)) as descriptor:
        write_all(descriptor, memoryview(_header(ordered, told)))
        digest = hashlib.sha256()
        for one in ordered:
            _write(descriptor, _checked(path, one, make(one.name)), digest)
        if HASH in told:
            os.lseek(descriptor, 0, os.SEEK_SET)
            write_all(descriptor, memoryview(_header(ordered, told | {HASH: digest.hexdigest()})))


@contextmanager
def _replacing(path: Path, needed: int) -> Iterator[int]:
    """A descriptor of a new file that takes the place of `path` when the block ends well."""
    temporary = path.parent / temporary_name(path.name[:80])
    try:
        descriptor = os.open(
            temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666
        )
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise cannot_write(error, path, needed=needed) from error
    finally:
        remove(temporary)


def _header(plan: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for one in plan:
        end = start + one.nbytes
        entries[one.name] = {
            "dtype": _SPELLED[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checked(path: Path, planned: Planned, tensor: Tensor) -> Tensor:
    if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
        raise UserError(
            f"{path} was not written: {planned.name} came out as {tuple(tensor.shape)} of {tensor.dtype}, "
            f"not {planned.shape} of {planned.dtype}"
        )
    if tensor.is_floating_point() and not finite(tensor):
        raise UserError(
            f"{path} was not written: {planned.name} is not finite in {tensor.dtype}",
            remedy="With float16, values above 65504 need --dtype bfloat16 or float32.",
        )
    return tensor


def finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; float8 has no such question of its own."""
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(wide.isfinite().all())


def _write(descriptor: int, tensor: Tensor, digest: hashlib._Hash) -> None:
    if not tensor.numel():
        return
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        digest.update(chunk)
        write_all(descriptor, chunk)


class Spool:
    """Tensors whose number and shapes are known only when all are made: kept beside the target until then.

    A context manager; what was not written is thrown away.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self._path = target.parent / temporary_name(f"spool-{target.name[:80]}")
        self._file = open(self._path, "w+b", buffering=0)  # noqa: SIM115  as above
        self._places: dict[str, tuple[Planned, int]] = {}
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        remove(self._path)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor.

        Raises:
            AdapterError: there is one of this name.
        """
        if name in self._places:
            raise AdapterError(f"two modules would be written under the same name, {name}")
        planned = Planned(name, tensor.dtype, tuple(tensor.shape))
        _checked(self.target, planned, tensor)
        self._places[name] = (planned, self._end)
        try:
            _write(self._file.fileno(), tensor, hashlib.sha256())
        except OSError as error:
            raise cannot_write(error, self.target, needed=tensor.nbytes) from error
        self._end += planned.nbytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the target."""

        def again(name: str) -> Tensor:
            planned, begin = self._places[name]
            raw = filled(self._file, begin, planned.nbytes)
            return raw.view(planned.dtype).reshape(planned.shape)

        plan = sorted((planned for planned, _ in self._places.values()), key=lambda one: one.name)
        write_stream(self.target, plan, metadata, again)
