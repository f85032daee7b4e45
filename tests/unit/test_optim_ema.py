"""The moving average against its closed form and against diffusers' EMAModel."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.nn import Parameter

from burnish.errors import CheckpointError
from burnish.optim.ema import Ema


def test_the_average_is_the_weighted_sum_of_all_values_seen() -> None:
    values = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter = Parameter(values[0].clone())
    ema = Ema({"w": parameter}, decay=0.6)
    for value in values[1:]:
        parameter.data.copy_(value)
        ema.update()

    kept = torch.tensor([min(0.6, (1 + n) / (10 + n)) for n in range(39)], dtype=torch.float64)
    survive = torch.cat([kept.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    weights = survive * torch.cat([torch.ones(1, dtype=torch.float64), 1 - kept])
    assert weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(ema.state_dict()[0]["w"], weights @ values, rtol=1e-12, atol=1e-12)


def test_it_is_the_average_of_diffusers() -> None:
    parameters = [Parameter(torch.randn(3, 4)), Parameter(torch.randn(5))]
    ours = Ema({"a": parameters[0], "b": parameters[1]}, decay=0.5)
    theirs = EMAModel(parameters, decay=0.5)
    for step in range(30):
        ours.update()
        theirs.step(parameters)  # its first update copies: the same, because nothing has moved yet
        for parameter in parameters:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.1 * (step + 1))
    for average, reference in zip(ours.state_dict()[0].values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(average, reference)


def test_swapped_shows_the_average_and_puts_back_every_bit() -> None:
    parameter = Parameter(torch.randn(1000))
    ema = Ema({"w": parameter}, decay=0.9)
    parameter.data.mul_(3.0)
    ema.update()
    before = parameter.detach().clone()
    with ema.swapped():
        assert torch.equal(parameter, ema.state_dict()[0]["w"])
        assert not torch.equal(parameter, before)
        parameter.data.zero_()
        with pytest.raises(RuntimeError, match="averages"):
            ema.update()
    assert torch.equal(parameter, before)
    with pytest.raises(ValueError, match="from inside"), ema.swapped():
        raise ValueError("from inside")
    assert torch.equal(parameter, before)


def test_the_state_goes_on_in_the_same_bits() -> None:
    start = torch.randn(50)
    moves = torch.randn(20, 50)

    def averaged(ema: Ema, parameter: Parameter, rows: torch.Tensor) -> Ema:
        for row in rows:
            parameter.data.add_(row)
            ema.update()
        return ema

    straight = Parameter(start.clone())
    expected = averaged(Ema({"w": straight}, 0.7), straight, moves)
    one = Parameter(start.clone())
    tensors, state = averaged(Ema({"w": one}, 0.7), one, moves[:7]).state_dict()
    other = Parameter(one.detach().clone())
    resumed = Ema({"w": other}, 0.7)
    resumed.load_state_dict(tensors, state)
    averaged(resumed, other, moves[7:])
    assert torch.equal(resumed.state_dict()[0]["w"], expected.state_dict()[0]["w"])
    assert resumed.updates == expected.updates == 20


def test_a_bfloat16_parameter_has_an_average_that_moves() -> None:
    parameter = Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, decay=0.999)
    ema.updates = 100_000
    parameter.data.fill_(1.0 + 2**-7)
    for _ in range(100):
        ema.update()
    average = ema.state_dict()[0]["w"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((4,), 1 + 2**-7 * (1 - 0.999**100)))


def test_reset_forgets() -> None:
    parameter = Parameter(torch.zeros(3))
    ema = Ema({"w": parameter}, decay=0.9)
    parameter.data.fill_(2.0)
    ema.update()
    ema.reset()
    assert torch.equal(ema.state_dict()[0]["w"], parameter)
    assert ema.updates == 0


@pytest.mark.parametrize(
    ("tensors", "state"),
    [
        ({"v": torch.zeros(3)}, {"updates": 1}),
        ({"w": torch.zeros(4)}, {"updates": 1}),
        ({}, {"updates": 1}),
        ({"w": torch.zeros(3)}, {}),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    tensors: dict[str, torch.Tensor], state: dict[str, int]
) -> None:
    ema = Ema({"w": Parameter(torch.ones(3))}, decay=0.9)
    with pytest.raises(CheckpointError):
        ema.load_state_dict(tensors, dict(state))
    assert torch.equal(ema.state_dict()[0]["w"], torch.ones(3))
    assert ema.updates == 0
