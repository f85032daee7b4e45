"""A batch that is learned in parts teaches what it does as a whole, and a run goes on in the parts it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import last_checkpoint, picture_folder, run_config

from burnish.config.schema import Memory, RunConfig
from burnish.data.batch import Batch
from burnish.events import Listener, StepReport
from burnish.families.flux import Flux
from burnish.objective import Denoising
from burnish.run import train_run
from burnish.run_folder import RunFolder
from burnish.settling import pinned

TinyFolder = Callable[[str], Path]
# Six pictures in batches of four: every second one is smaller. Steps by the gradient as it is show what differs in it.
COMMON: dict[str, Any] = {
    "method.dropout": 0.0,
    "train.steps": 3,
    "train.schedule": {"kind": "constant"},
    "train.batch_size": 4,
    "train.accumulate": 2,
    "train.optimizer": {"kind": "custom", "class_path": "torch.optim.SGD", "learning_rate": 0.5},
    "train.max_grad_norm": 1000.0,
    "sample.prompts": [],
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapters": ("flux", {}),
    "text encoders": ("sd15", {"method.text_encoders": {"which": ["clip_l"]}}),
    "vae": ("sd15", {"method": {"kind": "vae", "crop": 64}, "train.optimizer.learning_rate": 0.01}),
}


class Reports(Listener):
    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def stepped(self, report: StepReport) -> None:
        self.steps.append(report)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "six")


def run_in(parts: int | str, name: str, model: Path, pictures: Path, output: Path, **more: Any) -> RunConfig:
    values = COMMON | RUNS[name][1] | {"memory.batch_parts": parts} | more
    if name == "vae":
        del values["method.dropout"]
        values["data.0.captions"] = {}
    return run_config(model, pictures, output, values)


@pytest.mark.parametrize("name", RUNS)
def test_parts_teach_what_the_whole_batch_does(
    tiny_folder: TinyFolder, pictures: Path, tmp_path: Path, name: str
) -> None:
    learned, steps = {}, {}
    for parts in (1, 2, 4):
        reports, output = Reports(), tmp_path / str(parts)
        train_run(run_in(parts, name, tiny_folder(RUNS[name][0]), pictures, output), progress=reports)
        learned[parts] = last_checkpoint(output).tensors["adapter"]
        steps[parts] = [(one.loss, one.grad_norm) for one in reports.steps]
    for parts in (2, 4):
        torch.testing.assert_close(torch.tensor(steps[parts]), torch.tensor(steps[1]), rtol=1e-4, atol=0)
        assert learned[parts].keys() == learned[1].keys()
        for key, value in learned[1].items():
            torch.testing.assert_close(learned[parts][key], value, rtol=1e-3, atol=1e-6)


def test_a_part_is_all_that_the_model_sees_at_once(
    tiny_folder: TinyFolder, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, rows = Flux.predict, list[int]()

    held_out: list[int] = []

    def watched(family: Flux, noisy: torch.Tensor, *told: Any) -> torch.Tensor:
        (rows if torch.is_grad_enabled() else held_out).append(len(noisy))
        return predict(family, noisy, *told)

    monkeypatch.setattr(Flux, "predict", watched)
    more = {"train.steps": 2, "train.batch_size": 3, "train.accumulate": 1}
    more |= {"train.validation": {"every": 2, "pictures": 2, "times": [0.5]}}
    train_run(run_in(2, "adapters", tiny_folder("flux"), pictures, tmp_path, **more), progress=Listener())
    assert rows in ([2, 1, 1], [1, 2, 1])  # four pictures: three, and one that is left over
    assert set(held_out) == {1}


def test_a_run_goes_on_in_the_parts_that_its_first_start_chose(
    tiny_folder: TinyFolder, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_noise, seen = Denoising.draw_noise, list[int]()

    def watched(objective: Denoising, batch: Batch, seed: int) -> torch.Tensor:
        seen.append(len(batch.sample_ids))
        return draw_noise(objective, batch, seed)

    monkeypatch.setattr(Denoising, "draw_noise", watched)
    model = tiny_folder("flux")
    more: dict[str, Any] = {"train.accumulate": 1, "save.every": 1, "memory.budget": "2GiB", "train.steps": 2}
    config = run_in("auto", "adapters", model, pictures, tmp_path, **more)
    train_run(config, progress=Listener())
    assert sorted(seen) == [2, 4]
    file = RunFolder(config.save.folder / config.name).plan
    told = json.loads(file.read_text())
    assert told["batch_parts"] == 1
    file.write_text(json.dumps(told | {"batch_parts": 2}))
    seen.clear()
    more["train.steps"] = 4
    train_run(run_in("auto", "adapters", model, pictures, tmp_path, **more), progress=Listener())
    assert sorted(seen) == [1, 1, 2, 2]
    assert json.loads(file.read_text())["batch_parts"] == 2


@pytest.mark.parametrize(
    ("kept", "section", "batch_size", "parts"),
    [
        ({"batch_parts": 2, "batch_size": 4}, Memory(), 4, 2),
        ({"batch_parts": 2, "batch_size": 4}, Memory(), 8, "auto"),  # parts of another batch say nothing
        ({"batch_parts": 2, "batch_size": 4}, Memory(batch_parts=3), 4, 3),
        ({"batch_parts": 2, "batch_size": 4}, Memory(gradient_release=True), 4, "auto"),
        ({"weights": "int8"}, Memory(), 4, 1),  # from before there were parts
        ({}, Memory(), 4, "auto"),
    ],
)
def test_parts_are_pinned_for_the_batch_that_they_are_of(
    tmp_path: Path, kept: dict[str, Any], section: Memory, batch_size: int, parts: int | str
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    folder.plan.write_text(json.dumps(kept))
    assert pinned(section, folder, batch_size).batch_parts == parts
