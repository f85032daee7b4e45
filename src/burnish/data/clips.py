"""Clips: upright 8-bit RGB frames by time, and what is known of a clip after every frame was decoded once.

Containers are chosen by content, never by name: MP4/MOV, Matroska/WebM, AVI and GIF. FFmpeg's other demuxers (some
open further files or addresses, as playlists do) are never reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from PIL import Image

from burnish.data.colour import onto_background
from burnish.data.pictures import REPLACE, BadPicture, what_it_is_instead

CODE_VERSION = 1  # part of every clip's cache key: raise it when the same file would give other frames

EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif"})

_MATROSKA, _GIF, _RIFF = b"\x1a\x45\xdf\xa3", b"GIF8", b"RIFF"
_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_ALPHA = frozenset({"rgba", "bgra", "argb", "abgr", "ya8", "gbrap"})
_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273, table 3
_WHOLE = 0.9  # of the frames that the file promises
_EVEN = 0.25  # frames may be this share of their mean distance off before the rate counts as variable
_SEEK_S = 2.0  # what is later than this is sought


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """A clip all of whose frames decode. Sizes as it is seen: upright, with square pixels."""

    height: int
    width: int
    duration: float  # seconds from the first frame's appearance to the last one's end
    fixes: tuple[str, ...] = ()


def inspect_clip(file: BinaryIO, *, max_megapixels: float) -> ClipFacts:
    """Decode every frame once.

    Raises:
        BadPicture: no clip, damaged, cut short, without pictures, too large, or of a kind that is not read.
    """
    with opened(file) as container:
        stream = container.streams.video[0]
        _refuse_large(stream.codec_context.width, stream.codec_context.height, max_megapixels)
        promised = stream.frames
        aspect = stream.sample_aspect_ratio or 1
        times: list[float] = []
        first, last_for = None, 0.0
        for frame in _frames(container):
            if first is None:
                first = frame
                _refuse_large(frame.width, frame.height, max_megapixels)
                if frame.color_trc in _HDR:
                    raise BadPicture(
                        f"HDR colours ({_HDR[frame.color_trc]}), which are not converted",
                        remedy="Convert it to SDR (BT.709) with a tone mapping of your choice.",
                    )
            elif (frame.width, frame.height) != (first.width, first.height):
                raise BadPicture(
                    f"its size changes from {first.width} x {first.height} to {frame.width} x {frame.height}",
                    remedy="Cut it into clips of one size each.",
                )
            if frame.is_corrupt:
                raise BadPicture(f"damaged: frame {len(times) + 1} is broken", remedy=REPLACE)
            times.append(_seconds(frame))
            last_for = float((frame.duration or 0) * (frame.time_base or 0))
        if first is None:
            raise BadPicture("a clip without a single frame", remedy=REPLACE)
        if len(times) < _WHOLE * promised:
            raise BadPicture(f"cut short: {len(times)} of {promised} frames are there", remedy=REPLACE)
        _refuse_torn(container, times)

    gaps = np.diff(times)
    mean = float(gaps.mean()) if len(gaps) else last_for
    fixes: list[str] = []
    if len(gaps) and float(np.abs(gaps - mean).max()) > _EVEN * mean:
        fixes.append("variable frame rate: frames are taken by their time")
    height, width = first.height, max(1, round(first.width * aspect))
    if width != first.width:
        fixes.append(f"pixels that are not square ({aspect.numerator}:{aspect.denominator}) put right")
    if first.rotation % 360:
        fixes.append(f"turned upright (rotated by {first.rotation % 360} degrees)")
    if first.rotation % 180:
        height, width = width, height
    return ClipFacts(height, width, times[-1] - times[0] + (last_for or mean), tuple(fixes))


def frames_at(file: BinaryIO, times: Sequence[float], *, background: str = "#ffffff") -> list[Image.Image]:
    """The frames on screen at `times`, in seconds after the first frame, ascending; mode RGB, upright.

    That is the nearest frame in time, except that one which appears later counts only within half the distance of two
    `times`: a frame that stands long is not left early. Pixels keep the shape they are stored in.

    Raises:
        BadPicture: damaged.
    """
    if times[0] > _SEEK_S:
        found = _taken(file, times, background, seek=True)
        if found is not None:
            return found
    found = _taken(file, times, background, seek=False)
    assert found is not None, "nothing is sought from the start"
    return found


def _taken(
    file: BinaryIO, times: Sequence[float], background: str, *, seek: bool
) -> list[Image.Image] | None:
    """None where seeking led past the first of `times`, as a broken index does."""
    early = (times[1] - times[0]) / 2 if len(times) > 1 else 0.0
    found: list[Image.Image] = []
    with opened(file) as container:
        start = 0.0
        if seek:
            start = first_time(container)
            container.seek(int((start + times[0] - _SEEK_S / 2) * av.time_base), backward=True)
        before: tuple[float, VideoFrame] | None = None
        for frame in _frames(container):
            if before is None and not seek:
                start = _seconds(frame)
            at = _seconds(frame) - start
            if before is None and seek and at > times[0]:
                return None
            while before is not None and len(found) < len(times):
                wanted = times[len(found)]
                if at < wanted or at - wanted < min(wanted - before[0], early + 1e-6):
                    break
                found.append(_picture(before[1], background))
            if len(found) == len(times):
                return found
            before = (at, frame)
        if before is None:
            raise BadPicture("a clip without a single frame", remedy=REPLACE)
        return found + [_picture(before[1], background)] * (len(times) - len(found))


def first_time(container: InputContainer) -> float:
    """When the first frame appears, by the container's clock, in seconds."""
    return next((_seconds(frame) for frame in _frames(container)), 0.0)


