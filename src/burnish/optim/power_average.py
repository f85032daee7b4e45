"""Averages over training whose width is chosen afterwards (Karras et al. 2024, arXiv 2312.02696, section 3).

An average with the power-function profile p(s) = (g + 1) / t (s / t)^g of the time s weighs a constant share of the
training so far, however long that is: its width, the deviation of the profile beside t, depends on g alone. An average
of another width is the combination of saved ones whose profile comes next to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LARGEST = 0.28  # width of g = 0, all steps alike, is 0.289


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An average as it was saved: of which width, after how many updates."""

    width: float
    updates: int


def exponent(width: float) -> float:
    """g of a width: the largest root of width^2 = (g + 1) / ((g + 2)^2 (g + 3)) (equation 6 and appendix C.1)."""
    inverse = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def kept_share(width: float, update: int) -> float:
    """What the average keeps of itself in an update, counted from 1: (1 - 1 / t)^(g + 1) (equation 4)."""
    return float((1.0 - 1.0 / update) ** (exponent(width) + 1.0))


def combination(saved: Sequence[Snapshot], wanted: Snapshot) -> tuple[list[float], float]:
    """Shares of saved averages, of sum 1, in the wanted one (algorithm 3), and how far off their profile is, relative.

    The error is the distance of the two profiles beside the norm of the wanted one.
    """
    among = _products(saved, saved)
    across = _products(saved, [wanted])[:, 0]
    itself = _products([wanted], [wanted])[0, 0]
    shares = np.linalg.lstsq(among, across, rcond=None)[0]
    shares /= shares.sum()
    squared = (shares @ among @ shares - 2 * shares @ across + itself) / itself
    return [float(one) for one in shares], float(max(squared, 0.0) ** 0.5)


def _products(rows: Sequence[Snapshot], columns: Sequence[Snapshot]) -> np.ndarray:
    """Inner products of profiles, the integrals of p_a(s) p_b(s) (equation 130)."""
    times = [np.array([float(one.updates) for one in side]) for side in (rows, columns)]
    powers = [np.array([exponent(one.width) for one in side]) for side in (rows, columns)]
    t_a, t_b = times[0][:, None], times[1][None, :]
    g_a, g_b = powers[0][:, None], powers[1][None, :]
    ratio = (t_a / t_b) ** np.where(t_a < t_b, g_b, -g_a)
    found: np.ndarray = (g_a + 1) * (g_b + 1) * ratio / ((g_a + g_b + 1) * np.maximum(t_a, t_b))
    return found
