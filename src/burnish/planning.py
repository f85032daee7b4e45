"""From a config to a plan: what the run will take, and the settings that fit. Loads no weights and needs no GPU."""

from __future__ import annotations

from functools import partial

from burnish.config.method import Full, Vae, trains_whole_text
from burnish.config.schema import RunConfig
from burnish.errors import BurnishError
from burnish.memory.activations import ORDER, Mode, activation_modes
from burnish.optim.build import check_optimizer, state_bytes
from burnish.placement import Part
from burnish.planner.choose import (
    Beside,
    Choice,
    Limits,
    Profiles,
    choices,
    evaluate_settings,
    preferred,
    smallest,
)
from burnish.planner.lesson import passes_in_words
from burnish.planner.phases import (
    VAE,
    Phase,
    caption_phase,
    decoding_phase,
    drawing_phase,
    encoding_phase,
)
from burnish.planner.profile import Profile
from burnish.planner.rates import GIB, Card, Rates
from burnish.planner.recipe import Shape
from burnish.planning_rows import frozen_adapters, nothing_fits, sample_rows, size_in_words, training_rows
from burnish.planning_shapes import drawn_shape, numbers_in, shapes_of, tokens_of
from burnish.planning_traces import RunTraces
from burnish.planning_vae import plan_vae
from burnish.run_plan import Row, RunPlan, Timed, for_torch
from burnish.trained import own_weights

WORTH_COMPILING = 300  # micro-steps
REFERENCE_TOKENS = 1369  # of a picture that a text encoder sees: a megapixel in patches of 28 x 28
HOST_ELSEWHERE = 32  # GiB of host memory, or twice the card's, where the card is not here
HOST_SHARE = 0.7  # of free host memory may be taken; pinned pages cannot be swapped
TEXT_ENCODERS: frozenset[Part] = frozenset({"text_encoders"})
FORMATS_OF_TEXTS = ("native", "int8", "nf4")  # tried in this order


def plan_run(
    config: RunConfig, card: Card, *, budget: int | None = None, cuda: bool = True, can_compile: bool = True
) -> RunPlan:
    """Trace the run's phases and choose the fastest settings that fit.

    Args:
        card: whose memory and rates count.
        budget: bytes that the run may take in all, context included; the card's memory if None.
        cuda: the device is a GPU, whose kernels keep other tensors than those of a CPU.
        can_compile: blocks may be compiled where the config leaves that open.

    Raises:
        ModelError: no such weights, and the config names no family whose released sizes could stand in.
        UserError: nothing fits, or a VAE is to be trained that is of a kind that is not.
        MissingPackage: the optimizer's library is not here.
    """
    if isinstance(config.method, Vae):
        check_optimizer(config.train.optimizer)
        return plan_vae(config, card, budget, cuda=cuda)
    return _Planner(config, card, budget, cuda, can_compile).plan()


