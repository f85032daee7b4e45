"""GGUF files are what they stand for: block formats by their formulas, names of ComfyUI-GGUF and llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from native_flux import native_transformer
from safetensors.torch import save_file
from test_flux_single_file import Models, clip_file, inputs, models, t5_file, transformer, written
from torch import Tensor

from burnish.errors import MissingPackage, ModelError
from burnish.families.flux import Flux
from burnish.families.gguf_files import open_gguf
from burnish.families.registry import detect_family
from burnish.families.sources import read_header
from burnish.family import ModelSource
from burnish.memory.quantized import QuantizedLinear
from burnish.memory.shrinking import Shrink
from burnish.placement import Part

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType
__all__ = ["models"]  # a fixture


def gguf_written(path: Path, architecture: str, weights: Mapping[str, Tensor], kind: str = "F32") -> Path:
    """A file with large matrices in `kind`, all else in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in weights.items():
        numbers = tensor.float().numpy()
        block, _ = gguf.GGML_QUANT_SIZES[Kind[kind]]
        if tensor.dim() == 2 and not tensor.shape[1] % block:
            packed = gguf.quants.quantize(numbers, Kind[kind])
            writer.add_tensor(name, packed, raw_dtype=Kind[kind])
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def predicted(path: Path, shrink: Shrink | None = None) -> tuple[Tensor, Flux]:
    source = ModelSource(str(path))
    assert detect_family(source) is Flux
    chosen: dict[Part, Shrink] = {} if shrink is None else {"denoiser": shrink}
    family = Flux.load(source, frozenset(["denoiser"]), dtype=torch.float32, device="cpu", shrink=chosen)
    with torch.no_grad():
        return family.predict(*inputs()), family


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.fixture(scope="module")
def native() -> dict[str, Tensor]:
    return {
        name: tensor.contiguous() for name, tensor in native_transformer(transformer(guidance=True)).items()
    }


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_a_denoiser_is_that_of_the_weights_it_stands_for(
    native: dict[str, Tensor], tmp_path: Path, kind: str
) -> None:
    path = gguf_written(tmp_path / "flux.gguf", "flux", native, kind)
    plain = {name: open_gguf(path).get_tensor(name) for name in native}
    worst = {"F32": 0.0, "F16": 1e-3, "BF16": 3e-3, "Q8_0": 0.01, "Q5_1": 0.05, "Q4_0": 0.1}[kind]
    assert all(error(plain[name], tensor) <= worst for name, tensor in native.items())
    save_file(plain, tmp_path / "flux.safetensors")
    assert torch.equal(predicted(path)[0], predicted(tmp_path / "flux.safetensors")[0])


def test_its_layers_are_kept_in_a_format_of_ours(native: dict[str, Tensor], tmp_path: Path) -> None:
    path = gguf_written(tmp_path / "flux.gguf", "flux", native, "Q8_0")
    expected, _ = predicted(path)
    found, family = predicted(path, Shrink("int8", tmp_path, smallest=0))
    assert any(isinstance(one, QuantizedLinear) for one in family.denoisers["transformer"].modules())
    assert 0 < error(found, expected) < 0.05
    assert torch.equal(predicted(path, Shrink("int8", tmp_path, smallest=0))[0], found)  # from the disk


