"""Activation modes: the same gradients, and what is kept or computed again is what the mode says."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.memory.activations import Mode, activation_modes, set_activations
from burnish.memory.block_forward import BlockForward, change_forward

MODES: list[Mode] = ["keep", "keep-matmul", "keep-attention", "recompute"]
WIDTH, TOKENS = 16, 8
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
LINEAR = torch.ops.aten.addmm.default


class Block(nn.Module):
    """A transformer block with dropout and a keyword argument, one of its weights frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)
        self.qkv.weight.requires_grad_(False)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.out(F.dropout(seen, 0.3)) * scale
        return x + self.narrow(F.gelu(self.wide(x)))


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[object] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def gradients(block: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, WIDTH, generator=generator).requires_grad_()
    block.zero_grad()
    torch.manual_seed(2)
    block(x, scale=torch.tensor(0.7)).square().sum().backward()
    grads = [p.grad for p in block.parameters() if p.requires_grad]
    return [grad.clone() for grad in (*grads, x.grad) if grad is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 8
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_plain_block_dropout_included(block: Block, mode: Mode) -> None:
    expected = gradients(block)
    set_activations([block], [mode])
    assert_same(gradients(block), expected)


@pytest.mark.parametrize(
    ("mode", "attentions", "products"),
    # Four linear layers forward; backward stops computing again at the last tensor that it needs: the input of the
    # last layer, whose own product is needed by nothing.
    [("keep", 1, 4), ("keep-matmul", 1, 4), ("keep-attention", 1, 7), ("recompute", 2, 7)],
)
def test_what_is_computed_again(block: Block, mode: Mode, attentions: int, products: int) -> None:
    set_activations([block], [mode])
    with Count() as count:
        gradients(block)
    assert (count.seen[ATTENTION], count.seen[LINEAR]) == (attentions, products)


def held_bytes(block: nn.Module) -> int:
    """Of tensors that autograd holds between forward and backward, those of checkpoints included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(torch.ones(2, TOKENS, WIDTH, requires_grad=True), scale=torch.tensor(0.7))
    return sum(storages.values())


def test_recomputing_holds_the_inputs_alone(block: Block) -> None:
    kept = held_bytes(block)
    set_activations([block], ["recompute"])
    inputs = (2 * TOKENS * WIDTH + 1) * 4  # the scale is given by name
    assert held_bytes(block) == inputs < kept / 10


@pytest.mark.parametrize("mode", MODES)
def test_compiled_blocks_have_the_same_gradients(block: Block, mode: Mode) -> None:
    expected = gradients(block)
    torch._dynamo.reset()
    set_activations([block], [mode])
    change_forward(block, compile_in_one_graph)
    assert_same(gradients(block), expected)


def compile_in_one_graph(forward: BlockForward) -> None:
    forward.compiled_by = partial(torch.compile, backend="aot_eager", fullgraph=True)


def test_the_last_call_counts_and_keep_gives_the_block_back(block: Block) -> None:
    plain = block.forward
    set_activations([block], ["recompute"])
    set_activations([block], ["keep-attention"])
    with Count() as count:
        gradients(block)
    assert count.seen[ATTENTION] == 1
    set_activations([block], ["keep"])
    assert block.forward == plain


def test_a_share_recomputes_the_first_blocks() -> None:
    assert activation_modes("keep-matmul", 3) == ["keep-matmul"] * 3
    assert activation_modes(0.5, 5) == ["recompute"] * 2 + ["keep"] * 3
    assert activation_modes(0.0, 2) == ["keep"] * 2
    assert activation_modes(1.0, 2) == ["recompute"] * 2
    with pytest.raises(ValueError):
        set_activations([Block()], [])


class Live(TorchDispatchMode):
    """Bytes of tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.begin(tensor.untyped_storage())
        return result

    def begin(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.end, storage._cdata, storage.nbytes())

    def end(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Deep(nn.Module):
    """A block whose inside is much larger than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(20)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


def peak_bytes(modes: list[Mode]) -> int:
    blocks = nn.Sequential(*(Deep() for _ in modes)).requires_grad_(False)
    set_activations(list(blocks), modes)
    with Live() as live:
        blocks(torch.ones(64, WIDTH, requires_grad=True)).sum().backward()
    return live.most


def test_recomputing_the_first_blocks_saves_one_more_than_the_last() -> None:
    half = activation_modes(0.5, 8)
    inside = 20 * 64 * WIDTH * 4  # one block's: the input of each GELU
    none, first, last = peak_bytes(["keep"] * 8), peak_bytes(half), peak_bytes(half[::-1])
    assert last - first == pytest.approx(inside, rel=0.15)
    assert none - first == pytest.approx(4 * inside, rel=0.15)
