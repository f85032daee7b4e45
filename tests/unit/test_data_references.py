"""References and masks: which, where they lie, in what order, and what depends on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import clip_bytes, clip_with_caption
from corpus import caption, scene
from PIL import Image, ImageOps
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.config.data import Captions, Folder
from burnish.data.cache import Cache, CacheKeys, RamCache
from burnish.data.companions import drawn_holes
from burnish.data.loader import batches
from burnish.data.plan import BatchPlan
from burnish.data.preflight import PreparedData, prepare_samples
from burnish.data.prepare import (
    LATENTS,
    encode_captions,
    encode_latents,
    encode_seen_captions,
    load_mask,
    load_pixels,
    load_references,
)
from burnish.data.samples import Sample, all_captions
from burnish.errors import DataError
from burnish.families.flux import Flux
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource

TinyFolder = Callable[[str], Path]


def loaded(kind: type[Family], folder: Path) -> Family:
    parts = frozenset({"vae", "text_encoders"})
    return kind.load(ModelSource(str(folder)), parts, dtype=torch.float32, device="cpu")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def kontext(tiny_folder: TinyFolder) -> Family:
    return loaded(Flux, tiny_folder("flux_kontext"))


@pytest.fixture(scope="module")
def fill(tiny_folder: TinyFolder) -> Family:
    return loaded(Flux, tiny_folder("flux_fill"))


def target(folder: Path, name: str, height: int = 96, width: int = 128, seed: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    scene(seed, height, width).save(path)
    caption(path, f"a sks thing, {name}")
    return path


def picture(path: Path, height: int, width: int, seed: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scene(seed, height, width).save(path)
    return path


def prepared(folder: Path, family: Family | None, **options: object) -> PreparedData:
    values = {"resolutions": [64], "bucket_step": 16, "max_skip_fraction": 1, **options}
    return prepare_samples([Folder(path=folder, **values)], pixel_multiple=16, family=family)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def full(samples: Sequence[Sample], family: Family) -> tuple[Cache, CacheKeys]:
    cache, keys = RamCache(), CacheKeys.of(family, torch.float32)
    encode_latents(samples, family, cache, keys, device="cpu")
    encode_captions(all_captions([s for s in samples if not keys.sees(s)], 5), family, cache, keys)
    encode_seen_captions(samples, 5, family, cache, keys)
    return cache, keys


class Small(Flux):
    """An editor that takes references smaller, and square."""

    def reference_size(self, height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
        return 32, 32


@pytest.mark.parametrize("kind", [Flux, Small])
def test_a_reference_of_the_same_size_lies_over_its_target(
    kind: type[Flux], tmp_path: Path, tiny_folder: TinyFolder
):
    """Resized, cut and mirrored alike, and only then taken smaller: a copy of the target stays the same picture."""
    family = loaded(kind, tiny_folder("flux_kontext"))
    path = target(tmp_path / "a", "x.png", 150, 100)
    (tmp_path / "r").mkdir()
    Image.open(path).save(tmp_path / "r" / "x.webp", lossless=True)
    (sample,) = prepared(tmp_path / "a", family, references=[tmp_path / "r"], flip=True).samples
    assert sample.fit.cut_share > 0
    height, width = sample.bucket.height, sample.bucket.width
    wanted = family.reference_size(height, width, (height, width))
    for flip in (False, True):
        (reference,) = load_references(sample, flip=flip)
        assert reference.shape == (3, *wanted)
        fitted = sample.fit.apply(Image.open(path).convert("RGB"), flipped=flip)
        if (height, width) != wanted:
            fitted = fitted.resize(wanted[::-1], Image.Resampling.LANCZOS)
        assert torch.equal(reference, as_tensor(fitted))


def test_a_reference_of_another_size_is_cut_in_the_middle(tmp_path: Path, kontext: Family):
    target(tmp_path / "a", "x.png")
    path = picture(tmp_path / "r" / "x.png", 200, 120)
    (sample,) = prepared(tmp_path / "a", kontext, references=[tmp_path / "r"], flip=True).samples
    height, width = kontext.reference_size(200, 120, (sample.bucket.height, sample.bucket.width))
    plain, flipped = (load_references(sample, flip=flip)[0] for flip in (False, True))
    assert plain.shape == (3, height, width)
    expected = as_tensor(
        ImageOps.fit(Image.open(path).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    )
    assert (plain - expected).abs().mean() < 0.02
    assert (plain - flipped).abs().mean() > 0.02
    torch.testing.assert_close(plain.flip(-1), flipped, atol=3 / 127.5, rtol=0)


def test_missing_and_bad_references_are_skipped_and_reported(tmp_path: Path, kontext: Family):
    for name in ("x.png", "y.png", "z.png"):
        target(tmp_path / "a", name)
    picture(tmp_path / "r" / "x.png", 96, 128)
    (tmp_path / "r" / "y.png").write_bytes(b"<html>")
    report = prepared(tmp_path / "a", kontext, references=[tmp_path / "r"]).report
    bad, missing = report.skipped
    assert (bad.file, missing.file, report.used) == ("y.png", "z.png", 1)
    assert bad.reason == f"its reference {tmp_path / 'r' / 'y.png'}: a web page, not a picture"
    assert missing.reason == f"no reference in {tmp_path / 'r'}"
    assert "z.png" in missing.remedy


def test_a_folder_of_references_inside_that_of_the_targets_holds_no_targets(tmp_path: Path, kontext: Family):
    target(tmp_path, "x.png")
    picture(tmp_path / "before" / "x.png", 96, 128)
    data = prepared(tmp_path, kontext, references=[tmp_path / "before"])
    assert [sample.path.name for sample in data.samples] == ["x.png"]
    assert not data.report.skipped


def test_two_references_of_one_name_are_an_error(tmp_path: Path, kontext: Family):
    target(tmp_path / "a", "x.png")
    for name in ("x.png", "x.jpg"):
        picture(tmp_path / "r" / name, 96, 128)
    with pytest.raises(DataError, match=r"x\.jpg and x\.png belong to the same picture"):
        prepared(tmp_path / "a", kontext, references=[tmp_path / "r"])


def test_who_has_no_use_for_them_says_so(tmp_path: Path, kontext: Family, fill: Family, tiny_sd15: Path):
    target(tmp_path / "a", "x.png")
    picture(tmp_path / "r" / "x.png", 96, 128)
    still = loaded(family_named("sd15"), tiny_sd15)
    for family, options, says in (
        (still, {"references": [tmp_path / "r"]}, "sees none"),
        (None, {"references": [tmp_path / "r"]}, "sees none"),
        (kontext, {"references": [tmp_path / "r"] * 2}, "sees at most 1"),
        (fill, {"references": [tmp_path / "r"]}, "sees none besides the picture itself"),
        (kontext, {"masks": tmp_path / "r"}, "fills no holes"),
    ):
        with pytest.raises(DataError, match=says):
            prepared(tmp_path / "a", family, **options)
    assert len(prepared(tmp_path / "a", kontext).samples) == 1  # an editor learns without references too


def test_conditioning_comes_from_the_cache_into_the_batch(tmp_path: Path, kontext: Family):
    """Pictures with references of two sizes and one source without: each batch is of one kind."""
    for index, name in enumerate(("a.png", "b.png", "c.png")):
        target(tmp_path / "t", name, seed=index)
        height, width = (96, 128) if name != "c.png" else (240, 80)
        picture(tmp_path / "r" / name, height, width, seed=10 + index)
    target(tmp_path / "plain", "d.png")
    shared = {"resolutions": [64], "bucket_step": 16}
    sources = [
        Folder(path=tmp_path / "t", references=[tmp_path / "r"], **shared),
        Folder(path=tmp_path / "plain", **shared),
    ]
    samples = prepare_samples(sources, pixel_multiple=16, family=kontext).samples
    cache, keys = full(samples, kontext)
    by_id = {f"{sample.id}#0": sample for sample in samples}
    plan = BatchPlan(samples, 2, seed=2)
    with closing(batches(plan, cache, keys, kontext)) as stream:  # type: ignore[type-var]
        taken = list(itertools.islice(stream, plan.batches_per_epoch))
    assert sorted(len(batch.sample_ids) for batch in taken) == [1, 1, 2]
    for batch in taken:
        chosen = [by_id[name] for name in batch.sample_ids]
        shown = [load_references(sample, flip=False) for sample in chosen]
        with torch.no_grad():
            columns = [torch.stack(column) for column in zip(*shown, strict=True)]
            expected = kontext.encode_references(columns) if columns else Conditioning({})
        text = kontext.encode_prompts([sample.caption for sample in chosen])
        assert set(batch.conditioning) == set(expected) | set(text)
        assert bool(expected) == (chosen[0].source == 0)
        for name, tensor in expected.items():
            torch.testing.assert_close(batch.conditioning[name], tensor, atol=1e-5, rtol=1e-4)


def test_masks_by_value(tmp_path: Path, fill: Family):
    target(tmp_path / "t", "x.png", 96, 128)
    mask = Image.new("L", (128, 96), 0)
    mask.paste(255, (0, 0, 40, 96))
    (tmp_path / "m").mkdir()
    mask.save(tmp_path / "m" / "x.png")
    (sample,) = prepared(tmp_path / "t", fill, masks=tmp_path / "m", flip=True).samples
    left, right = (load_mask(sample, flip=flip) for flip in (False, True))
    assert left is not None
    assert right is not None
    assert left.shape == (1, sample.bucket.height, sample.bucket.width)
    assert set(left.unique().tolist()) == {0.0, 1.0}
    expected = np.asarray(sample.fit.apply(mask.convert("RGB"), flipped=False).convert("L")) >= 128
    np.testing.assert_array_equal(left[0].numpy().astype(bool), expected)
    assert torch.equal(left.flip(-1), right)
    # What is filled is the picture itself, and both reach the family.
    (own,) = load_references(sample, flip=False)
    assert torch.equal(own, load_pixels(sample, flip=False))
    cache, keys = full([sample], fill)
    entry = cache.get("latents", keys.latents(sample, flip=False))
    assert entry is not None
    with torch.no_grad():
        told = fill.encode_references([own[None]], mask_B1HW=left[None])
    assert entry.keys() == {LATENTS, *told}
    for name, tensor in told.items():
        torch.testing.assert_close(entry[name], tensor)


def test_drawn_holes_depend_on_the_content_alone(tmp_path: Path, fill: Family):
    target(tmp_path / "t", "x.png")
    (sample,) = prepared(tmp_path / "t", fill).samples
    first = load_mask(sample, flip=False)
    assert first is not None
    assert torch.equal(first, load_mask(replace(sample, caption="other", repeats=3), flip=False))  # type: ignore[arg-type]
    assert torch.equal(first.flip(-1), load_mask(sample, flip=True))  # type: ignore[arg-type]
    shares = []
    for number in range(200):
        hole = np.asarray(drawn_holes(f"{number:064x}", 48, 80).convert("L"))
        assert set(np.unique(hole).tolist()) <= {0, 255}
        shares.append((hole > 0).mean())
    assert len(set(shares)) > 150
    assert min(shares) > 0
    assert max(shares) < 1
    assert 0.1 < np.mean(shares) < 0.6


def test_keys_depend_on_references_and_masks(tmp_path: Path, kontext: Family, fill: Family):
    target(tmp_path / "t", "x.png")
    picture(tmp_path / "r" / "x.png", 200, 120)
    picture(tmp_path / "m" / "x.png", 96, 128)
    (sample,) = prepared(tmp_path / "t", kontext, references=[tmp_path / "r"]).samples
    (reference,) = sample.references
    keys = CacheKeys.of(kontext, torch.float32)
    others = [
        sample,
        replace(sample, references=()),
        replace(sample, references=(replace(reference, sha256="0" * 64),)),
        replace(sample, references=(replace(reference, size=(32, 32)),)),
        replace(sample, references=(replace(reference, fit=replace(reference.fit, left=1)),)),
        replace(sample, references=(reference, reference)),
        replace(sample, sees_itself=True),
        replace(sample, sees_itself=True, sees_end=True),
    ]
    found = {keys.latents(one, flip=flip) for one in others for flip in (False, True)}
    found.add(replace(keys, family="another").latents(sample, flip=False))
    assert len(found) == 17
    moved = replace(sample, references=(replace(reference, path=tmp_path / "elsewhere.png"),))
    assert keys.latents(moved, flip=False) == keys.latents(sample, flip=False)

    (drawn,) = prepared(tmp_path / "t", fill).samples
    (given,) = prepared(tmp_path / "t", fill, masks=tmp_path / "m").samples
    assert given.mask is not None
    other = replace(given, mask=replace(given.mask, sha256="1" * 64))
    keys = CacheKeys.of(fill, torch.float32)
    assert len({keys.latents(one, flip=False) for one in (drawn, given, other)}) == 3


class Watching(Flux):
    """An editor whose captions are encoded with what is seen: brightness is added to the tokens."""

    def configure(self) -> None:
        super().configure()
        self.capabilities = replace(self.capabilities, prompts_see_references=True)

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] = ()
    ) -> Conditioning:
        told = super().encode_prompts(prompts)
        seen = torch.stack(
            [torch.stack([one.mean() for one in row]).sum() for row in references] or [torch.zeros(())]
        )
        return told.merged({"tokens_BSD": told["tokens_BSD"] + seen.view(-1, 1, 1)})


def test_captions_are_encoded_with_what_their_prompts_see(tmp_path: Path, tiny_folder: TinyFolder):
    family = loaded(Watching, tiny_folder("flux_kontext"))
    for index, name in enumerate(("a.png", "b.png")):
        caption(target(tmp_path / "t", name, seed=index), "the same words")
        picture(tmp_path / "r" / name, 96, 128, seed=20 + index)
    samples = prepared(
        tmp_path / "t", family, references=[tmp_path / "r"], flip=True, captions=Captions(dropout=0.2)
    ).samples
    cache, keys = full(samples, family)
    texts = ("the same words", "")
    found = {
        keys.caption(text, sample, flip=flip)
        for text in texts
        for sample in samples
        for flip in (False, True)
    }
    assert len(found) == 8
    for sample, flip, text in itertools.product(samples, (False, True), texts):
        entry = cache.get("captions", keys.caption(text, sample, flip=flip))
        assert entry is not None
        expected = family.encode_prompts([text], [load_references(sample, flip=flip)])
        torch.testing.assert_close(entry["tokens_BSD"], expected["tokens_BSD"])
    blind = replace(keys, prompts_see_references=False)
    assert len({blind.caption(text, sample) for text in texts for sample in samples}) == 2
    plan = BatchPlan(samples, 2, seed=4)
    with closing(batches(plan, cache, keys, family)) as stream:  # type: ignore[type-var]
        for position in range(6):
            batch = next(stream)
            for row, draw in enumerate(plan.draws(position)):
                entry = cache.get("captions", keys.caption(draw.caption, draw.sample, flip=draw.flip))
                assert entry is not None
                assert torch.equal(batch.conditioning["tokens_BSD"][row], entry["tokens_BSD"][0])


@pytest.mark.parametrize("name", ["wan21_i2v", "wan21_flf2v"])
def test_a_clip_goes_on_from_its_own_first_frame(tmp_path: Path, tiny_folder: TinyFolder, name: str):
    family = loaded(family_named("wan21"), tiny_folder(name))
    clip_with_caption(tmp_path / "a.mp4", clip_bytes(40))
    (sample,) = prepared(tmp_path, family, resolutions=[96], frames=[5], clips="middle").samples
    pixels = load_pixels(sample, flip=False)
    first, *last = load_references(sample, flip=False)
    assert torch.equal(first, pixels[:, 0])
    assert len(last) == (name == "wan21_flf2v")
    assert not last or torch.equal(last[0], pixels[:, 4])
    assert not last or not torch.equal(last[0], first)
    assert round(float(first[:, 32, 72].mean() + 1) * 127.5 / 8) == 17
    cache, keys = full([sample], family)
    entry = cache.get("latents", keys.latents(sample, flip=False))
    assert entry is not None
    with torch.no_grad():
        told = family.encode_references([one[None] for one in (first, *last)], frames=5)
        assert entry.keys() == {LATENTS, *told}
        torch.testing.assert_close(entry[LATENTS], family.encode_pixels(pixels[None])[0])
    for name, tensor in told.items():
        torch.testing.assert_close(entry[name], tensor)