class _Planner:
    def __init__(
        self, config: RunConfig, card: Card, budget: int | None, cuda: bool, can_compile: bool
    ) -> None:
        self.config, self.card = config, card
        # Before anything is traced: what a library makes of numbers when it is first used must have values.
        check_optimizer(config.train.optimizer)
        self.rates: Rates = card.rates
        self.budget = for_torch(card, budget)
        self.traced = RunTraces(config, cuda=cuda)
        self.known, self.of = self.traced.known, self.traced.of
        wanted = config.memory.compile
        self.compiled = (can_compile and self._is_long()) if wanted == "auto" else wanted
        self.notes = self.traced.stands_in()
        self.texts = "native"  # format of text encoders that a step holds
        if config.memory.offload_optimizer:
            self.notes.append(self._moved())

    def _moved(self) -> str:
        """Of the optimizer's state in host memory."""
        weights, section = own_weights(self.config.method, self.known), self.config.train.optimizer
        size = weights * state_bytes(section, self.traced.dtype, "cpu")
        seconds = 2 * size / self.rates.from_host
        return (
            f"the optimizer's state, {size / GIB:.1f} GiB in host memory, goes to the GPU and back in each step: "
            f"{seconds:.1f} s, not counted, of which computing hides a part"
        )

    def _is_long(self) -> bool:
        """Compiling takes minutes and saves a part of each step: not worth it for a handful."""
        return self.config.train.steps * self.config.train.accumulate >= WORTH_COMPILING

    def formats(self) -> list[tuple[str, ...]]:
        """What to try, and what to try besides where that streams or does not fit: 4 bits are slower."""
        wanted = self.config.memory.weights
        if wanted != "auto":
            return [(wanted,)]
        if isinstance(self.config.method, Full):
            return [("native",)]
        first = ("native", "fp8" if self.rates.fp8 else "int8")
        return [first, (*first, "nf4")]

    def plan(self) -> RunPlan:
        shapes = shapes_of(self.config, self.of)
        largest = shapes[0]
        modes = self._modes()
        captions = None if self.traced.in_step else self._captions()
        vae = self.traced.skeleton(parts=VAE)
        pictures = self.traced.phase(
            "encoding", vae, largest, partial(encoding_phase, vae, largest, cuda=self.traced.cuda)
        )
        drawn = self._drawn()
        found, profiles, limits = self._with_texts(largest, modes, drawn[0])
        before = [("the VAE", pictures.peak)]
        if captions is not None:
            before.append(("text encoders", captions[1].peak))
        if not found or max(peak for _, peak in before) > self.budget:
            raise self._nothing_fits(profiles, limits, before)
        best = preferred(found)
        texts = self.texts if self.traced.in_step else None
        rows = (
            *_caption_rows(captions),
            Row("pictures", pictures.peak, f"the VAE and one of {size_in_words(largest)}"),
            *training_rows(self.config, profiles, best, self.rates, largest, drawn[0], self._held(), texts),
            *sample_rows(profiles, best, self.rates, *drawn),
        )
        return RunPlan(
            family=self.known.title,
            card=self.card.title,
            budget=self.budget,
            choice=best,
            compiled=self.compiled,
            text_encoder_weights=self.texts if captions is None else captions[0],
            rows=rows,
            times=tuple(self._timed(shape, best) for shape in shapes),
            steps=self.config.train.steps,
            accumulate=self.config.train.accumulate,
            fallbacks=self._fallbacks(profiles, best),
            cheaper=self._cheaper(found, best),
            faster=self._faster(profiles, limits, best),
            notes=tuple(self.notes),
        )

    def _with_texts(
        self, largest: Shape, modes: tuple[Mode, ...] | None, beside: Beside
    ) -> tuple[list[Choice], Profiles, Limits]:
        """As `_search`; text encoders that steps hold are made smaller where nothing fits otherwise."""
        wanted = self.config.memory.text_encoder_weights
        tried = FORMATS_OF_TEXTS if wanted == "auto" else (wanted,)
        if not self.traced.in_step or trains_whole_text(self.config.method):
            tried = ("native",)
        for self.texts in tried:
            if self.texts != tried[-1] and not self._could_fit(largest, modes, beside):
                continue
            found, profiles, limits = self._search(largest, modes, beside)
            if found:
                break
        return found, profiles, limits

    def _could_fit(self, largest: Shape, modes: tuple[Mode, ...] | None, beside: Beside) -> bool:
        """Whether the least that a step takes fits, found by one trace: all weights elsewhere, nothing kept."""
        stream = self._stream()
        kept_as = self.formats()[-1 if self.rates.unified or stream == 0 else 0][-1]
        tried = ("recompute",) if modes is None else self._tried(modes)[0]
        profiles: Profiles = {kept_as: {mode: self._profile(largest, kept_as, mode) for mode in tried}}
        limits = Limits((kept_as,), modes, stream, offload=self._offload()[-1], beside=beside)
        return smallest(profiles, self.rates, limits, compiled=self.compiled).peak <= self.budget

    def _search(
        self, largest: Shape, modes: tuple[Mode, ...] | None, beside: Beside
    ) -> tuple[list[Choice], Profiles, Limits]:
        """All settings that fit, and what was tried last; slower ways only where those before them do not fit."""
        for formats in self.formats():
            for offload in self._offload():
                limits = Limits(
                    weights=formats,
                    modes=modes,
                    stream=self._stream(),
                    offload=offload,
                    host=self._host(),
                    beside=beside,
                )
                found, profiles = self._fitting(largest, limits)
                if found:
                    break
            if found and (offload or not preferred(found).host):
                break
        return found, profiles, limits

    def _fitting(self, largest: Shape, limits: Limits) -> tuple[list[Choice], Profiles]:
        for tried in self._tried(limits.modes):
            profiles: Profiles = {
                kept_as: {mode: self._profile(largest, kept_as, mode) for mode in tried}
                for kept_as in limits.weights
            }
            found = choices(profiles, self.rates, self.budget, limits, compiled=self.compiled)
            # Nothing takes less than computing all of it again; nothing is faster than keeping all of it.
            if not found or set(preferred(found).settings.modes) == {"keep"}:
                break
        return found, profiles

    def _profile(self, shape: Shape, kept_as: str, mode: Mode) -> Profile:
        return self.traced.profile(shape, kept_as, mode, self.texts)

    @staticmethod
    def _tried(modes: tuple[Mode, ...] | None) -> list[tuple[Mode, ...]]:
        """Settings to trace; those in the middle only where all cannot be kept."""
        if modes is not None:
            return [tuple(dict.fromkeys(modes))]
        return [("recompute", "keep"), ORDER]

    def _modes(self) -> tuple[Mode, ...] | None:
        """One mode per block where they are pinned."""
        wanted = self.config.memory.activations
        return None if wanted == "auto" else tuple(activation_modes(wanted, len(self.known.blocks())))

    def _stream(self) -> float | None:
        wanted = self.config.memory.stream
        return None if wanted == "auto" else float(wanted)

    def _offload(self) -> tuple[bool, ...]:
        """In this order. On a CPU nothing is gained: it is the host."""
        wanted = self.config.memory.offload_activations
        if wanted == "auto":
            return (False, True) if self.traced.cuda and not self.rates.unified else (False,)
        return (wanted,)

    def _host(self) -> int | None:
        """Of the host's free memory some is left to what else runs there; nobody knows that of a card elsewhere."""
        if self.rates.unified:
            return None
        free = self.card.host_gib
        if free is None:
            free = max(HOST_ELSEWHERE, 2 * self.card.gib)
        return int(HOST_SHARE * free * GIB)

    def _captions(self) -> tuple[str, Phase]:
        """The first format of text encoders that fits, or the pinned one."""
        wanted = self.config.memory.text_encoder_weights
        tokens = self.known.prompt_limit
        if self.known.capabilities.prompts_see_references:
            tokens += REFERENCE_TOKENS * max(shape.references for shape in shapes_of(self.config, self.of))
        tried = FORMATS_OF_TEXTS if wanted == "auto" else (wanted,)
        for kept_as in tried:
            family = self.traced.skeleton(parts=TEXT_ENCODERS)
            phase = caption_phase(family, None if kept_as == "native" else kept_as, tokens)
            if phase.peak <= self.budget:
                break
        return kept_as, phase

    def _drawn(self) -> tuple[Beside, Shape | None]:
        """What adapters that do not train and drawn pictures take beside the denoiser, and their shape."""
        adapters = [path for path, _ in frozen_adapters(self.config) if path.is_file()]
        assistant = sum(4 * numbers_in(path) for path in adapters)
        shape = drawn_shape(self.config, self.of)
        if shape is None:
            return Beside(always=assistant), None
        known, vae = self.known, self.traced.skeleton(parts=VAE)
        drawing = self.traced.phase(
            "drawing",
            known,
            shape,
            lambda: drawing_phase(
                self.traced.skeleton(), shape, self.traced.told(shape), cuda=self.traced.cuda
            ),
        )
        decoding = self.traced.phase(
            "decoding", vae, shape, partial(decoding_phase, vae, shape, cuda=self.traced.cuda)
        )
        between = max(drawing.peak - drawing.weights, decoding.peak - decoding.weights)
        if not self.config.sample.prompts:  # pictures that are drawn before training need no VAE in it
            return Beside(always=assistant, between_steps=between + decoding.weights), shape
        return Beside(always=assistant + decoding.weights, between_steps=between), shape

    def _held(self) -> tuple[str, ...]:
        """What a step holds besides, in words."""
        vae = ("the VAE, for samples",) if self.config.sample.prompts else ()
        return (*vae, *(name for _, name in frozen_adapters(self.config)))

    def _timed(self, shape: Shape, best: Choice) -> Timed:
        settings = best.settings
        profiles = {mode: self._profile(shape, settings.weights, mode) for mode in set(settings.modes)}
        choice = evaluate_settings(profiles, settings, self.rates, compiled=self.compiled)
        used = profiles[settings.modes[0]]
        besides = passes_in_words(used.passes, used.turns)
        seconds = choice.seconds * self.config.train.accumulate
        return Timed(shape, tokens_of(shape, self.of), seconds, besides)

    def _fallbacks(self, profiles: Profiles, best: Choice) -> tuple[Choice, ...]:
        """What a loaded model can still change to: other activations, more blocks streamed; weights as they are."""
        settings = best.settings
        wanted = self.config.memory.stream
        limits = Limits(
            (settings.weights,),
            stream=None if wanted == "auto" else settings.stream,
            offload=settings.offload,
            host=self._host(),
        )
        found: list[Choice] = []
        for share in (0.93, 0.85, 0.75):
            budget = int(share * best.peak)
            every = choices(profiles, self.rates, budget, limits, compiled=self.compiled)
            fitting = next((one for one in every if one.settings.stream >= settings.stream), None)
            if fitting is not None and fitting not in found:
                found.append(fitting)
        return tuple(found)

    def _cheaper(self, found: list[Choice], best: Choice) -> tuple[Choice, ...]:
        """The fastest that takes 10 % less, and the fastest that takes 30 % less."""
        wanted = (next((one for one in found if one.peak <= share * best.peak), None) for share in (0.9, 0.7))
        return tuple(dict.fromkeys(one for one in wanted if one is not None))

    def _faster(self, profiles: Profiles, limits: Limits, best: Choice) -> tuple[Choice, ...]:
        """The fastest of all, if memory were no limit, and of those at least 5 % faster the smallest."""
        every = choices(profiles, self.rates, 1 << 62, limits, compiled=self.compiled)
        faster = [one for one in every if one.seconds < 0.95 * best.seconds]
        if not faster:
            return ()
        return tuple(dict.fromkeys([min(faster, key=lambda one: one.peak), faster[0]]))

    def _nothing_fits(
        self, profiles: Profiles, limits: Limits, before: list[tuple[str, int]]
    ) -> BurnishError:
        least = smallest(profiles, self.rates, limits, compiled=self.compiled)
        most = max((least.peak, "training"), *((peak, what) for what, peak in before))
        largest = shapes_of(self.config, self.of)[0]
        remedy = (
            "A smaller number in data.resolutions, train.batch_size: 1, fewer frames; "
            "or leave more of the memory section to `auto`."
        )
        return nothing_fits(self.card, self.budget, most, largest, remedy)


def _caption_rows(captions: tuple[str, Phase] | None) -> tuple[Row, ...]:
    if captions is None:
        return ()
    return (Row("captions", captions[1].peak, f"text encoders ({captions[0]}) and one caption"),)
