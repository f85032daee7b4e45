"""From profiles and rates to the fastest settings that fit.

Every weight format is combined with every pair of activation settings, any number of blocks in the one and the rest in
the other, any share of streamed weights that memory asks for, and with what blocks keep on the device or on the host;
each combination takes a few sums, so all are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from burnish.memory.activations import ORDER, Mode
from burnish.memory.streaming import ROOMS, streamed_blocks
from burnish.planner.live_bytes import Work
from burnish.planner.profile import Profile, Step, offloaded, step_of
from burnish.planner.rates import Rates

# Times are estimates: among settings this close to the fastest, the one that moves least is the safest.
AS_FAST = 1.03
# Of the modes in the middle little more than the inputs can move (memory/activation_offload.py).
MOVABLE: tuple[Mode, ...] = ("recompute", "keep")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is chosen: the format of frozen weights, what each block keeps, and which blocks are streamed."""

    weights: str
    modes: tuple[Mode, ...]
    streamed: tuple[bool, ...]
    stream: float = 0.0  # share of the bytes of block weights, as the option has it
    offload: bool = False  # what blocks keep for backward waits on the host
    parts: int = 1  # of a micro-batch, one after the other

    @property
    def keeps_all(self) -> bool:
        """Nothing is computed twice or moved: no other settings of these weights are faster."""
        return set(self.modes) == {"keep"} and not any(self.streamed) and not self.offload

    @property
    def kept(self) -> dict[Mode, int]:
        """Blocks by activation setting, in the order of `ORDER`."""
        return {mode: self.modes.count(mode) for mode in ORDER if mode in self.modes}


@dataclass(frozen=True, slots=True)
class Choice:
    settings: Settings
    peak: int  # bytes of the training step on the device, without what lies outside of tensors
    host: int  # bytes of streamed weights, which stay in host memory
    waiting: int  # bytes of what blocks keep that wait there between forward and backward
    seconds: float  # per micro-step, all its parts
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
    offload: bool = False  # what blocks keep waits on the host
    may_stream: bool = True
    parts: int = 1  # of a micro-batch; profiles are of one
    host: int | None = None  # bytes that may wait in host memory; None: not known
    beside: Beside = Beside()


NOTHING = Beside()
Profiles = Mapping[str, Mapping[Mode, Profile]]  # by weight format, then by activation setting


def choices(profiles: Profiles, rates: Rates, budget: int, limits: Limits, *, compiled: bool) -> list[Choice]:
    """Every combination within `budget` bytes, fastest first; among equally fast ones the smaller."""
    found = [
        choice
        for weights, used in _tables(profiles, limits)
        for modes in _mixtures(used, limits)
        for choice in _streamed(used, weights, modes, rates, budget, limits, compiled=compiled)
    ]
    return sorted(found, key=lambda one: (round(one.seconds, 4), one.peak))


def preferred(found: Sequence[Choice]) -> Choice:
    """Of those about as fast as the fastest, the fastest that keeps least on the host."""
    near = [one for one in found if one.seconds <= AS_FAST * found[0].seconds]
    return min(near, key=lambda one: one.host)


def smallest(profiles: Profiles, rates: Rates, limits: Limits, *, compiled: bool) -> Choice:
    """What takes the least memory of all, for messages when nothing fits."""
    share = 1.0 if _may_stream(rates, limits) else 0.0
    found = [
        evaluate(
            used, weights, modes, _away(_sizes(used), share), rates,
            compiled=compiled, beside=limits.beside, offload=limits.offload, parts=limits.parts,
        )
        for weights, used in _tables(profiles, limits)
        for modes in _mixtures(used, limits)
    ]  # fmt: skip
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
    offload: bool = False,
    parts: int = 1,
    beside: Beside = NOTHING,
) -> Choice:
    """Peak and time of one combination.

    Streamed weights come over once in forward and once in backward, while blocks compute; each direction takes the
    longer of the two, and the arena's ring stays on the device.

    Args:
        profiles: those of `with_offload`.
        parts: that a micro-batch is learned in; the profiles are of one.
    """
    used = [profiles[mode] for mode in modes]
    step: Step = step_of(used, parts)
    sizes = [size for size, away in zip(used[0].weights, streamed, strict=True) if away]
    away = sum(sizes)
    ring = min(ROOMS * max(sizes, default=0), away)
    waiting = sum(profile.blocks[block].moved for block, profile in enumerate(used)) if offload else 0
    return Choice(
        Settings(weights, tuple(modes), tuple(streamed), share, offload, parts),
        peak=max(step.peak, used[0].resident + beside.between_steps) + beside.always - away + ring,
        host=away,
        waiting=waiting,
        seconds=_seconds(step, away, waiting, rates, weights, compiled=compiled),
        work=step.work,
    )


