"""Config of what moves the weights: one section per kind of optimizer."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from burnish.config.section import Section, default_kind

Decay = Annotated[float, Field(ge=0, lt=1)]
Pair = tuple[Decay, Decay]
Triple = tuple[Decay, Decay, Decay]

_EPS = "Keeps the division off zero."
_BETAS = "Decay of the first and second moment."

_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_GIVEN = {
    "params": "the weights to train are given to it",
    "lr": "the rate is learning_rate of the section above",
    "weight_decay": "the decay is weight_decay of the section above",
}


class Optimizer(Section):
    """What every optimizer has."""

    package: ClassVar[str | None] = None  # beyond those that Burnish always needs
    extra: ClassVar[str | None] = None  # of `pip install "burnish[EXTRA]"`, where that package is
    schedule_free: ClassVar[bool] = (
        False  # keeps an average of its own, which is what is saved and drawn with
    )
    together: ClassVar[bool] = False  # one weight's step depends on the gradients of others

    learning_rate: float = Field(1e-4, gt=0, le=10, description="Peak learning rate.")
    rounding: Literal["nearest", "stochastic", "kahan"] = Field(
        "stochastic",
        description="Of weights that train in bfloat16, whose small steps would round to nothing: `stochastic` draws "
        "up or down so that the mean is right, `kahan` keeps what rounding lost (2 bytes per weight). Both step in "
        "float32. Adapters train in float32 and have nothing to round.",
    )


class DecayingOptimizer(Optimizer):
    """Those with weight decay beside the step, as AdamW has it."""

    weight_decay: float = Field(
        0.01, ge=0, le=10, description="Each step takes this share of the rate off the weights."
    )


class AdamW(DecayingOptimizer):
    """AdamW (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    betas: Pair = Field((0.9, 0.999), description=_BETAS)
    eps: float = Field(1e-8, gt=0, le=1, description=_EPS)


class AdamW8bit(DecayingOptimizer):
    """AdamW with 8-bit states (arXiv 2110.02861), from bitsandbytes (extra `quant`)."""

    package: ClassVar[str | None] = "bitsandbytes"
    extra: ClassVar[str | None] = "quant"

    kind: Literal["adamw8bit"]
    betas: Pair = Field((0.9, 0.999), description=_BETAS)
    eps: float = Field(1e-8, gt=0, le=1, description=_EPS)
    paged: bool = Field(
        False,
        description="States move to host memory when the GPU's runs out (NVIDIA; no effect on the processor).",
    )


class Adafactor(DecayingOptimizer):
    """Adafactor (arXiv 1804.04235) at a fixed learning rate: factored second moments, no first."""

    kind: Literal["adafactor"]
    beta2_decay: float = Field(-0.8, ge=-1, lt=0, description="Exponent of the second moment's decay.")
    clip_threshold: float = Field(1.0, gt=0, le=100, description="Largest root mean square of an update.")


class Lion(DecayingOptimizer):
    """Lion (arXiv 2302.06675): the sign of a momentum, one state; a third to a tenth of AdamW's rate."""

    package: ClassVar[str | None] = "pytorch_optimizer"
    extra: ClassVar[str | None] = "optim"

    kind: Literal["lion"]
    learning_rate: float = Field(3e-5, gt=0, le=10, description="Peak learning rate: every weight's step.")
    weight_decay: float = Field(
        0.03, ge=0, le=10, description="As AdamW's, and larger by as much as the rate is smaller."
    )
    betas: Pair = Field((0.9, 0.99), description="Of the momentum in the step, and of what is kept of it.")


class Came(DecayingOptimizer):
    """CAME (arXiv 2307.02047): factored second moments as Adafactor, a momentum that confidence weighs."""

    package: ClassVar[str | None] = "pytorch_optimizer"
    extra: ClassVar[str | None] = "optim"

    kind: Literal["came"]
    betas: Triple = Field(
        (0.9, 0.999, 0.9999), description="Decay of momentum, second moment and the spread of updates."
    )
    clip_threshold: float = Field(1.0, gt=0, le=100, description="Largest root mean square of an update.")


class Prodigy(DecayingOptimizer):
    """Prodigy (arXiv 2306.06101): finds the learning rate itself; keep `learning_rate: 1`."""

    together: ClassVar[bool] = True

    kind: Literal["prodigy"]
    learning_rate: float = Field(1.0, gt=0, le=10, description="Multiplies the rate that is found.")
    betas: Pair = Field((0.9, 0.999), description=_BETAS)
    d0: float = Field(1e-6, gt=0, le=1, description="First guess of the rate.")
    d_coef: float = Field(1.0, gt=0, le=100, description="Multiplies the estimate.")
    safeguard_warmup: bool = Field(True, description="Keep a warm-up from spoiling the estimate.")


class ProdigyScheduleFree(DecayingOptimizer):
    """Prodigy over schedule-free averaging, from prodigy-plus-schedule-free; keep `learning_rate: 1`."""

    package: ClassVar[str | None] = "prodigyplus"
    extra: ClassVar[str | None] = "optim"
    schedule_free: ClassVar[bool] = True
    together: ClassVar[bool] = True

    kind: Literal["prodigy_schedule_free"]
    learning_rate: float = Field(1.0, gt=0, le=10, description="Multiplies the rate that is found.")
    betas: tuple[Annotated[float, Field(gt=0, lt=1)], Decay] = Field(
        (0.9, 0.99), description="How near to the average the gradient is taken; decay of the second moment."
    )
    d0: float = Field(1e-6, gt=0, le=1, description="First guess of the rate.")
    d_coef: float = Field(1.0, gt=0, le=100, description="Multiplies the estimate.")
    factored: bool = Field(
        True, description="Second moments of large matrices by rows and columns, as Adafactor."
    )


class AdamWScheduleFree(DecayingOptimizer):
    """Schedule-free AdamW (arXiv 2405.15682): averages instead of lowering the rate."""

    package: ClassVar[str | None] = "pytorch_optimizer"
    extra: ClassVar[str | None] = "optim"
    schedule_free: ClassVar[bool] = True

    kind: Literal["adamw_schedule_free"]
    learning_rate: float = Field(
        3e-4, gt=0, le=10, description="Learning rate, which stays after the warm-up."
    )
    betas: tuple[Annotated[float, Field(gt=0, lt=1)], Decay] = Field(
        (0.9, 0.999), description="How near to the average the gradient is taken; decay of the second moment."
    )
    eps: float = Field(1e-8, gt=0, le=1, description=_EPS)


class Muon(DecayingOptimizer):
    """Muon (kellerjordan.github.io/posts/muon, arXiv 2502.16982) for matrices, AdamW for all other weights."""

    kind: Literal["muon"]
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of the momentum that is made orthogonal.")
    nesterov: bool = Field(True, description="Step with the gradient in front of the momentum.")
    scaling: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="Length of a matrix's step: that of AdamW, so that its rates fit, or sqrt(rows / columns), 1 at "
        "least.",
    )
    betas: Pair = Field((0.9, 0.999), description="Of AdamW for what is no matrix.")
    eps: float = Field(1e-8, gt=0, le=1, description="Of AdamW for what is no matrix.")


