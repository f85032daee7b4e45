"""Files of the cache and of reports: there whole or not at all, whoever is killed when."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import socket
from pathlib import Path

from burnish.errors import DiskFull, MachineError

_counter = itertools.count()
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_whole(path: Path, data: bytes, *, scratch: Path) -> None:
    """Write beside, flush to the disk, rename over `path`. `scratch` is a folder on the same file system.

    Raises:
        DiskFull: no space, or the folder cannot be written.
    """
    temporary = scratch / f"{socket.gethostname()}-{os.getpid()}-{next(_counter)}.tmp"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _not_written(path, len(data), error) from error


def sweep_scratch(scratch: Path) -> int:
    """Remove what processes of this machine that are gone left half written; how many files."""
    swept = 0
    for left in scratch.glob(f"{socket.gethostname()}-*.tmp"):
        pid = left.stem.removeprefix(f"{socket.gethostname()}-").partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            left.unlink(missing_ok=True)
            swept += 1
    return swept


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid)


def _not_written(path: Path, size: int, error: OSError) -> MachineError:
    if error.errno in _NO_ROOM:
        folder = next(parent for parent in path.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        return DiskFull(
            f"{path}: {size:,} bytes needed, {free:,} free",
            remedy="Free some space, or point memory.cache_folder at a larger disk.",
        )
    return DiskFull(
        f"{path} cannot be written: {error.strerror}", remedy="Choose another memory.cache_folder."
    )
