"""How a run is shown: a live display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from burnish.events import Listener, RunResult, StepReport

PLAIN_EVERY_S = 5.0
RATE_OVER_STEPS = 50


class Pace:
    """Rate and time left, from the last steps' wall times; the first step, which warms up, is left out."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=RATE_OVER_STEPS)
        self._is_warm = False

    def add(self, seconds: float) -> None:
        if not self._is_warm:
            self._is_warm = True
            self._seconds.append(seconds)
            return
        if len(self._seconds) == 1 and self._seconds[0] > 2 * seconds:
            self._seconds.clear()
        self._seconds.append(seconds)

    @property
    def seconds_per_step(self) -> float:
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0

    def rate(self) -> str:
        """`3.2 steps/s`, or `2.1 s/step` where a step takes longer than a second."""
        seconds = self.seconds_per_step
        if seconds <= 0:
            return "- steps/s"
        return f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"

    def left(self, steps: int) -> str:
        """Time for so many more steps, as h:mm:ss."""
        return str(timedelta(seconds=round(self.seconds_per_step * steps)))


def step_facts(report: StepReport) -> str:
    memory = "" if report.memory_gib is None else f"  memory {report.memory_gib:.1f} GiB"
    accuracy = "" if report.accuracy is None else f"  accuracy {report.accuracy:.2f}"
    return f"loss {report.loss:.4f}{accuracy}  lr {report.learning_rate:.2e}{memory}"


def saved_line(step: int, adapter: Path, facts: Mapping[str, object]) -> str:
    return f"step {step}: saved and verified {adapter}" + (f" ({facts_text(facts)})" if facts else "")


def validated_line(step: int, loss: float, is_best: bool) -> str:
    return f"step {step}: held-out loss {loss:.5f}" + (", the best so far" if is_best else "")


def result_lines(result: RunResult) -> list[str]:
    """How the run ended; why it failed is told by the error itself."""
    if result.state == "failed":
        return [f"failed at step {result.step}; the run folder is {result.folder}"]
    ended = f"{result.state} at step {result.step}"
    lines = [f"{ended}; the same command goes on from there" if result.state == "stopped" else ended]
    lines += list(result.notes)
    if result.best_step is not None and result.best_loss is not None:
        lines.append(f"best held-out loss {result.best_loss:.5f} at step {result.best_step}")
    made = "adapter" if result.adapter and result.adapter.parent.name == "adapters" else "model"
    lines.append(f"{made}: {result.adapter}" if result.adapter else f"run folder: {result.folder}")
    return lines


def facts_text(facts: Mapping[str, object]) -> str:
    """What a verification measured, such as `keys 88, modules 44, max relative difference 1.2e-15`."""
    return ", ".join(
        f"{key.replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in facts.items()
    )


class TerminalProgress(Listener):
    """A bar per phase, and one for training with rate, time left, loss, learning rate and memory."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[counted]}"),
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
        )
        self._phase: tuple[str, TaskID] | None = None
        self._training: TaskID | None = None
        self._pace = Pace()
        self._progress.start()
        console.show_cursor(True)  # a second signal exits at once, and would leave it hidden

    def stop(self) -> None:
        self._progress.stop()

    def phase(self, name: str, done: int, total: int) -> None:
        if self._phase is None or self._phase[0] != name:
            self._end_phase()
            self._phase = (name, self._progress.add_task(name, total=total or None, counted="", facts=""))
        counted = f"{done}/{total}" if total else ""
        self._progress.update(self._phase[1], completed=done, total=total or None, counted=counted)
        if total and done >= total:
            self._end_phase()
            self._say(f"{name}: {total}/{total}")

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._progress.remove_task(self._phase[1])
            self._phase = None

    def started(self, step: int, steps: int) -> None:
        self._end_phase()
        self._pace = Pace()
        if self._training is not None:
            self._progress.remove_task(self._training)
        self._training = self._progress.add_task(
            "training", total=steps, completed=step, counted=f"{step}/{steps}", facts=""
        )

    def stepped(self, report: StepReport) -> None:
        self._end_phase()
        self._pace.add(report.seconds)
        if self._training is None:
            self.started(report.step, report.steps)
        assert self._training is not None, "started makes it"
        left = self._pace.left(report.steps - report.step)
        self._progress.update(
            self._training,
            completed=report.step,
            total=report.steps,
            counted=f"{report.step}/{report.steps}",
            facts=f"{self._pace.rate()}  {left} left  {step_facts(report)}",
        )

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        self._say(validated_line(step, loss, is_best))

    def sampled(self, step: int, pictures: Sequence[Path]) -> None:
        self._end_phase()
        if pictures:
            self._say(f"step {step}: {len(pictures)} picture(s) in {pictures[0].parent}")

    def saved(self, step: int, checkpoint: Path, adapter: Path, facts: Mapping[str, object]) -> None:
        self._end_phase()
        self._say(saved_line(step, adapter, facts))

    def planned(self, text: str) -> None:
        self._end_phase()
        self._say(f"plan: {text}")

    def warned(self, text: str) -> None:
        self._say(f"note: {text}", style="yellow")

    def finished(self, result: RunResult) -> None:
        self._end_phase()
        for line in result_lines(result):
            self._say(line)
        self.stop()

    def _say(self, text: str, style: str | None = None) -> None:
        self._progress.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class PlainProgress(Listener):
    """Whole lines, for pipes, files and cluster logs: at most one about steps in `every_s` seconds."""

    def __init__(
        self, stream: IO[str], every_s: float = PLAIN_EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._every_s = every_s
        self._clock = clock
        self._told = float("-inf")
        self._phase = ""
        self._pace = Pace()

    def phase(self, name: str, done: int, total: int) -> None:
        is_new = name != self._phase
        self._phase = name
        if self._is_due() or is_new or (total and done >= total):
            self._told = self._clock()
            self._say(f"{name}: {done}/{total}" if total else name)

    def started(self, step: int, steps: int) -> None:
        self._phase = ""
        self._pace = Pace()
        self._told = float("-inf")
        self._say(f"training: step {step} of {steps}")

    def stepped(self, report: StepReport) -> None:
        self._pace.add(report.seconds)
        if self._is_due() or report.step >= report.steps:
            left = self._pace.left(report.steps - report.step)
            self._say(
                f"step {report.step}/{report.steps}  {step_facts(report)}  {self._pace.rate()}  {left} left"
            )

    def validated(self, step: int, loss: float, is_best: bool) -> None:
        self._say(validated_line(step, loss, is_best))

    def sampled(self, step: int, pictures: Sequence[Path]) -> None:
        if pictures:
            self._say(f"step {step}: {len(pictures)} picture(s) in {pictures[0].parent}")

    def saved(self, step: int, checkpoint: Path, adapter: Path, facts: Mapping[str, object]) -> None:
        self._say(saved_line(step, adapter, facts))

    def planned(self, text: str) -> None:
        self._say(f"plan: {text}")

    def warned(self, text: str) -> None:
        self._say(f"note: {text}")

    def finished(self, result: RunResult) -> None:
        for line in result_lines(result):
            self._say(line)

    def _is_due(self) -> bool:
        now = self._clock()
        if now - self._told < self._every_s:
            return False
        self._told = now
        return True

    def _say(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()
