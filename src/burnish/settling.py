"""Every `auto` of the config's memory section made a value, before a run loads anything.

On a GPU the plan decides (planning.py); on a CPU nothing has to fit unless a budget is named. What the first start
chose for weights and for parts of batches holds for all that follow, since the run's numbers depend on it: it is in the
run folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._triton import has_triton

from burnish.atomic import atomic_write_text
from burnish.config.schema import Memory, RunConfig
from burnish.events import Listener
from burnish.loop import Training
from burnish.memory.activations import set_activations
from burnish.memory.out_of_memory import release_memory_of
from burnish.memory.streaming import stream_weights
from burnish.memory.transfer import transfer_to
from burnish.planner.choose import Choice
from burnish.planner.probe import measured_rates
from burnish.planner.rates import GIB, Card
from burnish.planning import plan_run
from burnish.reconstruction import autoencoder_of, set_recomputing
from burnish.run_folder import RunFolder
from burnish.run_plan import RunPlan, budget_of, cache_of, card_for

# What is taken where nothing is planned: as the model comes, everything on the device, nothing computed twice.
UNPLANNED: dict[str, Any] = {
    "weights": "native",
    "text_encoder_weights": "native",
    "activations": "keep",
    "stream": 0.0,
    "offload_activations": False,
    "batch_parts": 1,
    "compile": False,
}
CPU = Card("CPU", 0, 0.2, None, None, 20, from_host=20, unified=True)


@dataclass(frozen=True, slots=True)
class Settled:
    """The config without `auto`, and the plan behind it where there is one."""

    config: RunConfig
    plan: RunPlan | None


def settle(config: RunConfig, device: torch.device, folder: RunFolder, events: Listener) -> Settled:
    """Choose what the config leaves open. A model that cannot be traced runs with what takes little, and says so.

    Raises:
        UserError: nothing fits.
    """
    memory = pinned(config.memory, folder, config.train.batch_size)
    if device.type != "cuda" and memory.budget == "auto":
        return Settled(with_memory(config, memory, UNPLANNED), None)
    events.phase("planning", 0, 0)
    card = here(device, memory)
    config = with_memory(config, memory, {})
    on_cuda = device.type == "cuda"
    try:
        plan = plan_run(
            config, card, budget=budget_of(memory.budget), cuda=on_cuda, can_compile=on_cuda and has_triton()
        )
    except RuntimeError as error:  # model code asks for numbers: torch has many words for it
        events.warned(
            f"this run cannot be planned ({error}); going on with recomputed activations and weights as they come"
        )
        return Settled(with_memory(config, memory, UNPLANNED | {"activations": "recompute"}), None)
    chosen = values_of(plan.choice) | {
        "text_encoder_weights": plan.text_encoder_weights,
        "compile": plan.compiled,
    }
    settled = with_memory(config, memory, chosen)
    events.planned(
        f"weights {plan.choice.settings.weights}, {kept_in_words(plan.choice)}"
        f"; {plan.peak / GIB:.2f} GiB of {plan.budget / GIB:.2f}"
    )
    remember(folder, settled, plan)
    return Settled(settled, plan)


def here(device: torch.device, memory: Memory) -> Card:
    """The card of this machine with measured rates."""
    if device.type != "cuda":
        return CPU
    card = card_for(None)
    return replace(card, measured=measured_rates(device, cache_of(memory), unified=card.unified))


def values_of(choice: Choice) -> dict[str, Any]:
    settings = choice.settings
    kept = settings.kept
    return {
        "weights": settings.weights,
        "activations": next(iter(kept)) if len(kept) == 1 else kept,
        "stream": settings.stream,
        "offload_activations": settings.offload,
        "batch_parts": settings.parts,
    }


def with_memory(config: RunConfig, memory: Memory, values: dict[str, Any]) -> RunConfig:
    """The config with `values` where the memory section has `auto`."""
    told = {name: value for name, value in values.items() if getattr(memory, name) == "auto"}
    return config.model_copy(update={"memory": memory.model_copy(update=told)})


def pinned(memory: Memory, folder: RunFolder, batch_size: int) -> Memory:
    """The section as the run's first start settled it where numbers depend on it: formats, parts of a batch."""
    if not any(folder.checkpoints.glob("step-*")):
        return memory
    before = read_plan(folder)
    names: tuple[str, ...] = ("weights", "text_encoder_weights")
    if before and not memory.gradient_release and before.get("batch_size", batch_size) == batch_size:
        before, names = {"batch_parts": 1, **before}, (*names, "batch_parts")
    kept = {name: before[name] for name in names if name in before and getattr(memory, name) == "auto"}
    return memory.model_copy(update=kept)


