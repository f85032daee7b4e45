"""The sound of drawn clips: in the file as it was decoded, as long as the frames, silent where it is broken."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sound_files import tone
from tiny.ltx2 import BOTH
from torch import Tensor

from burnish.data.audio import sound_at, sound_of
from burnish.families.ltx2 import LTX2
from burnish.family import ModelSource
from burnish.sampling.clip_file import encode_clip
from burnish.sampling.decoding import WARNING, Clip, Sound, decode_pictures


@pytest.mark.parametrize("rate", [24000, 48000])
def test_a_file_sounds_as_what_was_drawn(rate: int) -> None:
    samples = np.stack([tone(440, 1, rate), tone(700, 1, rate)])
    frames = [Image.new("RGB", (64, 64), (8 * number, 0, 0)) for number in range(24)]
    data = io.BytesIO(encode_clip(frames, 24, Sound(samples, rate)))
    found = sound_at(data, 0.0, 1.0, rate).numpy()
    inside = slice(rate // 10, -rate // 10)  # of a lossy file, away from its ends
    for heard, meant in zip(found, samples, strict=True):
        assert np.corrcoef(heard[inside], meant[inside])[0, 1] > 0.999
    assert sound_of(io.BytesIO(encode_clip(frames, 24))) is None


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> LTX2:
    folder = tmp_path_factory.mktemp("both")
    BOTH.build(0).save_pretrained(folder)
    source = ModelSource(str(folder), audio=True)
    return LTX2.load(source, frozenset(("vae",)), dtype=torch.float32, device="cpu")


def latents(family: LTX2, frames: int) -> tuple[Tensor, Tensor]:
    assert family.audio is not None
    draw = torch.Generator().manual_seed(3)
    pair = family.latents.of(64, 64, frames), family.audio.shape.of(frames / 24)
    return torch.randn(pair[0], generator=draw), torch.randn(pair[1], generator=draw)


def test_sound_is_not_longer_than_the_frames(family: LTX2) -> None:
    (clip,) = decode_pictures(family, [latents(family, 17)])
    assert isinstance(clip, Clip)
    assert clip.sound is not None
    assert family.audio is not None
    decoded = family.audio.decode(latents(family, 17)[1][None])[0].clamp(-1, 1)
    length = clip.sound.samples.shape[1]
    assert length <= round(17 / 24 * clip.sound.rate)
    np.testing.assert_array_equal(clip.sound.samples, decoded[:, :length].numpy())
    assert WARNING not in clip.frames[0].info


def test_broken_sound_is_silent_and_said(family: LTX2) -> None:
    frames, audio = latents(family, 9)
    (clip,) = decode_pictures(family, [(frames, audio * torch.nan)])
    assert isinstance(clip, Clip)
    assert clip.sound is not None
    assert not clip.sound.samples.any()
    assert "samples of sound are not finite" in clip.frames[0].info[WARNING]
