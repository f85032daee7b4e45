"""Masks of the loss: they lie over their pictures at the latents' size, and weigh what they should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_files import clip_bytes, clip_with_caption
from PIL import Image
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.config.data import Folder, FolderMasks
from burnish.config.load import load_config
from burnish.data.batch import Batch
from burnish.data.cache import CacheKeys, RamCache
from burnish.data.loader import batches
from burnish.data.loss_masks import MASK, encode_masks, grid_of, loss_weights
from burnish.data.plan import BatchPlan
from burnish.data.preflight import PreparedData, prepare_samples
from burnish.data.prepare import LATENTS, load_pixels
from burnish.data.samples import Counts, Sample, hold_out
from burnish.errors import ConfigError, DataError
from burnish.families.registry import detect_family
from burnish.family import Capabilities, ModelSource
from burnish.latent_shape import LatentShape
from burnish.noise_schedule import Schedule
from burnish.objective import Denoising

LATENT = LatentShape(4, 8)
KEYS = CacheKeys("vae", "text", torch.float32)


def pattern(height: int, width: int) -> Image.Image:
    """Grey blobs: a mask of which no two corners are alike."""
    coarse = np.random.default_rng(3).integers(0, 256, (5, 7), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def prepared(folder: Path, trigger: str | None = None, **options: Any) -> PreparedData:
    values = {"resolutions": [64], "bucket_step": 16, "max_skip_fraction": 1, **options}
    return prepare_samples(
        [Folder.model_validate({"path": folder, **values})], pixel_multiple=8, trigger=trigger
    )


def mask_of(sample: Sample, flip: bool) -> Tensor:
    cache, grid = RamCache(), grid_of(LATENT, sample)
    assert encode_masks([sample], LATENT, cache, KEYS) == 1 + sample.flip
    assert encode_masks([sample], LATENT, cache, KEYS) == 0  # they are there now
    entry = cache.get("masks", KEYS.mask(sample, grid, flip=flip))
    assert entry is not None
    return entry[MASK]


@pytest.mark.parametrize("kind", ["folder", "alpha"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_lies_over_its_picture(tmp_path: Path, kind: str, flip: bool) -> None:
    """The picture is its own mask: resized, cut, turned upright and mirrored, it shows where the mask has to be."""
    (tmp_path / "masks").mkdir()
    seen = pattern(150, 101)
    (tmp_path / "a.txt").write_text("a thing")
    turned = Image.Exif()
    turned[0x0112] = 6
    if kind == "alpha":
        white = Image.new("RGB", seen.size, "white")
        white.putalpha(seen)
        white.save(tmp_path / "a.png", exif=turned)
        masks: dict[str, Any] = {"kind": "alpha"}
    else:
        seen.save(tmp_path / "a.png", exif=turned)
        seen.save(tmp_path / "masks" / "a.webp", lossless=True, exif=turned)
        masks = {"path": tmp_path / "masks"}
    (sample,) = prepared(tmp_path, loss_masks=masks, flip=True, background="#000000").samples
    assert sample.fit.cut_share > 0
    assert sample.bucket.width > sample.bucket.height
    pixels = (load_pixels(sample, flip=flip)[:1] + 1) / 2
    torch.testing.assert_close(mask_of(sample, flip), F.avg_pool2d(pixels, 8), atol=5e-3, rtol=0)
    plain = replace(sample, counts=None)
    assert KEYS.latents(sample, flip=flip) == KEYS.latents(plain, flip=flip)  # masks encode nothing anew
    assert BatchPlan([sample], 1, 0).fingerprint != BatchPlan([plain], 1, 0).fingerprint


def test_a_clip_takes_one_mask_and_no_transparency(tmp_path: Path, tiny_folder: Any) -> None:
    clip_with_caption(tmp_path / "clips" / "a.mp4", clip_bytes(30, 16))
    (tmp_path / "masks").mkdir()
    pattern(96, 128).save(tmp_path / "masks" / "a.png")
    source = ModelSource(str(tiny_folder("wan21")))
    family = detect_family(source).load(source, frozenset(), dtype=torch.float32, device="cpu")
    values = {"path": tmp_path / "clips", "resolutions": [64], "bucket_step": 16, "frames": [5]}
    counted = Folder.model_validate({**values, "loss_masks": {"path": tmp_path / "masks"}})
    (sample,) = prepare_samples([counted], pixel_multiple=16, family=family).samples
    assert sample.is_clip
    mask_1HW = mask_of_clip(sample, family.latents)
    latents = torch.zeros(family.latents.of(sample.bucket.height, sample.bucket.width, 5))
    weights, _ = loss_weights([sample], [latents], lambda _: mask_1HW)
    assert weights is not None
    assert weights.shape == (1, 1, 1, *latents.shape[-2:])
    seen = Folder.model_validate({**values, "loss_masks": {"kind": "alpha"}, "max_skip_fraction": 1})
    with pytest.raises(DataError, match="transparency is not read as a mask"):
        prepare_samples([seen], pixel_multiple=16, family=family)


def mask_of_clip(sample: Sample, latents: LatentShape) -> Tensor:
    cache = RamCache()
    encode_masks([sample], latents, cache, KEYS)
    entry = cache.get("masks", KEYS.mask(sample, grid_of(latents, sample), flip=False))
    assert entry is not None
    return entry[MASK]


def test_weights_are_those_of_the_mask() -> None:
    mask = torch.tensor([[[0.0, 0.25], [1.0, 1.0]]])
    latents = [torch.zeros(4, 2, 2)] * 5
    whole: Any = SimpleNamespace(counts=None)
    samples: list[Any] = [
        whole,
        SimpleNamespace(counts=Counts(alpha=True, outside=0.2, prior=0.5)),
        SimpleNamespace(counts=Counts(alpha=True, normalize=True)),
        SimpleNamespace(counts=Counts(model=True)),
        SimpleNamespace(counts=Counts(alpha=True, model=True, prior=3.0)),
    ]
    counted, kept = loss_weights(samples, latents, lambda _: mask)
    assert counted is not None
    assert kept is not None
    none, inside = torch.zeros(1, 2, 2), 0.2 + 0.8 * mask
    torch.testing.assert_close(counted, torch.stack([torch.ones(1, 2, 2), inside, mask / 0.5625, none, none]))
    torch.testing.assert_close(kept, torch.stack([none, 0.5 * (1 - mask), none, torch.ones(1, 2, 2), mask]))
    assert loss_weights([whole, whole], latents, lambda _: mask) == (None, None)
    assert loss_weights(samples[:1] + samples[2:3], latents, lambda _: mask)[1] is None


def test_batches_bring_the_weights_of_their_own_rows(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for number in range(3):
        pattern(64, 96).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"thing {number}")
        values = np.full((64, 96), 0, np.uint8)
        values[:, : 32 * (number + 1)] = 255
        Image.fromarray(values).save(tmp_path / "masks" / f"{number}.png")
    samples = prepared(tmp_path, loss_masks={"path": tmp_path / "masks", "prior": 1.0}, flip=True).samples
    cache = RamCache()
    encode_masks(samples, LATENT, cache, KEYS)
    for sample in samples:
        height, width = grid_of(LATENT, sample)
        for flip in (False, True):
            key = KEYS.latents(sample, flip=flip)
            cache.put("latents", key, {LATENTS: torch.zeros(4, height, width)})
        cache.put("captions", KEYS.caption(sample.caption), {"tokens": torch.zeros(1, 1, 1)})
    family: Any = SimpleNamespace(describe_pictures=lambda pictures: Conditioning({}))
    mirrored = set()
    with closing(batches(BatchPlan(samples, 2, 4), cache, KEYS, family)) as stream:  # type: ignore[type-var]
        for batch in islice(stream, 12):
            assert batch.counted is not None
            assert batch.kept is not None
            torch.testing.assert_close(batch.kept, 1 - batch.counted)
            for row, path in enumerate(batch.paths):
                share = (int(Path(path).stem) + 1) / 3
                assert float(batch.counted[row].mean()) == pytest.approx(share, abs=0.05)
                if share < 1:
                    mirrored.add(bool(batch.counted[row, 0, 0, 0] < 0.5))
    assert mirrored == {False, True}


def test_the_error_is_weighed_by_place_and_what_stays_is_held_to_the_model_as_it_was() -> None:
    trained = {"on": True}

    @contextmanager
    def frozen() -> Iterator[None]:
        trained["on"] = False
        assert not torch.is_grad_enabled()
        yield
        trained["on"] = True

    def predict(noisy: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        return noisy * (factor if trained["on"] else 0.25)

    factor = torch.tensor(0.5, requires_grad=True)
    family: Any = SimpleNamespace(capabilities=Capabilities(), audio=None, predict=predict)
    draw = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 2, 4, 3, 5, generator=draw)
    counted, kept = torch.rand(2, 2, 1, 3, 5, generator=draw)
    batch = Batch(data, Conditioning({}), torch.ones(2), ("a", "b"), ("a", "b"), 0, None, counted, kept)
    t_B = torch.tensor([0.3, 0.8])
    objective = Denoising(Schedule("velocity", {}), frozen=frozen)
    loss_B = objective.losses_at(family, batch, noise, t_B)
    at = t_B.view(2, 1, 1, 1)
    noisy = (1 - at) * data + at * noise
    against_data = counted * (0.5 * noisy - (noise - data)) ** 2
    against_model = kept * (0.5 * noisy - 0.25 * noisy) ** 2
    torch.testing.assert_close(loss_B, (against_data + against_model).mean((1, 2, 3)))
    (slope,) = torch.autograd.grad(loss_B.sum(), factor)
    expected = (2 * counted * (0.5 * noisy - (noise - data)) * noisy + 2 * kept * 0.25 * noisy**2).mean(
        (1, 2, 3)
    )
    torch.testing.assert_close(slope, expected.sum())
    torch.testing.assert_close(
        objective.comparable().losses_at(family, batch, noise, t_B), against_data.mean((1, 2, 3))
    )


def test_preserving_adds_each_picture_with_the_class_word(tmp_path: Path) -> None:
    for name, caption in (("a", "a photo of sks, at night"), ("b", "a street")):
        pattern(64, 64).rotate(len(caption)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    options = {"preserve": {"word": "dog", "weight": 0.5}, "weight": 2.0}
    taught, street, twin = sorted(
        prepared(tmp_path, "sks", **options).samples, key=lambda one: (one.role != "train", one.picture_id)
    )
    assert (taught.caption, street.caption) == ("a photo of sks, at night", "a street")
    assert (twin.caption, twin.counts, twin.weight) == ("a photo of dog, at night", Counts(model=True), 1.0)
    assert twin.id != taught.id  # its own noise and times
    assert twin.sha256 == taught.sha256
    by_prefix = prepared(tmp_path, "sks", **options, captions={"prefix": "[trigger],"}).samples
    assert {one.captions(0)[0] for one in by_prefix if one.counts} == {
        "dog, a photo of dog, at night",
        "dog, a street",
    }
    trained, held = hold_out(by_prefix, 1, seed=1)
    assert len(held) == 1
    assert {one.sha256 for one in trained}.isdisjoint(one.sha256 for one in held)


def test_a_picture_without_its_mask_is_left_out_and_reported(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pattern(64, 64).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a thing")
    (tmp_path / "masks").mkdir()
    pattern(64, 64).save(tmp_path / "masks" / "a.png")
    found = prepared(tmp_path, loss_masks={"path": tmp_path / "masks"})
    assert [sample.path.name for sample in found.samples] == ["a.png"]
    (skipped,) = found.report.skipped
    assert skipped.file == "b.png"
    assert "no mask of the loss in" in skipped.reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: [{path: p, preserve: {word: dog}}]", "there is no trigger; set trigger"),
        ("trigger: sks\ndata: [{path: p, preserve: {word: dog}}]\nmethod: {kind: full}", "train an adapter"),
        ("data: [{path: p, loss_masks: {kind: alpha, prior: 1}}]\nmethod: {kind: full}", "train an adapter"),
        ("data: [{path: p}, {path: q, target: model}]\nmethod: {kind: full}", "train an adapter"),
        ("trigger: sks\ndata: [{path: p, target: model, preserve: {word: dog}}]", "target: picture"),
    ],
)
def test_what_needs_the_model_as_it_was_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"name: a\nmodel: {{path: demo}}\n{text}\n")
    with pytest.raises(ConfigError, match=said) as raised:
        load_config("run.yaml")
    assert "data." in str(raised.value)


def test_the_folder_of_masks_starts_at_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    text = "name: a\nmodel: {path: demo}\ndata: [{path: p, loss_masks: {path: m}}]\n"
    (tmp_path / "c" / "run.yaml").write_text(text)
    source = load_config("c/run.yaml").config.data[0]
    assert isinstance(source, Folder)
    assert isinstance(source.loss_masks, FolderMasks)
    assert source.loss_masks.path == tmp_path / "c" / "m"


def test_sound_is_learned_but_where_the_whole_sample_is_to_stay() -> None:
    """Frames that are masked in part leave the sound alone; one that is held to the model holds its sound as well."""
    off = {"now": False}

    @contextmanager
    def frozen() -> Iterator[None]:
        off["now"] = True
        yield
        off["now"] = False

    def both(noisy: Tensor, sound: Tensor, t_B: Tensor, told: Conditioning) -> tuple[Tensor, Tensor]:
        return noisy * 0, sound * (0.25 if off["now"] else 0.5)

    draw = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 2, 4, 2, 3, 5, generator=draw)
    sound, hiss = torch.randn(2, 2, 3, 7, 4, generator=draw)
    counted = torch.zeros(2, 1, 1, 3, 5)
    counted[0, ..., :2] = 1
    kept = torch.zeros(2, 1, 1, 3, 5)
    kept[1] = 1
    names = ("learned", "stays")
    batch = Batch(data, Conditioning({}), torch.ones(2), names, names, 0, sound, counted, kept)
    family: Any = SimpleNamespace(capabilities=Capabilities(), audio=SimpleNamespace(predict=both))
    objective = Denoising(Schedule("velocity", {}), frozen=frozen)
    t = torch.tensor([0.4, 0.4])
    loss_B = objective.losses_at(family, batch, noise, t, audio_noise_BCLF=hiss)
    heard = 0.6 * sound + 0.4 * hiss
    frames = (counted * (noise - data) ** 2).mean((1, 2, 3, 4))
    expected = frames + torch.stack(
        [((0.5 * heard - (hiss - sound)) ** 2)[0].mean(), ((0.25 * heard) ** 2)[1].mean()]
    )
    torch.testing.assert_close(loss_B, expected)
