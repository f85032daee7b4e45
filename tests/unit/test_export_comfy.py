"""Files in the names of the original release, whose modules stack several of diffusers'."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import ModuleChoice, adaptable_modules
from burnish.adapters.lora import LoraWeights
from burnish.errors import AdapterError, ExportError
from burnish.export.adapter_file import read_adapter, write_adapter
from burnish.export.formats import resolve_format
from burnish.export.verify import Verification, verify_adapter
from burnish.export_keys import ExportKeys, NativeModule
from burnish.families.registry import family_named

STACK = ("to_q", "to_k", "to_v")
NATIVE = {
    **dict.fromkeys(STACK, ("attn.qkv", STACK)),
    "out": ("attn.proj", ("out",)),
    "conv": ("patch", ("conv",)),
    "norm": ("adaLN.1", ("norm",)),
}


class Denoiser(nn.Module):
    """Two blocks whose query is wider than key and value; 12 + 4 + 4 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "to_q": nn.Linear(6, 12),
                    "to_k": nn.Linear(6, 4),
                    "to_v": nn.Linear(6, 4),
                    "out": nn.Linear(12, 6),
                    "conv": nn.Conv2d(3, 6, 2),
                    "norm": nn.Linear(6, 8),
                }
            )
            for _ in range(2)
        )


def native(name: str) -> NativeModule:
    _, number, inner = name.split(".")
    module, holds = NATIVE[inner]
    stem = f"layers.{number}"
    parts = tuple(f"blocks.{number}.{part}" for part in holds)
    return NativeModule(f"{stem}.{module}", parts, halves_swapped=inner == "norm")


KEYS = ExportKeys("comfy", ("comfy", "diffusers"), "lumina-2", "lumina2", native=native)
COMPLETE = replace(KEYS, complete=("blocks.*.to_[qkv]", "blocks.1.out"))
CHOICES = {
    "blocks.0.to_q": ModuleChoice(3, 6.0),
    "blocks.0.to_v": ModuleChoice(2, 1.0),
    "blocks.0.out": ModuleChoice(4, 4.0),
    "blocks.0.conv": ModuleChoice(3, 1.0),
    "blocks.0.norm": ModuleChoice(2, 3.0),
}
PREFIX = "diffusion_model.layers.0"
QKV = f"{PREFIX}.attn.qkv"


def attached() -> tuple[Denoiser, dict[str, LoraWeights]]:
    denoiser = Denoiser()
    adapter = AdapterSet.attach(denoiser, CHOICES, dropout=0.0, seed=0)
    for number, layer in enumerate(adapter.layers.values()):
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(number))
    return denoiser, adapter.weights()


def write(
    path: Path, weights: Mapping[str, LoraWeights], keys: ExportKeys = KEYS, part: str = "transformer"
) -> Path:
    return write_adapter(
        path,
        weights,
        part=part,
        keys=keys,
        modules=adaptable_modules(Denoiser()),
        format="comfy",
        dtype=torch.float32,
        metadata={},
    )


def verify(
    path: Path, denoiser: nn.Module, weights: Mapping[str, LoraWeights], keys: ExportKeys = KEYS
) -> Verification:
    return verify_adapter(path, weights, denoiser, part="transformer", keys=keys)


def read(path: Path, keys: ExportKeys = KEYS, part: str = "transformer") -> dict[str, LoraWeights]:
    return read_adapter(path, adaptable_modules(Denoiser()), part=part, keys=keys).weights


def assert_same_deltas(found: Mapping[str, LoraWeights], expected: Mapping[str, LoraWeights]) -> None:
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name].delta(), weights.delta(), rtol=1e-6, atol=1e-6)
        assert found[name].rank == weights.rank


