"""The learning-rate curve against torch's and transformers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import Parameter
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    PolynomialLR,
)
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from burnish.config.optimizers import AdamW
from burnish.config.schedules import AnySchedule
from burnish.config.shape import alternatives, kind_of
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


def test_restarts_are_torchs_and_transformers() -> None:
    section = schedule(kind="cosine_restarts", cycles=3, end_factor=0.1)
    ours = [learning_rate_factor(section, step, 60) for step in range(60)]
    theirs = rates_of(CosineAnnealingWarmRestarts(optimizer(), 20, eta_min=0.1), 60)
    assert ours == pytest.approx(theirs, abs=1e-12)
    section = schedule(kind="cosine_restarts", cycles=4, warmup_steps=10)
    ours = [learning_rate_factor(section, step, 61) for step in range(61)]
    theirs = rates_of(get_cosine_with_hard_restarts_schedule_with_warmup(optimizer(), 10, 61, 4), 61)
    assert ours[10:] == pytest.approx(theirs[10:], abs=1e-12)
    assert learning_rate_factor(section, 61, 61) == 0.0


def test_polynomial_is_torchs() -> None:
    section = schedule(kind="polynomial", power=3)
    ours = [learning_rate_factor(section, step, 50) for step in range(50)]
    assert ours == pytest.approx(rates_of(PolynomialLR(optimizer(), 50, power=3), 50), abs=1e-12)


def test_warmup_stable_decay_is_transformers() -> None:
    section = schedule(kind="warmup_stable_decay", warmup_steps=10, decay_share=0.25, end_factor=0.1)
    ours = [learning_rate_factor(section, step, 80) for step in range(80)]
    theirs = rates_of(
        get_wsd_schedule(optimizer(), 10, 20, num_training_steps=80, min_lr_ratio=0.1, decay_type="linear"),
        80,
    )
    assert ours[10:] == pytest.approx(theirs[10:], abs=1e-12)
    # a warm-up that leaves less than the fall would take: it falls from the peak all the same
    short = schedule(kind="warmup_stable_decay", warmup_steps=60, decay_share=0.5)
    assert [learning_rate_factor(short, step, 80) for step in (60, 70, 80)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(("warmup", "timescale"), [(0, 30), (40, 30)])
def test_inverse_sqrt_is_transformers(warmup: int, timescale: int) -> None:
    section = schedule(kind="inverse_sqrt", warmup_steps=warmup, timescale=timescale)
    ours = [learning_rate_factor(section, step, 200) for step in range(200)]
    long = max(warmup, timescale)
    # theirs counts the warm-up's steps into the root: its scale is set so that both begin at the peak
    theirs = rates_of(get_inverse_sqrt_schedule(optimizer(), warmup, timescale=long), 200)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    assert learning_rate_factor(section, warmup + long, 10**6) == pytest.approx(2**-0.5)


def test_rex_stays_high_and_falls_late() -> None:
    section = schedule(kind="rex")
    ours = [learning_rate_factor(section, step, 100) for step in range(101)]
    # arXiv 2107.04197, section 4, with z = step / total
    paper = [(1 - step / 100) / (0.5 + 0.5 * (1 - step / 100)) for step in range(101)]
    assert ours == pytest.approx(paper)
    assert all(rate > 1 - step / 100 for step, rate in enumerate(ours) if 0 < step < 100)


ALL = [str(kind_of(member)) for member in alternatives(AnySchedule)]


@pytest.mark.parametrize("kind", ALL)
def test_every_shape_begins_at_the_peak_and_stays_within(kind: str) -> None:
    section = schedule(kind=kind, warmup_share=0.1, end_factor=0.2)
    rates = [learning_rate_factor(section, step, 200) for step in range(260)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20] == pytest.approx(1.0)
    assert all(0.2 - 1e-12 <= rate <= 1.0 for rate in rates[20:])
    if kind not in ("constant", "inverse_sqrt"):
        assert rates[200:] == pytest.approx([0.2] * 60)


def test_a_warm_up_is_given_once() -> None:
    with pytest.raises(ValidationError, match="warmup_steps or warmup_share, not both"):
        schedule(warmup_steps=3, warmup_share=0.1)


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
