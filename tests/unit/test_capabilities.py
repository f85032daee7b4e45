"""Features by compute capability, settings that follow from them, and where a device's memory is."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
import torch

from burnish import hardware
from burnish.assembly import kept_together
from burnish.compute.capabilities import features, notes, recommendations, use_tensor_cores
from burnish.config.schema import RunConfig

CUDA = torch.device("cuda", 0)
CARDS = {
    "V100": (7, 0),
    "T4": (7, 5),
    "A100": (8, 0),
    "3090": (8, 6),
    "4090": (8, 9),
    "H100": (9, 0),
    "5090": (12, 0),
}


def gpu(
    name: str, capability: tuple[int, int] | None, *, shared: bool = False, coherent: bool = False
) -> hardware.Gpu:
    return hardware.Gpu(0, name, "GPU-0", 24.0, 20.0, shared, "580.95", capability, coherent)


def test_features_of_known_cards() -> None:
    having = {
        feature: {card for card, capability in CARDS.items() if feature in features(capability)}
        for feature in ("bf16", "TF32", "fp8 products", "cuDNN attention", "FlashAttention 3")
    }
    since_ampere = {"A100", "3090", "4090", "H100", "5090"}
    assert having == {
        "bf16": since_ampere,
        "TF32": since_ampere,
        "cuDNN attention": since_ampere,
        "fp8 products": {"4090", "H100", "5090"},
        "FlashAttention 3": {"H100"},
    }


@pytest.mark.parametrize("card", CARDS)
def test_every_recommendation_is_a_valid_value_of_an_option(card: str) -> None:
    values: dict[str, dict[str, object]] = {"train": {}, "memory": {}}
    for one in recommendations(gpu(card, CARDS[card]), has_triton=True):
        section, _, option = one.option.partition(".")
        values[section][option] = {"true": True}.get(one.value, one.value)
        assert one.reason
    data = [{"kind": "folder", "path": "here"}]
    config = RunConfig.model_validate({"name": "a", "model": {"path": "b"}, "data": data, **values})
    given = {f"{section}.{key}" for section, options in values.items() for key in options}
    assert given == {one.option for one in recommendations(gpu(card, CARDS[card]), has_triton=True)}
    expected = {"V100": None, "T4": None, "A100": "int8", "3090": "int8"}.get(card, "fp8")
    assert values["memory"].get("weights") == expected
    assert config.train.precision == ("fp16" if card in ("V100", "T4") else "bf16")
    assert config.memory.compile


def test_nothing_is_compiled_without_triton() -> None:
    found = recommendations(gpu("4090", (8, 9)), has_triton=False)
    assert "memory.compile" not in {one.option for one in found}


def test_what_is_said_of_memory() -> None:
    assert notes(gpu("4090", (8, 9))) == []
    assert "frees nothing" in notes(gpu("NVIDIA GB10", (12, 1), shared=True))[0]
    assert "pinned" in notes(gpu("NVIDIA GH200 480GB", (9, 0), coherent=True))[0]


def set_device(
    monkeypatch: pytest.MonkeyPatch, name: str, *, integrated: bool = False, capability: object = (9, 0)
) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(is_integrated=int(integrated))
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7, 9))


def test_pinning_and_free_memory_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    set_device(monkeypatch, "NVIDIA H200")
    assert (hardware.shares_memory(CUDA), hardware.profits_from_pinning(CUDA), hardware.free_bytes(CUDA)) == (
        False,
        True,
        7,
    )
    set_device(monkeypatch, "NVIDIA GH200 480GB")
    assert (hardware.shares_memory(CUDA), hardware.profits_from_pinning(CUDA), hardware.free_bytes(CUDA)) == (
        False,
        False,
        7,
    )
    set_device(monkeypatch, "NVIDIA GB10", integrated=True)
    assert (hardware.shares_memory(CUDA), hardware.profits_from_pinning(CUDA)) == (True, False)
    assert hardware.free_bytes(CUDA) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert hardware.shares_memory(torch.device("cpu"))


def test_nothing_is_moved_between_parts_of_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [{"kind": "folder", "path": "here"}]
    memory = {"stream": 0.5, "offload_activations": True, "offload_optimizer": True}
    asked = {"name": "a", "model": {"path": "b"}, "data": data, "memory": memory}
    config = RunConfig.model_validate(asked)
    warnings: list[str] = []
    set_device(monkeypatch, "NVIDIA H200")
    assert kept_together(config, CUDA, warnings.append) is config
    assert kept_together(config, torch.device("cpu"), warnings.append) is config
    assert not warnings
    set_device(monkeypatch, "NVIDIA GB10", integrated=True)
    found = kept_together(config, CUDA, warnings.append).memory
    assert (found.stream, found.offload_activations, found.offload_optimizer) == (0.0, False, False)
    assert "memory.stream and memory.offload_activations and memory.offload_optimizer left off" in warnings[0]
    plain = RunConfig.model_validate({**asked, "memory": {}})
    assert kept_together(plain, CUDA, pytest.fail) is plain


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("matmul_precision")
def test_tf32_is_for_runs_that_are_not_exact_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not use_tensor_cores(torch.device("cpu"), "bf16")
    set_device(monkeypatch, "NVIDIA H200")
    assert not use_tensor_cores(CUDA, "fp32")
    set_device(monkeypatch, "T4", capability=(7, 5))
    assert not use_tensor_cores(CUDA, "fp16")
    assert torch.get_float32_matmul_precision() == "highest"
    set_device(monkeypatch, "NVIDIA H200")
    assert use_tensor_cores(CUDA, "bf16")
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(
    ("device", "waits"), [("cuda", False), ("cuda:1", False), ("cpu", True), ("mps", True)]
)
def test_only_a_gpu_of_cuda_is_sent_to_without_waiting(
    monkeypatch: pytest.MonkeyPatch, device: str, waits: bool
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **options: asked.append(options))
    hardware.sent(torch.zeros(1), device)
    assert asked == [{"non_blocking": not waits}]
