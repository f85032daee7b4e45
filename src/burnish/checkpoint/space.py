"""Room on the disk: asked for before a run, and waited for in the middle of one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from burnish.atomic import (
    cannot_write,
    free_bytes,
    fsync_folder,
    readable_bytes,
    remove,
    temporary_name,
    write_durably,
)
from burnish.errors import DiskFull

_NAP_S = 0.2  # how late a stop request may be noticed while waiting
_TEST_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Space:
    """What a run will write to its volume, in bytes, beyond what it has written already."""

    needed: int
    free: int


def check_space(folder: Path, bytes_per_checkpoint: int, keep: int, beside: int = 0) -> Space:
    """Refuse a run whose checkpoints will not fit, before any model loads.

    The peak is `keep` checkpoints and the one being written, and `beside` bytes that go elsewhere on the volume; what
    `folder` holds already counts as written. A test file is written, flushed and renamed as a checkpoint would be.
    The folder is made if absent.

    Raises:
        DiskFull: too little space, or the folder cannot be written to.
    """
    test = folder / temporary_name("test")
    renamed = folder / temporary_name("test-renamed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove(test)
        held = _bytes_below(folder)
        write_durably(test, bytes(_TEST_BYTES))
        os.replace(test, renamed)
        fsync_folder(folder)
        free = free_bytes(folder)
    except OSError as error:
        raise cannot_write(error, folder) from error
    finally:
        remove(test)
        remove(renamed)
    needed = max(0, bytes_per_checkpoint * (keep + 1) - held) + beside
    if free < needed:
        others = f" and {readable_bytes(beside)} beside them" if beside else ""
        raise DiskFull(
            f"{keep + 1} checkpoints of {readable_bytes(bytes_per_checkpoint)}{others} do not fit in {folder}: "
            f"{readable_bytes(needed)} more needed, {readable_bytes(free)} free",
            remedy="Free space, lower `save.keep`, or set `save.folder` to a larger disk.",
        )
    return Space(needed, free)


def _bytes_below(folder: Path) -> int:
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)


def wait_for_space(
    folder: Path,
    needed: int,
    *,
    stop_requested: Callable[[], bool],
    poll_s: float = 5.0,
    on_wait: Callable[[int], None] | None = None,
) -> bool:
    """Wait until `needed` bytes are free on the volume of `folder`.

    Looks at once and then every `poll_s` seconds; `on_wait` hears the free bytes at each look that found too
    few. `stop_requested` is asked five times a second. It is a function and no `threading.Event`, because a
    signal handler that sets an event can deadlock with a wait on it in the same thread.

    Returns:
        True when there is space, False when a stop was requested first.
    """
    while (free := free_bytes(folder)) < needed:
        if on_wait is not None:
            on_wait(free)
        if not nap(poll_s, stop_requested):
            return False
    return True


def nap(duration_s: float, stop_requested: Callable[[], bool]) -> bool:
    """Sleep, in short pieces; False as soon as a stop is requested."""
    until = time.monotonic() + duration_s
    while (left := until - time.monotonic()) > 0:
        if stop_requested():
            return False
        time.sleep(min(_NAP_S, left))
    return not stop_requested()
