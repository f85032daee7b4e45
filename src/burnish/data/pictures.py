"""One picture file in, an upright 8-bit sRGB picture out, with a note of all that had to be put right.

Decoders are chosen by content, never by name: JPEG, PNG, WebP, and AVIF and HEIC where the machine has a
decoder. Pillow's other plug-ins (some start programs, as EPS does) are never reached.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin, features
from PIL.ImageFile import ImageFile

from burnish.data.colour import onto_background, to_srgb
from burnish.data.decoder_warnings import collected_warnings
from burnish.errors import DataError

CODE_VERSION = 1  # part of every latent's cache key: raise it when the same file would give other pixels

EXTENSIONS: Mapping[str, frozenset[str]] = {
    "JPEG": frozenset({".jpg", ".jpeg", ".jfif"}),
    "PNG": frozenset({".png"}),
    "WEBP": frozenset({".webp"}),
    "AVIF": frozenset({".avif"}),
    "HEIF": frozenset({".heic", ".heif"}),
}
ALWAYS_READ = EXTENSIONS["JPEG"] | EXTENSIONS["PNG"] | EXTENSIONS["WEBP"]
NOT_READ = frozenset(
    {".gif", ".apng", ".bmp", ".tif", ".tiff", ".jxl", ".jp2", ".j2k", ".psd", ".exr", ".hdr", ".tga", ".ico"}
    | {".ppm", ".pgm", ".svg", ".dng", ".cr2", ".nef", ".arw"}
)
LARGEST_FILE_BYTES = 2 << 30

# What Pillow's decoders raise on damaged input; none of them says anything about this program.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, RuntimeError)
DAMAGED_BITS = (struct.error, zlib.error, Image.DecompressionBombError)

CONVERT = "Convert it to PNG or JPEG, or remove it."
REPLACE = "Replace the file by a sound copy, or remove it."

_UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # the EXIF tag
_EMPTY_EXIF_BYTES = 24  # a header and a directory of no entries


class BadPicture(DataError):
    """A file that cannot be used as a picture; `message` is the reason, to be listed in the data report."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture in mode RGB and what was done to it."""

    picture: Image.Image
    format: str  # a key of EXTENSIONS
    fixes: tuple[str, ...]


