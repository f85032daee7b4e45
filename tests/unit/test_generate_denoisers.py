"""A model with several denoisers: which of them an adapter file is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from two_experts import LABELS, TwoExperts, second_transformer

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import ModuleChoice, adaptable_modules
from burnish.adapters.lora import LoraLayer
from burnish.errors import AdapterError
from burnish.export.adapter_file import write_adapter
from burnish.export.metadata import PART
from burnish.families.sd3 import StableDiffusion3
from burnish.family import ModelSource
from burnish.generate import attach_adapter, merge_adapter, part_labels
from burnish.memory.quantized import QuantizedLinear

MODULE = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def experts(tiny_folder: Callable[[str], Path], tmp_path: Path) -> TwoExperts:
    source = ModelSource(str(second_transformer(tiny_folder("sd3"), tmp_path / "model")))
    return TwoExperts.load(source, frozenset({"denoiser"}), dtype=torch.float32, device="cpu")


def saved(family: TwoExperts, path: Path, part: str, metadata: Mapping[str, str] | None = None) -> Path:
    denoiser = deepcopy(family.denoisers[part])
    adapter = AdapterSet.attach(denoiser, {MODULE: ModuleChoice(2, 2.0)}, dropout=0.0, seed=0)
    adapter.layers[MODULE].lora_B.data.fill_(1.0)
    return write_adapter(
        path,
        adapter.weights(),
        part=part,
        keys=family.export,
        modules=adaptable_modules(denoiser),
        dtype=torch.float32,
        metadata=metadata or {},
    )


def attached_to(family: TwoExperts) -> list[str]:
    return [
        part
        for part, denoiser in family.denoisers.items()
        if isinstance(denoiser.get_submodule(MODULE), LoraLayer)
    ]


def test_the_metadata_tells_whatever_the_name_is(experts: TwoExperts, tmp_path: Path) -> None:
    path = saved(experts, tmp_path / "dog-low_noise.safetensors", "transformer", {PART: "transformer"})
    attach_adapter(experts, path, note=pytest.fail)
    assert attached_to(experts) == ["transformer"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("dog-high_noise-00000100", "transformer"),
        ("dog-low_noise-best", "transformer_2"),
        ("Wan2.2_HighNoise_v1", "transformer"),
        ("dog.low-noise", "transformer_2"),
    ],
)
def test_else_the_name_tells(experts: TwoExperts, tmp_path: Path, name: str, part: str) -> None:
    attach_adapter(experts, saved(experts, tmp_path / f"{name}.safetensors", part), note=pytest.fail)
    assert attached_to(experts) == [part]


def test_one_file_for_each_can_be_attached(experts: TwoExperts, tmp_path: Path) -> None:
    files = [saved(experts, tmp_path / f"dog-{label}.safetensors", part) for part, label in LABELS.items()]
    for file in files:
        attach_adapter(experts, file, note=pytest.fail)
    assert attached_to(experts) == list(LABELS)


@pytest.mark.parametrize("name", ["dog", "dog-high_noise-low_noise", "highway"])
def test_a_file_that_does_not_tell_is_refused(experts: TwoExperts, tmp_path: Path, name: str) -> None:
    path = saved(experts, tmp_path / f"{name}.safetensors", "transformer")
    with pytest.raises(
        AdapterError, match=r"which denoiser of Stable Diffusion 3 it is for: high_noise or low_noise"
    ):
        attach_adapter(experts, path, note=pytest.fail)
    assert attached_to(experts) == []


def test_without_labels_the_parts_tell(experts: TwoExperts, tmp_path: Path) -> None:
    experts.export = replace(experts.export, labels={})
    assert part_labels(experts) == {"transformer": "transformer", "transformer_2": "transformer_2"}
    path = saved(experts, tmp_path / "dog-transformer_2-best.safetensors", "transformer_2")
    attach_adapter(experts, path, note=pytest.fail)
    assert attached_to(experts) == ["transformer_2"]


def test_one_denoiser_needs_no_label(tiny_folder: Callable[[str], Path]) -> None:
    source = ModelSource(str(tiny_folder("sd3")))
    family = StableDiffusion3.load(source, frozenset({"denoiser"}), dtype=torch.float32, device="cpu")
    assert part_labels(family) == {}


def test_a_merged_adapter_is_what_an_attached_one_is(experts: TwoExperts, tmp_path: Path) -> None:
    """Where weights are kept in fewer bits it stays beside them, with the same effect."""
    path = saved(experts, tmp_path / "dog.safetensors", "transformer", {PART: "transformer"})
    denoiser = experts.denoisers["transformer"]
    x = torch.randn(2, denoiser.get_submodule(MODULE).in_features, generator=torch.Generator().manual_seed(0))
    quantized = QuantizedLinear.of(denoiser.get_submodule(MODULE), "int8")
    attached = attach_adapter(experts, path, note=pytest.fail)
    attached.multiplier = 0.5
    expected = denoiser.get_submodule(MODULE)(x)
    attached.detach()
    merge_adapter(experts, path, 0.5, note=pytest.fail)
    assert attached_to(experts) == []
    torch.testing.assert_close(denoiser.get_submodule(MODULE)(x), expected)

    denoiser.get_submodule(MODULE.rpartition(".")[0]).register_module("to_q", quantized)
    merge_adapter(experts, path, 0.5, note=pytest.fail)
    assert attached_to(experts) == ["transformer"]
    torch.testing.assert_close(denoiser.get_submodule(MODULE)(x), expected, rtol=0.05, atol=0.05)
