"""Config of the loop: how long, how fast, towards what."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from burnish.config.optimizers import AdamW, AnyOptimizer
from burnish.config.schedules import AnySchedule, Constant
from burnish.config.section import Section, default_kind


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


AnyTimesteps = Annotated[
    UniformTimesteps | LogitNormalTimesteps | SigmoidTimesteps,
    Field(discriminator="kind"),
    default_kind("uniform"),
]


class Objective(Section):
    """What is learned: noise, time, target, weighting."""

    timesteps: AnyTimesteps | None = Field(
        None, description="How times are drawn; sigmoid for flow models and uniform for older ones if absent."
    )
    range: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = Field(
        (0.0, 1.0), description="Squeeze times into this part of [0, 1]; 0 is clean, 1 is noise."
    )
    shift: float | Literal["family", "resolution"] = Field(
        1.0,
        description="Move times of a flow toward noise: a number (1 moves nothing), `family` for what the "
        "model was released with, `resolution` to grow with the picture's size.",
    )
    min_snr_gamma: float | None = Field(None, gt=0, le=100, description="Min-SNR weighting; 5 is usual.")
    noise_offset: float = Field(
        0.0, ge=0, le=1, description="Lets epsilon models learn dark and bright pictures."
    )
    guidance: float | Literal["bypass"] = Field(
        1.0,
        description="Value for a guidance embedding (FLUX.1-dev); `bypass` trains without the embedding. "
        "No effect on models that have none.",
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


class Ema(Section):
    """Moving average of the adapter; samples, validation and exports use it."""

    decay: float = Field(0.99, gt=0, lt=1, description="Kept share per step.")


class EarlyStop(Section):
    """End the run when the held-out loss no longer improves."""

    patience: int = Field(3, ge=1, le=1000, description="Validations without improvement before stopping.")
    min_improvement: float = Field(0.0, ge=0, le=1, description="Relative improvement that counts.")


class Validation(Section):
    """Loss on held-out pictures at fixed noise and times: comparable from step to step."""

    every: int = Field(100, ge=1, description="Optimizer steps between validations.")
    pictures: int = Field(4, ge=1, le=100000, description="Training pictures held out, chosen by the seed.")
    times: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.15, 0.4, 0.65, 0.9],
        min_length=1,
        description="Times at which each is judged, within those of the denoisers.",
    )
    early_stop: EarlyStop | None = Field(None, description="Off if absent.")


class StopOnNonFinite(Section):
    """Stop before the update, name samples and times, leave the last checkpoint as it is."""

    kind: Literal["stop"] = "stop"


class RollBackOnNonFinite(Section):
    """Go back to the last good checkpoint, skip the batch, count it in the report."""

    kind: Literal["rollback"]
    max_batches: int = Field(
        3, ge=1, le=1000, description="Batches that may be skipped before the run stops."
    )


AnyOnNonFinite = Annotated[
    StopOnNonFinite | RollBackOnNonFinite, Field(discriminator="kind"), default_kind("stop")
]


class Train(Section):
    """How long and how fast."""

    steps: int = Field(2000, ge=1, le=100_000_000, description="Optimizer steps.")
    batch_size: int = Field(1, ge=1, le=4096, description="Pictures per micro-step.")
    accumulate: int = Field(1, ge=1, le=4096, description="Micro-steps per optimizer step.")
    optimizer: AnyOptimizer = Field(default_factory=AdamW, description="What moves the weights.")
    schedule: AnySchedule = Field(default_factory=Constant, description="How the learning rate moves.")
    objective: Objective = Field(default_factory=Objective, description="What is learned.")
    max_grad_norm: float = Field(1.0, gt=0, le=1e6, description="Gradients are clipped to this norm.")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Number type of the frozen model; adapter weights are always float32."
    )
    ema: Ema | None = Field(None, description="Off if absent.")
    validation: Validation | None = Field(None, description="Off if absent.")
    on_nonfinite: AnyOnNonFinite = Field(
        default_factory=StopOnNonFinite, description="What to do about NaN or infinity."
    )
    loader_workers: int = Field(
        0, ge=0, le=64, description="Processes that read the cache; 0 reads in the loop."
    )

    @model_validator(mode="after")
    def warmup_must_end(self) -> Self:
        if (warmup := self.schedule.warmup(self.steps)) >= self.steps:
            raise ValueError(f"schedule.warmup_steps ({warmup}) must be below steps ({self.steps})")
        return self

    @model_validator(mode="after")
    def one_average_at_most(self) -> Self:
        kind = self.optimizer.kind
        if not self.optimizer.schedule_free:
            return self
        if self.ema is not None:
            raise ValueError(f"optimizer.kind {kind} keeps an average of its own; leave ema out")
        if self.schedule.kind != "constant":
            raise ValueError(
                f"optimizer.kind {kind} averages instead of lowering the rate; schedule.kind should be constant, with "
                f"or without a warm-up; got {self.schedule.kind}"
            )
        return self
