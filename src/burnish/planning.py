"""From a config to a plan: what the run will take, and the settings that fit. Loads no weights and needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from burnish.config.method import Vae
from burnish.config.schema import RunConfig
from burnish.errors import BurnishError
from burnish.optim.build import check_optimizer, state_bytes
from burnish.placement import Part
from burnish.planner.choose import Beside, Choice, evaluate_settings, smallest
from burnish.planner.lesson import passes_in_words
from burnish.planner.phases import (
    VAE,
    Phase,
    caption_phase,
    decoding_phase,
    drawing_phase,
    encoding_phase,
)
from burnish.planner.rates import GIB, Card, Rates
from burnish.planner.recipe import Shape
from burnish.planning_rows import frozen_adapters, nothing_fits, sample_rows, size_in_words, training_rows
from burnish.planning_search import FORMATS_OF_TEXTS, Found, Search
from burnish.planning_shapes import drawn_shape, in_parts, numbers_in, shapes_of, tokens_of
from burnish.planning_traces import RunTraces
from burnish.planning_vae import plan_vae
from burnish.run_plan import Row, RunPlan, Timed, for_torch
from burnish.trained import own_weights

WORTH_COMPILING = 300  # micro-steps
REFERENCE_TOKENS = 1369  # of a picture that a text encoder sees: a megapixel in patches of 28 x 28
TEXT_ENCODERS: frozenset[Part] = frozenset({"text_encoders"})


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

    def plan(self) -> RunPlan:
        shapes = shapes_of(self.config, self.of)
        largest = shapes[0]
        captions = None if self.traced.in_step else self._captions()
        vae = self.traced.skeleton(parts=VAE)
        pictures = self.traced.phase(
            "encoding", vae, largest, partial(encoding_phase, vae, largest, cuda=self.traced.cuda)
        )
        drawn = self._drawn()
        search = Search(self.traced, self.card, self.budget, compiled=self.compiled, beside=drawn[0])
        found = search.found(shapes)
        before = [("the VAE", pictures.peak)]
        if captions is not None:
            before.append(("text encoders", captions[1].peak))
        if not found.choices or max(peak for _, peak in before) > self.budget:
            raise self._nothing_fits(found, before)
        best, profiles = found.best, found.profiles
        texts = found.texts if self.traced.in_step else None
        rows = (
            *_caption_rows(captions),
            Row("pictures", pictures.peak, f"the VAE and one of {size_in_words(largest)}"),
            *training_rows(
                self.config, profiles, best, self.rates, found.part, drawn[0], self._held(), texts
            ),
            *sample_rows(profiles, best, self.rates, *drawn),
        )
        return RunPlan(
            family=self.known.title,
            card=self.card.title,
            budget=self.budget,
            choice=best,
            compiled=self.compiled,
            text_encoder_weights=found.texts if captions is None else captions[0],
            rows=rows,
            times=tuple(self._timed(shape, best, found.texts) for shape in shapes),
            steps=self.config.train.steps,
            accumulate=self.config.train.accumulate,
            fallbacks=search.fallbacks(found),
            cheaper=found.cheaper,
            faster=search.faster(found),
            notes=tuple(self.notes),
        )

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

    def _timed(self, shape: Shape, best: Choice, texts: str) -> Timed:
        wanted = self.config.memory.batch_parts
        part = in_parts(shape, best.settings.parts if wanted == "auto" else wanted)
        settings = replace(best.settings, parts=part.parts)
        profiles = {
            mode: self.traced.profile(part, settings.weights, mode, texts) for mode in set(settings.modes)
        }
        choice = evaluate_settings(profiles, settings, self.rates, compiled=self.compiled)
        used = profiles[settings.modes[0]]
        besides = passes_in_words(used.passes, used.turns)
        seconds = choice.seconds * self.config.train.accumulate
        return Timed(shape, tokens_of(shape, self.of), seconds, besides)

    def _nothing_fits(self, found: Found, before: list[tuple[str, int]]) -> BurnishError:
        least = smallest(found.profiles, self.rates, found.limits, compiled=self.compiled)
        most = max((least.peak, "training"), *((peak, what) for what, peak in before))
        remedy = (
            "A smaller number in data.resolutions, train.batch_size: 1, fewer frames; "
            "or leave more of the memory section to `auto`."
        )
        if found.part.batch > 1 and self.config.memory.batch_parts != "auto":
            # Also where it is that of the run's first start.
            remedy = f"More parts: memory.batch_parts: {found.part.batch * found.part.parts}. " + remedy
        return nothing_fits(self.card, self.budget, most, found.part, remedy)


def _caption_rows(captions: tuple[str, Phase] | None) -> tuple[Row, ...]:
    if captions is None:
        return ()
    return (Row("captions", captions[1].peak, f"text encoders ({captions[0]}) and one caption"),)