def open_picture(
    path: Path, *, background: str = "#ffffff", max_megapixels: float = 150.0
) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture in mode RGB, upright, in sRGB, on `background`, fully decoded; and what had to be fixed.

    Raises:
        BadPicture: the file is to be skipped; says why.
    """
    decoded = decode_picture(read_regular(path), background=background, max_megapixels=max_megapixels)
    return decoded.picture, decoded.fixes + wrong_extension(path, decoded.format)


def read_regular(path: Path, *, largest: int = LARGEST_FILE_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        BadPicture: not a regular file, unreadable, or of more than `largest` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise BadPicture(f"a file of {size:,} bytes; at most {largest:,} are read", remedy="Remove it.")
        return file.read()


@contextmanager
def open_regular(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file to read from. Never hangs on a FIFO or a device, which opening alone would.

    Raises:
        BadPicture: not a regular file, or reading it fails, then or inside the block.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise BadPicture(_why_not_opened(path, error), remedy=_how_to_open(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadPicture("not a regular file (a pipe, a device or a folder)", remedy="Remove it.")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise BadPicture(f"reading failed: {error.strerror}", remedy=REPLACE) from error
    finally:
        os.close(descriptor)


def content_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def readable_extensions() -> frozenset[str]:
    """Lower-case file name endings that are picked up on this machine."""
    read = ALWAYS_READ
    if importlib.util.find_spec("PIL.AvifImagePlugin") is not None and features.check("avif"):
        read = read | EXTENSIONS["AVIF"]
    if importlib.util.find_spec("pillow_heif") is not None:
        read = read | EXTENSIONS["HEIF"]
    return read


def why_not_read(extension: str) -> BadPicture | None:
    """Why a file with this ending is left out although it is a picture; None where it is none or is read."""
    extension = extension.lower()
    if extension in readable_extensions():
        return None
    if extension in EXTENSIONS["HEIF"]:
        return BadPicture("HEIC needs the package pillow-heif", remedy=f"pip install pillow-heif. {CONVERT}")
    if extension in EXTENSIONS["AVIF"]:
        return BadPicture(
            "AVIF needs a newer package pillow", remedy=f"pip install -U 'pillow>=11.3'. {CONVERT}"
        )
    if extension in NOT_READ:
        return BadPicture(f"{extension} files are not read", remedy=CONVERT)
    return None


def wrong_extension(path: Path, format: str) -> tuple[str, ...]:
    if path.suffix.lower() in EXTENSIONS[format]:
        return ()
    return (f"is a {format} in spite of its name",)


def decode_picture(data: bytes, *, background: str, max_megapixels: float) -> Decoded:
    """Decode the whole of a file's bytes. `background` is `#rrggbb`, laid under transparent parts.

    Raises:
        BadPicture: empty, damaged, animated, too large or of a format that is not read.
    """
    picture, format, fixes, warned = _in_srgb(data, max_megapixels)
    picture = onto_background(picture, background, fixes)
    fixes += dict.fromkeys(f"decoder: {text}" for text in warned if "exif" not in text.lower())
    return Decoded(picture, format, tuple(fixes))


def opacity(data: bytes) -> Image.Image:
    """How opaque a picture is, mode L, upright: 255 where nothing shows through, everywhere if it has no alpha.

    Raises:
        BadPicture: as `decode_picture`.
    """
    picture, *_ = _in_srgb(data, float("inf"))
    return picture.getchannel("A") if picture.mode == "RGBA" else Image.new("L", picture.size, 255)


def _in_srgb(data: bytes, max_megapixels: float) -> tuple[Image.Image, str, list[str], list[str]]:
    """Upright, RGB or RGBA; its format, what was fixed, and what the decoder said."""
    format = _format_of(data)
    with collected_warnings() as warned:
        try:
            image = _header(format, data)
            _refuse(image, format, max_megapixels)
            image.load()
        except BadPicture:
            raise
        except (*DAMAGED, *DAMAGED_BITS) as error:
            raise BadPicture(f"damaged {format}: {_first_line(error)}", remedy=REPLACE) from error
        fixes: list[str] = []
        orientation = _orientation(image, fixes, warned)
        picture: Image.Image = image
        if orientation in _UPRIGHT:
            picture = image.transpose(_UPRIGHT[orientation])
            fixes.append(f"turned upright (EXIF orientation {orientation})")
        if format == "PNG" and data[24] == 16:
            fixes.append("16 bits per channel scaled to 8")
        picture = to_srgb(_eight_bits(picture, fixes), image.info.get("icc_profile"), fixes)
    return picture, format, fixes, warned


def _format_of(data: bytes) -> str:
    if not data:
        raise BadPicture("zero bytes", remedy=REPLACE)
    head = data[:64]
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"heim", b"heis"):
        return "HEIF"
    raise BadPicture(what_it_is_instead(head, "picture"), remedy=CONVERT)


def what_it_is_instead(head: bytes, wanted: str) -> str:
    """Why bytes that begin with `head` are not the `picture` or `clip` that they should be."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return f"a web page, not a {wanted}"
    if start.startswith(b"version https://git-lfs"):
        return f"a git LFS pointer, not the {wanted}; run `git lfs pull`"
    known = {
        b"GIF8": "GIF",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"BM": "BMP",
        b"8BPS": "Photoshop",
        b"%PDF": "PDF",
    }
    for magic, name in known.items():
        if head.startswith(magic):
            return f"a {name} file, which is not read"
    return f"not a {wanted}: unknown content"


