"""Copies as a device makes them, on the CPU: late, and with what was there before gone at once.

A copy happens when it is waited for; until then its target is poison. What is read too early, or after its room was
given to something else, is therefore NaN (or -1 where there is no NaN).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

POISON = 0xFF  # of each byte: NaN in float32, float16, bfloat16 and e4m3


def bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a tensor without gaps, in whatever order its numbers are."""
    everything = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    begin = tensor.storage_offset() * tensor.element_size()
    return everything[begin : begin + tensor.numel() * tensor.element_size()]


@dataclass(slots=True)
class Begun:
    target: Tensor
    source: Tensor
    at: int
    is_done: bool = False


@dataclass
class PretendedTransfer:
    """Both rooms are on the CPU. `hide` takes what is in host rooms out of reach of all but copies."""

    host_rooms: list[Tensor] = field(default_factory=list)
    device_rooms: list[Tensor] = field(default_factory=list)
    started: list[Begun] = field(default_factory=list)
    clock: Callable[[], int] = lambda: 0  # what of the computation is done
    late: int = 0  # copies that were waited for as soon as they were begun
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def host_room(self, size: int) -> Tensor:
        self.host_rooms.append(torch.full((size,), POISON, dtype=torch.uint8))
        return self.host_rooms[-1]

    def device_room(self, size: int) -> Tensor:
        self.device_rooms.append(torch.full((size,), POISON, dtype=torch.uint8))
        return self.device_rooms[-1]

    def start(self, target: Tensor, source: Tensor) -> Begun:
        bytes_of(target).fill_(POISON)
        self.started.append(Begun(target, self.hidden.get(source.data_ptr(), source), self.clock()))
        return self.started[-1]

    def finish(self, begun: object) -> None:
        assert isinstance(begun, Begun)
        assert not begun.is_done
        self.late += begun.at == self.clock()
        begun.target.copy_(begun.source)
        begun.is_done = True

    def hide(self) -> None:
        for room in self.host_rooms:
            self.hidden[room.data_ptr()] = room.clone()
            room.fill_(POISON)


class Products(TorchDispatchMode):
    """Counts matrix products: a clock for `PretendedTransfer`."""

    done = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.done += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))
