"""Schedule-free optimizers keep their average between the steps: gradients are taken at y, the average is x."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    return any("train_mode" in group for group in optimizer.param_groups)


@contextmanager
def averaged_point(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The parameters hold the average inside, and afterwards exactly what they held before.

    They are put back from a copy: the way back by formula, x + (1 - beta) (z - x), would round, and a run that saves
    would end in other bits than one that does not.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    before = [one.detach().clone() for one in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True
