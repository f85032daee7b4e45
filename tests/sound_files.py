"""Clips with sound that is known sample by sample."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from clip_files import numbered

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def tone(hertz: float, seconds: float, rate: int, loudness: float = 0.25) -> np.ndarray:
    """One channel of a sine, (samples,)."""
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def clip_with_sound(
    channels: np.ndarray,
    rate: int,
    *,
    frames: int,
    fps: int = 24,
    starts: float = 0.0,
    codec: str = "pcm_s16le",
    kind: str = "matroska",
    size: tuple[int, int] = (64, 64),
) -> bytes:
    """Numbered frames, and sound (channels, samples) that begins `starts` seconds after the first of them."""
    data = io.BytesIO()
    with av.open(data, "w", format=kind) as container:
        pictures = container.add_stream("mpeg4", rate=fps)
        pictures.height, pictures.width = size
        pictures.pix_fmt = "yuv420p"
        pictures.codec_context.bit_rate = 4_000_000
        heard = container.add_stream(codec, rate=rate)
        heard.codec_context.layout = LAYOUTS[len(channels)]
        packets = []
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(index, *size), "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            packets += pictures.encode(frame)
        packets += pictures.encode()
        for at in range(0, channels.shape[1], 1024):
            packets += heard.encode(_sound(channels[:, at : at + 1024], rate, round(starts * rate) + at))
        packets += heard.encode()
        for packet in sorted(packets, key=lambda one: float((one.dts or 0) * one.time_base)):
            container.mux(packet)
    return data.getvalue()


def _sound(channels: np.ndarray, rate: int, pts: int) -> av.AudioFrame:
    whole = (channels.T * 32767).round().astype(np.int16).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(whole, "s16", LAYOUTS[len(channels)])
    frame.sample_rate, frame.pts, frame.time_base = rate, pts, Fraction(1, rate)
    return frame
