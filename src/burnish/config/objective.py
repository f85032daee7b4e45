"""Config of what is learned: times, noise, target, loss and its weights."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from burnish.config.section import Section, default_kind

Time = Annotated[float, Field(ge=0, le=1)]


class UniformTimesteps(Section):
    """All times alike."""

    kind: Literal["uniform"] = "uniform"


class LogitNormalTimesteps(Section):
    """Sigmoid of a normal: most in the middle (arXiv 2403.03206)."""

    kind: Literal["logit_normal"]
    mean: float = Field(0.0, ge=-10, le=10, description="Positive leans to noise.")
    std: float = Field(1.0, gt=0, le=10, description="Spread.")


class SigmoidTimesteps(Section):
    """Sigmoid of scaled standard noise, as ai-toolkit and kohya name it: logit-normal of mean 0."""

    kind: Literal["sigmoid"]
    scale: float = Field(1.0, gt=0, le=10, description="Larger spreads towards both ends.")


class BetaTimesteps(Section):
    """The beta law: density t^(alpha - 1) (1 - t)^(beta - 1)."""

    kind: Literal["beta"]
    alpha: float = Field(2.0, gt=0.05, le=50, description="Above `beta` leans to noise.")
    beta: float = Field(2.0, gt=0.05, le=50, description="Above `alpha` leans to clean.")


class ModeTimesteps(Section):
    """Mode sampling with heavy tails of Stable Diffusion 3 (arXiv 2403.03206, equation 20): no time is rare."""

    kind: Literal["mode"]
    scale: float = Field(
        1.29, ge=-1, le=1.75, description="Above 0 gathers times in the middle, below at the ends."
    )


class CosMapTimesteps(Section):
    """CosMap of Stable Diffusion 3 (arXiv 2403.03206, equation 21): a flow at the noise levels of a cosine schedule."""

    kind: Literal["cosmap"]


AnyTimesteps = Annotated[
    UniformTimesteps
    | LogitNormalTimesteps
    | SigmoidTimesteps
    | BetaTimesteps
    | ModeTimesteps
    | CosMapTimesteps,
    Field(discriminator="kind"),
    default_kind("uniform"),
]


class Emphasis(Section):
    """A part of the times that is drawn more or less often, or counts for more or less."""

    times: tuple[Time, Time] = Field(description="From, to: as they are in training, after shift and range.")
    drawn: float = Field(
        1.0, ge=0.01, le=100, description="Times in it are drawn so many times as often as they would be."
    )
    weight: float = Field(1.0, ge=0, le=100, description="Factor of the loss there.")

    @model_validator(mode="after")
    def times_must_rise(self) -> Self:
        if self.times[0] >= self.times[1]:
            raise ValueError(f"times must rise; got {self.times[0]} to {self.times[1]}")
        return self


class MinSnr(Section):
    """Min-SNR (arXiv 2303.09556): clean times, of which there is little to learn, count for less."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = Field(5.0, gt=0, le=100, description="Ratio of signal to noise from which they do.")


class SoftMinSnr(Section):
    """Min-SNR without its corner (arXiv 2401.11605)."""

    kind: Literal["soft_min_snr"]
    gamma: float = Field(4.0, gt=0, le=100, description="Ratio of signal to noise around which it bends.")


class Debiased(Section):
    """Debiased estimation (arXiv 2310.08442): noisy times, which decide composition, count for more."""

    kind: Literal["debiased"]


class P2(Section):
    """Perception prioritized weighting (arXiv 2204.00227): the clean-up of the last details counts for less."""

    kind: Literal["p2"]
    gamma: float = Field(1.0, gt=0, le=10, description="How strongly.")
    snr_offset: float = Field(
        1.0, gt=0, le=100, description="The paper's k: keeps the weight of noisy times finite."
    )


class Bell(Section):
    """A bell over the times, 1 on average: the middle counts for more, as for several released flow models."""

    kind: Literal["bell"]


AnyWeighting = Annotated[
    MinSnr | SoftMinSnr | Debiased | P2 | Bell, Field(discriminator="kind"), default_kind("min_snr")
]


class Squared(Section):
    """Squared error: what diffusion models are made with."""

    kind: Literal["mse"] = "mse"


