"""A run of a model with two denoisers leaves one file for each, and both are taken for pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import picture_folder, run_config
from safetensors import safe_open
from safetensors.torch import load_file
from two_experts import LABELS, second_transformer

from burnish.config.schema import Memory, Model
from burnish.events import Listener
from burnish.families import registry
from burnish.generate import draw_pictures_with
from burnish.run import train_run
from burnish.sampling.sampler import PictureRequest

TinyFolder = Callable[[str], Path]


@pytest.mark.parametrize(
    ("format", "prefix"),
    [("auto", "transformer.transformer_blocks."), ("comfy", "diffusion_model.joint_blocks.")],
)
def test_one_adapter_file_for_each_denoiser(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, prefix: str
) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "sd3", "two_experts:TwoExperts")
    model = second_transformer(tiny_folder("sd3"), tmp_path / "model")
    config = run_config(
        model,
        picture_folder(tmp_path / "pictures"),
        tmp_path,
        {
            "save.format": format,
            "train.steps": 4,
            "train.batch_size": 4,
            "train.optimizer.learning_rate": 0.1,
            "train.schedule.warmup_steps": 0,
            "model.family": "sd3",
            "method.dropout": 0.0,
            "data.0.captions": {},
        },
    )
    train_run(config, progress=Listener())

    adapters = tmp_path / "tiny" / "adapters"
    assert sorted(path.name for path in adapters.iterdir()) == sorted(
        f"tiny-{label}{step}.safetensors" for label in LABELS.values() for step in ("", "-00000004")
    )
    files = {part: adapters / f"tiny-{label}.safetensors" for part, label in LABELS.items()}
    for part, file in files.items():
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["burnish.part"] == part
        tensors = load_file(file)
        assert any(key.startswith(prefix) for key in tensors)
        assert all(key.split(".")[0] == prefix.split(".")[0] for key in tensors)
        assert any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)
    first, second = (load_file(file) for file in files.values())
    assert any(not torch.equal(first[key], second[key]) for key in first)

    request = PictureRequest("a dog", "", 3, 64, 64, 4, 3.0)

    def drawn(*chosen: Path, memory: Memory | None = None) -> bytes:
        pictures = draw_pictures_with(
            Model(path=str(model), family="sd3"),
            [request],
            adapters=[(path, 1.0) for path in chosen],
            memory=memory,
            device="cpu",
            precision="fp32",
        )
        return next(iter(pictures)).tobytes()

    high, low = files.values()
    different = {drawn(), drawn(high), drawn(low), drawn(high, low)}
    assert len(different) == 4
    assert drawn(low, high) == drawn(high, low)
    assert drawn(high, low, memory=Memory(stream=1.0)) == drawn(high, low)