def delta(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    return tensors[f"{key}.lora_B.weight"].flatten(1) @ tensors[f"{key}.lora_A.weight"].flatten(1)


def test_parts_are_stacked_by_rows_and_strength_is_folded(tmp_path: Path) -> None:
    _, weights = attached()
    tensors = safetensors.torch.load_file(write(tmp_path / "a.safetensors", weights))
    assert {key.rsplit(".lora_")[0] for key in tensors} == {
        QKV,
        f"{PREFIX}.attn.proj",
        f"{PREFIX}.patch",
        f"{PREFIX}.adaLN.1",
    }
    assert not [key for key in tensors if "alpha" in key]
    assert tensors[f"{QKV}.lora_A.weight"].shape == (3 + 2, 6)
    expected = torch.cat(
        [weights["blocks.0.to_q"].delta(), torch.zeros(4, 6), weights["blocks.0.to_v"].delta()]
    )
    torch.testing.assert_close(delta(tensors, QKV), expected)
    first, second = weights["blocks.0.norm"].delta().chunk(2)
    torch.testing.assert_close(delta(tensors, f"{PREFIX}.adaLN.1"), torch.cat([second, first]))
    assert tensors[f"{PREFIX}.patch.lora_B.weight"].shape == (6, 3, 1, 1)


def test_it_is_read_back_part_by_part(tmp_path: Path) -> None:
    denoiser, weights = attached()
    path = write(tmp_path / "a.safetensors", weights)
    assert_same_deltas(read(path), weights)
    found = verify(path, denoiser, weights)
    assert (found.format, found.modules, found.keys) == ("comfy", 5, 8)
    assert found.max_relative_difference < 1e-6


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_kohyas_spelling_with_alpha_is_read(tmp_path: Path, prefix: str) -> None:
    _, weights = attached()
    path = write(tmp_path / "a.safetensors", weights)
    tensors = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        module, matrix = re.fullmatch(r"diffusion_model\.(.+)\.(lora_[AB])\.weight", key).groups()  # type: ignore[union-attr]
        spelled = prefix + module.replace(".", "_")
        tensors[f"{spelled}.lora_{'down' if matrix == 'lora_A' else 'up'}.weight"] = tensor
        tensors[f"{spelled}.alpha"] = torch.tensor(2.0)
    safetensors.torch.save_file(tensors, path)
    for name, found in read(path).items():
        # Alpha 2 in place of the rank of the whole stack, whatever the rank of the part is.
        rank = 5 if name[-4:] in ("to_q", "to_v") else weights[name].rank
        torch.testing.assert_close(found.delta(), weights[name].delta() * 2 / rank)


def test_a_stack_trained_as_one_is_read_with_all_its_rank(tmp_path: Path) -> None:
    down, up = torch.randn(3, 6), torch.randn(20, 3)
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"{QKV}.lora_A.weight": down, f"{QKV}.lora_B.weight": up}, path)
    found = read(path)
    assert list(found) == [f"blocks.0.{part}" for part in STACK]
    stacked = torch.cat([weights.delta() for weights in found.values()])
    torch.testing.assert_close(stacked, up @ down)
    assert {weights.rank for weights in found.values()} == {3}


def test_what_a_reader_needs_is_written_without_effect(tmp_path: Path) -> None:
    denoiser, weights = attached()
    path = write(tmp_path / "a.safetensors", weights, COMPLETE)
    tensors = safetensors.torch.load_file(path)
    for module in ("attn.qkv", "attn.proj"):
        key = f"diffusion_model.layers.1.{module}"
        assert tensors[f"{key}.lora_A.weight"].shape[0] == 1
        assert not delta(tensors, key).any()
    assert_same_deltas(read(path, COMPLETE), weights)
    assert verify(path, denoiser, weights, COMPLETE).modules == 5
    with pytest.raises(ExportError, match="neither trained nor needed"):
        verify(path, denoiser, weights, KEYS)
    with pytest.raises(ExportError, match=r"needed by readers but not in the file: layers\.1"):
        verify(write(path, weights, KEYS), denoiser, weights, COMPLETE)
    zero = {name: replace(one, up=torch.zeros_like(one.up)) for name, one in weights.items()}
    with pytest.raises(AdapterError, match="before its first step"):
        read(write(path, {"blocks.0.to_q": zero["blocks.0.to_q"]}, COMPLETE), COMPLETE)


def test_names_tell_the_format_where_both_have_the_same_prefix(tmp_path: Path) -> None:
    denoiser, weights = attached()
    keys = replace(KEYS, prefix={"comfy": "transformer."})
    path = write(tmp_path / "a.safetensors", weights, keys)
    assert all(key.startswith("transformer.layers.0.") for key in safetensors.torch.load_file(path))
    assert verify(path, denoiser, weights, keys).format == "comfy"
    assert_same_deltas(read(path, keys), weights)


def test_a_second_denoiser_has_the_same_prefix(tmp_path: Path) -> None:
    denoiser, weights = attached()
    for format, prefix in (("comfy", "diffusion_model.layers."), ("diffusers", "transformer.blocks.")):
        path = write_adapter(
            tmp_path / "a.safetensors",
            weights,
            part="transformer_2",
            keys=KEYS,
            modules=adaptable_modules(denoiser),
            format=format,
            dtype=torch.float32,
            metadata={},
        )
        assert all(key.startswith(prefix) for key in safetensors.torch.load_file(path))
        assert verify_adapter(path, weights, denoiser, part="transformer_2", keys=KEYS).format == format
        assert_same_deltas(read(path, part="transformer_2"), weights)


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for key in list(tensors):
        tensors[key.replace(old, new)] = tensors.pop(key)


