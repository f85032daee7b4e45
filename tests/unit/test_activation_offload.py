"""Offload of activations: what leaves, what stays, when it comes back, on a pretended device."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pretend_transfer import PretendedTransfer, Products
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.memory.activation_offload import ActivationOffload, offload_activations
from burnish.memory.activations import Mode, set_activations
from burnish.memory.block_forward import BlockForward, change_forward
from burnish.memory.streaming import stream_weights
from burnish.memory.transfer import PlainTransfer

WIDTH, TOKENS, DEPTH = 16, 8, 5
SMALLEST = TOKENS * WIDTH * 4
CPU = torch.device("cpu")
DYNAMO = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # torch's own code, while it traces


class Block(nn.Module):
    """The input is saved three times: for two layers and their product."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.one.weight.requires_grad_(False)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return x + F.dropout(F.silu(self.one(x)) * self.two(x) * x, 0.2) * scale


class Model(nn.Module):
    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.inputs: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.full((WIDTH,), 0.5)
        for block in self.blocks:
            self.inputs.append(weakref.ref(x))
            x = block(x, scale=scale)
        return x

    def learn(self, steps: int = 2) -> list[Tensor]:
        seen = []
        for step in range(steps):
            torch.manual_seed(step)
            x = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
            loss = self(x * 2).square().mean()
            loss.backward()
            assert x.grad is not None
            seen += [loss.detach(), x.grad]
            for parameter in self.parameters():
                if parameter.grad is not None:
                    seen.append(parameter.grad)
                    parameter.grad = None
        return seen


def offloaded(model: Model, *modes: Mode, leaving: int = 0) -> tuple[ActivationOffload, PretendedTransfer]:
    blocks, transfer = list(model.blocks), PretendedTransfer()
    set_activations(blocks, modes or ["keep"] * len(blocks))
    made = offload_activations([model], blocks, transfer, smallest=SMALLEST, leaving=leaving)
    return made, transfer


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["keep", "keep-matmul", "recompute"])
def test_losses_and_gradients_are_the_same(mode: Mode) -> None:
    expected = Model().learn()
    model = Model()
    offload, transfer = offloaded(model, *[mode] * DEPTH)
    assert_equal(model.learn(), expected)
    assert len(transfer.started) >= 2 * (DEPTH - 1), "some left and came back"
    assert offload.rooms.bytes == sum(room.numel() for room in transfer.host_rooms)


def test_nothing_comes_back_of_what_had_no_need_to_leave() -> None:
    expected = Model().learn()
    model = Model()
    _, transfer = offloaded(model, leaving=1 << 20)
    assert_equal(model.learn(), expected)
    assert not transfer.device_rooms


def test_a_tensor_that_is_saved_often_travels_once_and_parameters_stay() -> None:
    model = Model(depth=1)
    _, transfer = offloaded(model)
    model.learn(1)
    # The input, what the first layer gave, silu of it, what the second layer gave, their product, and dropout's mask,
    # which is a number per element here; weights are as large and stay.
    assert len(transfer.host_rooms) == 6


def test_inputs_of_recomputed_blocks_are_gone_from_the_device_after_forward() -> None:
    model = Model()
    offloaded(model, *["recompute"] * DEPTH)
    torch.manual_seed(0)
    loss = model(torch.randn(2, TOKENS, WIDTH, requires_grad=True) * 2).sum()
    alive = [number for number, one in enumerate(model.inputs) if one() is not None]
    assert alive == [], "but for the last, whose memory is held without the tensor that was given"
    loss.backward()


def test_host_memory_is_used_again_and_copies_begin_before_they_are_needed() -> None:
    model = Model()
    offload, transfer = offloaded(model, *["recompute"] * DEPTH)
    with Products() as products:
        transfer.clock = lambda: products.done
        model.learn(1)
        made = offload.rooms.bytes
        assert made == DEPTH * 2 * TOKENS * WIDTH * 4
        model.learn(2)
    assert offload.rooms.bytes == made
    assert sum(len(free) for free in offload.rooms.free.values()) == DEPTH, "all are free between steps"
    assert len(transfer.started) == 3 * (DEPTH + DEPTH - 1), "the last block's input had no time to leave"
    assert transfer.late == 0


def test_a_forward_without_backward_gives_its_rooms_back() -> None:
    model = Model()
    offload, _ = offloaded(model)
    model(torch.randn(2, TOKENS, WIDTH, requires_grad=True))
    model.learn(1)
    expected = Model().learn(1)
    assert_equal(model.learn(1), expected)
    with torch.no_grad():
        model(torch.randn(2, TOKENS, WIDTH))
    assert sum(map(len, offload.rooms.free.values())) == len(
        {room.data_ptr() for rooms in offload.rooms.free.values() for room in rooms}
    )


def test_a_step_that_fails_lets_go_of_everything_and_the_next_one_is_right() -> None:
    expected = Model().learn()
    model = Model()
    offload, transfer = offloaded(model, leaving=1 << 30)
    handle = model.blocks[3].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        model(torch.randn(2, TOKENS, WIDTH, requires_grad=True))
    handle.remove()
    gc.collect()  # what the error's traceback held
    assert sum(map(len, offload.rooms.free.values())) == len(transfer.host_rooms) > 0
    assert_equal(model.learn(), expected)


def test_called_again_it_takes_the_place_of_before() -> None:
    expected = Model().learn()
    model = Model()
    _, before = offloaded(model)
    _, transfer = offloaded(model)
    assert_equal(model.learn(), expected)
    assert transfer.started
    assert not before.started


@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.parametrize("mode", ["keep", "keep-matmul", "recompute"])
def test_with_streaming_and_compiled(mode: Mode) -> None:
    torch._dynamo.reset()
    plain = Model()
    set_activations(list(plain.blocks), [mode] * DEPTH)
    compiled(plain)
    expected = plain.learn()
    torch._dynamo.reset()
    model = Model()
    blocks = list(model.blocks)
    set_activations(blocks, [mode] * DEPTH)
    weights = PretendedTransfer()
    stream_weights([model], blocks, 1.0, weights, CPU, rooms=2)
    weights.hide()
    transfer = PretendedTransfer()
    offload_activations([model], blocks, transfer, smallest=SMALLEST, leaving=0)
    compiled(model)
    assert_equal(model.learn(), expected)
    assert transfer.started
    assert weights.started


def compiled(model: Model) -> None:
    for block in model.blocks:
        change_forward(block, compile_in_one_graph)


def compile_in_one_graph(forward: BlockForward) -> None:
    forward.compiled_by = partial(torch.compile, backend="aot_eager", fullgraph=True)


def test_a_step_without_weights_can_be_traced() -> None:
    with FakeTensorMode():
        model = Model()
        set_activations(list(model.blocks), ["recompute"] * DEPTH)
        offload = offload_activations([model], list(model.blocks), PlainTransfer(CPU), smallest=1)
        model.learn(1)
        assert offload.rooms.bytes > 0
