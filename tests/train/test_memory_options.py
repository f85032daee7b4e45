"""Runs that keep weights and activations on the host end in the bits of those that do not, interrupted or not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_transfer import PretendedTransfer
from runs import last_checkpoint, picture_folder, run_config
from safetensors.torch import load_file

from burnish import assembly
from burnish.errors import Interrupted
from burnish.events import Listener, StepReport
from burnish.memory.activation_offload import offload_activations
from burnish.memory.streaming import stream_weights
from burnish.run import train_run

SAVING: dict[str, Any] = {
    "memory.activations": 0.5,
    "memory.stream": 0.7,
    "memory.offload_activations": True,
}
COMMON: dict[str, Any] = {
    "memory.activations": "keep",
    "memory.weights": "native",
    "train.steps": 6,
    "train.accumulate": 2,
    "train.ema": {"decay": 0.9},
    "train.validation": {"every": 3, "pictures": 2},
    "sample.every": 3,
    "sample.prompts": ["a sks dog"],
    "sample.steps": 2,
    "sample.size": [64, 64],
}


class Losses(Listener):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.held_out: list[float] = []
        self.stop_at: int | None = None
        self.warnings: list[str] = []

    def stepped(self, report: StepReport) -> None:
        self.losses.append(report.loss)
        if report.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        self.held_out.append(loss)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "six")


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[PretendedTransfer]:
    """Copies are late and leave poison behind, and the tiny model is treated as if it were a large one."""
    made: list[PretendedTransfer] = []

    def pretended(device: torch.device) -> PretendedTransfer:
        made.append(PretendedTransfer())
        return made[-1]

    monkeypatch.setattr(assembly, "transfer_to", pretended)
    monkeypatch.setattr(assembly, "stream_weights", partial(stream_weights, rooms=2))
    everything = partial(offload_activations, smallest=256, leaving=0)
    monkeypatch.setattr(assembly, "offload_activations", everything)
    return made


@pytest.mark.parametrize(("name", "precision"), [("flux", "fp32"), ("flux", "bf16"), ("sd15", "fp32")])
def test_a_run_ends_in_the_same_bits_also_after_an_interruption(
    tiny_folder: Callable[[str], Path],
    pictures: Path,
    tmp_path: Path,
    transfers: list[PretendedTransfer],
    name: str,
    precision: str,
) -> None:
    model, common = tiny_folder(name), COMMON | {"train.precision": precision}
    plain = Losses()
    train_run(run_config(model, pictures, tmp_path / "plain", common), progress=plain)
    assert len(plain.losses) == 6
    assert len(plain.held_out) == 2

    saving = Losses()
    config = run_config(model, pictures, tmp_path / "saving", common | SAVING)
    saving.stop_at = 2
    with pytest.raises(Interrupted):
        train_run(config, progress=saving)
    saving.stop_at = None
    train_run(config, progress=saving)
    assert saving.warnings == []
    assert len(transfers) == 4
    for weights, activations in (transfers[:2], transfers[2:]):
        assert len(weights.device_rooms) == 2
        assert len(weights.started) > 2 * len(weights.host_rooms)
        assert len(activations.device_rooms) > 10
    assert saving.losses == plain.losses
    assert saving.held_out == plain.held_out
    assert_same_end(tmp_path / "saving", tmp_path / "plain")


def assert_same_end(found: Path, expected: Path) -> None:
    ours, theirs = last_checkpoint(found), last_checkpoint(expected)
    assert ours.step == theirs.step == 6
    for file, tensors in theirs.tensors.items():
        assert all(torch.equal(ours.tensors[file][key], value) for key, value in tensors.items()), file
    adapters = [load_file(folder / "tiny" / "adapters" / "tiny.safetensors") for folder in (found, expected)]
    assert all(torch.equal(adapters[0][key], value) for key, value in adapters[1].items())
    pictures = [sorted((folder / "tiny" / "samples").glob("*.png")) for folder in (found, expected)]
    assert len(pictures[0]) == len(pictures[1]) >= 3
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*pictures, strict=True))
