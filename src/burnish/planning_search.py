"""The settings that fit a step, tried from the fastest on; each is traced only where those before it leave a need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from burnish.config.method import Full, trains_whole_text
from burnish.memory.activations import ORDER, Mode, activation_modes
from burnish.planner.choose import (
    AS_FAST,
    NOTHING,
    Beside,
    Choice,
    Limits,
    Profiles,
    choices,
    preferred,
    smallest,
)
from burnish.planner.rates import GIB, Card, Rates
from burnish.planner.recipe import Shape
from burnish.planning_shapes import in_parts, parts_of, weight_of
from burnish.planning_traces import RunTraces

HOST_ELSEWHERE = 32  # GiB of host memory, or twice the card's, where the card is not here
HOST_SHARE = 0.7  # of free host memory may be taken; pinned pages cannot be swapped
FORMATS_OF_TEXTS = ("native", "int8", "nf4")  # tried in this order


@dataclass(frozen=True, slots=True)
class Found:
    """What was tried last."""

    choices: list[Choice]  # that fit
    profiles: Profiles
    limits: Limits
    part: Shape  # the largest that is learned at once
    texts: str  # format of text encoders that a step holds

    @property
    def best(self) -> Choice:
        return preferred(self.choices)

    def is_faster_than(self, other: Found) -> bool:
        """Not by a little: a small batch's kernels are slower than counted."""
        return bool(self.choices) and self.best.seconds < other.best.seconds / AS_FAST

    @property
    def cheaper(self) -> tuple[Choice, ...]:
        """The fastest that takes 10 % less, and the fastest that takes 30 % less."""
        peak = self.best.peak
        wanted = (
            next((one for one in self.choices if one.peak <= share * peak), None) for share in (0.9, 0.7)
        )
        return tuple(dict.fromkeys(one for one in wanted if one is not None))


