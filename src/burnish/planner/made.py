"""What trains in a traced step, its optimizer, and host memory; all on tensors without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from burnish.adapters.attached import AdapterSet, all_at, all_disabled
from burnish.adapters.casting import cast_once
from burnish.adapters.own_weights import OwnWeights
from burnish.adapters.words import NewWord, refuse_known
from burnish.config.method import Word
from burnish.family import Family
from burnish.objective import Denoising
from burnish.optim.one_by_one import OneByOne
from burnish.planner.known_values import Answered
from burnish.planner.recipe import Recipe


def made_trainable(
    family: Family, recipe: Recipe, dtype: torch.dtype
) -> tuple[list[dict[str, Any]], Denoising]:
    """Optimizer groups of what the recipe trains, and the objective with the model as it is without."""
    groups: list[dict[str, Any]] = []
    adapters = []
    for part, chosen in recipe.choices.items():
        module = family.loaded[part]
        if recipe.own_weights:
            groups += OwnWeights.unfreeze(module, chosen).parameter_groups(1e-4)
            continue
        adapter = AdapterSet.attach(module, chosen, dropout=recipe.dropout, seed=0)
        cast_once(module, list(adapter.layers.values()), dtype)
        groups += adapter.parameter_groups(1e-4)
        adapters.append(adapter)
    if recipe.word is not None:
        groups += _taught(family, recipe.word)
    if not adapters:
        return groups, recipe.objective
    as_before, at = partial(all_disabled, adapters), partial(all_at, adapters)
    return groups, replace(recipe.objective, frozen=as_before, strength=at)


def _taught(family: Family, word: Word) -> list[dict[str, Any]]:
    """The word in every vocabulary, with vectors that begin with nothing.

    Raises:
        ConfigError: it is a word already.
    """
    groups: list[dict[str, Any]] = []
    for name, vocabulary in family.vocabularies.items():
        refuse_known(vocabulary, word, name)
        vectors_ND = nn.Parameter(torch.empty(word.vectors, vocabulary.vectors.shape[1]))
        vocabulary.add(word.token, vectors_ND)
        groups += NewWord(vectors_ND, (0.0, 1.0)).parameter_groups(1e-4)
    return groups


def step_as_on_cuda(optimizer: torch.optim.Optimizer) -> None:
    """By lists of tensors and the copies they need, where torch's own optimizers are not told how: so it is on CUDA."""
    single = optimizer.inside if isinstance(optimizer, OneByOne) else []
    for one in (optimizer, *single):
        if isinstance(one, torch.optim.Adafactor):  # goes through them one by one everywhere
            continue
        for group in one.param_groups:
            if group.get("foreach", False) is None and not (
                group.get("fused") or group.get("differentiable")
            ):
                group["foreach"] = True


class Host:
    """Host memory of a trace: rooms whose storages are told apart from the device's."""

    def __init__(self) -> None:
        self.storages: set[int] = set()
        self._rooms: list[Tensor] = []  # alive, so that no other storage takes a place that is noted

    def host_room(self, size: int) -> Tensor:
        room = torch.empty(size, dtype=torch.uint8)
        self._rooms.append(room)
        self.storages.add(room.untyped_storage()._cdata)
        return room

    def device_room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def start(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def finish(self, begun: object) -> None:
        return


def touch_state(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Give the optimizer its state, which it makes at the first step: the second is the one to trace."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with Answered():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
