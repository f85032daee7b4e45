"""Config of what is trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from burnish.config.section import Section, default_kind


class LoraGroup(Section):
    """Modules that get their own rank, alpha or learning rate; the first group that matches wins."""

    match: list[str] = Field(min_length=1, description="Patterns over module names, such as `*attn.to_q`.")
    rank: int | None = Field(None, ge=1, le=4096, description="Instead of the method's rank.")
    alpha: float | None = Field(None, gt=0, le=65536, description="Instead of the method's alpha.")
    learning_rate: float | None = Field(None, gt=0, le=10, description="Instead of the optimizer's rate.")


class Adapter(Section):
    """What every kind of adapter has."""

    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of an adapter's inputs dropped while training."
    )
    module_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the adapters that are left out as a whole, drawn for each step."
    )
    targets: str | None = Field(
        None, description="Named set: attention, attention+mlp or all; the family's default if absent."
    )
    include: list[str] = Field([], description="Patterns of further modules to train.")
    exclude: list[str] = Field([], description="Patterns of modules to leave out; wins over everything.")
    groups: list[LoraGroup] = Field([], description="Modules with their own rank, alpha or learning rate.")


class LowRank(Adapter):
    """Kinds made of thin matrices, with a scale of alpha / rank."""

    rank: int = Field(16, ge=1, le=4096, description="Rank of linear layers.")
    alpha: float | None = Field(
        None,
        gt=0,
        le=65536,
        description="Scale is alpha / rank; alpha = rank if absent, which is a scale of 1.",
    )
    conv_rank: int | None = Field(
        None, ge=1, le=4096, description="Rank of convolutions larger than 1x1; the linear rank if absent."
    )
    conv_alpha: float | None = Field(
        None, gt=0, le=65536, description="Alpha of those; `conv_rank` if absent."
    )
    rs_scaling: bool = Field(
        False,
        description="Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732): an alpha that suits one rank suits all.",
    )
    tucker: bool = Field(
        False, description="Convolutions larger than 1x1 in Tucker form: thin matrices and a core of rank x rank."
    )

    @model_validator(mode="after")
    def scaling_needs_alpha(self) -> Self:
        if self.rs_scaling and self.alpha is None:
            raise ValueError("rs_scaling scales by alpha / sqrt(rank), so alpha must be set; 4 is usual")
        return self


class Lora(LowRank):
    """Low-rank adapter (arXiv 2106.09685): W + alpha / rank * B A."""

    kind: Literal["lora"] = Field("lora", description="Which kind of adapter.")
    dora: bool = Field(
        False,
        description="Train the lengths of the weight's rows apart from their directions (DoRA, arXiv 2402.09353).",
    )
    start: Literal["zero", "pissa", "olora"] = Field(
        "zero",
        description="What the matrices begin with: B zero, or the main part of the base weight by its singular values "
        "(pissa) or its QR decomposition (olora). The base stays as it is; files are of twice the rank.",
    )
    b_learning_rate_ratio: float = Field(
        1.0, gt=0, le=1024, description="Learning rate of B over that of A (LoRA+, arXiv 2402.12354)."
    )
    rank_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the ranks left out, drawn for each layer and step."
    )

    @model_validator(mode="after")
    def one_form(self) -> Self:
        if self.tucker and self.start != "zero":
            raise ValueError(f"tucker has no start but zero; got start: {self.start}")
        return self


class WeightGroup(Section):
    """Weights that get their own learning rate; the first group that matches wins."""

    match: list[str] = Field(min_length=1, description="Patterns over names of modules or weights.")
    learning_rate: float = Field(gt=0, le=10, description="Instead of the optimizer's rate.")


class Full(Section):
    """Full fine-tuning: the denoiser's own weights train, in the number type of `train.precision`."""

    kind: Literal["full"]
    targets: str | None = Field(
        None,
        description="Named set of modules whose weights train: attention, attention+mlp or all (of the blocks). Without "
        "it and without `include`, every weight does.",
    )
    include: list[str] = Field(
        [],
        description="Patterns of modules or weights to train, beside those of `targets`: `*norm*`, `blocks.7`.",
    )
    exclude: list[str] = Field(
        [], description="Patterns of modules or weights to leave as they are; wins over everything."
    )
    groups: list[WeightGroup] = Field([], description="Weights with their own learning rate.")


AdapterMethod = Lora
AnyMethod = Annotated[Lora | Full, Field(discriminator="kind"), default_kind("lora")]