class Search:
    """Args:
    budget: bytes that torch may allocate.
    beside: what else is there, on the device, while steps run.
    """

    def __init__(
        self, traced: RunTraces, card: Card, budget: int, *, compiled: bool, beside: Beside = NOTHING
    ) -> None:
        self.traced, self.config = traced, traced.config
        self.rates: Rates = card.rates
        self.budget, self.compiled, self.beside = budget, compiled, beside
        self._modes = self._pinned_modes()
        self._stream = None if self.config.memory.stream == "auto" else float(self.config.memory.stream)
        self._host = self._free_host(card)

    def found(self, shapes: Sequence[Shape]) -> Found:
        """The fastest way to learn all of these, of which the one that takes most decides.

        Text encoders that steps hold are made smaller where nothing fits otherwise.
        """
        part = self._part(shapes)
        wanted = self.config.memory.text_encoder_weights
        tried = FORMATS_OF_TEXTS if wanted == "auto" else (wanted,)
        if not self.traced.in_step or trains_whole_text(self.config.method):
            tried = ("native",)
        for texts in tried:
            if texts != tried[-1] and not self._could_fit(part, texts):
                continue
            found = self._fitting(part, texts)
            if found.choices:
                break
        return found

    def fallbacks(self, found: Found) -> tuple[Choice, ...]:
        """What a loaded model can still change to: other activations, more blocks streamed; weights as they are."""
        best, settings = found.best, found.best.settings
        limits = Limits(
            (settings.weights,),
            stream=None if self._stream is None else settings.stream,
            offload=settings.offload,
            parts=settings.parts,
            host=self._host,
        )
        less: list[Choice] = []
        for share in (0.93, 0.85, 0.75):
            every = self._choices(found.profiles, limits, int(share * best.peak))
            fitting = next((one for one in every if one.settings.stream >= settings.stream), None)
            if fitting is not None and fitting not in less:
                less.append(fitting)
        return tuple(less)

    def faster(self, found: Found) -> tuple[Choice, ...]:
        """The fastest of all, if memory were no limit, and of those at least 5 % faster the smallest."""
        every = self._choices(found.profiles, found.limits, 1 << 62)
        faster = [one for one in every if one.seconds < 0.95 * found.best.seconds]
        if not faster:
            return ()
        return tuple(dict.fromkeys([min(faster, key=lambda one: one.peak), faster[0]]))

    def _part(self, shapes: Sequence[Shape]) -> Shape:
        """Whole batches, or parts of them where those do not fit or take longer, told by a format as fast as any."""
        parts = [
            max((in_parts(one, count) for one in shapes), key=partial(weight_of, self.traced.of))
            for count in parts_of(self.config, shapes)
        ]
        if len(parts) == 1:
            return parts[0]
        taken: Found | None = None
        formats = (self._formats()[0][-1],)
        for part in parts:
            found = self._roughly(part, formats)
            if taken is not None and not found.is_faster_than(taken):
                break
            if found.choices:
                taken = found
            if taken is not None and taken.best.settings.keeps_all:
                break
        return parts[-1] if taken is None else taken.part

    def _roughly(self, part: Shape, formats: tuple[str, ...]) -> Found:
        """With all kept and with nothing; settings between change little in it."""
        texts = FORMATS_OF_TEXTS[0]
        profiles = self._profiles(part, formats, self._tried()[0], texts)
        for offload in self._offload():
            limits = self._limits(formats, part, offload)
            found = Found(self._choices(profiles, limits), profiles, limits, part, texts)
            if found.choices:
                break
        return found

    def _could_fit(self, part: Shape, texts: str) -> bool:
        """Whether the least that a step takes fits, found by one trace: all weights elsewhere, nothing kept."""
        formats = (self._formats()[-1 if self.rates.unified or self._stream == 0 else 0][-1],)
        tried = ("recompute",) if self._modes is None else self._tried()[0]
        limits = self._limits(formats, part, self._offload()[-1])
        profiles = self._profiles(part, formats, tried, texts)
        return smallest(profiles, self.rates, limits, compiled=self.compiled).peak <= self.budget

    def _fitting(self, part: Shape, texts: str) -> Found:
        """All settings that fit, and what was tried last; slower ways only where those before them do not fit."""
        for formats in self._formats():
            for offload in self._offload():
                found = self._in_formats(part, self._limits(formats, part, offload), texts)
                if found.choices:
                    break
            if found.choices and (offload or not found.best.host):
                break
        return found

    def _in_formats(self, part: Shape, limits: Limits, texts: str) -> Found:
        for tried in self._tried():
            profiles = self._profiles(part, limits.weights, tried, texts)
            found = Found(self._choices(profiles, limits), profiles, limits, part, texts)
            # Nothing takes less than computing all of it again; nothing is faster than keeping all of it.
            if not found.choices or set(found.best.settings.modes) == {"keep"}:
                break
        return found

    def _choices(self, profiles: Profiles, limits: Limits, budget: int | None = None) -> list[Choice]:
        room = self.budget if budget is None else budget
        return choices(profiles, self.rates, room, limits, compiled=self.compiled)

    def _profiles(self, part: Shape, formats: Sequence[str], modes: Sequence[Mode], texts: str) -> Profiles:
        profile = self.traced.profile
        return {kept_as: {mode: profile(part, kept_as, mode, texts) for mode in modes} for kept_as in formats}

    def _limits(self, formats: tuple[str, ...], part: Shape, offload: bool) -> Limits:
        return Limits(
            weights=formats,
            modes=self._modes,
            stream=self._stream,
            offload=offload,
            parts=part.parts,
            host=self._host,
            beside=self.beside,
        )

    def _formats(self) -> list[tuple[str, ...]]:
        """What to try, and what to try besides where that streams or does not fit: 4 bits are slower."""
        wanted = self.config.memory.weights
        if wanted != "auto":
            return [(wanted,)]
        if isinstance(self.config.method, Full):
            return [("native",)]
        first = ("native", "fp8" if self.rates.fp8 else "int8")
        return [first, (*first, "nf4")]

    def _tried(self) -> list[tuple[Mode, ...]]:
        """Settings to trace; those in the middle only where all cannot be kept."""
        if self._modes is not None:
            return [tuple(dict.fromkeys(self._modes))]
        return [("recompute", "keep"), ORDER]

    def _offload(self) -> tuple[bool, ...]:
        """In this order. On a CPU nothing is gained: it is the host."""
        wanted = self.config.memory.offload_activations
        if wanted == "auto":
            return (False, True) if self.traced.cuda and not self.rates.unified else (False,)
        return (wanted,)

    def _pinned_modes(self) -> tuple[Mode, ...] | None:
        """One mode per block where they are pinned."""
        wanted = self.config.memory.activations
        return None if wanted == "auto" else tuple(activation_modes(wanted, len(self.traced.known.blocks())))

    def _free_host(self, card: Card) -> int | None:
        """Of the host's free memory some is left to what else runs there; nobody knows that of a card elsewhere."""
        if self.rates.unified:
            return None
        free = card.host_gib
        if free is None:
            free = max(HOST_ELSEWHERE, 2 * card.gib)
        return int(HOST_SHARE * free * GIB)
