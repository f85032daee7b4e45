"""Rules by which timesteps are shifted that are more than a line in the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, floor, sqrt


class EmpiricalShift:
    """The shift that FLUX.2 was found to want: linear in tokens at 10 and at 200 steps, and linear between these.

    `compute_empirical_mu` of `src/flux2/sampling.py`, with its constants.
    """

    def mu(self, tokens: int, steps: int) -> float:
        many = 0.00016927 * tokens + 0.45666666  # at 200 steps
        if tokens > 4300:
            return many
        few = 8.73809524e-05 * tokens + 1.89833333  # at 10 steps
        slope = (many - few) / 190
        return slope * steps + many - 200 * slope

    def factor(self, tokens: int, steps: int) -> float:
        return exp(self.mu(tokens, steps))


@dataclass(frozen=True, slots=True)
class RootShift:
    """The shift of CogView4: it grows with the side of the picture, not with its area.

    `calculate_shift` of diffusers' `pipeline_cogview4.py`; mu is the shift itself (`time_shift_type: linear`).
    """

    base_tokens: int = 256
    base_shift: float = 0.25
    max_shift: float = 0.75

    def mu(self, tokens: int, steps: int) -> float:
        return self.base_shift + self.max_shift * sqrt(tokens / self.base_tokens)

    def factor(self, tokens: int, steps: int) -> float:
        return self.mu(tokens, steps)


def along(released: Sequence[float], tokens: int, steps: int) -> list[float]:
    """The sigmas that a distilled model was made for, whatever the size; in other steps, evenly along them."""
    if steps == 1:
        return [released[0]]
    found = []
    for step in range(steps):
        place = step * (len(released) - 1) / (steps - 1)
        before = min(floor(place), len(released) - 2)
        found.append(released[before] + (place - before) * (released[before + 1] - released[before]))
    return found
