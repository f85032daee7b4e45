"""Streaming of frozen weights: what is where and when, on a pretended device whose copies come late."""

from __future__ import annotations

from functools import partial
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from pretend_transfer import PretendedTransfer, Products
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.adapters.attached import AdapterSet
from burnish.adapters.layer import ModuleChoice
from burnish.memory.activations import Mode, set_activations
from burnish.memory.block_forward import BlockForward, change_forward
from burnish.memory.quantized import QuantizedLinear
from burnish.memory.streaming import WeightStream, stream_weights, streamed_blocks
from burnish.memory.transfer import PlainTransfer

WIDTH, DEPTH = 32, 6
CPU = torch.device("cpu")
# torch's own code, while it traces.
DYNAMO = (
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning",
)


class Block(nn.Module):
    """Linear layers with a buffer, and a constant that all blocks share."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.rand(WIDTH) + 0.5)
        self.register_buffer("shared", shared)

    scale: Tensor
    shared: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(x * self.shared))) * self.scale


class Model(nn.Module):
    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Linear(WIDTH, WIDTH)
        shared = torch.rand(WIDTH)
        self.blocks = nn.ModuleList(Block(shared) for _ in range(depth))
        self.requires_grad_(False)
        choices = {
            f"blocks.{i}.{name}": ModuleChoice(2, 2.0) for i in range(depth) for name in ("wide", "narrow")
        }
        self.adapter = [AdapterSet.attach(self, choices, dropout=0.1, seed=0)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return x

    def learn(self, steps: int = 2) -> list[Tensor]:
        seen = []
        for step in range(steps):
            torch.manual_seed(step)
            loss = self(torch.randn(3, 5, WIDTH)).square().mean()
            loss.backward()
            seen.append(loss.detach())
            with torch.no_grad():
                for parameter in self.adapter[0].named_parameters().values():
                    assert parameter.grad is not None
                    seen.append(parameter.grad)
                    parameter -= parameter.grad
                    parameter.grad = None
        return seen


def streamed(model: Model, share: float = 1.0, rooms: int = 3) -> tuple[WeightStream, PretendedTransfer]:
    transfer = PretendedTransfer()
    stream = stream_weights([model], list(model.blocks), share, transfer, CPU, rooms=rooms)
    assert stream is not None
    transfer.hide()
    return stream, transfer


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rooms", [1, 2, 3, 9])
def test_losses_and_gradients_are_the_same(rooms: int) -> None:
    expected = Model().learn()
    model = Model()
    stream, _ = streamed(model, rooms=rooms)
    assert_equal(model.learn(), expected)
    assert stream.device_bytes == stream.host_bytes // DEPTH * min(rooms, DEPTH)


def test_copies_are_begun_while_other_blocks_compute() -> None:
    model = Model()
    _, transfer = streamed(model)
    with Products() as products:
        transfer.clock = lambda: products.done
        model.learn(1)
        assert transfer.late == 1, "the first block; nothing ran before it"
        model.learn(2)
        assert transfer.late == 1
    # Each way brings all blocks but the three that the way before it left in the ring.
    assert len(transfer.started) == DEPTH + 5 * (DEPTH - 3)


def test_drawing_goes_round_and_learning_after_it_is_the_same() -> None:
    expected = Model().learn()
    model = Model()
    with torch.no_grad():
        torch.manual_seed(9)
        plain = [model(torch.ones(2, WIDTH)) for _ in range(3)]
    _, transfer = streamed(model)
    with torch.no_grad(), Products() as products:
        transfer.clock = lambda: products.done
        drawn = [model(torch.ones(2, WIDTH)) for _ in range(3)]
        assert transfer.late == 2, "the first block of the first pass, and of the second"
    assert_equal(drawn, plain)
    assert_equal(model.learn(), expected)


def test_a_step_that_fails_midway_leaves_the_next_one_right() -> None:
    expected = Model().learn()
    model = Model()
    streamed(model, rooms=2)
    handle = model.blocks[3].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        model(torch.ones(1, WIDTH))
    handle.remove()
    assert_equal(model.learn(), expected)


@pytest.mark.filterwarnings(*DYNAMO)
@pytest.mark.parametrize("mode", ["keep", "keep-matmul", "recompute"])
def test_compiled_blocks(mode: Mode) -> None:
    expected = Model().learn()
    torch._dynamo.reset()
    model = Model()
    set_activations(list(model.blocks), [mode] * DEPTH)
    streamed(model, rooms=2)
    for block in model.blocks:
        change_forward(block, compile_in_one_graph)
    assert_equal(model.learn(), expected)


def compile_in_one_graph(forward: BlockForward) -> None:
    forward.compiled_by = partial(torch.compile, backend="aot_eager", fullgraph=True)


@pytest.mark.filterwarnings(*DYNAMO)
@pytest.mark.parametrize("kept_as", ["fp8", "int8", "nf4", "int4"])
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_in_fewer_bits(kept_as: str, compiled: bool) -> None:
    torch._dynamo.reset()
    expected = quantized(kept_as).learn()
    model = quantized(kept_as)
    stream, _ = streamed(model, rooms=2)
    if compiled:
        for block in model.blocks:
            change_forward(block, compile_in_one_graph)
    assert_equal(model.learn(), expected)
    plain, _ = streamed(Model())
    assert stream.host_bytes < plain.host_bytes


def quantized(kept_as: str) -> Model:
    model = Model()
    for block in model.blocks:
        for layer in (block.wide, block.narrow):
            layer.base = QuantizedLinear.of(layer.base, kept_as, eight_bit=False)
    return model


def test_what_stays_on_the_device() -> None:
    model = Model()
    shared = model.blocks[0].shared
    _, transfer = streamed(model)
    block = model.blocks[4]
    assert torch.isnan(block.wide.base.weight).all(), "away, and hidden"
    assert torch.isnan(block.scale).all()
    assert not torch.isnan(model.inlet.weight).any()
    assert not torch.isnan(block.wide.lora_A).any(), "what is trained is never streamed"
    assert not torch.isnan(block.shared).any(), "several blocks hold it"
    assert not torch.isnan(shared).any()
    assert len(transfer.host_rooms) == DEPTH


def test_a_cache_of_constants_keeps_its_tensor() -> None:
    constant = torch.ones(WIDTH)
    model = Model(depth=1)
    model.blocks[0].register_buffer("shared", constant)
    streamed(model)
    assert torch.equal(constant, torch.ones(WIDTH))
    model.learn(1)


def test_reading_a_weight_that_is_away_gives_its_numbers() -> None:
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream_weights([model], list(model.blocks), 1.0, PlainTransfer(CPU), CPU, rooms=2)
    with torch.no_grad():
        model(torch.ones(1, WIDTH))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_tensors_keep_their_order_in_memory() -> None:
    model = Model(depth=2)
    turned = torch.randn(2 * WIDTH, WIDTH).t().contiguous().t()
    model.blocks[0].wide.base.weight.data = turned
    stream_weights([model], list(model.blocks), 1.0, PlainTransfer(CPU), CPU, rooms=1)
    assert model.blocks[0].wide.base.weight.stride() == turned.stride() == (1, 2 * WIDTH)
    assert torch.equal(model.blocks[0].wide.base.weight, turned)


def test_a_share_is_spread_evenly_and_by_size() -> None:
    assert streamed_blocks([10] * 8, 0.0) == []
    assert streamed_blocks([10] * 8, 1.0) == list(range(8))
    assert streamed_blocks([10] * 8, 0.5) == [0, 2, 4, 6]
    assert streamed_blocks([10] * 9, 1 / 3) == [1, 4, 7]
    assert streamed_blocks([0, 10, 0], 1.0) == [1]
    uneven = [1, 1, 1, 1, 12, 1, 1, 1, 1, 12]
    for share in (0.25, 0.5, 0.75):
        assert sum(uneven[i] for i in streamed_blocks(uneven, share)) == pytest.approx(share * 32, abs=6)


def test_called_again_it_takes_the_place_of_before() -> None:
    expected = Model().learn()
    model = Model()
    blocks, before = list(model.blocks), PretendedTransfer()
    stream_weights([model], blocks, 1.0, before, CPU, rooms=2)
    model(torch.ones(1, WIDTH))
    done = len(before.started)
    transfer = PretendedTransfer()
    stream = stream_weights([model], blocks, 0.5, transfer, CPU, rooms=2)
    assert stream is not None
    assert len(stream.blocks) == DEPTH // 2
    transfer.hide()
    assert_equal(model.learn(), expected)
    assert len(before.started) == done
    assert transfer.started
    assert stream_weights([model], blocks, 0.0, PretendedTransfer(), CPU) is None
    assert all(isinstance(block.forward, MethodType) for block in blocks)


def test_nothing_to_stream() -> None:
    assert stream_weights([], [], 1.0, PretendedTransfer(), CPU) is None
    model = Model()
    plain = model.blocks[0].forward
    assert stream_weights([model], list(model.blocks), 0.0, PretendedTransfer(), CPU) is None
    assert model.blocks[0].forward == plain


def test_a_step_without_weights_can_be_traced() -> None:
    with FakeTensorMode():
        model = Model()
        stream = stream_weights([model], list(model.blocks), 0.5, PlainTransfer(CPU), CPU)
        assert stream is not None
        assert (
            stream.host_bytes
            == stream.device_bytes
            == 3
            * sum(
                -(-size * 4 // 512) * 512
                for size in (2 * WIDTH * WIDTH, 2 * WIDTH, 2 * WIDTH * WIDTH, WIDTH, WIDTH)
            )
        )
        model.learn(1)
