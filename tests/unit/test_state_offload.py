"""An optimizer's state on the host: the bits of a step are those of a state that never left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretend_transfer import PretendedTransfer
from torch import Tensor
from torch.nn import Parameter

from burnish.config.optimizers import Adafactor, AdamW
from burnish.memory.state_offload import StatesOnHost
from burnish.optim.build import build_optimizer
from burnish.optim.one_by_one import OneByOne
from burnish.optim.state import pack_state, unpack_state

SHAPES = ((40, 30), (8,), (64, 16), (12, 5, 3, 3), (40, 30))
NAMES = ("a", "b", "c", "d", "e")


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def kept(section: Any, own: list[Parameter], transfer: PretendedTransfer, **options: int) -> OneByOne:
    optimizer = build_optimizer(section, [{"params": own}], one_by_one=True)
    assert isinstance(optimizer, OneByOne)
    optimizer.keeper = StatesOnHost(transfer, lambda: None, **{"smallest": 256, **options})
    return optimizer


def step(
    optimizer: torch.optim.Optimizer, own: list[Parameter], number: int, *, backwards: bool = False
) -> None:
    generator = torch.Generator().manual_seed(number)
    for one in own:
        one.grad = torch.randn(one.shape, generator=generator).to(one.dtype)
    if backwards:
        assert isinstance(optimizer, OneByOne)
        for one in reversed(own):
            optimizer.step_one(one)
    else:
        optimizer.step()


def assert_same(found: list[Parameter], wanted: list[Parameter]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("section", "dtype"),
    [
        (AdamW(learning_rate=0.1), torch.float32),
        (Adafactor(kind="adafactor", learning_rate=0.1), torch.float32),
        (AdamW(learning_rate=0.1, rounding="kahan"), torch.bfloat16),
        (AdamW(learning_rate=0.1, rounding="stochastic"), torch.bfloat16),
    ],
    ids=["adamw", "adafactor", "kahan", "stochastic"],
)
@pytest.mark.parametrize("rooms", [1, 3])
def test_a_state_that_comes_and_goes_steps_as_one_that_stays(
    section: Any, dtype: torch.dtype, rooms: int
) -> None:
    own, others = parameters(dtype), parameters(dtype)
    transfer = PretendedTransfer()
    optimizer = kept(section, own, transfer, rooms=rooms)
    stays = build_optimizer(section, [{"params": others}], one_by_one=True)
    for number in range(4):  # in one order, then in another, as in backward
        step(optimizer, own, number, backwards=number > 1)
        step(stays, others, number, backwards=number > 1)
        assert_same(own, others)
    # Rooms do not hold what has gone: no state is left in them, nor in the optimizer.
    places = {room.untyped_storage().data_ptr() for room in transfer.device_rooms}
    for state in optimizer.state.values():
        for value in state.values():
            assert not isinstance(value, Tensor) or value.untyped_storage().data_ptr() not in places
    names = dict(zip(own, NAMES, strict=True))
    found, _ = pack_state(optimizer, names)
    wanted, _ = pack_state(stays, dict(zip(others, NAMES, strict=True)))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_next_state_is_on_its_way_while_one_is_stepped() -> None:
    own, transfer = parameters(), PretendedTransfer()
    optimizer = kept(AdamW(), own, transfer)
    step(optimizer, own, 0)
    step(optimizer, own, 1)
    begun = len(transfer.started)
    step(optimizer, own, 2)
    large = [one for one in own if one.numel() > 32]
    names = [optimizer.keeper._homes[one].bytes.data_ptr() for one in large]  # type: ignore[union-attr]
    order = [
        ("from" if one.source.data_ptr() in names else "to", names.index(pointer))
        for one in transfer.started[begun:]
        for pointer in (one.source.data_ptr(), one.target.data_ptr())
        if pointer in names
    ]
    # Each goes home once it was stepped, and the next comes before it is asked for.
    assert order == [
        ("to", 0), ("from", 1), ("to", 1), ("from", 2), ("to", 2), ("from", 3), ("to", 3), ("from", 0),
    ]  # fmt: skip


def test_small_states_stay_and_rooms_are_few() -> None:
    own, transfer = parameters(), PretendedTransfer()
    optimizer = kept(AdamW(), own, transfer)
    for number in range(3):
        step(optimizer, own, number)
    assert len(transfer.host_rooms) == 4  # all but the eight numbers of `b`
    assert isinstance(optimizer.keeper, StatesOnHost)
    assert len(optimizer.keeper.device_rooms) == 3
    assert max(room.numel() for room in optimizer.keeper.device_rooms) == max(
        room.numel() for room in transfer.host_rooms
    )


def test_a_state_from_a_checkpoint_goes_on_in_the_same_bits() -> None:
    own, straight = parameters(), parameters()
    optimizer = kept(AdamW(learning_rate=0.1), own, PretendedTransfer())
    expected = build_optimizer(AdamW(learning_rate=0.1), [{"params": straight}], one_by_one=True)
    names = dict(zip(own, NAMES, strict=True))
    for number in range(2):
        step(optimizer, own, number)
        step(expected, straight, number)
    tensors, state = pack_state(optimizer, names)
    stored = {key: one.clone() for key, one in tensors.items()}
    values = [one.detach().clone() for one in own]
    step(optimizer, own, 7)  # what is rolled back, with a state on its way

    unpack_state(optimizer, names, stored, state)
    with torch.no_grad():
        for one, value in zip(own, values, strict=True):
            one.copy_(value)
    fresh = parameters()
    again = kept(AdamW(learning_rate=0.1), fresh, PretendedTransfer())
    unpack_state(again, dict(zip(fresh, NAMES, strict=True)), stored, state)
    with torch.no_grad():
        for one, value in zip(fresh, values, strict=True):
            one.copy_(value)
    for number in range(2, 4):
        step(optimizer, own, number)
        step(again, fresh, number)
        step(expected, straight, number)
    assert_same(own, straight)
    assert_same(fresh, straight)
