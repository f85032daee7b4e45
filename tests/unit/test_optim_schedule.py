"""The learning-rate curve against torch's and transformers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from burnish.config.optimizers import AdamW
from burnish.config.schedules import AnySchedule
from burnish.optim.build import build_optimizer
from burnish.optim.schedule import apply_learning_rate, learning_rate_factor


def rates_of(scheduler: LRScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def schedule(**options: object) -> AnySchedule:
    return TypeAdapter[AnySchedule](AnySchedule).validate_python(options)


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("end_factor", [0.0, 0.1])
def test_cosine_is_torchs(end_factor: float) -> None:
    section = schedule(kind="cosine", end_factor=end_factor)
    ours = [learning_rate_factor(section, step, 50) for step in range(50)]
    assert ours == pytest.approx(
        rates_of(CosineAnnealingLR(optimizer(), 50, eta_min=end_factor), 50), abs=1e-12
    )


@pytest.mark.parametrize("end_factor", [0.0, 0.25])
def test_linear_is_torchs(end_factor: float) -> None:
    section = schedule(kind="linear", end_factor=end_factor)
    ours = [learning_rate_factor(section, step, 50) for step in range(50)]
    theirs = rates_of(LinearLR(optimizer(), start_factor=1.0, end_factor=end_factor, total_iters=50), 50)
    assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_after_the_warm_up_the_curve_is_transformers(kind: str, reference: object) -> None:
    section = schedule(kind=kind, warmup_steps=10)
    ours = [learning_rate_factor(section, step, 60) for step in range(60)]
    theirs = rates_of(reference(optimizer(), 10, 60), 60)  # type: ignore[operator]
    assert ours[10:] == pytest.approx(theirs[10:], abs=1e-12)
    # in the warm-up ours is one step ahead: theirs spends the first update on a rate of zero
    assert ours[:10] == pytest.approx(theirs[1:11], abs=1e-12)


def test_constant_rises_and_stays() -> None:
    section = schedule(warmup_steps=4)
    assert [learning_rate_factor(section, step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_beyond_the_end_the_rate_stays_at_the_end(kind: str) -> None:
    section = schedule(kind=kind, end_factor=0.3)
    assert learning_rate_factor(section, 100, 100) == pytest.approx(0.3)
    assert learning_rate_factor(section, 500, 100) == pytest.approx(0.3)
    assert math.isfinite(learning_rate_factor(section, 0, 1))


def test_every_group_follows_the_curve_from_its_own_peak() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [Parameter(torch.zeros(1))]},
        {"params": [Parameter(torch.zeros(1))], "lr": 1e-2},
    ]
    built = build_optimizer(AdamW(learning_rate=1e-3), groups)
    apply_learning_rate(built, 0.5)
    apply_learning_rate(built, 0.25)
    assert [group["lr"] for group in built.param_groups] == [0.25e-3, 0.25e-2]
