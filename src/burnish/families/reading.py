"""Tensors out of weight files, several at a time.

A tensor is a view of the mapped file until it is copied to where it belongs; what waits for the disk, and the copies,
are shared out over threads. Where the package fastsafetensors is installed and a whole file goes to a GPU with room for
it twice, that package reads the file instead, with many requests at once and without the page cache.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from burnish.errors import ModelError
from burnish.families.gguf_files import is_gguf, open_gguf
from burnish.families.scales import spread
from burnish.hardware import free_bytes, usable_processors

_log = logging.getLogger(__name__)
Made = TypeVar("Made")

MOST_THREADS = 8
# Numbers in all that is read below which threads take longer to start than to help.
WORTH_THREADS = 1 << 24
# Bytes of a file that must be wanted for it to be read whole.
MOSTLY = 0.9


@dataclass(frozen=True, slots=True)
class Piece:
    """A module's tensor inside a file: `rows` of tensor `name`, transposed if so, in `shape`.

    `scale` names the tensor that an 8-bit one is to be multiplied with (`scales.py`).
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False
    scale: str | None = None

    def third(self, index: int) -> Piece:
        """Query, key or value (0, 1, 2) of a tensor that stacks the three."""
        size = self.shape[0] // 3
        return replace(self, rows=(index * size, (index + 1) * size), shape=(size, *self.shape[1:]))

    def turned(self) -> Piece:
        return replace(self, transposed=True, shape=self.shape[::-1])

    def as_linear(self) -> Piece:
        """A 1x1 convolution as the linear layer it is."""
        return replace(self, shape=self.shape[:2])

    def cut_from(self, stored: Tensor) -> Tensor:
        """Its rows of the whole tensor, a view."""
        return stored if self.rows is None else stored[slice(*self.rows)]

    def turned_from(self, rows: Tensor) -> Tensor:
        """What the module wants, of what was cut out."""
        return (rows.T.contiguous() if self.transposed else rows).reshape(self.shape)


class Stored(Protocol):
    """An open file."""

    def get_tensor(self, name: str) -> Tensor: ...


# Name, the tensor as it is stored, and what its numbers are to be multiplied with, if anything. On the CPU the tensor
# is the file itself, to be copied; on another device it is nobody else's.
Work = Callable[[str, Tensor, Tensor | None], Made]


def read_each(
    layout: dict[str, Piece],
    names: Iterable[str],
    device: torch.device,
    work: Work[Made],
    *,
    on_host: Callable[[str], bool] = lambda name: False,
    whole: bool = False,
) -> dict[str, Made]:
    """What `work` makes of each tensor, by name. Each file is opened once; `work` must not mind who else is at work.

    Args:
        device: where `work` is given tensors, but those of which `on_host` says that they stay on the host.
        whole: a file may be on the device as a whole while it is read.

    Raises:
        ModelError: a file cannot be read.
    """
    by_file: dict[Path, list[str]] = {}
    for name in sorted(names):
        by_file.setdefault(layout[name].file, []).append(name)
    made: dict[str, Made] = {}
    for file, inside in by_file.items():
        wanted = [layout[name] for name in inside]

        def one(name: str, stored: Stored) -> Made:
            tensor, scales = _read(stored, layout[name], "cpu" if on_host(name) else device)
            return work(name, tensor, scales)

        try:
            with _opened(file, device, wanted, whole=whole) as stored:
                made.update(_shared_out(one, inside, stored, sum(prod(piece.shape) for piece in wanted)))
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read: {error}.", remedy="Fetch the file again.") from error
    return made


def _shared_out(
    one: Callable[[str, Stored], Made], names: list[str], stored: Stored, numbers: int
) -> dict[str, Made]:
    threads = min(MOST_THREADS, usable_processors(), len(names))
    if threads < 2 or numbers < WORTH_THREADS:
        return {name: one(name, stored) for name in names}
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        begun = [pool.submit(one, name, stored) for name in names]
        try:
            return {name: future.result() for name, future in zip(names, begun, strict=True)}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read(stored: Stored, piece: Piece, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    tensor = stored.get_tensor(piece.name)
    scales = None
    if piece.scale is not None:
        # Sent as it is stored, and spread there: scales of rows take no memory then.
        scales = spread(stored.get_tensor(piece.scale).to(device), tuple(tensor.shape))
        scales = piece.turned_from(piece.cut_from(scales))
    return piece.turned_from(piece.cut_from(tensor).to(device)), scales


def fetched(tensor: Tensor) -> None:
    """Wait for a mapped tensor to be in memory, a byte of each page; others may work meanwhile."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        tensor.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


@contextmanager
def _opened(file: Path, device: torch.device, pieces: Collection[Piece], *, whole: bool) -> Iterator[Stored]:
    with ExitStack() as scope:
        if is_gguf(file):
            yield open_gguf(file)
            return
        if whole and device.type == "cuda" and has_fastsafetensors() and _fills(file, pieces, device):
            try:
                stored = scope.enter_context(opened_whole(file, device))
            except Exception as error:  # noqa: BLE001  it raises no class of its own, and the file can still be mapped
                _log.warning("fastsafetensors does not read %s, which is mapped instead: %s", file, error)
            else:
                yield stored
                return
        yield scope.enter_context(safe_open(file, framework="pt", device="cpu"))


@cache
def has_fastsafetensors() -> bool:
    """Whether the package is there, in a version whose names are known."""
    try:
        major, minor = version("fastsafetensors").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (0, 5)


def _fills(file: Path, pieces: Collection[Piece], device: torch.device) -> bool:
    """Whether most of a file is wanted, and there is room for it beside what is made of it."""
    size = file.stat().st_size
    with safe_open(file, framework="pt", device="cpu") as stored:
        told = {name: stored.get_tensor(name).nbytes for name in {piece.name for piece in pieces}}
    return sum(told.values()) >= MOSTLY * size and free_bytes(device) > 2.2 * size


@contextmanager
def opened_whole(file: Path, device: torch.device) -> Iterator[Stored]:
    """A file read onto a device by the package fastsafetensors (github.com/foundation-model-stack/fastsafetensors)."""
    from fastsafetensors import SafeTensorsFileLoader

    # It takes no GPU without a number.
    numbered = device
    if device.type == "cuda" and device.index is None:
        numbered = torch.device("cuda", torch.cuda.current_device())
    # Without GPU Direct Storage, which needs a driver of its own; its absence would be a warning per file.
    loader = SafeTensorsFileLoader(None, str(numbered), nogds=True, set_numa=False)
    try:
        loader.add_filenames({0: [str(file)]})
        buffers = loader.copy_files_to_device()
        try:
            yield _Whole(buffers)
        finally:
            buffers.close()
    finally:
        loader.close()


@dataclass(frozen=True, slots=True)
class _Whole:
    buffers: Any

    def get_tensor(self, name: str) -> Tensor:
        """A copy: what is in the buffer would keep all of it."""
        tensor: Tensor = self.buffers.get_tensor(name)
        return tensor.clone()
