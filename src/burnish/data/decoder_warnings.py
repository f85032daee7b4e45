"""Warnings of the picture decoder, caught per thread and handed to the caller instead of the terminal.

`warnings.catch_warnings` swaps process-wide state and is therefore not safe in a thread pool. Here the first
thread to enter installs one hook, the last to leave removes it, and every thread inside reads its own list.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_lock = threading.Lock()
_inside = 0
_outer: warnings.catch_warnings[None] | None = None
_mine = threading.local()


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The texts of warnings this thread raises inside the block; none is printed or becomes an error."""
    texts: list[str] = []
    _enter()
    previous = getattr(_mine, "texts", None)
    _mine.texts = texts
    try:
        yield texts
    finally:
        _mine.texts = previous
        _leave()


def _enter() -> None:
    global _inside, _outer
    with _lock:
        if _inside == 0:
            _outer = warnings.catch_warnings()
            _outer.__enter__()
            passed_on = warnings.showwarning
            warnings.simplefilter("always")

            def show(
                message: Warning | str,
                category: type[Warning],
                filename: str,
                lineno: int,
                file: TextIO | None = None,
                line: str | None = None,
            ) -> None:
                texts = getattr(_mine, "texts", None)
                if texts is None:  # a thread that has nothing to do with pictures
                    passed_on(message, category, filename, lineno, file, line)
                else:
                    texts.append(str(message))

            warnings.showwarning = show
        _inside += 1


def _leave() -> None:
    global _inside, _outer
    with _lock:
        _inside -= 1
        if _inside == 0 and _outer is not None:
            _outer.__exit__(None, None, None)
            _outer = None
