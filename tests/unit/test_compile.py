"""Compiling fails aloud, once, and nothing changes for it; what it took is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from burnish.compute.compile import Compilation, compile_blocks
from burnish.memory.activations import set_activations

Backend = Callable[..., Any]


def refuses(*_: object) -> Any:
    raise RuntimeError("no compiler on this machine")


def blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)]


def loss_and_gradients(layers: list[nn.Module]) -> list[Tensor]:
    x = torch.linspace(-1, 1, 32).view(4, 8).requires_grad_()
    y = x
    for layer in layers:
        y = layer(y)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    loss = y.square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, [x, *parameters])]


@pytest.mark.parametrize(
    "backend",
    [refuses, aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=refuses)],
    ids=["forward", "backward"],
)
@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_what_cannot_be_compiled_is_said_once_and_runs_as_it_is(
    tmp_path: Path, backend: Any, mode: Any
) -> None:
    layers, warnings = blocks(), []
    expected = loss_and_gradients(layers)
    torch._dynamo.reset()
    set_activations(layers, [mode] * 3)
    compilation = compile_blocks(layers, warnings.append, tmp_path, backend=backend)
    for _ in range(2):
        found = loss_and_gradients(layers)
        assert all(torch.equal(one, right) for one, right in zip(found, expected, strict=True))
    assert len(warnings) == 1
    assert "memory.compile has no effect" in warnings[0]
    assert "no compiler on this machine" in warnings[0]
    assert "no compiler on this machine" in compilation.trouble


def test_an_error_of_the_model_itself_is_not_taken_for_one_of_the_compiler(tmp_path: Path) -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("of the model")

    layer = Bad()
    torch._dynamo.reset()
    compile_blocks([layer], pytest.fail, tmp_path, backend="eager")
    with pytest.raises(ValueError, match="of the model"):
        layer(torch.zeros(1))


def test_what_compiling_took_is_said_once_when_it_is_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = blocks()
    torch._dynamo.reset()
    compilation = compile_blocks(layers, pytest.fail, tmp_path, backend="eager")
    with caplog.at_level(logging.INFO, logger="burnish"):
        for _ in range(4):
            loss_and_gradients(layers)
            compilation.tell()
    assert [record.message.rpartition(" in ")[0] for record in caplog.records] == [
        "blocks compiled: 1 graphs"
    ]
    assert compilation.seconds > 0


def test_graphs_survive_a_cache_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compile_blocks([], pytest.fail, tmp_path)
    import os

    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    assert isinstance(Compilation(pytest.fail).seconds, float)
