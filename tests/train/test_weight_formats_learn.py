"""Runs with weights in fewer bits: they learn as well, go on in another format when told to, and draw and export."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import picture_folder, run_config, short_prompts
from torch import Tensor

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules
from burnish.demo.command import ASSETS
from burnish.events import Listener
from burnish.export.adapter_file import read_adapter
from burnish.family import Family
from burnish.memory import quantized
from burnish.memory.formats import Int8, has_kernel
from burnish.memory.quantized import QuantizedLinear
from burnish.memory.shrinking import Shrink
from burnish.model import choose_model
from burnish.run import train_run
from burnish.run_folder import RunFolder

TinyFolder = Callable[[str], Path]


class Heard(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warned(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of tiny models are large."""
    monkeypatch.setattr(quantized, "SMALLEST", 0)


def losses_of(folder: Path, seed: int, weights: str) -> Tensor:
    """A short run of the embedded demo on its own pictures; the loss of each step."""
    config = run_config(
        Path("demo"),
        ASSETS / "dataset",
        folder,
        {
            "model": {"path": "demo"},
            "method": {"rank": 16, "targets": "attention+mlp"},
            "data": [{"kind": "folder", "path": str(ASSETS / "dataset"), "resolutions": [128]}],
            "trigger": "sks robot",
            "seed": seed,
            "train.steps": 10,
            "train.batch_size": 4,
            "train.optimizer": {"kind": "adamw", "learning_rate": 2e-3},
            "memory.weights": weights,
            "memory.cache": "disk",
            "memory.cache_folder": str(folder / "cache"),
        },
        name=f"{weights}-{seed}",
    )
    train_run(config, progress=Listener())
    return torch.tensor([value for _, value in RunFolder(folder / config.name).metrics("loss")])


@pytest.mark.slow
@pytest.mark.usefixtures("every_layer")
def test_the_demo_learns_in_8_bits_as_in_32(tmp_path: Path) -> None:
    """`tools/benchmarks/weight_formats.py` has the long curves, and what was learned."""
    native, other_seed = losses_of(tmp_path, 7, "native"), losses_of(tmp_path, 8, "native")
    spread = (native - other_seed).abs().mean()
    # A step that rounds otherwise moves fp8's distance between 0.09 and 0.11, int8's between 0.01 and 0.02.
    for weights, share in {"fp8": 0.15, "int8": 0.05}.items():
        found = losses_of(tmp_path, 7, weights)
        assert 0 < (found - native).abs().mean() < share * spread
        assert found[-4:].mean() < found[:4].mean()


@pytest.mark.usefixtures("every_layer")
def test_a_run_goes_on_in_another_format_draws_and_exports(tiny_flux: Path, tmp_path: Path) -> None:
    model = short_prompts(tiny_flux, tmp_path / "model")
    pictures = picture_folder(tmp_path / "pictures")

    def go(steps: int, weights: str, heard: Heard) -> Any:
        overrides = {
            "train.steps": steps,
            "save.every": 3,
            "memory.weights": weights,
            "memory.text_encoder_weights": "nf4",
            "memory.cache_folder": str(tmp_path / "cache"),
            "sample": {"every": 0, "prompts": ["a red chair"], "steps": 2, "size": 64},
        }
        return train_run(run_config(model, pictures, tmp_path, overrides), progress=heard)

    go(3, "int8", first := Heard())
    assert not [line for line in first.lines if "memory.weights" in line]
    result = go(6, "fp8", heard := Heard())
    assert "changed since the last start: memory.weights: int8 -> fp8" in heard.lines
    assert result.step == 6
    assert list(RunFolder(tmp_path / "tiny").samples.rglob("*.png"))
    # Its adapter fits the model as it is.
    family = choose_model(run_config(model, pictures, tmp_path).model).load(
        "denoiser", dtype=torch.float32, device="cpu"
    )
    denoiser = family.denoisers["transformer"]
    file = read_adapter(result.adapter, adaptable_modules(denoiser), part="transformer", keys=family.export)
    assert AdapterSet.from_weights(denoiser, file.weights).layers


def test_one_layer_at_a_time_is_there_as_it_was(tiny_flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    pack = Int8.pack

    def watched(self: Int8, weight: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal most
        alive.append(weakref.ref(weight))
        most = max(most, sum(one() is not None for one in alive))
        return pack(self, weight)

    has_kernel("int8", torch.device("cpu"))  # packs once to find out, and remembers
    monkeypatch.setattr(Int8, "pack", watched)
    model = choose_model(run_config(tiny_flux, tiny_flux, tiny_flux).model)
    family: Family = model.family.load(
        model.source,
        frozenset(["denoiser"]),
        dtype=torch.float32,
        device="cpu",
        shrink={"denoiser": Shrink("int8", smallest=0)},
    )
    kept = [one for one in family.denoisers["transformer"].modules() if isinstance(one, QuantizedLinear)]
    assert len(alive) == len(kept) > 10
    assert most <= 2  # the one that is packed, and the one before in the reader's hand
