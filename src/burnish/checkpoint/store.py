"""A folder of checkpoints: saved whole or not at all, verified before use, never lost to a prune.

    checkpoints/
      step-00000250/            adapter.safetensors, optimizer.safetensors, ..., state.json, manifest.json
      step-00000500/
      step-00000500.superseded/ only while step 500 is replaced: the good old one until the new one verified
      broken/                   what did not verify and stood in the way of a save
      .tmp-00000750-4711/       being written by process 4711

The commit is one rename. Weights, averages, optimizer, random state and data position appear together with
it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from burnish import atomic
from burnish.atomic import Json
from burnish.checkpoint.content import named_files, refuse_non_finite, required_bytes, state_bytes
from burnish.checkpoint.manifest import (
    MANIFEST,
    STATE,
    FileEntry,
    Manifest,
    Verify,
    new_manifest,
    render,
    verify_folder,
)
from burnish.checkpoint.space import nap, wait_for_space
from burnish.checkpoint.tensor_file import file_size, read_tensors, write_tensors
from burnish.errors import CheckpointError, DiskFull

_log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(?P<step>\d{8,})(?P<superseded>\.superseded)?")

Observer = Callable[[str], None]
"""Hears "before NAME" and "after NAME" of every system call of a save; a test ends the process there."""

_Watch = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that verified, and why newer ones were passed over: each reason names its file."""

    path: Path
    step: int
    manifest: Manifest
    passed_over: list[str]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint in memory; `tensors` by the names they were saved under, on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Json]
    manifest: Manifest
    passed_over: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints of one run. One process saves; any may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: dict[Path, tuple[tuple[int, int, int], ...]] = {}

    # Saving

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Json],
        *,
        config_hash: str,
        observer: Observer | None = None,
    ) -> Path:
        """Write one checkpoint and commit it by one rename; then read it back and verify it.

        Saving a step again replaces it. Until the new one is verified, the old one stays loadable; one that
        does not verify is moved to `broken/`.

        Args:
            step: optimizer steps done.
            tensors: for each file name ("adapter", "ema", "optimizer", ...) its tensors; on any device.
            state: whatever else is needed to go on, as JSON without NaN.
            config_hash: of the config that made it; kept in the manifest.
            observer: hears every step of the save.

        Returns:
            The folder of the checkpoint.

        Raises:
            NonFiniteLoss: "adapter" or "ema" holds NaN or infinity; nothing is written.
            DiskFull: the disk did not take it; earlier checkpoints are as they were.
            CheckpointError: it did not verify after the commit, or the format cannot hold a value.
        """
        refuse_non_finite(tensors)
        files = named_files(tensors)
        document = state_bytes(state)
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / atomic.temporary_name(f"{step:08d}")
        watch = partial(_watched, observer)
        try:
            self._write(temporary, step, files, document, config_hash, watch)
            self._commit(temporary, final, step, watch)
        except OSError as error:
            atomic.remove(temporary)  # before free space is counted, which it takes part of
            raise atomic.cannot_write(error, final, needed=required_bytes(tensors, state)) from error
        finally:
            atomic.remove(temporary)
        return final

    def save_waiting(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Json],
        *,
        config_hash: str,
        stop_requested: Callable[[], bool],
        poll_s: float = 5.0,
        on_wait: Callable[[DiskFull], None] | None = None,
    ) -> Path:
        """As `save`, but at a full disk try again once there is space, until a stop is requested.

        `on_wait` hears each failure. At least `poll_s` seconds pass between two tries, because a quota or a
        read-only file system does not show in the free space.

        Raises:
            DiskFull: the disk is still full and a stop was requested.
        """
        needed = required_bytes(tensors, state)
        while True:
            try:
                return self.save(step, tensors, state, config_hash=config_hash)
            except DiskFull as full:
                if on_wait is not None:
                    on_wait(full)
                if not nap(poll_s, stop_requested):
                    raise
                if not wait_for_space(self.folder, needed, stop_requested=stop_requested, poll_s=poll_s):
                    raise

    def _write(
        self,
        temporary: Path,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        document: bytes,
        config_hash: str,
        watch: _Watch,
    ) -> None:
        with watch("make folder"):
            if not self.folder.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                atomic.fsync_folder(self.folder.parent)
            atomic.remove(temporary)
            temporary.mkdir()
        entries: dict[str, FileEntry] = {}
        for name, content in files.items():
            with open(temporary / name, "xb", buffering=0) as file:
                with watch(f"write {name}"):
                    digest = write_tensors(file.fileno(), content)
                with watch(f"flush {name}"):
                    os.fsync(file.fileno())
            entries[name] = FileEntry(size=file_size(content), sha256=digest)
        entries[STATE] = _write_small(temporary / STATE, document, watch)
        manifest = new_manifest(step, config_hash, entries)
        _write_small(temporary / MANIFEST, render(manifest), watch)
        with watch("flush folder"):
            atomic.fsync_folder(temporary)

    def _commit(self, temporary: Path, final: Path, step: int, watch: _Watch) -> None:
        superseded = final.with_name(f"{final.name}.superseded")
        if final.exists():
            self._make_way(final, step, superseded, watch)
        with watch("rename"):
            os.rename(temporary, final)
        with watch("flush parent"):
            atomic.fsync_folder(self.folder)
        with watch("verify"):
            try:
                _verified_as(final, step, "quick")
                self._verified[final] = _signature(final)
            except CheckpointError as error:
                kept = self.set_aside(final)
                raise CheckpointError(
                    f"a checkpoint did not read back as written: {error.message}; it is kept as {kept}",
                    remedy="Check the disk: earlier checkpoints are untouched.",
                ) from error
        if superseded.exists():
            with watch("drop superseded"):
                self._discard(superseded)

    def _make_way(self, final: Path, step: int, superseded: Path, watch: _Watch) -> None:
        try:
            _verified_as(final, step, "quick")
        except CheckpointError as error:
            with watch("set aside"):
                kept = self.set_aside(final)
            _log.warning("%s; it is replaced and kept as %s", error.message, kept)
            return
        if superseded.exists():
            with watch("drop superseded"):
                self._discard(superseded)
        with watch("supersede"):
            os.rename(final, superseded)
            atomic.fsync_folder(self.folder)

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint; a crash half-way leaves a `.tmp-`, never a torn `step-`."""
        doomed = self.folder / atomic.temporary_name(f"discarded-{path.name}")
        atomic.remove(doomed)
        os.rename(path, doomed)
        atomic.remove(doomed)
        self._verified.pop(path, None)

    def set_aside(self, path: Path) -> Path:
        """Move a checkpoint to `broken/`, where nothing looks for one; returns its new place."""
        shelf = self.folder / "broken"
        shelf.mkdir(exist_ok=True)
        kept, number = shelf / path.name, 1
        while kept.exists():
            number += 1
            kept = shelf / f"{path.name}-{number}"
        os.rename(path, kept)
        atomic.fsync_folder(self.folder)
        self._verified.pop(path, None)
        return kept

    # Loading

    def newest(self, verify: Verify = "quick") -> Found | None:
        """The newest checkpoint that verifies, or None if none was ever committed here.

        Nothing is deleted or moved. "quick" hashes files below a GiB, "full" all of them.

        Raises:
            CheckpointError: there are checkpoints and not one verifies.
        """
        reasons: list[str] = []
        for path, step in self._newest_first():
            try:
                manifest = _verified_as(path, step, verify)
            except CheckpointError as error:
                reasons.append(error.message)
                continue
            return Found(path, step, manifest, reasons)
        _raise_if_any(self.folder, reasons)
        return None

    def load(self, path: Path, verify: Verify = "quick") -> Loaded:
        """Verify a checkpoint and read it.

        Raises:
            CheckpointError: a file is missing, damaged or unreadable; the message names it.
        """
        manifest = verify_folder(path, verify)
        tensors = {name: read_tensors(path / f"{name}.safetensors") for name in manifest.tensor_names}
        state = json.loads((path / STATE).read_bytes())
        return Loaded(manifest.step, tensors, state, manifest)

    def load_newest(self, verify: Verify = "quick") -> Loaded | None:
        """`newest` and `load` in one: also a checkpoint that verifies but cannot be read is passed over.

        Raises:
            CheckpointError: there are checkpoints and not one can be loaded.
        """
        reasons: list[str] = []
        for path, step in self._newest_first():
            try:
                loaded = self.load(path, verify)
                _must_be(step, loaded.step, path)
            except CheckpointError as error:
                reasons.append(error.message)
                continue
            return replace(loaded, passed_over=tuple(reasons))
        _raise_if_any(self.folder, reasons)
        return None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, verified or not, in rising order."""
        return sorted({step for _, step in self._newest_first()})

    def _newest_first(self) -> Iterator[tuple[Path, int]]:
        """Committed folders; of one step the final one comes before the superseded one."""
        if not self.folder.is_dir():
            return
        found: list[tuple[int, bool, Path]] = []
        try:
            entries = list(self.folder.iterdir())
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error.strerror}") from error
        for entry in entries:
            match = _STEP.fullmatch(entry.name)
            if match and entry.is_dir():
                found.append((int(match["step"]), match["superseded"] is None, entry))
        for step, _, path in sorted(found, reverse=True):
            yield path, step

    # Keeping

    def prune(self, keep: int, protect: Collection[int] = ()) -> list[int]:
        """Delete old checkpoints; returns their steps.

        Kept are the newest `keep` that verify (at least 2, whatever `keep` says), every step in `protect`,
        and every one that does not verify: those are evidence, not waste. So the last verified one always
        stays.
        """
        good: dict[int, Path] = {}
        superseded: list[Path] = []
        for path, step in self._newest_first():
            if not self._still_verifies(path, step):
                continue
            if step in good:
                superseded.append(path)  # the one that took its place verified
            else:
                good[step] = path
        doomed = [step for step in list(good)[max(keep, 2) :] if step not in protect]
        for path in [*superseded, *(good[step] for step in reversed(doomed))]:
            try:
                self._discard(path)
            except OSError as error:
                raise atomic.cannot_write(error, path) from error
        return sorted(doomed)

    def sweep(self) -> list[str]:
        """Remove what dead processes left half-written; returns the names."""
        return atomic.sweep(self.folder)

    def _still_verifies(self, path: Path, step: int) -> bool:
        """Whether it verifies; files that did not change since they last did are not hashed again."""
        try:
            if self._verified.get(path) != _signature(path):
                _verified_as(path, step, "quick")
                self._verified[path] = _signature(path)
        except (CheckpointError, OSError):
            return False
        return True


