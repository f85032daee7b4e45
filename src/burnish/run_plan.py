"""A plan as a run and a page read it, and what it is made for: a budget, a card, a place for traces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from burnish.config.schema import Memory
from burnish.errors import UserError
from burnish.families.sources import user_cache_folder
from burnish.hardware import host_memory
from burnish.planner.choose import Choice
from burnish.planner.rates import GIB, Card, card_called, card_named
from burnish.planner.recipe import Shape

# Outside of what torch counts: CUDA's context and its libraries' workspaces, and what the allocator cannot hand out.
CONTEXT = int(0.5 * GIB)
FRAGMENTED = int(0.4 * GIB)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the plan's table."""

    what: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Timed:
    """Training steps at one size; seconds are of one optimizer step."""

    shape: Shape
    tokens: int
    seconds: float
    besides: str = ""  # what a micro-step does but one pass forward and backward


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will take. Bytes on the device unless said otherwise."""

    family: str
    card: str
    budget: int  # of what torch may allocate: the card's or the wanted memory less context and fragmentation
    choice: Choice
    compiled: bool
    text_encoder_weights: str
    rows: tuple[Row, ...]  # phases in the order of the run; the largest is the run's peak
    times: tuple[Timed, ...]
    steps: int
    accumulate: int  # micro-steps, which a choice's seconds are of, per step
    fallbacks: tuple[
        Choice, ...
    ]  # of less and less memory, with the same weights: for a step that does not fit
    cheaper: tuple[Choice, ...]  # the next settings that take less memory
    faster: tuple[Choice, ...]  # those that would be faster with more
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        return max(row.bytes for row in self.rows)

    @property
    def seconds(self) -> float:
        """Of all steps, sizes taken in turn."""
        return self.steps * sum(time.seconds for time in self.times) / len(self.times)


def budget_of(option: str) -> int | None:
    """Bytes of `memory.budget`; None for `auto`."""
    return None if option == "auto" else int(float(option.removesuffix("GiB")) * GIB)


def for_torch(card: Card, budget: int | None) -> int:
    """Of a budget in bytes, or of the card's memory, what torch's allocator may take."""
    return (int(card.gib * GIB) if budget is None else budget) - CONTEXT - FRAGMENTED


def card_for(name: str | None) -> Card:
    """A card of the table by name, or the one of this machine.

    Raises:
        UserError: no such card; or none is named and there is none here.
    """
    if name is not None:
        return card_named(name)
    if not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here to plan for",
            remedy="Name one: burnish plan CONFIG --gpu 4090. Any size works too: --gpu 24GiB.",
        )
    title = torch.cuda.get_device_name()
    free, _ = torch.cuda.mem_get_info()
    known = card_called(title) or card_named(f"{free / GIB:.1f}GiB")
    return replace(
        known,
        title=title,
        gib=(free + torch.cuda.memory_reserved()) / GIB,
        host_gib=host_memory().available_gib,
    )


def cache_of(memory: Memory) -> Path:
    """Where traces and measured rates are kept."""
    return (memory.cache_folder or user_cache_folder()) / "plans"
