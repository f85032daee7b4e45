"""Decoding every picture once before training. What was found is remembered by content (law L3)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import __version__ as pillow_version

from burnish.data.cache import write_entry
from burnish.data.pictures import (
    CODE_VERSION,
    BadPicture,
    content_hash,
    decode_picture,
    read_regular,
    wrong_extension,
)

Progress = Callable[[int, int], None]  # done, of


@dataclass(frozen=True, slots=True)
class Facts:
    """A picture that decodes; sizes as it will be seen, upright."""

    sha256: str
    height: int
    width: int
    fixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What decoding some bytes gave; `bad` says why they are no picture."""

    bad: str = ""
    remedy: str = ""
    format: str = ""
    height: int = 0
    width: int = 0
    fixes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """Decodes pictures, or recalls what decoding gave for the same bytes. `folder` None remembers nothing."""

    folder: Path | None
    background: str
    max_megapixels: float

    def facts(self, path: Path) -> Facts:
        """Raises:
        BadPicture: the file is to be skipped.
        """
        data = read_regular(path)
        sha256 = content_hash(data)
        found = self._recall(sha256)
        if found is None:
            found = self._decode(data)
            self._remember(sha256, found)
        if found.bad:
            raise BadPicture(found.bad, remedy=found.remedy)
        fixes = found.fixes + wrong_extension(path, found.format)
        return Facts(sha256, found.height, found.width, fixes)

    def _decode(self, data: bytes) -> _Found:
        try:
            decoded = decode_picture(data, background=self.background, max_megapixels=self.max_megapixels)
        except BadPicture as error:
            return _Found(bad=error.message, remedy=error.remedy)
        width, height = decoded.picture.size
        return _Found(format=decoded.format, height=height, width=width, fixes=decoded.fixes)

    def _entry(self, folder: Path, sha256: str) -> Path:
        # Another Pillow may decode what this one cannot, and the other way round.
        said = f"{sha256} {self.background} {self.max_megapixels} {CODE_VERSION} {pillow_version}"
        name = hashlib.blake2b(said.encode(), digest_size=20).hexdigest()
        return folder / "pictures" / name[:2] / f"{name}.json"

    def _recall(self, sha256: str) -> _Found | None:
        if self.folder is None:
            return None
        with suppress(OSError, ValueError, TypeError):  # not there, or torn: decode again
            values = json.loads(self._entry(self.folder, sha256).read_bytes())
            return _Found(**{**values, "fixes": tuple(values["fixes"])})
        return None

    def _remember(self, sha256: str, found: _Found) -> None:
        if self.folder is None:
            return
        text = json.dumps(asdict(found))
        write_entry(self._entry(self.folder, sha256), text.encode(), scratch=self.folder / "scratch")


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
