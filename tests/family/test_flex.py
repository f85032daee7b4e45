"""Flex among its relatives: the same transformer, told apart by its depth and by what it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from burnish.config.data import Folder
from burnish.data.cache import CacheKeys, RamCache
from burnish.data.preflight import prepare_samples
from burnish.data.prepare import encode_latents
from burnish.errors import ModelError
from burnish.families.flex1 import Flex1
from burnish.families.flex2 import Flex2
from burnish.families.flux import Flux
from burnish.families.registry import detect_family
from burnish.family import ModelSource

TinyFolder = Callable[[str], Path]


def renamed(folder: Path, copy: Path, kind: str, **transformer: int) -> ModelSource:
    """A copy of a diffusers folder as a pipeline of another class, with changes to its transformer's config."""
    shutil.copytree(folder, copy)
    for path, changes in (
        (copy / "model_index.json", {"_class_name": kind}),
        (copy / "transformer" / "config.json", transformer),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return ModelSource(str(copy))


@pytest.mark.parametrize("kind", ["Flex2Pipeline", "FluxControlPipeline", "FluxPipeline"])
def test_flex2_is_known_by_its_channels(tiny_folder: TinyFolder, tmp_path: Path, kind: str) -> None:
    assert detect_family(renamed(tiny_folder("flex2"), tmp_path / "copy", kind)) is Flex2


def test_flex1_is_known_by_its_depth(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("flex1")
    assert detect_family(renamed(folder, tmp_path / "8", "FluxPipeline")) is Flex1
    assert detect_family(renamed(folder, tmp_path / "7", "FluxPipeline", num_layers=7)) is Flux


def test_flux_that_follows_depth_or_edges_is_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    source = renamed(
        tiny_folder("flux"), tmp_path / "copy", "FluxControlPipeline", in_channels=128, out_channels=64
    )
    with pytest.raises(ModelError, match="takes 128 channels and gives 64"):
        Flux.load(source, frozenset(), dtype=torch.float32, device="cpu")


def test_without_guidance_the_embedding_is_bypassed(tiny_folder: TinyFolder) -> None:
    family = Flex1.load(
        ModelSource(str(tiny_folder("flex1"))), frozenset({"denoiser"}), dtype=torch.float32, device="cpu"
    )
    noisy, t_B, conditioning = family.example(64, 64, batch=1)
    bare = {name: tensor for name, tensor in conditioning.items() if name != "guidance_B"}
    with torch.no_grad():
        told = family.predict(noisy, t_B, conditioning)
        bypassed = family.predict(noisy, t_B, type(conditioning)(bare))
    assert not torch.allclose(told, bypassed, atol=1e-4)


@pytest.mark.parametrize("given", [(), ("lines",), ("masks",), ("lines", "masks")])
def test_flex2_learns_what_its_folders_hold(
    tiny_folder: TinyFolder, tmp_path: Path, given: tuple[str, ...]
) -> None:
    """Neither holes nor control pictures are made up for it."""
    family = Flex2.load(
        ModelSource(str(tiny_folder("flex2"))), frozenset({"vae"}), dtype=torch.float32, device="cpu"
    )
    for number, name in enumerate(("pictures", "lines", "masks")):
        (tmp_path / name).mkdir()
        noise = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(number))
        Image.fromarray((noise * 255).byte().numpy()).save(tmp_path / name / "0.png")
    (tmp_path / "pictures" / "0.txt").write_text("a thing")
    source = Folder(
        path=tmp_path / "pictures",
        references=[tmp_path / "lines"] if "lines" in given else [],
        masks=tmp_path / "masks" if "masks" in given else None,
        resolutions=[64],
        bucket_step=16,
    )
    (sample,) = prepare_samples([source], pixel_multiple=16, family=family).samples
    cache, keys = RamCache(), CacheKeys.of(family, torch.float32)
    encode_latents([sample], family, cache, keys, device="cpu")
    entry = cache.get("latents", keys.latents(sample, flip=False))
    assert entry is not None
    assert ("beside_BCHW" in entry) == bool(given)
    if given:
        picture, mask, control = entry["beside_BCHW"].split([16, 1, 16], dim=1)
        assert control.any() == ("lines" in given)
        assert picture.any() == ("masks" in given)
        assert mask.mean() < 1 if "masks" in given else mask.eq(1).all()