@contextmanager
def opened(file: BinaryIO) -> Iterator[InputContainer]:
    """A clip from its beginning on.

    Raises:
        BadPicture: no clip, or damaged; inside, too.
    """
    file.seek(0)
    format = _format_of(file.read(64))
    file.seek(0)
    try:
        with av.open(file, "r", format=format) as container:
            if not container.streams.video:
                raise BadPicture("no pictures in it, only sound", remedy="Remove it.")
            yield container
    except av.error.FFmpegError as error:
        raise BadPicture(f"damaged clip: {error.strerror}", remedy=REPLACE) from error


def _frames(container: InputContainer) -> Iterator[VideoFrame]:
    """Frames with a time, in the order they are seen."""
    return (frame for frame in container.decode(container.streams.video[0]) if frame.pts is not None)


def _seconds(frame: VideoFrame) -> float:
    assert frame.pts is not None
    assert frame.time_base is not None
    return float(frame.pts * frame.time_base)


def _picture(frame: VideoFrame, background: str) -> Image.Image:
    """Mode RGB and upright; a rotation is stored counter-clockwise, in steps of 90 degrees."""
    if frame.format.name in _ALPHA or frame.format.name.startswith("yuva"):
        picture = onto_background(Image.fromarray(frame.to_ndarray(format="rgba")), background, [])
    else:
        picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turned = round(frame.rotation / 90) % 4
    return picture.transpose(_TURNS[turned - 1]) if turned else picture


_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def _refuse_large(width: int, height: int, max_megapixels: float) -> None:
    if width * height > max_megapixels * 1e6:
        raise BadPicture(
            f"frames of {width} x {height} are {width * height / 1e6:.0f} megapixels, more than {max_megapixels:g}",
            remedy="Make it smaller, or raise max_megapixels.",
        )


def _refuse_torn(container: InputContainer, times: Sequence[float]) -> None:
    """Matroska and AVI promise a duration instead of a number of frames; a container's covers the sound as well."""
    if len(container.streams) > 1 or not container.duration or len(times) < 2:
        return
    promised = container.duration / av.time_base
    there = times[-1] - times[0] + (times[-1] - times[0]) / (len(times) - 1)
    if there < _WHOLE * promised:
        raise BadPicture(f"cut short: {there:.1f} of {promised:.1f} seconds are there", remedy=REPLACE)


def _format_of(head: bytes) -> str:
    """FFmpeg's name of the container."""
    if not head:
        raise BadPicture("zero bytes", remedy=REPLACE)
    if head[4:8] in _MOV_BOXES:
        return "mov"
    if head.startswith(_MATROSKA):
        return "matroska"
    if head.startswith(_RIFF) and head[8:12] == b"AVI ":
        return "avi"
    if head.startswith(_GIF):
        return "gif"
    raise BadPicture(what_it_is_instead(head, "clip"), remedy="Convert it to MP4, or remove it.")
