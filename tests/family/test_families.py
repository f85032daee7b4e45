"""The same checks for every registered family, on its tiny pipeline, in float32 on the CPU."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, AutoencoderKLQwenImage21, AutoModel, Flux2Pipeline
from safetensors.torch import load_file, save_file
from tiny import cases
from tiny_pipelines import PIPELINES
from torch import nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.families.registry import detect_family, families, family_named
from burnish.family import Family, ModelSource
from burnish.latent_shape import PictureInfo
from burnish.placement import Part

FAMILY_OF = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    **{name: case.family for name, case in cases().items()},
}
PARTS: tuple[Part, ...] = ("denoiser", "vae", "text_encoders")
PROMPTS = ["a photo of a sks dog", "", "a red chair " * 200]
SIZE = 128  # of pictures: the deepest stage of a UNet still sees more than one position

Load = Callable[..., Family]
TinyFolder = Callable[[str], Path]


@pytest.fixture(params=FAMILY_OF)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kind(name: str) -> type[Family]:
    return family_named(FAMILY_OF[name])


@pytest.fixture
def folder(name: str, tiny_folder: TinyFolder) -> Path:
    return tiny_folder(name)


@pytest.fixture
def load(kind: type[Family], folder: Path) -> Load:
    def loaded(*parts: Part, dtype: torch.dtype = torch.float32, path: Path = folder) -> Family:
        return kind.load(ModelSource(str(path)), frozenset(parts), dtype=dtype, device="cpu")

    return loaded


def the_denoiser(family: Family) -> nn.Module:
    """Of several the first, at whose times the family's example is."""
    return next(iter(family.denoisers.values()))


def described(family: Family, conditioning: Conditioning) -> Conditioning:
    whole = [PictureInfo.whole(SIZE, SIZE)] * conditioning.batch_size
    return conditioning.merged(family.describe_pictures(whole))


def kinds_of_names(module: nn.Module) -> set[str]:
    """Module names with their numbers blanked."""
    return {re.sub(r"\d+", "#", module_name) for module_name, _ in module.named_modules()}


def test_every_registered_family_and_tiny_pipeline_is_checked() -> None:
    assert set(FAMILY_OF) == {*PIPELINES, *cases()}
    assert set(FAMILY_OF.values()) == set(families())


def test_the_weights_are_detected_as_this_family_and_no_other(kind: type[Family], folder: Path) -> None:
    source = ModelSource(str(folder))
    assert detect_family(source) is kind
    for other in families().values():
        assert other.detect(source) is (other is kind)


def test_another_family_refuses_the_weights(kind: type[Family], folder: Path) -> None:
    for other in families().values():
        if other is not kind:
            with pytest.raises(ModelError, match=f"is not {other.title}"):
                other.load(ModelSource(str(folder)), frozenset(), dtype=torch.float32, device="cpu")


def test_a_prediction_has_the_shape_of_the_latents_and_is_finite(load: Load) -> None:
    family = load("denoiser")
    noisy_BCHW, t_B, conditioning = family.example(SIZE, 2 * SIZE, batch=2)
    assert noisy_BCHW.shape == (2, *family.latents.of(SIZE, 2 * SIZE))
    predicted_BCHW = family.predict(noisy_BCHW, t_B, conditioning)
    assert predicted_BCHW.shape == noisy_BCHW.shape
    assert predicted_BCHW.isfinite().all()
    assert predicted_BCHW.std() > 1e-3


def test_time_caption_and_latents_all_change_the_prediction(load: Load) -> None:
    family = load("denoiser", "text_encoders")
    noisy_BCHW, t_B, _ = family.example(SIZE, SIZE, batch=1)
    dog, cat = (described(family, family.encode_prompts([text])) for text in ("a sks dog", "a cat"))
    predicted = family.predict(noisy_BCHW, t_B, dog)
    for other in (
        family.predict(noisy_BCHW, t_B, cat),
        family.predict(noisy_BCHW, t_B / 2, dog),
        family.predict(noisy_BCHW + 0.1, t_B, dog),
    ):
        assert not torch.allclose(predicted, other, atol=1e-6)


def test_times_in_double_precision_give_the_same_prediction(load: Load) -> None:
    family = load("denoiser")
    noisy_BCHW, t_B, conditioning = family.example(SIZE, SIZE, batch=1)
    torch.testing.assert_close(
        family.predict(noisy_BCHW, t_B.double(), conditioning), family.predict(noisy_BCHW, t_B, conditioning)
    )