class Absolute(Section):
    """Absolute error: no single place counts for much; pictures come out smoother."""

    kind: Literal["mae"]


class LogCosh(Section):
    """Twice the logarithm of the hyperbolic cosine: squared for small errors, absolute for large ones."""

    kind: Literal["log_cosh"]


class _Bent(Section):
    """Squared below an error of about `delta`, absolute above: pictures that do not belong do less harm."""

    delta: float = Field(0.1, gt=0, le=10, description="Where the one becomes the other.")
    decay: Literal["none", "exponential", "snr"] = Field(
        "exponential",
        description="`delta` is that of pure noise; at cleaner times it grows to 1, exponentially in the time or with "
        "the ratio of signal to noise (arXiv 2403.16728), or is the same everywhere: none.",
    )


class Huber(_Bent):
    """Huber's loss, twice: the square up to `delta`, then a straight line."""

    kind: Literal["huber"]


class PseudoHuber(_Bent):
    """The smooth form of Huber's loss, scaled so that a large `delta` gives the square (arXiv 2403.16728)."""

    kind: Literal["pseudo_huber"]


class SmoothL1(_Bent):
    """Huber's loss over `delta`: lines of one slope whatever `delta`."""

    kind: Literal["smooth_l1"]


AnyLoss = Annotated[
    Squared | Absolute | LogCosh | Huber | PseudoHuber | SmoothL1,
    Field(discriminator="kind"),
    default_kind("mse"),
]


class Multires(Section):
    """Multi-resolution (pyramid) noise: coarser noise on top of the fine one, scaled back to a variance of one."""

    levels: int = Field(6, ge=1, le=16, description="How many coarser ones, at most.")
    discount: float = Field(
        0.3, gt=0, lt=1, description="Strength of each level over that of the one before."
    )


class Objective(Section):
    """What is learned: noise, time, target, weighting."""

    timesteps: AnyTimesteps | None = Field(
        None, description="How times are drawn; sigmoid for flow models and uniform for older ones if absent."
    )
    range: tuple[Time, Time] = Field(
        (0.0, 1.0), description="Squeeze times into this part of [0, 1]; 0 is clean, 1 is noise."
    )
    shift: float | Literal["family", "resolution"] = Field(
        1.0,
        description="Move times of a flow toward noise: a number (1 moves nothing), `family` for what the "
        "model was released with, `resolution` to grow with the picture's size.",
    )
    emphasis: list[Emphasis] = Field(
        [],
        max_length=32,
        description="Parts of the times to draw more often, or to weigh more; where several hold a time their factors "
        "multiply. `burnish config show CONFIG --timesteps` draws what comes out.",
    )
    weighting: AnyWeighting | None = Field(
        None,
        description="Weight of the loss by the ratio of signal to noise; the same at all times if absent.",
    )
    loss: AnyLoss = Field(
        default_factory=Squared, description="Distance of the prediction from its target; held-out: mse."
    )
    noise_offset: float = Field(
        0.0, ge=0, le=1, description="Lets epsilon models learn dark and bright pictures."
    )
    multires: Multires | None = Field(None, description="Noise with coarser noise on top; off if absent.")
    input_perturbation: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Strength of further noise in what the model sees but not in what it is to say (arXiv 2301.11706); "
        "0.1 is usual.",
    )
    guidance: float | Literal["bypass"] = Field(
        1.0,
        description="Value for a guidance embedding (FLUX.1-dev); `bypass` trains without the embedding. "
        "No effect on models that have none.",
    )
    guided_target: float | None = Field(
        None,
        gt=1,
        le=50,
        description="Learn what guidance of this scale would make of the target, for models that have guidance built "
        "in (FLUX.1-dev: 3.5), which plain targets take out again; needs a second pass through the model.",
    )

    @model_validator(mode="after")
    def values_must_make_sense(self) -> Self:
        low, high = self.range
        if low >= high:
            raise ValueError(f"range must rise; got {low} to {high}")
        if isinstance(self.shift, float) and not 0 < self.shift <= 100:
            raise ValueError(f"shift must be above 0 and at most 100; got {self.shift}")
        if isinstance(self.guidance, float) and not 0 <= self.guidance <= 50:
            raise ValueError(f"guidance must be from 0 to 50; got {self.guidance}")
        return self
