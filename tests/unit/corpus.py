"""Good and bad pictures and captions, made by code: no binary is kept.

The numbers are rows of the bad-input corpus. Outcomes: S skipped and listed, F fixed and noted, E an error that
names the file and what to do, W a warning beside a usable set.
"""

from __future__ import annotations

import io
import json
import os
import struct
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

Outcome = Literal["S", "F", "E", "W"]


def scene(seed: int, height: int = 96, width: int = 128) -> Image.Image:
    """A smooth picture that is different for each seed and at each corner."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def good_set(folder: Path, count: int = 20) -> list[str]:
    """`count` sound pictures with captions, in three formats and three shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        shape = ((96, 128), (128, 96), (112, 112))[number % 3]
        name = f"good{number:02d}{('.png', '.jpg', '.webp')[number % 3]}"
        scene(number, *shape).save(folder / name)
        caption(folder / name, f"a sks thing, number {number}, on a table")
        names.append(name)
    return names


def caption(picture: Path, text: str | bytes = "a sks thing", extension: str = ".txt") -> None:
    path = picture.with_name(os.path.splitext(picture.name)[0] + extension)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def jpeg(seed: int = 0, **options: object) -> bytes:
    buffer = io.BytesIO()
    scene(seed).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def png_file(
    width: int, height: int, depth: int, colour: int, rows: bytes, extra: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    """A PNG from its scan lines, each led by its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, chunks))


def png_chunk(chunk: tuple[bytes, bytes]) -> bytes:
    kind, data = chunk
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    return png_file(width, height, 1, 0, bytes((width // 8 + 1) * height))


def deep_rgb(values_HW3: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel."""
    height, width, _ = values_HW3.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HW3)
    return png_file(width, height, 16, 2, rows)


def matrix_profile(name: str, columns_XYZ: tuple[tuple[float, float, float], ...], gamma: float) -> bytes:
    """An RGB display profile (ICC.1:2001-04) from D50 primaries and one gamma."""
    tags = [
        (b"desc", _description(name)),
        (b"cprt", b"text\0\0\0\0none\0"),
        (b"wtpt", _xyz(0.9642, 1, 0.8249)),
    ]
    tags += [(tag, _xyz(*c)) for tag, c in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns_XYZ, strict=True)]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags += [(tag, curve) for tag in (b"rTRC", b"gTRC", b"bTRC")]
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def cmyk_profile(ink_Lab: dict[int, tuple[float, float, float]]) -> bytes:
    """A printer profile with a 2-point table; `ink_Lab` gives colours by ink bits (C 8, M 4, Y 2, K 1)."""
    nodes = b""
    for inks in range(16):
        lightness, a, b = ink_Lab.get(
            inks, (0.0, 0.0, 0.0) if inks & 1 else (100 / (1 + inks.bit_count()), 0, 0)
        )
        nodes += bytes((round(lightness * 2.55), round(a + 128), round(b + 128)))
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + nodes + ramp * 3
    tags = [
        (b"desc", _description("test inks")),
        (b"cprt", b"text\0\0\0\0none\0"),
        (b"wtpt", _xyz(0.9642, 1, 0.8249)),
        (b"A2B0", table),
    ]
    return _profile(b"prtr", b"CMYK", b"Lab ", tags)


ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
INKS = {0: (100.0, 0.0, 0.0), 8: (55.0, -37.0, -50.0), 4: (48.0, 74.0, -3.0), 2: (89.0, -5.0, 93.0)}


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))


def _description(name: str) -> bytes:
    text = name.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(8 + 3 + 67)


def _profile(kind: bytes, space: bytes, connection: bytes, tags: list[tuple[bytes, bytes]]) -> bytes:
    offset = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags:
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content
    head = struct.pack(">I4sI", offset + len(data), b"\0\0\0\0", 0x02100000) + kind + space + connection
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + table + data


@dataclass(frozen=True)
class Row:
    """One thing that goes wrong: writes it beside a good set and says which files it concerns."""

    number: int
    label: str
    outcome: Outcome
    says: str  # in the reason, the note or the message
    make: Callable[[Path], list[str]]

    def __str__(self) -> str:
        return f"{self.number}-{self.label}"


ROWS: list[Row] = []