def test_a_low_precision_denoiser_takes_float32_latents(load: Load) -> None:
    family = load("denoiser", dtype=torch.bfloat16)
    noisy_BCHW, t_B, conditioning = family.example(SIZE, SIZE, batch=1)
    assert noisy_BCHW.dtype == torch.bfloat16
    predicted_BCHW = family.predict(noisy_BCHW.float(), t_B, conditioning)
    assert predicted_BCHW.dtype == torch.bfloat16
    assert predicted_BCHW.isfinite().all()


def test_parts_loaded_one_by_one_answer_as_when_loaded_together(load: Load) -> None:
    together = load(*PARTS)
    captions = together.encode_prompts(PROMPTS)
    alone = load("text_encoders").encode_prompts(PROMPTS)
    assert set(alone) == set(captions)
    for tensor in captions:
        assert torch.equal(alone[tensor], captions[tensor])

    pixels_B3HW = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents_BCHW = together.encode_pixels(pixels_B3HW)
    assert torch.equal(load("vae").encode_pixels(pixels_B3HW), latents_BCHW)

    example = together.example(SIZE, SIZE, batch=1)
    assert torch.equal(load("denoiser").predict(*example), together.predict(*example))


def test_latents_are_the_scaled_mode_and_decode_back(load: Load, folder: Path, name: str) -> None:
    family = load("vae")
    reference = AutoModel.from_pretrained(str(folder / "vae"))
    pixels_B3HW = torch.rand(2, 3, SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    has_time = next(reference.parameters()).dim() == 5 or isinstance(reference, AutoencoderKLQwenImage21)
    if isinstance(reference, AutoencoderKLHunyuanVideo15):
        reference.use_slicing = True  # its attention takes no more than one at a time
    seen = pixels_B3HW[:, :, None] if has_time else pixels_B3HW
    if reference.config.get("in_channels") == 4:  # the alpha of an opaque picture
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
    with torch.no_grad():
        encoded = reference.encode(seen)
        mode = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        # LTX's decoder from 0.9.1 on is told how much noise is left.
        clean = [torch.zeros(2)] if reference.config.get("timestep_conditioning") else []
        decoded = reference.decode(mode, *clean).sample[:, :3]
    mode_BCHW, decoded_B3HW = (mode[:, :, 0], decoded[:, :, 0]) if has_time else (mode, decoded)
    config = reference.config
    if hasattr(reference, "bn"):  # FLUX.2's, which norms 2x2 latents together
        folded_BCHW = Flux2Pipeline._patchify_latents(mode_BCHW)
        if cases()[name].vae_places_first:
            folded_BCHW = folded_BCHW.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)
        epsilon = cases()[name].vae_epsilon or reference.bn.eps
        deviation = (reference.bn.running_var + epsilon).sqrt().view(1, -1, 1, 1)
        expected_BCHW = (folded_BCHW - reference.bn.running_mean.view(1, -1, 1, 1)) / deviation
    elif "latents_std" in reference.state_dict():  # LTX's, among the weights
        mean, deviation = (
            reference.state_dict()[key].view(1, -1, 1, 1) for key in ("latents_mean", "latents_std")
        )
        expected_BCHW = (mode_BCHW - mean) / deviation * config.scaling_factor
    elif config.get("latents_mean") is None:
        expected_BCHW = (mode_BCHW - (config.get("shift_factor") or 0)) * config.scaling_factor
    else:
        mean, deviation = (
            torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std")
        )
        expected_BCHW = (mode_BCHW - mean) / deviation
    if family.capabilities.video:  # its pictures are clips of one frame
        pixels_B3HW, expected_BCHW, decoded_B3HW = (
            still[:, :, None] for still in (pixels_B3HW, expected_BCHW, decoded_B3HW)
        )
    latents_BCHW = family.encode_pixels(pixels_B3HW)
    assert latents_BCHW.shape == (2, *family.latents.of(SIZE, 2 * SIZE))
    torch.testing.assert_close(latents_BCHW, expected_BCHW, rtol=0, atol=1e-5)
    torch.testing.assert_close(family.decode_latents(latents_BCHW), decoded_B3HW, rtol=0, atol=1e-4)


def test_everything_loaded_is_frozen_and_in_eval_mode(load: Load) -> None:
    denoiser = the_denoiser(load(*PARTS))
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert not any(module.training for module in denoiser.modules())


