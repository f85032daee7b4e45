"""Where a command's words go: the terminal, and the file of `--log`."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from rich.console import Console

from burnish.cli.progress import PlainProgress, TerminalProgress
from burnish.errors import BurnishError, UserError
from burnish.events import Events


class Output:
    """Context manager: progress and words to the terminal, the same as plain lines to the log, if there is one.

    Raises:
        UserError: the log cannot be written.
    """

    def __init__(self, log: Path | None = None) -> None:
        self.console = Console(highlight=False)
        self._log = log
        self._file: IO[str] | None = None
        self._handler: logging.Handler | None = None
        self._terminal: TerminalProgress | None = None

    def __enter__(self) -> Self:
        if self._log is not None:
            try:
                self._log.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._log.open("a", encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                raise UserError(f"the log {self._log} cannot be written: {error.strerror}") from error
            self._handler = logging.StreamHandler(self._file)
            self._handler.setLevel(logging.WARNING)  # what goes well is told by the progress lines
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logging.getLogger().addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_progress()
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
        if self._file is not None:
            if isinstance(error, BurnishError):
                self._file.write(f"{error}\n")
            elif error is not None:
                self._file.writelines(traceback.format_exception(error))
            self._file.close()

    def say(self, text: str) -> None:
        """A line of plain text."""
        self.console.print(text, markup=False, soft_wrap=True)
        if self._file is not None:
            self._file.write(f"{text}\n")
            self._file.flush()

    def say_error(self, error: BurnishError) -> None:
        """An error that does not end the command."""
        from burnish.cli.edge import report

        report(error)
        if self._file is not None:
            self._file.write(f"{error}\n")
            self._file.flush()

    def progress(self) -> Events:
        """A listener for one run: a live display on a terminal, plain lines otherwise, and the log."""
        self.end_progress()
        listeners = Events()
        if self.console.is_terminal:
            self._terminal = TerminalProgress(self.console)
            listeners.listeners.append(self._terminal)
        else:
            listeners.listeners.append(PlainProgress(self.console.file))
        if self._file is not None:
            listeners.listeners.append(PlainProgress(self._file))
        return listeners

    def end_progress(self) -> None:
        """Take the live display off, so that what is printed next stays."""
        if self._terminal is not None:
            self._terminal.stop()
            self._terminal = None
