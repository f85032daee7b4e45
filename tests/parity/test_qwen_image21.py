"""Qwen-Image 2.1 with reference pictures draws what its pipeline draws, with and without the pipeline's cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21
from numpy.random import default_rng
from PIL import Image
from reference import NEGATIVES, PROMPTS, SEEDS, STEPS
from safetensors.torch import load_file, save_file
from test_single_files import folder_weights
from tiny import cases
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from burnish.conditioning import Conditioning
from burnish.data.prepare import pixels_of
from burnish.families import qwen_eyes, qwen_image21, qwen_image21_sequence, reference_sizes
from burnish.families.qwen import shipped_tokenizer
from burnish.families.registry import family_named
from burnish.family import ModelSource
from burnish.sampling.sampler import PictureRequest, draw_latents, encode_requests, with_references

TinyFolder = Callable[[str], Path]
SIZE = (64, 96)
SIDE = 64
FEWEST = 32 * 32  # pixels at which prompts see pictures; a megapixel takes minutes


@pytest.fixture(autouse=True)
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides take references at fewer pixels than released."""
    monkeypatch.setattr(qwen_image21, "REFERENCE_AREA", SIDE * SIDE)
    eyes = qwen_eyes.Eyes(16, FEWEST, qwen_eyes.QWEN3.most, qwen_eyes.QWEN3.mean, qwen_eyes.QWEN3.deviation)
    monkeypatch.setattr(qwen_image21, "EYES", eyes)


