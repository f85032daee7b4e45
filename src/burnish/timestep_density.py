"""The times that a config trains at: drawn as in training, counted, for each size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from burnish.conditioning import Conditioning
from burnish.config.schema import RunConfig
from burnish.data.batch import Batch
from burnish.model import DTYPES, known_model
from burnish.objective import Denoising
from burnish.planning_shapes import shapes_of, tokens_of

DRAWS = 20000


@dataclass(frozen=True, slots=True)
class Density:
    """Where the times of one size lie, or of all where the size makes no difference."""

    size: str
    tokens: int
    shift: float | None  # None of models that are not flows
    shares: tuple[float, ...]  # of the draws in parts of [0, 1] of one length
    quarters: tuple[float, float, float]  # a quarter, half and three quarters of the draws are below


def densities(config: RunConfig, parts: int, draws: int = DRAWS) -> list[Density]:
    """One per size that is trained, the largest first; of the family as released where the weights are not here.

    Raises:
        ModelError: no such weights, and no family is named.
    """
    _, family, _ = known_model(config.model, DTYPES[config.train.precision])
    objective = Denoising.of(config.train.objective, family)
    sizes: dict[tuple[str, int], Density] = {}
    for shape in shapes_of(config, family):
        tokens = tokens_of(shape, family)
        frames = f" x {shape.frames} frames" if shape.frames > 1 else ""
        size = f"{shape.height} x {shape.width}{frames}"
        if (size, tokens) not in sizes:
            sizes[size, tokens] = _density(objective, size, tokens, config.seed, parts, draws)
    found = list(sizes.values())
    if len({(one.shift, one.shares) for one in found}) == 1 and len(found) > 1:
        return [Density("all sizes", 0, found[0].shift, found[0].shares, found[0].quarters)]
    return found


def _density(objective: Denoising, size: str, tokens: int, seed: int, parts: int, draws: int) -> Density:
    names = tuple(f"draw {number}" for number in range(draws))
    batch = Batch(torch.empty(draws, 0), Conditioning({}), torch.ones(draws), names, names, 0)
    t_B = objective.draw_times(batch, seed, tokens).sort().values
    counts: list[int] = torch.histc(t_B, parts, 0.0, 1.0).int().tolist()
    quarters = (float(t_B[draws // 4]), float(t_B[draws // 2]), float(t_B[3 * draws // 4]))
    shift = objective.shift_at(tokens) if objective.schedule.is_flow else None
    return Density(size, tokens, shift, tuple(count / draws for count in counts), quarters)
