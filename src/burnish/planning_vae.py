"""The plan of a run that trains a VAE: one phase, and one choice, whether what backward needs is kept."""

from __future__ import annotations

from dataclasses import replace

from burnish.config.method import Vae
from burnish.config.schema import RunConfig
from burnish.memory.activations import Mode
from burnish.planner.choose import Limits, Profiles, choices, evaluate_settings, smallest
from burnish.planner.rates import Card
from burnish.planner.recipe import Shape
from burnish.planning_rows import nothing_fits, training_rows
from burnish.planning_search import Found, fewest_parts
from burnish.planning_shapes import in_parts, parts_of, pictures_of, tokens_of
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
    whole = pictures_of(config, config.method, traced.of)
    wanted = config.memory.activations
    modes = MODES if wanted == "auto" else tuple(one for one in MODES if one == wanted)

    def profiles_of(shape: Shape) -> Profiles:
        return {"native": {mode: traced.vae_profile(shape, mode) for mode in modes}}

    tried = []
    for parts in parts_of(config, whole):
        part = in_parts(whole[0], parts)
        # One block, and nothing of it can be elsewhere.
        limits = Limits(("native",), stream=0.0, parts=part.parts)
        profiles = profiles_of(part)
        fitting = choices(profiles, rates, room, limits, compiled=False)
        tried.append(Found(fitting, profiles, limits, part, "native"))
        if fitting and tried[-1].best.settings.keeps_all:
            break
    fits = [one for one in tried if one.choices]
    found = fewest_parts(fits) if fits else tried[-1]
    if not found.choices:
        least = smallest(found.profiles, rates, found.limits, compiled=False)
        raise nothing_fits(
            card, room, (least.peak, "training"), found.part, "A smaller method.crop, or train.batch_size: 1."
        )
    best = found.best
    less = tuple(one for one in found.choices if one.peak < 0.9 * best.peak)
    every = choices(found.profiles, rates, 1 << 62, found.limits, compiled=False)

    def timed(shape: Shape) -> Timed:
        part = in_parts(shape, best.settings.parts)
        settings = replace(best.settings, parts=part.parts)
        choice = evaluate_settings(profiles_of(part)["native"], settings, rates)
        return Timed(shape, tokens_of(shape, traced.of), choice.seconds * config.train.accumulate)

    return RunPlan(
        family=traced.known.title,
        card=card.title,
        budget=room,
        choice=best,
        compiled=False,
        text_encoder_weights="native",
        rows=training_rows(config, found.profiles, best, rates, found.part),
        times=tuple(timed(shape) for shape in whole),
        steps=config.train.steps,
        accumulate=config.train.accumulate,
        fallbacks=less,
        cheaper=less,
        faster=tuple(one for one in every[:1] if one.seconds < 0.95 * best.seconds),
        notes=tuple(traced.stands_in()),
    )
