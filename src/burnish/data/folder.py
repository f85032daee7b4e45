"""What is in a folder of pictures: which files are pictures, which are left out, whose caption is where."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from burnish.data.clips import EXTENSIONS as CLIP_EXTENSIONS
from burnish.data.pictures import BadPicture, readable_extensions, why_not_read
from burnish.errors import DataError

_RESERVED = re.compile(r"^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\.|$)", re.IGNORECASE)
_NO_CLIPS = BadPicture(
    "a clip, and this model learns from still pictures", remedy="Train a video model, or move it elsewhere."
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a file, for the report: skipped, put right or wrong."""

    file: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a folder. Names are relative and posix, sorted as a person would expect."""

    root: Path
    pictures: tuple[str, ...]  # and clips, where they are wanted
    others: frozenset[str]  # everything else, captions among them
    skipped: tuple[Outcome, ...]
    warnings: tuple[str, ...] = ()
    _by_name: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def find(self, stem: str, extension: str) -> str | None:
        """The file `stem + extension`, spelled exactly so or, failing that, as another system spells it.

        Mac archives hold decomposed accents (NFD); extensions come in any letter case.
        """
        if stem + extension in self.others:
            return stem + extension
        alike = self._by_name.get(_folded(stem, extension), [])
        exact = [name for name in alike if name[: -len(extension)] == stem]
        return next(iter(exact or alike), None)


def is_clip(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in CLIP_EXTENSIONS


def list_folder(
    root: Path, *, recursive: bool = True, ignore: Sequence[Path] = (), clips: bool = False
) -> Listing:
    """Walk `root`. Hidden files, run folders, caches and the folders in `ignore` are passed over.

    Args:
        clips: they are wanted beside pictures; otherwise they are skipped with a reason.

    Raises:
        DataError: `root` is no readable folder.
    """
    skipped: list[Outcome] = []
    names = list(_walk(root, recursive, {path.resolve() for path in ignore}, skipped))
    read = readable_extensions()
    pictures, others = [], []
    for name in names:
        extension = os.path.splitext(name)[1].lower()
        unread = why_not_read(extension)
        is_wanted_clip = clips and extension in CLIP_EXTENSIONS
        if is_wanted_clip:
            unread = None
        elif extension in CLIP_EXTENSIONS and unread is None:
            unread = _NO_CLIPS
        if extension not in read and unread is None and not is_wanted_clip:
            others.append(name)
        elif not _is_text(name):
            skipped.append(Outcome(printable(name), "the file name is not valid UTF-8", "Rename the file."))
        elif unread is not None:
            skipped.append(Outcome(printable(name), unread.message, unread.remedy))
        else:
            pictures.append(name)
    by_name: dict[str, list[str]] = {}
    for name in sorted(others):
        by_name.setdefault(_folded(*os.path.splitext(name)), []).append(name)
    return Listing(
        root,
        tuple(sorted(pictures, key=lambda name: (unicodedata.normalize("NFC", name), name))),
        frozenset(others),
        tuple(skipped),
        tuple(f"{printable(name)} cannot be copied to Windows" for name in pictures if not_on_windows(name)),
        by_name,
    )


def not_on_windows(name: str) -> bool:
    """Whether Windows refuses this relative path: a device name, or a part that ends in a dot or a space."""
    return any(
        _RESERVED.match(part) or part.endswith((".", " ")) or re.search(r'[<>:"|?*\x00-\x1f\\]', part)
        for part in name.split("/")
    )


def printable(name: str) -> str:
    """A file name that JSON and terminals can hold, whatever its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _folded(stem: str, extension: str) -> str:
    return unicodedata.normalize("NFC", stem) + extension.lower()


def _walk(root: Path, recursive: bool, ignore: set[Path], skipped: list[Outcome]) -> Iterator[str]:
    """Relative posix paths of all files. A folder that is linked into itself is entered once."""
    entered: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as scan:
                entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            if not folder:
                raise DataError(
                    f"{root} is no folder that can be read: {error.strerror}",
                    remedy="Check this path under `data`.",
                ) from error
            skipped.append(Outcome(printable(folder), f"folder not read: {error.strerror}"))
            continue
        if folder and _is_ours({entry.name for entry in entries}):
            continue
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if not _is_folder(entry):
                yield relative
            elif recursive and Path(entry.path).resolve() not in ignore:
                waiting.append(relative)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def _is_ours(names: set[str]) -> bool:
    """A run folder, or a cache that says so (https://bford.info/cachedir/)."""
    return "CACHEDIR.TAG" in names or {"status.json", "config.yaml"} <= names
