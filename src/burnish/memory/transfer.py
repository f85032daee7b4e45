"""Copies between host and device beside the computation: a stream of their own, events, no wait of the host.

Nothing here knows what is copied. Rooms are bytes; a tensor of any type is a view into one.
"""

from __future__ import annotations

import logging
import mmap
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
ALIGNMENT = 512  # bytes; what the device's own allocator gives, and kernels may count on


class Transfer(Protocol):
    """Both ends of a copy, and the copy."""

    def host_room(self, size: int) -> Tensor:
        """`size` bytes on the host that the device can reach, uint8."""
        ...

    def device_room(self, size: int) -> Tensor:
        """`size` bytes on the device, uint8."""
        ...

    def start(self, target: Tensor, source: Tensor) -> object:
        """Copy once all that was asked of the device before is done; what is returned is given to `finish`."""
        ...

    def finish(self, begun: object) -> None:
        """All that is asked of the device from here on sees the copy."""
        ...


def transfer_to(device: torch.device) -> Transfer:
    return CudaTransfer(device) if device.type == "cuda" else PlainTransfer(device)


def waited_for(device: torch.device) -> None:
    """Wait until all that was asked of a device is done, copies that were finished among it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@dataclass(frozen=True, slots=True)
class PlainTransfer:
    """For devices without streams: a copy is done when it is asked for."""

    device: torch.device

    def host_room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def device_room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def start(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def finish(self, begun: object) -> None:
        return


class CudaTransfer:
    """A stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_room(self, size: int) -> Tensor:
        return pinned(size)

    def device_room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done.record(self._stream)
        return done

    def finish(self, begun: object) -> None:
        assert isinstance(begun, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(begun)


class _LockedPages(mmap.mmap):
    """Memory that the driver has locked, until the last tensor in it is gone."""

    address: int = 0

    def __del__(self) -> None:
        if self.address and not sys.is_finalizing():
            _runtime().cudaHostUnregister(self.address)


def pinned(size: int) -> Tensor:
    """`size` bytes of page-locked memory, no more: torch's own allocator rounds up to a power of two.

    Where the driver refuses (WSL and containers limit what may be locked) the memory is plain: copies then wait for
    the host, which is slow but right.
    """
    pages = _LockedPages(-1, max(size, 1))
    room = torch.frombuffer(pages, dtype=torch.uint8)[:size]
    status = _runtime().cudaHostRegister(room.data_ptr(), max(size, 1), 0)
    if int(status) == 0:
        pages.address = room.data_ptr()
    else:
        _log.warning("the driver does not lock %d MiB of host memory (error %d)", size >> 20, int(status))
        _forget_error()
    return room


def _forget_error() -> None:
    """CUDA tells the next kernel's launch of an error that was answered for already: torch would raise it there, and
    forgets it as it does."""
    with suppress(RuntimeError):
        torch.ones((), device="cuda")


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def view_in(room: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of the shape, type and order of `like` in the bytes of `room` from `offset`, a multiple of 512."""
    size = like.numel() * like.element_size()
    return room[offset : offset + size].view(like.dtype).as_strided(like.shape, like.stride())


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def dense(tensor: Tensor) -> Tensor:
    """The same without weights (meta device), in an order that leaves no gaps: its own where that has none."""
    return torch.empty_like(tensor, device="meta")


def is_dense(tensor: Tensor) -> bool:
    """Whether its numbers fill their memory, each place once, in whatever order."""
    step = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1:
            if stride != step:
                return False
            step *= length
    return True
