"""Prior preservation and regularization sets: any other of the class is drawn as before, and a resume is exact."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import digest, last_checkpoint, picture_folder, run_config, short_prompts
from torch import Tensor

from burnish.config.schema import Memory, Model, RunConfig
from burnish.data.batch import Batch
from burnish.data.prepare import pixels_of
from burnish.errors import DataError, Interrupted
from burnish.events import Listener
from burnish.generate import draw_pictures_with
from burnish.objective import Denoising
from burnish.run import train_run
from burnish.run_folder import RunFolder
from burnish.sampling.sampler import PictureRequest

CLASS, SUBJECT = "a blue star on a white background", "a sks on a white background"


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that no star is like, without a caption of its own."""
    folder = tmp_path_factory.mktemp("subject")
    values = np.zeros((128, 128, 3), np.uint8)
    values[:, ::16, 0] = 255
    values[32:96, 32:96, 1] = 200
    Image.fromarray(values).save(folder / "a.png")
    return folder


def drawn(prompt: str, *adapters: Path) -> Tensor:
    """Three pictures by the demo model with seeds that no source of pictures has."""
    requests = [
        PictureRequest(prompt=prompt, seed=700 + seed, height=128, width=128, steps=8) for seed in range(3)
    ]
    pictures = draw_pictures_with(
        Model(path="demo"),
        requests,
        adapters=[(one, 1.0) for one in adapters],
        memory=Memory(),
        device="cpu",
        precision="fp32",
        batch_size=3,
        progress=lambda done, of: None,
    )
    return torch.stack([pixels_of(one) for one in pictures if isinstance(one, Image.Image)])


def test_with_pictures_of_the_class_other_members_are_drawn_as_before(subject: Path, tmp_path: Path) -> None:
    taught = {"path": str(subject), "resolutions": [128], "repeats": 4, "captions": {"default": SUBJECT}}
    of_class = {"kind": "generated", "prompts": [CLASS], "count": 4, "steps": 8, "resolutions": [128]}
    before = {prompt: drawn(prompt) for prompt in (CLASS, SUBJECT)}
    change: dict[tuple[str, str], float] = {}
    for name, data in (("alone", [taught]), ("beside", [taught, of_class])):
        changes = {
            "data": data,
            "method": {"rank": 8, "targets": "all"},
            "train.steps": 50,
            "train.optimizer.learning_rate": 2e-3,
            "train.schedule": {"kind": "constant"},
        }
        result = train_run(run_config(Path("demo"), subject, tmp_path, changes, name), progress=Listener())
        assert result.adapter is not None
        for prompt, were in before.items():
            change[name, prompt] = float((drawn(prompt, result.adapter) - were).square().mean())
    # Without them the class is gone; with them it is there, and the subject is learned all the same.
    assert change["alone", CLASS] > 0.5 * change["alone", SUBJECT]
    assert change["beside", CLASS] < 0.15 * change["alone", CLASS]
    assert change["beside", SUBJECT] > 0.5 * change["alone", SUBJECT]


@pytest.fixture(scope="module")
def model(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_prompts(tiny_flux, tmp_path_factory.mktemp("model") / "flux")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned pictures, and of each the left half as a mask."""
    folder = picture_folder(tmp_path_factory.mktemp("pictures") / "six")
    (folder.parent / "masks").mkdir()
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    for picture in folder.glob("*.png"):
        Image.fromarray(left).save(folder.parent / "masks" / picture.name)
    return folder


def everything_kept(model: Path, pictures: Path, output: Path, classes: Path) -> RunConfig:
    """Masks with a prior, the class word preserved, a regularization set, and pictures of the class."""
    config = run_config(model, pictures, output, {"trigger": "sks", "train.steps": 7})
    values: dict[str, Any] = config.model_dump(mode="json")
    values["data"][0] |= {
        "loss_masks": {"path": str(pictures.parent / "masks"), "prior": 0.5},
        "preserve": {"word": "cat"},
    }
    further = {"resolutions": [64]}
    values["data"] += [
        {**further, "path": str(classes), "role": "regularization", "target": "model"},
        {**further, "kind": "generated", "prompts": ["a cat"], "count": 5, "steps": 1, "path": str(classes)},
    ]
    return RunConfig.model_validate(values)


def test_an_interrupted_run_with_all_that_preserves_ends_in_the_same_bits(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = picture_folder(tmp_path / "classes", count=3)
    (classes / "2.txt").unlink()
    straight = everything_kept(model, pictures, tmp_path / "straight", classes)
    straight = with_caption(straight)
    train_run(straight, progress=Listener())
    expected = digest(last_checkpoint(tmp_path / "straight"))
    kinds: set[tuple[bool, bool]] = set()
    draw = Denoising.draw_noise

    def draw_and_stop(objective: Denoising, batch: Batch, seed: int) -> Tensor:
        assert batch.counted is not None
        kept = batch.kept if batch.kept is not None else torch.zeros_like(batch.counted)
        kinds.update(
            (bool(one.any()), bool(other.any())) for one, other in zip(batch.counted, kept, strict=True)
        )
        if batch.position == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(objective, batch, seed)

    stopped = with_caption(everything_kept(model, pictures, tmp_path / "stopped", classes))
    monkeypatch.setattr(Denoising, "draw_noise", draw_and_stop)
    with pytest.raises(Interrupted):
        train_run(stopped, progress=Listener())
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "stopped").step == 5
    train_run(stopped, progress=Listener())
    assert digest(last_checkpoint(tmp_path / "stopped")) == expected
    assert {(True, True), (False, True)} <= kinds, (
        "masks with a prior, and samples held to the model as it was"
    )


def with_caption(config: RunConfig) -> RunConfig:
    values = config.model_dump(mode="json")
    values["data"][1]["captions"]["default"] = "a thing"
    return RunConfig.model_validate(values)


def test_only_what_is_missing_of_the_class_is_drawn(model: Path, pictures: Path, tmp_path: Path) -> None:
    classes = picture_folder(tmp_path / "classes", count=3)
    (classes / "2.txt").unlink()
    there = sorted(path.name for path in classes.iterdir())
    own = {"kind": "generated", "prompts": ["a cat", "a hat"], "steps": 1, "path": str(classes)}

    def run(name: str, **changes: Any) -> tuple[list[str], list[int]]:
        """The prompts that were drawn, and how many pictures of each source are used."""
        values = run_config(model, pictures, tmp_path, {"train.steps": 3}, name).model_dump(mode="json")
        values["data"].append({**own, "resolutions": [64], **changes})
        train_run(RunConfig.model_validate(values), progress=Listener())
        folder = RunFolder(tmp_path / name)
        prompts = sorted(path.read_text().strip() for path in (folder.path / "prior").rglob("*.txt"))
        return prompts, [one["used"] for one in json.loads(folder.data_report.read_text())["sources"]]

    assert run("some", count=5) == (["a cat", "a hat"], [6, 2, 3])
    assert run("none", count=3) == ([], [6, 3])
    (tmp_path / "empty").mkdir()
    assert run("all", count=2, path=str(tmp_path / "empty")) == (["a cat", "a hat"], [6, 2])
    assert sorted(path.name for path in classes.iterdir()) == there
    with pytest.raises(DataError, match="nowhere"):
        run("typo", count=2, path=str(tmp_path / "nowhere"))
