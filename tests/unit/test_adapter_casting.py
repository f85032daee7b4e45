"""Adapters cast together compute what adapters cast one by one do, and their gradients are the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.adapters.attached import AdapterSet
from burnish.adapters.casting import cast_once
from burnish.adapters.layer import ModuleChoice
from burnish.compute.compile import compile_blocks
from burnish.memory.activations import Mode, set_activations

BF16 = torch.bfloat16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, 16)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.exact = nn.Linear(16, 16)  # computes in float32 in the middle of a bf16 model, as some norms do
        self.idle = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.to_q(x))
        x = x + self.conv(x.view(-1, 4, 4, 16)).view_as(x)
        added: Tensor = self.exact(x.float())
        return x + added.to(x.dtype)


def adapted(dtype: torch.dtype) -> tuple[nn.Sequential, AdapterSet]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(dtype)
    for block in model:
        block.exact.float()
    names = [f"{number}.{layer}" for number in (0, 1) for layer in ("to_q", "conv", "exact", "idle")]
    choices = dict.fromkeys(names, ModuleChoice(rank=4, alpha=2.0))
    adapter = AdapterSet.attach(model, choices, dropout=0.2, seed=1)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter.normal_(std=0.1)
    return model.train(), adapter


def gradients(model: nn.Module, adapter: AdapterSet, dtype: torch.dtype) -> dict[str, Tensor | None]:
    torch.manual_seed(2)
    x = torch.randn(2, 16, 16).to(dtype)
    model(x).float().square().mean().backward()
    found = {name: parameter.grad for name, parameter in adapter.named_parameters().items()}
    for parameter in adapter.named_parameters().values():
        parameter.grad = None
    return found


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, right in expected.items():
        one = found[name]
        assert (one is None) == (right is None) == ("idle" in name), name
        if one is not None and right is not None:
            assert one.dtype == torch.float32
            assert torch.equal(one, right), name


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("mode", ["keep", "keep-matmul", "recompute"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_casting_one_by_one(
    tmp_path: Path, dtype: torch.dtype, mode: Mode, compiled: bool
) -> None:
    model, adapter = adapted(dtype)
    expected = gradients(model, adapter, dtype)
    cast_once(model, list(adapter.layers.values()), dtype)
    torch._dynamo.reset()
    set_activations(list(model), [mode] * 2)
    if compiled:
        compile_blocks(list(model), pytest.fail, tmp_path, backend="aot_eager")
    for _ in range(2):
        assert_same(gradients(model, adapter, dtype), expected)


def test_weights_that_moved_are_cast_anew_and_without_gradients_the_weights_themselves_count() -> None:
    model, adapter = adapted(BF16)
    cast_once(model, list(adapter.layers.values()), BF16)
    gradients(model, adapter, BF16)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter.mul_(2)
        x = torch.ones(2, 16, 16, dtype=BF16)
        seen = model(x)
    found = gradients(model, adapter, BF16)
    fresh, second = adapted(BF16)
    with torch.no_grad():
        for parameter in second.named_parameters().values():
            parameter.mul_(2)
        assert torch.equal(seen, fresh(x))
    assert_same(found, gradients(fresh, second, BF16))


class Casts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._to_copy.default, torch.ops.aten._foreach_copy_.default)
        return func(*args, **(kwargs or {}))


def test_casting_together_is_fewer_operations() -> None:
    counts = []
    for prepare in (lambda *_: None, partial(cast_once, dtype=BF16)):
        model, adapter = adapted(BF16)
        prepare(model, list(adapter.layers.values()))
        with Casts() as casts:
            gradients(model, adapter, BF16)
        counts.append(casts.count)
    # Two matrices of two layers of two blocks, forward and backward, in exchange for one call each way.
    assert counts[0] - counts[1] == 2 * 2 * 2 * 2 - 2
