"""Clips: the right frames by time, upright and in their colours; bad ones say why; windows; cache; batches."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clip_files import clip_bytes, clip_with_caption, number_of, numbered, rotated, sound_only
from corpus import caption, scene
from PIL import Image, ImageOps

from burnish.config.data import Folder
from burnish.data.cache import CacheKeys, RamCache
from burnish.data.clips import frames_at, inspect_clip
from burnish.data.loader import batches
from burnish.data.pictures import BadPicture
from burnish.data.plan import BatchPlan
from burnish.data.preflight import PreparedData, prepare_samples
from burnish.data.prepare import LATENTS, encode_captions, encode_latents, load_pixels
from burnish.data.samples import Sample, all_captions
from burnish.data.windows import Window, Windows
from burnish.errors import DataError
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource

TinyFolder = Callable[[str], Path]


def loaded(name: str, folder: Path, *parts: str) -> Family:
    source = ModelSource(str(folder))
    return family_named(name).load(source, frozenset(parts), dtype=torch.float32, device="cpu")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wan(tiny_folder: TinyFolder) -> Family:
    return loaded("wan21", tiny_folder("wan21"), "vae", "text_encoders")


def prepared(folder: Path, family: Family | None, **options: object) -> PreparedData:
    source = Folder(
        path=folder, **{"resolutions": [96], "bucket_step": 16, "max_skip_fraction": 1, **options}
    )
    return prepare_samples([source], pixel_multiple=16, family=family)


def shown(data: bytes, *times: float) -> list[int]:
    return [number_of(picture) for picture in frames_at(io.BytesIO(data), times)]


@pytest.mark.parametrize("kind", ["mp4", "mov", "webm", "matroska", "avi"])
def test_frames_are_taken_by_time_in_every_container(kind: str):
    times = [index / 16 for index in range(3, 12)]
    assert shown(clip_bytes(20, 16, kind=kind), *times) == list(range(3, 12))
    # At 32 frames per second every other one; the nearest where none is just there.
    assert shown(clip_bytes(30, 32, kind=kind), *times) == list(range(6, 24, 2))
    assert shown(clip_bytes(12, 8, kind=kind), 0.0, 0.25, 0.5, 1.0) == [0, 2, 4, 8]
    rate = Fraction(24000, 1001)
    expected = [round(time * float(rate)) for time in (0.0, 0.1, 0.2, 0.5, 1.0)]
    assert shown(clip_bytes(30, rate, kind=kind), 0.0, 0.1, 0.2, 0.5, 1.0) == expected


def test_a_frame_that_stands_long_is_not_left_early():
    data = clip_bytes(6, 25, times_ms=[0, 40, 80, 1080, 1120, 1160])
    assert shown(data, 0.0, 0.25, 0.5, 0.75, 0.9, 1.08) == [0, 2, 2, 2, 2, 3]
    facts = inspect_clip(io.BytesIO(data), max_megapixels=1)
    assert facts.fixes == ("variable frame rate: frames are taken by their time",)
    assert inspect_clip(io.BytesIO(clip_bytes(6, 25)), max_megapixels=1).fixes == ()


def test_late_frames_are_sought_and_the_same(monkeypatch: pytest.MonkeyPatch):
    data = clip_bytes(30, 2)
    times = [7.0 + index / 2 for index in range(6)]
    assert shown(data, *times) == [14, 15, 16, 17, 18, 19]
    monkeypatch.setattr("burnish.data.clips._SEEK_S", 1000.0)
    assert shown(data, *times) == [14, 15, 16, 17, 18, 19]


@pytest.mark.parametrize(("count", "rate", "duration"), [(16, 16, 1.0), (30, 25, 1.2), (1, 10, 0.1)])
def test_facts(count: int, rate: int, duration: float):
    for sound in (False, True):
        facts = inspect_clip(io.BytesIO(clip_bytes(count, rate, sound=sound)), max_megapixels=1)
        assert (facts.height, facts.width, facts.fixes) == (64, 96, ())
        assert facts.duration == pytest.approx(duration, abs=1e-3)


def test_a_rotated_clip_is_turned_upright():
    data = clip_bytes(4)
    plain, turned = (frames_at(io.BytesIO(file), [0.0])[0] for file in (data, rotated(data)))
    facts = inspect_clip(io.BytesIO(rotated(data)), max_megapixels=1)
    assert (facts.height, facts.width) == (96, 64)
    assert facts.fixes[0].startswith("turned upright")
    # The matrix (0, 1, -1, 0) sends the top to the right: a quarter turn clockwise.
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(plain.transpose(Image.Transpose.ROTATE_270)))


def test_pixels_that_are_not_square_count_as_they_are_seen(tmp_path: Path, wan: Family):
    data = clip_bytes(20, pixel_aspect=Fraction(4, 3))
    facts = inspect_clip(io.BytesIO(data), max_megapixels=1)
    assert (facts.height, facts.width) == (64, 128)
    assert facts.fixes == ("pixels that are not square (4:3) put right",)
    clip_with_caption(tmp_path / "a.mp4", data)
    (sample,) = prepared(tmp_path, wan, frames=[5]).samples
    assert (sample.bucket.height, sample.bucket.width) == (64, 128)
    assert load_pixels(sample, flip=False).shape == (3, 5, 64, 128)


def gif(count: int) -> bytes:
    data = io.BytesIO()
    first, *others = (Image.fromarray(numbered(index)) for index in range(count))
    first.save(data, "GIF", save_all=True, append_images=others, duration=100)
    return data.getvalue()


def test_gif():
    assert inspect_clip(io.BytesIO(gif(8)), max_megapixels=1).duration == pytest.approx(0.8)
    assert shown(gif(8), 0.0, 0.3, 0.7) == [0, 3, 7]


BAD = {
    "empty.mp4": (b"", "zero bytes"),
    "page.mp4": (b"<!DOCTYPE html><html>not found</html>", "a web page, not a clip"),
    "pointer.webm": (b"version https://git-lfs.github.com/spec/v1\n", "a git LFS pointer, not the clip"),
    "list.mp4": (b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n", "not a clip: unknown content"),
    "picture.mov": (b"\x89PNG\r\n\x1a\n" + bytes(64), "not a clip: unknown content"),
    "sound.mp4": (sound_only(), "no pictures in it, only sound"),
    "half.mp4": (clip_bytes(30)[:1500], "damaged clip"),
    "half.mkv": (clip_bytes(30, kind="matroska")[: len(clip_bytes(30, kind="matroska")) // 2], "cut short"),
    "half.avi": (clip_bytes(30, kind="avi")[: len(clip_bytes(30, kind="avi")) // 2], "damaged clip"),
    "short.mp4": (clip_bytes(12), "0.75 seconds are 12 frames at 16 per second; at least 17 are taken"),
    "hdr.mp4": (clip_bytes(20, hdr=True), "HDR colours (PQ)"),
    "large.mp4": (clip_bytes(2, size=(256, 256)), "frames of 256 x 256"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_clips_say_why(name: str, tmp_path: Path, wan: Family):
    data, says = BAD[name]
    clip_with_caption(tmp_path / "good.mp4", clip_bytes(20))
    clip_with_caption(tmp_path / name, data)
    report = prepared(tmp_path, wan, frames=[17], max_megapixels=0.05).report
    (skipped,) = report.skipped
    assert skipped.file == name
    assert says in skipped.reason
    assert skipped.remedy
    assert (report.used, report.sources[0].clips, report.errors) == (1, 1, [])


def test_an_mp4_whose_end_is_missing_behind_its_index_is_cut_short(tmp_path: Path):
    """As a download that broke off: the index comes first, as it does in files made for streaming."""
    path = tmp_path / "a.mp4"
    with (
        av.open(io.BytesIO(clip_bytes(30))) as source,
        av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as copy,
    ):
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert inspect_clip(io.BytesIO(data), max_megapixels=1).duration == pytest.approx(30 / 16)
    half = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    with pytest.raises(BadPicture, match=r"cut short|damaged"):
        inspect_clip(io.BytesIO(data[:half]), max_megapixels=1)


def windows(**changes: object) -> Windows:
    return replace(Windows(None, 81, 4, 16.0, "start", 1), **changes)  # type: ignore[arg-type]


def test_windows():
    assert windows(counts=(17,)).within(2.5) == [Window(17, 0.0)]
    assert windows(counts=(1, 17, 33)).within(1.5) == [Window(1, 0.0), Window(17, 0.0)]
    assert windows(counts=(17,), choice="middle").within(2.5) == [Window(17, 11 / 16)]
    assert windows(counts=(17,), choice="every").within(2.5) == [Window(17, 0.0), Window(17, 17 / 16)]
    spread = windows(counts=(17,), choice="spread", spread=3)
    assert spread.within(2.5) == [Window(17, 0.0), Window(17, 12 / 16), Window(17, 23 / 16)]
    assert spread.within(17 / 16) == [Window(17, 0.0)]
    # Without a number as many as the model draws, or as many as there are.
    assert windows().within(20.0) == [Window(81, 0.0)]
    assert windows().within(1.0) == [Window(13, 0.0)]
    assert windows().within(1.0615) == [Window(17, 0.0)]  # 17 frames, rounded to milliseconds by a container
    with pytest.raises(BadPicture, match="are 4 frames at 16 per second; at least 5 are taken"):
        windows().within(0.25)


def test_a_number_of_frames_that_does_not_fit_names_those_that_do(
    tmp_path: Path, wan: Family, tiny_sd15: Path
):
    clip_with_caption(tmp_path / "a.mp4", clip_bytes(20))
    with pytest.raises(DataError, match=r"1 frame and then multiples of 4; got 16\n  Take 13 or 17\."):
        prepared(tmp_path, wan, frames=[5, 16])
    with pytest.raises(DataError, match="learns from still pictures"):
        prepared(tmp_path, loaded("sd15", tiny_sd15), frames=[5])


def test_a_still_family_skips_clips_and_says_so(tmp_path: Path, tiny_sd15: Path):
    clip_with_caption(tmp_path / "a.mp4", clip_bytes(20))
    scene(1).save(tmp_path / "b.png")
    caption(tmp_path / "b.png")
    data = prepared(tmp_path, loaded("sd15", tiny_sd15))
    assert [sample.path.name for sample in data.samples] == ["b.png"]
    (skipped,) = data.report.skipped
    assert (skipped.file, skipped.reason) == ("a.mp4", "a clip, and this model learns from still pictures")
    assert skipped.remedy


def test_samples_of_a_folder_of_clips_and_pictures(tmp_path: Path, wan: Family):
    clip_with_caption(tmp_path / "a.mp4", clip_bytes(40), "a clip")
    scene(1, 64, 96).save(tmp_path / "b.png")
    caption(tmp_path / "b.png", "a still")
    data = prepared(tmp_path, wan, frames=[5, 17], clips="every", fps=8)
    found = [(s.path.name, s.frames, s.start, s.fps, s.caption) for s in data.samples]
    assert found == [
        *(("a.mp4", 5, start * 5 / 8, 8.0, "a clip") for start in range(4)),
        ("a.mp4", 17, 0.0, 8.0, "a clip"),
        ("b.png", 1, 0.0, 0.0, "a still"),
    ]
    assert len({sample.id for sample in data.samples}) == 6
    assert data.report.sources[0].clips == 1
    assert data.report.buckets == [
        {"height": 64, "width": 96, "pictures": 1, "draws_per_epoch": 1},
        {"height": 64, "width": 96, "frames": 5, "clips": 4, "draws_per_epoch": 4},
        {"height": 64, "width": 96, "frames": 17, "clips": 1, "draws_per_epoch": 1},
    ]
    assert json.dumps(data.report.to_json())
    pixels = load_pixels(data.samples[2], flip=False)  # frames 20, 22, 24, 26, 28 of 16 per second
    assert pixels.shape == (3, 5, 64, 96)
    greys = ((pixels[:, :, 32, 72].mean(0) + 1) * 127.5 / 8).round().int().tolist()
    assert greys == [20, 22, 24, 26, 28]


def test_all_frames_take_the_same_way_and_flip_together(tmp_path: Path, wan: Family):
    clip_with_caption(tmp_path / "a.mp4", clip_bytes(8, size=(192, 224)))
    (sample,) = prepared(tmp_path, wan, frames=[5], flip=True).samples
    plain, flipped = (load_pixels(sample, flip=flip) for flip in (False, True))
    torch.testing.assert_close(plain.flip(-1), flipped, atol=2 / 127.5, rtol=0)
    for index, picture in enumerate(frames_at(io.BytesIO(sample.path.read_bytes()), sample.times)):
        fitted = ImageOps.fit(picture, (sample.bucket.width, sample.bucket.height), Image.Resampling.LANCZOS)
        expected = torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 127.5 - 1
        assert (plain[:, index] - expected).abs().mean() < 0.02


def test_keys_depend_on_all_that_the_frames_depend_on(tmp_path: Path, wan: Family):
    clip_with_caption(tmp_path / "a.mp4", clip_bytes(40))
    (sample,) = prepared(tmp_path, wan, frames=[5]).samples
    keys = CacheKeys.of(wan, torch.float32)
    others = [
        replace(sample, frames=9),
        replace(sample, start=0.5),
        replace(sample, fps=8.0),
        replace(sample, sha256="0" * 64),
        replace(sample, fit=replace(sample.fit, top=1)),
        replace(sample, fps=0.0, frames=1),
    ]
    found = {keys.latents(one, flip=flip) for one in [sample, *others] for flip in (False, True)}
    assert len(found) == 14
    assert keys.latents(replace(sample, caption="x", repeats=7), flip=False) in found
    assert keys.caption("x", sample) == keys.caption("x")


def full_cache(samples: tuple[Sample, ...], family: Family) -> tuple[RamCache, CacheKeys]:
    cache, keys = RamCache(), CacheKeys.of(family, torch.float32)
    encode_latents(samples, family, cache, keys, device="cpu")
    encode_captions(all_captions(samples, 1), family, cache, keys)
    return cache, keys


def test_latents_and_batches_of_clips_and_stills(tmp_path: Path, wan: Family):
    for name in "ab":
        clip_with_caption(tmp_path / f"{name}.mp4", clip_bytes(40, 16 if name == "a" else 32))
        scene(ord(name), 64, 96).save(tmp_path / f"{name}{name}.png")
        caption(tmp_path / f"{name}{name}.png")
    data = prepared(tmp_path, wan, frames=[1, 9])
    cache, keys = full_cache(data.samples, wan)
    for sample in data.samples:
        entry = cache.get("latents", keys.latents(sample, flip=False))
        assert entry is not None
        pixels = load_pixels(sample, flip=False)
        pixels = pixels if sample.is_clip else pixels[:, None]
        with torch.no_grad():
            expected = wan.encode_pixels(pixels[None])[0]
        assert entry.keys() == {LATENTS}
        assert entry[LATENTS].shape == wan.latents.of(64, 96, sample.frames)
        torch.testing.assert_close(entry[LATENTS], expected)
    plan = BatchPlan(data.samples, 2, seed=3)
    assert plan.batches_per_epoch == 3  # two pairs of one frame, whether still or clip, one of nine
    with closing(batches(plan, cache, keys, wan)) as stream:  # type: ignore[type-var]
        taken = list(itertools.islice(stream, 3))
    assert sorted(batch.latents_BCHW.shape[2] for batch in taken) == [1, 1, 3]
    assert all(len(batch.sample_ids) == 2 for batch in taken)


def test_the_plan_of_stills_is_what_it_was(tmp_path: Path, wan: Family):
    """A run of an earlier version goes on: order and fingerprint of pictures do not depend on what clips need."""
    for number in range(5):
        scene(number, 64, 96).save(tmp_path / f"{number}.png")
        caption(tmp_path / f"{number}.png")
    stills = [prepared(tmp_path, family).samples for family in (None, wan)]
    assert BatchPlan(stills[0], 2, 1).fingerprint == BatchPlan(stills[1], 2, 1).fingerprint
    assert str(stills[0][0].shape) == "64x96"
    assert stills[0][0].id == "0/0.png@64x96"
    clip_with_caption(tmp_path / "a.mp4", clip_bytes(40))
    plans = [BatchPlan(prepared(tmp_path, wan, frames=[5], fps=fps).samples, 2, 1) for fps in (16, 8)]
    assert plans[0].fingerprint != plans[1].fingerprint


def test_a_clip_that_changed_since_the_check_is_an_error(tmp_path: Path, wan: Family):
    path = clip_with_caption(tmp_path / "a.mp4", clip_bytes(40))
    (sample,) = prepared(tmp_path, wan, frames=[5]).samples
    path.write_bytes(clip_bytes(39))
    with pytest.raises(DataError, match="changed since it was checked"):
        load_pixels(sample, flip=False)
    path.unlink()
    with pytest.raises(DataError, match="since it was checked"):
        load_pixels(sample, flip=False)


def test_findings_are_remembered_by_content(tmp_path: Path, wan: Family, monkeypatch: pytest.MonkeyPatch):
    clip_with_caption(tmp_path / "clips" / "a.mp4", clip_bytes(40))
    clip_with_caption(tmp_path / "clips" / "b.mp4", b"<html>")
    source = Folder(path=tmp_path / "clips", resolutions=[96], bucket_step=16, frames=[5])
    options = {"pixel_multiple": 16, "family": wan, "cache_folder": tmp_path / "cache"}
    first = prepare_samples([source], **options)  # type: ignore[arg-type]

    def fail(*args: object, **named: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("burnish.data.clips.inspect_clip", fail)
    again = prepare_samples([source], **options)  # type: ignore[arg-type]
    assert again.samples == first.samples
    assert again.report.skipped == first.report.skipped
