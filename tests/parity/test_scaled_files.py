"""ComfyUI's fp8_scaled files: read as what they stand for, and kept as they are where the format is the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from native_flux import native_transformer
from safetensors.torch import save_file
from test_flux_single_file import inputs, transformer
from torch import Tensor

from burnish.families.flux import Flux
from burnish.families.registry import detect_family
from burnish.families.scales import scales_in, spread
from burnish.families.sources import read_header
from burnish.families.tensor_info import TensorInfo
from burnish.family import ModelSource
from burnish.memory.quantized import QuantizedLinear
from burnish.memory.shrinking import Shrink

Weights = Mapping[str, Tensor]
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def native() -> dict[str, Tensor]:
    return dict(native_transformer(transformer(guidance=True)))


def scaled(native: Weights, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors with the large weights in e4m3, and the plain tensors that they stand for."""
    file: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in native.items():
        module, _, word = name.rpartition(".")
        if word != "weight" or tensor.dim() != 2 or "blocks" not in name or min(tensor.shape) % 16:
            file[name] = plain[name] = tensor.contiguous()
            continue
        by_row = kind == "rows"
        largest = tensor.abs().amax(1, keepdim=True) if by_row else tensor.abs().amax()
        codes = (tensor / (largest / 448)).to(FP8)
        file[name] = codes.contiguous()
        file[f"{module}.{'weight_scale' if kind == 'new' else 'scale_weight'}"] = largest / 448
        file[f"{module}.{'input_scale' if kind == 'new' else 'scale_input'}"] = torch.ones(())
        if kind == "new":
            file[f"{module}.comfy_quant"] = torch.tensor(
                list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
            )
        plain[name] = codes.float() * (largest / 448)
    if kind != "new":
        file["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    assert len(file) > len(plain)
    return file, plain


def predicted(path: Path, shrink: Shrink | None = None) -> tuple[Tensor, Flux]:
    source = ModelSource(str(path))
    assert detect_family(source) is Flux
    family = Flux.load(
        source,
        frozenset(["denoiser"]),
        dtype=torch.float32,
        device="cpu",
        shrink=None if shrink is None else {"denoiser": shrink},
    )
    with torch.no_grad():
        return family.predict(*inputs()), family


@pytest.mark.parametrize("kind", ["old", "new", "rows"])
def test_a_scaled_file_is_what_it_stands_for(native: dict[str, Tensor], tmp_path: Path, kind: str) -> None:
    file, plain = scaled(native, kind)
    save_file(file, tmp_path / "scaled.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    found, _ = predicted(tmp_path / "scaled.safetensors")
    expected, _ = predicted(tmp_path / "plain.safetensors")
    assert torch.equal(found, expected)

    # Kept in the same format nothing is rounded again: the layers hold the file's own codes.
    _, kept = predicted(tmp_path / "scaled.safetensors", Shrink("fp8", smallest=0))
    block = kept.denoisers["transformer"].get_submodule("transformer_blocks.0")
    layer = block.get_submodule("ff.net.2")
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(layer.codes.float(), file["double_blocks.0.img_mlp.2.weight"].float())
    assert torch.equal(layer.weight, plain["double_blocks.0.img_mlp.2.weight"])
    first, second, third = (block.get_submodule(f"attn.to_{one}") for one in "qkv")
    stacked = torch.cat([first.weight, second.weight, third.weight])
    assert torch.equal(stacked, plain["double_blocks.0.img_attn.qkv.weight"])

    _, kept = predicted(tmp_path / "scaled.safetensors", Shrink("int8", smallest=0))
    layer = kept.denoisers["transformer"].get_submodule("transformer_blocks.0.ff.net.2")
    assert isinstance(layer, QuantizedLinear)
    right = plain["double_blocks.0.img_mlp.2.weight"]
    assert float((layer.weight - right).norm() / right.norm()) < 0.01


def test_a_plain_fp8_file_is_kept_as_it_is(native: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(
        {
            name: tensor.to(FP8 if "blocks" in name and tensor.dim() == 2 else torch.bfloat16).contiguous()
            for name, tensor in native.items()
        },
        tmp_path / "fp8.safetensors",
    )
    expected, _ = predicted(tmp_path / "fp8.safetensors")
    _, family = predicted(tmp_path / "fp8.safetensors", Shrink("fp8", smallest=0))
    layer = family.denoisers["transformer"].get_submodule("transformer_blocks.0.ff.net.2")
    assert torch.equal(layer.weight, native["double_blocks.0.img_mlp.2.weight"].to(FP8).float())
    assert expected.isfinite().all()


def test_scales_that_are_not_understood_stay_in_sight() -> None:
    weight = TensorInfo("F8_E4M3", (32, 64))
    for scale in (TensorInfo("F8_E8M0", (32, 2)), TensorInfo("F32", (5,)), TensorInfo("F32", (32, 7))):
        assert scales_in({"a.weight": weight, "a.weight_scale": scale}) == {
            "a.weight": None,
            "a.weight_scale": None,
        }
    packed = {"a.weight": TensorInfo("U8", (32, 32)), "a.weight_scale": TensorInfo("F32", ())}
    assert scales_in(packed)["a.weight"] is None
    assert "a.weight_scale" in scales_in(packed)
    blocks = {
        "a.weight": weight,
        "a.weight_scale": TensorInfo("F32", (2, 4)),
        "a.comfy_quant": packed["a.weight"],
    }
    assert scales_in(blocks) == {"a.weight": "a.weight_scale"}


def test_a_scale_is_spread_over_rows_and_blocks() -> None:
    scale = torch.arange(1.0, 9.0).reshape(2, 4)
    found = spread(scale, (32, 64))
    assert found.shape == (32, 64)
    assert torch.equal(found[::16, ::16], scale)
    assert torch.equal(found, torch.kron(scale, torch.ones(16, 16)))
    rows = torch.arange(1.0, 5.0)
    assert torch.equal(spread(rows, (4, 3)), rows[:, None].expand(4, 3))
    assert torch.equal(spread(rows[:, None], (8, 3)), rows.repeat_interleave(2)[:, None].expand(8, 3))
    assert torch.equal(spread(torch.tensor(2.0), (2, 2)), torch.full((2, 2), 2.0))


def test_the_header_of_a_scaled_file_tells_only_of_weights(native: dict[str, Tensor], tmp_path: Path) -> None:
    file, plain = scaled(native, "old")
    save_file(file, tmp_path / "scaled.safetensors")
    scales = scales_in(read_header(tmp_path / "scaled.safetensors"))
    assert scales.keys() == plain.keys()
    beside = [name for name in file if name.endswith("scale_weight")]
    assert sorted(scale for scale in scales.values() if scale is not None) == sorted(beside)
