"""From a config to a plan: what the run will take, and the settings that fit. Loads no weights and needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from burnish.config.method import Full, TextualInversion, Vae, trains_text, trains_whole_text
from burnish.config.schema import RunConfig
from burnish.errors import BurnishError, UserError
from burnish.family import Part
from burnish.memory.activations import ORDER, Mode, activation_modes
from burnish.optim.build import check_optimizer, state_bytes
from burnish.planner.choose import (
    Beside,
    Choice,
    Limits,
    Profiles,
    Settings,
    choices,
    evaluate,
    preferred,
    smallest,
    with_offload,
)
from burnish.planner.phases import (
    VAE,
    Phase,
    caption_phase,
    decoding_phase,
    drawing_phase,
    encoding_phase,
    trained_texts,
)
from burnish.planner.profile import Profile, step_of
from burnish.planner.rates import GIB, Card, Rates
from burnish.planner.trace import Shape
from burnish.planning_shapes import drawn_shape, numbers_in, passes_besides, shapes_of, tokens_of
from burnish.planning_traces import RunTraces
from burnish.run_plan import Row, RunPlan, Timed
from burnish.trained import own_weights

# Outside of what torch counts: CUDA's context and its libraries' workspaces, and what the allocator cannot hand out.
CONTEXT = int(0.5 * GIB)
FRAGMENTED = int(0.4 * GIB)
WORTH_COMPILING = 300  # micro-steps
REFERENCE_TOKENS = 1369  # of a picture that a text encoder sees: a megapixel in patches of 28 x 28
CLIP_TOKENS = 77
HOST_ELSEWHERE = 32  # GiB of host memory, or twice the card's, where the card is not here
HOST_SHARE = 0.7  # of free host memory may be taken; pinned pages cannot be swapped
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
        UserError: nothing fits, or the method is not planned.
        MissingPackage: the optimizer's library is not here.
    """
    if isinstance(config.method, TextualInversion):
        raise UserError(
            "textual inversion is not planned yet: its steps hold the text encoders, too",
            remedy="It takes what an adapter's run takes with memory.activations: recompute, and the text encoders.",
        )
    if trains_whole_text(config.method):
        raise UserError(
            "full fine-tuning with text encoders is not planned: its steps hold and train those, too",
            remedy="`burnish plan` without method.text_encoders plans the denoiser's part; CLIP-L adds about 1.4 GiB, "
            "CLIP-G 7.8 GiB with AdamW and stochastic rounding.",
        )
    if isinstance(config.method, Vae):
        raise UserError(
            "training a VAE is not planned: its steps hold neither denoiser nor text encoders",
            remedy="Start with method.crop: 256 and train.batch_size: 1; memory.activations: recompute takes less.",
        )
    return _Planner(config, card, budget, cuda, can_compile).plan()


