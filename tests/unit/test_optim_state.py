"""Optimizer state through a real checkpoint file: training goes on in the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from burnish.checkpoint.store import CheckpointStore
from burnish.config.optimizers import (
    Adafactor,
    AdamW,
    AdamW8bit,
    AdamWScheduleFree,
    AdEMAMix,
    AnyOptimizer,
    Came,
    CustomOptimizer,
    Lion,
    Muon,
    Prodigy,
    ProdigyScheduleFree,
    Soap,
)
from burnish.errors import CheckpointError
from burnish.optim.build import build_optimizer
from burnish.optim.schedule import apply_learning_rate
from burnish.optim.state import Json, pack_state, unpack_state

SECTIONS: list[AnyOptimizer] = [
    AdamW(learning_rate=1e-2),
    Adafactor(kind="adafactor", learning_rate=1e-2),
    Prodigy(kind="prodigy", d0=1e-4),
    AdamW8bit(kind="adamw8bit", learning_rate=1e-2),
    Lion(kind="lion", learning_rate=1e-2),
    Came(kind="came", learning_rate=1e-2),
    ProdigyScheduleFree(kind="prodigy_schedule_free", d0=1e-4),
    AdamWScheduleFree(kind="adamw_schedule_free", learning_rate=1e-2),
    Muon(kind="muon", learning_rate=1e-2),
    Soap(kind="soap", learning_rate=1e-2, every=2),
    AdEMAMix(kind="ademamix", learning_rate=1e-2),
    CustomOptimizer(kind="custom", learning_rate=1e-2, class_path="torch.optim.RAdam"),
]
SHAPES = {"a.lora_A": (4, 6), "a.lora_B": (6, 4), "conv.lora_A": (2, 3, 3, 3), "bias": (5,), "gain": ()}


class Fit:
    """Least squares towards a moving target: every gradient is a function of the step and the weights."""

    def __init__(self, section: AnyOptimizer) -> None:
        generator = torch.Generator().manual_seed(3)
        self.parameters = {
            n: Parameter(torch.randn(shape, generator=generator)) for n, shape in SHAPES.items()
        }
        self.parameters["a.lora_B"].data.zero_()  # as every adapter starts
        self.parameters["unused"] = Parameter(torch.randn(3, generator=generator))
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        first, *rest = self.parameters.values()
        self.optimizer = build_optimizer(section, [{"params": rest}, {"params": [first], "lr": 5e-3}])

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            apply_learning_rate(self.optimizer, 1.0 - step / 40)
            for index, (name, parameter) in enumerate(self.parameters.items()):
                if name == "unused":
                    continue
                generator = torch.Generator().manual_seed(100 * step + index)
                target = 3 + 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.grad = 2 * (parameter.detach() - target)
            self.optimizer.step()


def learned(optimizer: torch.optim.Optimizer) -> list[tuple[int, str, Any]]:
    """Every value of the state: position of its parameter, key, value."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [
        (position, key, value)
        for position, parameter in enumerate(parameters)
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
    ]


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def same_value(key: str, one: Any, other: Any) -> None:
    assert type(one) is type(other), key
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), key
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            same_value(key, ours, theirs)
    else:
        assert one == other, key


def same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    ours, theirs = learned(one), learned(other)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    assert ours
    for (_, key, value), (_, _, other_value) in zip(ours, theirs, strict=True):
        same_value(key, value, other_value)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.kind)
