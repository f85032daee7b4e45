"""What a traced step is given and how it is made: each part is that of the run itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from burnish.conditioning import Conditioning
from burnish.config.method import Word
from burnish.family import Family
from burnish.objective import Denoising
from burnish.planner.lesson import PICTURES, Lesson

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step is given: pixels as (height, width), frames, pictures at once."""

    height: int
    width: int
    frames: int = 1
    batch: int = 1  # of one of its parts
    references: int = 0  # pictures that the model is shown beside the caption
    masked: bool = False  # the first of them has a hole
    lesson: Lesson = PICTURES
    parts: int = 1  # of a micro-batch, one after the other


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the step is made; each part is that of the run itself."""

    # By part, a denoiser or text encoder, then by module what its adapter is; or, of its own weights, by weight its
    # learning rate.
    choices: Mapping[str, Mapping[str, Any]]
    objective: Denoising
    optimizer: Callable[[Groups], torch.optim.Optimizer]
    kept_as: str | None = None  # format of the large frozen layers; None: in the run's number type
    keep_activations: Callable[[Family], None] = lambda family: None  # sets what is kept for backward
    accumulates: bool = False
    averages: bool = False
    dropout: float = 0.0
    own_weights: bool = False  # the parts' own weights train, in place of adapters
    word: Word | None = None  # trains in every vocabulary
    caption: str | None = None  # encoded in the step itself, for all rows; None: encoded before
    texts_kept_as: str | None = None  # as `kept_as`, of the text encoders' layers
    releases: bool = False  # each is stepped in backward; the optimizer is then a OneByOne, as with the next
    offloads: bool = False  # the optimizer's state waits on the host
    shown: Callable[[Shape], Conditioning] = lambda shape: Conditioning({})  # of the references