class _Planner:
    def __init__(
        self, config: RunConfig, card: Card, budget: int | None, cuda: bool, can_compile: bool
    ) -> None:
        self.config, self.card = config, card
        # Before anything is traced: what a library makes of numbers when it is first used must have values.
        check_optimizer(config.train.optimizer)
        self.rates: Rates = card.rates
        self.budget = (int(card.gib * GIB) if budget is None else budget) - CONTEXT - FRAGMENTED
        self.traced = RunTraces(config, cuda=cuda)
        self.known, self.of = self.traced.known, self.traced.of
        wanted = config.memory.compile
        self.compiled = (can_compile and self._is_long()) if wanted == "auto" else wanted
        self.notes: list[str] = []
        self.texts = 0  # bytes of text encoders that train
        if not self.traced.is_here:
            count = sum(one.numel() for part in self.known.denoisers.values() for one in part.parameters())
            self.notes.append(
                f"{config.model.path} is not here: sizes are those of a released {self.known.title} of "
                f"{count / 1e9:.1f} billion parameters"
            )

        if config.memory.offload_optimizer:
            self.notes.append(self._moved())
        self.notes += passes_besides(config)

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
        captions = self._captions()
        self.texts = self._trained_texts(captions[1], largest.batch)
        vae = self.traced.skeleton(parts=VAE)
        pictures = self.traced.phase(
            "encoding", vae, largest, partial(encoding_phase, vae, largest, cuda=self.traced.cuda)
        )
        drawn = self._drawn()
        found, profiles, limits = self._search(largest, modes, drawn[0])
        if not found or pictures.peak > self.budget or captions[1].peak > self.budget:
            raise self._nothing_fits(profiles, limits, captions[1], pictures)
        best = preferred(found)
        rows = (
            Row("captions", captions[1].peak, f"text encoders ({captions[0]}) and one caption"),
            Row("pictures", pictures.peak, f"the VAE and one of {_size(largest)}"),
            *self._training_rows(profiles, best, largest, drawn[0]),
            *self._sample_rows(profiles, best, drawn),
        )
        return RunPlan(
            family=self.known.title,
            card=self.card.title,
            budget=self.budget,
            choice=best,
            compiled=self.compiled,
            text_encoder_weights=captions[0],
            rows=rows,
            times=tuple(self._timed(shape, best) for shape in shapes),
            steps=self.config.train.steps,
            accumulate=self.config.train.accumulate,
            fallbacks=self._fallbacks(profiles, best),
            cheaper=self._cheaper(found, best),
            faster=self._faster(profiles, limits, best),
            notes=tuple(self.notes),
        )

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
                kept_as: {mode: self.traced.profile(largest, kept_as, mode) for mode in tried}
                for kept_as in limits.weights
            }
            found = choices(profiles, self.rates, self.budget, limits, compiled=self.compiled)
            if found and set(preferred(found).settings.modes) == {"keep"}:
                break
        return found, profiles

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
        tried = ("native", "int8", "nf4") if wanted == "auto" else (wanted,)
        for kept_as in tried:
            family = self.traced.skeleton(parts=TEXT_ENCODERS)
            phase = caption_phase(family, None if kept_as == "native" else kept_as, tokens)
            if phase.peak <= self.budget:
                break
        return kept_as, phase

    def _trained_texts(self, phase: Phase, batch: int) -> int:
        method = self.config.method
        if isinstance(method, Full | TextualInversion | Vae) or not trains_text(method):
            return 0
        section, clips = method.text_encoders, self.known.export.text_encoders
        tokens = {}
        if method.word is not None:
            tokens = dict.fromkeys(self.known.export.vocabularies, self.known.prompt_limit * batch)
        for part, name in clips.items():
            if section is not None and (not section.which or name in section.which):
                tokens[part] = CLIP_TOKENS * batch
        tokens |= {part: CLIP_TOKENS * batch for part in clips if part in tokens}
        found = trained_texts(self.traced.skeleton(parts=TEXT_ENCODERS), phase.weights, tokens)
        self.notes.append(
            f"text encoders that train stay on the device: {found / GIB:.1f} GiB, what their backward keeps by a "
            "rule; their seconds are not counted"
        )
        return found

    def _drawn(self) -> tuple[Beside, Shape | None]:
        """What adapters that do not train and drawn pictures take beside the denoiser, and their shape."""
        adapters = [path for path, _ in self._frozen_adapters() if path.is_file()]
        assistant = sum(4 * numbers_in(path) for path in adapters) + self.texts
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

    def _training_rows(
        self, profiles: Profiles, best: Choice, largest: Shape, beside: Beside
    ) -> tuple[Row, ...]:
        settings = best.settings
        used = profiles[settings.weights][settings.modes[0]]
        step = self._evaluated(profiles[settings.weights], settings, Beside(always=beside.always))
        kept = ", ".join(f"{count} x {mode}" for mode, count in settings.kept.items())
        if best.waiting:
            kept += f", {best.waiting / GIB:.1f} GiB of it in host memory until backward"
        weights = sum(used.weights) + used.weights_outside
        trained = sum(used.trained) + used.trained_outside
        where = "" if not best.host else f"; {best.host / GIB:.1f} GiB of them in host memory"
        return (
            Row("  weights", weights - best.host, f"frozen, {settings.weights}{where}"),
            Row("  trained", trained, self._trained_in_words()),
            Row(
                "  activations",
                max(0, step.peak - (weights - best.host) - trained - beside.always),
                f"{kept}; batch {largest.batch} of {_size(largest)}, gradients",
            ),
            Row("training", step.peak, "all of these" + self._held_besides()),
        )

    def _trained_in_words(self) -> str:
        memory = self.config.memory
        what = "weights" if isinstance(self.config.method, Full) else "adapter"
        average = ", their average" if self.config.train.ema is not None else ""
        return f"{what}{average}" + ("" if memory.offload_optimizer else ", the optimizer's state")

    def _frozen_adapters(self) -> list[tuple[Path, str]]:
        """Those beside the weights; a base adapter is merged into weights that are kept as they are."""
        model = self.config.model
        found = [] if model.training_adapter is None else [(model.training_adapter, "the training adapter")]
        if model.base_adapter is not None and self.config.memory.weights != "native":
            found.append((model.base_adapter, "the base adapter"))
        return found

    def _held_besides(self) -> str:
        held = [
            *(["the VAE, for samples"] if self.config.sample.prompts else []),
            *(["text encoders"] if self.texts else []),
            *(name for _, name in self._frozen_adapters()),
        ]
        return "".join(f" and {one}" for one in held)

    def _sample_rows(
        self, profiles: Profiles, best: Choice, drawn: tuple[Beside, Shape | None]
    ) -> tuple[Row, ...]:
        """Samples are drawn between steps, when of a step only its fixed parts are there."""
        beside, shape = drawn
        if shape is None:
            return ()
        settings = best.settings
        used = profiles[settings.weights][settings.modes[0]]
        alone = self._evaluated(profiles[settings.weights], settings, Beside())
        table = with_offload(profiles[settings.weights], settings.offload)
        streamed = step_of([table[mode] for mode in settings.modes]).peak - alone.peak
        level = used.first_level + beside.between_steps + beside.always - streamed
        return (Row("samples", level, f"weights, the VAE and one of {_size(shape)}"),)

    def _evaluated(self, profiles: Mapping[Mode, Profile], settings: Settings, beside: Beside) -> Choice:
        return evaluate(
            with_offload(profiles, settings.offload),
            settings.weights,
            settings.modes,
            settings.streamed,
            self.rates,
            compiled=self.compiled,
            offload=settings.offload,
            beside=beside,
        )

    def _timed(self, shape: Shape, best: Choice) -> Timed:
        settings = best.settings
        profiles = {mode: self.traced.profile(shape, settings.weights, mode) for mode in set(settings.modes)}
        choice = self._evaluated(profiles, settings, Beside())
        return Timed(shape, tokens_of(shape, self.of), choice.seconds * self.config.train.accumulate)

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
        self, profiles: Profiles, limits: Limits, captions: Phase, pictures: Phase
    ) -> BurnishError:
        least = smallest(profiles, self.rates, limits, compiled=self.compiled)
        most = max((least.peak, "training"), (captions.peak, "text encoders"), (pictures.peak, "the VAE"))
        largest = shapes_of(self.config, self.of)[0]
        return UserError(
            f"nothing fits into {(self.budget + CONTEXT + FRAGMENTED) / GIB:.1f} GiB on {self.card.title}: {most[1]} "
            f"take at least {(most[0] + CONTEXT + FRAGMENTED) / GIB:.1f} GiB at {_size(largest)}",
            remedy="A smaller number in data.resolutions, train.batch_size: 1, fewer frames; "
            "or leave more of the memory section to `auto`.",
        )


def _size(shape: Shape) -> str:
    return f"{shape.height}x{shape.width}" + (f", {shape.frames} frames" if shape.frames > 1 else "")
