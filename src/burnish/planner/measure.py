"""Profiles of a model's training step in each setting that the plan chooses among."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from burnish.errors import UserError
from burnish.family import Family
from burnish.planner.depth import SHALLOW, Run, deepened, runs_of, stands_for
from burnish.planner.profile import Profile
from burnish.planner.recipe import Recipe, Shape
from burnish.planner.trace import trace_step

Choices = Mapping[str, Mapping[str, Any]]


@dataclass
class Measure:
    """One model's steps.

    Args:
        skeleton: the family without weights, of so many repeats of each block, None for all.
        choose: what trains, as in `Recipe.choices`.
    """

    skeleton: Callable[[int | None], Family]
    choose: Callable[[Family], Choices]

    def profile(self, shape: Shape, recipe: Recipe, *, cuda: bool = True) -> Profile:
        """A step's profile at the full depth; `recipe.choices` are replaced by what `choose` gives."""
        depth, shallow_runs, choices = self._stand_in
        if depth is None:
            return trace_step(lambda: self.skeleton(None), shape, replace(recipe, choices=choices), cuda=cuda)
        traced = trace_step(lambda: self.skeleton(depth), shape, replace(recipe, choices=choices), cuda=cuda)
        return deepened(traced, shallow_runs, self._deep[0])

    @cached_property
    def _deep(self) -> tuple[list[Run], Choices]:
        family = self.skeleton(None)
        choices = self.choose(family)
        return runs_of(family, choices), choices

    @cached_property
    def _stand_in(self) -> tuple[int | None, list[Run], Choices]:
        """A depth at which the model stands for the whole one; None where there is none."""
        runs, choices = self._deep
        for depth in (SHALLOW, SHALLOW + 1):  # the last of some runs is of its own kind
            shallow = self.skeleton(depth)
            try:
                few = self.choose(shallow)
            except UserError:  # a pattern that names a block by a number which the shallow model lacks
                continue
            shallow_runs = runs_of(shallow, few)
            if stands_for(shallow_runs, runs):
                return depth, shallow_runs, few
        return None, runs, choices
