"""From profiles and rates to the fastest settings that fit.

Every weight format is combined with every pair of activation settings, any number of blocks in the one and the rest in
the other, and any share of streamed weights that memory asks for; each combination takes a few sums, so all are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from burnish.planner.live_bytes import Work
from burnish.planner.profile import Profile, Step, step_of
from burnish.planner.rates import Rates

# From the least memory to the most.
MODES = ("recompute", "keep-attention", "keep-matmul", "keep")
RING = 2  # streamed blocks on the device at a time: one that computes, one that arrives


@dataclass(frozen=True, slots=True)
class Settings:
    """What is chosen: the format of frozen weights, what each block keeps, the share of blocks that is streamed."""

    weights: str
    modes: tuple[str, ...]
    streamed: tuple[bool, ...]

    @property
    def stream(self) -> float:
        return sum(self.streamed) / len(self.streamed) if self.streamed else 0.0

    @property
    def kept(self) -> dict[str, int]:
        """Blocks by activation setting, in the order of `MODES`."""
        return {mode: self.modes.count(mode) for mode in MODES if mode in self.modes}


@dataclass(frozen=True, slots=True)
class Choice:
    settings: Settings
    peak: int  # bytes of the training step on the device, without what lies outside of tensors
    host: int  # bytes of weights kept in host memory
    seconds: float  # per micro-step
    work: Work


@dataclass(frozen=True, slots=True)
class Limits:
    """What is pinned by hand; None is free."""

    weights: tuple[str, ...]  # formats to try, at least one
    modes: tuple[str, ...] | None = None  # one per block
    stream: float | None = None
    may_stream: bool = True


Profiles = Mapping[str, Mapping[str, Profile]]  # by weight format, then by activation setting


def choices(profiles: Profiles, rates: Rates, budget: int, limits: Limits, *, compiled: bool) -> list[Choice]:
    """Every combination within `budget` bytes, fastest first; among equally fast ones the smaller."""
    found = [
        choice
        for weights in limits.weights
        for modes in _mixtures(profiles[weights], limits)
        for choice in _streamed(profiles[weights], weights, modes, rates, budget, limits, compiled=compiled)
    ]
    return sorted(found, key=lambda one: (round(one.seconds, 4), one.peak))


def smallest(profiles: Profiles, rates: Rates, limits: Limits, *, compiled: bool) -> Choice:
    """What takes the least memory of all, for messages when nothing fits."""
    found = [
        evaluate(profiles[weights], weights, modes, streamed, rates, compiled=compiled)
        for weights in limits.weights
        for modes in _mixtures(profiles[weights], limits)
        for streamed in [_spread(len(modes), _most(len(modes), rates, limits))]
    ]
    return min(found, key=lambda one: one.peak)


def evaluate(
    profiles: Mapping[str, Profile],
    weights: str,
    modes: Sequence[str],
    streamed: Sequence[bool],
    rates: Rates,
    *,
    compiled: bool,
) -> Choice:
    """Peak and time of one combination.

    Streamed weights come over twice a step, forward and backward, while blocks compute; the step takes the longer of
    the two, and the arena's ring stays on the device.
    """
    used = [profiles[mode] for mode in modes]
    step: Step = step_of(used)
    sizes = [size for size, away in zip(used[0].weights, streamed, strict=True) if away]
    away = sum(sizes)
    ring = sum(sorted(sizes)[-RING:])
    eight_bit = "int8" if weights == "int8" else "fp8"
    computing = rates.seconds(step.work, compiled=compiled, eight_bit=eight_bit)
    moving = 2 * away / rates.from_host
    return Choice(
        Settings(weights, tuple(modes), tuple(streamed)),
        peak=step.peak - away + ring,
        host=away,
        seconds=max(computing, moving),
        work=step.work,
    )


def _mixtures(profiles: Mapping[str, Profile], limits: Limits) -> Iterator[tuple[str, ...]]:
    """Every number of blocks in one setting and the rest in the next that costs more memory."""
    if limits.modes is not None:
        yield limits.modes
        return
    there = [mode for mode in MODES if mode in profiles]
    count = len(profiles[there[0]].blocks)
    for mode in there:
        yield (mode,) * count
    for lower, higher in [*pairwise(there), *([(there[0], there[-1])] if len(there) > 2 else [])]:
        for cheap in range(1, count):
            spread = _spread(count, cheap)
            yield tuple(lower if one else higher for one in spread)


def _streamed(
    profiles: Mapping[str, Profile],
    weights: str,
    modes: tuple[str, ...],
    rates: Rates,
    budget: int,
    limits: Limits,
    *,
    compiled: bool,
) -> Iterator[Choice]:
    """The combination with as few streamed blocks as make it fit, or with the pinned share."""
    count = len(modes)

    def with_away(number: int) -> Choice:
        return evaluate(profiles, weights, modes, _spread(count, number), rates, compiled=compiled)

    if limits.stream is not None:
        choice = with_away(ceil(limits.stream * count))
        if choice.peak <= budget:
            yield choice
        return
    low, high = 0, _most(count, rates, limits)
    if with_away(high).peak > budget:
        return
    while low < high:  # the peak falls with every block that is streamed
        middle = (low + high) // 2
        low, high = (low, middle) if with_away(middle).peak <= budget else (middle + 1, high)
    yield with_away(low)


def _most(count: int, rates: Rates, limits: Limits) -> int:
    if limits.stream is not None:
        return ceil(limits.stream * count)
    return count if limits.may_stream and not rates.unified else 0


def _spread(count: int, chosen: int) -> tuple[bool, ...]:
    """`chosen` of `count` places, evenly: transfers hide behind the blocks between them."""
    return tuple((index + 1) * chosen // count > index * chosen // count for index in range(count))
