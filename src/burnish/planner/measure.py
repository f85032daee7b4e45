"""Profiles of a model's training step in each setting that the plan chooses among."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from burnish.adapters.lora import ModuleChoice
from burnish.errors import AdapterError
from burnish.family import Family
from burnish.planner.depth import SHALLOW, deepened, runs_of, stands_for
from burnish.planner.profile import Profile
from burnish.planner.trace import Recipe, Shape, trace_step

Skeleton = Callable[[int | None], Family]
Choose = Callable[[Family], Mapping[str, Mapping[str, ModuleChoice]]]


def profile_step(skeleton: Skeleton, choose: Choose, shape: Shape, recipe: Recipe) -> Profile:
    """One step's profile at the full depth, from a shallow model where that stands for the deep one.

    Args:
        skeleton: the family without weights, of so many repeats of each block, None for all.
        choose: the modules that train.
        recipe: its `choices` are replaced by what `choose` gives.
    """
    deep = skeleton(None)
    chosen = choose(deep)
    deep_runs = runs_of(deep, chosen)
    shallow = skeleton(SHALLOW)
    try:
        few = choose(shallow)
    except AdapterError:  # a pattern that names a block by a number which the shallow model lacks
        return trace_step(lambda: deep, shape, replace(recipe, choices=chosen))
    shallow_runs = runs_of(shallow, few)
    if not stands_for(shallow_runs, deep_runs):
        return trace_step(lambda: deep, shape, replace(recipe, choices=chosen))
    traced = trace_step(lambda: shallow, shape, replace(recipe, choices=few))
    return deepened(traced, shallow_runs, deep_runs)