def without(tensors: dict[str, Tensor], module: str) -> None:
    del tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]


UP, DOWN = f"{QKV}.lora_B.weight", f"{QKV}.lora_A.weight"


@pytest.mark.parametrize(
    ("break_file", "expected"),
    [
        (lambda t: renamed(t, "diffusion_model.", "model.diffusion_model."), "no reader knows"),
        (lambda t: renamed(t, "diffusion_model.", "transformer."), "belong to no module"),
        (lambda t: renamed(t, "layers.0", "layers.5"), "belong to no module"),
        (lambda t: renamed(t, "layers.0.attn", "layers.1.attn"), "neither trained nor needed"),
        (lambda t: without(t, QKV), "2 trained but not in the file"),
        (lambda t: without(t, f"{PREFIX}.attn.proj"), "1 trained but not in the file"),
        (lambda t: t.pop(UP), "both matrices"),
        (lambda t: t.update({UP: t[UP].T.contiguous()}), "expected"),
        (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), "expected"),
        (lambda t: t.update({UP: t[UP] * 1.05}), "2 with another effect"),
        (lambda t: t[UP][:12].mul_(1.05), "1 with another effect"),
        (lambda t: t[UP][:12].zero_(), "1 with another effect"),
        (lambda t: t[UP][13, 0].fill_(1e-6), "blocks.0.to_k"),
        (lambda t: t[UP][0, 4].fill_(1e-6), "blocks.0.to_q"),
        (lambda t: t.update({UP: t[UP].roll(4, 0)}), "affected by"),
        (lambda t: t.update({UP: t[UP][:16].contiguous()}), "expected"),
        (lambda t: t.update({UP: t[UP][:, :3].contiguous(), DOWN: t[DOWN][:3].contiguous()}), "expected"),
        (lambda t: t.update({f"{QKV}.alpha": torch.tensor(5.0)}), "alpha key"),
        (
            lambda t: t.update(
                {f"{PREFIX}.adaLN.1.lora_B.weight": t[f"{PREFIX}.adaLN.1.lora_B.weight"].roll(4, 0)}
            ),
            "blocks.0.norm",
        ),
    ],
)
def test_what_readers_would_get_wrong_is_found(
    tmp_path: Path, break_file: Callable[[dict[str, Tensor]], None], expected: str
) -> None:
    denoiser, weights = attached()
    path = write(tmp_path / "a.safetensors", weights)
    tensors = safetensors.torch.load_file(path)
    break_file(tensors)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ExportError) as caught:
        verify(path, denoiser, weights)
    assert expected in str(caught.value)


@pytest.mark.parametrize("row", [0, 19])
def test_what_is_only_filled_in_must_be_zero(tmp_path: Path, row: int) -> None:
    denoiser, weights = attached()
    path = write(tmp_path / "a.safetensors", weights, COMPLETE)
    tensors = safetensors.torch.load_file(path)
    tensors["diffusion_model.layers.1.attn.qkv.lora_B.weight"][row] = 1e-6
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ExportError, match=r"affected by.*blocks\.1\.to_[qv]"):
        verify(path, denoiser, weights, COMPLETE)


def test_two_adapters_of_one_module_are_refused(tmp_path: Path) -> None:
    _, weights = attached()
    path = write(tmp_path / "a.safetensors", weights)
    plain = {
        "transformer.blocks.0.to_q.lora_A.weight": torch.ones(1, 6),
        "transformer.blocks.0.to_q.lora_B.weight": torch.ones(12, 1),
    }
    safetensors.torch.save_file({**safetensors.torch.load_file(path), **plain}, path)
    with pytest.raises(AdapterError, match=r"two adapters of blocks\.0\.to_q"):
        read(path)


def test_a_stack_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{QKV}.lora_A.weight": torch.ones(1, 6), f"{QKV}.lora_B.weight": torch.ones(30, 1)}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(AdapterError, match="30 rows; this model's has 20"):
        read(path)


@pytest.mark.parametrize(
    ("family", "format", "module"),
    [
        ("chroma", "diffusers", "distilled_guidance_layer.layers.0.linear_1"),
        ("wan_vace", "comfy", "vace_blocks.0.attn1.to_q"),
    ],
)
def test_a_module_that_some_reader_would_lose_is_refused(family: str, format: str, module: str) -> None:
    keys = family_named(family).export
    assert resolve_format(format, keys, ["transformer_blocks.0.attn.to_q"]) == format
    with pytest.raises(AdapterError, match=module):
        resolve_format(format, keys, [module])
