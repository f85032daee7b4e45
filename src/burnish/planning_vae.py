"""The plan of a run that trains a VAE: one phase, and one choice, whether what backward needs is kept."""

from __future__ import annotations

from burnish.config.method import Vae
from burnish.config.schema import RunConfig
from burnish.memory.activations import Mode
from burnish.planner.choose import Choice, Limits, Profiles, choices, evaluate_settings, preferred, smallest
from burnish.planner.rates import Card
from burnish.planning_rows import nothing_fits, training_rows
from burnish.planning_shapes import pictures_of, tokens_of
from burnish.planning_traces import RunTraces
from burnish.run_plan import RunPlan, Timed, for_torch

MODES: tuple[Mode, ...] = ("recompute", "keep")


def plan_vae(config: RunConfig, card: Card, budget: int | None, *, cuda: bool) -> RunPlan:
    """Trace a step, and keep what backward needs if that fits.

    Raises:
        ModelError: no such weights, and the config names no family whose released sizes could stand in.
        UserError: nothing fits, or the VAE is of a kind that is not trained.
    """
    assert isinstance(config.method, Vae)
    traced, rates, room = RunTraces(config, cuda=cuda), card.rates, for_torch(card, budget)
    shapes = pictures_of(config, config.method, traced.of)
    wanted = config.memory.activations
    modes = MODES if wanted == "auto" else tuple(one for one in MODES if one == wanted)
    # One block, and nothing of it can be elsewhere.
    limits = Limits(("native",), stream=0.0)

    def profiles_of(number: int) -> Profiles:
        return {"native": {mode: traced.vae_profile(shapes[number], mode) for mode in modes}}

    profiles = profiles_of(0)
    found = choices(profiles, rates, room, limits, compiled=False)
    if not found:
        least = smallest(profiles, rates, limits, compiled=False)
        raise nothing_fits(
            card, room, (least.peak, "training"), shapes[0], "A smaller method.crop, or train.batch_size: 1."
        )
    best = preferred(found)
    less = tuple(one for one in found if one.peak < 0.9 * best.peak)
    every = choices(profiles, rates, 1 << 62, limits, compiled=False)

    def timed(number: int) -> Timed:
        choice: Choice = evaluate_settings(profiles_of(number)["native"], best.settings, rates)
        seconds = choice.seconds * config.train.accumulate
        return Timed(shapes[number], tokens_of(shapes[number], traced.of), seconds)

    return RunPlan(
        family=traced.known.title,
        card=card.title,
        budget=room,
        choice=best,
        compiled=False,
        text_encoder_weights="native",
        rows=training_rows(config, profiles, best, rates, shapes[0]),
        times=tuple(timed(number) for number in range(len(shapes))),
        steps=config.train.steps,
        accumulate=config.train.accumulate,
        fallbacks=less,
        cheaper=less,
        faster=tuple(one for one in every[:1] if one.seconds < 0.95 * best.seconds),
        notes=tuple(traced.stands_in()),
    )
