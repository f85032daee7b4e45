"""Adapter files: spellings that are written and read, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import ModuleChoice, adaptable_modules
from burnish.adapters.lora import LoraWeights
from burnish.errors import AdapterError, DiskFull, NonFiniteLoss
from burnish.export.adapter_file import read_adapter, write_adapter
from burnish.export.formats import resolve_format
from burnish.export_keys import ExportKeys

KEYS = ExportKeys(
    "kohya",
    ("kohya", "diffusers"),
    "stable-diffusion-v1",
    "sd_v1",
    unreadable={"kohya": ("add_embedding.*",)},
)
DIFFUSERS_ONLY = ExportKeys("diffusers", ("diffusers",), "flux-1-dev", "flux1")
CHOICES = {
    "down_blocks.0.attn1.to_q": ModuleChoice(4, 8.0),
    "down_blocks.0.to_out.0": ModuleChoice(2, 3.0),
    "down_blocks.0.conv_in": ModuleChoice(3, 1.0),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(6, 6)})
        self.to_out = nn.ModuleList([nn.Linear(6, 8)])
        self.conv_in = nn.Conv2d(4, 6, 3)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block()])


def trained() -> dict[str, LoraWeights]:
    adapter = AdapterSet.attach(Denoiser(), CHOICES, dropout=0.0, seed=0)
    for number, layer in enumerate(adapter.layers.values()):
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(number))
    return adapter.weights()


def write(path: Path, weights: Mapping[str, LoraWeights] | None = None, **options: object) -> Path:
    modules = adaptable_modules(Denoiser())
    settings = {"part": "unet", "keys": KEYS, "modules": modules, "dtype": torch.float32, **options}
    settings.setdefault("metadata", {})
    return write_adapter(path, trained() if weights is None else weights, **settings)  # type: ignore[arg-type]


def read(path: Path) -> dict[str, LoraWeights]:
    return read_adapter(path, adaptable_modules(Denoiser()), part="unet", keys=KEYS).weights


def rewritten(path: Path, rename: Callable[[str], str], metadata: dict[str, str] | None = None) -> Path:
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({rename(key): tensor for key, tensor in tensors.items()}, path, metadata)
    return path


def assert_same_deltas(found: Mapping[str, LoraWeights], expected: Mapping[str, LoraWeights]) -> None:
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name].delta(), weights.delta(), rtol=1e-6, atol=1e-6)


def test_kohya_names_and_alpha(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(write(tmp_path / "a.safetensors", dtype=torch.bfloat16))
    prefix = "lora_unet_down_blocks_0_conv_in"
    assert len(tensors) == 9
    assert tensors[f"{prefix}.lora_down.weight"].shape == (3, 4, 3, 3)
    assert tensors[f"{prefix}.lora_up.weight"].shape == (6, 3, 1, 1)
    assert tensors[f"{prefix}.lora_up.weight"].dtype == torch.bfloat16
    alpha = tensors["lora_unet_down_blocks_0_to_out_0.alpha"]
    assert (alpha.shape, alpha.is_floating_point()) == ((), True)


def test_one_alpha_for_all_kohya_modules(tmp_path: Path) -> None:
    """diffusers would lose those that differ; the commonest stays as it is, B takes up the others."""
    weights = trained()
    weights["down_blocks.0.to_out.0"] = replace(weights["down_blocks.0.to_out.0"], alpha=8.0)
    tensors = safetensors.torch.load_file(write(tmp_path / "a.safetensors", weights))
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith("alpha")} == {8.0}
    prefix = "lora_unet_down_blocks_0"
    assert torch.equal(tensors[f"{prefix}_to_out_0.lora_up.weight"], weights["down_blocks.0.to_out.0"].up)
    torch.testing.assert_close(
        tensors[f"{prefix}_conv_in.lora_up.weight"], weights["down_blocks.0.conv_in"].up / 8
    )


def test_diffusers_names_and_folded_alpha(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(write(tmp_path / "a.safetensors", format="diffusers"))
    weights = trained()["down_blocks.0.attn1.to_q"]
    assert not [key for key in tensors if "alpha" in key]
    torch.testing.assert_close(tensors["unet.down_blocks.0.attn1.to_q.lora_A.weight"], weights.down)
    torch.testing.assert_close(tensors["unet.down_blocks.0.attn1.to_q.lora_B.weight"], weights.up * 2)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_what_is_written_reads_back(tmp_path: Path, format: str) -> None:
    assert_same_deltas(read(write(tmp_path / "new" / "a.safetensors", format=format)), trained())


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model.", "transformer."])
def test_other_prefixes_and_endings_are_read(tmp_path: Path, prefix: str) -> None:
    path = write(tmp_path / "a.safetensors", format="diffusers")
    rewritten(path, lambda key: key.replace("unet.", prefix).replace("lora_A.", "lora_A.default."))
    assert_same_deltas(read(path), trained())
    rewritten(path, lambda key: key.replace("lora_A.default.", "lora.down.").replace("lora_B.", "lora.up."))
    assert_same_deltas(read(path), trained())


def test_alpha_in_the_metadata_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", format="diffusers")
    told = {"unet.lora_alpha": 8, "unet.r": 4, "unet.alpha_pattern": {"to_out.0": 6, "conv_in": 8}}
    found = read(rewritten(path, str, {"lora_adapter_metadata": json.dumps(told)}))
    assert {name: weights.alpha for name, weights in found.items()} == {
        "down_blocks.0.attn1.to_q": 8.0,
        "down_blocks.0.to_out.0": 6.0,
        "down_blocks.0.conv_in": 8.0,
    }


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"unet.lora_alpha": "much"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"other": 2}}'],
)
def test_metadata_that_cannot_be_followed_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.safetensors", format="diffusers")
    with pytest.raises(AdapterError, match=r"lora_adapter_metadata|alpha_pattern"):
        read(rewritten(path, str, {"lora_adapter_metadata": text}))


def test_a_file_in_diffusers_names_needs_no_alpha(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", format="diffusers")
    file = read_adapter(path, adaptable_modules(Denoiser()), part="unet", keys=KEYS)
    assert {weights.scale for weights in file.weights.values()} == {1.0}
    assert file.notes == ()


def test_without_alpha_the_scale_is_one_and_that_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({key: one for key, one in tensors.items() if "alpha" not in key}, path)
    file = read_adapter(path, adaptable_modules(Denoiser()), part="unet", keys=KEYS)
    assert {weights.scale for weights in file.weights.values()} == {1.0}
    assert len(file.notes) == 1
    assert "no alpha for 3 modules" in file.notes[0]


def changed(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    return path


TO_Q = "lora_unet_down_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.update({"lora_unet_mid.lora_down.weight": torch.zeros(1)}), "lora_unet_mid.lora_down"),
        (lambda t: t.update({f"{TO_Q}.rescale": torch.zeros(1)}), "rescale"),
        (lambda t: t.pop(f"{TO_Q}.lora_up.weight"), "no up (B) matrix"),
        (lambda t: t[f"{TO_Q}.lora_up.weight"].fill_(float("nan")), "NaN"),
        (lambda t: t.update({f"{TO_Q}.lora_up.weight": torch.zeros(6, 3)}), "do not fit each other"),
        (lambda t: t.update({f"{TO_Q}.alpha": torch.zeros(2)}), "not one number"),
        (
            lambda t: t.update({"unet.down_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 6)}),
            "two spellings",
        ),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_files_that_are_no_lora_of_this_model_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], expected: str
) -> None:
    with pytest.raises(AdapterError) as caught:
        read(changed(write(tmp_path / "a.safetensors"), change))
    assert expected in str(caught.value)


def test_text_encoder_keys_are_named_as_such(tmp_path: Path) -> None:
    path = changed(
        write(tmp_path / "a.safetensors"),
        lambda tensors: tensors.update({"lora_te1_text_model_x.lora_down.weight": torch.zeros(1, 1)}),
    )
    with pytest.raises(AdapterError, match="text encoders"):
        read(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (bytes(8), "whole"),
        ((2**63).to_bytes(8, "little") + b"{}", "whole"),
        ((100).to_bytes(8, "little") + b"{not json", "whole"),
    ],
)
def test_damaged_files_say_what_they_are(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert expected in caught.value.remedy


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter file"):
        read(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), torch.float32), (float("inf"), torch.bfloat16), (1e5, torch.float16)]
)
def test_nothing_broken_is_written(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    path = write(tmp_path / "a.safetensors")
    before = path.read_bytes()
    weights = trained()
    weights["down_blocks.0.attn1.to_q"].down[1, 1] = value
    with pytest.raises(NonFiniteLoss, match="not finite"):
        write(path, weights, dtype=dtype)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on file sizes")
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    import resource
    import signal

    path = write(tmp_path / "a.safetensors")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiskFull):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_formats_that_would_not_load_are_refused() -> None:
    assert resolve_format("auto", KEYS) == "kohya"
    assert resolve_format("diffusers", KEYS, ["add_embedding.linear_1"]) == "diffusers"
    with pytest.raises(AdapterError, match=r"flux-1-dev adapters have no kohya spelling"):
        resolve_format("kohya", DIFFUSERS_ONLY)
    with pytest.raises(AdapterError, match=r"stable-diffusion-v1 adapters have no comfy spelling"):
        resolve_format("comfy", KEYS)
    with pytest.raises(AdapterError, match="no adapter format 'pickle'"):
        resolve_format("pickle", KEYS)
    with pytest.raises(AdapterError, match=r"add_embedding\.linear_1"):
        resolve_format("auto", KEYS, ["mid_block.attn", "add_embedding.linear_1"])


def test_metadata_is_kept_beside_the_hashes(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "a.safetensors", metadata={"ss_output_name": "robot"}), "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"ss_output_name", "sshs_model_hash", "sshs_legacy_hash"}