@pytest.mark.parametrize("stop", [1, 9, 19])
def test_a_resumed_run_ends_in_the_same_bits(section: AnyOptimizer, stop: int, tmp_path: Path) -> None:
    straight = Fit(section)
    straight.train(0, 20)

    first = Fit(section)
    first.train(0, stop)
    tensors, state = pack_state(first.optimizer, first.names)
    CheckpointStore(tmp_path).save(
        stop, {"adapter": first.parameters, "optimizer": tensors}, {"optimizer": state}, config_hash="x"
    )
    del first, tensors, state

    loaded = CheckpointStore(tmp_path).load_newest()
    assert loaded is not None
    second = Fit(section)
    second.train(0, 2)  # what the fresh optimizer holds must not shine through
    for name, parameter in second.parameters.items():
        parameter.data.copy_(loaded.tensors["adapter"][name])
    unpack_state(second.optimizer, second.names, loaded.tensors["optimizer"], loaded.state["optimizer"])
    second.train(stop, 20)
    assert second.optimizer.state.keys() <= set(second.parameters.values())

    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name
    same_state(straight.optimizer, second.optimizer)
    assert options(straight.optimizer) == options(second.optimizer)


def test_prodigys_estimate_moves_at_every_stop_so_that_losing_it_would_show() -> None:
    fit = Fit(SECTIONS[2])
    found = []
    for start, stop in ((0, 5), (5, 9), (9, 19)):
        fit.train(start, stop)
        found.append(fit.optimizer.param_groups[0]["d"])
    assert 1e-4 < found[0] < found[1] < found[2]
    assert fit.optimizer.param_groups[0]["k"] == 19


def test_options_follow_the_config_and_not_the_checkpoint() -> None:
    before = Fit(AdamW(learning_rate=1e-2, weight_decay=0.1))
    before.train(0, 3)
    after = Fit(AdamW(learning_rate=1e-3, weight_decay=0.2))
    unpack_state(after.optimizer, after.names, *pack_state(before.optimizer, before.names))
    assert [group["initial_lr"] for group in after.optimizer.param_groups] == [1e-3, 5e-3]
    assert {group["weight_decay"] for group in after.optimizer.param_groups} == {0.2}
    same_state(before.optimizer, after.optimizer)


def test_unpacked_tensors_are_copies() -> None:
    fit, other = Fit(SECTIONS[0]), Fit(SECTIONS[0])
    fit.train(0, 3)
    tensors, state = pack_state(fit.optimizer, fit.names)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    unpack_state(other.optimizer, other.names, tensors, state)
    other.train(3, 5)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


class QuantisedMomentum(torch.optim.Optimizer):
    """State as bitsandbytes keeps it: bytes, a table, an int step, and an infinite option that is learned."""

    def __init__(self, parameters: list[Parameter]) -> None:
        super().__init__(parameters, {"lr": 1.0, "d": float("inf")})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, state1=torch.zeros_like(parameter, dtype=torch.uint8), largest=None)
                    state["qmap1"] = torch.linspace(-1, 1, 256)
                state["step"] += 1
                state["state1"].add_(state["step"])
                parameter.sub_(state["qmap1"][state["state1"].long()])


def test_bytes_ints_none_and_infinity_come_back(tmp_path: Path) -> None:
    parameter = Parameter(torch.zeros(7))
    optimizer = QuantisedMomentum([parameter])
    optimizer.step()
    optimizer.step()
    tensors, state = pack_state(optimizer, {parameter: "w"})
    CheckpointStore(tmp_path).save(2, {"optimizer": tensors}, {"optimizer": state}, config_hash="x")
    loaded = CheckpointStore(tmp_path).load_newest()
    assert loaded is not None
    other = Parameter(torch.zeros(7))
    restored = QuantisedMomentum([other])
    restored.param_groups[0]["d"] = 1.0
    unpack_state(restored, {other: "w"}, loaded.tensors["optimizer"], loaded.state["optimizer"])
    same_state(optimizer, restored)
    assert restored.param_groups[0]["d"] == float("inf")


class PagedMomentum(QuantisedMomentum):
    """As bitsandbytes' paged optimizers: states lie in memory that the optimizer allocates."""

    is_paged = True

    def get_state_buffer(self, parameter: Parameter, dtype: torch.dtype) -> torch.Tensor:
        self.allocated = torch.zeros_like(parameter, dtype=dtype)
        return self.allocated


