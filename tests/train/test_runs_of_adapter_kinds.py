"""Runs of every kind of adapter: what they leave is verified, and an interrupted one ends in the same bits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import digest, last_checkpoint, picture_folder, run_config, short_prompts
from safetensors.torch import load_file
from torch import Tensor

from burnish.adapters import lora
from burnish.adapters.starts import principal_factors
from burnish.errors import AdapterError, UserError
from burnish.events import Listener
from burnish.families.flux import Flux
from burnish.run import check_run, train_run

METHODS: dict[str, dict[str, Any]] = {
    "dora": {"rank": 2, "dora": True, "b_learning_rate_ratio": 4.0, "rank_dropout": 0.2},
    "pissa": {"rank": 2, "start": "pissa", "module_dropout": 0.2},
    "loha": {"kind": "loha", "rank": 2},
    "lokr": {"kind": "lokr", "factor": 4},
    "dokr": {"kind": "lokr", "factor": 4, "dora": True},
    "oft": {"kind": "oft", "block_size": 8},
    "boft": {"kind": "boft", "block_size": 8},
}
STEPS = 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "six")


@pytest.fixture(scope="module")
def model(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_prompts(tiny_flux, tmp_path_factory.mktemp("model") / "flux")


def config_for(
    model: Path, pictures: Path, output: Path, kind: str, overrides: dict[str, Any] | None = None
) -> Any:
    method = {**METHODS[kind], "targets": "attention"}
    told = {"method": method, "train.steps": STEPS, "save.every": 2, **(overrides or {})}
    return run_config(model, pictures, output, told)


def negated(*args: Any) -> tuple[Tensor, Tensor]:
    down, up = principal_factors(*args)
    return -down, -up


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_is_verified_and_ends_in_the_same_bits_when_interrupted(
    model: Path, pictures: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = config_for(model, pictures, tmp_path / "straight", kind)
    result = train_run(straight, progress=Listener())
    assert result.adapter is not None
    whole = digest(last_checkpoint(tmp_path / "straight"))

    # The state of step 2 alone is what a kill right after it leaves.
    halves = tmp_path / "halves"
    shutil.copytree(tmp_path / "straight", halves)
    shutil.rmtree(halves / "tiny" / "checkpoints" / f"step-{STEPS:08d}")
    for path in (halves / "tiny" / "adapters").iterdir():
        path.unlink()
    if kind == "pissa":  # what another machine makes of the same weight may differ in signs
        monkeypatch.setattr(lora, "principal_factors", negated)
    streamed = {"memory.stream": 1.0}  # which changes no number
    again = train_run(config_for(model, pictures, halves, kind, streamed), progress=Listener())
    assert digest(last_checkpoint(halves)) == whole
    assert again.adapter is not None
    first, second = load_file(result.adapter), load_file(again.adapter)
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)
    if kind == "pissa":
        assert "start" in last_checkpoint(halves).tensors


def test_another_kind_does_not_go_on_and_what_nobody_reads_is_refused_before_a_step(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(config_for(model, pictures, tmp_path, "oft", {"train.steps": 3}), progress=Listener())
    with pytest.raises(UserError, match=r"method\.block_size"):
        train_run(
            config_for(model, pictures, tmp_path, "oft", {"method": {"kind": "oft", "block_size": 4}}),
            progress=Listener(),
        )
    with pytest.raises(AdapterError, match="Kronecker"):
        train_run(
            config_for(model, pictures, tmp_path / "lokr", "lokr", {"save.format": "comfy"}),
            progress=Listener(),
        )
    unread = config_for(model, pictures, tmp_path / "loha", "loha", {"save.format": "diffusers"})
    monkeypatch.setattr(Flux, "export", replace(Flux.export, comfyui=False))
    for start in (check_run, train_run):
        with pytest.raises(AdapterError, match="no program loads LoHa"):
            start(unread, progress=Listener())
    assert not list((tmp_path / "loha").rglob("data_report.json"))  # before any work on data