def evaluate_settings(
    profiles: Mapping[Mode, Profile],
    settings: Settings,
    rates: Rates,
    *,
    compiled: bool = False,
    beside: Beside = NOTHING,
) -> Choice:
    """Peak and time of settings as they were chosen; `profiles` as they were traced."""
    return evaluate(
        with_offload(profiles, settings.offload),
        settings.weights,
        settings.modes,
        settings.streamed,
        rates,
        compiled=compiled,
        share=settings.stream,
        offload=settings.offload,
        parts=settings.parts,
        beside=beside,
    )


def _seconds(step: Step, away: int, waiting: int, rates: Rates, weights: str, *, compiled: bool) -> float:
    """Copies take the bus while blocks compute, and the device's own memory, from which they take bandwidth.

    A bus carries both ways at once: in forward weights come while activations go, in backward both come. To passes
    without gradients they come as well.
    """
    eight_bit = "int8" if weights == "int8" else "fp8"
    computing = rates.seconds(step.work, compiled=compiled, eight_bit=eight_bit)
    if not away and not waiting:
        return computing
    forward, ahead = (
        rates.seconds(work, compiled=compiled, eight_bit=eight_bit) for work in (step.forward, step.ahead)
    )
    besides = max(ahead, step.passes * away / rates.from_host)
    there = max(forward, step.turns * max(away, waiting) / rates.from_host)
    back = max(computing - forward - ahead, step.turns * (away + waiting) / rates.from_host)
    moved = 2 * step.turns * (away + waiting) + step.passes * away
    return besides + there + back + moved / rates.memory


def with_offload(profiles: Mapping[Mode, Profile], offload: bool) -> Mapping[Mode, Profile]:
    """The profiles as they are where what blocks keep waits on the host, or does not."""
    if not offload:
        return profiles
    return {mode: offloaded(one) if mode in MOVABLE else one for mode, one in profiles.items()}


def _tables(profiles: Profiles, limits: Limits) -> Iterator[tuple[str, Mapping[Mode, Profile]]]:
    for weights in limits.weights:
        yield weights, with_offload(profiles[weights], limits.offload)


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
            offload=limits.offload,
            parts=limits.parts,
            beside=limits.beside,
        )

    if limits.stream is not None:
        choice = with_share(round(limits.stream * 100))
        if choice.peak <= budget and _has_room(choice, limits):
            yield choice
        return
    low, high = 0, 100 if _may_stream(rates, limits) else 0
    if with_share(high).peak > budget:
        return
    while low < high:  # the peak falls with every block that is streamed
        middle = (low + high) // 2
        low, high = (low, middle) if with_share(middle).peak <= budget else (middle + 1, high)
    choice = with_share(low)
    if _has_room(choice, limits):
        yield choice


def _has_room(choice: Choice, limits: Limits) -> bool:
    return limits.host is None or choice.host + choice.waiting <= limits.host


def _may_stream(rates: Rates, limits: Limits) -> bool:
    return (limits.may_stream and not rates.unified) if limits.stream is None else limits.stream > 0


def _sizes(profiles: Mapping[Mode, Profile]) -> tuple[int, ...]:
    return next(iter(profiles.values())).weights


def _away(sizes: Sequence[int], share: float) -> tuple[bool, ...]:
    chosen = set(streamed_blocks(sizes, share))
    return tuple(number in chosen for number in range(len(sizes)))
