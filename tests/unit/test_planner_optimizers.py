"""A step of every kind of optimizer on tensors without data takes the memory of a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from burnish.config.optimizers import AnyOptimizer
from burnish.config.shape import alternatives, kind_of
from burnish.optim.build import build_optimizer, check_optimizer
from burnish.planner.known_values import Answered
from burnish.planner.live_bytes import LiveBytes

KINDS = [str(kind_of(member)) for member in alternatives(AnyOptimizer)]
SHAPES = ((64, 128), (16, 4, 3, 3), (64,))


def section(kind: str, **options: Any) -> AnyOptimizer:
    given = {"class_path": "torch.optim.RAdam"} if kind == "custom" else {}
    return TypeAdapter[AnyOptimizer](AnyOptimizer).validate_python({"kind": kind, **given, **options})


def stepped(section: AnyOptimizer, dtype: torch.dtype) -> tuple[torch.optim.Optimizer, list[Parameter]]:
    parameters = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = build_optimizer(section, [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 1e-5}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with Answered():
        optimizer.step()
    return optimizer, parameters


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    leaves = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, "nearest"), (torch.bfloat16, "kahan")])
def test_a_traced_optimizer_keeps_what_a_real_one_keeps(kind: str, dtype: torch.dtype, rounding: str) -> None:
    chosen = section(kind, rounding=rounding)
    check_optimizer(chosen, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        traced, parameters = stepped(chosen, dtype)
    assert bytes_of(traced) == bytes_of(stepped(chosen, dtype)[0])
    counted = LiveBytes(rounding=1)
    counted.follow([*parameters, *(parameter.grad for parameter in parameters)])
    counted.follow(list(traced.state.values()))
    before = counted.current
    with counted, Answered():
        traced.step()
    assert counted.current - before < 64  # a second step keeps nothing more, of a few numbers apart
    assert counted.peak >= before
