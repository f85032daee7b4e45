"""A disk that does not take the checkpoint: the earlier one stays, and the message has the numbers."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from burnish.atomic import atomic_write_bytes, free_bytes
from burnish.checkpoint.space import check_space, nap, wait_for_space
from burnish.checkpoint.store import CheckpointStore
from burnish.errors import DiskFull

MIB = 2**20


def content(step: int, mib: int = 1) -> dict[str, dict[str, Tensor]]:
    return {"adapter": {"w": torch.full((mib, MIB // 4), float(step))}}


def save(store: CheckpointStore, step: int, mib: int = 1) -> None:
    store.save(step, content(step, mib), {}, config_hash="x")


def intact(store: CheckpointStore, step: int) -> None:
    """The newest is `step`, whole, and nothing half-written is beside it."""
    loaded = store.load_newest("full")
    assert loaded is not None
    assert loaded.passed_over == ()
    assert torch.equal(loaded.tensors["adapter"]["w"], content(step)["adapter"]["w"])
    assert not [name for name in os.listdir(store.folder) if name.startswith(".tmp")]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_size_limit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with file_size_limit(MIB // 2), pytest.raises(DiskFull) as caught:
        save(store, 2)
    assert caught.value.exit_code == 3
    assert "ulimit -f" in caught.value.message
    assert "1.0 MiB (" in caught.value.message
    intact(store, 1)
    save(store, 2)
    intact(store, 2)


def test_a_limit_leaves_the_old_small_file_too(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "status.json", b"old")
    with file_size_limit(1000), pytest.raises(DiskFull, match=r"2.0 KiB \(2048 bytes\) needed"):
        atomic_write_bytes(tmp_path / "status.json", bytes(2048))
    assert (tmp_path / "status.json").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["status.json"]


def test_a_full_file_system(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    save(store, 1)
    with pytest.raises(DiskFull, match=r"no space is left .*8\.0 MiB \(\d+ bytes\) needed, \d\.\d MiB"):
        save(store, 2, mib=8)
    intact(store, 1)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free_bytes(small_disk)))
    with pytest.raises(DiskFull, match=r"needed, 0 bytes free"):
        save(store, 2)
    intact(store, 1)
    filler.unlink()
    save(store, 2)
    intact(store, 2)


def test_waiting_at_a_full_file_system_goes_on_once_there_is_space(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    save(store, 1)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free_bytes(small_disk)))
    heard: list[DiskFull] = []
    freeing = threading.Timer(0.3, filler.unlink)
    freeing.start()
    path = store.save_waiting(
        2, content(2), {}, config_hash="x", stop_requested=lambda: False, poll_s=0.05, on_wait=heard.append
    )
    freeing.join()
    assert path.name == "step-00000002"
    assert len(heard) == 1, "it wrote again although there was no space"
    intact(store, 2)


def test_a_read_only_file_system(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    save(store, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DiskFull, match="read-only") as caught:
        save(store, 2)
    assert "may write to" in caught.value.remedy
    intact(store, 1)
    with pytest.raises(DiskFull, match="read-only"):
        check_space(store.folder, 1, 2)


def test_a_prune_that_is_not_allowed_leaves_all(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    for step in (1, 2, 3):
        save(store, step)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DiskFull, match="step-00000001: the file system is read-only"):
        store.prune(2)
    assert store.steps() == [1, 2, 3]
    intact(store, 3)


def test_a_folder_without_permission() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder cannot be entered by another user
        store = CheckpointStore(Path(name) / "checkpoints")
        save(store, 1)
        os.chmod(name, 0o755)
        os.chmod(store.folder, 0o555)
        with as_ordinary_user():
            with pytest.raises(DiskFull, match="permission is denied"):
                save(store, 2)
            with pytest.raises(DiskFull, match="permission is denied"):
                check_space(store.folder, 1, 2)
            intact(store, 1)
        os.chmod(store.folder, 0o755)


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Permissions do not bind root: act as nobody meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def moments_of_a_save(folder: Path) -> list[str]:
    heard: list[str] = []
    store = CheckpointStore(folder)
    save(store, 1)
    store.save(1, content(1), {}, config_hash="x", observer=heard.append)
    return heard


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_error_at_any_moment_of_a_save(number: int, tmp_path: Path) -> None:
    moments = moments_of_a_save(tmp_path / "dry")
    assert len(moments) >= 24
    for index, moment in enumerate(moments):
        store = CheckpointStore(tmp_path / f"run-{index}")
        save(store, 1)
        store.save(2, content(20), {}, config_hash="x")

        def fail(heard: str, moment: str = moment) -> None:
            if heard == moment:
                raise OSError(number, os.strerror(number))

        with pytest.raises(DiskFull, match="needed"):
            store.save(2, content(21), {}, config_hash="x", observer=fail)
        loaded = store.load_newest("full")
        assert loaded is not None
        assert loaded.step == 2, moment
        assert loaded.tensors["adapter"]["w"][0, 0] in (20, 21)
        assert not [name for name in os.listdir(store.folder) if name.startswith(".tmp")]
        save(store, 2)
        intact(store, 2)


def test_waiting_tries_again_and_saves_once_the_limit_is_lifted(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    heard: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift_at_the_third(error: DiskFull) -> None:
        heard.append(error.message)
        intact(store, 1)
        if len(heard) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with file_size_limit(MIB // 2):
        store.save_waiting(
            2,
            content(2),
            {},
            config_hash="x",
            stop_requested=lambda: False,
            poll_s=0.01,
            on_wait=lift_at_the_third,
        )
    assert len(heard) == 3
    intact(store, 2)


def test_waiting_ends_when_a_stop_is_requested(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    began = time.monotonic()
    with file_size_limit(MIB // 2), pytest.raises(DiskFull):
        store.save_waiting(2, content(2), {}, config_hash="x", stop_requested=lambda: True, poll_s=60)
    assert time.monotonic() - began < 5
    intact(store, 1)


def test_waiting_for_space_looks_reports_and_stops(tmp_path: Path) -> None:
    assert wait_for_space(tmp_path, 1, stop_requested=lambda: True)  # there is space: nothing to wait for
    reported: list[int] = []
    assert not wait_for_space(
        tmp_path, 2**80, stop_requested=lambda: len(reported) >= 3, poll_s=0.01, on_wait=reported.append
    )
    assert len(reported) == 3
    assert 0 < reported[0] < 2**80


def test_a_nap_ends_within_a_quarter_second_of_a_stop() -> None:
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    began = time.monotonic()
    assert not nap(60, stop.is_set)
    assert time.monotonic() - began < 1
    assert nap(0.01, lambda: False)


def test_preflight_counts_what_is_needed_and_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoints"
    assert check_space(folder, 1000, keep=3).needed == 4000
    assert os.listdir(folder) == []
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "adapter.safetensors").write_bytes(bytes(1500))
    assert check_space(folder, 1000, keep=3).needed == 2500
    with pytest.raises(DiskFull) as caught:
        check_space(folder, 2**50, keep=3)
    assert "4 checkpoints of 1048576.0 GiB" in caught.value.message
    assert f"{4 * 2**50 - 1500} bytes) more needed" in caught.value.message
    assert "save.keep" in caught.value.remedy
    assert os.listdir(folder) == ["step-00000001"]
