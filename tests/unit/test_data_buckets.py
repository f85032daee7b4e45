"""Buckets: no picture is enlarged, whatever its size."""

from __future__ import annotations

import random

import pytest

from burnish.data.buckets import Bucket, buckets_for, fit, fits


def test_the_buckets_of_512_in_steps_of_64():
    """By hand: for each short side the longest multiple of 64 of at most 512^2 pixels and 3 times the short.

    192 x 576 holds 42 % of 512^2 only.
    """
    sides = {(256, 768), (320, 768), (384, 640), (448, 576), (512, 512)}
    expected = {Bucket(*pair) for pair in sides} | {Bucket(b, a) for a, b in sides}
    assert set(buckets_for(512, 64, 3.0)) == expected


def test_any_picture_of_any_size_is_reduced_and_cut_never_enlarged():
    draw = random.Random(0)
    placed = 0
    for _ in range(4000):
        height, width = (int(2 ** draw.uniform(3, 13)) for _ in range(2))
        resolution = draw.choice([64, 100, 256, 512, 768, 1024])
        step = draw.choice([8, 16, 32, 64])
        aspect = draw.choice([1.0, 1.5, 3.0])
        got = fit(height, width, resolution, step, aspect)
        if got is None:
            assert min(height, width) < step or resolution < step
            continue
        placed += 1
        bucket = got.bucket
        assert bucket.height % step == bucket.width % step == 0
        assert bucket.area <= resolution**2
        assert max(bucket.aspect, 1 / bucket.aspect) <= aspect
        assert bucket.height <= got.resized[0] <= height
        assert bucket.width <= got.resized[1] <= width
        assert 0 <= got.top <= got.resized[0] - bucket.height
        assert 0 <= got.left <= got.resized[1] - bucket.width
        # One side fits exactly: nothing is cut that reducing could have kept.
        assert got.resized[0] == bucket.height or got.resized[1] == bucket.width
    assert placed > 2500


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1024, 1024), (1024, 1024)),
        ((4000, 6000), (832, 1216)),
        ((2000, 500), (1344, 448)),
        ((500, 500), (448, 448)),
        ((450, 700), (448, 640)),
        ((64, 9000), (64, 192)),
    ],
)
def test_known_pictures_at_1024(size: tuple[int, int], bucket: tuple[int, int]):
    got = fit(*size, 1024, 64, 3.0)
    assert got is not None
    assert (got.bucket.height, got.bucket.width) == bucket


def test_equal_buckets_of_two_resolutions_are_there_once():
    assert [str(f.bucket) for _, f in fits(2000, 2000, [512, 1024, 512], 64, 3.0)] == ["1024x1024", "512x512"]
    assert [str(f.bucket) for _, f in fits(500, 500, [512, 1024], 64, 3.0)] == ["448x448"]
    assert fits(60, 500, [512], 64, 3.0) == ()


def test_a_mirrored_picture_says_where_its_cut_begins():
    placed = fit(512, 701, 512, 64, 1.0)
    assert placed is not None
    assert placed.resized == (512, 701)
    assert placed.left == 94
    plain, mirrored = placed.describe(flipped=False), placed.describe(flipped=True)
    assert plain.original == mirrored.original == (512, 701)
    assert plain.target == (512, 512)
    assert plain.crop == (0, 94)
    assert mirrored.crop == (0, 701 - 512 - 94)
    assert placed.cut_share == pytest.approx(1 - 512 / 701)
