"""Optimizers in a run: a schedule-free one saves its average; what is wrong is said before anything loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import last_checkpoint, picture_folder, run_config, short_prompts
from safetensors.torch import load_file
from torch import Tensor

from burnish.errors import ConfigError, UserError
from burnish.events import Listener
from burnish.run import check_run, train_run

BETA = 0.8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "six")


@pytest.fixture(scope="module")
def model(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_prompts(tiny_flux, tmp_path_factory.mktemp("model") / "flux")


def config(model: Path, pictures: Path, output: Path, steps: int, **changes: Any) -> Any:
    overrides = {
        "train.steps": steps,
        "train.optimizer": {"kind": "adamw_schedule_free", "learning_rate": 1e-2, "betas": [BETA, 0.99]},
        "train.schedule": {"kind": "constant", "warmup_steps": 2},
        "save.format": "diffusers",
        "method.alpha": 4,
    }
    return run_config(model, pictures, output, overrides | changes)


def is_among(tensor: Tensor, others: dict[str, Tensor]) -> bool:
    return any(
        one.shape == tensor.shape and torch.allclose(one, tensor, rtol=1e-5, atol=1e-7)
        for one in others.values()
    )


def test_the_average_is_saved_and_training_goes_on_beside_it(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    straight = train_run(config(model, pictures, tmp_path / "straight", 6), progress=Listener())
    often = {"save.every": 2, "train.validation": None}
    train_run(config(model, pictures, tmp_path / "resumed", 4, **often), progress=Listener())
    resumed = train_run(config(model, pictures, tmp_path / "resumed", 6, **often), progress=Listener())
    assert straight.adapter is not None
    assert resumed.adapter is not None

    one, other = (last_checkpoint(tmp_path / name).tensors for name in ("straight", "resumed"))
    for file in ("adapter", "optimizer"):
        assert one[file].keys() == other[file].keys()
        assert all(torch.equal(one[file][name], other[file][name]) for name in one[file])
    saved = load_file(straight.adapter)
    again = load_file(resumed.adapter)
    assert all(torch.equal(saved[name], again[name]) for name in saved)

    trained = one["adapter"]
    # y = (1 - beta) z + beta x, so x = y + (1 - 1 / beta) (z - y)
    average = {name: y + (1 - 1 / BETA) * (one["optimizer"][f"{name}:z"] - y) for name, y in trained.items()}
    ups = {name: tensor for name, tensor in saved.items() if name.endswith("lora_B.weight")}
    assert len(ups) > 3
    assert all(is_among(tensor, average) for tensor in ups.values())
    assert not any(is_among(tensor, trained) for tensor in ups.values())


def test_another_way_of_rounding_is_another_run(model: Path, pictures: Path, tmp_path: Path) -> None:
    train_run(config(model, pictures, tmp_path, 3, **{"save.every": 1}), progress=Listener())
    changed = config(model, pictures, tmp_path, 4, **{"train.optimizer.rounding": "kahan"})
    with pytest.raises(UserError, match=r"train\.optimizer\.rounding: stochastic -> kahan"):
        train_run(changed, progress=Listener())


@pytest.mark.parametrize("start", [check_run, train_run])
def test_a_wrong_argument_is_said_before_the_model_is_looked_for(
    start: Callable[..., object], pictures: Path, tmp_path: Path
) -> None:
    custom = {"kind": "custom", "class_path": "torch.optim.SGD", "arguments": {"nestrov": True}}
    wrong = run_config(tmp_path / "nowhere", pictures, tmp_path, {"train.optimizer": custom})
    with pytest.raises(ConfigError, match="did you mean nesterov"):
        start(wrong, progress=Listener())
