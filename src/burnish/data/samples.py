"""What training draws from: one sample is a picture, or part of a clip, at one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from burnish.data.buckets import Bucket, Fit
from burnish.data.caption_rules import CaptionRules
from burnish.data.companions import Companion
from burnish.errors import DataError
from burnish.randomness import stable_seed

Role = Literal["train", "regularization"]
Teaches = Literal["", "direction", "opposites", "preference"]  # the sample itself, or some difference


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """What the samples of a batch share."""

    bucket: Bucket
    frames: int = 1
    references: tuple[tuple[int, int], ...] = ()  # sizes
    sees_itself: bool = False
    audio: bool = False
    teaches: Teaches = ""

    def __str__(self) -> str:
        references = "".join(f"+{height}x{width}" for height, width in self.references)
        itself = "+itself" if self.sees_itself else ""
        audio = "+audio" if self.audio else ""
        taught = f"+{self.teaches}" if self.teaches else ""
        return (
            f"{self.bucket}{f'x{self.frames}' if self.frames > 1 else ''}{itself}{references}{audio}{taught}"
        )


@dataclass(frozen=True, slots=True)
class Counts:
    """What of a sample the loss counts."""

    mask: Companion | None = None  # white counts
    alpha: bool = False  # what is opaque counts
    outside: float = 0.0  # weight of what does not
    prior: float = 0.0  # weight of keeping it as the model would have drawn it
    normalize: bool = False
    model: bool = False  # the target is what the model said before training, wherever it counts

    @property
    def masked(self) -> bool:
        return self.alpha or self.mask is not None

    @property
    def asks_model(self) -> bool:
        return self.model or (self.masked and self.prior > 0)


@dataclass(frozen=True, slots=True)
class Direction:
    """From one prompt to another: what a slider learns at a sample, whose own caption is the slider's target."""

    positive: str
    negative: str
    preserve: tuple[str, ...] = ()
    guidance: float = 1.0

    def prompts(self, preserved: str) -> tuple[str, str]:
        """Both, with a concept that is to stay behind each; empty for none."""
        behind = f", {preserved}" if preserved else ""
        return self.positive + behind, self.negative + behind

    @property
    def possible(self) -> tuple[str, ...]:
        """Every prompt that can be drawn."""
        return tuple(text for one in self.preserve or ("",) for text in self.prompts(one))


@dataclass(frozen=True, slots=True)
class Opposed:
    """The other picture of a pair: a slider's other end or, with a beta, what is not preferred."""

    sample: Sample  # of the same id, so that both are given the same noise
    beta: float | None = None
    decays: bool = False  # beta, with the time


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture or part of a clip at one size, with its caption and the rules of its source.

    `picture_id` is source index and relative path, so that files of the same name in two folders stay apart;
    `id` adds the size, and of a clip which part. Both are the same on every machine that has the same data.
    """

    picture_id: str
    path: Path
    source: int
    role: Role
    sha256: str  # of the file's bytes
    fit: Fit
    resolution: int  # which of the source's resolutions asked for it
    caption: str  # as the file says, before `rules`
    rules: CaptionRules
    background: str = "#ffffff"
    flip: bool = False
    weight: float = 1.0
    repeats: int = 1
    frames: int = 1
    start: float = 0.0  # of a clip: seconds after its first frame
    fps: float = 0.0  # at which a clip's frames are taken; 0 for a picture
    references: tuple[Companion, ...] = ()
    mask: Companion | None = None
    sees_itself: bool = False  # its own picture, or first frame, is the first reference
    sees_end: bool = False  # its last frame is the second
    fills_holes: bool = False  # with `mask`, or with drawn ones
    audio: bool = False  # of a clip: its sound is trained with its frames
    counts: Counts | None = None  # None: all of it alike
    direction: Direction | None = None
    opposed: Opposed | None = None
    unprompted: bool = False  # what the model says without a caption is asked for, too

    @property
    def is_clip(self) -> bool:
        return self.fps > 0

    @property
    def times(self) -> tuple[float, ...]:
        """When a clip's frames are on screen, in seconds after its first frame."""
        return tuple(self.start + index / self.fps for index in range(self.frames))

    @property
    def seconds(self) -> float:
        """For how long a clip's frames are on screen."""
        return self.frames / self.fps

    @property
    def shape(self) -> BatchShape:
        sizes = tuple(one.size for one in self.references)
        return BatchShape(self.bucket, self.frames, sizes, self.sees_itself, self.audio, self.teaches)

    @property
    def teaches(self) -> Teaches:
        if self.opposed is not None:
            return "opposites" if self.opposed.beta is None else "preference"
        return "direction" if self.direction is not None else ""

    @property
    def pictures(self) -> tuple[Sample, ...]:
        """Itself, and the other picture of its pair."""
        return (self,) if self.opposed is None else (self, self.opposed.sample)

    @property
    def has_references(self) -> bool:
        return self.sees_itself or bool(self.references)

    @property
    def bucket(self) -> Bucket:
        return self.fit.bucket

    @property
    def id(self) -> str:
        part = f"x{self.frames}@{self.start:.3f}s" if self.is_clip else ""
        return f"{self.picture_id}@{self.bucket}{part}"

    def captions(self, seed: int) -> tuple[str, ...]:
        """Every caption this sample can ever be trained on, and the prompts beside it."""
        own = self.rules.possible(self.caption, picture_id=self.picture_id, seed=seed)
        beside = () if self.direction is None else self.direction.possible
        return tuple(dict.fromkeys((*own, *beside, *([""] if self.unprompted else ()))))


def all_captions(samples: Sequence[Sample], seed: int) -> tuple[str, ...]:
    """Every caption that any of `samples` can be trained on, each once, in a stable order."""
    return tuple(dict.fromkeys(text for sample in samples for text in sample.captions(seed)))


def hold_out(
    samples: Sequence[Sample], pictures: int, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split off `pictures` training pictures for validation: (what is trained on, what is held out).

    By picture, at all its sizes, and by content: a copy under another name is held out with it, or the
    validation would see what was trained on. Regularization pictures are never held out.

    Raises:
        DataError: not more than `pictures` different training pictures are there.
    """
    contents = sorted({sample.sha256 for sample in samples if sample.role == "train"})
    if len(contents) <= pictures:
        raise DataError(
            f"{pictures} pictures are to be held out for validation, and there are {len(contents)}",
            remedy=f"Lower train.validation.pictures to {max(1, len(contents) // 10)}, or add pictures.",
        )
    held = set(sorted(contents, key=lambda content: stable_seed(seed, "held out", content))[:pictures])
    return (
        tuple(s for s in samples if s.sha256 not in held),
        tuple(s for s in samples if s.sha256 in held and s.role == "train"),
    )
