"""What one training step takes, block by block, and what steps of mixed settings come to.

A trace is cut at the blocks' edges. Levels are bytes of everything alive. Forward, the level moves from block to block
by `growth` (what backward will need); backward it moves by `change` (what is given up, less new gradients). Since both
depend on the block's own setting alone, a step in which blocks differ is put together from the traces of steps in
which all are alike: exact for those, and exact up to the allocator's rounding for a mixture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from burnish.memory.activation_offload import LEAVING
from burnish.planner.live_bytes import LiveBytes, Stretch, Work


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Of one block in one setting; peaks are above the level at which the block begins."""

    growth: int
    forward_peak: int
    change: int
    backward_peak: int
    forward: Work
    backward: Work
    moved: int = 0  # to the host in forward, and back
    ahead: Work = field(default_factory=Work)  # of all passes without gradients


@dataclass(frozen=True, slots=True)
class Profile:
    """One traced step. Bytes; `weights` of the frozen parameters and buffers, by block and outside of blocks."""

    blocks: tuple[BlockCost, ...]
    backward_order: tuple[int, ...]  # blocks as backward comes to them
    weights: tuple[int, ...]
    weights_outside: int
    trained: tuple[int, ...]  # adapters, the optimizer's state and averages, by block; without gradients
    trained_outside: int
    resident: int  # before the step begins: weights, what is trained, the batch
    first_level: int  # at the first block
    head_peak: int  # before it
    tail_change: int  # from the last block's forward to its backward
    tail_peak: int  # in there, above the level after the last block
    rest_peak: int  # after the first block's backward, above the level there
    rest_change: int  # until the optimizer's turn
    optimizer_peak: int  # above the level at which its turn begins
    outside: Work
    optimizer: Work
    singly: bool = (
        False  # weights are stepped one after the other: what a step takes does not grow with their number
    )
    turns: int = 1  # forward and backward, one after the other; the last is the one that is cut into blocks
    passes: int = 0  # without gradients, before them

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        blocks = tuple(
            BlockCost(**{**one, **{name: Work(**one[name]) for name in ("forward", "backward", "ahead")}})
            for one in stored["blocks"]
        )
        lists = {name: tuple(stored[name]) for name in ("backward_order", "weights", "trained")}
        work = {name: Work(**stored[name]) for name in ("outside", "optimizer")}
        return cls(**{**stored, **lists, **work, "blocks": blocks})


@dataclass(frozen=True, slots=True)
class Step:
    """Peak in bytes and work of a step, with the blocks' parts of it before backward."""

    peak: int
    work: Work
    forward: Work
    ahead: Work  # of passes without gradients
    turns: int = 1
    passes: int = 0


def step_of(profiles: Sequence[Profile], parts: int = 1) -> Step:
    """The step in which block i is set as in `profiles[i]`; one profile per block, all of the same model and batch.

    Its fixed parts (before the first block, after the last) are those of the first profile.

    Args:
        parts: so many batches are learned one after the other, and the optimizer steps once.
    """
    base = profiles[0]
    level, peak = base.first_level, base.head_peak
    work, forward, ahead = base.outside, Work(), Work()
    costs = [profile.blocks[index] for index, profile in enumerate(profiles)]
    for cost in costs:
        peak = max(peak, level + cost.forward_peak)
        level += cost.growth
        work = work + (cost.forward + cost.backward).times(base.turns) + cost.ahead
        forward = forward + cost.forward.times(base.turns)
        ahead = ahead + cost.ahead
    peak = max(peak, level + base.tail_peak)
    level += base.tail_change
    for block in base.backward_order:
        peak = max(peak, level + costs[block].backward_peak)
        level += costs[block].change
    peak = max(peak, level + base.rest_peak)
    level += base.rest_change
    peak = max(peak, level + base.optimizer_peak)
    whole = work.times(parts) + base.optimizer
    return Step(
        peak, whole, forward.times(parts), ahead.times(parts), base.turns * parts, base.passes * parts
    )


def offloaded(profile: Profile) -> Profile:
    """The step whose blocks' kept tensors wait on the host (memory/activation_offload.py).

    On the device are those on their way there, and in backward those of a block and of the one before it.
    """
    largest = max((cost.growth for cost in profile.blocks), default=0)
    moving = min(sum(cost.growth for cost in profile.blocks), max(LEAVING, 2 * largest))
    blocks = tuple(
        replace(
            cost,
            growth=0,
            forward_peak=cost.forward_peak + moving,
            change=cost.change + cost.growth,
            backward_peak=cost.backward_peak + moving,
            moved=max(0, cost.growth),
        )
        for cost in profile.blocks
    )
    return replace(profile, blocks=blocks, tail_peak=profile.tail_peak + moving)