def picture(seed: int, height: int, width: int) -> Image.Image:
    blobs = Image.fromarray(default_rng(seed).integers(0, 256, (4, 4, 3), dtype="uint8"))
    return blobs.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Of sizes at which references are taken as they are."""
    files = []
    for number, (height, width) in enumerate(((64, 64), (96, 32))):
        assert reference_sizes.of_area(SIDE * SIDE, height, width) == (height, width)
        files.append(tmp_path / f"{number}.png")
        picture(number, height, width).save(files[-1])
    return files


def loaded(folder: Path) -> Any:
    parts = frozenset(("denoiser", "vae", "text_encoders"))
    kind = family_named("qwen_image21")
    return kind.load(ModelSource(str(folder)), parts, dtype=torch.float32, device="cpu")


def theirs(
    folder: Path,
    pictures: list[Path],
    guidance: float,
    index: int,
    name: str = "qwen_image21",
    **options: Any,
) -> Tensor:
    pipeline = cases()[name].pipeline.from_pretrained(folder, fewest_pixels=FEWEST)
    pipeline.set_progress_bar_config(disable=True)
    drawn: Tensor = pipeline(
        image=[Image.open(file) for file in pictures] or None,
        prompt=PROMPTS[index],
        negative_prompt=NEGATIVES[index],
        height=SIZE[0],
        width=SIZE[1],
        output_resolution=SIDE,
        generator=torch.Generator("cpu").manual_seed(SEEDS[index]),
        true_cfg_scale=guidance,
        output_type="latent",
        **options,
    ).images.detach()
    latents: Tensor = pipeline._unpack_latents(drawn, *SIZE, 16)[:, :, 0]
    return latents


def ours(family: Any, pictures: list[Path], guidance: float, steps: int = STEPS) -> list[Tensor]:
    """Both prompts at once, the second with the pictures in the other order."""
    requests = [
        PictureRequest(
            prompt, negative, seed, *SIZE, steps, guidance, references=tuple(pictures[::direction])
        )
        for prompt, negative, seed, direction in zip(PROMPTS, NEGATIVES, SEEDS, (1, -1), strict=True)
    ]
    encoded = with_references(family, encode_requests(family, requests), device="cpu")
    return draw_latents(family, encoded, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(("guidance", "cache", "count"), [(1.0, True, 2), (4.0, False, 2), (4.0, True, 1)])
def test_latents_with_references_are_those_of_the_pipeline(
    tiny_folder: TinyFolder, pictures: list[Path], guidance: float, cache: bool, count: int
) -> None:
    folder, seen = tiny_folder("qwen_image21"), pictures[:count]
    found = ours(loaded(folder), seen, guidance)
    for index, direction in enumerate((1, -1)):
        options = {"num_inference_steps": STEPS, "use_kv_cache": cache}
        expected = theirs(folder, seen[::direction], guidance, index, **options)
        assert expected.std() > 0.1
        torch.testing.assert_close(found[index][None], expected, atol=1e-4, rtol=0)


def test_the_distilled_release_takes_the_steps_that_it_was_made_for(tiny_folder: TinyFolder) -> None:
    folder = tiny_folder("qwen_image21_turbo")
    family = loaded(folder)
    assert family.defaults.steps == len(qwen_image21.TURBO_SIGMAS)
    found = ours(family, [], 1.0, steps=family.defaults.steps)
    for index in range(2):
        expected = theirs(folder, [], 1.0, index, name="qwen_image21_turbo")
        torch.testing.assert_close(found[index][None], expected, atol=1e-4, rtol=0)


def test_prompt_and_denoiser_both_see_the_picture(tiny_folder: TinyFolder) -> None:
    family = loaded(tiny_folder("qwen_image21"))
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
    family = loaded(tiny_folder("qwen_image21"))
    rows = []
    for number, row in enumerate(([(64, 64)], [(96, 32), (64, 64)])):
        seen = [pixels_of(picture(number, *size)) for size in row]
        prompt = family.encode_prompts(["a cat " * (number + 1)], [seen])
        rows.append(prompt.merged(family.encode_references([one[None] for one in seen])))
    together = Conditioning.collate(rows)
    noisy, t_B, _ = family.example(*SIZE, batch=2)
    found = family.predict(noisy, t_B, together)
    for number in range(2):
        one = slice(number, number + 1)
        alone = family.predict(noisy[one], t_B[one], rows[number])
        torch.testing.assert_close(found[one], alone, rtol=1e-4, atol=1e-5)


def test_positions_are_those_of_the_pipelines_model(tiny_folder: TinyFolder) -> None:
    """Also of pictures of odd sides, side by side or before all words, against the angles of diffusers' table."""
    denoiser = loaded(tiny_folder("qwen_image21")).denoiser
    sizes = ((3, 5), (2, 2), (4, 6))
    for places in ((0, 0), (2, 2), (1, 7), (3, 4)):
        layout = qwen_image21_sequence.Layout(7, places, sizes[:2])
        is_picture = torch.tensor([False] * 7)
        for place, (rows, columns) in reversed(list(zip(places, sizes[:2], strict=True))):
            inside = torch.ones(rows * columns, dtype=torch.bool)
            is_picture = torch.cat([is_picture[:place], inside, is_picture[place:]])
        is_picture = torch.cat([is_picture, torch.ones(24, dtype=torch.bool)])
        expected = denoiser.pos_embed([(1, *size) for size in sizes], is_picture, device=torch.device("cpu"))
        at_N3 = qwen_image21_sequence.positions(layout, 4, 6, torch.device("cpu"))
        found = qwen_image21_sequence.turns(at_N3, denoiser.config.axes_dims_rope)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (300, 400), (1024, 992)])
def test_pictures_are_seen_as_by_transformers(size: tuple[int, int]) -> None:
    seen = [picture(1, *size), picture(2, 70, 90)]
    reference = Qwen2VLImageProcessorPil(
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_pixels=65_536,
        max_pixels=16_777_216,
    )(images=seen, return_tensors="pt")
    patches_ND, grids_K3 = qwen_eyes.patches(seen, qwen_eyes.QWEN3)
    assert torch.equal(grids_K3, reference["image_grid_thw"])
    torch.testing.assert_close(patches_ND, reference["pixel_values"], rtol=0, atol=1e-5)


def test_references_have_the_size_of_the_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    family = family_named("qwen_image21").released(ModelSource(""))
    for height, width in ((64, 64), (2000, 333), (720, 1280)):
        wide, high, _ = pipeline_qwenimage21.calculate_dimensions(1024 * 1024, width / height)
        assert family.reference_size(height, width, (512, 512)) == (high, wide)


