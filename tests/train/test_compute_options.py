"""Runs with compiled blocks and with chosen attention kernels learn what a plain run learns, and say what they did."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from runs import picture_folder, run_config
from safetensors.torch import load_file

from burnish import assembly
from burnish.compute.compile import compile_blocks
from burnish.errors import MachineError
from burnish.events import Listener, StepReport
from burnish.run import train_run

TinyFolder = Callable[[str], Path]
STEPS = 4


class Losses(Listener):
    norms: ClassVar[list[float]] = []

    def __init__(self) -> None:
        self.seen: list[float] = []

    def stepped(self, report: StepReport) -> None:
        self.seen.append(report.loss)
        self.norms.append(report.grad_norm)

    def warned(self, text: str) -> None:
        assert "compile" not in text, text


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "three", count=3)


@pytest.fixture
def train(
    tiny_folder: TinyFolder, pictures: Path, tmp_path: Path
) -> Callable[..., tuple[list[float], Path, str]]:
    def run(name: str, **overrides: Any) -> tuple[list[float], Path, str]:
        """Losses, the adapter, and the log."""
        options = {
            "train.steps": STEPS,
            "train.schedule": {"kind": "constant"},
            "save.dtype": "float32",
            **overrides,
        }
        config = run_config(tiny_folder("ernie_image"), pictures, tmp_path, options, name=name)
        losses = Losses()
        adapter = train_run(config, progress=losses).adapter
        assert adapter is not None
        logs = sorted((tmp_path / name / "logs").iterdir())
        return losses.seen, adapter, logs[-1].read_text()

    return run


def test_compiled_and_resumed_a_run_learns_what_a_plain_one_does(
    train: Callable[..., tuple[list[float], Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of the compiler but the making of kernels, which takes a minute.
    monkeypatch.setattr(assembly, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    torch._dynamo.reset()
    plain, plain_adapter, _ = train("plain")
    compiled, adapter, log = train("compiled", **{"memory.compile": True})
    assert compiled == pytest.approx(plain, rel=1e-6)
    assert len(re.findall(r"blocks compiled: \d+ graphs in \d+\.\d s", log)) == 1
    expected, whole = load_file(plain_adapter), load_file(adapter)
    for key, tensor in expected.items():
        torch.testing.assert_close(whole[key], tensor, atol=1e-5, rtol=0)

    train("halved", **{"memory.compile": True, "train.steps": 2})
    rest, adapter, _ = train("halved", **{"memory.compile": True})
    assert rest == compiled[2:]
    assert all(torch.equal(tensor, whole[key]) for key, tensor in load_file(adapter).items())


@pytest.mark.parametrize("limit", [3e-5, 1.0])
def test_gradients_are_clipped_to_the_limit_and_not_touched_below_it(
    train: Callable[..., tuple[list[float], Path, str]], monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    applied: list[float] = []
    build = assembly.build_optimizer

    def watched(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = build(*arguments, **options)

        def watch(*_: object) -> None:
            gradients = [one.grad for group in optimizer.param_groups for one in group["params"]]
            applied.append(float(torch.cat([one.flatten() for one in gradients]).norm()))

        optimizer.register_step_pre_hook(watch)
        return optimizer

    monkeypatch.setattr(assembly, "build_optimizer", watched)
    train("clipped", **{"train.max_grad_norm": limit})
    reported = Losses.norms[-STEPS:]
    assert 4e-5 < min(reported) < max(reported) < 0.5
    # torch.nn.utils.clip_grad_norm_: times limit / (norm + 1e-6), at most 1
    expected = [norm * min(1.0, limit / (norm + 1e-6)) for norm in reported]
    assert applied == pytest.approx(expected, rel=1e-4)


def test_a_chosen_kernel_computes_the_same_and_its_figures_are_in_the_log(
    train: Callable[..., tuple[list[float], Path, str]],
) -> None:
    plain, _, log = train("plain")
    assert "attention" not in log  # nothing to measure on a CPU
    chosen, _, log = train("math", **{"memory.attention": "math"})
    assert chosen == pytest.approx(plain, rel=1e-5)
    assert re.search(r"attention, head dimension \d+, float32, self.*: math \d+\.\d+ ms, error \d", log)


def test_a_kernel_that_is_not_here_ends_the_run_before_its_first_step(
    train: Callable[..., tuple[list[float], Path, str]],
) -> None:
    with pytest.raises(MachineError, match=r"memory\.attention is cudnn"):
        train("none", **{"memory.attention": "cudnn"})
