"""The sound of clips: from when to when there is some, and a part of it as a stereo waveform.

Times are in seconds after the first frame of the pictures, whatever the sound's own beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

import av
import numpy as np
import numpy.typing as npt
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from torch import Tensor

from burnish.data.clips import first_time, opened
from burnish.data.pictures import BadPicture

CODE_VERSION = (
    1  # part of the cache key of clips with sound: raise it when the same file would give another waveform
)
MISSING_S = 0.1  # of silence, at most, that is put where encoders begin late or end early

_SEEK_S = 2.0  # what is later than this is sought
_JITTER_S = 0.02  # containers round times: sound that seems to jump by less goes on
_ASIDE = 0.5**0.5  # of channels that are not front left and right: 3 dB less (ITU-R BS.775)
_SIDES = {
    "FL": (1.0, 0.0),
    "FR": (0.0, 1.0),
    "FC": (_ASIDE, _ASIDE),
    "BL": (_ASIDE, 0.0),
    "BR": (0.0, _ASIDE),
    "SL": (_ASIDE, 0.0),
    "SR": (0.0, _ASIDE),
}
Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Span:
    """From when to when there is sound."""

    start: float
    end: float

    def covers(self, start: float, seconds: float) -> bool:
        """Whether so many seconds from `start` on have sound, but for what encoders leave out at their ends."""
        return self.start <= start + MISSING_S and start + seconds <= self.end + MISSING_S


def sound_of(file: BinaryIO) -> Span | None:
    """Decode all of a clip's sound once; None where it has no sound.

    Raises:
        BadPicture: no clip, or its sound is damaged.
    """
    began = _pictures_begin(file)
    first: float | None = None
    last = 0.0
    with opened(file) as container:
        for frame in _frames(container):
            first = _seconds(frame) if first is None else first
            last = max(last, _seconds(frame) + frame.samples / frame.sample_rate)
    return None if first is None else Span(first - began, last - began)


def sound_at(file: BinaryIO, start: float, seconds: float, rate: int) -> Tensor:
    """A part of a clip's sound as a stereo waveform in [-1, 1], (2, seconds * rate), float32.

    Mono is heard on both sides; of surround sound the centre and the rear are mixed in 3 dB lower, the whole is scaled
    so that it cannot clip, and the channel for low effects is left out. Where there is no sound is silence.

    Raises:
        BadPicture: damaged.
    """
    began = _pictures_begin(file)
    found: Samples | None = None
    if start > _SEEK_S:
        with suppress(BadPicture):  # some decoders stumble after a jump, and not on their way there
            found = _taken(file, began + start, seconds, rate, seek=True)
    if found is None:
        found = _taken(file, began + start, seconds, rate, seek=False)
    assert found is not None, "nothing is sought from the start"
    return torch.from_numpy(found)


def _taken(file: BinaryIO, start: float, seconds: float, rate: int, *, seek: bool) -> Samples | None:
    """None where seeking led past `start`, as a broken index does."""
    waveform = np.zeros((2, round(seconds * rate)), np.float32)
    goes_on: int | None = None
    with opened(file) as container:
        if seek:
            container.seek(int((start - _SEEK_S / 2) * av.time_base), backward=True)
        for time, samples in _stereo(container, rate):
            if seek and goes_on is None and time > start:
                return None
            at = round((time - start) * rate)
            if goes_on is not None and abs(at - goes_on) < _JITTER_S * rate:
                at = goes_on
            goes_on = at + samples.shape[1]
            begin, end = max(at, 0), min(goes_on, waveform.shape[1])
            if begin < end:
                waveform[:, begin:end] = samples[:, begin - at : end - at]
            if at >= waveform.shape[1]:
                break
    return waveform


def _stereo(container: InputContainer, rate: int) -> Iterator[tuple[float, Samples]]:
    """Sound piece by piece, (2, samples) at `rate`, with the time at which each begins."""
    resampler = AudioResampler(format="fltp", rate=rate)
    matrix: Samples | None = None
    for frame in chain(_frames(container), [None]):
        try:
            pieces = resampler.resample(frame)
        except ValueError as error:  # by its text, "Frame does not match AudioResampler setup."
            raise BadPicture(
                "its sound changes its number of channels or its rate",
                remedy="Encode the clip's sound again.",
            ) from error
        for piece in pieces:
            if matrix is None:
                matrix = downmix([channel.name for channel in piece.layout.channels])
            yield _seconds(piece), matrix @ piece.to_ndarray().astype(np.float32)


def downmix(channels: Sequence[str]) -> Samples:
    """What of each channel goes left and right, (2, channels)."""
    matrix = np.array([_SIDES.get(name, (0.0, 0.0)) for name in channels], np.float32).T
    if not matrix.any(axis=1).all():  # channels without names
        matrix = (
            np.eye(2, dtype=np.float32) if len(channels) == 2 else np.ones((2, len(channels)), np.float32)
        )
    mixed: Samples = matrix / matrix.sum(axis=1, keepdims=True)
    return mixed


def _frames(container: InputContainer) -> Iterator[AudioFrame]:
    """Of the stream that players take; none where there is no sound."""
    stream = container.streams.best("audio")
    if stream is None:
        return
    for frame in container.decode(stream):
        if isinstance(frame, AudioFrame) and frame.pts is not None:
            yield frame


def _seconds(frame: AudioFrame) -> float:
    assert frame.pts is not None
    assert frame.time_base is not None
    return float(frame.pts * frame.time_base)


def _pictures_begin(file: BinaryIO) -> float:
    with opened(file) as container:
        return first_time(container)
