"""Whole runs on clips, from a first frame, with references, and with holes: they learn, sample, validate, resume."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_files import clip_bytes, clip_with_caption
from PIL import Image
from runs import digest, last_checkpoint, run_config

from burnish.config.schema import RunConfig
from burnish.data.clips import inspect_clip
from burnish.errors import DataError
from burnish.events import Listener, StepReport
from burnish.run import train_run

TinyFolder = Callable[[str], Path]


class Losses(Listener):
    def __init__(self) -> None:
        self.found: list[float] = []
        self.drawn: list[Path] = []

    def stepped(self, report: StepReport) -> None:
        self.found.append(report.loss)

    def sampled(self, step: int, pictures: Any) -> None:
        self.drawn += pictures


def blobs(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and a still in `clips`; pictures in `pictures` with `references` and `masks` of the same names."""
    root = tmp_path_factory.mktemp("material")
    clip_with_caption(root / "clips" / "a.mp4", clip_bytes(30, 16))
    clip_with_caption(root / "clips" / "b.webm", clip_bytes(40, 25, kind="webm"))
    blobs(1).save(root / "clips" / "c.png")
    (root / "clips" / "c.txt").write_text("a still")
    for folder in ("pictures", "references", "masks"):
        (root / folder).mkdir()
    for number in range(3):
        blobs(number).save(root / "pictures" / f"{number}.png")
        (root / "pictures" / f"{number}.txt").write_text(f"picture {number}")
        blobs(10 + number).save(root / "references" / f"{number}.png")
        mask = np.zeros((64, 96), np.uint8)
        mask[:, : 32 * (number + 1)] = 255
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


def config_of(model: Path, folder: Path, output: Path, data: Mapping[str, Any], **more: Any) -> RunConfig:
    sources = [{"path": str(folder), "resolutions": [96], "bucket_step": 16, "flip": True, **data}]
    return run_config(model, folder, output, {"data": sources, "train.steps": 6, **more})


def trained(config: RunConfig) -> Losses:
    heard = Losses()
    train_run(config, progress=heard)
    assert np.isfinite(heard.found).all()
    return heard


def test_a_video_model_learns_from_clips_and_stills(tiny_folder: TinyFolder, material: Path, tmp_path: Path):
    sample = {
        "every": 3,
        "at_start": True,
        "size": [64, 96],
        "steps": 1,
        "prompts": ["a clip", {"prompt": "a still", "frames": 1}],
        "frames": 5,
    }
    validation = {"every": 3, "pictures": 1}
    config = config_of(
        tiny_folder("wan21"),
        material / "clips",
        tmp_path,
        {"frames": [1, 9], "clips": "spread", "spread": 2},
        **{"sample": sample, "train.validation": validation},
    )
    heard = trained(config)
    folder = tmp_path / "tiny" / "samples"
    names = [f"step-{step:08d}-{end}" for step in (0, 3, 6) for end in ("01.mp4", "02.png")]
    assert [path.name for path in heard.drawn] == names
    assert all((folder / name).exists() for name in names)
    assert inspect_clip(io.BytesIO((folder / names[0]).read_bytes()), max_megapixels=1).duration == 5 / 16
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 3 * 96
    report = json.loads((tmp_path / "tiny" / "data_report.json").read_text())
    assert report["sources"][0]["clips"] == 2
    assert {(one["frames"], one["clips"]) for one in report["buckets"] if "frames" in one} == {(1, 4), (9, 4)}


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clips": ("wan21", "clips", {"frames": [5]}),
    "first frame": ("wan21_i2v", "clips", {"frames": [5]}),
    "references": ("flux_kontext", "pictures", {"references": ["references"]}),
    "masks": ("flux_fill", "pictures", {"masks": "masks"}),
    "drawn holes": ("flux_fill", "pictures", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    case: str, tiny_folder: TinyFolder, material: Path, tmp_path: Path
):
    name, folder, options = CASES[case]
    data = {**options}
    if "references" in data:
        data["references"] = [str(material / one) for one in data["references"]]
    if "masks" in data:
        data["masks"] = str(material / data["masks"])

    def config(where: str, steps: int) -> RunConfig:
        changes = {"train.steps": steps, "train.schedule": {"kind": "constant"}, "save.every": 3}
        return config_of(tiny_folder(name), material / folder, tmp_path / where, data, **changes)

    straight = trained(config("straight", 6))
    trained(config("stopped", 3))
    rest = trained(config("stopped", 6))
    assert rest.found == straight.found[3:]
    assert digest(last_checkpoint(tmp_path / "stopped")) == digest(last_checkpoint(tmp_path / "straight"))


def test_what_is_seen_changes_what_is_learned(tiny_folder: TinyFolder, material: Path, tmp_path: Path):
    """The same pictures and seeds, with and without references: other losses from the first step on."""
    seen = {"references": [str(material / "references")]}
    losses = [
        trained(
            config_of(tiny_folder("flux_kontext"), material / "pictures", tmp_path / str(index), data)
        ).found
        for index, data in enumerate((seen, {}))
    ]
    assert losses[0][0] != losses[1][0]


def test_a_run_with_references_samples_with_them(tiny_folder: TinyFolder, material: Path, tmp_path: Path):
    reference = str(material / "references" / "0.png")
    prompts = ["a cat", {"prompt": "a cat", "seed": 0, "references": [reference]}]
    sample = {"every": 0, "at_start": False, "size": [64, 96], "steps": 1, "prompts": prompts}
    data = {"references": [str(material / "references")]}
    config = config_of(
        tiny_folder("flux_kontext"), material / "pictures", tmp_path, data, **{"sample": sample}
    )
    alone, shown = trained(config).drawn
    assert alone.read_bytes() != shown.read_bytes()
    assert json.loads(shown.with_suffix(".json").read_text())["references"] == [reference]


def test_a_wrong_number_of_frames_ends_before_a_model_loads(
    tiny_folder: TinyFolder, material: Path, tmp_path: Path
):
    config = config_of(tiny_folder("wan21"), material / "clips", tmp_path, {"frames": [6]})
    with pytest.raises(DataError, match=r"Take 5 or 9"):
        train_run(config, progress=Listener())
