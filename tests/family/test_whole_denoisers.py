"""A denoiser written as a whole: diffusers' class makes the same model of its folder, our reader of its single file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tiny import cases
from torch import Tensor, nn

from burnish.errors import DiskFull, ExportError, NonFiniteLoss
from burnish.export import denoiser_file
from burnish.export.denoiser_file import INDEX, write_folder, write_single_file
from burnish.export_keys import NativeTensor
from burnish.families.registry import detect_family, families, family_named
from burnish.family import Family, ModelSource

TinyFolder = Callable[[str], Path]
FAMILY = {"sd15": "sd15", "sdxl": "sdxl", **{name: case.family for name, case in cases().items()}}


def loaded(folder: Path, name: str) -> Family:
    kind = family_named(FAMILY[name])
    return kind.load(ModelSource(str(folder)), frozenset({"denoiser"}), dtype=torch.float32, device="cpu")


def changed(denoiser: nn.Module) -> dict[str, Tensor]:
    """The denoiser's state with other weights than those on disk."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in denoiser.parameters():
            one.add_(torch.randn(one.shape, generator=generator), alpha=0.01)
    return denoiser.state_dict()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sd3", "wan22", "anima"])
def test_diffusers_and_we_read_what_was_written(tiny_folder: TinyFolder, tmp_path: Path, name: str) -> None:
    family = loaded(tiny_folder(name), name)
    for part, denoiser in family.denoisers.items():
        values = changed(denoiser)
        folder, file = tmp_path / "model" / part, tmp_path / f"{part}.safetensors"
        written = write_folder(folder, family.config(part), values, torch.float32, shard=100_000)
        assert written.tensors == len(values)
        kind = getattr(diffusers, family.config(part)["_class_name"])
        assert_same(kind.from_pretrained(folder).state_dict(), values)
        assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == sum(
            one.nbytes for one in values.values()
        )
        if family.export.tensors is None:
            continue
        write_single_file(file, family, part, values, torch.float32, {"modelspec.title": "it"})
        several = len(family.denoisers) > 1
        source = ModelSource(str(file), denoisers=(part,) if several else ())
        if not several:  # Wan 2.2's files have the layers of Wan 2.1's: the config says which it is
            assert detect_family(source) is type(family)
        assert_same({key: read() for key, read in type(family).stored(source).items()}, values)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_single_file_is_what_diffusers_converts(tiny_sdxl: Path, tmp_path: Path) -> None:
    """By its own reader of single files, which shares nothing with ours."""
    family = loaded(tiny_sdxl, "sdxl")
    values = changed(family.denoisers["unet"])
    file = tmp_path / "unet.safetensors"
    write_single_file(file, family, "unet", values, torch.bfloat16, {})
    config = StableDiffusionXLPipeline.load_config(tiny_sdxl)
    assert config["unet"][1] == "UNet2DConditionModel"
    read = UNet2DConditionModel.from_single_file(str(file), config=str(tiny_sdxl), subfolder="unet")
    assert_same(read.state_dict(), {key: one.to(torch.bfloat16).float() for key, one in values.items()})


@pytest.mark.parametrize("name", sorted(families()))
def test_every_tensor_of_a_denoiser_has_one_place_in_its_file(name: str) -> None:
    family = families()[name].skeleton(3)
    if family.export.tensors is None:
        return
    for denoiser in family.denoisers.values():
        shapes = {key: tuple(one.shape) for key, one in denoiser.state_dict().items()}
        held = [one for tensor in family.export.tensors(shapes).values() for one in tensor.holds]
        assert sorted(held) == sorted(shapes)


def test_files_that_read_back_otherwise_are_not_kept(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = loaded(tiny_flux, "flux")
    values = family.denoisers["transformer"].state_dict()
    file, folder = tmp_path / "it.safetensors", tmp_path / "it" / "transformer"
    write_single_file(file, family, "transformer", values, torch.float32, {})
    write_folder(folder, family.config("transformer"), values, torch.float32)
    before = file.read_bytes()
    values = changed(family.denoisers["transformer"])

    def one_less(shapes: Any) -> dict[str, NativeTensor]:
        native = dict(names(shapes))
        native.pop("img_in.bias")
        return native

    names = family.export.tensors
    assert names is not None
    object.__setattr__(family.export, "tensors", one_less)
    with pytest.raises(ExportError, match=r"trained but not in the file, such as x_embedder\.bias"):
        write_single_file(file, family, "transformer", values, torch.float32, {})
    object.__setattr__(family.export, "tensors", names)

    def slipped(descriptor: int, tensors: Any, metadata: Any) -> str:
        one = sorted(tensors)[0]
        return real(descriptor, {**tensors, one: torch.zeros(tensors[one].shape)}, metadata)

    real = denoiser_file.write_tensors
    monkeypatch.setattr(denoiser_file, "write_tensors", slipped)
    with pytest.raises(ExportError, match="with other values than were trained"):
        write_folder(folder, family.config("transformer"), values, torch.float32)
    monkeypatch.undo()

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(denoiser_file, "write_tensors", full)
    with pytest.raises(DiskFull, match="no space is left"):
        write_single_file(file, family, "transformer", values, torch.float32, {})
    monkeypatch.undo()

    values["x_embedder.bias"][0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"x_embedder\.bias is not finite"):
        write_folder(folder, family.config("transformer"), values, torch.float32)
    assert file.read_bytes() == before
    assert len(load_file(folder / "diffusion_pytorch_model.safetensors")) == len(values)
    assert FluxTransformer2DModel.from_pretrained(folder).x_embedder.bias.isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "it.safetensors"]
