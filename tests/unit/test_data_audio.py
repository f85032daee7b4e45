"""The sound of clips: taken at the right time, at another rate, on two sides, and never invented."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import clip_bytes, clip_with_caption
from sound_files import clip_with_sound, tone
from tiny.ltx2 import BOTH

from burnish.config.data import Folder
from burnish.data import audio
from burnish.data.audio import Span, downmix, sound_at, sound_of
from burnish.data.cache import CacheKeys, RamCache
from burnish.data.pictures import BadPicture
from burnish.data.preflight import PreparedData, prepare_samples
from burnish.data.prepare import AUDIO, LATENTS, conditioning_of, encode_latents, load_audio
from burnish.data.samples import Sample
from burnish.errors import DataError
from burnish.families.ltx2 import LTX2
from burnish.family import Family, ModelSource

RATE = 16000
EDGE = 100  # samples at the ends of the whole, where a resampler's filter has no neighbours


def heard(data: bytes, start: float, seconds: float, rate: int = RATE) -> np.ndarray:
    found = sound_at(io.BytesIO(data), start, seconds, rate)
    assert found.shape == (2, round(seconds * rate))
    assert found.dtype == torch.float32
    return found.numpy()


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
@pytest.mark.parametrize("start", [0.5, 3.25])
def test_a_part_is_what_the_tone_is_then(rate: int, start: float) -> None:
    channels = np.stack([tone(440, 6, rate), tone(1000, 6, rate)])
    data = clip_with_sound(channels, rate, frames=144, kind="mov")  # Matroska's clock ticks in milliseconds
    found = heard(data, start, 1.0)
    for side, hertz in enumerate((440, 1000)):
        times = start + np.arange(RATE) / RATE
        one_sample = (
            0.25 * 2 * np.pi * hertz / RATE
        )  # by which a sine differs from one sample to the next, at most
        expected = 0.25 * np.sin(2 * np.pi * hertz * times)
        np.testing.assert_allclose(found[side], expected, atol=one_sample)


def test_sound_is_sought_or_not_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip_with_sound(tone(300, 6, 48000)[None], 48000, frames=144, kind="mp4", codec="aac")
    sought = heard(data, 4.0, 1.0)
    monkeypatch.setattr(audio, "_SEEK_S", 1000.0)
    np.testing.assert_allclose(heard(data, 4.0, 1.0), sought, atol=1e-4)
    assert np.abs(sought).max() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "aac"), ("matroska", "libopus"), ("matroska", "flac"), ("avi", "pcm_s16le")]
)
@pytest.mark.parametrize("start", [0.0, 4.0])
def test_sound_of_every_codec_is_in_time(kind: str, codec: str, start: float) -> None:
    """By a sweep, which is like itself at one lag only."""
    times = np.arange(6 * 48000) / 48000
    sweep = (0.25 * np.sin(2 * np.pi * (200 + 100 * times) * times)).astype(np.float32)
    data = clip_with_sound(sweep[None], 48000, frames=144, kind=kind, codec=codec)
    found, meant = heard(data, start, 1.5)[0], sweep[::3][round(start * RATE) :][: round(1.5 * RATE)]
    lags = range(-160, 161)  # 10 ms
    middle = meant[200:-200]
    alike = [np.corrcoef(found[200 + lag : len(found) - 200 + lag], middle)[0, 1] for lag in lags]
    assert max(alike) > 0.98
    assert abs(lags[int(np.argmax(alike))]) <= 0.001 * RATE


def test_mono_is_as_loud_on_both_sides() -> None:
    data = clip_with_sound(tone(440, 2, 48000)[None], 48000, frames=48)
    left, right = heard(data, 0.5, 1.0)
    np.testing.assert_array_equal(left, right)
    assert np.abs(left).max() == pytest.approx(0.25, abs=2e-3)


def test_surround_is_mixed_3_db_lower_and_cannot_clip() -> None:
    """The weights of the release's trainer for 5.1: 1, 0.707 and 0.707, over their sum."""
    silent = np.zeros(96000, np.float32)
    alone = {"FL": 0, "FR": 1, "FC": 2, "LFE": 3, "BL": 4, "BR": 5}
    expected = {
        "FL": (1, 0),
        "FR": (0, 1),
        "FC": (0.707, 0.707),
        "LFE": (0, 0),
        "BL": (0.707, 0),
        "BR": (0, 0.707),
    }
    for name, channel in alone.items():
        channels = np.stack([silent] * 6)
        channels[channel] = tone(440, 2, 48000)
        found = np.abs(heard(clip_with_sound(channels, 48000, frames=48, codec="flac"), 0.5, 1.0)).max(axis=1)
        np.testing.assert_allclose(found, np.array(expected[name]) / 2.414 * 0.25, atol=3e-3)


