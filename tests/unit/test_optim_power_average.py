"""Averages of a chosen width: the profile of the paper, and other widths from saved ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from burnish.config.train import Ema as EmaSection
from burnish.optim.ema import Ema
from burnish.optim.power_average import LARGEST, Snapshot, combination, exponent

STEPS = 400


def walk() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return list((0.1 * torch.randn(STEPS, 50, generator=draw)).cumsum(0))


def averages(width: float, at: tuple[int, ...]) -> dict[int, Tensor]:
    """Of the walk, by updates, as training makes them."""
    parameter, found = Parameter(torch.zeros(50)), {}
    ema = Ema({"a": parameter}, 0.99, width)
    for step, value in enumerate(walk(), 1):
        parameter.data.copy_(value)
        ema.update()
        if step in at:
            found[step] = ema.state_dict()[0]["a"].clone()
    return found


def profile(width: float, updates: int, times: np.ndarray) -> np.ndarray:
    g = exponent(width)
    return np.where(times <= updates, (g + 1) * times**g / float(updates) ** (g + 1), 0.0)


def test_exponents_are_those_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_an_average_weighs_each_step_by_the_profile_over_it(width: float) -> None:
    times = np.arange(STEPS + 1)
    shares = np.diff((times / STEPS) ** (exponent(width) + 1))
    middle = times[1:] - 0.5
    mean = (shares * middle).sum()
    assert ((shares * (middle - mean) ** 2).sum() ** 0.5) / STEPS == pytest.approx(width, rel=1e-3)
    expected = (torch.tensor(shares)[:, None] * torch.stack(walk()).double()).sum(0)
    torch.testing.assert_close(averages(width, (STEPS,))[STEPS].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_width_that_was_not_kept_is_made_of_those_that_were() -> None:
    at = (100, 200, 300, 400)
    saved = {(width, step): one for width in (0.05, 0.15) for step, one in averages(width, at).items()}
    shares, off = combination([Snapshot(*key) for key in saved], Snapshot(0.1, STEPS))
    found = sum(share * one for share, one in zip(shares, saved.values(), strict=True))
    expected = averages(0.1, (STEPS,))[STEPS]
    assert off < 0.1
    nearest = min((one - expected).norm() for one in saved.values())
    assert (found - expected).norm() < 0.1 * nearest

    # The least squares of the profiles themselves, on a grid, and how far off they are.
    times = np.linspace(0, STEPS, 400_001)[1:]
    columns = np.stack([profile(*key, times) for key in saved], axis=1)
    wanted = profile(0.1, STEPS, times)
    solved = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    np.testing.assert_allclose(shares, solved / solved.sum(), atol=2e-3)
    distance = np.linalg.norm(columns @ shares - wanted) / np.linalg.norm(wanted)
    assert off == pytest.approx(distance, abs=2e-3)


def test_one_that_was_saved_is_itself() -> None:
    saved = [Snapshot(0.1, 200), Snapshot(0.1, 400)]
    shares, off = combination(saved, saved[1])
    assert shares == pytest.approx([0.0, 1.0], abs=1e-9)
    assert off < 1e-6


def test_decay_and_width_exclude_each_other() -> None:
    assert EmaSection(width=0.1).width == 0.1
    with pytest.raises(ValueError, match="decay or width"):
        EmaSection(width=0.1, decay=0.9)
    with pytest.raises(ValueError, match=str(LARGEST)):
        EmaSection(width=0.29)