def profile_of(
    counted: LiveBytes,
    weights: tuple[Sequence[int], int],
    trained: tuple[Sequence[int], int],
    turns: int = 1,
    skipped: int = 0,
) -> Profile:
    """Cut a traced step at its blocks; `weights` and `trained` are bytes by block, and outside of blocks.

    The stretches are named `forward` and `backward` of a block, `tail` between the two directions, `rest` and
    `optimizer` after them, `ahead` those of passes without gradients; others lie before or between. A block that is
    not run, or from which nothing goes back because nothing trains before it, costs nothing there.

    Args:
        turns: of the step, of which only the last was traced.
        skipped: passes without gradients that were not, after one that was.
    """
    stretches = counted.stretches
    tail, rest, optimizer = (_first(stretches, name) for name in ("tail", "rest", "optimizer"))
    ahead = _cuts(stretches, "forward", tail)
    back = _cuts(stretches, "backward", rest)
    besides = [one for one in stretches if one.name == "ahead"]
    counts = Counter(one.block for one in besides if one.block is not None)
    seen = max(counts.values(), default=0)
    again = (seen + skipped) / seen if seen else 0.0
    costs = []
    for block in range(len(weights[0])):
        growth, forward_peak, forward = _spent(stretches, ahead.get(block))
        change, backward_peak, backward = _spent(stretches, back.get(block))
        passed = _sum([one for one in besides if one.block == block]).times(again)
        costs.append(BlockCost(growth, forward_peak, change, backward_peak, forward, backward, ahead=passed))
    first_block = min((start for start, _ in ahead.values()), default=tail)
    first_back = min((start for start, _ in back.values()), default=rest)
    tail_change, tail_peak, tail_work = _spent(stretches, (tail, first_back))
    rest_change, rest_peak, rest_work = _spent(stretches, (rest, optimizer))
    head = stretches[:first_block]
    once = _sum([one for one in head if one.name != "ahead"]) + tail_work + rest_work
    passed = _sum([one for one in besides if one.block is None]).times(again)
    return Profile(
        blocks=tuple(costs),
        backward_order=tuple(sorted(back, key=lambda block: back[block])),
        weights=tuple(weights[0]),
        weights_outside=weights[1],
        trained=tuple(trained[0]),
        trained_outside=trained[1],
        resident=stretches[0].entry,
        first_level=stretches[first_block].entry,
        head_peak=max(one.peak for one in head),
        tail_change=tail_change,
        tail_peak=tail_peak,
        rest_peak=rest_peak,
        rest_change=rest_change,
        optimizer_peak=max(one.peak for one in stretches[optimizer:]) - stretches[optimizer].entry,
        outside=once.times(turns) + passed,
        optimizer=_sum(stretches[optimizer:]),
        turns=turns,
        passes=seen + skipped,
    )


def _first(stretches: Sequence[Stretch], name: str) -> int:
    return next(index for index, one in enumerate(stretches) if one.name == name)


def _cuts(stretches: Sequence[Stretch], name: str, end: int) -> dict[int, tuple[int, int]]:
    """By block, from its first stretch of this name to the next block's, the last one's to `end`."""
    starts: dict[int, int] = {}
    for index, one in enumerate(stretches):
        if one.name == name and one.block is not None:
            starts.setdefault(one.block, index)
    order = sorted(starts, key=lambda block: starts[block])
    ends = [*(starts[block] for block in order[1:]), end]
    return {block: (starts[block], stop) for block, stop in zip(order, ends, strict=True)}


def _spent(stretches: Sequence[Stretch], cut: tuple[int, int] | None) -> tuple[int, int, Work]:
    """How far the level moves, how far above its begin it reaches, and the work."""
    if cut is None or cut[0] == cut[1]:
        return 0, 0, Work()
    start, stop = cut
    inside = stretches[start:stop]
    entry = inside[0].entry
    return stretches[stop].entry - entry, max(one.peak for one in inside) - entry, _sum(inside)


def _sum(stretches: Sequence[Stretch]) -> Work:
    return sum((one.work for one in stretches), Work())
