"""Frozen weights of blocks that stay in host memory and come to the device when their block is about to run.

They never change, so nothing travels back: each block has its place in pinned host memory, and the device has a small
ring of rooms, each as large as the largest block. While a block computes, the next ones arrive on a stream of their own
(https://arxiv.org/abs/2101.06840 streams in both directions, as it also trains what it streams).

Backward needs the weights again. What a block's operations save of them is packed as a place in the block, not as
memory of a room, and asks for the block when it is unpacked. Which block is needed after which is learned on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from burnish.memory.block_forward import BlockForward, change_forward
from burnish.memory.transfer import Transfer, dense, padded, view_in

ROOMS = 3  # one computes, one arrives, one is for blocks that take longer to come than to compute

Moment = tuple[int, bool]  # number of a block, and whether in backward


@dataclass(slots=True)
class HostBlock:
    """A block's frozen tensors, and where each lies in the bytes of the block."""

    tensors: list[Tensor]
    offsets: list[int]
    shapes: list[Tensor]  # on the meta device
    size: int
    bytes: Tensor = field(init=False)

    def views(self, room: Tensor) -> list[Tensor]:
        places = zip(self.offsets, self.shapes, strict=True)
        return [view_in(room, offset, shape) for offset, shape in places]


@dataclass(slots=True)
class Room:
    """A part of the ring; `begun` is the copy under way into it."""

    bytes: Tensor
    block: int | None = None
    begun: object | None = None
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # by block


@dataclass(frozen=True, slots=True)
class PlaceInBlock:
    """A tensor in the memory of a block, wherever that is when it is asked for."""

    stream: WeightStream
    block: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # in numbers of that type

    def unpack(self) -> Tensor:
        room = self.stream.bring(self.block, backward=True)
        return room.bytes.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


