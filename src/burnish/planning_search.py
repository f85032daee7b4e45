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

    @property
    def cheaper(self) -> tuple[Choice, ...]:
        """The fastest that takes 10 % less, and the fastest that takes 30 % less."""
        peak = self.best.peak
        wanted = (
            next((one for one in self.choices if one.peak <= share * peak), None) for share in (0.9, 0.7)
        )
        return tuple(dict.fromkeys(one for one in wanted if one is not None))


def fewest_parts(fitting: Sequence[Found]) -> Found:
    """Of searches with more and more parts, the first about as fast as any: small batches' kernels are slower than
    counted."""
    fastest = min(one.best.seconds for one in fitting)
    return next(one for one in fitting if one.best.seconds <= AS_FAST * fastest)


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
        wanted = self.config.memory.text_encoder_weights
        tried = FORMATS_OF_TEXTS if wanted == "auto" else (wanted,)
        if not self.traced.in_step or trains_whole_text(self.config.method):
            tried = ("native",)
        for texts in tried:
            part = self._part(shapes, texts)
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

    def _part(self, shapes: Sequence[Shape], texts: str) -> Shape:
        """Whole batches, or parts of them where those do not fit or take longer."""
        parts = [
            max((in_parts(one, count) for one in shapes), key=partial(weight_of, self.traced.of))
            for count in parts_of(self.config, shapes)
        ]
        if len(parts) == 1:
            return parts[0]
        for kept_as in (self._format(), "nf4") if self._may_change() else (self._format(),):
            fitting: list[Found] = []
            for part in parts:
                found = self._roughly(part, kept_as, texts)
                fitting += [found] if found.choices else []
                if found.choices and found.best.settings.keeps_all:
                    break
            if fitting:
                return fewest_parts(fitting).part
        return parts[-1]

    def _roughly(self, part: Shape, kept_as: str, texts: str) -> Found:
        """With all kept and with nothing; settings between change little in it."""
        profiles = self._profiles(part, (kept_as,), self._tried()[0], texts)
        for offload in self._offload():
            limits = self._limits((kept_as,), part, offload)
            found = Found(self._choices(profiles, limits), profiles, limits, part, texts)
            if found.choices:
                break
        return found

    def _could_fit(self, part: Shape, texts: str) -> bool:
        """Whether the least that a step takes fits, found by one trace: all weights elsewhere, nothing kept."""
        stays = self.rates.unified or self._stream == 0
        formats = ("nf4" if stays and self._may_change() else self._format(),)
        tried = ("recompute",) if self._modes is None else self._tried()[0]
        limits = self._limits(formats, part, self._offload()[-1])
        profiles = self._profiles(part, formats, tried, texts)
        return smallest(profiles, self.rates, limits, compiled=self.compiled).peak <= self.budget

    def _fitting(self, part: Shape, texts: str) -> Found:
        """All settings that fit, and what was tried last.

        Weights as they come take twice the room of 8 bits, so they are tried where those are not streamed already;
        4 bits, which are slower, where they are, or where nothing fits.
        """
        first = self._format()
        found = self._with_formats(part, (first,), texts)
        last_resort = found.limits.offload and len(self._offload()) > 1
        if not self._may_change() or (found.choices and last_resort):
            return found
        is_tight = not found.choices or (found.best.host > 0 and not found.limits.offload)
        return self._with_formats(part, (first, "nf4") if is_tight else ("native", first), texts)

    def _with_formats(self, part: Shape, formats: tuple[str, ...], texts: str) -> Found:
        for offload in self._offload():
            found = self._in_formats(part, self._limits(formats, part, offload), texts)
            if found.choices:
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

    def _format(self) -> str:
        """What to try first: as fast as any on most cards."""
        wanted = self.config.memory.weights
        if wanted != "auto":
            return wanted
        if isinstance(self.config.method, Full):
            return "native"
        return "fp8" if self.rates.fp8 else "int8"

    def _may_change(self) -> bool:
        return self.config.memory.weights == "auto" and not isinstance(self.config.method, Full)

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