def _header(format: str, data: bytes) -> ImageFile:
    """Opened, not yet decoded. The classes are called directly: `Image.open` has its own size limit."""
    if format == "PNG":
        _check_chunks(data)
    if format == "HEIF":
        return _from_plugin("pillow_heif", "HeifImageFile", data, ".heic")
    if format == "AVIF":
        return _from_plugin("PIL.AvifImagePlugin", "AvifImageFile", data, ".avif")
    opened: Mapping[str, Callable[[io.BytesIO], ImageFile]] = {
        "JPEG": JpegImagePlugin.JpegImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
    }
    return opened[format](io.BytesIO(data))


def _from_plugin(module: str, name: str, data: bytes, extension: str) -> ImageFile:
    """Through a decoder that not every machine has."""
    missing = why_not_read(extension)
    if missing is not None:
        raise missing
    opened: ImageFile = getattr(importlib.import_module(module), name)(io.BytesIO(data))
    return opened


def _check_chunks(data: bytes) -> None:
    """Every chunk's checksum, and that the file ends as it should: Pillow does not look at the pixels' own.

    PNG specification, section 5 (chunk layout) and annex D (CRC).
    """
    at, seen = 8, set()
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        (expected,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != expected:
            raise BadPicture(f"damaged PNG: wrong checksum in {kind.decode('latin-1')}", remedy=REPLACE)
        seen.add(kind)
        at = end
        if kind == b"IEND":
            break
    if not {b"IHDR", b"IDAT", b"IEND"} <= seen:
        raise BadPicture("damaged PNG: the file is cut short", remedy=REPLACE)


def _refuse(image: ImageFile, format: str, max_megapixels: float) -> None:
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise BadPicture(
            f"{width} x {height} is {width * height / 1e6:.0f} megapixels, more than {max_megapixels:g}",
            remedy="Make it smaller, or raise max_megapixels.",
        )
    frames = getattr(image, "n_frames", 1) if format in ("PNG", "WEBP", "AVIF") else 1
    if frames > 1:
        raise BadPicture(
            f"animated ({frames} frames)", remedy="Save the frame you want as a picture of its own."
        )


def _orientation(image: ImageFile, fixes: list[str], warned: list[str]) -> int:
    """EXIF orientation, 1 to 8; 1 where it is missing, unreadable or out of range."""
    try:
        exif = image.getexif()
        value = exif.get(_ORIENTATION, 1)
        # A directory at an impossible place reads as one without entries.
        damaged = not exif and len(image.info.get("exif", b"")) > _EMPTY_EXIF_BYTES
    except (*DAMAGED, *DAMAGED_BITS):
        value, damaged = 1, True
    valid = isinstance(value, int) and 0 <= value <= 8
    if damaged or not valid or any("exif" in text.lower() for text in warned):
        fixes.append("damaged EXIF ignored")
    return value if valid else 1


def _eight_bits(picture: Image.Image, fixes: list[str]) -> Image.Image:
    """16-bit and 1-bit grey as mode L, palettes as RGB or RGBA; alpha stays. Other modes pass.

    Pillow's own conversion of 16-bit grey clips at 255 and gives white.
    """
    transparency = picture.info.get("transparency")
    if picture.mode.startswith("I"):
        values_HW = np.asarray(picture).astype(np.int64)
        grey = Image.fromarray(((values_HW.clip(0, 65535) + 128) // 257).astype(np.uint8))
        if not isinstance(transparency, int):
            return grey
        alpha_HW = np.where(values_HW == transparency, 0, 255).astype(np.uint8)
        return Image.merge("LA", (grey, Image.fromarray(alpha_HW)))
    if picture.mode == "1":
        fixes.append("1-bit picture read as black and white")
    if transparency is not None and picture.mode in ("1", "L", "P", "RGB"):
        return picture.convert("RGBA")
    if picture.mode == "1":
        return picture.convert("L")
    if picture.mode == "PA":
        return picture.convert("RGBA")
    return picture.convert("RGB") if picture.mode == "P" else picture


def _why_not_opened(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a link that leads back to itself"
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"a broken link to {os.readlink(path)}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "no permission to read it"
    return f"cannot be opened: {error.strerror}"


def _how_to_open(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return "Give yourself permission to read it (chmod u+r), or remove it."
    return "Mend or remove it."


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