class WeightStream:
    """The ring, and what is in it; also packs what operations save of it."""

    def __init__(self, blocks: Sequence[HostBlock], transfer: Transfer, rooms: int) -> None:
        self.blocks = list(blocks)
        self._transfer = transfer
        for block in self.blocks:
            _move_to_host(block, transfer)
        largest = max(block.size for block in self.blocks)
        self._rooms = [Room(transfer.device_room(largest)) for _ in range(min(rooms, len(self.blocks)))]
        self._room_of_bytes = {room.bytes.untyped_storage()._cdata: room for room in self._rooms}
        self._now: Moment | None = None
        self._next: dict[Moment, Moment] = {}  # as it was the last time

    @property
    def host_bytes(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def device_bytes(self) -> int:
        return sum(room.bytes.numel() for room in self._rooms)

    def bring(self, block: int, *, backward: bool | None = None) -> Room:
        """Have the block's tensors on the device for what is asked of it from here on, and the next ones come."""
        now = (block, in_backward() if backward is None else backward)
        if now != self._now:
            if self._now is not None:
                self._next[self._now] = now
            self._now = now
            self._fetch(self._wanted(now))
        return self._arrived(block)

    def pack(self, tensor: Tensor) -> PlaceInBlock | None:
        room = self._room_of_bytes.get(tensor.untyped_storage()._cdata)
        if room is None:
            return None
        assert room.block is not None
        offset = int(tensor.storage_offset())
        return PlaceInBlock(self, room.block, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def empty(self) -> None:
        """Send all blocks home; what was saved in a room is gone."""
        for room in self._rooms:
            if room.block is not None:
                self._point_home(room.block)
            room.block = room.begun = None
        self._now = None

    def _wanted(self, now: Moment) -> list[int]:
        """This block and those after it, as many as there are rooms."""
        wanted = [now[0]]
        while len(wanted) < len(self._rooms):
            after = self._next.get(now, _neighbour(now))
            if after[0] in wanted or not 0 <= after[0] < len(self.blocks):
                break
            wanted.append(after[0])
            now = after
        return wanted

    def _fetch(self, wanted: Sequence[int]) -> None:
        there = {room.block for room in self._rooms}
        free = (room for room in self._rooms if room.block not in wanted)
        for number, room in zip([one for one in wanted if one not in there], free, strict=False):
            if room.block is not None:
                self._point_home(room.block)
            room.block = number
            block = self.blocks[number]
            room.begun = self._transfer.start(room.bytes[: block.size], block.bytes)

    def _arrived(self, number: int) -> Room:
        room = next(room for room in self._rooms if room.block == number)
        if room.begun is not None:
            self._transfer.finish(room.begun)
            room.begun = None
        block = self.blocks[number]
        if block.tensors[0].untyped_storage()._cdata != room.bytes.untyped_storage()._cdata:
            if number not in room.views:
                room.views[number] = block.views(room.bytes)
            _point(block.tensors, room.views[number])
        return room

    def _point_home(self, number: int) -> None:
        """What is read of a block's weights while it is away is right, if not on the device."""
        block = self.blocks[number]
        _point(block.tensors, block.views(block.bytes))


def stream_weights(
    denoisers: Iterable[nn.Module],
    blocks: Sequence[nn.Module],
    share: float,
    transfer: Transfer,
    device: torch.device,
    *,
    rooms: int = ROOMS,
) -> WeightStream | None:
    """Keep `share` of the blocks' frozen weights on the host, in whole blocks; all else goes to `device`.

    Called again, in place of before: what was streamed and no longer is goes to the device.

    Args:
        denoisers: with everything that they are to be given (adapters, activation modes); on the host or the device.
        blocks: parts of them, in forward order.
        rooms: blocks that fit into the ring.

    Returns:
        None where nothing is streamed.
    """
    denoisers = list(denoisers)
    for block in blocks:
        change_forward(block, _stop)
        _own_buffers(block)
    alone = tensors_by_block(denoisers, blocks)
    sizes = [sum(padded(tensor.numel() * tensor.element_size()) for tensor in own) for own in alone]
    chosen = streamed_blocks(sizes, share)
    streamed = {id(tensor) for number in chosen for tensor in alone[number]}
    _move_rest(denoisers, streamed, device)
    if not chosen:
        return None
    stream = WeightStream([_laid_out(alone[number]) for number in chosen], transfer, rooms)
    for place, number in enumerate(chosen):
        change_forward(blocks[number], partial(_stream, stream, place))
    return stream


def streamed_blocks(sizes: Sequence[int], share: float) -> list[int]:
    """Which blocks, of these sizes, so that `share` of all bytes is streamed, evenly over the depth.

    Between two streamed blocks others compute, and that is the time in which a copy hides: next to each other they
    would come one after the other, and the rest of the pass would wait for none.
    """
    chosen, due = [], 0.0
    for number, size in enumerate(sizes):
        due += share * size
        if size and due >= size / 2:
            chosen.append(number)
            due -= size
    return chosen


def tensors_by_block(denoisers: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Of each block the parameters without gradient and the buffers whose memory is in no other part of the model."""
    inside = [[*_tensors(block)] for block in blocks]
    within = {module for block in blocks for module in block.modules()}
    outside = [
        tensor
        for denoiser in denoisers
        for module in denoiser.modules()
        if module not in within
        for tensor in _own_tensors(module)
    ]
    parts = Counter(memory for part in (*inside, outside) for memory in {_memory(tensor) for tensor in part})
    return [
        [tensor for tensor in part if not tensor.requires_grad and parts[_memory(tensor)] == 1]
        for part in inside
    ]


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _neighbour(moment: Moment) -> Moment:
    """What is needed next, as long as nothing is known."""
    block, backward = moment
    return block - 1 if backward else block + 1, backward


def _stop(forward: BlockForward) -> None:
    for stream in forward.keepers:
        if isinstance(stream, WeightStream):
            stream.empty()
    forward.bring_weights = None
    forward.keepers = tuple(one for one in forward.keepers if not isinstance(one, WeightStream))


def _stream(stream: WeightStream, place: int, forward: BlockForward) -> None:
    forward.bring_weights = partial(stream.bring, place)
    forward.keepers = (stream, *forward.keepers)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.numel():
            yield tensor


def _tensors(block: nn.Module) -> Iterator[Tensor]:
    """Each once."""
    seen: set[int] = set()
    for module in block.modules():
        for tensor in _own_tensors(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The same for tensors that begin at the same place."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _laid_out(tensors: list[Tensor]) -> HostBlock:
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += padded(tensor.numel() * tensor.element_size())
    return HostBlock(tensors, offsets, [dense(tensor) for tensor in tensors], size)


def _move_to_host(block: HostBlock, transfer: Transfer) -> None:
    """One block after the other: at no time is there more than one of them twice."""
    block.bytes = transfer.host_room(block.size)
    views = block.views(block.bytes)
    for tensor, view in zip(block.tensors, views, strict=True):
        view.copy_(tensor.detach())
    _point(block.tensors, views)


def _point(tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    """Parameters stay the objects that they are: adapters, graphs and compiled code hold them."""
    for tensor, view in zip(tensors, views, strict=True):
        tensor.data = view


def _move_rest(denoisers: Sequence[nn.Module], streamed: set[int], device: torch.device) -> None:
    moved: dict[tuple[object, ...], Tensor] = {}  # buffers that are one stay one
    for module in (module for denoiser in denoisers for module in denoiser.modules()):
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in streamed and parameter.device != device:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in streamed and buffer.device != device:
                key = (*_memory(buffer), buffer.shape, buffer.dtype)
                module._buffers[name] = moved.setdefault(key, buffer.to(device))


def _own_buffers(block: nn.Module) -> None:
    """Whoever else holds a buffer, such as a cache of constants, must not see it move."""
    own: dict[int, Tensor] = {}
    for module in block.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = own.setdefault(id(buffer), buffer.detach())
