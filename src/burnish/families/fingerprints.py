"""Hashes of weight files, remembered between runs so that a large file is read once."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from burnish.atomic import atomic_write_text
from burnish.errors import DiskFull
from burnish.families.sources import user_cache_folder

_CHUNK = 1 << 22


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 over the contents of `files` in the given order; their names and places do not matter.

    A file's own hash is remembered by path, size, modification time and inode in the user's cache folder.

    Raises:
        OSError: a file cannot be read.
    """
    memory_file = user_cache_folder() / "fingerprints.json"
    memory = _remembered(memory_file)
    total = hashlib.sha256()
    learned: dict[str, str] = {}
    for file in files:
        key = _key(file)
        known = memory.get(key) or learned.get(key)
        if known is None:
            known = learned[key] = _sha256(file)
        total.update(bytes.fromhex(known))
    if learned:
        # A cache folder that cannot be written costs time on the next run, nothing else.
        with contextlib.suppress(OSError, DiskFull):
            _remember(memory_file, learned)
    return total.hexdigest()


def _key(file: Path) -> str:
    state = file.stat()
    return f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}|{state.st_ino}"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _remembered(memory_file: Path) -> dict[str, str]:
    try:
        memory = json.loads(memory_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(memory, dict):
        return {}
    return {key: value for key, value in memory.items() if isinstance(value, str) and len(value) == 64}


def _remember(memory_file: Path, learned: dict[str, str]) -> None:
    memory_file.parent.mkdir(parents=True, exist_ok=True)
    memory = {**_remembered(memory_file), **learned}
    atomic_write_text(memory_file, json.dumps(memory, indent=0))
