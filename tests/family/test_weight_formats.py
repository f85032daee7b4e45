"""Every family with its large layers in fewer bits: it loads, predicts and reads captions nearly as before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import cases
from torch import Tensor, nn

from burnish.conditioning import Conditioning
from burnish.errors import ModelError
from burnish.families.registry import family_named
from burnish.family import Family, ModelSource
from burnish.memory import shrinking
from burnish.memory.formats import Int8
from burnish.memory.quantized import QuantizedLinear
from burnish.memory.shrinking import Shrink
from burnish.placement import Part

TinyFolder = Callable[[str], Path]
FAMILY_OF = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    **{name: case.family for name, case in cases().items() if not name.endswith("_still")},
}
SIDE = 128
INT8 = Shrink("int8", smallest=0)


def load(folder: Path, name: str, shrink: Shrink | None, *parts: Part) -> Family:
    return family_named(FAMILY_OF[name]).load(
        ModelSource(str(folder)),
        frozenset(parts),
        dtype=torch.float32,
        device="cpu",
        shrink=None if shrink is None else {"denoiser": shrink, "text_encoders": shrink},
    )


def kept_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


def predicted(family: Family) -> Tensor:
    with torch.no_grad():
        return family.predict(*family.example(SIDE, SIDE, batch=2))


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_family_in_int8_predicts_nearly_the_same(tiny_folder: TinyFolder, name: str) -> None:
    folder = tiny_folder(name)
    plain = load(folder, name, None, "denoiser")
    small = load(folder, name, INT8, "denoiser")
    inside = {layer for block in small.blocks() for layer in block.modules()}
    kept = [layer for part in small.denoisers.values() for layer in kept_layers(part).values()]
    assert kept
    assert inside >= set(kept)
    assert all(layer.codes.dtype == torch.int8 and not layer.codes.is_meta for layer in kept)
    left = [one for one in inside if type(one) is nn.Linear]
    assert all(one.in_features % 8 or one.out_features % 8 for one in left)
    found = error(predicted(small), predicted(plain))
    assert 0 < found < 0.05
    assert small.identity("denoiser") == plain.identity("denoiser")
    assert small.identity("text_encoders") != plain.identity("text_encoders")


@pytest.mark.parametrize("name", FAMILY_OF)
def test_text_encoders_in_int8_read_captions_nearly_the_same(tiny_folder: TinyFolder, name: str) -> None:
    folder = tiny_folder(name)
    found: list[Conditioning] = []
    for shrink in (None, INT8):
        family = load(folder, name, shrink, "text_encoders")
        references = [torch.zeros(3, SIDE, SIDE)] if family.capabilities.references else []
        seen = [references] if family.capabilities.prompts_see_references else ()
        found.append(family.encode_prompts(["a photo of a sks dog"], seen))
    plain, small = found
    floating = [key for key, value in plain.items() if value.is_floating_point() and value.any()]
    assert any(not torch.equal(plain[key], small[key]) for key in floating)
    for key in floating:
        assert error(small[key], plain[key]) < 0.1, key


def test_layers_are_kept_on_disk_and_a_torn_one_is_made_anew(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shrink = tiny_folder("flux"), Shrink("int8", tmp_path, smallest=0)
    expected = predicted(load(folder, "flux", INT8, "denoiser"))
    first = load(folder, "flux", shrink, "denoiser")
    layers = kept_layers(first.denoisers["transformer"])
    (kept,) = (tmp_path / "weights").iterdir()
    assert {path.name for path in kept.iterdir()} == {f"{name}.safetensors" for name in layers}
    torn, *_, lost = sorted(kept.iterdir())
    torn.write_bytes(torn.read_bytes()[:-9])
    lost.unlink()

    packed: list[tuple[int, ...]] = []
    pack = Int8.pack

    def counted(self: Int8, weight: Tensor) -> tuple[Tensor, Tensor]:
        packed.append(tuple(weight.shape))
        return pack(self, weight)

    monkeypatch.setattr(Int8, "pack", counted)
    assert torch.equal(predicted(load(folder, "flux", shrink, "denoiser")), expected)
    assert len(packed) == 2  # the torn one and the lost one
    assert torch.equal(predicted(load(folder, "flux", shrink, "denoiser")), expected)
    assert len(packed) == 2


def test_what_is_kept_belongs_to_its_weights_and_its_format(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Two models of the same shapes share no layers, nor do two formats."""
    other = tmp_path / "model"
    shutil.copytree(tiny_folder("flux"), other)
    (file,) = (other / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["transformer_blocks.0.attn.to_q.weight"] *= -1
    save_file(tensors, file)
    predictions = [
        predicted(load(folder, "flux", Shrink(kept_as, tmp_path, smallest=0), "denoiser"))
        for folder in (tiny_folder("flux"), other)
        for kept_as in ("int8", "fp8", "nf4")
        for _ in range(2)
    ]
    assert len(list((tmp_path / "weights").iterdir())) == 6
    for first, again in zip(predictions[::2], predictions[1::2], strict=True):
        assert torch.equal(first, again)
    assert len({float(one.sum()) for one in predictions}) == 6


def test_a_full_disk_only_costs_the_next_load_its_time(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shrink = Shrink("int8", tmp_path, smallest=0)
    monkeypatch.setattr(shrinking, "free_bytes", lambda folder: 1000)
    family = load(tiny_folder("flux"), "flux", shrink, "denoiser")
    assert "made anew each time" in caplog.text
    assert not list(tmp_path.rglob("*.safetensors"))
    assert kept_layers(family.denoisers["transformer"])


def test_a_weight_that_is_missing_is_said(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_folder("flux"), copy)
    (file,) = (copy / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["transformer_blocks.0.attn.to_q.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"lacks 1 of .*attn\.to_q"):
        load(copy, "flux", Shrink("int8", smallest=0), "denoiser")
