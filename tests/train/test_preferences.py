"""Preferences on the embedded demo model, and runs that teach a difference, resumed: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from runs import digest, last_checkpoint, picture_folder, run_config, short_prompts

from burnish.config.schema import Model
from burnish.data.prepare import pixels_of
from burnish.diffusion.mixing import noisy_and_target
from burnish.events import Listener, StepReport
from burnish.generate import attach_adapter
from burnish.model import choose_model
from burnish.run import train_run
from burnish.run_folder import RunFolder

SIDE, CAPTION = 128, "a red circle on a white background"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Circles that are wanted, and squares of the same colour and place that are not."""
    folder = tmp_path_factory.mktemp("pairs")
    for number, (x, y) in enumerate([(64, 64), (56, 70), (72, 60), (60, 56)]):
        for name in ("wanted", "unwanted"):
            picture = Image.new("RGB", (SIDE, SIDE), "white")
            ink, box = ImageDraw.Draw(picture), (x - 30, y - 30, x + 30, y + 30)
            ink.ellipse(box, fill="red") if name == "wanted" else ink.rectangle(box, fill="red")
            (folder / name).mkdir(exist_ok=True)
            picture.save(folder / name / f"{number}.png")
    return folder


class Accuracies(Listener):
    def __init__(self) -> None:
        self.found: list[float] = []

    def stepped(self, report: StepReport) -> None:
        if report.accuracy is not None:  # a step of pairs
            self.found.append(report.accuracy)


@torch.no_grad()
def test_what_is_preferred_becomes_easier_to_say_and_what_is_not_becomes_harder(
    pairs: Path, tmp_path: Path
) -> None:
    """Beside the pairs the preferred pictures are learned as such: pairs alone leave their own error free to rise."""
    source = {
        "path": str(pairs / "wanted"),
        "resolutions": [SIDE],
        "captions": {"default": CAPTION},
        "repeats": 8,
        "preference": {"rejected": str(pairs / "unwanted"), "beta": 500},
    }
    plain = {name: source[name] for name in ("path", "resolutions", "captions", "repeats")}
    values = {
        "data": [source, plain],
        "model.path": "demo",
        "method": {"rank": 4, "targets": "attention"},
        "train.steps": 24,
        "train.batch_size": 2,
        "train.schedule": {"kind": "constant"},
        "train.validation": {"every": 100, "pictures": 1},
    }
    heard = Accuracies()
    with torch.enable_grad():
        result = train_run(run_config(Path("demo"), pairs, tmp_path, values, "preferred"), progress=heard)
    assert result.best_loss is not None  # of a pair that was held out, and of its preferred picture
    assert heard.found[0] == 0.5  # nothing learned yet
    assert sum(heard.found[-6:]) / 6 > 0.8
    logged = RunFolder(tmp_path / "preferred").metrics("accuracy")
    assert [value for _, value in logged] == heard.found

    family = choose_model(Model(path="demo")).load(
        "denoiser", "vae", "text_encoders", dtype=torch.float32, device="cpu"
    )
    t_B = torch.tensor([0.3, 0.5, 0.7, 0.9])
    told = family.encode_prompts([CAPTION]).rows([0] * len(t_B))
    noise = torch.randn(4, *family.latents.of(SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    latents = {
        name: family.encode_pixels(pixels_of(Image.open(pairs / name / "0.png"))[None])
        for name in ("wanted", "unwanted")
    }

    def errors() -> dict[str, float]:
        found = {}
        for name, one in latents.items():
            noisy, target = noisy_and_target(family.schedule, one.expand_as(noise), noise, t_B)
            found[name] = float((family.predict(noisy, t_B, told) - target).square().mean())
        return found

    before = errors()
    assert result.adapter is not None
    attach_adapter(family, result.adapter, print)
    after = errors()
    relative = {name: after[name] / before[name] for name in before}
    assert relative["wanted"] < 1 < relative["unwanted"], relative
    assert relative["wanted"] < 0.97 * relative["unwanted"], relative


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "direction": (
        "flux",
        {"slider": {"target": "a", "positive": "b", "negative": "c", "preserve": ["d", "e"]}},
    ),
    "opposites": ("sd15", {"slider": {"kind": "pictures", "opposite": "OTHERS"}, "flip": True}),
    "guided": ("flux", {}),
    "preference": ("sdxl", {"preference": {"rejected": "OTHERS"}, "flip": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_ends_in_the_same_bits(kind: str, tiny_folder: Any, tmp_path: Path) -> None:
    name, options = KINDS[kind]
    model = tiny_folder(name)
    if name == "flux":
        model = short_prompts(model, tmp_path / "flux")
    pictures = picture_folder(tmp_path / "pictures", 3)
    (tmp_path / "others").mkdir()
    for file in pictures.glob("*.png"):
        Image.open(file).rotate(90).save(tmp_path / "others" / file.name)
    told = {
        key: {name: str(tmp_path / "others") if value == "OTHERS" else value for name, value in one.items()}
        if isinstance(one, dict)
        else one
        for key, one in options.items()
    }
    source = {"path": str(pictures), "resolutions": [64], **told}
    ends = {}
    outputs = {"whole": [4], "stopped": [2, 4]}
    for output, stops in (outputs | ({"plain": [4]} if kind == "guided" else {})).items():
        for steps in stops:
            values = {
                "data": [source],
                "train.steps": steps,
                "train.schedule": {"kind": "constant"},
                "save.every": 2,
                "train.accumulate": 2,
                "train.objective.guided_target": 3.5 if kind == "guided" and output != "plain" else None,
            }
            train_run(run_config(model, pictures, tmp_path / output, values), progress=Listener())
        ends[output] = digest(last_checkpoint(tmp_path / output))
        first = tmp_path / output / "tiny" / "checkpoints" / "step-00000002"
        assert first.exists()
    assert ends["whole"] == ends["stopped"]
    assert ends.get("plain") != ends["whole"]
