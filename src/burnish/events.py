"""What a run tells whoever listens: the terminal, the run folder, a tracker.

The loop and the stages call an `Events`; each listener overrides what it cares about. Listeners observe: none of
them changes the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step, after its update."""

    step: int  # steps done
    steps: int  # steps in all
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float  # wall time of this step
    memory_gib: float | None  # peak on the training device so far; None on a CPU
    accuracy: float | None = (
        None  # of preferences: share of the step's pairs that the model tells apart rightly
    )


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    state: str  # done | stopped | failed
    step: int
    folder: Path
    adapter: Path | None = None
    best_step: int | None = None
    best_loss: float | None = None
    notes: Sequence[str] = field(default_factory=tuple)


class Listener:
    """Every event does nothing until overridden."""

    def phase(self, name: str, done: int, total: int) -> None:
        """A stage before or beside training: `done` of `total` items; `total` 0 where it is not known."""

    def planned(self, text: str) -> None:
        """What the plan chose and foresees, or how a step compared with it."""

    def started(self, step: int, steps: int) -> None:
        """Training begins, or goes on, with `step` steps done."""

    def stepped(self, report: StepReport) -> None: ...

    def validated(self, step: int, loss: float, is_best: bool) -> None: ...

    def sampled(self, step: int, pictures: Sequence[Path]) -> None: ...

    def saved(self, step: int, checkpoint: Path, adapter: Path, facts: Mapping[str, object]) -> None:
        """A checkpoint is committed and its adapter verified; `facts` is what the verification measured."""

    def warned(self, text: str) -> None: ...

    def finished(self, result: RunResult) -> None: ...


class Events(Listener):
    """Passes each event to every listener, in order."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    def phase(self, name: str, done: int, total: int) -> None:
        for listener in self.listeners:
            listener.phase(name, done, total)

    def planned(self, text: str) -> None:
        for listener in self.listeners:
            listener.planned(text)

    def started(self, step: int, steps: int) -> None:
        for listener in self.listeners:
            listener.started(step, steps)

    def stepped(self, report: StepReport) -> None:
        for listener in self.listeners:
            listener.stepped(report)

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        for listener in self.listeners:
            listener.validated(step, loss, is_best)

    def sampled(self, step: int, pictures: Sequence[Path]) -> None:
        for listener in self.listeners:
            listener.sampled(step, pictures)

    def saved(self, step: int, checkpoint: Path, adapter: Path, facts: Mapping[str, object]) -> None:
        for listener in self.listeners:
            listener.saved(step, checkpoint, adapter, facts)

    def warned(self, text: str) -> None:
        for listener in self.listeners:
            listener.warned(text)

    def finished(self, result: RunResult) -> None:
        for listener in self.listeners:
            listener.finished(result)
