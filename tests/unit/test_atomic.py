"""Atomic files and folders, the sweep of leftovers, and what a failed write says."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from burnish.atomic import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    cannot_write,
    publish_folder,
    sweep,
)
from burnish.errors import DiskFull


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def living_pid() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def test_a_file_is_replaced_whole_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    atomic_write_bytes(path, b"old")
    atomic_write_text(path, "größer")
    assert path.read_bytes() == "größer".encode()
    atomic_write_json(path, {"b": [1, None], "a": 0.1})
    assert json.loads(path.read_text()) == {"a": 0.1, "b": [1, None]}
    assert os.listdir(tmp_path) == ["status.json"]


def test_a_reader_that_has_the_old_file_open_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    atomic_write_text(path, "old")
    with open(path) as reader:
        atomic_write_text(path, "new")
        assert reader.read() == "old"


def test_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    atomic_write_json(path, 1)
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(path, {"loss": float("nan")})
    assert path.read_text() == "1\n"


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    atomic_write_text(path, "fits")
    assert path.read_text() == "fits"


def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.mkdir()
    with pytest.raises(DiskFull, match=f"cannot write {path}"):
        atomic_write_text(path, "a folder stands in the way")
    assert os.listdir(tmp_path) == ["taken"]
    with pytest.raises(DiskFull, match="cannot write"):
        atomic_write_text(tmp_path / "missing" / "file", "no such folder")


def test_a_folder_appears_whole_and_replaces_nothing(tmp_path: Path) -> None:
    temporary, final = tmp_path / ".tmp-x", tmp_path / "final"
    (temporary / "inner").mkdir(parents=True)
    (temporary / "inner" / "file").write_text("content")
    publish_folder(temporary, final)
    assert (final / "inner" / "file").read_text() == "content"
    assert not temporary.exists()
    temporary.mkdir()
    with pytest.raises(FileExistsError):
        publish_folder(temporary, final)
    assert (final / "inner" / "file").exists()


def test_sweep_removes_what_dead_processes_left(tmp_path: Path, dead_pid: int) -> None:
    (tmp_path / f".tmp-00000250-{dead_pid}").mkdir()
    (tmp_path / f".tmp-00000250-{dead_pid}" / "adapter.safetensors").write_bytes(b"half")
    (tmp_path / f".tmp-status.json-0-{dead_pid}").write_bytes(b"half")
    for name in ("step-00000250", "status.json", ".tmp", f"tmp-1-{dead_pid}", ".tmp-notes"):
        (tmp_path / name).mkdir()
    assert sweep(tmp_path) == [f".tmp-00000250-{dead_pid}", f".tmp-status.json-0-{dead_pid}"]
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["step-00000250", "status.json", ".tmp", f"tmp-1-{dead_pid}", ".tmp-notes"]
    )


def test_sweep_keeps_what_living_processes_write(tmp_path: Path, living_pid: int) -> None:
    for pid in (living_pid, os.getpid()):
        (tmp_path / f".tmp-00000250-{pid}").mkdir()
    assert sweep(tmp_path) == []
    assert len(os.listdir(tmp_path)) == 2


def test_sweep_knows_a_number_that_was_given_to_a_later_process(tmp_path: Path) -> None:
    leftover = tmp_path / f".tmp-00000250-{os.getpid()}"
    leftover.mkdir()
    os.utime(leftover, (1_000_000_000, 1_000_000_000))  # long before this process began
    assert sweep(tmp_path) == [leftover.name]


def test_sweep_does_not_follow_a_link(tmp_path: Path, dead_pid: int) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (tmp_path / f".tmp-link-{dead_pid}").symlink_to(precious)
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["precious"]
    assert (precious / "file").read_text() == "kept"


def test_sweep_of_a_missing_folder_is_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_says_why_and_how_much(number: int, reason: str, tmp_path: Path) -> None:
    error = cannot_write(OSError(number, os.strerror(number)), tmp_path / "file", needed=3 * 2**20)
    assert error.exit_code == 3
    assert reason in error.message
    assert "3.0 MiB (3145728 bytes) needed" in error.message
    assert "bytes) free" in error.message
    assert error.remedy


def test_torch_is_not_imported_for_a_status_file() -> None:
    code = "import sys, burnish.atomic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
