"""Clips as MP4 files, written and read back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import Image

from burnish.data.clips import frames_at, inspect_clip
from burnish.sampling.decoding import Sound

CODECS = ("libx264", "mpeg4")  # the first that this FFmpeg has
QUALITY = {"libx264": {"crf": "12"}, "mpeg4": {"qscale": "2"}}  # nothing that an eye sees is lost
_AUDIO_BITS = 256_000  # per second, of AAC: no loss that is heard
_BT709 = 1  # ITU-T H.273: the same number names primaries, transfer and matrix
_RATE_STEPS = 1001  # of 23.976 and its kin, the largest denominator


def encode_clip(frames: Sequence[Image.Image], fps: float, sound: Sound | None = None) -> bytes:
    """An MP4 of pictures of one size, whose sides are even, in BT.709 colours; the sound as AAC."""
    codec = next(name for name in CODECS if name in av.codecs_available)
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream(
            codec, Fraction(fps).limit_denominator(_RATE_STEPS), options=QUALITY[codec]
        )
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        heard = _audio_stream(container, sound.rate) if sound is not None else None
        for picture in frames:
            frame = VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")), "rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None and heard is not None:
            waveform = AudioFrame.from_ndarray(sound.samples, "fltp", "stereo")
            waveform.sample_rate = sound.rate
            # With times the file says how much of AAC's beginning is to be left out, and sound keeps to the frames.
            waveform.pts, waveform.time_base = 0, Fraction(1, sound.rate)
            container.mux(heard.encode(waveform))
            container.mux(heard.encode())
    return data.getvalue()


def _audio_stream(container: OutputContainer, rate: int) -> AudioStream:
    stream = container.add_stream("aac", rate)
    assert isinstance(stream, AudioStream)
    stream.codec_context.bit_rate = _AUDIO_BITS
    stream.codec_context.layout = "stereo"
    return stream


def middle_frame(path: Path) -> Image.Image:
    """The picture that stands for a clip in a grid.

    Raises:
        BadPicture: the file is damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        duration = inspect_clip(file, max_megapixels=float("inf")).duration
        return frames_at(file, [duration / 2])[0]
