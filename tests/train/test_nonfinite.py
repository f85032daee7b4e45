"""NaN and infinity stop before the update, and are never saved (law L5)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import last_checkpoint, picture_folder, run_config

from burnish.data.batch import Batch
from burnish.errors import NonFiniteLoss
from burnish.events import Listener
from burnish.objective import Denoising
from burnish.run import train_run
from burnish.run_folder import RunFolder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "six")


def poison(patch: pytest.MonkeyPatch, position: int, value: float) -> None:
    """From now on the noise of one sample at one micro-step holds `value`."""
    original = Denoising.draw_noise

    def draw_noise(objective: Denoising, batch: Batch, seed: int) -> torch.Tensor:
        noise = original(objective, batch, seed)
        if batch.position == position:
            noise[0, 0, 0, 0] = value
        return noise

    patch.setattr(Denoising, "draw_noise", draw_noise)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_run_stops_before_the_update_and_names_the_sample(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    config = run_config(tiny_flux, pictures, tmp_path, {"save.every": 1})
    poison(monkeypatch, 5, value)
    with pytest.raises(NonFiniteLoss, match=r"step 6: the loss is not finite.*\.png at t = ") as raised:
        train_run(config, progress=Listener())
    assert raised.value.positions == (5,)
    loaded = last_checkpoint(tmp_path)
    assert loaded.step == 5
    assert all(torch.isfinite(t).all() for file in loaded.tensors.values() for t in file.values())
    status = RunFolder(tmp_path / "tiny").status()
    assert status is not None
    assert status.state == "failed"
    assert "not finite" in status.message


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_roll_back_skips_the_batch_and_counts_it(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    overrides = {
        "save.every": 2,
        "train.precision": precision,
        "train.on_nonfinite": {"kind": "rollback", "max_batches": 1},
    }
    config = run_config(tiny_flux, pictures, tmp_path, overrides)
    poison(monkeypatch, 5, float("nan"))
    result = train_run(config, progress=Listener())
    assert result.state == "done"
    loaded = last_checkpoint(tmp_path)
    assert loaded.state["skipped"] == [5]
    assert loaded.state["position"] == 9  # 8 steps and the one batch passed over
    assert any("1 batch" in note for note in result.notes)


def test_more_bad_batches_than_allowed_stop_the_run(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {"save.every": 2, "train.on_nonfinite": {"kind": "rollback", "max_batches": 1}}
    poison(monkeypatch, 3, float("nan"))
    poison(monkeypatch, 5, float("nan"))
    with pytest.raises(NonFiniteLoss):
        train_run(run_config(tiny_flux, pictures, tmp_path, overrides), progress=Listener())


def test_of_a_step_with_several_batches_only_the_one_at_fault_is_skipped(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {
        "save.every": 2,
        "train.accumulate": 3,
        "train.on_nonfinite": {"kind": "rollback", "max_batches": 1},
    }
    poison(monkeypatch, 10, float("nan"))
    result = train_run(run_config(tiny_flux, pictures, tmp_path, overrides), progress=Listener())
    assert result.state == "done"
    assert last_checkpoint(tmp_path).state["skipped"] == [10]


def test_weights_that_cannot_be_saved_end_a_run_that_would_roll_back_for_ever(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update itself made them infinite: there is no batch to skip."""
    original = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *arguments: object) -> None:
        original(optimizer, *arguments)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    overrides = {"save.every": 1, "train.on_nonfinite": {"kind": "rollback"}}
    with pytest.raises(NonFiniteLoss):
        train_run(run_config(tiny_flux, pictures, tmp_path, overrides), progress=Listener())
