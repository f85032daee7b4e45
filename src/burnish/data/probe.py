"""Decoding every picture and clip once before training. What was found is remembered by content (law L3)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from av import __version__ as av_version
from PIL import __version__ as pillow_version

from burnish.data import audio, clips
from burnish.data.cache import write_entry
from burnish.data.folder import is_clip
from burnish.data.pictures import (
    CODE_VERSION,
    BadPicture,
    content_hash,
    decode_picture,
    open_regular,
    read_regular,
    wrong_extension,
)

Progress = Callable[[int, int], None]  # done, of


@dataclass(frozen=True, slots=True)
class Facts:
    """A picture or clip that decodes; sizes as it will be seen, upright."""

    sha256: str
    height: int
    width: int
    fixes: tuple[str, ...]
    duration: float | None = None  # of a clip, in seconds
    sound: audio.Span | None = None  # of a clip, where it was looked for


@dataclass(frozen=True, slots=True)
class _Found:
    """What decoding some bytes gave; `bad` says why they are no picture, or no clip."""

    bad: str = ""
    remedy: str = ""
    format: str = ""
    height: int = 0
    width: int = 0
    fixes: tuple[str, ...] = ()
    duration: float | None = None
    sound: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """Decodes pictures and clips, or recalls what decoding gave for the same bytes. `folder` None remembers nothing.

    Of clips the sound is decoded, too, if `audio`.
    """

    folder: Path | None
    background: str
    max_megapixels: float
    audio: bool = False

    def facts(self, path: Path) -> Facts:
        """Raises:
        BadPicture: the file is to be skipped.
        """
        if is_clip(path.name):
            return self._clip_facts(path)
        data = read_regular(path)
        sha256 = content_hash(data)
        entry = self._entry(sha256, f"{CODE_VERSION} {pillow_version}")
        found = self._recall(entry)
        if found is None:
            found = self._decode(data)
            self._remember(entry, found)
        if found.bad:
            raise BadPicture(found.bad, remedy=found.remedy)
        fixes = found.fixes + wrong_extension(path, found.format)
        return Facts(sha256, found.height, found.width, fixes)

    def _clip_facts(self, path: Path) -> Facts:
        with open_regular(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            heard = f" audio {audio.CODE_VERSION}" if self.audio else ""
            entry = self._entry(sha256, f"clip {clips.CODE_VERSION}{heard} {av_version}")
            found = self._recall(entry)
            if found is None:
                found = self._inspect(file)
                self._remember(entry, found)
        if found.bad:
            raise BadPicture(found.bad, remedy=found.remedy)
        sound = audio.Span(*found.sound) if found.sound is not None else None
        return Facts(sha256, found.height, found.width, found.fixes, found.duration, sound)

    def _inspect(self, file: BinaryIO) -> _Found:
        try:
            facts = clips.inspect_clip(file, max_megapixels=self.max_megapixels)
            sound = audio.sound_of(file) if self.audio else None
        except BadPicture as error:
            return _Found(bad=error.message, remedy=error.remedy)
        return _Found(
            format="clip",
            height=facts.height,
            width=facts.width,
            fixes=facts.fixes,
            duration=facts.duration,
            sound=(sound.start, sound.end) if sound is not None else None,
        )

    def _decode(self, data: bytes) -> _Found:
        try:
            decoded = decode_picture(data, background=self.background, max_megapixels=self.max_megapixels)
        except BadPicture as error:
            return _Found(bad=error.message, remedy=error.remedy)
        width, height = decoded.picture.size
        return _Found(format=decoded.format, height=height, width=width, fixes=decoded.fixes)

    def _entry(self, sha256: str, decoder: str) -> Path | None:
        """Where the findings are kept; another decoder may read what this one cannot, and the other way round."""
        if self.folder is None:
            return None
        said = f"{sha256} {self.background} {self.max_megapixels} {decoder}"
        name = hashlib.blake2b(said.encode(), digest_size=20).hexdigest()
        return self.folder / "pictures" / name[:2] / f"{name}.json"

    def _recall(self, entry: Path | None) -> _Found | None:
        if entry is None:
            return None
        with suppress(OSError, ValueError, TypeError):  # not there, or torn: decode again
            values = {"sound": None, **json.loads(entry.read_bytes())}
            sound = values["sound"] and tuple(values["sound"])
            return _Found(**{**values, "fixes": tuple(values["fixes"]), "sound": sound})
        return None

    def _remember(self, entry: Path | None, found: _Found) -> None:
        if entry is None or self.folder is None:
            return
        write_entry(entry, json.dumps(asdict(found)).encode(), scratch=self.folder / "scratch")


def probe_all(
    probe: Probe, paths: Sequence[Path], *, threads: int | None = None, progress: Progress | None = None
) -> list[Facts | BadPicture]:
    """The facts of each path, or why it is to be skipped, in the order of `paths`."""

    def one(path: Path) -> Facts | BadPicture:
        try:
            return probe.facts(path)
        except BadPicture as error:
            return error

    results: list[Facts | BadPicture] = []
    # More threads gain little and hold one decoded picture each, of up to half a GiB.
    with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), "decode") as pool:
        for result in pool.map(one, paths):
            results.append(result)
            if progress is not None:
                progress(len(results), len(paths))
    return results
