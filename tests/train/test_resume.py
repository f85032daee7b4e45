"""Resume is exact: a run that is interrupted and goes on ends in the same bits (RELIABILITY T5, T6)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import last_checkpoint, picture_folder, run_config, short_prompts
from safetensors.torch import load_file, save_file

from burnish.data.batch import Batch
from burnish.errors import Interrupted, UserError
from burnish.events import Listener, StepReport
from burnish.objective import Denoising
from burnish.run import train_run

STEPS = 200
ACCUMULATE = 2
EPOCH = 3  # batches of 2 from 6 pictures

OPTIMIZERS = {
    "adamw": {"kind": "adamw", "learning_rate": 1e-3},
    "prodigy": {"kind": "prodigy", "learning_rate": 1.0},
}


class Watch:
    """Notes every micro-batch's samples, noise and times, and sends SIGINT within a chosen micro-step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, tuple[str, ...], float]] = []
        self.kill_within: int | None = None
        original = Denoising.draw_noise

        def draw_noise(objective: Denoising, batch: Batch, seed: int) -> torch.Tensor:
            noise = original(objective, batch, seed)
            self.seen.append((batch.position, batch.sample_ids, float(noise.sum())))
            if batch.position == self.kill_within:
                os.kill(os.getpid(), signal.SIGINT)
            return noise

        patch.setattr(Denoising, "draw_noise", draw_noise)


def config_for(model: Path, pictures: Path, output: Path, optimizer: str, ema: bool, workers: int) -> Any:
    return run_config(
        model,
        pictures,
        output,
        {
            "train.steps": STEPS,
            "train.accumulate": ACCUMULATE,
            "train.optimizer": OPTIMIZERS[optimizer],
            "train.ema": {"decay": 0.95} if ema else None,
            "train.loader_workers": workers,
            "memory.cache": "disk" if workers else "ram",
            "memory.cache_folder": str(output / "cache"),
        },
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "six")


@pytest.fixture(scope="module")
def model(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_prompts(tiny_flux, tmp_path_factory.mktemp("model") / "flux")


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_an_interrupted_run_ends_in_the_same_bits(
    model: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    ema: bool,
) -> None:
    watch = Watch(monkeypatch)
    train_run(config_for(model, pictures, tmp_path / "straight", optimizer, ema, 0), progress=Listener())
    expected, expected_order = last_checkpoint(tmp_path / "straight"), list(watch.seen)
    assert len(expected_order) == STEPS * ACCUMULATE

    moments = {
        "first step": ACCUMULATE - 1,
        "mid-accumulation": 37 * ACCUMULATE,
        "epoch edge": 20 * EPOCH - 1,
        "last but one": (STEPS - 1) * ACCUMULATE - 1,
    }
    for workers in (0, 2):
        for label, position in moments.items():
            output = tmp_path / f"{workers}-{position}"
            config = config_for(model, pictures, output, optimizer, ema, workers)
            watch.seen.clear()
            watch.kill_within = position
            with pytest.raises(Interrupted) as stopped:
                train_run(config, progress=Listener())
            assert stopped.value.exit_code == 130
            assert last_checkpoint(output).step == position // ACCUMULATE + 1, label
            watch.kill_within = None
            train_run(config, progress=Listener())
            assert watch.seen == expected_order, label
            assert_equal(last_checkpoint(output), expected, f"{label}, {workers} workers")


def assert_equal(found: Any, expected: Any, label: str) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for file, tensors in expected.tensors.items():
        assert found.tensors[file].keys() == tensors.keys(), f"{label}: {file}"
        for name, tensor in tensors.items():
            assert torch.equal(found.tensors[file][name], tensor), f"{label}: {file}/{name}"
    assert found.state == expected.state, label


def test_three_restarts_in_a_chain(
    tiny_sd15: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {"train.steps": 12, "train.accumulate": 2}
    train_run(run_config(tiny_sd15, pictures, tmp_path / "straight", overrides), progress=Listener())
    watch = Watch(monkeypatch)
    config = run_config(tiny_sd15, pictures, tmp_path / "chain", overrides)
    for position in (3, 8, 19):
        watch.kill_within = position
        with pytest.raises(Interrupted):
            train_run(config, progress=Listener())
    watch.kill_within = None
    result = train_run(config, progress=Listener())
    assert result.state == "done"
    assert_equal(last_checkpoint(tmp_path / "chain"), last_checkpoint(tmp_path / "straight"), "chain")


class Steps(Listener):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.warnings: list[str] = []

    def stepped(self, report: StepReport) -> None:
        self.reports.append(report)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def longer(config: Any) -> Any:
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": 10})})


def other_batch(config: Any) -> Any:
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": 10, "batch_size": 3})})


def test_other_weights_behind_the_same_path_are_refused(
    tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    model = short_prompts(tiny_flux, tmp_path / "model")
    train_run(run_config(model, pictures, tmp_path, {"train.steps": 3}), progress=Listener())
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="weights are not those"):
        train_run(run_config(model, pictures, tmp_path, {"train.steps": 4}), progress=Listener())


def test_a_changed_caption_is_said(tiny_flux: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "mine")
    train_run(run_config(tiny_flux, folder, tmp_path, {"train.steps": 3}), progress=Listener())
    (folder / "0.txt").write_text("a sks green chair")
    steps = Steps()
    train_run(run_config(tiny_flux, folder, tmp_path, {"train.steps": 5}), progress=steps)
    assert any("captions or their settings changed" in text for text in steps.warnings), steps.warnings


def test_adapters_that_a_kill_left_out_are_written_on_resume(
    tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    train_run(run_config(tiny_flux, pictures, tmp_path, {"train.steps": 3}), progress=Listener())
    lost = tmp_path / "tiny" / "adapters" / "tiny-00000003.safetensors"
    before = load_file(lost)
    lost.unlink()
    train_run(run_config(tiny_flux, pictures, tmp_path, {"train.steps": 5}), progress=Listener())
    after = load_file(lost)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "said"),
    [(longer, "train.steps: 6 -> 10"), (other_batch, "an epoch had 3 batches and now has 2")],
)
def test_a_changed_config_is_said_and_the_run_goes_on(
    tiny_flux: Path, pictures: Path, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    config = run_config(tiny_flux, pictures, tmp_path, {"train.steps": 6})
    train_run(config, progress=Listener())
    steps = Steps()
    result = train_run(change(config), progress=steps)
    assert [report.step for report in steps.reports] == [7, 8, 9, 10]
    assert result.step == 10
    assert any(said in text for text in steps.warnings), steps.warnings
