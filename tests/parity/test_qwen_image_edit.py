"""Qwen-Image-Edit draws what its pipelines draw from the same pictures, seen by prompts and by the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import (
    QwenImageEditPipeline,
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
)
from diffusers_rules import load
from numpy.random import default_rng
from PIL import Image
from reference import NEGATIVES, PROMPTS, SEEDS, STEPS
from safetensors.torch import load_file, save_file
from tiny import cases
from tiny_qwen import Processor, qwen_tokenizer, tell_kinds_of_tokens
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from burnish.conditioning import Conditioning
from burnish.config.schema import RunConfig
from burnish.data.prepare import pixels_of
from burnish.events import Listener
from burnish.families import qwen_eyes, qwen_image_edit, reference_sizes
from burnish.families.qwen import shipped_tokenizer
from burnish.families.registry import detect_family, family_named
from burnish.families.seen_pictures import picture_of
from burnish.family import ModelSource
from burnish.generate import attach_adapter
from burnish.run import train_run
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests, with_references

TinyFolder = Callable[[str], Path]
SIZE = (64, 96)
AREA, PROMPT_AREA = 64 * 64, 128 * 128  # a megapixel takes minutes


@pytest.fixture(autouse=True)
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides take references at fewer pixels than released."""
    monkeypatch.setattr(qwen_image_edit, "REFERENCE_AREA", AREA)
    monkeypatch.setattr(qwen_image_edit, "PROMPT_AREA", PROMPT_AREA)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", PROMPT_AREA)
    original = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(
        pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: original(AREA, ratio)
    )