def test_channels_without_names_are_left_as_two_or_mixed_evenly() -> None:
    np.testing.assert_array_equal(downmix(["?", "?"]), np.eye(2))
    np.testing.assert_allclose(downmix(["?"] * 4), np.full((2, 4), 0.25))


def test_what_comes_before_and_after_the_sound_is_silence() -> None:
    data = clip_with_sound(tone(440, 1, RATE)[None], RATE, frames=72, starts=0.5)
    span = sound_of(io.BytesIO(data))
    assert span is not None
    assert (span.start, span.end) == (pytest.approx(0.5, abs=2e-3), pytest.approx(1.5, abs=2e-3))
    found = heard(data, 0.0, 3.0)[0]
    assert not found[: RATE // 2 - EDGE].any()
    assert not found[3 * RATE // 2 + EDGE :].any()
    times = np.arange(RATE) / RATE
    np.testing.assert_allclose(
        found[RATE // 2 :][EDGE : RATE - EDGE],
        (0.25 * np.sin(2 * np.pi * 440 * times))[EDGE:-EDGE],
        atol=0.02,
    )


def test_a_tenth_of_a_second_may_be_missing_at_either_end() -> None:
    span = Span(0.05, 1.95)
    assert span.covers(0.0, 2.0)
    assert span.covers(0.5, 1.0)
    assert not span.covers(0.0, 2.2)
    assert not Span(0.2, 5.0).covers(0.0, 1.0)


def test_a_clip_without_sound_has_none() -> None:
    assert sound_of(io.BytesIO(clip_bytes(9, 24))) is None
    assert sound_of(io.BytesIO(clip_bytes(9, 24, sound=True))) is not None


def test_torn_sound_is_refused() -> None:
    data = bytearray(clip_with_sound(tone(440, 4, 48000)[None], 48000, frames=96, kind="mp4", codec="aac"))
    with pytest.raises(BadPicture, match="damaged"):
        sound_of(io.BytesIO(bytes(data[: len(data) // 2])))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("both")
    BOTH.build(0).save_pretrained(folder)
    return LTX2.load(
        ModelSource(str(folder), audio=True), frozenset(("vae",)), dtype=torch.float32, device="cpu"
    )


def speech(seconds: float, frames: int, hertz: float = 440.0) -> bytes:
    return clip_with_sound(tone(hertz, seconds, 48000)[None], 48000, frames=frames, kind="mp4", codec="aac")


def prepared(
    folder: Path, family: Family | None, cache: Path | None = None, **options: object
) -> PreparedData:
    source = Folder(
        path=folder, resolutions=[64], bucket_step=32, frames=[9], max_skip_fraction=1.0, **options
    )
    return prepare_samples([source], pixel_multiple=32, family=family, cache_folder=cache)


def named(data: PreparedData) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in data.samples:
        found.setdefault(sample.path.stem, []).append(sample)
    return found


def test_clips_without_sound_and_pictures_train_frames_alone_and_it_is_said(
    family: Family, tmp_path: Path
) -> None:
    clip_with_caption(tmp_path / "whole.mp4", speech(1.0, 24))
    clip_with_caption(tmp_path / "short.mp4", speech(0.6, 24))
    clip_with_caption(tmp_path / "silent.mp4", clip_bytes(24, 24, size=(64, 64)))
    for _ in range(2):  # the second time by what is remembered
        data = prepared(tmp_path, family, tmp_path / "cache", clips="every")
        heard = {name: [sample.audio for sample in samples] for name, samples in named(data).items()}
        assert heard == {"whole": [True, True], "short": [True, False], "silent": [False, False]}
        (source,) = data.report.sources
        assert [(one.file, one.reason.split(" from")[0]) for one in source.silent] == [
            ("short.mp4", "its sound lasts"),
            ("silent.mp4", "it has no sound"),
            ("silent.mp4", "it has no sound"),
        ]
        assert "3 clip(s) or parts of clips train without sound" in source.warnings[-1]
    shapes = {name: {sample.shape.audio for sample in samples} for name, samples in named(data).items()}
    assert shapes == {"whole": {True}, "short": {True, False}, "silent": {False}}


def test_a_family_without_sound_does_not_look_for_any(family: Family, tmp_path: Path) -> None:
    clip_with_caption(tmp_path / "whole.mp4", speech(1.0, 24))
    alone = LTX2.skeleton(depth=1)
    assert alone.audio is None
    data = prepared(tmp_path, alone)
    assert not any(sample.audio for sample in data.samples)
    assert data.report.sources[0].silent == []


def test_sound_is_asked_for_and_there_is_none(family: Family, tmp_path: Path) -> None:
    clip_with_caption(tmp_path / "silent.mp4", clip_bytes(24, 24, size=(64, 64)))
    with pytest.raises(DataError, match=r"no clip has sound(.|\n)*silent.mp4(.|\n)*it has no sound"):
        prepared(tmp_path, family)


def test_with_sound_clips_play_at_the_rate_of_the_model(family: Family, tmp_path: Path) -> None:
    clip_with_caption(tmp_path / "whole.mp4", speech(1.0, 24))
    with pytest.raises(DataError, match=r"24 frames per second; got 12"):
        prepared(tmp_path, family, fps=12)
    assert prepared(tmp_path, family, fps=24).samples[0].audio


def test_a_clip_is_encoded_once_and_again_when_its_sound_is_another(family: Family, tmp_path: Path) -> None:
    keys, cache = CacheKeys.of(family, torch.float32), RamCache()

    def encoded() -> tuple[int, torch.Tensor]:
        (sample,) = prepared(tmp_path, family).samples
        counts = encode_latents([sample], family, cache, keys, device="cpu")
        entry = cache.get("latents", keys.latents(sample, flip=False))
        assert entry is not None
        return counts.encoded, entry[AUDIO]

    clip_with_caption(tmp_path / "a.mp4", speech(1.0, 24))
    first, latents = encoded()
    assert first == 1
    assert family.audio is not None
    assert tuple(latents.shape) == family.audio.shape.of(9 / 24) == (1, 9, 16)
    assert encoded()[0] == 0
    clip_with_caption(tmp_path / "a.mp4", speech(1.0, 24, hertz=880.0))
    again, other = encoded()
    assert again == 1
    assert (other - latents).abs().max() > 0.1


def test_what_is_mirrored_sounds_mirrored(family: Family, tmp_path: Path) -> None:
    sides = np.stack([tone(440, 1, 48000), tone(1000, 1, 48000)])
    clip_with_caption(tmp_path / "a.mp4", clip_with_sound(sides, 48000, frames=24, kind="mp4", codec="aac"))
    (sample,) = prepared(tmp_path, family).samples
    plain, mirrored = (load_audio(sample, RATE, flip=flip) for flip in (False, True))
    assert torch.equal(plain[0], mirrored[1])
    assert torch.equal(plain[1], mirrored[0])
    assert not torch.equal(plain[0], plain[1])


def test_latents_of_sound_are_no_conditioning() -> None:
    entry = {LATENTS: torch.zeros(1), AUDIO: torch.zeros(1), "shown_B": torch.zeros(1)}
    assert set(conditioning_of({"tokens_BSD": torch.zeros(1)}, entry)) == {"tokens_BSD", "shown_B"}


def test_frames_alone_have_an_entry_of_their_own(family: Family, tmp_path: Path) -> None:
    clip_with_caption(tmp_path / "a.mp4", speech(1.0, 24))
    (sample,) = prepared(tmp_path, family).samples
    (alone,) = prepared(tmp_path, LTX2.skeleton(depth=1)).samples
    keys = CacheKeys.of(family, torch.float32)
    assert keys.latents(sample, flip=False) != keys.latents(alone, flip=False)
