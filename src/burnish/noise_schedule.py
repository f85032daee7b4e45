"""How noise is mixed in, what is predicted, and how a released model draws.

Data is at t = 0, noise at t = 1. A flow mixes x_t = (1 - t) * data + t * noise and predicts velocity = noise - data. An
older model mixes x_t = sqrt(alpha_bar) * data + sqrt(1 - alpha_bar) * noise at index t * steps (1000, as a rule) and
predicts epsilon or v.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, Literal, Protocol

from torch import Tensor

from burnish.conditioning import Conditioning

Prediction = Literal["velocity", "epsilon", "v"]


class TokenShift(Protocol):
    """A timestep shift that depends on the number of tokens, and for some models on the number of steps."""

    def mu(self, tokens: int, steps: int) -> float:
        """What diffusers' scheduler calls mu."""
        ...

    def factor(self, tokens: int, steps: int) -> float:
        """The shift s of t -> s t / (1 + (s - 1) t) that this comes to."""
        ...


@dataclass(frozen=True, slots=True)
class ResolutionShift:
    """Timestep shift that grows with the number of tokens: mu linear in tokens, the shift exp(mu) or mu itself.

    Stable Diffusion 3 paper (arXiv 2403.03206), section 5.3.2; constants as released with each model.
    """

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    exponential: bool = True

    def mu(self, tokens: int, steps: int = 0) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (tokens - self.base_tokens)

    def factor(self, tokens: int, steps: int = 0) -> float:
        mu = self.mu(tokens, steps)
        return exp(mu) if self.exponential else mu


@dataclass(frozen=True, slots=True)
class Schedule:
    """How noise is mixed in, what the denoiser predicts, and how the released model samples."""

    prediction: Prediction
    scheduler: Mapping[str, Any]  # diffusers scheduler config, `_class_name` included
    alphas_cumprod: Tensor | None = None  # (steps,) float64 for epsilon and v; None for a flow
    shift: float | TokenShift = 1.0  # timestep shift of a flow, as released
    # Sigmas of a flow before the shift: 1 to 1/steps; 1 to 1/1000 in whole thousandths; or the scheduler's own.
    spacing: Literal["linear", "thousandths", "scheduler"] = "linear"
    # In place of both in sampling: tokens and steps -> sigmas as they come after the shift.
    sigmas: Callable[[int, int], Sequence[float]] | None = None
    times: tuple[float, float] = (0.0, 1.0)  # those that the loaded denoisers are for; training keeps to them

    @property
    def is_flow(self) -> bool:
        return self.alphas_cumprod is None

    @property
    def steps(self) -> int:
        """Steps of the noise schedule: what a scheduler's timestep is divided by to give t."""
        return 1000 if self.alphas_cumprod is None else len(self.alphas_cumprod)


Guide = Callable[[Tensor, Tensor, Tensor], Tensor]


def classifier_free_guidance(with_prompt: Tensor, without: Tensor, scale: Tensor) -> Tensor:
    """arXiv 2207.12598, as diffusers writes it: a scale of 1 is no guidance. `scale` broadcasts over the batch."""
    return without + scale * (with_prompt - without)


@dataclass(frozen=True, slots=True)
class SamplerDefaults:
    steps: int
    guidance: float  # classifier-free guidance, or the embedded guidance where the model has one
    size: tuple[int, int]
    negative_prompt: bool  # classifier-free guidance is how this model is meant to run
    frames: int = 1
    fps: float = 0.0  # of clips; 0 for still pictures
    guide: Guide = classifier_free_guidance
    guides_above: float = 1.0  # scales up to this one take no second pass
    # In place of `guide`: what the prompts say -> the rule of one run, which may remember its steps.
    guide_of: Callable[[Conditioning], Guide] | None = None
    # In place of plain noise: noise (B, C, ...) and what the denoiser is told -> the latents that drawing begins with.
    begin: Callable[[Tensor, Conditioning], Tensor] | None = None
    # With guidance and references: by how much these guide, too, counted by the usual rule from a third pass with the
    # prompt and without them. None: there is no such pass.
    reference_guidance: float | None = None
