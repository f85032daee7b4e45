"""Kinds beyond LoRA on tiny pipelines: diffusers' own loader where it reads them, its refusal where it does not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from released_widths import tiny_loaders
from tiny import cases
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import adaptable_modules
from burnish.adapters.targeting import choose_modules
from burnish.config.method import AdapterMethod, Loha, Lokr, Lora, Oft
from burnish.export.adapter_file import read_adapter, write_adapter
from burnish.export.verify import verify_adapter
from burnish.families.registry import family_named

TinyFolder = Callable[[str], Path]
CASES = cases()
DORA = Lora(rank=3, alpha=5.0, dora=True, targets="attention+mlp")
ALL_DORA = Lora(rank=3, alpha=5.0, dora=True, targets="all")
LOKR = Lokr(kind="lokr", factor=4, targets="attention")
DOKR = Lokr(kind="lokr", factor=4, dora=True, targets="attention")
THIN = Lokr(kind="lokr", factor=2, full_rank=False, rank=1, alpha=3.0, targets="attention+mlp")


def pipeline_of(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def attach(name: str, denoiser: nn.Module, method: AdapterMethod) -> AdapterSet:
    family = family_named(name)
    chosen = choose_modules(denoiser.requires_grad_(False), family.targets, family.default_targets, method)
    adapter = AdapterSet.attach(denoiser, chosen, seed=5)
    generator = torch.Generator().manual_seed(6)
    for key, parameter in adapter.named_parameters().items():
        spread = 0.02 if key.endswith("magnitude") else 0.1
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return adapter


def write(name: str, part: str, adapter: AdapterSet, path: Path, format: str) -> Path:
    keys, weights = family_named(name).export, adapter.weights()
    modules = adaptable_modules(adapter.denoiser)
    write_adapter(
        path, weights, part=part, keys=keys, modules=modules, format=format, dtype=torch.float32, metadata={}
    )
    verify_adapter(path, weights, adapter.denoiser, part=part, keys=keys)
    return path


def as_released(name: str) -> AbstractContextManager[None]:
    """diffusers' loader with the tiny model's widths in place of constants."""
    return tiny_loaders(CASES[name].loader_widths) if name in CASES else nullcontext()


def draw(pipeline: DiffusionPipeline) -> Tensor:
    output = pipeline(
        prompt="a photo of a dog",
        num_inference_steps=2,
        height=64,
        width=64,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
    )
    images = output.images
    assert isinstance(images, Tensor)
    return images


@pytest.mark.parametrize(
    ("name", "part", "format", "method"),
    [
        ("sd15", "unet", "diffusers", ALL_DORA),
        ("sdxl", "unet", "diffusers", DORA),
        ("flux", "transformer", "auto", ALL_DORA),
        ("flux2", "transformer", "auto", LOKR),
        ("flux2", "transformer", "auto", THIN),
        ("z_image", "transformer", "auto", LOKR),
    ],
)
def test_diffusers_draws_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, part: str, format: str, method: AdapterMethod
) -> None:
    folder = tiny_folder(name)
    ours, theirs = pipeline_of(folder), pipeline_of(folder)
    without = draw(ours)
    adapter = attach(name, getattr(ours, part), method)
    path = write(name, part, adapter, tmp_path / "a.safetensors", format)
    with as_released(name):
        theirs.load_lora_weights(path.parent, weight_name=path.name)
    expected = draw(ours)
    assert (expected - without).abs().max() > 0.01, "the adapter has no effect to compare"
    assert (draw(theirs) - expected).abs().max() <= 1e-4

    fresh = pipeline_of(folder)
    modules = adaptable_modules(getattr(fresh, part))
    read = read_adapter(path, modules, part=part, keys=family_named(name).export)
    AdapterSet.from_weights(getattr(fresh, part), read.weights)
    assert (draw(fresh) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "part", "method"),
    [
        ("sd15", "unet", DORA),
        ("sdxl", "unet", DORA),
        ("sd15", "unet", Loha(kind="loha", rank=2)),
        ("sdxl", "unet", LOKR),
        ("flux", "transformer", Oft(kind="oft", block_size=8)),
        ("flux", "transformer", LOKR),
        ("wan21", "transformer", DORA),
        ("flux2", "transformer", DOKR),
        ("z_image", "transformer", DOKR),
    ],
)
def test_files_for_comfyui_alone_are_not_half_loaded(
    tiny_folder: TinyFolder, tmp_path: Path, name: str, part: str, method: AdapterMethod
) -> None:
    """A file that diffusers cannot use whole changes nothing there, instead of doing something else."""
    pipeline = pipeline_of(tiny_folder(name))
    denoiser = getattr(pipeline, part)
    adapter = attach(name, denoiser, method)
    path = write(name, part, adapter, tmp_path / "a.safetensors", "auto")
    adapter.detach()
    with pytest.raises((ValueError, RuntimeError)), as_released(name):
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
