"""Counting: bytes that are alive, and work that is done, while a step runs on tensors without data.

Bytes are counted by storage, rounded as CUDA's caching allocator rounds (512 bytes); a storage ends when the last
tensor on it does. Work is counted per operation: multiply-adds of matrix products and attention as two FLOP each
(torch.utils.flop_counter's formulas), bytes read and written by everything else, and kernels.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, mm_flop

from burnish.memory.transfer import is_dense
from burnish.planner.known_values import is_asked_of_unknown, with_places

ROUNDING = 512
# As seen from here: autograd's own hold on a gradient and those of this call; the tensor's, and Python's look at it.
HELD_BY_AUTOGRAD, HELD_BY_ITS_TENSOR = 4, 2
# What makes tensors out of none: the place of the size among its arguments.
_MADE_OF_NOTHING = {
    torch.ops.aten.full.default: 0,
    torch.ops.aten.zeros.default: 0,
    torch.ops.aten.ones.default: 0,
    torch.ops.aten.randint.generator: 1,
}
LARGE = 1 << 20  # numbers; smaller ones, such as positions and masks, keep their values
_ATTENTION = "scaled_dot_product"
_EIGHT_BIT = ("_scaled_mm", "_int_mm")


@dataclass(slots=True)
class Work:
    """What a stretch of a step computes."""

    matmul_flop: float = 0.0
    eight_bit_flop: float = 0.0  # matrix products of fp8 or int8 operands
    attention_flop: float = 0.0
    traffic: float = 0.0  # bytes read and written by operations that are neither
    kernels: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matmul_flop + other.matmul_flop,
            self.eight_bit_flop + other.eight_bit_flop,
            self.attention_flop + other.attention_flop,
            self.traffic + other.traffic,
            self.kernels + other.kernels,
        )

    def times(self, number: float) -> Work:
        return Work(
            self.matmul_flop * number,
            self.eight_bit_flop * number,
            self.attention_flop * number,
            self.traffic * number,
            round(self.kernels * number),
        )


@dataclass(slots=True)
class Stretch:
    """A part of the step between two marks; bytes are of everything alive."""

    name: str
    block: int | None  # number of the repeated block it belongs to; None outside of them
    entry: int
    exit: int = 0
    peak: int = 0
    work: Work = field(default_factory=Work)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every tensor that appears while the mode is on; `mark` cuts the step into stretches.

    Args:
        fake: the mode of the tensors without data; what a model fills with a constant has none either if it is large.
        rounding: bytes that an allocation is a multiple of.
        elsewhere: storages (`_cdata`) that are not on the device.
    """

    def __init__(
        self,
        fake: AbstractContextManager[Any] | None = None,
        *,
        rounding: int = ROUNDING,
        elsewhere: Collection[int] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake or nullcontext()
        self._rounding = rounding
        self.elsewhere = elsewhere
        self.current = 0
        self.peak = 0
        self.stretches: list[Stretch] = []
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._flop: Mapping[Any, Callable[..., int]] = {**flop_registry, torch.ops.aten._int_mm: mm_flop}
        self.mark("before", None)

    def begin(self) -> None:
        """What is followed so far was there before; the first stretch begins here."""
        self.stretches = []
        self.mark("before", None)

    def mark(self, name: str, block: int | None) -> None:
        """From here on a new stretch."""
        if self.stretches:
            self.stretches[-1].exit = self.current
        self.stretches.append(Stretch(name, block, entry=self.current, exit=self.current, peak=self.current))

    def follow(self, value: Any) -> None:
        """Count the tensors in `value` as alive from now until their storage is gone."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self._follow(leaf)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // self._rounding) * self._rounding
        if key in self._alive or size == 0 or key in self.elsewhere:
            return

        def gone(_: object) -> None:
            if self._alive.pop(key, None) is not None:
                self.current -= size

        self._alive[key] = (size, weakref.ref(storage, gone))
        self.current += size
        self.peak = max(self.peak, self.current)
        stretch = self.stretches[-1]
        stretch.peak = max(stretch.peak, self.current)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all that comes by: where is it?
            return _device_of(args[0])
        kwargs = kwargs or {}
        if is_asked_of_unknown(func, args):
            return False
        args = with_places(func, args)
        if func in _MADE_OF_NOTHING and math.prod(args[_MADE_OF_NOTHING[func]]) >= LARGE:
            with self._fake:
                result = func(*args, **kwargs)
            self.follow(result)
            return result
        if _spreads(func, args):
            args = tree_map_only(Tensor, self._without_data, args)
        if func is torch.ops.aten.add.Tensor and _adds_up_in_place(*args[:2]):
            func = torch.ops.aten.add_.Tensor
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        self.follow(result)
        return result

    def _without_data(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or not isinstance(self._fake, FakeTensorMode):
            return tensor
        return self._fake.from_tensor(tensor)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        work = self.stretches[-1].work
        packet = func._overloadpacket
        formula = self._flop.get(packet)
        if formula is None:
            if func.is_view:
                return
            work.kernels += 1
            work.traffic += _bytes(args) + _bytes(kwargs) + _bytes(result)
            return
        work.kernels += 1
        flop = formula(*args, **kwargs, out_val=result)
        name = packet.__name__
        if _ATTENTION in name:
            work.attention_flop += flop
        elif name in _EIGHT_BIT:
            work.eight_bit_flop += flop
        else:
            work.matmul_flop += flop


def _device_of(tensor: FakeTensor) -> torch.device:
    """As `FakeTensor.__torch_dispatch__` answers it, without going there."""
    return torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device


def _spreads(func: Any, args: Any) -> bool:
    """Whether positions are compared each with each, as for a mask of attention that is large and that nobody reads."""
    return torch.Tag.pointwise in func.tags and any(
        isinstance(one, Tensor) and one.numel() >= LARGE for one in args
    )


def _adds_up_in_place(first: Tensor, second: object) -> bool:
    """Whether this is autograd adding a gradient to one that nobody else holds: of real tensors it does so in place.

    Of fake ones it makes a third, since they are a subclass (`can_accumulate_inplace` in torch's
    csrc/autograd/input_buffer.cpp, whose conditions these are).
    """
    return (
        torch._C._current_graph_task_id() != -1
        and not torch.is_grad_enabled()
        and isinstance(second, Tensor)
        and (first.shape, first.dtype) == (second.shape, second.dtype)
        and is_dense(first)
        and first._use_count() == HELD_BY_AUTOGRAD  # type: ignore[attr-defined]
        and torch._C._storage_Use_Count(first.untyped_storage()._cdata) == HELD_BY_ITS_TENSOR
    )


def _bytes(value: Any) -> int:
    # What an operation touches is what it is given, not the whole storage behind it.
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
