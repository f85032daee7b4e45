"""Config of how the learning rate moves: one section per shape."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from burnish.config.section import Section, default_kind


class Schedule(Section):
    """What every shape has: a warm-up, and where it ends."""

    warmup_steps: int = Field(0, ge=0, description="Steps to rise from zero to the peak.")
    warmup_share: float = Field(
        0.0, ge=0, lt=1, description="The same as a share of all steps, instead of `warmup_steps`."
    )
    end_factor: float = Field(
        0.0, ge=0, le=1, description="Last rate over peak rate, for all but constant and inverse_sqrt."
    )

    @model_validator(mode="after")
    def warmup_is_given_once(self) -> Self:
        if self.warmup_share and self.warmup_steps:
            raise ValueError("give warmup_steps or warmup_share, not both")
        return self

    def warmup(self, total: int) -> int:
        """Steps of the warm-up in a run of so many."""
        return self.warmup_steps or round(self.warmup_share * total)


class Constant(Schedule):
    """The peak to the end."""

    kind: Literal["constant"] = "constant"


class Linear(Schedule):
    """Down in a straight line."""

    kind: Literal["linear"]


class Cosine(Schedule):
    """Down along half a cosine (arXiv 1608.03983): slowly, fast, slowly."""

    kind: Literal["cosine"]


class CosineRestarts(Schedule):
    """Several cosines of one length, each from the peak (arXiv 1608.03983)."""

    kind: Literal["cosine_restarts"]
    cycles: int = Field(3, ge=1, le=1000, description="How often it falls.")


class Polynomial(Schedule):
    """Down along a power of the way that is left."""

    kind: Literal["polynomial"]
    power: float = Field(2.0, gt=0, le=20, description="1 is linear; above it falls early, below it late.")


class Rex(Schedule):
    """Reflected exponential (arXiv 2107.04197): stays high longer than linear and falls late."""

    kind: Literal["rex"]


class WarmupStableDecay(Schedule):
    """The peak for most of the run, then down in a straight line (arXiv 2404.06395, 2405.18392)."""

    kind: Literal["warmup_stable_decay"]
    decay_share: float = Field(0.2, gt=0, le=1, description="Share of all steps in which it falls.")


class InverseSqrt(Schedule):
    """As one over the root of the step (arXiv 1706.03762): needs no end, so a run can be made longer."""

    kind: Literal["inverse_sqrt"]
    timescale: int = Field(
        100,
        ge=1,
        description="Steps after the warm-up until the rate is 0.71 of its peak, if longer than the warm-up.",
    )


AnySchedule = Annotated[
    Constant | Linear | Cosine | CosineRestarts | Polynomial | Rex | WarmupStableDecay | InverseSqrt,
    Field(discriminator="kind"),
    default_kind("constant"),
]
