"""Muon for matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from burnish.config.optimizers import Muon


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon over weights of two dimensions, torch's AdamW over the others, with one state and list of groups.

    Of a group that has both kinds of weights come two, so that each has the options of its optimizer.
    """

    learned = ()  # neither of the two keeps anything in its groups

    def __init__(self, groups: list[dict[str, Any]], section: Muon) -> None:
        super().__init__([dict(group) for group in groups], {})
        self._inner: list[torch.optim.Optimizer] = []
        if matrices := _part(groups, True):
            self._inner.append(
                torch.optim.Muon(
                    matrices,
                    lr=section.learning_rate,
                    weight_decay=section.weight_decay,
                    momentum=section.momentum,
                    nesterov=section.nesterov,
                    adjust_lr_fn=section.scaling,
                )
            )
        if others := _part(groups, False):
            self._inner.append(
                torch.optim.AdamW(
                    others,
                    lr=section.learning_rate,
                    betas=section.betas,
                    eps=section.eps,
                    weight_decay=section.weight_decay,
                    fused=True,
                )
            )
        self.param_groups = [group for one in self._inner for group in one.param_groups]
        for one in self._inner:
            one.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step both."""
        for one in self._inner:
            one.step()


def _part(groups: list[dict[str, Any]], matrices: bool) -> list[dict[str, Any]]:
    parts = [
        {**group, "params": [one for one in group["params"] if _is_matrix(one) == matrices]}
        for group in groups
    ]
    return [part for part in parts if part["params"]]


def _is_matrix(parameter: Tensor) -> bool:
    """Of two sides longer than 1: a single row has no directions to make alike."""
    return parameter.dim() == 2 and min(parameter.shape) > 1
