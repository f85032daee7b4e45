"""What a config leaves open is chosen before a run loads anything, and stepped down when it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from runs import last_checkpoint, picture_folder, run_config

from burnish import settling
from burnish.config.schema import RunConfig
from burnish.errors import OutOfMemory, UserError
from burnish.events import Listener
from burnish.families.flux import Flux
from burnish.objective import Denoising
from burnish.run import train_run
from burnish.run_folder import RunFolder

SHORT: dict[str, Any] = {"train.steps": 3, "train.precision": "fp32", "sample.prompts": []}


class Said(Listener):
    def __init__(self) -> None:
        self.plans: list[str] = []
        self.warnings: list[str] = []

    def planned(self, text: str) -> None:
        self.plans.append(text)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return picture_folder(tmp_path / "pictures")


@pytest.fixture(scope="module")
def tiny_flux(tiny_folder: Any) -> Path:
    return Path(tiny_folder("flux"))


def plan_of(config: RunConfig) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(RunFolder(config.save.folder / config.name).plan.read_text())
    return told


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(last_checkpoint(folder).tensors["adapter"])


def test_a_run_within_a_budget_learns_what_one_without_does(
    tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    plain = run_config(tiny_flux, pictures, tmp_path / "plain", SHORT)
    train_run(plain, progress=Listener())
    assert not RunFolder(plain.save.folder / plain.name).plan.exists()
    said = Said()
    within = run_config(tiny_flux, pictures, tmp_path / "within", SHORT | {"memory.budget": "2GiB"})
    train_run(within, progress=said)
    (told,) = said.plans
    assert "weights native, keep" in told
    assert plan_of(within)["activations"] == "keep"
    assert plan_of(within)["predicted_bytes"] > 0
    learned, expected = adapter_of(tmp_path / "within"), adapter_of(tmp_path / "plain")
    assert all(torch.equal(learned[name], value) for name, value in expected.items())


def test_what_is_pinned_by_hand_is_not_chosen(tiny_flux: Path, pictures: Path, tmp_path: Path) -> None:
    pins = {"memory.budget": "2GiB", "memory.activations": "recompute", "memory.weights": "native"}
    config = run_config(tiny_flux, pictures, tmp_path, SHORT | pins)
    train_run(config, progress=Listener())
    assert plan_of(config)["activations"] == "recompute"


def test_a_budget_that_nothing_fits_into_is_refused_before_anything_loads(
    tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    config = run_config(tiny_flux, pictures, tmp_path, SHORT | {"memory.budget": "0.9GiB"})
    with pytest.raises(UserError, match=r"nothing fits into 0\.9 GiB") as error:
        train_run(config, progress=Listener())
    assert "data.resolutions" in str(error.value.remedy)


def test_a_first_step_that_does_not_fit_is_tried_with_less(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_config(tiny_flux, pictures, tmp_path / "plain", SHORT)
    train_run(plain, progress=Listener())
    original, seen, failed = Denoising.draw_noise, [], []

    def draw_noise(objective: Denoising, batch: Any, seed: int) -> torch.Tensor:
        seen.append(batch.position)
        if len(seen) == 1:
            activations = torch.ones(3)
            failed.append(ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(objective, batch, seed)

    monkeypatch.setattr(Denoising, "draw_noise", draw_noise)
    modes = []
    changed = settling.set_activations

    def set_activations(blocks: Any, chosen: Any) -> None:
        assert failed[0]() is None, "what did not fit is still there"
        modes.append(chosen)
        changed(blocks, chosen)

    monkeypatch.setattr(settling, "set_activations", set_activations)
    said = Said()
    small = run_config(tiny_flux, pictures, tmp_path / "small", SHORT | {"memory.budget": "2GiB"})
    train_run(small, progress=said)
    assert seen == [0, 0, 1, 2]
    assert "recompute" in modes[0]
    (warning,) = [text for text in said.warnings if "did not fit" in text]
    assert "step 1 did not fit in memory; going on with" in warning
    learned, expected = adapter_of(tmp_path / "small"), adapter_of(tmp_path / "plain")
    assert all(torch.equal(learned[name], value) for name, value in expected.items())


def test_a_first_step_that_does_not_fit_may_stream_more(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_config(tiny_flux, pictures, tmp_path / "plain", SHORT)
    train_run(plain, progress=Listener())
    planned = settling.plan_run

    def with_streaming(*arguments: Any, **options: Any) -> Any:
        """A tiny model has too few blocks for streaming to free anything: as if it had more."""
        plan = planned(*arguments, **options)
        streamed = replace(plan.choice, settings=replace(plan.choice.settings, stream=1.0))
        return replace(plan, fallbacks=(streamed,))

    monkeypatch.setattr(settling, "plan_run", with_streaming)
    streams = []
    changed = settling.stream_weights

    def stream_weights(*arguments: Any) -> Any:
        streams.append(changed(*arguments))
        return streams[-1]

    monkeypatch.setattr(settling, "stream_weights", stream_weights)
    original, failed = Denoising.draw_noise, []

    def draw_noise(objective: Denoising, batch: Any, seed: int) -> torch.Tensor:
        if not failed:
            failed.append(batch.position)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(objective, batch, seed)

    monkeypatch.setattr(Denoising, "draw_noise", draw_noise)
    said = Said()
    small = run_config(tiny_flux, pictures, tmp_path / "small", SHORT | {"memory.budget": "2GiB"})
    train_run(small, progress=said)
    (warning,) = [text for text in said.warnings if "did not fit" in text]
    assert "going on with keep, 100% of block weights streamed" in warning
    (stream,) = streams
    assert stream.host_bytes > 0
    learned, expected = adapter_of(tmp_path / "small"), adapter_of(tmp_path / "plain")
    assert all(torch.equal(learned[name], value) for name, value in expected.items())


def test_a_later_step_that_does_not_fit_ends_the_run(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, tried = Denoising.draw_noise, []

    def draw_noise(objective: Denoising, batch: Any, seed: int) -> torch.Tensor:
        tried.append(batch.position)
        if batch.position == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(objective, batch, seed)

    monkeypatch.setattr(Denoising, "draw_noise", draw_noise)
    config = run_config(tiny_flux, pictures, tmp_path, SHORT | {"memory.budget": "2GiB"})
    with pytest.raises(OutOfMemory, match="the state of step 2 is saved"):
        train_run(config, progress=Listener())
    assert tried == [0, 1, 2]


def test_a_resumed_run_keeps_the_weights_it_began_with(
    tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    config = run_config(tiny_flux, pictures, tmp_path, SHORT | {"memory.budget": "2GiB"})
    train_run(config, progress=Listener())
    folder = RunFolder(config.save.folder / config.name)
    folder.plan.write_text(json.dumps(plan_of(config) | {"weights": "int8"}))
    longer = run_config(tiny_flux, pictures, tmp_path, SHORT | {"memory.budget": "2GiB", "train.steps": 4})
    said = Said()
    train_run(longer, progress=said)
    assert "weights int8" in said.plans[0]


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.tolist])
def test_a_model_that_cannot_be_traced_trains_all_the_same(
    tiny_flux: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[torch.Tensor], object],
) -> None:
    predict = Flux.predict

    def reads_a_number(family: Flux, noisy: torch.Tensor, *others: Any) -> torch.Tensor:
        assert read(noisy.detach().sum()) is not None
        return predict(family, noisy, *others)

    monkeypatch.setattr(Flux, "predict", reads_a_number)
    said = Said()
    cache = {"memory.cache_folder": tmp_path / "cache"}  # nothing traced before
    config = run_config(tiny_flux, pictures, tmp_path, SHORT | {"memory.budget": "2GiB"} | cache)
    assert train_run(config, progress=said).step == 3
    assert any("cannot be planned" in text for text in said.warnings)