def _write_small(path: Path, data: bytes, watch: _Watch) -> FileEntry:
    with open(path, "xb", buffering=0) as file:
        with watch(f"write {path.name}"):
            atomic.write_all(file.fileno(), memoryview(data))
        with watch(f"flush {path.name}"):
            os.fsync(file.fileno())
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _verified_as(path: Path, step: int, verify: Verify) -> Manifest:
    manifest = verify_folder(path, verify)
    _must_be(step, manifest.step, path)
    return manifest


def _must_be(step: int, written: int, path: Path) -> None:
    if step != written:
        raise CheckpointError(f"{path / MANIFEST} is of step {written}; the folder was renamed")


def _signature(path: Path) -> tuple[tuple[int, int, int], ...]:
    stats = (file.stat() for file in sorted(path.iterdir()))
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _raise_if_any(folder: Path, reasons: list[str]) -> None:
    if reasons:
        raise CheckpointError(
            f"no checkpoint in {folder} verifies:\n  " + "\n  ".join(reasons),
            remedy="Restore one from a copy, or start a new run under another name.",
        )


@contextmanager
def _watched(observer: Observer | None, operation: str) -> Iterator[None]:
    if observer is not None:
        observer(f"before {operation}")
    yield
    if observer is not None:
        observer(f"after {operation}")
