"""Caption files and lists of captions, whatever editor wrote them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from burnish.data.pictures import BadPicture, read_regular
from burnish.errors import DataError

Encoding = Literal["auto", "utf-8"]

LARGEST_CAPTION_BYTES = 64 << 10  # no text encoder reads a tenth of this
LARGEST_LIST_BYTES = 1 << 30
PROBLEMS_SHOWN = 20
OTHER_EXTENSIONS = (".txt", ".caption", ".captions", ".cap", ".tags")

# What Windows-1252 has in its upper half besides letters and may stand in a caption: marks beside anything,
# symbols beside ASCII only.
_MARKS = frozenset("‚„…‘’“”•–—‹›«»\u00a0")
_SYMBOLS = frozenset("€‰˜™¡£¥§©ª®°±²³´·¹º»¼½¾¿×")


class BadCaption(DataError):
    """A caption that cannot be read and must be mended before training."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption as one line of text; empty where the file says nothing."""

    text: str
    notes: tuple[str, ...] = ()


def read_caption(path: Path, encoding: Encoding = "auto") -> Caption:
    """The caption in a file of its own.

    Raises:
        BadCaption: unreadable, too long, not text, or of an encoding that cannot be told.
    """
    try:
        data = read_regular(path, largest=LARGEST_CAPTION_BYTES)
    except BadPicture as error:
        raise BadCaption(error.message, remedy="Shorten or mend the caption file.") from error
    text, notes = decode_text(data, encoding)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        notes = (*notes, f"{len(lines)} lines joined to one")
    return Caption(" ".join(lines), notes)


def decode_text(data: bytes, encoding: Encoding = "auto") -> tuple[str, tuple[str, ...]]:
    """Text and notes from the bytes of a file.

    Raises:
        BadCaption: NUL bytes, or neither UTF-8 nor (with `auto`) UTF-16 or Windows-1252.
    """
    wide = _utf16(data)
    if wide and encoding == "auto":
        try:
            return _without_nul(data.decode(wide).removeprefix("\ufeff")), (f"read as {wide.upper()}",)
        except UnicodeDecodeError as error:
            raise BadCaption(f"damaged UTF-16: {error.reason} at byte {error.start}", remedy=_SAVE) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if encoding == "auto" and (western := _windows_1252(data)) is not None:
            return _without_nul(western), ("read as Windows-1252",)
        allowed = "UTF-8" if encoding == "utf-8" else "UTF-8, UTF-16 or Windows-1252"
        raise BadCaption(
            f"not {allowed}: byte 0x{data[error.start]:02x} at {error.start}", remedy=_SAVE
        ) from error
    if text.startswith("\ufeff"):
        return _without_nul(text.removeprefix("\ufeff")), ("byte order mark removed",)
    return _without_nul(text), ()


_SAVE = "Save it as UTF-8; `iconv -f gb18030 -t utf-8` converts Chinese text."


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise BadCaption(f"a NUL character at {text.index(chr(0))}: not a text file", remedy=_SAVE)
    return text


def _utf16(data: bytes) -> str | None:
    """`utf-16-le` or `utf-16-be` by the byte order mark, or because nearly every other byte is zero."""
    if data.startswith(b"\xff\xfe"):
        return "utf-16-le"
    if data.startswith(b"\xfe\xff"):
        return "utf-16-be"
    even, odd = data[0::2].count(0), data[1::2].count(0)
    half = len(data) // 2
    if half < 2 or len(data) % 2:
        return None
    if odd >= 0.9 * half and even == 0:
        return "utf-16-le"
    return "utf-16-be" if even >= 0.9 * half and odd == 0 else None


def _windows_1252(data: bytes) -> str | None:
    """The text, where it reads like a Western language; Chinese, Japanese or Cyrillic bytes do not.

    Their characters come as runs of upper-half bytes or as capitals inside words, Western ones as single
    letters among ASCII.
    """
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    if sum(not character.isascii() for character in text) > 0.5 * len(text):
        return None
    for at, character in enumerate(text):
        if character.isascii() or character in _MARKS:
            continue
        before, run = text[at - 1 : at], text[max(0, at - 2) : at + 1]
        if character in _SYMBOLS and (before.isascii() or before in _MARKS):
            continue
        if not character.isalpha() or (len(run) == 3 and all(_accented(c) for c in run)):
            return None
        # "ÖÐ" is half a Chinese word and "xÆ" of another; in "CRÉÉE" all letters are capitals.
        if character.isupper() and (before.islower() or (_accented(before) and not _shouting(text, at))):
            return None
    return text


def _accented(character: str) -> bool:
    return character.isalpha() and not character.isascii()


def _shouting(text: str, at: int) -> bool:
    neighbours = [c for c in text[max(0, at - 4) : at + 4] if c.isascii() and c.isalpha()]
    return bool(neighbours) and all(c.isupper() for c in neighbours)


def read_caption_list(path: Path, encoding: Encoding = "auto") -> Mapping[str, Caption]:
    """Captions by normalised relative path from a JSONL file: one `{"file": ..., "caption": ...}` per line.

    Raises:
        BadCaption: the file is unreadable, or lines are bad or name a file twice; names every line number.
    """
    try:
        data = read_regular(path, largest=LARGEST_LIST_BYTES)
    except BadPicture as error:
        raise BadCaption(f"{path}: {error.message}", remedy="Check data.captions.jsonl.") from error
    try:
        text, notes = decode_text(data, encoding)
    except BadCaption as error:
        raise BadCaption(f"{path}: {error.message}", remedy=error.remedy) from error
    found: dict[str, Caption] = {}
    line_of: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            name, caption = _entry(line)
        except ValueError as error:
            problems.append(f"{path}:{number}  {error}")
            continue
        if name in found:
            problems.append(f"{path}:{number}  {name!r} is already on line {line_of[name]}")
        found[name], line_of[name] = Caption(caption, notes), number
    if problems:
        if len(problems) > PROBLEMS_SHOWN:
            problems = [*problems[:PROBLEMS_SHOWN], f"and {len(problems) - PROBLEMS_SHOWN} more lines"]
        raise BadCaption(
            "\n".join(problems), remedy='Each line must read {"file": "a.png", "caption": "a cat"}.'
        )
    return found


def _entry(line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"an object is needed; got {type(entry).__name__}")
    for key in ("file", "caption"):
        if not isinstance(entry.get(key), str):
            raise ValueError(f"{key!r} must be a text; got {entry.get(key)!r}")
    name, caption = entry["file"], entry["caption"]
    if "\0" in caption:
        raise ValueError("a NUL character in the caption")
    if len(caption.encode()) > LARGEST_CAPTION_BYTES:
        raise ValueError(f"a caption of {len(caption):,} characters; at most {LARGEST_CAPTION_BYTES:,} bytes")
    return normalised(name), " ".join(caption.split())


def normalised(name: str) -> str:
    """A relative path as both Mac (NFD) and everything else (NFC) would spell it."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name.replace("\\", "/"))))
