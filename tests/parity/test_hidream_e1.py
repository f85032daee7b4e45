"""HiDream-E1 against its published equations written down once more (`hidream_e1_reference.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers_rules import load
from hidream_e1_reference import HiDreamImageEditingPipeline
from numpy.random import default_rng
from PIL import Image
from reference import NEGATIVES, PROMPTS, SEEDS, STEPS
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.conditioning import Conditioning
from burnish.config.schema import RunConfig
from burnish.data.prepare import pixels_of
from burnish.errors import ModelError, UserError
from burnish.events import Listener
from burnish.families.hidream import HiDream
from burnish.families.hidream_e1 import HiDreamE1
from burnish.families.registry import detect_family
from burnish.family import ModelSource
from burnish.generate import attach_adapter
from burnish.run import train_run
from burnish.sampling.sampler import (
    PictureRequest,
    decode_pictures,
    draw_latents,
    encode_requests,
    with_references,
)

TinyFolder = Callable[[str], Path]
WIDE, HALF = (48, 96), (64, 32)  # beside another of its size the second is a square, which is not filled up
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("hidream_e1")


@pytest.fixture
def family(folder: Path) -> HiDreamE1:
    return loaded(folder)


def loaded(path: Path, *parts: Any) -> HiDreamE1:
    chosen = frozenset(parts or ("denoiser", "vae", "text_encoders"))
    return HiDreamE1.load(ModelSource(str(path)), chosen, dtype=torch.float32, device="cpu")


def picture(seed: int, height: int, width: int) -> Image.Image:
    blobs = Image.fromarray(default_rng(seed).integers(0, 256, (4, 4, 3), dtype="uint8"))
    return blobs.resize((width, height), Image.Resampling.BICUBIC)


def saved(folder: Path, size: tuple[int, int]) -> list[Path]:
    files = [folder / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        picture(number, *size).save(file)
    return files


def ours(
    family: HiDreamE1, seen: Sequence[Path], size: tuple[int, int], guidance: float, by_picture: float | None
) -> list[Tensor]:
    """Both prompts at once, each with a picture of its own."""
    requests = [
        PictureRequest(
            prompt, negative, seed, *size, STEPS, guidance, references=(file,), reference_guidance=by_picture
        )
        for prompt, negative, seed, file in zip(PROMPTS, NEGATIVES, SEEDS, seen, strict=True)
    ]
    encoded = with_references(family, encode_requests(family, requests), device="cpu")
    return draw_latents(family, encoded, device="cpu", dtype=torch.float32)


def theirs(
    folder: Path,
    seen: Path,
    size: tuple[int, int],
    index: int,
    guidance: float,
    by_picture: float,
    output: str = "latent",
    adapter: Path | None = None,
) -> Tensor:
    pipeline = HiDreamImageEditingPipeline.from_pretrained(folder)
    if adapter is not None:
        load(pipeline, adapter)
    return pipeline(
        [PROMPTS[index]],
        pixels_of(Image.open(seen)),
        *size,
        STEPS,
        [torch.Generator().manual_seed(SEEDS[index])],
        output,
        guidance,
        by_picture,
        [NEGATIVES[index]],
    ).images


@pytest.mark.parametrize("size", [WIDE, HALF])
@pytest.mark.parametrize(("guidance", "by_picture"), [(1.0, 4.0), (3.0, 1.5), (5.0, 4.0)])
def test_latents_are_those_of_the_equations(
    family: HiDreamE1, folder: Path, tmp_path: Path, size: tuple[int, int], guidance: float, by_picture: float
) -> None:
    seen = saved(tmp_path, size)
    found = ours(family, seen, size, guidance, by_picture)
    for index in range(len(PROMPTS)):
        expected = theirs(folder, seen[index], size, index, guidance, by_picture)
        assert expected.std() > 0.1
        torch.testing.assert_close(found[index][None], expected, atol=1e-4, rtol=0)


def test_pixels_are_those_of_the_equations(family: HiDreamE1, folder: Path, tmp_path: Path) -> None:
    seen = saved(tmp_path, WIDE)
    (drawn,) = decode_pictures(family, ours(family, seen, WIDE, 3.0, 1.5)[:1])
    expected = theirs(folder, seen[0], WIDE, 0, 3.0, 1.5, "pt")[0]
    assert isinstance(drawn, Image.Image)
    torch.testing.assert_close(pixels_of(drawn) / 2 + 0.5, expected, atol=0.51 / 255, rtol=0)


def test_words_and_picture_guide_apart(family: HiDreamE1, tmp_path: Path) -> None:
    seen = saved(tmp_path, WIDE)
    drawn = [ours(family, seen, WIDE, *scales)[0] for scales in ((3.0, 1.0), (3.0, None), (5.0, None))]
    assert (drawn[0] - drawn[1]).abs().max() > 0.01
    assert (drawn[1] - drawn[2]).abs().max() > 0.01
    default = family.defaults.reference_guidance
    torch.testing.assert_close(ours(family, seen, WIDE, 3.0, default)[0], drawn[1])


def test_the_pictures_of_a_batch_do_not_mix(family: HiDreamE1, tmp_path: Path) -> None:
    """A prompt alone beside them takes two passes, in a batch of its own."""
    seen = saved(tmp_path, WIDE)
    requests = [
        PictureRequest("a cat", seed=seed, height=48, width=96, steps=2, references=shown)
        for seed, shown in enumerate(((seen[0],), (), (seen[1],)))
    ]
    encoded = with_references(family, encode_requests(family, requests), device="cpu")
    assert [one.unseeing is not None for one in encoded] == [True, False, True]
    together = draw_latents(family, encoded, device="cpu", dtype=torch.float32)
    for one, latents in zip(encoded, together, strict=True):
        (alone,) = draw_latents(family, [one], device="cpu", dtype=torch.float32)
        torch.testing.assert_close(latents, alone, atol=1e-4, rtol=0)


def test_zeros_are_no_picture(family: HiDreamE1) -> None:
    noisy, t_B, plain = family.example(*WIDE, batch=2)
    seen = family.encode_references([pixels_of(picture(3, *WIDE))[None].expand(2, -1, -1, -1)])
    zeros = Conditioning({"reference_BCHW": torch.zeros_like(noisy)})
    without = family.predict(noisy, t_B, plain)
    torch.testing.assert_close(without, family.predict(noisy, t_B, plain.merged(zeros)))
    assert not torch.allclose(without, family.predict(noisy, t_B, plain.merged(seen)), atol=1e-3)


@pytest.mark.parametrize("kind", [HiDream, HiDreamE1])
def test_more_patches_than_foreseen_are_taken_as_they_are(tiny_folder: TinyFolder, kind: Any) -> None:
    folder = tiny_folder(kind.name)
    source = ModelSource(str(folder))
    family = kind.load(source, frozenset({"denoiser"}), dtype=torch.float32, device="cpu")
    foreseen = family.denoiser.max_seq
    noisy, t_B, told = family.example(80, 4 * foreseen, batch=1)
    whole = torch.cat([noisy, torch.zeros_like(noisy)], dim=-1) if kind is HiDreamE1 else noisy
    reference = HiDreamImageTransformer2DModel.from_pretrained(folder / "transformer")
    reference.max_seq = whole.shape[2] * whole.shape[3] // 4
    assert reference.max_seq > foreseen
    with torch.no_grad():
        expected = reference(
            whole,
            t_B * 1000,
            told["tokens_BSD"],
            told["tokens_llama_BSLD"].permute(2, 0, 1, 3),
            told["pooled_BD"],
        ).sample
        found = family.predict(noisy, t_B, told)
    torch.testing.assert_close(found, -expected[..., : noisy.shape[3]], atol=1e-5, rtol=0)


def test_other_families_have_no_guidance_by_references(tiny_folder: TinyFolder) -> None:
    source = ModelSource(str(tiny_folder("hidream")))
    family = HiDream.load(source, frozenset({"text_encoders"}), dtype=torch.float32, device="cpu")
    with pytest.raises(UserError, match="HiDream-I1 has none"):
        encode_requests(family, [PictureRequest("a cat", reference_guidance=2.0)])


def told_of(folder: Path, copy: Path, *, pipeline: str, resolution: tuple[int, int]) -> Path:
    """A copy of the folder without weights, whose configs say this."""
    shutil.copytree(folder, copy)
    for name, key, value in (
        ("model_index.json", "_class_name", pipeline),
        ("transformer/config.json", "max_resolution", resolution),
    ):
        file = copy / name
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    return copy


@pytest.mark.parametrize(
    ("pipeline", "resolution", "defaults"),
    [
        ("HiDreamImageEditingPipeline", (96, 192), ((768, 768), 5.0, 4.0)),
        ("HiDreamImageEditingPipeline", (128, 256), ((1024, 1024), 3.0, 1.5)),
        ("HiDreamImageEditingPipeline", (128, 128), ((1024, 1024), 3.0, 1.5)),
        ("HiDreamImagePipeline", (96, 192), ((768, 768), 5.0, 4.0)),
        ("HiDreamImagePipeline", (128, 256), ((1024, 1024), 3.0, 1.5)),
        ("HiDreamImagePipeline", (128, 128), None),
    ],
)
def test_a_folder_is_known_by_its_configs(
    folder: Path, tmp_path: Path, pipeline: str, resolution: tuple[int, int], defaults: tuple[Any, ...] | None
) -> None:
    copy = told_of(folder, tmp_path / "copy", pipeline=pipeline, resolution=resolution)
    assert detect_family(ModelSource(str(copy))) is (HiDreamE1 if defaults else HiDream)
    if defaults is None:
        with pytest.raises(ModelError, match=r"is not HiDream-E1, as far as its configs say") as error:
            loaded(copy)
        assert "HiDreamImageEditingPipeline" in error.value.remedy
        return
    family = loaded(copy, "denoiser")
    own = family.defaults
    assert (own.size, own.guidance, own.reference_guidance) == defaults
    patches = own.size[0] * own.size[1] * 2 // 16**2
    assert family.denoiser.max_seq == patches


@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [
        ("hidream_e1_full_bf16", HiDreamE1, 768),
        ("hidream_e1_1_bf16", HiDreamE1, 1024),
        ("HiDream-E1-1-fp8", HiDreamE1, 1024),
        ("hidream_i1_full_bf16", HiDream, 1024),
    ],
)
def test_a_single_file_is_known_by_its_name(
    folder: Path, tmp_path: Path, name: str, kind: Any, side: int
) -> None:
    file = tmp_path / f"{name}.safetensors"
    save_file(load_file(folder / "transformer" / WEIGHTS), file)
    source = ModelSource(str(file))
    assert detect_family(source) is kind
    family = kind.load(source, frozenset(), dtype=torch.float32, device="cpu")
    assert (family.defaults.size, family.capabilities.references) == ((side, side), int(kind is HiDreamE1))
    said = HiDreamE1.load(source, frozenset(), dtype=torch.float32, device="cpu")
    assert said.capabilities.references == 1


def trained(model: Path, folder: Path, drawn: list[Image.Image], shown: list[Image.Image]) -> Path:
    """An adapter of a short run on `drawn`, each made from one of `shown`."""
    for name, images in (("after", drawn), ("before", shown)):
        (folder / name).mkdir()
        for number, image in enumerate(images):
            image.save(folder / name / f"{number}.png")
    for number in range(len(drawn)):
        (folder / "after" / f"{number}.txt").write_text(PROMPTS[0])
    source = {"kind": "folder", "path": str(folder / "after"), "references": [str(folder / "before")]}
    config = RunConfig.model_validate(
        {
            "name": "trained",
            "model": {"path": str(model)},
            "method": {"rank": 4, "alpha": 10},
            "data": [{**source, "resolutions": [64]}],
            "train": {
                "steps": 20,
                "batch_size": 2,
                "precision": "fp32",
                "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
            },
            "sample": {
                "every": 0,
                "at_start": False,
                "size": 64,
                "steps": 1,
                "reference_guidance": 2.0,
                "prompts": [{"prompt": PROMPTS[0], "references": [str(folder / "before" / "0.png")]}],
            },
            "save": {"folder": str(folder), "dtype": "float32"},
            "memory": {"device": "cpu", "cache": "ram"},
        }
    )
    adapter = train_run(config, progress=Listener()).adapter
    assert adapter is not None
    (facts,) = (folder / "trained" / "samples").rglob("*.json")
    assert json.loads(facts.read_text())["reference_guidance"] == 2.0
    return adapter


def loss(family: HiDreamE1, drawn: list[Image.Image], shown: list[Image.Image]) -> float:
    """Mean over the pictures, eight times and draws of noise, of the squared error of the velocity."""
    found = []
    with torch.no_grad():
        for image, before in zip(drawn, shown, strict=True):
            told = family.encode_prompts([PROMPTS[0]]).merged(
                family.encode_references([pixels_of(before)[None]])
            )
            latents = family.encode_pixels(pixels_of(image)[None])
            for number in range(8):
                noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(number))
                t_B = torch.tensor([0.05 + 0.9 * number / 7])
                noisy = (1 - t_B) * latents + t_B * noise
                found.append((family.predict(noisy, t_B, told) - (noise - latents)).square().mean())
    return float(torch.stack(found).mean())


def test_training_with_the_picture_lowers_the_loss_and_the_equations_draw_the_same(
    family: HiDreamE1, folder: Path, tmp_path: Path
) -> None:
    drawn, shown = ([picture(seed, 64, 64) for seed in seeds] for seeds in ((8, 9), (10, 11)))
    seen = saved(tmp_path, WIDE)
    before, plain = loss(family, drawn, shown), ours(family, seen, WIDE, 3.0, 1.5)[0]
    adapter = trained(folder, tmp_path, drawn, shown)
    attach_adapter(family, adapter, note=pytest.fail)
    assert loss(family, drawn, shown) < 0.97 * before
    with_adapter = ours(family, seen, WIDE, 3.0, 1.5)[0]
    assert (with_adapter - plain).abs().max() > 0.01
    expected = theirs(folder, seen[0], WIDE, 0, 3.0, 1.5, adapter=adapter)
    torch.testing.assert_close(with_adapter[None], expected, atol=1e-4, rtol=0)