def test_pictures_are_opaque(tiny_folder: TinyFolder) -> None:
    family = loaded(tiny_folder("qwen_image21"))
    pixels = pixels_of(picture(3, 64, 64))[None]
    assert family.decode_latents(family.encode_pixels(pixels)).shape == pixels.shape
    rgba = torch.cat([pixels, torch.ones(1, 1, 64, 64)], dim=1)[:, :, None]
    vae = family.module("vae")
    mean, deviation = (
        torch.tensor(vae.config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        expected = (vae.encode(rgba).latent_dist.mode()[:, :, 0] - mean) / deviation
    torch.testing.assert_close(family.encode_pixels(pixels), expected)


def test_the_instruction_is_what_the_pipeline_leaves_out() -> None:
    tokenizer = shipped_tokenizer(qwen3=True)
    before = tokenizer(qwen_image21.INSTRUCTION).input_ids
    assert tokenizer(qwen_image21.TEMPLATE.format("a cat")).input_ids[: len(before)] == before
    assert tokenizer.decode(before[-2:]) == "<|im_end|>\n"


def test_comfyuis_file_holds_the_gate_before_what_it_gates(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """As `comfy/ldm/qwen_image21/model.py` and `comfy/lora.py` have it; files that do not fuse them are read, too."""
    plain = folder_weights(tiny_folder("qwen_image21"), "transformer")
    fused = {
        name: tensor for name, tensor in plain.items() if "gate_layer" not in name and ".proj." not in name
    }
    for number in range(2):
        stem = f"transformer_blocks.{number}.img_mlp"
        halves = [plain[f"{stem}.{half}.weight"] for half in ("gate_layer", "proj")]
        fused[f"{stem}.gate_up.weight"] = torch.cat(halves)
    for name, weights in (("plain", plain), ("fused", fused)):
        file = tmp_path / f"{name}.safetensors"
        save_file({f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()}, file)
        kind = family_named("qwen_image21")
        denoiser: Any = kind.load(
            ModelSource(str(file)), frozenset(["denoiser"]), dtype=torch.float32, device="cpu"
        ).denoisers["transformer"]
        assert denoiser.config.mlp_ratio == 3
        found = denoiser.state_dict()
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())


def test_the_vae_of_comfyui_has_an_axis_of_time_and_the_names_of_wan(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Names as in `comfy/ldm/wan/vae2_2.py`; convolutions over one frame."""
    folder = tiny_folder("qwen_image21")
    weights = folder_weights(folder, "vae")
    spelled = {}
    for name, tensor in weights.items():
        is_convolution = tensor.dim() == 4 and name.endswith("weight")
        in_2d = ".to_qkv." in name or ".proj." in name or ".resample.1." in name
        spelled[original_name(name)] = tensor[:, :, None] if is_convolution and not in_2d else tensor
    assert len(spelled) == len(weights)
    save_file({name: tensor.contiguous() for name, tensor in spelled.items()}, tmp_path / "vae.safetensors")
    denoiser = tmp_path / "denoiser.safetensors"
    save_file(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"), denoiser)
    source = ModelSource(str(denoiser), vae=tmp_path / "vae.safetensors")
    kind = family_named("qwen_image21")
    family: Any = kind.load(source, frozenset(["vae"]), dtype=torch.float32, device="cpu")
    found = family.module("vae").state_dict()
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


def original_name(name: str) -> str:
    """A name of diffusers' VAE as Wan 2.2's release has it, by its two lists of stages."""
    side, _, rest = name.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if side == 'quant_conv' else 'conv2'}.{rest}"
    first, _, inner = rest.partition(".")
    plain = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
    if first in plain:
        return f"{side}.{plain[first]}.{inner}"
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    parts["conv_shortcut"] = "shortcut"
    words = inner.split(".")
    if first == "mid_block":
        if words[0] == "attentions":
            return f"{side}.middle.1.{'.'.join(words[2:])}"
        return f"{side}.middle.{2 * int(words[1])}.{parts[words[2]]}.{words[3]}"
    way = "down" if side == "encoder" else "up"
    stage = f"{side}.{way}samples.{words[0]}.{way}samples"
    if words[1] == "resnets":
        return f"{stage}.{words[2]}.{parts[words[3]]}.{words[4]}"
    return f"{stage}.{RESNETS[side]}.{'.'.join(words[2:])}"


RESNETS = {"encoder": 1, "decoder": 2}  # in a stage of the tiny VAE, before what changes its size
