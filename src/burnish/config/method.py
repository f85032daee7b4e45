"""Config of what is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from burnish.config.section import Section


class LoraGroup(Section):
    """Modules that get their own rank, alpha or learning rate; the first group that matches wins."""

    match: list[str] = Field(min_length=1, description="Patterns over module names, such as `*attn.to_q`.")
    rank: int | None = Field(None, ge=1, le=4096, description="Instead of the method's rank.")
    alpha: float | None = Field(None, gt=0, le=65536, description="Instead of the method's alpha.")
    learning_rate: float | None = Field(None, gt=0, le=10, description="Instead of the optimizer's rate.")


class Lora(Section):
    """Low-rank adapter (arXiv 2106.09685): W + alpha / rank * B A."""

    kind: Literal["lora"] = Field("lora", description="Which kind of adapter.")
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
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of an adapter's inputs dropped while training."
    )
    targets: str | None = Field(
        None, description="Named set: attention, attention+mlp or all; the family's default if absent."
    )
    include: list[str] = Field([], description="Patterns of further modules to train.")
    exclude: list[str] = Field([], description="Patterns of modules to leave out; wins over everything.")
    groups: list[LoraGroup] = Field([], description="Modules with their own rank, alpha or learning rate.")