@pytest.mark.parametrize("target_set", ["attention", "attention+mlp", "all"])
def test_gradient_reaches_every_target(target_set: str, load: Load, name: str) -> None:
    family = load("denoiser")
    patterns = family.targets[target_set].patterns
    modules = {
        module_name: module
        for module_name, module in the_denoiser(family).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(fnmatch(module_name, rule) for rule in patterns)
    }
    assert modules
    for module in modules.values():
        module.weight.requires_grad_(True)
    family.predict(*family.example(SIZE, SIZE, batch=1)).square().mean().backward()
    without = [
        n for n, module in modules.items() if module.weight.grad is None or not module.weight.grad.any()
    ]
    idle = cases()[name].idle if name in cases() else ()
    assert [n for n in without if not any(fnmatch(n, rule) for rule in idle)] == []


def test_target_sets_grow_and_every_pattern_finds_layers_of_the_released_model(kind: type[Family]) -> None:
    layers = [
        module_name
        for module_name, module in the_denoiser(kind.skeleton()).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    found: list[set[str]] = []
    for target_set in ("attention", "attention+mlp", "all"):
        patterns = kind.targets[target_set].patterns
        for pattern in patterns:
            assert any(fnmatch(layer, pattern) for layer in layers), pattern
        found.append({layer for layer in layers if any(fnmatch(layer, pattern) for pattern in patterns)})
    assert found[0] < found[1] < found[2]
    assert kind.default_targets in kind.targets


def test_the_skeleton_names_its_modules_as_the_loaded_denoiser(load: Load, kind: type[Family]) -> None:
    skeleton = the_denoiser(kind.skeleton())
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert kinds_of_names(the_denoiser(load("denoiser"))) <= kinds_of_names(skeleton)


def test_a_shallow_skeleton_is_the_same_but_for_depth_and_predicts(kind: type[Family], name: str) -> None:
    shallow, whole = kind.skeleton(depth=1), kind.skeleton()
    assert 0 < len(shallow.blocks()) < len(whole.blocks())
    sizes = dict(the_denoiser(whole).named_parameters())
    first_conv_or_embedding = next(iter(sizes))
    shallow_sizes = dict(the_denoiser(shallow).named_parameters())
    assert shallow_sizes[first_conv_or_embedding].shape == sizes[first_conv_or_embedding].shape
    if name in cases() and not cases()[name].on_meta:
        return
    noisy_BCHW, t_B, conditioning = shallow.example(SIZE, SIZE, batch=1)
    assert shallow.predict(noisy_BCHW, t_B, conditioning).shape == noisy_BCHW.shape


def test_blocks_come_in_forward_order_each_once(load: Load, name: str) -> None:
    family = load("denoiser")
    inside_it = set(the_denoiser(family).modules())
    blocks = [block for block in family.blocks() if block in inside_it]
    called: list[nn.Module] = []
    hooks = [block.register_forward_pre_hook(lambda module, _: called.append(module)) for block in blocks]
    family.predict(*family.example(SIZE, SIZE, batch=1))
    for hook in hooks:
        hook.remove()
    assert [id(block) for block in called] == [id(block) for block in blocks]

    inside = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    full_size = cases()[name].full_size if name in cases() else ()
    everything = sum(
        parameter.numel()
        for key, parameter in the_denoiser(family).named_parameters()
        if not key.startswith(full_size)
    )
    assert inside > everything / 2  # blocks are what memory plans move about


def test_released_parts_are_gone(load: Load) -> None:
    family = load(*PARTS)
    denoiser = weakref.ref(the_denoiser(family))
    for part in PARTS:
        family.release(part)
    gc.collect()
    assert denoiser() is None
    assert family.denoisers == {}
    with pytest.raises(RuntimeError, match="not loaded"):
        family.encode_prompts(["a"])
    with pytest.raises(RuntimeError, match="not loaded"):
        family.encode_pixels(torch.zeros(1, 3, SIZE, SIZE))


def test_a_part_has_another_identity_when_its_weights_or_number_type_differ(
    load: Load, folder: Path, tmp_path: Path
) -> None:
    before = {part: load().identity(part) for part in PARTS}
    assert len(set(before.values())) == len(PARTS)
    assert before == {part: load(*PARTS).identity(part) for part in PARTS}
    assert load(dtype=torch.bfloat16).identity("vae") != before["vae"]

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert {part: load(path=copy).identity(part) for part in PARTS} == before
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors[next(key for key in tensors if key.startswith("decoder.conv_out"))].view(-1)[0] += 1e-3
    save_file(tensors, weights)
    after = {part: load(path=copy).identity(part) for part in PARTS}
    assert [part for part in PARTS if after[part] != before[part]] == ["vae"]


def test_a_batch_of_captions_is_encoded_as_each_alone(load: Load) -> None:
    family = load("text_encoders")
    together = family.encode_prompts(PROMPTS)
    assert together.batch_size == len(PROMPTS)
    alone = Conditioning.collate([family.encode_prompts([prompt]) for prompt in PROMPTS])
    for tensor in together:
        torch.testing.assert_close(alone[tensor], together[tensor], rtol=1e-5, atol=1e-5)


def test_conditioning_survives_a_file_and_feeds_the_denoiser(load: Load, tmp_path: Path) -> None:
    family = load("denoiser", "text_encoders")
    rows = [described(family, family.encode_prompts([prompt])) for prompt in PROMPTS]
    assert not any(tensor.requires_grad for row in rows for tensor in row.values())
    read = []
    for number, row in enumerate(rows):
        save_file(
            {key: tensor.contiguous() for key, tensor in row.items()}, tmp_path / f"{number}.safetensors"
        )
        read.append(Conditioning(load_file(tmp_path / f"{number}.safetensors")))
    noisy_BCHW, t_B, example = family.example(SIZE, SIZE, batch=len(PROMPTS))
    conditioning = Conditioning.collate(read)
    # The guidance scale comes from the objective or the sampler, not from the caption.
    assert {key: tensor.dtype for key, tensor in example.items() if key != "guidance_B"} == {
        key: tensor.dtype for key, tensor in conditioning.items()
    }
    predicted_BCHW = family.predict(noisy_BCHW, t_B, conditioning)
    for number, row in enumerate(rows):
        one = slice(number, number + 1)
        torch.testing.assert_close(
            family.predict(noisy_BCHW[one], t_B[one], row), predicted_BCHW[one], rtol=1e-4, atol=1e-5
        )


def test_padding_does_not_matter_where_there_is_a_mask(load: Load) -> None:
    family = load("denoiser", "text_encoders")
    conditioning = described(family, family.encode_prompts(["a cat"]))
    masks = [key for key in conditioning if key.startswith("mask")]
    of_tokens = [key for key in conditioning if key.startswith("tokens")]
    if not masks:
        long = family.encode_prompts(["a cat " * 90])
        assert all(conditioning[tokens].shape[1] == long[tokens].shape[1] for tokens in of_tokens)
        return  # such a model reads its padding: every caption has the same length
    conditioning = Conditioning.collate(
        [conditioning, described(family, family.encode_prompts(["a cat " * 9]))]
    )
    conditioning = conditioning.rows(slice(0, 1))
    assert not conditioning["mask_BS"].all()
    noisy_BCHW, t_B, _ = family.example(SIZE, SIZE, batch=1)
    garbage = {tokens: conditioning[tokens].clone() for tokens in of_tokens}
    for tokens, tensor in garbage.items():  # tokens_BSD and tokens_BSLD have their mask in mask_BS
        (mask,) = [name for name in masks if tokens.replace("tokens", "mask").startswith(name)]
        tensor[~conditioning[mask].bool()] = 100.0
    torch.testing.assert_close(
        family.predict(noisy_BCHW, t_B, conditioning.merged(garbage)),
        family.predict(noisy_BCHW, t_B, conditioning),
    )


def test_the_schedule_names_a_diffusers_scheduler(load: Load, folder: Path) -> None:
    schedule = load().schedule
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert schedule.scheduler["_class_name"] == written["_class_name"]
    scheduler = getattr(diffusers, schedule.scheduler["_class_name"]).from_config(dict(schedule.scheduler))
    assert schedule.is_flow == (schedule.prediction == "velocity")
    if schedule.alphas_cumprod is not None:
        assert schedule.alphas_cumprod.shape == (schedule.steps,) == (written["num_train_timesteps"],)
        torch.testing.assert_close(
            schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7
        )


def test_export_and_defaults_are_usable(kind: type[Family], load: Load) -> None:
    assert kind.export.default in kind.export.formats
    assert set(kind.export.prefix) == set(kind.export.formats)
    family = load()
    multiple = family.latents.pixel_multiple
    assert all(side % multiple == 0 for side in family.defaults.size)
