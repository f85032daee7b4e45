"""Pixels come out right: against Pillow's own upright pictures and against colour arithmetic."""

from __future__ import annotations

import io
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from corpus import (
    ADOBE_RGB,
    DISPLAY_P3,
    INKS,
    cmyk_profile,
    deep_rgb,
    frames,
    hidden_colour,
    jpeg,
    matrix_profile,
    oriented,
    png_file,
    saved,
    scene,
)
from PIL import Image, ImageOps, features

from burnish.data.buckets import fit
from burnish.data.decoder_warnings import collected_warnings
from burnish.data.pictures import BadPicture, Decoded, decode_picture, open_picture
from burnish.data.prepare import pixels_of

# Linear sRGB to XYZ at D50 (Bradford), http://www.brucelindbloom.com/index.html?Eqn_RGB_XYZ_Matrix.html
SRGB_D50 = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)


def decode(data: bytes, background: str = "#ffffff", max_megapixels: float = 150) -> Decoded:
    return decode_picture(data, background=background, max_megapixels=max_megapixels)


def values(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(float)


def srgb_of(xyz: np.ndarray) -> np.ndarray:
    """8-bit sRGB of D50 XYZ, IEC 61966-2-1."""
    linear = np.clip(xyz @ np.linalg.inv(SRGB_D50).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def xyz_of_lab(lightness: float, a: float, b: float) -> np.ndarray:
    fy = (lightness + 16) / 116
    f = np.array([fy + a / 500, fy, fy - b / 200])
    return np.array([0.9642, 1, 0.8249]) * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int):
    data = oriented(orientation)
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    decoded = decode(data)
    assert decoded.picture.size == expected.size
    np.testing.assert_array_equal(values(decoded.picture), values(expected))
    assert bool(decoded.fixes) == (orientation > 1)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_of_other_formats_is_applied_too(format: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode(saved(scene(3), format, exif=exif, lossless=True))
    assert decoded.fixes == ("turned upright (EXIF orientation 6)",)
    np.testing.assert_array_equal(values(decoded.picture), values(scene(3).rotate(-90, expand=True)))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_where_pillow_reads_it(tmp_path: Path):
    decoded = decode(saved(scene(3), "AVIF", quality=100))
    assert decoded.format == "AVIF"
    np.testing.assert_allclose(values(decoded.picture), values(scene(3)), atol=8)


@pytest.mark.parametrize("background", ["#ffffff", "#204060"])
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_what_is_transparent_shows_the_background(background: str, format: str):
    picture = values(decode(saved(hidden_colour(), format, lossless=True), background).picture)
    ground = [int(background[i : i + 2], 16) for i in (1, 3, 5)]
    assert (picture[:, :64] == ground).all()
    assert (picture[:, 64:] == [0, 0, 255]).all()


def test_half_transparent_is_half_of_each():
    picture = Image.new("RGBA", (8, 8), (200, 100, 0, 128))
    grey = Image.new("LA", (8, 8), (200, 128))
    np.testing.assert_allclose(
        values(decode(saved(picture, "PNG"), "#000000").picture)[0, 0], [100, 50, 0], atol=1
    )
    np.testing.assert_allclose(values(decode(saved(grey, "PNG"), "#000000").picture)[0, 0], 100, atol=1)


def test_a_transparent_palette_entry_shows_the_background():
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.paste(0, (0, 0, 4, 8))
    out = values(decode(saved(picture, "PNG", transparency=0), "#0000ff").picture)
    assert (out[:, :4] == [0, 0, 255]).all()
    assert (out[:, 4:] == [0, 255, 0]).all()


def test_an_opaque_alpha_channel_is_no_fix():
    decoded = decode(saved(scene(1).convert("RGBA"), "PNG"))
    assert decoded.fixes == ()
    np.testing.assert_array_equal(values(decoded.picture), values(scene(1)))


@pytest.mark.parametrize("kind", ["grey", "grey with a transparent value", "rgb"])
def test_16_bits_keep_their_mean(kind: str):
    ramp_HW = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (64, 1))
    if kind == "rgb":
        data = deep_rgb(np.stack([ramp_HW] * 3, axis=-1))
    else:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in ramp_HW)
        hole = ((b"tRNS", b"\xff\xff"),) if "transparent" in kind else ()
        data = png_file(256, 64, 16, 0, rows, hole)
    out = values(decode(data, "#ffffff").picture)
    assert out.mean() == pytest.approx(127.5, abs=1)
    np.testing.assert_allclose(out[0, :, 0], np.arange(256), atol=1)


def test_one_bit_is_black_and_white():
    picture = Image.new("1", (16, 16))
    picture.paste(1, (8, 0, 16, 16))
    out = values(decode(saved(picture, "PNG")).picture)
    assert (out[:, :8] == 0).all()
    assert (out[:, 8:] == 255).all()


@pytest.mark.parametrize("primaries", [ADOBE_RGB, DISPLAY_P3])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_wide_profile_is_converted_to_srgb(primaries: tuple[tuple[float, ...], ...], alpha: bool):
    colours = np.array([[180, 120, 90], [90, 140, 110], [128, 128, 128], [255, 255, 255], [60, 70, 140]])
    picture = Image.fromarray(np.repeat(colours[None].astype(np.uint8), 8, axis=0))
    if alpha:
        picture.putalpha(255)
    profile = matrix_profile("wide", primaries, 2.2)
    out = values(decode(saved(picture, "PNG", icc_profile=profile)).picture)
    gamma = round(2.2 * 256) / 256
    expected = srgb_of((colours / 255) ** gamma @ np.array(primaries))
    np.testing.assert_allclose(out[0], expected, atol=2)
    assert abs(out[0] - colours).max() > 5  # the profile matters