def picture(seed: int, height: int, width: int) -> Image.Image:
    blobs = Image.fromarray(default_rng(seed).integers(0, 256, (4, 4, 3), dtype="uint8"))
    return blobs.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Of sizes at which references are taken as they are."""
    files = []
    for number, (height, width) in enumerate(((64, 64), (96, 32))):
        assert reference_sizes.of_area(AREA, height, width) == (height, width)
        files.append(tmp_path / f"{number}.png")
        picture(number, height, width).save(files[-1])
    return files


def loaded(source: Path) -> Any:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    kind = family_named("qwen_image_edit")
    return kind.load(ModelSource(str(source)), parts, dtype=torch.float32, device="cpu")


def theirs(
    name: str,
    folder: Path,
    pictures: list[Path],
    guidance: float,
    output: str,
    index: int,
    adapter: Path | None = None,
) -> Tensor:
    pipeline = cases()[name].pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.processor = Processor(pipeline.tokenizer)
    tell_kinds_of_tokens(pipeline.text_encoder)
    if adapter is not None:
        load(pipeline, adapter)
    images = [Image.open(file) for file in pictures]
    drawn: Tensor = pipeline(
        image=images[0] if isinstance(pipeline, QwenImageEditPipeline) else images,
        prompt=PROMPTS[index],
        negative_prompt=NEGATIVES[index],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        generator=torch.Generator("cpu").manual_seed(SEEDS[index]),
        true_cfg_scale=guidance,
        output_type=output,
    ).images.detach()
    return pipeline._unpack_latents(drawn, *SIZE, 8)[:, :, 0] if output == "latent" else drawn


def ours(family: Any, pictures: list[Path], guidance: float) -> list[Tensor]:
    """Both prompts at once, the second with the pictures in the other order."""
    requests = [
        PictureRequest(
            prompt, negative, seed, *SIZE, STEPS, guidance, references=tuple(pictures[::direction])
        )
        for prompt, negative, seed, direction in zip(PROMPTS, NEGATIVES, SEEDS, (1, -1), strict=True)
    ]
    encoded = with_references(family, encode_requests(family, requests), device="cpu")
    return draw_latents(family, encoded, device="cpu", dtype=torch.float32)


def trained(model: Path, folder: Path, drawn: list[Image.Image], shown: list[Image.Image]) -> Path:
    """An adapter of a short run on `drawn`, each beside one of `shown`."""
    for name, images in (("pictures", drawn), ("before", shown)):
        (folder / name).mkdir()
        for number, image in enumerate(images):
            image.save(folder / name / f"{number}.png")
    for number in range(len(drawn)):
        (folder / "pictures" / f"{number}.txt").write_text(PROMPTS[0])
    source = {"kind": "folder", "path": str(folder / "pictures"), "references": [str(folder / "before")]}
    config = RunConfig.model_validate(
        {
            "name": "trained",
            "model": {"path": str(model), "family": "qwen_image_edit"},
            "method": {"rank": 4, "alpha": 10},
            "data": [{**source, "resolutions": [64]}],
            "train": {
                "steps": 20,
                "batch_size": 2,
                "precision": "fp32",
                "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
            },
            "sample": {"every": 0, "at_start": False},
            "save": {"folder": str(folder), "dtype": "float32"},
            "memory": {"device": "cpu", "cache": "ram"},
        }
    )
    adapter = train_run(config, progress=Listener()).adapter
    assert adapter is not None
    return adapter


def loss(family: Any, drawn: list[Image.Image], shown: list[Image.Image]) -> float:
    """Mean over the pictures, eight times and draws of noise, of the squared error of the velocity."""
    found = []
    with torch.no_grad():
        for image, before in zip(drawn, shown, strict=True):
            seen = pixels_of(before)
            told = family.encode_prompts([PROMPTS[0]], [[seen]]).merged(
                family.encode_references([seen[None]])
            )
            latents = family.encode_pixels(pixels_of(image)[None])
            for number in range(8):
                noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(number))
                t_B = torch.tensor([0.05 + 0.9 * number / 7])
                noisy = (1 - t_B) * latents + t_B * noise
                found.append((family.predict(noisy, t_B, told) - (noise - latents)).square().mean())
    return float(torch.stack(found).mean())


RELEASES = {"qwen_image_edit": 1, "qwen_image_edit_2509": 2, "qwen_image_edit_2511": 2}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", RELEASES)
def test_latents_are_those_of_the_pipeline(
    tiny_folder: TinyFolder, pictures: list[Path], name: str, guidance: float
) -> None:
    folder, seen = tiny_folder(name), pictures[: RELEASES[name]]
    found = ours(loaded(folder), seen, guidance)
    for index, direction in enumerate((1, -1)):
        expected = theirs(name, folder, seen[::direction], guidance, "latent", index)
        assert expected.std() > 0.1
        torch.testing.assert_close(found[index][None], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", RELEASES)
def test_pixels_are_those_of_the_pipeline(tiny_folder: TinyFolder, pictures: list[Path], name: str) -> None:
    folder, seen = tiny_folder(name), pictures[: RELEASES[name]]
    family = loaded(folder)
    pixels = family.decode_latents(ours(family, seen, 4.0)[0][None])
    expected = theirs(name, folder, seen, 4.0, "pt", 0)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", RELEASES)
def test_prompt_and_denoiser_both_see_the_picture(
    tiny_folder: TinyFolder, pictures: list[Path], name: str
) -> None:
    family = loaded(tiny_folder(name))
    first, second = (pixels_of(picture(seed, 64, 64)) for seed in (5, 6))
    prompts = [family.encode_prompts(["a cat"], [[one]]) for one in (first, second)]
    assert not torch.allclose(prompts[0]["tokens_BSD"], prompts[1]["tokens_BSD"], atol=1e-3)
    shown = [family.encode_references([one[None]]) for one in (first, second)]
    noisy, t_B, _ = family.example(*SIZE, batch=1)
    answers = [family.predict(noisy, t_B, prompts[0].merged(one)) for one in shown]
    assert not torch.allclose(*answers, atol=1e-4)
    assert not torch.allclose(answers[0], family.predict(noisy, t_B, prompts[0]), atol=1e-4)


def test_rows_with_references_of_other_sizes_and_numbers_are_predicted_as_alone(
    tiny_folder: TinyFolder,
) -> None:
    family = loaded(tiny_folder("qwen_image_edit_2511"))
    sizes = ([(64, 64)], [(96, 32), (64, 64)], [])
    rows = []
    for number, row in enumerate(sizes):
        seen = [pixels_of(picture(number, *size)) for size in row]
        prompt = family.encode_prompts(["a cat " * (number + 1)], [seen])
        about = family.encode_references([one[None] for one in seen])
        rows.append(prompt.merged(about))
    together = Conditioning.collate(rows[:2])
    noisy, t_B, _ = family.example(*SIZE, batch=2)
    found = family.predict(noisy, t_B, together)
    for number in range(2):
        one = slice(number, number + 1)
        alone = family.predict(noisy[one], t_B[one], rows[number])
        torch.testing.assert_close(found[one], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (30, 400), (392, 361), (20, 20)])
def test_pictures_are_seen_as_by_transformers(size: tuple[int, int]) -> None:
    seen = [picture(1, *size), picture(2, 70, 90)]
    reference = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056)(
        images=seen, return_tensors="pt"
    )
    patches_ND, grids_K3 = qwen_eyes.patches(seen)
    assert torch.equal(grids_K3, reference["image_grid_thw"])
    torch.testing.assert_close(patches_ND, reference["pixel_values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(5000, 4000), (28, 5), (1, 150), (3584, 3584), (42, 70)])
def test_sizes_are_those_of_transformers(size: tuple[int, int]) -> None:
    expected = smart_resize(*size, factor=28, min_pixels=3136, max_pixels=12_845_056)
    assert qwen_eyes.seen_size(*size) == expected


def test_a_picture_of_8_bits_comes_back_whole() -> None:
    values = picture(3, 40, 50)
    assert picture_of(pixels_of(values)).tobytes() == values.tobytes()


def test_the_instruction_has_as_many_tokens_as_are_left_out() -> None:
    tokenizer = shipped_tokenizer()
    before = qwen_image_edit.TEMPLATE.split("{}")[0]
    assert len(tokenizer(before).input_ids) == qwen_image_edit.INSTRUCTION_TOKENS


def test_a_caption_is_cut_and_its_pictures_are_not(tiny_folder: TinyFolder) -> None:
    family = loaded(tiny_folder("qwen_image_edit_2509"))
    seen = [torch.zeros(3, 64, 64)]
    short = family.encode_prompts(["a"], [seen])["tokens_BSD"]
    long = family.encode_prompts(["a cat " * 2000], [seen])["tokens_BSD"]
    empty = family.encode_prompts([""], [seen])["tokens_BSD"]
    instruction = len(qwen_tokenizer()(qwen_image_edit.TEMPLATE.split("{}")[0]).input_ids)
    assert empty.shape[1] < short.shape[1] < long.shape[1]
    assert long.shape[1] >= family.prompt_limit
    same = instruction - qwen_image_edit.INSTRUCTION_TOKENS + 20
    torch.testing.assert_close(long[:, :same], short[:, :same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "mark", "family", "references"),
    [
        ("qwen_image_edit_bf16", False, "qwen_image_edit", 1),
        ("qwen_image_edit_2509_fp8_e4m3fn", False, "qwen_image_edit", 3),
        ("qwen_image_edit_2511_bf16", True, "qwen_image_edit", 3),
        ("mine", True, "qwen_image_edit", 3),
        ("mine", False, "qwen_image", 0),
    ],
)
def test_a_single_file_for_editing_is_known_by_its_mark_or_name(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, mark: bool, family: str, references: int
) -> None:
    weights = load_file(tiny_folder("qwen_image") / "transformer" / "diffusion_pytorch_model.safetensors")
    if mark:
        weights["__index_timestep_zero__"] = torch.tensor(0.0)
    file = tmp_path / f"{name}.safetensors"
    save_file(weights, file)
    source = ModelSource(str(file))
    found = detect_family(source)
    assert found.name == family
    model = found.load(source, frozenset(["denoiser"]), dtype=torch.float32, device="cpu")
    assert model.capabilities.references == references
    assert model.configs["transformer"].get("zero_cond_t", False) == mark
    said = family_named("qwen_image_edit").load(source, frozenset(), dtype=torch.float32, device="cpu")
    assert said.capabilities.references == (references or 3)


@pytest.mark.parametrize("name", ["qwen_image_edit", "qwen_image_edit_2511"])
def test_training_with_references_lowers_the_loss_and_diffusers_draws_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, pictures: list[Path], name: str
) -> None:
    folder, seen = tiny_folder(name), pictures[: RELEASES[name]]
    drawn = [picture(seed, 64, 64) for seed in (8, 9)]
    shown = [picture(seed, 96, 32) for seed in (10, 11)]
    family = loaded(folder)
    before, plain = loss(family, drawn, shown), ours(family, seen, 4.0)[0]
    adapter = trained(folder, tmp_path, drawn, shown)
    attach_adapter(family, adapter, note=pytest.fail)
    assert loss(family, drawn, shown) < 0.97 * before
    with_adapter = ours(family, seen, 4.0)[0]
    assert (with_adapter - plain).abs().max() > 0.01
    expected = theirs(name, folder, seen, 4.0, "latent", 0, adapter)
    torch.testing.assert_close(with_adapter[None], expected, atol=1e-4, rtol=0)
