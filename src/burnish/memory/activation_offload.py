"""What blocks save for backward waits on the host, and comes back block by block before it is needed.

For clips: a video model's inputs of its blocks alone, all that `recompute` keeps, are larger than many cards.
In forward the copies run beside what follows; in backward the tensors of the block before the current one come while
that one computes. A tensor that is saved several times is copied once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from burnish.memory.block_forward import BlockForward, change_forward
from burnish.memory.transfer import Transfer, is_dense, padded

SMALLEST = 1 << 20  # bytes; a block's many small tensors would cost more calls than they free memory
LEAVING = (
    1 << 30
)  # bytes that may be on their way to the host and so still on the device; one tensor may in any case


class Offloaded:
    """Numbers on the host, in a row. Only autograd holds it, by way of `Saved`, until backward is through with it."""

    def __init__(self, numbers: Tensor, transfer: Transfer, rooms: HostRooms) -> None:
        self.size = numbers.numel() * numbers.element_size()
        self._transfer, self._rooms = transfer, rooms
        self._room = rooms.take(self.size)
        self._host = self._room[: self.size].view(numbers.dtype)
        self._here: Tensor | None = numbers
        self._going = transfer.start(self._host, numbers)
        self._coming: object | None = None

    def leave(self) -> None:
        """Its memory on the device may be used for what is asked from here on."""
        self._transfer.finish(self._going)
        self._here = None

    def come(self) -> None:
        """Begin the copy back; one that has not left is there."""
        if self._here is None:
            self._here = self._transfer.device_room(self.size).view(self._host.dtype)
            self._coming = self._transfer.start(self._here, self._host)

    def here(self) -> Tensor:
        self.come()
        self._arrive()
        assert self._here is not None
        return self._here

    def _arrive(self) -> None:
        if self._coming is not None:
            self._transfer.finish(self._coming)
            self._coming = None

    def __del__(self) -> None:
        # A copy back that nobody waited for: its target is about to be somebody else's. One to the host may still be
        # under way, into a room that nobody reads and that the same stream writes next.
        self._arrive()
        self._rooms.give(self._room)


@dataclass(slots=True)
class HostRooms:
    """Pinned memory to be used again: to lock pages takes longer than to copy them."""

    transfer: Transfer
    free: dict[int, list[Tensor]] = field(default_factory=dict)  # by size
    bytes: int = 0  # of all that were ever made

    def take(self, size: int) -> Tensor:
        size = padded(size)
        if self.free.get(size):
            return self.free[size].pop()
        self.bytes += size
        return self.transfer.host_room(size)

    def give(self, room: Tensor) -> None:
        self.free.setdefault(room.numel(), []).append(room)


@dataclass(frozen=True, slots=True)
class Saved:
    """One of the times that a tensor was saved."""

    offload: ActivationOffload
    stretch: int
    numbers: Offloaded
    shape: torch.Size
    stride: tuple[int, ...]  # exactly: what is computed again chooses its ways by it

    def unpack(self) -> Tensor:
        self.offload.back_at(self.stretch)
        return self.numbers.here().as_strided(self.shape, self.stride)


class ActivationOffload:
    """One for all blocks of a model; a stretch is what one block saved in one forward."""

    def __init__(self, transfer: Transfer, stay: Iterable[Tensor], smallest: int, leaving: int) -> None:
        self.rooms = HostRooms(transfer)
        self._transfer = transfer
        self._stay = {tensor.untyped_storage()._cdata for tensor in stay}
        self._smallest, self._most_leaving = smallest, leaving
        self._leaving: list[ref[Offloaded]] = []  # weak: a step that fails lets go of all of it
        self._stretches: list[tuple[int, list[ref[Offloaded]]]] = []  # number of the block, and what it saved
        self._back_at: int | None = None  # None in forward
        # The weak reference to its memory keeps another tensor from being found under the same key.
        self._known: dict[tuple[object, ...], tuple[ref[Offloaded], StorageWeakRef]] = {}

    def pack(self, block: int, tensor: Tensor) -> Saved | None:
        if tensor.numel() * tensor.element_size() < self._smallest:
            return None
        if not is_dense(tensor) or tensor.untyped_storage()._cdata in self._stay:
            return None
        if self._back_at is not None:
            self._begin()
        if not self._stretches or self._stretches[-1][0] != block:
            self._stretches.append((block, []))
        numbers = self._offloaded(tensor)
        self._stretches[-1][1].append(ref(numbers))
        return Saved(self, len(self._stretches) - 1, numbers, tensor.shape, tensor.stride())

    def back_at(self, stretch: int) -> None:
        """Backward has come to this stretch: what it saved is needed now, what the one before it saved is next."""
        if stretch == self._back_at:
            return
        self._back_at = stretch
        self._leaving.clear()  # what has not left is needed first
        for _, saved in reversed(self._stretches[max(stretch - 1, 0) : stretch + 1]):
            for offloaded in [one() for one in reversed(saved)]:
                if offloaded is not None:
                    offloaded.come()

    def _begin(self) -> None:
        """The first tensor of another forward."""
        self._back_at = None
        self._stretches.clear()
        self._known.clear()

    def _offloaded(self, tensor: Tensor) -> Offloaded:
        """A layer saves its input as a matrix, its neighbour saves it as it is: the same numbers in a row."""
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor._version)
        known = self._known[key][0]() if key in self._known else None
        if known is not None:
            return known
        numbers = tensor.detach().as_strided((tensor.numel(),), (1,))
        offloaded = Offloaded(numbers, self._transfer, self.rooms)
        self._known[key] = ref(offloaded), StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._leaving.append(ref(offloaded))
        self._let_leave()
        return offloaded

    def _let_leave(self) -> None:
        leaving = [one for one in (found() for found in self._leaving) if one is not None]
        size = sum(one.size for one in leaving)
        while len(leaving) > 1 and size > self._most_leaving:
            size -= leaving[0].size
            leaving.pop(0).leave()
        self._leaving = [ref(one) for one in leaving]


@dataclass(frozen=True, slots=True)
class OfBlock:
    """Packs for one block."""

    offload: ActivationOffload
    block: int

    def pack(self, tensor: Tensor) -> Saved | None:
        return self.offload.pack(self.block, tensor)


def offload_activations(
    denoisers: Iterable[nn.Module],
    blocks: Sequence[nn.Module],
    transfer: Transfer,
    *,
    smallest: int = SMALLEST,
    leaving: int = LEAVING,
) -> ActivationOffload:
    """Keep what `blocks` save for backward on the host; the denoisers' own tensors stay where they are.

    Called again, in place of before.

    Args:
        denoisers: on the device they compute on, but for what is streamed.
        transfer: not the one of `stream_weights`, whose copies go the other way meanwhile.
        smallest: bytes of a tensor that is worth a copy.
        leaving: bytes that may be on their way to the host, and so still on the device; one tensor may in any case.
    """
    stay = [one for denoiser in denoisers for one in (*denoiser.parameters(), *denoiser.buffers())]
    offload = ActivationOffload(transfer, stay, smallest, leaving)
    for number, block in enumerate(blocks):
        change_forward(block, partial(_offload, OfBlock(offload, number)))
    return offload


def _offload(keeper: OfBlock, forward: BlockForward) -> None:
    others = (one for one in forward.keepers if not isinstance(one, OfBlock))
    forward.keepers = (*others, keeper)
