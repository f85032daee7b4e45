"""Which samples each micro-step sees: a pure function of (samples, batch size, seed, position) (law L1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from burnish.data.samples import BatchShape, Sample
from burnish.errors import DataError
from burnish.randomness import python_random


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample in one batch."""

    sample: Sample
    epoch: int
    repeat: int
    flip: bool
    caption: str
    prompts: tuple[str, str] | None = None  # positive and negative, of a sample with a direction

    @property
    def id(self) -> str:
        """Unique within an epoch, the same in every epoch."""
        return draw_id(self.sample, self.repeat)


def draw_id(sample: Sample, repeat: int) -> str:
    return f"{sample.id}#{repeat}"


class BatchPlan:
    """Endless epochs over every sample times its repeats, in batches of one shape each.

    Shuffled within a shape and then batch by batch, anew in each epoch. The last batch of a shape may be
    smaller; nothing is dropped and nothing is drawn twice to fill it up.
    """

    def __init__(self, samples: Sequence[Sample], batch_size: int, seed: int) -> None:
        if not samples:
            raise DataError(
                "no picture is left to train on", remedy="Check data and train.validation.pictures."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.samples = tuple(sorted(samples, key=lambda sample: sample.id))
        self.batch_size = batch_size
        self.seed = seed
        self._by_shape: dict[BatchShape, list[tuple[int, int]]] = {}
        for index, sample in enumerate(self.samples):
            repeats = [(index, repeat) for repeat in range(sample.repeats)]
            self._by_shape.setdefault(sample.shape, []).extend(repeats)
        self.batches_per_epoch = sum(-(-len(draws) // batch_size) for draws in self._by_shape.values())
        self._order: tuple[int, list[list[tuple[int, int]]]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_order": None}  # a loader process builds its own

    @property
    def draws_per_epoch(self) -> int:
        return sum(len(draws) for draws in self._by_shape.values())

    @property
    def fingerprint(self) -> str:
        """Changes when the order of draws or what is drawn would: to be compared on resume."""
        hasher = hashlib.blake2b(digest_size=16)
        hasher.update(f"{self.batch_size}\x1f{self.seed}".encode())
        for s in self.samples:
            parts = (s.id, s.sha256, s.caption, s.rules, s.background, s.flip, s.weight, s.repeats, s.fit)
            hasher.update(repr(parts).encode("utf-8", "surrogatepass"))
            if s.is_clip or s.references or s.fills_holes:
                shown = [one.key() for one in (*s.references, *((s.mask,) if s.mask else ()))]
                hasher.update(repr((s.fps, s.fills_holes, shown)).encode())
            if s.audio:
                hasher.update(b"audio")
            if s.direction is not None:
                hasher.update(repr(s.direction).encode("utf-8", "surrogatepass"))
            if s.opposed is not None:
                other = s.opposed.sample
                hasher.update(repr((other.sha256, other.fit, s.opposed.beta, s.opposed.decays)).encode())
            if s.counts is not None:
                hasher.update(repr(replace(s.counts, mask=None)).encode())
                hasher.update(repr(s.counts.mask.key() if s.counts.mask else None).encode())
        return hasher.hexdigest()

    def epoch_of(self, position: int) -> int:
        return position // self.batches_per_epoch

    def position_of_epoch(self, epoch: int) -> int:
        """The first micro-step of an epoch, counted from 0."""
        return epoch * self.batches_per_epoch

    def largest(self) -> int:
        """A micro-step of the first epoch that sees as many pixels as any."""
        batches = self._epoch(0)

        def pixels(at: int) -> int:
            shape = self.samples[batches[at][0][0]].shape
            shown = sum(height * width for height, width in shape.references)
            together = 2 if shape.teaches == "preference" else 1
            return together * len(batches[at]) * (shape.bucket.area * shape.frames + shown)

        return max(range(len(batches)), key=pixels)

    def draws(self, position: int) -> tuple[Draw, ...]:
        """What micro-step `position` sees, in order; all of one shape."""
        epoch, at = divmod(position, self.batches_per_epoch)
        return tuple(
            self._draw(self.samples[index], repeat, epoch) for index, repeat in self._epoch(epoch)[at]
        )

    def _draw(self, sample: Sample, repeat: int, epoch: int) -> Draw:
        name = draw_id(sample, repeat)
        flip = sample.flip and python_random(self.seed, "flip", name, epoch).random() < 0.5
        caption = sample.rules.draw(
            sample.caption, picture_id=sample.picture_id, draw_id=name, epoch=epoch, seed=self.seed
        )
        prompts = None
        if sample.direction is not None:
            kept = sample.direction.preserve or ("",)
            prompts = sample.direction.prompts(
                python_random(self.seed, "preserved", name, epoch).choice(kept)
            )
        return Draw(sample, epoch, repeat, flip, caption, prompts)

    def _epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        return self._order[1]

    def _shuffled(self, epoch: int) -> list[list[tuple[int, int]]]:
        batches: list[list[tuple[int, int]]] = []
        for shape in sorted(self._by_shape):
            draws = list(self._by_shape[shape])
            python_random(self.seed, "order", epoch, str(shape)).shuffle(draws)
            batches += [draws[at : at + self.batch_size] for at in range(0, len(draws), self.batch_size)]
        python_random(self.seed, "batches", epoch).shuffle(batches)
        return batches