class Soap(DecayingOptimizer):
    """SOAP (arXiv 2409.11321): Adam in the directions in which the gradients of a matrix vary."""

    package: ClassVar[str | None] = "pytorch_optimizer"
    extra: ClassVar[str | None] = "optim"

    kind: Literal["soap"]
    betas: Pair = Field((0.95, 0.95), description=_BETAS)
    eps: float = Field(1e-8, gt=0, le=1, description=_EPS)
    every: int = Field(10, ge=1, le=1000, description="Steps between new directions.")
    largest_side: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Sides of a matrix that are longer keep their own directions. Two square matrices of float32 are "
        "kept for each other side: 0.5 MiB at 256, 8 MiB at 1024.",
    )


class AdEMAMix(DecayingOptimizer):
    """AdEMAMix (arXiv 2409.03137): AdamW with a second, slow momentum."""

    package: ClassVar[str | None] = "pytorch_optimizer"
    extra: ClassVar[str | None] = "optim"

    kind: Literal["ademamix"]
    betas: Triple = Field(
        (0.9, 0.999, 0.999),
        description="Decay of the fast momentum, the second moment and the slow momentum; 0.9999 for the last from "
        "some 20 000 steps on.",
    )
    alpha: float = Field(5.0, ge=0, le=100, description="Weight of the slow momentum beside the fast one.")
    rise_steps: int | None = Field(
        None, ge=1, description="Steps over which alpha and the slow decay rise; at once if absent."
    )
    eps: float = Field(1e-8, gt=0, le=1, description=_EPS)


class CustomOptimizer(Optimizer):
    """Any `torch.optim.Optimizer` that can be imported. Its module is run: name only what you trust."""

    together: ClassVar[bool] = True  # nothing else is known of it

    kind: Literal["custom"]
    class_path: str = Field(description="Module and class, such as `torch.optim.RAdam`.")
    weight_decay: float | None = Field(
        None, ge=0, le=10, description="Its `weight_decay`; what the class has by itself if absent."
    )
    arguments: dict[str, Any] = Field({}, description="Further arguments by name, as the class takes them.")

    @field_validator("class_path")
    @classmethod
    def must_be_dotted(cls, value: str) -> str:
        if not _CLASS_PATH.fullmatch(value):
            raise ValueError(f"should be a module and a class, such as torch.optim.RAdam; got {value!r}")
        return value

    @field_validator("arguments")
    @classmethod
    def must_not_be_given_twice(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, why in _GIVEN.items():
            if name in value:
                raise ValueError(f"{name} does not belong here: {why}")
        return value


AnyOptimizer = Annotated[
    AdamW
    | AdamW8bit
    | Adafactor
    | Lion
    | Came
    | Prodigy
    | ProdigyScheduleFree
    | AdamWScheduleFree
    | Muon
    | Soap
    | AdEMAMix
    | CustomOptimizer,
    Field(discriminator="kind"),
    default_kind("adamw"),
]
