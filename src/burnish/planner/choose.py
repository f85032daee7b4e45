"""From profiles and rates to the fastest settings that fit.

Every weight format is combined with every pair of activation settings, any number of blocks in the one and the rest in
the other, and any share of streamed weights that memory asks for; each combination takes a few sums, so all are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from burnish.memory.activations import ORDER, Mode
from burnish.memory.streaming import ROOMS, streamed_blocks
from burnish.planner.live_bytes import Work
from burnish.planner.profile import Profile, Step, step_of
from burnish.planner.rates import Rates


@dataclass(frozen=True, slots=True)
class Settings:
    """What is chosen: the format of frozen weights, what each block keeps, and which blocks are streamed."""

    weights: str
    modes: tuple[Mode, ...]
    streamed: tuple[bool, ...]
    stream: float = 0.0  # share of the bytes of block weights, as the option has it

    @property
    def kept(self) -> dict[Mode, int]:
        """Blocks by activation setting, in the order of `ORDER`."""
        return {mode: self.modes.count(mode) for mode in ORDER if mode in self.modes}


@dataclass(frozen=True, slots=True)
class Choice:
    settings: Settings
    peak: int  # bytes of the training step on the device, without what lies outside of tensors
    host: int  # bytes of weights kept in host memory
    seconds: float  # per micro-step
    work: Work = field(compare=False)


@dataclass(frozen=True, slots=True)
class Beside:
    """Bytes on the device that no setting changes: all the time, and while samples are drawn between steps."""

    always: int = 0
    between_steps: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What is pinned by hand; None is free."""

    weights: tuple[str, ...]  # formats to try, at least one
    modes: tuple[Mode, ...] | None = None  # one per block
    stream: float | None = None
    may_stream: bool = True
    beside: Beside = Beside()


NOTHING = Beside()
Profiles = Mapping[str, Mapping[Mode, Profile]]  # by weight format, then by activation setting


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
        evaluate(profiles[weights], weights, modes, streamed, rates, compiled=compiled, beside=limits.beside)
        for weights in limits.weights
        for modes in _mixtures(profiles[weights], limits)
        for streamed in [_away(_sizes(profiles[weights]), 1.0 if _may_stream(rates, limits) else 0.0)]
    ]
    return min(found, key=lambda one: one.peak)


def evaluate(
    profiles: Mapping[Mode, Profile],
    weights: str,
    modes: Sequence[Mode],
    streamed: Sequence[bool],
    rates: Rates,
    *,
    compiled: bool,
    share: float = 0.0,
    beside: Beside = NOTHING,
) -> Choice:
    """Peak and time of one combination.

    Streamed weights come over twice a step, forward and backward, while blocks compute; the step takes the longer of
    the two, and the arena's ring stays on the device.
    """
    used = [profiles[mode] for mode in modes]
    step: Step = step_of(used)
    sizes = [size for size, away in zip(used[0].weights, streamed, strict=True) if away]
    away = sum(sizes)
    ring = min(ROOMS * max(sizes, default=0), away)
    eight_bit = "int8" if weights == "int8" else "fp8"
    computing = rates.seconds(step.work, compiled=compiled, eight_bit=eight_bit)
    moving = 2 * away / rates.from_host
    return Choice(
        Settings(weights, tuple(modes), tuple(streamed), share),
        peak=max(step.peak, used[0].first_level + beside.between_steps) + beside.always - away + ring,
        host=away,
        seconds=max(computing, moving),
        work=step.work,
    )


def _mixtures(profiles: Mapping[Mode, Profile], limits: Limits) -> Iterator[tuple[Mode, ...]]:
    """Every number of blocks in one setting and the rest in the next that costs more memory."""
    if limits.modes is not None:
        yield limits.modes
        return
    there = [mode for mode in ORDER if mode in profiles]
    count = len(profiles[there[0]].blocks)
    for mode in there:
        yield (mode,) * count
    for lower, higher in [*pairwise(there), *([(there[0], there[-1])] if len(there) > 2 else [])]:
        for cheap in range(1, count):  # the first blocks: see memory/activations.py
            yield (lower,) * cheap + (higher,) * (count - cheap)


def _streamed(
    profiles: Mapping[Mode, Profile],
    weights: str,
    modes: tuple[Mode, ...],
    rates: Rates,
    budget: int,
    limits: Limits,
    *,
    compiled: bool,
) -> Iterator[Choice]:
    """The combination with as few streamed blocks as make it fit, or with the pinned share."""
    sizes = _sizes(profiles)

    def with_share(percent: int) -> Choice:
        away = _away(sizes, percent / 100)
        return evaluate(
            profiles,
            weights,
            modes,
            away,
            rates,
            compiled=compiled,
            share=percent / 100,
            beside=limits.beside,
        )

    if limits.stream is not None:
        choice = with_share(round(limits.stream * 100))
        if choice.peak <= budget:
            yield choice
        return
    low, high = 0, 100 if _may_stream(rates, limits) else 0
    if with_share(high).peak > budget:
        return
    while low < high:  # the peak falls with every block that is streamed
        middle = (low + high) // 2
        low, high = (low, middle) if with_share(middle).peak <= budget else (middle + 1, high)
    yield with_share(low)


def _may_stream(rates: Rates, limits: Limits) -> bool:
    return (limits.may_stream and not rates.unified) if limits.stream is None else limits.stream > 0


def _sizes(profiles: Mapping[Mode, Profile]) -> tuple[int, ...]:
    return next(iter(profiles.values())).weights


def _away(sizes: Sequence[int], share: float) -> tuple[bool, ...]:
    chosen = set(streamed_blocks(sizes, share))
    return tuple(number in chosen for number in range(len(sizes)))
