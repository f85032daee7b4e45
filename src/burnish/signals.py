"""SIGINT and SIGTERM (law L6): the first asks the run to finish its step, save and exit; the second exits now."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from burnish.errors import Interrupted


class StopRequest:
    """Context manager that turns signals into a request.

    Outside `deferred` work (loading, preparing) the first signal raises `Interrupted` at once: every file written
    there is atomic, so nothing is lost. While training, `deferred = True`, it only sets `requested`: the step is
    finished and saved, and samples are left out.
    """

    def __init__(self) -> None:
        self.requested: int | None = None  # the signal's number
        self.deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = number
        if not self.deferred:
            self.raise_if_requested()

    def raise_if_requested(self) -> None:
        """For work that may be left unfinished, such as drawing samples.

        Raises:
            Interrupted: a stop was asked for.
        """
        if self.requested is not None:
            name = signal.Signals(self.requested).name
            raise Interrupted(f"stopped by {name}", signal_number=self.requested)
