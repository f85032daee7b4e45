"""What happens beside the steps: held-out loss, checkpoints with verified results, samples.

Each task is called after every step and decides by itself whether it is due. The order is validate, save, sample,
so that a new best is saved at once and a picture never stands in the way of a checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image

from burnish.adapters.attached import AdapterSet, all_disabled
from burnish.checkpoint.space import nap
from burnish.checkpoint.store import CheckpointStore
from burnish.compute.attention import Attention
from burnish.data.batch import Batch
from burnish.errors import DataError, DiskFull, Interrupted, NonFiniteLoss
from burnish.events import Events
from burnish.loop import Training
from burnish.memory.out_of_memory import is_out_of_memory, release_memory_of
from burnish.objective import Denoising
from burnish.results import Facts, Result, averaged
from burnish.resume import checkpoint_content
from burnish.sampling.clip_file import middle_frame
from burnish.sampling.decoding import Drawn, decode_pictures
from burnish.sampling.grid import LARGEST_CELL, save_grid
from burnish.sampling.outputs import write_picture
from burnish.sampling.sampler import EncodedRequest, PictureRequest, draw_latents

DISK_POLL_S = 5.0
GRID_COLUMNS = 10  # of more steps than this, the grid shows some

_SAMPLE = re.compile(r"step-(\d+)-(\d+)\.(?:png|mp4)")


@dataclass
class Validate:
    """Loss on held-out pictures at fixed noise and times; remembers the best step, counts those without progress.

    Where the loaded denoisers are for a part of the times only, the times lie as far into that part.

    Raises:
        NonFiniteLoss: the loss is NaN or inf.
    """

    batches: Callable[[], Iterator[Batch]]
    times: Sequence[float]
    every: int
    min_improvement: float
    events: Events

    def __call__(self, run: Training) -> None:
        if run.step % self.every and run.step != run.steps:
            return
        with torch.no_grad(), averaged(run):
            loss = self.loss(run)
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"step {run.step}: the held-out loss is {loss:g} ({run.dtype})",
                remedy="Lower train.optimizer.learning_rate, or use train.precision: bf16 or fp32.",
            )
        is_best = run.best_loss is None or loss < run.best_loss
        if is_best:
            run.best_step, run.best_loss = run.step, loss
        if run.patience_loss is None or loss < run.patience_loss * (1 - self.min_improvement):
            run.patience_loss, run.validations_without_improvement = loss, 0
        else:
            run.validations_without_improvement += 1
        self.events.validated(run.step, loss, is_best)

    def loss(self, run: Training) -> float:
        """Mean over held-out samples and times, each with noise that depends on the sample and time alone."""
        losses = [
            run.objective.held_out(run.family, run.told(part), self.times, run.seed)
            for batch in self.batches()
            for part in batch.to(run.device).parts(run.batch_parts)  # no more rows at once than in a step
        ]
        return float(torch.cat(losses).mean())


@dataclass
class Save:
    """A checkpoint, then what is for use elsewhere, read back and verified, then retention."""

    store: CheckpointStore
    results: Sequence[Result]
    every: int
    keep: int
    keep_results: bool
    config_hash: str
    events: Events
    stop_requested: Callable[[], bool]
    wait_for_space: bool = False
    saved_step: int | None = None
    last_adapter: Path | None = None
    written: dict[str, int] = field(
        default_factory=dict
    )  # by label: the step of what this process wrote last

    def __call__(self, run: Training) -> None:
        new_best = run.best_step == run.step and run.best_step is not None
        if run.step % self.every == 0 or run.step == run.steps or new_best:
            self.save(run)

    def save(self, run: Training) -> None:
        """A checkpoint of `run.step` and its results, unless that was saved already."""
        if self.saved_step == run.step:
            return
        checkpoint = self.checkpoint(run)
        self.write_results(run, checkpoint, f"-{run.step:08d}" if self.keep_results else "")
        if run.best_step == run.step:
            self.write_results(run, checkpoint, "-best")

    def checkpoint(self, run: Training) -> Path:
        """Commit the state of `run.step`; older checkpoints go only after this one verified (rule R3)."""
        tensors, state = checkpoint_content(run)
        if self.wait_for_space:
            checkpoint = self.store.save_waiting(
                run.step,
                tensors,
                state,
                config_hash=self.config_hash,
                stop_requested=self.stop_requested,
                on_wait=lambda full: self.events.warned(f"waiting for space: {full.message}"),
            )
        else:
            checkpoint = self.store.save(run.step, tensors, state, config_hash=self.config_hash)
        self.saved_step = run.step
        self.store.prune(self.keep, protect={run.best_step} if run.best_step is not None else set())
        return checkpoint

    def finish(self, run: Training, ended: bool) -> None:
        """Save what is not saved yet; at the end of the run also write the results under their plain names."""
        self.save(run)
        if ended and self.written.get("") != run.step:
            self.write_results(run, self.store.folder / f"step-{run.step:08d}", "")

    def write_results(self, run: Training, checkpoint: Path, label: str) -> None:
        """Write and verify every result under this label."""
        for result in self.results:
            path = result.path(label)
            facts = self.when_there_is_space(partial(result.write, run, path))
            self.events.saved(run.step, checkpoint, path, facts)
            if label != "-best":
                self.last_adapter = path
        self.written[label] = run.step

    def when_there_is_space(self, write: Callable[[], Facts]) -> Facts:
        """What `write` gives; at a full disk it is called again, if waiting is wanted, until there is space or a stop.

        Raises:
            DiskFull: it is full, and waiting is not wanted or was ended by a stop.
        """
        while True:
            try:
                return write()
            except DiskFull as full:
                if not self.wait_for_space:
                    raise
                self.events.warned(f"waiting for space: {full.message}")
                if not nap(DISK_POLL_S, self.stop_requested):
                    raise

    def resumed(self, run: Training, checkpoint: Path) -> None:
        """Go on from a checkpoint; results that a kill kept from being written after it are written now."""
        self.saved_step = run.step
        labels = [f"-{run.step:08d}" if self.keep_results else ""] if run.step else []
        if run.best_step == run.step:
            labels.append("-best")
        for label in labels:
            if label == "-best" or not all(result.path(label).exists() for result in self.results):
                self.write_results(run, checkpoint, label)


@dataclass
class Sample:
    """What is drawn with fixed seeds, and a grid over all steps so far; failing to draw never ends a run (law L6)."""

    requests: Callable[[], Sequence[EncodedRequest]]  # what to draw now
    folder: Path
    every: int
    batch_size: int
    disabled: Sequence[AdapterSet]  # training adapters, off while sampling
    attention: Attention
    events: Events
    raise_if_stopped: Callable[[], None]

    def __call__(self, run: Training) -> None:
        if (self.every and run.step % self.every == 0) or run.step == run.steps:
            self.draw(run)

    def draw(self, run: Training) -> None:
        try:
            with torch.no_grad(), averaged(run), all_disabled(self.disabled), self.attention.sampling():
                requests = self.requests()
                pictures = self.pictures(run, requests)
        except Interrupted:
            self.events.warned(f"step {run.step}: samples left out, the run is stopping")
            return
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            release_memory_of(error)
            self.events.warned(
                f"step {run.step}: not enough memory to draw samples; training goes on without these. "
                "Lower sample.size or sample.batch_size."
            )
            return
        try:
            paths = self.write(run.step, requests, pictures)
        except (OSError, DiskFull, DataError, MemoryError) as error:
            self.events.warned(f"step {run.step}: samples were drawn and could not be written: {error}")
            return
        self.events.sampled(run.step, paths)

    def pictures(self, run: Training, requests: Sequence[EncodedRequest]) -> list[Drawn]:
        drawn: list[Drawn] = []
        for strength, alike in groupby(requests, lambda one: one.request.strength):
            together = list(alike)
            for first in range(0, len(together), self.batch_size):
                self.raise_if_stopped()
                chosen = together[first : first + self.batch_size]
                with at_strength(run, strength):
                    latents = draw_latents(
                        run.family, chosen, device=run.device, dtype=run.dtype, progress=self.progress
                    )
                drawn += decode_pictures(run.family, latents)
        return drawn

    def progress(self, done: int, total: int) -> None:
        self.raise_if_stopped()

    def write(self, step: int, requests: Sequence[EncodedRequest], pictures: Sequence[Drawn]) -> list[Path]:
        paths = []
        for number, (picture, encoded) in enumerate(zip(pictures, requests, strict=True), 1):
            path = self.folder / f"step-{step:08d}-{number:02d}.png"
            paths.append(write_picture(path, picture, encoded.request, extra={"step": step}))
        self.write_grid(step, [in_words(encoded.request) for encoded in requests])
        return paths

    def write_grid(self, last_step: int, prompts: Sequence[str]) -> None:
        """One row per prompt, one column per step that has all its pictures, from the files themselves."""
        files: dict[int, dict[int, Path]] = {}  # by step and row
        for path in self.folder.glob("step-*-*.*"):
            if (match := _SAMPLE.fullmatch(path.name)) and int(match[1]) <= last_step:
                files.setdefault(int(match[1]), {})[int(match[2])] = path
        rows = range(1, len(prompts) + 1)
        whole = {step: files[step] for step in sorted(files) if files[step].keys() >= set(rows)}
        shown = evenly(list(whole), GRID_COLUMNS)
        save_grid(
            self.folder / "grid.png",
            rows=prompts,
            columns=[f"step {step}" for step in shown],
            pictures=[[thumbnail(whole[step][row]) for step in shown] for row in rows],
        )


def at_strength(run: Training, strength: float) -> AbstractContextManager[None]:
    if strength == 1.0:
        return nullcontext()
    objective = run.objective
    assert isinstance(objective, Denoising), "the config is refused where no adapter trains"
    assert objective.strength is not None
    return objective.strength(strength)


def in_words(request: PictureRequest) -> str:
    return request.prompt if request.strength == 1.0 else f"{request.prompt} ({request.strength:g})"


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of `steps`, the first and the last among them, evenly spread."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def thumbnail(path: Path) -> Image.Image:
    """A picture, or a clip's middle frame, at the size of a grid's cell; the file is closed."""
    if path.suffix == ".mp4":
        small = middle_frame(path)
    else:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    small.thumbnail((LARGEST_CELL, LARGEST_CELL))
    return small