def test_a_profile_that_is_srgb_changes_nothing():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    decoded = decode(saved(scene(1), "PNG", icc_profile=profile))
    assert decoded.fixes == ()
    np.testing.assert_array_equal(values(decoded.picture), values(scene(1)))


def test_inks_are_converted_by_their_profile():
    picture = Image.new("CMYK", (32, 32))  # paper
    picture.paste((0, 255, 0, 0), (16, 0, 32, 32))  # magenta
    data = saved(picture, "JPEG", quality=100, icc_profile=cmyk_profile(INKS))
    out = values(decode(data).picture)
    np.testing.assert_allclose(out[16, 2], 255, atol=3)
    np.testing.assert_allclose(out[16, 29], srgb_of(xyz_of_lab(*INKS[4])), atol=6)


def test_inks_without_profile_are_converted_by_the_plain_formula():
    picture = Image.new("CMYK", (32, 32), (0, 255, 0, 51))
    out = values(decode(saved(picture, "JPEG", quality=100)).picture)
    np.testing.assert_allclose(out[16, 16], [204, 0, 204], atol=3)


@pytest.mark.parametrize(
    "profile", [b"nonsense", cmyk_profile(INKS), matrix_profile("w", ADOBE_RGB, 2.2)[:200]]
)
def test_a_profile_that_does_not_fit_is_ignored_and_noted(profile: bytes):
    decoded = decode(saved(scene(1), "PNG", icc_profile=profile))
    assert "ignored" in decoded.fixes[0]
    np.testing.assert_array_equal(values(decoded.picture), values(scene(1)))


def test_every_cut_of_a_file_is_refused_or_whole():
    """Truncation anywhere: never a half-grey picture, never another exception."""
    for data in (jpeg(2), jpeg(2, progressive=True), saved(scene(2), "PNG"), saved(scene(2), "WEBP")):
        whole = values(decode(data).picture)
        for at in np.linspace(0, len(data) - 3, 60).astype(int):
            with pytest.raises(BadPicture, match=r".+"):
                decode(data[:at])
        with suppress(BadPicture):  # the end mark alone is missing
            np.testing.assert_array_equal(values(decode(data[:-2]).picture), whole)


def test_random_damage_is_refused_or_read_but_never_raises_anything_else():
    draw = np.random.default_rng(0)
    sources = [
        jpeg(3, exif=Image.Exif()),
        oriented(6),
        saved(hidden_colour(), "PNG"),
        saved(scene(3), "WEBP"),
    ]
    refused = 0
    for trial in range(400):
        data = bytearray(sources[trial % len(sources)])
        for at in draw.integers(0, len(data), 1 + trial % 5):
            data[at] = draw.integers(0, 256)
        try:
            assert decode(bytes(data)).picture.mode == "RGB"
        except BadPicture:
            refused += 1
    assert refused > 50


def test_warnings_of_the_decoder_stay_inside_whatever_thread():
    failures = []

    def work() -> None:
        for _ in range(20):
            with collected_warnings() as mine:
                warnings.warn(threading.current_thread().name, stacklevel=1)
            if mine != [threading.current_thread().name]:
                failures.append(mine)

    threads = [threading.Thread(target=work, name=f"thread {n}") for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with pytest.warns(UserWarning, match="outside"):
        warnings.warn("outside", stacklevel=1)


def test_the_limit_is_ours_and_not_pillows():
    data = png_file(10000, 9000, 1, 0, bytes((10000 // 8 + 1) * 9000))  # Pillow warns from 89 megapixels on
    assert decode(data).picture.size == (10000, 9000)
    with pytest.raises(BadPicture, match="more than 80"):
        decode(data, max_megapixels=80)


def test_open_picture_notes_what_the_name_hides(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(saved(scene(1), "PNG"))
    picture, fixes = open_picture(tmp_path / "a.jpg")
    assert fixes == ("is a PNG in spite of its name",)
    np.testing.assert_array_equal(values(picture), values(scene(1)))
    for path in (tmp_path, tmp_path / "nothing.png"):
        with pytest.raises(BadPicture):
            open_picture(path)
    with pytest.raises(BadPicture, match="animated"):
        decode(frames("WEBP"))


def test_pixels_are_scaled_from_minus_one_to_one():
    picture = Image.new("RGB", (2, 1), (0, 51, 255))
    np.testing.assert_allclose(pixels_of(picture)[:, 0, 0].numpy(), [-1, -0.6, 1], atol=1e-6)


@pytest.mark.parametrize("flipped", [False, True])
def test_reducing_and_cutting_equals_pillow(flipped: bool):
    picture = scene(5, 300, 500)
    placed = fit(300, 500, 128, 32, 3.0)
    assert placed is not None
    out = placed.apply(picture, flipped=flipped)
    expected = ImageOps.fit(picture, (placed.bucket.width, placed.bucket.height), Image.Resampling.LANCZOS)
    expected = ImageOps.mirror(expected) if flipped else expected
    # ImageOps.fit cuts at fractions of a pixel before it reduces, this after.
    assert abs(values(out) - values(expected)).mean() < 2
