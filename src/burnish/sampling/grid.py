"""A labelled grid of pictures as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from burnish.atomic import atomic_write_bytes

BACKGROUND, INK, EMPTY = "#fbfaf8", "#23211f", "#ece9e4"
SMALLEST_CELL, LARGEST_CELL = 96, 384  # pixels; smaller pictures are enlarged, larger ones reduced
MARGIN_SHARE = 0.05  # of a cell, between pictures and around them
LABEL_LINES = 6
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_grid(
    path: Path,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    pictures: Sequence[Sequence[Image.Image | None]],
) -> None:
    """Write `make_grid` to `path`; the file is whole or the old one.

    Raises:
        DiskFull: no space, or the folder cannot be written.
    """
    encoded = io.BytesIO()
    make_grid(rows=rows, columns=columns, pictures=pictures).save(encoded, format="PNG")
    atomic_write_bytes(path, encoded.getvalue())


def make_grid(
    *, rows: Sequence[str], columns: Sequence[str], pictures: Sequence[Sequence[Image.Image | None]]
) -> Image.Image:
    """A row of pictures per label in `rows` (a prompt, wrapped at the left), a column per label in `columns`.

    Pictures may differ in size: each keeps its shape and is centred in its cell. None leaves a cell empty.

    Raises:
        ValueError: `pictures` is not one list per row with one entry per column.
    """
    if len(pictures) != len(rows) or any(len(row) != len(columns) for row in pictures):
        shape = [len(row) for row in pictures]
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns, but pictures of {shape}")
    cell_width, cell_height = _cell(pictures)
    margin = max(10, round(MARGIN_SHARE * cell_width))
    font = ImageFont.load_default(max(13, min(20, cell_width // 14)))
    label_width = _label_width(rows, font, cell_width)
    line_height = _line_height(font)
    top = margin + line_height + margin // 2 if any(columns) else margin
    left = margin + (label_width + margin if label_width else 0)

    size = (
        left + len(columns) * (cell_width + margin),
        top + len(rows) * (cell_height + margin),
    )
    grid = Image.new("RGB", size, BACKGROUND)
    ink = ImageDraw.Draw(grid)
    for number, label in enumerate(columns):
        middle = left + number * (cell_width + margin) + cell_width // 2
        ink.text((middle, margin), _shortened(label, font, cell_width), INK, font, anchor="ma")
    for number, (label, row) in enumerate(zip(rows, pictures, strict=True)):
        y = top + number * (cell_height + margin)
        lines = _wrapped(label, font, label_width, min(LABEL_LINES, max(1, cell_height // line_height)))
        _draw_lines(ink, lines, font, (margin, y + (cell_height - len(lines) * line_height) // 2))
        for column, picture in enumerate(row):
            _place(grid, ink, picture, (left + column * (cell_width + margin), y), (cell_width, cell_height))
    return grid


def _cell(pictures: Sequence[Sequence[Image.Image | None]]) -> tuple[int, int]:
    """Width and height of a cell that holds every picture, its longer side kept within bounds."""
    there = [picture for row in pictures for picture in row if picture is not None]
    width = max((picture.width for picture in there), default=SMALLEST_CELL)
    height = max((picture.height for picture in there), default=SMALLEST_CELL)
    longest = max(width, height)
    factor = min(max(longest, SMALLEST_CELL), LARGEST_CELL) / longest
    return max(1, round(width * factor)), max(1, round(height * factor))


def _place(
    grid: Image.Image,
    ink: ImageDraw.ImageDraw,
    picture: Image.Image | None,
    corner: tuple[int, int],
    cell: tuple[int, int],
) -> None:
    if picture is None:
        ink.rectangle((*corner, corner[0] + cell[0] - 1, corner[1] + cell[1] - 1), fill=EMPTY)
        return
    factor = min(cell[0] / picture.width, cell[1] / picture.height)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    # Enlarged pixels stay square; reduced ones are averaged.
    filter_ = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    fitted = picture.convert("RGB") if size == picture.size else picture.convert("RGB").resize(size, filter_)
    grid.paste(fitted, (corner[0] + (cell[0] - size[0]) // 2, corner[1] + (cell[1] - size[1]) // 2))


def _label_width(rows: Sequence[str], font: Font, cell_width: int) -> int:
    """Room at the left: as wide as the widest label needs, at most about one and a half cells."""
    widest = max((font.getlength(label) for label in rows), default=0)
    return min(int(widest) + 1, max(140, int(cell_width * 1.2))) if widest else 0


def _line_height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Ågjy|")
    return int((bottom - top) * 1.25)


def _draw_lines(ink: ImageDraw.ImageDraw, lines: Sequence[str], font: Font, corner: tuple[int, int]) -> None:
    for number, line in enumerate(lines):
        ink.text((corner[0], corner[1] + number * _line_height(font)), line, INK, font)


def _wrapped(text: str, font: Font, width: int, limit: int) -> list[str]:
    """`text` in lines of at most `width` pixels; what is beyond `limit` lines ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > limit:
        lines = [*lines[: limit - 1], f"{lines[limit - 1]} …"]
    return [_shortened(line, font, width) for line in lines]


def _shortened(text: str, font: Font, width: int) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    kept = text.removesuffix(" …")
    while kept and font.getlength(kept + "…") > width:
        kept = kept[:-1]
    return kept + "…"
