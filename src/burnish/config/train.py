"""Config of the loop: how long, how fast, towards what."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from burnish.config.objective import Objective
from burnish.config.optimizers import AdamW, AnyOptimizer
from burnish.config.schedules import AnySchedule, Constant
from burnish.config.section import Section, default_kind


class Ema(Section):
    """Moving average of the adapter; samples, validation and exports use it."""

    decay: float | None = Field(
        None, gt=0, lt=1, description="Kept share per step; 0.99 where neither this nor `width` is given."
    )
    width: float | None = Field(
        None,
        ge=0.005,
        le=0.28,
        description="Instead of `decay`: how much of the training so far the average covers, as its standard deviation "
        "beside the number of steps (arXiv 2312.02696; 0.05 to 0.15 are usual). From saves of such averages "
        "`burnish adapter average --width` makes those of other widths.",
    )

    @model_validator(mode="after")
    def one_rule(self) -> Self:
        if self.width is not None and self.decay is not None:
            raise ValueError("give decay or width, not both")
        return self


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
