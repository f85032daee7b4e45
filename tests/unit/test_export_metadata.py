"""What an adapter file says about itself."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from burnish.adapters.lora import LoraWeights
from burnish.export.adapter_file import write_adapter
from burnish.export.metadata import Provenance, adapter_metadata
from burnish.export_keys import ExportKeys

KEYS = ExportKeys("kohya", ("kohya",), "stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
PROVENANCE = Provenance(
    name="robot",
    base_model="/home/someone/models/base.safetensors",
    resolution=(768, 512),
    step=300,
    epoch=4,
    seed=42,
    config="name: robot\n",
    tag_frequency={"pictures": {"a robot": 2, "garden": 9}},
    trigger="sks",
    when=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)


def linear(rank: int = 4, alpha: float = 2.0) -> LoraWeights:
    return LoraWeights(torch.ones(rank, 8), torch.ones(8, rank), alpha)


def convolution(rank: int = 2, alpha: float = 1.0, kernel: int = 3) -> LoraWeights:
    return LoraWeights(torch.ones(rank, 8, kernel, kernel), torch.ones(8, rank, 1, 1), alpha)


def test_model_browsers_and_kohya_tools_find_what_they_read() -> None:
    metadata = adapter_metadata(KEYS, {"a": linear()}, PROVENANCE)
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "robot",
        "modelspec.date": "2026-01-02T03:04:05Z",
        "modelspec.resolution": "512x768",  # width first
        "modelspec.trigger_phrase": "sks",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_output_name": "robot",
        "ss_sd_model_name": "base.safetensors",
        "ss_steps": "300",
        "ss_epoch": "4",
        "format": "pt",
        "burnish.config": "name: robot\n",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert json.loads(metadata["ss_tag_frequency"]) == {"pictures": {"garden": 9, "a robot": 2}}
    assert all(isinstance(value, str) for value in metadata.values())
    assert "lora_adapter_metadata" not in metadata  # diffusers would scale by it, ComfyUI would not


def test_no_folder_and_nothing_of_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = json.dumps(adapter_metadata(KEYS, {"a": linear()}, PROVENANCE))
    assert "someone" not in text
    assert "hf_secret" not in text


@pytest.mark.parametrize(
    ("base_model", "name"),
    [("owner/name", "name"), ("runs/base/", "base"), (r"C:\models\base.safetensors", "base.safetensors")],
)
def test_the_base_model_is_named_by_its_last_part(base_model: str, name: str) -> None:
    provenance = Provenance("a", base_model, (64, 64), 1, 1, 0, "")
    assert adapter_metadata(KEYS, {"a": linear()}, provenance)["ss_sd_model_name"] == name


def test_ranks_of_linear_layers_and_convolutions() -> None:
    weights = {"a": linear(), "b": convolution(), "c": convolution(rank=4, alpha=2.0, kernel=1)}
    metadata = adapter_metadata(KEYS, weights, PROVENANCE)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1"}
    mixed = adapter_metadata(KEYS, {"a": linear(), "b": linear(rank=2)}, PROVENANCE)
    assert (mixed["ss_network_dim"], mixed["ss_network_alpha"]) == ("Dynamic", "2")


def test_hashes_are_those_of_sd_scripts(tmp_path: Path) -> None:
    """Computed from the file as sd-scripts' addnet_hash_safetensors and addnet_hash_legacy read one."""
    weights = {"a": LoraWeights(torch.rand(64, 3000), torch.rand(4000, 64), 1.0)}  # 1.8 MB
    path = write_adapter(
        tmp_path / "a.safetensors",
        weights,
        part="unet",
        keys=KEYS,
        modules={"a": nn.Linear(3000, 4000)},
        dtype=torch.float32,
        metadata={"ss_output_name": "robot"},
    )
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = path.read_bytes()
    payload = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()

    header = json.loads(content[8 : len(content) - len(payload)])
    header["__metadata__"] = {"ss_output_name": "robot"}
    text = json.dumps(header, separators=(",", ":")).encode()
    plain = bytes(8) + text + b" " * (-len(text) % 8) + payload
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]