def test_q8_0_and_q4_k_by_their_formulas(tmp_path: Path) -> None:
    """As ggml's `ggml-common.h` and `dequantize_row_q8_0`, `dequantize_row_q4_K` have them."""
    draw = np.random.default_rng(3)
    scales = draw.normal(size=(4, 8)).astype(np.float16)
    codes = draw.integers(-127, 128, (4, 8, 32)).astype(np.int8)
    q8_0 = np.concatenate([scales[..., None].view(np.uint8), codes.view(np.uint8)], axis=-1).reshape(4, -1)
    q4_k = draw.integers(0, 256, (4, 144)).astype(np.uint8)
    q4_k[:, :4] = draw.normal(size=(4, 2)).astype(np.float16).view(np.uint8)

    writer = gguf.GGUFWriter(tmp_path / "two.gguf", "flux")
    writer.add_tensor("a.weight", q8_0, raw_dtype=Kind.Q8_0)
    writer.add_tensor("b.weight", q4_k, raw_dtype=Kind.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_gguf(tmp_path / "two.gguf")
    assert read_header(tmp_path / "two.gguf") == file.header
    assert {name: tuple(info) for name, info in file.header.items()} == {
        "a.weight": ("Q8_0", (4, 256)),
        "b.weight": ("Q4_K", (4, 256)),
    }
    right = (codes * scales[..., None].astype(np.float32)).reshape(4, 256)
    assert torch.equal(file.get_tensor("a.weight"), torch.from_numpy(right))
    rows = np.stack([_q4_k(row) for row in q4_k])
    assert torch.allclose(file.get_tensor("b.weight"), torch.from_numpy(rows), rtol=1e-5, atol=1e-5)


def _q4_k(block: np.ndarray) -> np.ndarray:
    """256 numbers: eight times 32 in 4 bits, each with a scale and a minimum of 6 bits."""
    whole, least = (float(one) for one in block[:4].view(np.float16))
    told = [int(one) for one in block[4:16]]
    numbers: list[float] = []
    for part in range(8):
        if part < 4:
            scale, minimum = told[part] & 63, told[part + 4] & 63
        else:
            scale = (told[part + 4] & 15) | (told[part - 4] >> 6) << 4
            minimum = (told[part + 4] >> 4) | (told[part] >> 6) << 4
        pair = block[16 + 32 * (part // 2) : 48 + 32 * (part // 2)]
        numbers += [whole * scale * int(one >> 4 if part % 2 else one & 15) - least * minimum for one in pair]
    return np.array(numbers, dtype=np.float32)


def test_shapes_that_the_format_has_no_room_for(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "conv.gguf", "sdxl")
    weight = np.arange(2 * 3 * 4 * 5, dtype=np.float32)
    writer.add_tensor("a.weight", weight.reshape(6, 20))
    writer.add_array("comfy.gguf.orig_shape.a.weight", [2, 3, 4, 5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "conv.gguf")
    assert file.header["a.weight"].shape == (2, 3, 4, 5)
    assert torch.equal(file.get_tensor("a.weight"), torch.from_numpy(weight).reshape(2, 3, 4, 5))


def test_a_t5_in_the_names_of_llama_cpp(models: Models, native: dict[str, Tensor], tmp_path: Path) -> None:
    names = {
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        "layer.0.SelfAttention": "attn_",
        "layer.0.layer_norm": "attn_norm",
        "layer.1.layer_norm": "ffn_norm",
        "layer.1.DenseReluDense.wi_0": "ffn_gate",
        "layer.1.DenseReluDense.wi_1": "ffn_up",
        "layer.1.DenseReluDense.wo": "ffn_down",
        "encoder.block.": "enc.blk.",
        "encoder.final_layer_norm": "enc.output_norm",
        "shared.": "token_embd.",
        "attn_.": "attn_",
    }
    spelled: dict[str, Tensor] = {}
    for name, tensor in t5_file(models.t5).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        spelled[name] = tensor
    assert not [name for name in spelled if "encoder" in name]
    denoiser = str(written(tmp_path / "flux.safetensors", native))
    clip = written(tmp_path / "clip_l.safetensors", clip_file(models.clip))
    plain = written(tmp_path / "t5xxl.safetensors", t5_file(models.t5))
    packed = gguf_written(tmp_path / "t5xxl.gguf", "t5encoder", spelled, "F32")
    found = []
    for t5 in (plain, packed):
        source = ModelSource(denoiser, text_encoders=(clip, t5))
        family = Flux.load(source, frozenset(["text_encoders"]), dtype=torch.float32, device="cpu")
        found.append(family.encode_prompts(["a red chair"]))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_is_not_read_is_said(
    tmp_path: Path, native: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = gguf_written(tmp_path / "llama.gguf", "llama", {"token_embd.weight": torch.zeros(4, 4)})
    with pytest.raises(ModelError, match="kind 'llama', which is not read"):
        read_header(llama)
    path = gguf_written(tmp_path / "flux.gguf", "flux", {"img_in.weight": native["img_in.weight"]})
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="damaged"):
        read_header(torn)
    torn.write_bytes(b"not a GGUF file at all, though it is called so")
    with pytest.raises(ModelError, match="damaged, or no GGUF file"):
        read_header(torn)
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(MissingPackage, match="not installed"):
        read_header(tmp_path / "other.gguf")
