"""Clips and references in sampling: files by value, what is refused, what the model is shown, options of a prompt."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clip_files import clip_bytes, number_of, numbered
from corpus import scene
from PIL import Image, ImageOps
from typer.testing import CliRunner

from burnish.cli.main import app
from burnish.data.clips import frames_at, inspect_clip
from burnish.errors import UserError
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.sampling.clip_file import encode_clip, middle_frame
from burnish.sampling.decoding import Clip, decode_pictures
from burnish.sampling.outputs import next_number, write_picture
from burnish.sampling.prompts import read_prompts
from burnish.sampling.references import mask_pixels, reference_pixels
from burnish.sampling.sampler import (
    PictureRequest,
    draw_latents,
    draw_pictures,
    encode_requests,
    with_references,
)

TinyFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def family_of(tiny_folder: TinyFolder) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def of(name: str) -> Family:
        if name not in made:
            kind = family_named(name.partition("_")[0])
            parts = frozenset(("denoiser", "vae", "text_encoders"))
            source = ModelSource(str(tiny_folder(name)))
            made[name] = kind.load(source, parts, dtype=torch.float32, device="cpu")
        return made[name]

    return of


def grey_clip(count: int, fps: float = 16.0) -> Clip:
    return Clip(tuple(Image.fromarray(numbered(index)) for index in range(count)), fps)


@pytest.mark.parametrize("fps", [8.0, 16.0, 23.976, 25.0])
def test_a_clip_is_written_as_it_is(fps: float):
    data = encode_clip(grey_clip(17, fps).frames, fps)
    facts = inspect_clip(io.BytesIO(data), max_megapixels=1)
    assert (facts.height, facts.width) == (64, 96)
    assert facts.duration == pytest.approx(17 / fps, rel=1e-3)
    for index, picture in enumerate(frames_at(io.BytesIO(data), [index / fps for index in range(17)])):
        assert number_of(picture) == index
        # Red too, which a wrong matrix (BT.601 for BT.709) would shift.
        assert np.abs(np.asarray(picture)[32, 8].astype(int) - (200, 0, 0)).max() <= 6
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(fps).limit_denominator(1001)
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (
            1,
            1,
        )  # BT.709, limited range: said, not left to guess


def test_files_of_a_clip(tmp_path: Path):
    request = PictureRequest("a café", references=(Path("a.png"),), frames=5)
    path = write_picture(tmp_path / "000007.png", grey_clip(5), request, extra={"model": "x"})
    assert path == tmp_path / "000007.mp4"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["000007.json", "000007.mp4", "000007.txt"]
    facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert {
        "frames": 5,
        "fps": 16.0,
        "height": 64,
        "width": 96,
        "references": ["a.png"],
    }.items() <= facts.items()
    assert next_number(tmp_path) == 8
    assert number_of(middle_frame(path)) == 2


def test_clips_are_drawn_and_decoded(family_of: Callable[[str], Family]):
    family = family_of("wan21")
    requests = [
        PictureRequest("a cat", seed=1, height=64, width=96, steps=2, frames=frames) for frames in (9, 1)
    ]
    clip, still = draw_pictures(family, requests, device="cpu", dtype=torch.float32)
    assert isinstance(clip, Clip)
    assert isinstance(still, Image.Image)
    assert (len(clip.frames), clip.fps, clip.frames[0].size, still.size) == (
        9,
        family.defaults.fps,
        (96, 64),
        (96, 64),
    )
    (latents, _) = draw_latents(family, encode_requests(family, requests), device="cpu", dtype=torch.float32)
    assert latents.shape == family.latents.of(64, 96, 9)
    with torch.no_grad():
        pixels = family.decode_latents(latents[None])[0]
    for index in range(9):
        expected = ((pixels[:, index] + 1) * 127.5).clamp(0, 255).round().permute(1, 2, 0)
        assert np.abs(np.asarray(clip.frames[index]) - expected.numpy()).max() <= 1


def files(folder: Path) -> tuple[Path, Path]:
    scene(3, 200, 120).save(folder / "reference.png")
    hole = Image.new("L", (120, 200), 0)
    hole.paste(255, (0, 0, 60, 200))
    hole.save(folder / "mask.png")
    return folder / "reference.png", folder / "mask.png"


@pytest.mark.parametrize("name", ["flux_kontext", "flux_fill", "wan21_i2v", "ltx_first_frame"])
def test_what_the_model_is_shown(name: str, family_of: Callable[[str], Family], tmp_path: Path):
    family = family_of(name)
    reference, mask = files(tmp_path)
    request = PictureRequest(
        "a cat", "a dog", height=64, width=96, steps=2, guidance=3.0, references=(reference,)
    )
    if family.capabilities.masks:
        request = replace(request, mask=mask)
    if family.capabilities.video:
        request = replace(request, frames=1 + 2 * (family.latents.frame_compression or 0))
    (plain,) = encode_requests(family, [request])
    (shown,) = with_references(family, [plain], device="cpu")

    target = (64, 96)
    is_target = family.capabilities.masks or family.capabilities.first_frame
    height, width = target if is_target else family.reference_size(200, 120, target)
    (pixels,) = reference_pixels(family, [reference], target)
    fitted = ImageOps.fit(Image.open(reference).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    assert (pixels - (torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 127.5 - 1)).abs().mean() < 0.02
    holes = mask_pixels(mask, target)
    assert holes[0, :, :47].all()
    assert not holes[0, :, 49:].any()
    with torch.no_grad():
        told = family.encode_references(
            [pixels[None]],
            mask_B1HW=holes[None] if family.capabilities.masks else None,
            frames=shown.frames,
        )
    assert told
    for conditioning in (shown.conditioning, *([shown.negative] if shown.negative is not None else [])):
        assert set(conditioning) >= set(told)
        for key, tensor in told.items():
            torch.testing.assert_close(conditioning[key], tensor)
    latents = draw_latents(family, [shown], device="cpu", dtype=torch.float32)
    assert torch.isfinite(latents[0]).all()
    scene(9, 80, 80).save(reference)
    other = with_references(family, [plain], device="cpu")
    assert not torch.equal(draw_latents(family, other, device="cpu", dtype=torch.float32)[0], latents[0])
    assert decode_pictures(family, latents)


def test_references_of_two_sizes_are_no_batch(family_of: Callable[[str], Family], tmp_path: Path):
    """Each is drawn as it is alone, and so is a request without any."""
    family = family_of("flux_kontext")
    scene(1, 64, 64).save(tmp_path / "a.png")
    scene(2, 64, 192).save(tmp_path / "b.png")
    requests = [
        PictureRequest("a cat", seed=seed, height=64, width=64, steps=1, references=references)
        for seed, references in enumerate([(tmp_path / "a.png",), (tmp_path / "b.png",), ()])
    ]
    encoded = with_references(family, encode_requests(family, requests), device="cpu")
    together = draw_latents(family, encoded, device="cpu", dtype=torch.float32)
    for one, latents in zip(encoded, together, strict=True):
        (alone,) = draw_latents(family, [one], device="cpu", dtype=torch.float32)
        torch.testing.assert_close(alone, latents)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("wan21", {"frames": 16}, r"1 frame and then multiples of 4; got 16\.\n  Take 13 or 17\."),
        ("flux", {"frames": 5}, "5 frames are asked for, and FLUX.1 draws still pictures"),
        ("flux", {"references": (Path("a.png"),)}, "1 reference picture.* sees none"),
        ("flux_kontext", {"references": (Path("a.png"),) * 2}, "sees at most 1"),
        ("flux_kontext", {"mask": Path("a.png")}, "fills no holes"),
        ("flux_fill", {"references": (Path("a.png"),)}, "needs a picture and a mask"),
        ("flux_fill", {}, "needs a picture and a mask"),
        ("wan21_i2v", {"frames": 5}, "goes on from a first frame, and none is given"),
    ],
)
def test_what_cannot_be_drawn_is_said_before(
    name: str, changes: dict[str, object], says: str, family_of: Callable[[str], Family]
):
    request = PictureRequest("a cat", height=64, width=96, steps=1)
    with pytest.raises(UserError, match=says):
        encode_requests(family_of(name), [replace(request, **changes)])  # type: ignore[arg-type]


def test_a_reference_that_cannot_be_read(family_of: Callable[[str], Family], tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"<html>")
    for file, says in (("a.png", "a web page, not a picture"), ("gone.png", "cannot be opened")):
        request = PictureRequest("a cat", height=64, width=64, steps=1, references=(tmp_path / file,))
        family = family_of("flux_kontext")
        with pytest.raises(UserError, match=says):
            with_references(family, encode_requests(family, [request]), device="cpu")


def test_prompt_files_name_frames_references_and_masks(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "a cat --f 17 --i first.png --i /full/second.png --m hole.png --d 3\n"
        '{"prompt": "a dog", "references": "a.png", "frames": 5}\n'
        '{"prompt": "a cow", "references": ["a.png", "b.png"], "mask": "m.png"}\n'
    )
    cat, dog, cow = read_prompts(path)
    assert (cat.prompt, cat.frames, cat.seed) == ("a cat", 17, 3)
    assert cat.references == (tmp_path / "first.png", Path("/full/second.png"))
    assert cat.mask == tmp_path / "hole.png"
    assert (dog.references, dog.frames, dog.mask) == ((tmp_path / "a.png",), 5, None)
    assert (cow.references, cow.mask) == ((tmp_path / "a.png", tmp_path / "b.png"), tmp_path / "m.png")
    path.write_text('a --f 0\nb --i\n{"prompt": "c", "references": [1]}\nd --m x.png --m y.png\n')
    with pytest.raises(UserError) as raised:
        read_prompts(path)
    for says in (
        "1  frames should be a whole number from 1 to 1025, got '0'",
        "2  names no file",
        "3  references should be texts",
        "4  mask is given twice",
    ):
        assert says in raised.value.message


def test_generate_writes_clips(tiny_folder: TinyFolder, tmp_path: Path):
    reference, _ = files(tmp_path)
    options = ["--frames", "5", "--size", "64x96", "--steps", "1", "--device", "cpu", "--precision", "fp32"]
    for name, more in (("wan21", []), ("wan21_i2v", ["--reference", str(reference)])):
        output = tmp_path / name
        arguments = ["generate", "--model", str(tiny_folder(name)), "-p", "a cat", "-o", str(output)]
        result = CliRunner().invoke(app, [*arguments, *options, *more])
        assert result.exit_code == 0, result.output
        assert "1 clip(s)" in result.output
        assert (
            inspect_clip(io.BytesIO((output / "000001.mp4").read_bytes()), max_megapixels=1).duration
            == 5 / 16
        )
        facts = json.loads((output / "000001.json").read_text())
        assert facts["frames"] == 5
        assert facts["references"] == more[1:]


def test_the_middle_frame_of_any_clip(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(clip_bytes(9, 25))
    assert number_of(middle_frame(tmp_path / "a.mp4")) == 4
