"""Rounding to bfloat16: without bias, without standing still, and the same after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from burnish.optim.one_by_one import OneByOne, Rounding
from burnish.optim.rounding import rounded_stochastically, split
from burnish.optim.state import pack_state, unpack_state

DRAWS = 4000


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 beside each value, the one nearer to zero first, by bits."""
    lower = (exact.view(torch.int32) & -65536).view(torch.float32)
    upper = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    return lower, upper


def test_the_mean_of_many_draws_is_the_value_itself() -> None:
    exact = torch.tensor([1.001, -1.001, 0.3, 1e-3, -7.77e-5, 1234.5, 1e-20])
    lower, upper = neighbours(exact)
    drawn = rounded_stochastically(exact.expand(DRAWS, -1), generator()).float()
    assert ((drawn == lower) | (drawn == upper)).all()
    error = (drawn.mean(0) - exact).abs() / (upper - lower).abs()
    assert (error < 4 * 0.5 / DRAWS**0.5).all(), error  # four deviations at most of a coin with two sides
    share = (drawn == upper).float().mean(0)
    wanted = (exact - lower) / (upper - lower)
    assert torch.allclose(share, wanted, atol=4 * 0.5 / DRAWS**0.5)


def test_what_bfloat16_can_hold_and_what_is_no_number_stay_what_they_are() -> None:
    exact = torch.tensor([1.0, -0.5, 0.0, float("inf"), -float("inf"), float("nan")])
    for seed in range(20):
        drawn = rounded_stochastically(exact, generator(seed)).float()
        assert torch.equal(drawn[:5], exact[:5])
        assert drawn[5].isnan()


def test_a_value_and_its_compensation_make_sixteen_bits() -> None:
    exact = torch.randn(1000, generator=generator())
    nearest, compensation = split(exact)
    assert torch.equal(nearest, exact.to(torch.bfloat16))
    both = nearest.float() + compensation.float()
    assert ((both - exact).abs() <= exact.abs() * 2.0**-16).all()
    assert ((nearest.float() - exact).abs() > exact.abs() * 2.0**-12).any()  # one alone does not


def stepped(rounding: Rounding, steps: int = 100, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A weight of 1 under a constant gradient: Adam moves it by the rate, 1e-4, at every step."""
    parameter = Parameter(torch.ones(512, dtype=dtype))
    optimizer = OneByOne([{"params": [parameter], "lr": 1e-4}], adamw, rounding=rounding)
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return parameter.detach().float()


def test_small_steps_add_up_unless_rounded_to_nearest() -> None:
    exact = stepped("nearest", dtype=torch.float32).mean()
    assert (stepped("nearest") == 1.0).all()
    assert abs(stepped("stochastic").mean() - exact) < 1e-3
    assert abs(stepped("kahan").mean() - exact) < 2.0**-9  # half the distance of neighbours below 1


def mixed() -> dict[str, Parameter]:
    draw = generator(3)
    return {
        "half": Parameter(torch.randn(6, 4, generator=draw).bfloat16()),
        "other": Parameter(torch.randn(5, generator=draw).bfloat16()),
        "full": Parameter(torch.randn(3, generator=draw)),
        "unused": Parameter(torch.randn(3, generator=draw).bfloat16()),
    }


def train(optimizer: OneByOne, parameters: dict[str, Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for index, (name, parameter) in enumerate(parameters.items()):
            if name != "unused":
                noise = torch.randn(parameter.shape, generator=generator(100 * step + index))
                parameter.grad = (parameter.detach() - noise).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("together", [False, True])
def test_a_resume_ends_in_the_same_bits(rounding: Rounding, together: bool) -> None:
    def built(seed: int = 7) -> tuple[dict[str, Parameter], OneByOne]:
        parameters = mixed()
        groups = [{"params": list(parameters.values())[:2], "lr": 3e-3}]
        groups += [{"params": list(parameters.values())[2:], "lr": 1e-2}]
        return parameters, OneByOne(groups, adamw, rounding=rounding, seed=seed, together=together)

    straight, optimizer = built()
    train(optimizer, straight, 0, 8)
    first, stopped = built()
    train(stopped, first, 0, 3)
    kept = {name: parameter.detach().clone() for name, parameter in first.items()}
    tensors, state = pack_state(stopped, {one: name for name, one in first.items()})
    second, resumed = built()
    train(resumed, second, 0, 1)  # what it has learned by itself must not shine through
    for name, parameter in second.items():
        parameter.data.copy_(kept[name])
    unpack_state(resumed, {one: name for name, one in second.items()}, tensors, state)
    train(resumed, second, 3, 8)
    assert all(torch.equal(straight[name], second[name]) for name in straight)
    assert ("half:compensation" in tensors) == (rounding == "kahan")
    assert tensors["half:exp_avg"].dtype == (torch.bfloat16 if rounding == "nearest" else torch.float32)

    seeded, other = built(seed=8)
    train(other, seeded, 0, 8)
    assert torch.equal(straight["half"], seeded["half"]) == (rounding != "stochastic")


def test_parameters_stepped_one_by_one_end_where_all_at_once_do() -> None:
    parameters, at_once = mixed(), mixed()
    one = OneByOne([{"params": list(parameters.values()), "lr": 1e-2}], adamw, rounding="stochastic", seed=1)
    all_ = OneByOne([{"params": list(at_once.values()), "lr": 1e-2}], adamw, rounding="stochastic", seed=1)
    for step in range(4):
        for name in ("full", "half", "other"):
            for owned in (parameters, at_once):
                owned[name].grad = torch.full_like(owned[name], step - 1.5)
            one.step_one(parameters[name])
            parameters[name].grad = None
        all_.step()
    assert all(torch.equal(parameters[name], at_once[name]) for name in parameters)
    plain = mixed()["full"]
    reference = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.0)
    for step in range(4):
        plain.grad = torch.full_like(plain, step - 1.5)
        reference.step()
    assert torch.equal(plain, parameters["full"])


def test_between_steps_there_is_no_float32_copy() -> None:
    parameters = mixed()
    optimizer = OneByOne([{"params": list(parameters.values()), "lr": 1e-2}], adamw, rounding="kahan")
    train(optimizer, parameters, 0, 1)
    for unit in optimizer._units:
        for slot in unit.slots:
            if slot.is_rounded:
                assert slot.moved.untyped_storage().nbytes() == 4
                assert slot.moved.grad is None
        assert not unit.optimizer.state
