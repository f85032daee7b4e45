"""Clips whose frames tell their number: frame i is grey of 8 * i, but for a red left quarter."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 96
KINDS = {"mp4": "libx264", "mov": "libx264", "webm": "libvpx-vp9", "matroska": "mpeg4", "avi": "mpeg4"}


def clip_bytes(
    count: int,
    rate: Fraction | int = 16,
    *,
    kind: str = "mp4",
    times_ms: Sequence[int] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    sound: bool = False,
    pixel_aspect: Fraction | None = None,
    hdr: bool = False,
) -> bytes:
    """`count` frames at `rate`, or shown at `times_ms`."""
    data = io.BytesIO()
    base = Fraction(1, 1000) if times_ms is not None else 1 / Fraction(rate)
    with av.open(data, "w", format=kind) as container:
        stream = container.add_stream(KINDS[kind], rate=Fraction(rate))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.bit_rate = 4_000_000
        if times_ms is not None:
            stream.codec_context.time_base = stream.time_base = base
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if hdr:
            stream.codec_context.color_trc = 16
        beside = container.add_stream("aac", rate=44100) if sound else None
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(index, *size), "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = times_ms[index] if times_ms is not None else index, base
            if hdr:
                frame.color_trc = 16
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if beside is not None:
            container.mux(beside.encode(silence()))
            container.mux(beside.encode())
    return data.getvalue()


def numbered(index: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    values = np.full((height, width, 3), min(8 * index, 255), np.uint8)
    values[:, : width // 4] = (200, 0, 0)
    return values


def sound_only() -> bytes:
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        container.mux(stream.encode(silence()))
        container.mux(stream.encode())
    return data.getvalue()


def silence() -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
    frame.sample_rate = 44100
    return frame


def rotated(data: bytes) -> bytes:
    """An MP4 with the display matrix of a phone that was held upright: a quarter turn (ISO 14496-12, tkhd)."""
    box = data.index(b"tkhd")
    at = box + 4 + 40  # version, flags, times, ids, layer and volume come before
    turn = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    return data[:at] + b"".join(n.to_bytes(4, "big", signed=True) for n in turn) + data[at + 36 :]


def number_of(picture: Image.Image) -> int:
    """Which frame this is, by the grey right of its middle."""
    grey = np.asarray(picture)[picture.height // 2, picture.width * 3 // 4].mean()
    return round(float(grey) / 8)


def clip_with_caption(path: Path, data: bytes, text: str = "a grey thing") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(text)
    return path