def row(number: int, label: str, outcome: Outcome, says: str) -> Callable[..., Callable[[Path], list[str]]]:
    def add(make: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        ROWS.append(Row(number, label, outcome, says, make))
        return make

    return add


def file_row(
    number: int, label: str, outcome: Outcome, says: str, name: str, data: Callable[[], bytes]
) -> None:
    """A row that is one file with a good caption."""

    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(data())
        caption(folder / name)
        return [name]

    ROWS.append(Row(number, label, outcome, says, make))


def saved(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(scene(3), "JPEG", quality=95, exif=exif)


def palette_with_hole() -> bytes:
    picture = scene(4).quantize(16)
    return saved(picture, "PNG", transparency=0)


def hidden_colour() -> Image.Image:
    """Red under full transparency on the left, blue and opaque on the right."""
    picture = Image.new("RGBA", (128, 96), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (64, 0, 128, 96))
    return picture


def frames(format: str) -> bytes:
    pictures = [scene(seed) for seed in range(3)]
    return saved(pictures[0], format, save_all=True, append_images=pictures[1:])


def broken_checksum() -> bytes:
    data = bytearray(saved(scene(5), "PNG"))
    end_of_pixels = data.rindex(b"IEND") - 4
    data[end_of_pixels - 1] ^= 0xFF  # the last byte of the checksum of IDAT
    return bytes(data)


file_row(1, "zero-byte", "S", "zero bytes", "bad.jpg", lambda: b"")
file_row(2, "html", "S", "a web page", "bad.jpg", lambda: b"<!DOCTYPE html><html>404</html>")
file_row(3, "jpeg-half", "S", "damaged JPEG", "bad.jpg", lambda: jpeg()[: len(jpeg()) // 2])
file_row(4, "jpeg-less-19", "S", "damaged JPEG", "bad.jpg", lambda: jpeg()[:-19])
file_row(5, "png-checksum", "S", "wrong checksum", "bad.png", broken_checksum)
file_row(6, "png-header", "S", "cut short", "bad.png", lambda: saved(scene(5), "PNG")[:33])
for _orientation in range(2, 9):
    file_row(
        7,
        f"exif-{_orientation}",
        "F",
        f"EXIF orientation {_orientation}",
        "turned.jpg",
        lambda orientation=_orientation: oriented(orientation),
    )
file_row(
    8,
    "exif-corrupt",
    "F",
    "damaged EXIF",
    "exif.jpg",
    lambda: jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" * 3),
)
file_row(9, "rgba", "F", "transparency", "alpha.png", lambda: saved(hidden_colour(), "PNG"))
file_row(10, "la", "F", "transparency", "alpha.png", lambda: saved(hidden_colour().convert("LA"), "PNG"))
file_row(11, "palette", "F", "transparency", "palette.png", palette_with_hole)
file_row(
    12,
    "cmyk-profile",
    "F",
    "test inks",
    "inks.jpg",
    lambda: saved(scene(6).convert("CMYK"), "JPEG", icc_profile=cmyk_profile(INKS)),
)
file_row(13, "cmyk", "F", "CMYK without", "inks.jpg", lambda: saved(scene(6).convert("CMYK"), "JPEG"))
file_row(
    14,
    "grey-16",
    "F",
    "16 bits",
    "deep.png",
    lambda: saved(Image.fromarray(np.full((96, 128), 32768, np.uint16)), "PNG"),
)
file_row(15, "rgb-16", "F", "16 bits", "deep.png", lambda: deep_rgb(np.full((96, 128, 3), 32768)))
file_row(16, "float-tiff", "S", ".tif", "f.tif", lambda: saved(Image.new("F", (128, 96)), "TIFF"))
file_row(16, "float-tiff-as-png", "S", "TIFF", "f.png", lambda: saved(Image.new("F", (128, 96)), "TIFF"))
file_row(17, "one-bit", "F", "1-bit", "bits.png", lambda: saved(scene(7).convert("1"), "PNG"))
for _name, _primaries in (("Adobe RGB", ADOBE_RGB), ("Display P3", DISPLAY_P3)):
    file_row(
        18,
        _name.replace(" ", ""),
        "F",
        _name,
        "wide.png",
        lambda name=_name, primaries=_primaries: saved(
            scene(8), "PNG", icc_profile=matrix_profile(name, primaries, 2.2)
        ),
    )
file_row(19, "gif", "S", ".gif", "moving.gif", lambda: frames("GIF"))
file_row(19, "animated-webp", "S", "animated", "moving.webp", lambda: frames("WEBP"))
file_row(19, "apng", "S", "animated", "moving.png", lambda: frames("PNG"))
file_row(20, "pages", "S", ".tiff", "pages.tiff", lambda: frames("TIFF"))
file_row(21, "bomb-169", "S", "169 megapixels", "large.png", lambda: bomb(13000, 13000))
file_row(22, "bomb-190", "S", "190 megapixels", "large.png", lambda: bomb(13784, 13784))
file_row(23, "one-pixel", "S", "min_side", "small.png", lambda: saved(Image.new("RGB", (1, 1)), "PNG"))
file_row(23, "thread", "S", "min_side", "thin.png", lambda: saved(Image.new("RGB", (5000, 1)), "PNG"))
file_row(24, "png-as-jpg", "F", "is a PNG", "named.jpg", lambda: saved(scene(9), "PNG"))
file_row(25, "heic", "S", "pillow-heif", "phone.HEIC", lambda: b"\0\0\0\x18ftypheic" + bytes(64))


@row(25, "upper-case", "W", "")
def upper_case(folder: Path) -> list[str]:
    for name in ("LOUD.JPEG", "old.jfif"):
        (folder / name).write_bytes(jpeg(1))
        caption(folder / name)
    return ["LOUD.JPEG", "old.jfif"]


@row(26, "broken-link", "S", "broken link")
def broken_link(folder: Path) -> list[str]:
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    return ["link.png"]


@row(26, "link-loop", "S", "leads back")
def link_loop(folder: Path) -> list[str]:
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return ["loop.png"]


@row(26, "pipe", "S", "not a regular file")
def pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe.png")
    return ["pipe.png"]


def _named(number: int, label: str, outcome: Outcome, says: str, *names: str) -> None:
    def make(folder: Path) -> list[str]:
        for seed, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            scene(30 + seed).save(folder / name)
            caption(folder / name)
        return list(names)

    ROWS.append(Row(number, label, outcome, says, make))


_named(27, "nfc-nfd", "W", "", *(unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")))
_named(28, "scripts", "W", "", "🤖.png", "שלום.png", "写真.png")
_named(29, "long", "W", "", "n" * 251 + ".png")
_named(30, "odd", "W", "", "-rf.png", " two  words .png", "new\nline.png")
_named(31, "one-caption", "E", "same caption file", "twin.jpg", "twin.png")
_named(32, "two-folders", "W", "", "a/same.png", "b/same.png", "a_same.png")
_named(33, "device", "W", "Windows", "CON.png", "dots./x.png")


@row(34, "not-utf8", "S", "not valid UTF-8")
def not_utf8(folder: Path) -> list[str]:
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(saved(scene(1), "PNG"))
    return ["caf\\xe9.png"]


def _captioned(
    number: int, label: str, outcome: Outcome, says: str, text: bytes | None, name: str = "c"
) -> None:
    def make(folder: Path) -> list[str]:
        scene(40).save(folder / f"{name}.png")
        if text is not None:
            caption(folder / f"{name}.png", text)
        return [f"{name}.png"]

    ROWS.append(Row(number, label, outcome, says, make))


_captioned(35, "missing", "S", "no caption", None)
_captioned(36, "empty", "S", "an empty caption", b"")
_captioned(37, "spaces", "S", "an empty caption", b" \t\r\n  ")
_captioned(37, "mark-only", "S", "an empty caption", b"\xef\xbb\xbf")
_captioned(38, "utf8-mark", "F", "byte order mark", b"\xef\xbb\xbfa cat")
_captioned(39, "utf16-le", "F", "UTF-16-LE", "\ufeffa cat, café".encode("utf-16-le"))
_captioned(39, "utf16-be", "F", "UTF-16-BE", "\ufeffa cat, café".encode("utf-16-be"))
_captioned(39, "utf16-unmarked", "F", "UTF-16-LE", "a cat on a mat".encode("utf-16-le"))
_captioned(40, "cp1252", "F", "Windows-1252", b"a cat\x92s caf\xe9")
_captioned(41, "gbk", "E", "not UTF-8", "一只猫坐在桌子上".encode("gbk"))
_captioned(41, "gbk-in-english", "E", "not UTF-8", "a photo of 中国 street".encode("gbk"))
_captioned(42, "nul", "E", "NUL", b"a cat\0 on a mat")
_captioned(43, "megabyte", "E", "1,000,000 bytes", b"a " * 500_000)
_captioned(47, "lines", "F", "2 lines", b"a cat,\r\non a mat\r\n")


@row(45, "orphan", "W", "has no picture")
def orphan(folder: Path) -> list[str]:
    (folder / "alone.txt").write_text("a cat")
    return []


@row(46, "other-extension", "E", "lost.caption")
def other_extension(folder: Path) -> list[str]:
    scene(41).save(folder / "lost.png")
    caption(folder / "lost.png", extension=".caption")
    return ["lost.png"]


def caption_list(folder: Path, names: list[str]) -> Path:
    """The captions of a good set in one file, in place of the caption files."""
    lines = [json.dumps({"file": name, "caption": f"a sks thing, {name}"}) for name in names]
    for name in names:
        os.unlink(folder / f"{os.path.splitext(name)[0]}.txt")
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
