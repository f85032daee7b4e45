"""What a step asks of values, answered while most of its tensors have none.

Masks and whole numbers of a traced batch are real tensors among fake ones (trace.py). torch takes their values away as
soon as they meet a fake one, so that picking by a mask would have no known size: here its places are read first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_PICKING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


def with_places(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments in which masks that are known have become the places that they pick."""
    if func not in _PICKING or not any(_is_known_mask(one) for one in args[1]):
        return args
    return (args[0], _places(args[1]), *args[2:])


def is_asked_of_unknown(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the code asks yes or no of a tensor without values: is all of it zero, is nothing masked?

    The answer is no, by which it goes the general way.
    """
    return (
        func is torch.ops.aten._local_scalar_dense.default
        and isinstance(args[0], FakeTensor)
        and args[0].dtype == torch.bool
    )


class Answered(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While an optimizer steps: a number that it reads from a tensor without values is 1, yes or no is no.

    Prodigy reads its estimate of the rate so. What it does with it takes the same time and memory for every number.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return args[0].dtype != torch.bool and 1.0
        return func(*args, **(kwargs or {}))


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    placed: list[Tensor | None] = []
    for index in indices:
        placed += index.nonzero().unbind(1) if index is not None and _is_known_mask(index) else [index]
    return placed


def _is_known_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
