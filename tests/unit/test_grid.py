from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from burnish.sampling.grid import make_grid, save_grid

COLOURS = [["red", "lime", "blue"], ["cyan", "magenta", "yellow"]]
BACKGROUND = (251, 250, 248)
LONG = "a very long prompt that cannot stand in one line " * 12


def coloured(size: tuple[int, int] = (96, 96)) -> list[list[Image.Image | None]]:
    return [[Image.new("RGB", size, colour) for colour in row] for row in COLOURS]


def box(grid: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of all pixels of a colour; right and bottom exclusive."""
    wanted = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    rows, columns = np.nonzero((np.asarray(grid) == wanted).all(-1))
    assert len(rows), f"no {colour} in the grid"
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_every_picture_stands_whole_in_its_row_and_column() -> None:
    grid = make_grid(rows=["one", "two"], columns=["a", "b", "c"], pictures=coloured())
    boxes = [[box(grid, colour) for colour in row] for row in COLOURS]
    assert all((right - left, bottom - top) == (96, 96) for row in boxes for left, top, right, bottom in row)
    for row in boxes:
        assert len({top for _, top, _, _ in row}) == 1
        assert [left for left, _, _, _ in row] == sorted(left for left, _, _, _ in row)
        assert all(after[0] > before[2] for before, after in pairwise(row))
    assert all(boxes[1][column][0] == boxes[0][column][0] for column in range(3))
    assert boxes[1][0][1] > boxes[0][0][3]


def test_labels_are_written_beside_and_above_the_pictures_and_never_on_them() -> None:
    grid = make_grid(rows=[LONG, "short"], columns=[LONG, "b", "c"], pictures=coloured())
    pixels = np.asarray(grid).astype(int)
    ink = pixels.sum(-1) < 300
    for row in COLOURS:
        for colour in row:
            left, top, right, bottom = box(grid, colour)
            assert (right - left, bottom - top) == (96, 96)
            assert not ink[top:bottom, left:right].any() or colour in ("red", "blue", "lime")
    left, top, _, bottom = box(grid, "red")
    assert ink[top:bottom, :left].any(), "no label beside the first row"
    assert ink[:top, left:].any(), "no label above the columns"
    assert not ink[:, left - 5 : left].any(), "the label runs into the picture"
    assert not ink[:, :5].any(), "the label runs into the edge"
    assert not ink[:, -5:].any()


def test_pictures_of_other_shapes_are_centred_and_keep_their_shape() -> None:
    pictures: list[list[Image.Image | None]] = [
        [Image.new("RGB", (768, 384), "red"), Image.new("RGB", (384, 768), "blue"), None]
    ]
    grid = make_grid(rows=[""], columns=["a", "b", "c"], pictures=pictures)
    left, top, right, bottom = box(grid, "red")
    assert right - left == 2 * (bottom - top)
    tall = box(grid, "blue")
    assert tall[3] - tall[1] == 2 * (tall[2] - tall[0])
    assert (top + bottom) // 2 == (tall[1] + tall[3]) // 2


def test_tiny_pictures_are_enlarged_with_square_pixels() -> None:
    checkered = Image.new("RGB", (2, 2), "red")
    checkered.putpixel((1, 1), (0, 0, 255))
    grid = make_grid(rows=[""], columns=[""], pictures=[[checkered]])
    left, top, right, bottom = box(grid, "blue")
    assert (right - left, bottom - top) == (48, 48)


def test_a_grid_without_labels_is_pictures_and_margins_only() -> None:
    grid = make_grid(rows=["", ""], columns=["", "", ""], pictures=coloured())
    counted = {colour for _, colour in grid.getcolors() or []}
    assert len(counted) == 7
    assert BACKGROUND in counted


def test_the_wrong_number_of_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows and 2 columns"):
        make_grid(rows=["one", "two"], columns=["a", "b"], pictures=coloured())


def test_saved_as_png(tmp_path: Path) -> None:
    arguments = {"rows": ["one", "two"], "columns": ["a", "b", "c"], "pictures": coloured()}
    save_grid(tmp_path / "grid.png", **arguments)
    with Image.open(tmp_path / "grid.png") as saved:
        assert saved.format == "PNG"
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(make_grid(**arguments)))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