def remember(folder: RunFolder, config: RunConfig, plan: RunPlan) -> None:
    told = {name: getattr(config.memory, name) for name in UNPLANNED} | {
        "batch_size": config.train.batch_size
    }
    told |= {"predicted_bytes": plan.choice.peak, "predicted_seconds": plan.choice.seconds}
    atomic_write_text(folder.plan, json.dumps(told, indent=2))


def read_plan(folder: RunFolder) -> dict[str, Any]:
    """What the last start planned; empty where it did not, or where it cannot be read."""
    try:
        told = json.loads(folder.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


class Compared:
    """The plan beside what happens: measured after the second step, stepped down when the first ones do not fit."""

    def __init__(self, plan: RunPlan | None, folder: RunFolder) -> None:
        self._fallbacks = list(plan.fallbacks) if plan is not None else []
        self._predicted = plan.choice.peak if plan is not None else 0
        self._folder = folder
        self._begun: int | None = None  # the step that this start began with

    def after_step(self, events: Listener) -> Callable[[Training], None]:
        """A task: the first step of a start warms up, the second is measured."""

        def measure(run: Training) -> None:
            if self._begun is None:
                self._begun = run.step
                if run.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(run.device)
            elif self._predicted and run.step == self._begun + 1 and run.device.type == "cuda":
                self._tell(torch.cuda.max_memory_allocated(run.device), events)

        return measure

    def _tell(self, real: int, events: Listener) -> None:
        off = real / self._predicted - 1
        events.planned(
            f"a step takes {real / GIB:.2f} GiB; {self._predicted / GIB:.2f} were foreseen ({off:+.1%})"
        )
        atomic_write_text(
            self._folder.plan, json.dumps(read_plan(self._folder) | {"measured_bytes": real}, indent=2)
        )

    def step_down(self, run: Training, error: BaseException, events: Listener) -> bool:
        """Whether there is a smaller setting, now in force, to try a step again with that ran out of memory.

        Only before the second step is done: what fits twice fits.
        """
        if run.updating or (self._begun is not None and run.step > self._begun) or not self._fallbacks:
            return False
        choice = self._fallbacks.pop(0)
        run.optimizer.zero_grad(set_to_none=True)
        release_memory_of(error)
        put_in_force(choice, run)
        events.warned(
            f"step {run.step + 1} did not fit in memory; going on with {kept_in_words(choice)}, "
            f"{(self._predicted - choice.peak) / GIB:.2f} GiB less"
        )
        self._predicted = choice.peak
        return True


def put_in_force(choice: Choice, run: Training) -> None:
    """Of an assembled training: what blocks keep, and which of them are streamed."""
    if not run.family.denoisers:
        set_recomputing(autoencoder_of(run.family), choice.settings.modes[0] == "recompute")
        return
    blocks = run.family.blocks()
    set_activations(blocks, choice.settings.modes)
    if choice.settings.stream:
        denoisers = run.family.denoisers.values()
        stream_weights(denoisers, blocks, choice.settings.stream, transfer_to(run.device), run.device)


def kept_in_words(choice: Choice) -> str:
    settings = choice.settings
    kept = settings.kept
    words = [mode if len(kept) == 1 else f"{count} blocks {mode}" for mode, count in kept.items()]
    if settings.offload:
        words.append("kept in host memory")
    if settings.stream:
        words.append(f"{settings.stream:.0%} of block weights streamed")
    if settings.parts > 1:
        words.append(f"batches in {settings.parts} parts")
    return ", ".join(words)
