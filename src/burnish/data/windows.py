"""Which frames of a clip are taken: how many, from when on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from burnish.data.pictures import BadPicture
from burnish.errors import DataError
from burnish.family import Family

Choice = Literal["start", "middle", "spread", "every"]

_ROUNDING = 0.05  # of a frame: containers round times to milliseconds


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a clip. `start` in seconds after its first frame."""

    frames: int
    start: float


@dataclass(frozen=True, slots=True)
class Windows:
    """Where windows lie, in clips of one source. `counts` None: as many frames as `usual`, or fewer."""

    counts: tuple[int, ...] | None
    usual: int
    compression: int  # frames per latent frame after the first
    fps: float
    choice: Choice
    spread: int

    @classmethod
    def of(
        cls,
        family: Family,
        counts: Sequence[int] | None,
        fps: float | None,
        choice: Choice,
        spread: int | None,
    ) -> Windows:
        """For a source of a video family.

        Raises:
            DataError: a number of frames that the VAE does not take.
        """
        usual = family.defaults.fps
        if family.audio is not None and fps not in (None, usual):
            raise DataError(
                f"data.fps: with sound {family.title} takes clips at {usual:g} frames per second; got {fps:g}",
                remedy="Leave fps out, or take model.audio out.",
            )
        compression = family.latents.frame_compression
        assert compression is not None, "a video family has a time axis"
        for count in counts or ():
            if (count - 1) % compression:
                lower = count - (count - 1) % compression
                raise DataError(
                    f"data.frames: {family.title} takes 1 frame and then multiples of {compression}; got {count}",
                    remedy=f"Take {lower} or {lower + compression}.",
                )
        chosen = tuple(sorted(set(counts))) if counts else None
        return cls(
            chosen, family.defaults.frames, compression, fps or family.defaults.fps, choice, spread or 1
        )

    def within(self, duration: float) -> list[Window]:
        """The windows of a clip of so many seconds.

        Raises:
            BadPicture: it is too short for any.
        """
        there = math.floor(duration * self.fps + _ROUNDING)
        counts = [count for count in self._counts(there) if count <= there]
        if not counts:
            least = min(self.counts) if self.counts else 1 + self.compression
            fewer = there - (there - 1) % self.compression
            shorter = f", or add {fewer} to data.frames" if self.counts and there else ""
            raise BadPicture(
                f"{duration:.2f} seconds are {there} frames at {self.fps:g} per second; at least {least} are taken",
                remedy=f"Use a longer clip{shorter}.",
            )
        return [window for count in counts for window in self._places(count, there)]

    def _counts(self, there: int) -> tuple[int, ...]:
        if self.counts is not None:
            return self.counts
        longest = there - (there - 1) % self.compression
        # One frame of a clip would be a picture, which nobody asked for.
        return (min(self.usual, longest),) if longest > 1 else ()

    def _places(self, count: int, there: int) -> list[Window]:
        """Starts are whole frames at `fps`."""
        last = there - count
        match self.choice:
            case "start":
                starts = [0]
            case "middle":
                starts = [last // 2]
            case "spread":
                starts = [round(last * part / (self.spread - 1)) for part in range(self.spread)]
            case "every":
                starts = list(range(0, last + 1, count))
        return [Window(count, start / self.fps) for start in dict.fromkeys(starts)]
