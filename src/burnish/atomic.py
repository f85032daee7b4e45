"""Files and folders that are either the old one or the new one, never a part of either.

The order is always the same: write beside the target under a `.tmp-` name, flush to the disk, rename, flush
the folder that holds the name. A crash leaves at most a `.tmp-NAME-PID` behind, which `sweep` removes once
its process is gone. Imports no torch: the command line and the status file use it too.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import psutil

from burnish.errors import DiskFull

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_TEMPORARY = re.compile(r"\.tmp-.*-(?P<pid>\d+)", re.DOTALL)
_numbers = itertools.count()  # two threads may write the same path at once

_REASONS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the allowed file size (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
}


def atomic_write_bytes(path: Path, data: bytes, *, scratch: Path | None = None) -> None:
    """Replace `path` by a file of `data`, durably; the folder must exist.

    Args:
        scratch: where to write first, on the same volume; beside `path` if absent. One folder of leftovers is
            swept faster than thousands.

    Raises:
        DiskFull: no space, quota, read-only or not writable; the old file is untouched.
    """
    temporary = (scratch or path.parent) / temporary_name(f"{path.name[:80]}-{next(_numbers)}")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        remove(temporary)
        raise cannot_write(error, path, needed=len(data)) from error


def atomic_write_text(path: Path, text: str) -> None:
    """As `atomic_write_bytes`, in UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path, value: Json) -> None:
    """As `atomic_write_bytes`, as JSON with sorted keys and a newline at the end.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON has no words for.
    """
    atomic_write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def publish_folder(temporary: Path, final: Path) -> None:
    """Make `temporary`, fully written, appear as `final`, which must not exist, by one durable rename.

    Raises:
        DiskFull: a flush or the rename failed; `final` was not made.
        FileExistsError: `final` is there already.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    try:
        _flush_tree(temporary)
        os.rename(temporary, final)
        fsync_folder(final.parent)
    except OSError as error:
        raise cannot_write(error, final) from error


def replace_folder(temporary: Path, final: Path) -> None:
    """As `publish_folder`, in place of a folder that may be there: between two renames neither is.

    Raises:
        DiskFull: a flush or a rename failed; the old folder is in its place.
    """
    old = final.parent / temporary_name(f"{final.name[:80]}-{next(_numbers)}")
    try:
        _flush_tree(temporary)
        if final.exists():
            os.rename(final, old)
        os.rename(temporary, final)
        fsync_folder(final.parent)
    except OSError as error:
        raise cannot_write(error, final) from error
    finally:
        if old.exists() and not final.exists():
            os.rename(old, final)
    remove(old)


def _flush_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_file(Path(parent, name))
        fsync_folder(Path(parent))


def write_durably(path: Path, data: bytes) -> None:
    """Create `path`, which must not exist, with `data`, and flush it to the disk. Raises OSError."""
    with open(path, "xb", buffering=0) as file:
        write_all(file.fileno(), memoryview(data))
        os.fsync(file.fileno())


def write_all(descriptor: int, data: memoryview) -> None:
    """`os.write` until all of `data` is written: one call may write less than it was given."""
    while len(data):
        data = data[os.write(descriptor, data) :]


def fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)  # Windows flushes only what is open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Flush the names in `folder`: without it a rename may be undone by a power loss."""
    if os.name == "nt":  # a folder cannot be opened there, and NTFS journals names by itself
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(label: str) -> str:
    """A name that `sweep` recognises as this process's."""
    return f".tmp-{label}-{os.getpid()}"


def sweep(folder: Path) -> list[str]:
    """Remove every `.tmp-*-PID` in `folder` whose process is gone; returns their names.

    What a living process is writing is kept. A process younger than the leftover only inherited its number
    (in a container the trainer is often process 1, run after run), so that leftover is removed too.
    """
    if not folder.is_dir():
        return []
    removed = []
    for entry in sorted(folder.iterdir()):
        match = _TEMPORARY.fullmatch(entry.name)
        if match and _is_orphan(entry, int(match["pid"])):
            remove(entry)
            if not os.path.lexists(entry):
                removed.append(entry.name)
    return removed


def remove(path: Path) -> None:
    """Delete a file, a link or a folder tree as far as the system lets us; gone already is fine.

    It raises nothing: it cleans up after errors, such as a disk that turned read-only, and must not hide them.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_orphan(entry: Path, pid: int) -> bool:
    try:
        # The clock of a process's start counts in hundredths; a second of slack keeps a fresh folder safe.
        return psutil.Process(pid).create_time() > entry.lstat().st_mtime + 1.0
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, FileNotFoundError):
        return False


def free_bytes(folder: Path) -> int:
    """Bytes this user may still write on the volume of `folder`, or of its nearest existing parent."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cannot_write(error: OSError, path: Path, *, needed: int | None = None) -> DiskFull:
    """The error to raise for a failed write: why, where, how much was needed and how much is free."""
    number = error.errno or 0
    reason = _REASONS.get(number, error.strerror or str(error))
    try:
        free = f"{readable_bytes(free_bytes(path.parent))} free"
    except OSError:
        free = "free space unknown"
    sizes = free if needed is None else f"{readable_bytes(needed)} needed, {free}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free space or choose another folder, then start again: it goes on from the last checkpoint."
    elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "Choose a folder this user may write to, or correct its permissions."
    else:
        remedy = "Check the disk and choose another folder if it fails again."
    return DiskFull(f"cannot write {path}: {reason} ({sizes})", remedy=remedy)


def readable_bytes(count: int) -> str:
    """With the exact count beside it, since a limit may lie between two rounded sizes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit} ({count} bytes)"
    return f"{count} bytes"
