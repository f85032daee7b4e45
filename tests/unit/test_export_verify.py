"""The check after each save finds what readers would silently get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import ModuleChoice, adaptable_modules
from burnish.adapters.lora import LoraWeights
from burnish.errors import ExportError
from burnish.export.adapter_file import write_adapter
from burnish.export.verify import Verification, verify_adapter
from burnish.export_keys import ExportKeys

KEYS = ExportKeys("kohya", ("kohya", "diffusers"), "stable-diffusion-v1", "sd_v1")
CHOICES = {
    "block.to_q": ModuleChoice(4, 8.0),
    "block.to_k": ModuleChoice(4, 8.0),
    "block.conv": ModuleChoice(3, 1.0),
}


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {"to_q": nn.Linear(12, 12), "to_k": nn.Linear(12, 12), "conv": nn.Conv2d(3, 6, (3, 5))}
        )


def attached(spread: float = 1.0) -> tuple[Denoiser, dict[str, LoraWeights]]:
    denoiser = Denoiser()
    adapter = AdapterSet.attach(denoiser, CHOICES, dropout=0.0, seed=0)
    for number, layer in enumerate(adapter.layers.values()):
        layer.lora_B.data.normal_(0, spread, generator=torch.Generator().manual_seed(number))
    return denoiser, adapter.weights()


def write(path: Path, weights: dict[str, LoraWeights], format: str, dtype: torch.dtype) -> Path:
    return write_adapter(
        path,
        weights,
        part="unet",
        keys=KEYS,
        modules=adaptable_modules(Denoiser()),
        format=format,
        dtype=dtype,
        metadata={},
    )


def verify(path: Path, denoiser: nn.Module, weights: dict[str, LoraWeights]) -> Verification:
    return verify_adapter(path, weights, denoiser, part="unet", keys=KEYS)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [
        (torch.float32, 0, 1e-6),
        (torch.float16, 1e-5, 1e-3),
        (torch.bfloat16, 1e-4, 1e-2),
    ],
)
@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_a_good_file_passes_with_the_rounding_of_its_type(
    tmp_path: Path, format: str, dtype: torch.dtype, least: float, most: float, spread: float
) -> None:
    denoiser, weights = attached(spread)
    found = verify(write(tmp_path / "a.safetensors", weights, format, dtype), denoiser, weights)
    assert (found.modules, found.keys, found.format) == (3, 9 if format == "kohya" else 6, format)
    if spread == 1.0:  # below, float16 has no bits left
        assert least <= found.max_relative_difference <= most
    assert json.dumps(found.facts())


def test_an_adapter_before_its_first_step_passes(tmp_path: Path) -> None:
    denoiser, weights = attached(0.0)
    found = verify(write(tmp_path / "a.safetensors", weights, "kohya", torch.bfloat16), denoiser, weights)
    assert found.max_relative_difference == 0


def test_the_difference_is_that_of_the_whole_deltas(tmp_path: Path) -> None:
    denoiser, weights = attached()
    path = write(tmp_path / "a.safetensors", weights, "kohya", torch.bfloat16)
    expected = 0.0
    tensors = safetensors.torch.load_file(path)
    for name, one in weights.items():
        key = "lora_unet_" + name.replace(".", "_")
        down, up = tensors[f"{key}.lora_down.weight"].float(), tensors[f"{key}.lora_up.weight"].float()
        delta = (up.flatten(1) @ down.flatten(1)).reshape_as(one.delta()) * tensors[f"{key}.alpha"] / one.rank
        expected = max(expected, float((delta - one.delta()).norm() / one.delta().norm()))
    assert verify(path, denoiser, weights).max_relative_difference == pytest.approx(expected, rel=1e-3)


Q, K, CONV = (f"lora_unet_block_{name}" for name in ("to_q", "to_k", "conv"))


def all_alphas(tensors: dict[str, Tensor], value: float) -> None:
    for name in (Q, K, CONV):
        tensors[f"{name}.alpha"].fill_(value)


def drop(tensors: dict[str, Tensor], *keys: str) -> None:
    for key in keys:
        del tensors[key]


def swap(tensors: dict[str, Tensor], first: str, second: str) -> None:
    tensors[first], tensors[second] = tensors[second], tensors[first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("break_file", "expected"),
    [
        (lambda t: all_alphas(t, 4.0), "3 with another effect"),
        (lambda t: all_alphas(t, 8.3), "3 with another effect"),
        (lambda t: drop(t, *(f"{name}.alpha" for name in (Q, K, CONV))), "3 with another effect"),
        (lambda t: t[f"{Q}.alpha"].fill_(4.0), "more than one alpha"),
        (lambda t: drop(t, f"{Q}.alpha"), "alpha is missing"),
        (lambda t: drop(t, f"{Q}.lora_up.weight"), "both matrices"),
        (
            lambda t: drop(t, *(f"{Q}.{end}" for end in ("alpha", "lora_up.weight", "lora_down.weight"))),
            "not in",
        ),
        (lambda t: t.update({"lora_unet_x.alpha": torch.ones(())}), "lora_unet_x.alpha"),
        (lambda t: t.update({f"{Q}.lora_mid.weight": torch.ones(4, 4)}), "lora_mid"),
        (lambda t: t.update({"unet.block.to_q.lora_A.weight": torch.ones(4, 12)}), "two spellings"),
        (lambda t: t.update({"other.block.lora_A.weight": torch.ones(4, 12)}), "no reader"),
        (lambda t: swap(t, f"{Q}.lora_up.weight", f"{K}.lora_up.weight"), "2 with another effect"),
        (lambda t: t.update({f"{Q}.lora_up.weight": t[f"{Q}.lora_up.weight"][:6].clone()}), "(6, 4)"),
        (lambda t: t.update({f"{CONV}.lora_up.weight": t[f"{CONV}.lora_up.weight"].flatten(1)}), "conv"),
        (lambda t: t.update({f"{CONV}.lora_down.weight": t[f"{CONV}.lora_down.weight"].flip(2)}), "conv"),
        (lambda t: t[f"{Q}.lora_up.weight"][0].fill_(float("nan")), "finite"),
    ],
)
def test_what_readers_would_get_wrong_is_found(
    tmp_path: Path, dtype: torch.dtype, break_file: Callable[[dict[str, Tensor]], None], expected: str
) -> None:
    denoiser, weights = attached()
    path = write(tmp_path / "a.safetensors", weights, "kohya", dtype)
    tensors = safetensors.torch.load_file(path)
    break_file(tensors)
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(ExportError) as caught:
        verify(path, denoiser, weights)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "metadata", "expected"),
    [
        ({"unet.block.to_q.alpha": torch.tensor(4.0)}, {}, "alpha key"),
        ({}, {"lora_adapter_metadata": '{"unet.lora_alpha": 8}'}, "lora_adapter_metadata"),
    ],
)
def test_alpha_beside_diffusers_names_is_found(
    tmp_path: Path, extra: dict[str, Tensor], metadata: dict[str, str], expected: str
) -> None:
    denoiser, weights = attached()
    path = write(tmp_path / "a.safetensors", weights, "diffusers", torch.float32)
    safetensors.torch.save_file({**safetensors.torch.load_file(path), **extra}, path, metadata)
    with pytest.raises(ExportError, match=expected):
        verify(path, denoiser, weights)


def test_another_model_and_a_format_of_another_family_are_found(tmp_path: Path) -> None:
    denoiser, weights = attached()
    path = write(tmp_path / "a.safetensors", weights, "kohya", torch.float32)
    other = nn.ModuleDict({"block": nn.ModuleDict({"to_q": nn.Linear(12, 12)})})
    with pytest.raises(ExportError, match="belong to no module"):
        verify(path, other, weights)
    flux = ExportKeys("diffusers", ("diffusers",), "flux-1-dev", "flux1")
    with pytest.raises(ExportError, match="kohya format"):
        verify_adapter(path, weights, denoiser, part="unet", keys=flux)


def test_a_file_cut_short_is_found(tmp_path: Path) -> None:
    denoiser, weights = attached()
    path = write(tmp_path / "a.safetensors", weights, "kohya", torch.float32)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError, match="does not read back"):
        verify(path, denoiser, weights)
