"""Whole runs on a pretended accelerator: what is planned, cached, loaded, trained, sampled and saved meets where it
should."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretend_device import DEVICE, pretended
from runs import picture_folder, run_config

import burnish.run
from burnish import settling
from burnish.events import Listener
from burnish.export.word_file import is_word
from burnish.families import reading
from burnish.memory import quantized

TinyFolder = Callable[[str], Path]
SAYING = {"data.0.captions.prefix": "a photo of <it> "}
RUNS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "adapter": ("sd15", {"train.ema": {"decay": 0.9}, "train.accumulate": 2}),
    "in 8 bits": ("flux", {"memory.weights": "int8", "memory.activations": 0.5}),
    "clips": ("wan21", {"method.dora": True}),
    "word and adapter": ("sd3", {"method.word": {"token": "<it>"}, **SAYING}),
    "whole": ("pixart_sigma", {"method": {"kind": "full"}}),
}
CUDA: Mapping[str, Callable[..., object]] = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: "NVIDIA H200",
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: SimpleNamespace(is_integrated=False),
    "mem_get_info": lambda *_: (139 << 30, 140 << 30),
    "memory_reserved": lambda *_: 0,
    "max_memory_allocated": lambda *_: 1 << 20,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "manual_seed": lambda _: None,
}


class Said(Listener):
    def __init__(self) -> None:
        self.plans: list[str] = []
        self.pictures = 0

    def planned(self, text: str) -> None:
        self.plans.append(text)

    def sampled(self, step: int, paths: Any) -> None:
        self.pictures += len(paths)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run asks of CUDA itself, where that is not how to compute."""
    for name, answer in CUDA.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(settling, "has_triton", lambda: False)
    monkeypatch.setattr(settling, "measured_rates", lambda *_, **__: None)
    monkeypatch.setattr(burnish.run, "choose_device", lambda *_: DEVICE)
    monkeypatch.setattr(quantized, "SMALLEST", 0)
    monkeypatch.setattr(reading, "has_fastsafetensors", lambda: False)  # it looks for the driver


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("kind", RUNS)
def test_a_run(tiny_folder: TinyFolder, tmp_path: Path, kind: str) -> None:
    name, options = RUNS[kind]
    config = run_config(
        tiny_folder(name),
        picture_folder(tmp_path / "pictures"),
        tmp_path / "runs",
        {
            "memory.device": "cuda",
            "memory.attention": "torch",
            "memory.weights": "native",
            "memory.activations": "keep",
            "memory.stream": 0.0,
            "memory.offload_activations": False,
            "train.steps": 2,
            "train.schedule": {"kind": "constant"},
            "train.validation": {"every": 1, "pictures": 2},
            "sample": {"at_start": True, "every": 2, "prompts": ["a cat"], "size": 64, "steps": 1},
            **options,
        },
    )
    said = Said()
    with pretended(), torch.enable_grad():
        result = burnish.run.train_run(config, progress=said)
    assert (result.state, result.step, said.pictures) == ("done", 2, 2)
    assert len(said.plans) == 2  # foreseen, and measured
    saved = list(result.folder.glob("adapters/*.safetensors"))
    assert any(map(is_word, saved)) == ("word" in kind)