def test_paged_states_return_to_memory_of_the_optimizers_own() -> None:
    parameter, other = Parameter(torch.zeros(7)), Parameter(torch.zeros(7))
    optimizer, restored = PagedMomentum([parameter]), PagedMomentum([other])
    optimizer.step()
    unpack_state(restored, {other: "w"}, *pack_state(optimizer, {parameter: "w"}))
    same_state(optimizer, restored)
    assert restored.state[other]["state1"] is restored.allocated


def test_another_optimizer_is_refused_by_name() -> None:
    adamw, adafactor = Fit(SECTIONS[0]), Fit(SECTIONS[1])
    adamw.train(0, 1)
    with pytest.raises(CheckpointError, match="made with AdamW, not Adafactor"):
        unpack_state(adafactor.optimizer, adafactor.names, *pack_state(adamw.optimizer, adamw.names))
    assert not adafactor.optimizer.state


def test_other_parameters_are_refused_by_name_and_nothing_changes() -> None:
    fit = Fit(SECTIONS[0])
    fit.train(0, 2)
    tensors, state = pack_state(fit.optimizer, fit.names)
    renamed = Fit(SECTIONS[0])
    names = {parameter: name.replace("bias", "offset") for parameter, name in renamed.names.items()}
    with pytest.raises(CheckpointError, match=r"offset has no stored state.*bias is not in this run"):
        unpack_state(renamed.optimizer, names, tensors, state)
    assert not renamed.optimizer.state

    parameter = Parameter(torch.zeros(4, 8))
    resized = build_optimizer(SECTIONS[0], [{"params": [parameter]}])
    one = {name: tensor for name, tensor in tensors.items() if name.startswith("a.lora_A:")}
    assert isinstance(state, dict)
    kept: dict[str, Json] = {**state, "shapes": {"a.lora_A": [4, 6]}}
    with pytest.raises(CheckpointError, match=r"a.lora_A was \(4, 6\) and is \(4, 8\)"):
        unpack_state(resized, {parameter: "a.lora_A"}, one, kept)


def test_an_unreadable_state_is_refused() -> None:
    fit = Fit(SECTIONS[0])
    unreadable: tuple[Json, ...] = (None, {}, [1])
    for state in unreadable:
        with pytest.raises(CheckpointError, match="no optimizer state"):
            unpack_state(fit.optimizer, fit.names, {}, state)


def test_a_parameter_without_a_name_is_refused() -> None:
    fit = Fit(SECTIONS[0])
    with pytest.raises(CheckpointError, match=r"shape \(4, 6\) in the optimizer has no name"):
        pack_state(fit.optimizer, {p: n for p, n in fit.names.items() if n != "a.lora_A"})


def test_the_8bit_optimizer_goes_on_in_the_same_bits(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    start = torch.randn(
        64, 128, generator=torch.Generator().manual_seed(1)
    )  # 4096 values and more are quantised

    def steps(parameter: Parameter, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            parameter.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    straight, one, other = (Parameter(start.clone()) for _ in range(3))
    optimizers = [bitsandbytes.optim.AdamW8bit([parameter], lr=1e-2) for parameter in (straight, one, other)]
    steps(straight, optimizers[0], 0, 10)
    steps(one, optimizers[1], 0, 4)
    tensors, state = pack_state(optimizers[1], {one: "w"})
    assert tensors["w:state1"].dtype == torch.uint8
    CheckpointStore(tmp_path).save(4, {"optimizer": tensors}, {"optimizer": state}, config_hash="x")
    loaded = CheckpointStore(tmp_path).load_newest()
    assert loaded is not None
    other.data.copy_(one)
    unpack_state(optimizers[2], {other: "w"}, loaded.tensors["optimizer"], loaded.state["optimizer"])
    steps(other, optimizers[2], 4, 10)
    assert torch.equal(straight, other)
    same_state(optimizers[0], optimizers[2])
