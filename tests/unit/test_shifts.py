"""Shifts of timesteps against those of diffusers' pipelines."""

from __future__ import annotations

from math import exp

import pytest
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from burnish.families.shifts import EmpiricalShift


@pytest.mark.parametrize("tokens", [24, 1024, 4096, 4300, 4301, 8192])
@pytest.mark.parametrize("steps", [4, 10, 28, 50, 200])
def test_the_empirical_shift_is_flux2s(tokens: int, steps: int) -> None:
    wanted = compute_empirical_mu(tokens, steps)
    assert EmpiricalShift().mu(tokens, steps) == pytest.approx(wanted, abs=1e-12)
    assert EmpiricalShift().factor(tokens, steps) == pytest.approx(exp(wanted))
