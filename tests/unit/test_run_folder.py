"""The run folder outlives a full disk, values that are no numbers, and a damaged status.json."""

from __future__ import annotations

import json
import logging
import math
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from burnish import run_folder
from burnish.errors import DiskFull
from burnish.events import RunResult, StepReport
from burnish.run_folder import Recorder, RunFolder, Status


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 16 bytes: what a full disk does to whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "robot")


@pytest.fixture(autouse=True)
def every_event_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "HEARTBEAT_S", -1.0)


def report(step: int, loss: float = 0.5, grad_norm: float = 1.0) -> StepReport:
    return StepReport(step, 100, 0.1, loss, grad_norm, 1e-4, 0.25, None)


def status(folder: RunFolder) -> Status:
    found = folder.status()
    assert found is not None
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# a disk that does not take it


def test_full_disk_ends_no_run_and_loses_no_row(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(folder, 100)
    recorder.started(0, 100)
    recorder.stepped(report(1))
    with full_disk():
        for step in range(2, 31):
            recorder.stepped(report(step))
        recorder.validated(30, 0.25, True)
        recorder.saved(30, folder.checkpoints, folder.adapters / "a.safetensors", {"keys": 88})
    assert status(folder).step == 1
    told = warnings(caplog)
    assert len(told) == 2, told
    assert "metrics.sqlite is not up to date; the run goes on" in told[0]
    assert "status.json is not up to date; the run goes on" in told[1]
    assert "ulimit -f" in told[1]

    recorder.stepped(report(31))
    assert [step for step, _ in folder.metrics("loss")] == list(range(1, 32))
    assert folder.metrics("validation_loss") == [(30, 0.25)]
    now = status(folder)
    assert (now.step, now.best_step, list(now.adapters)) == (31, 30, ["a.safetensors"])
    assert not list(folder.path.glob(".tmp-*"))


def test_a_run_can_end_on_a_full_disk(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(folder, 100)
    recorder.started(0, 100)
    with full_disk():
        recorder.stepped(report(1))
        recorder.finished(RunResult("failed", 1, folder.path, notes=["the disk is full"]))
    assert len(warnings(caplog)) == 2
    assert status(folder).state == "running"


def test_nothing_begins_on_a_full_disk(folder: RunFolder) -> None:
    with full_disk(), pytest.raises(DiskFull, match=r"status\.json"):
        Recorder(folder, 100)
    (folder.path.parent / "file").touch()
    with pytest.raises(DiskFull, match="cannot write"):
        Recorder(RunFolder(folder.path.parent / "file"), 100)


def test_damaged_metrics_end_no_run(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder.make()
    folder.metrics_file.write_bytes(b"no database, whatever it says" * 100)
    recorder = Recorder(folder, 100)
    recorder.started(0, 100)
    recorder.stepped(report(1))
    recorder.finished(RunResult("done", 1, folder.path))
    assert status(folder).state == "done"
    (told,) = warnings(caplog)
    assert "file is not a database" in told


def test_rows_that_wait_are_bounded(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "ROWS_KEPT", 20)
    recorder = Recorder(folder, 100)
    recorder.started(0, 100)
    with full_disk():
        for step in range(1, 51):
            recorder.stepped(report(step))
    recorder.finished(RunResult("stopped", 50, folder.path))
    assert [step for step, _ in folder.metrics("loss")] == [46, 47, 48, 49, 50]  # four rows a step


def test_what_is_to_be_forgotten_waits_too(folder: RunFolder) -> None:
    recorder = Recorder(folder, 100)
    recorder.started(0, 100)
    for step in range(1, 11):
        recorder.stepped(report(step))
    with full_disk():
        recorder.stepped(report(11))
        recorder.started(4, 100)
        recorder.stepped(report(5, loss=0.125))
    recorder.stepped(report(6, loss=0.125))
    losses = [(step, 0.5) for step in range(1, 5)] + [(5, 0.125), (6, 0.125)]
    assert folder.metrics("loss") == losses


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_left_out(folder: RunFolder, value: float) -> None:
    recorder = Recorder(folder, 100)
    recorder.started(0, 100)
    recorder.stepped(report(1, loss=value, grad_norm=value))
    recorder.validated(1, value, True)
    recorder.stepped(report(2))
    recorder.finished(RunResult("done", 2, folder.path))
    with closing(sqlite3.connect(folder.metrics_file)) as database:
        rows = database.execute("SELECT step, key FROM metrics ORDER BY step, key").fetchall()
    keys = ["grad_norm", "learning_rate", "loss", "seconds"]
    assert rows == [(1, "learning_rate"), (1, "seconds"), *((2, key) for key in keys)]
    assert (status(folder).best_step, status(folder).best_loss) == (None, None)


# an earlier start in the same folder


def earlier(folder: RunFolder) -> None:
    recorder = Recorder(folder, 100)
    recorder.started(0, 100)
    recorder.stepped(report(30))
    recorder.validated(20, 0.25, True)
    recorder.validated(30, 0.5, False)
    recorder.saved(30, folder.checkpoints, folder.adapters / "a.safetensors", {"keys": 88})
    recorder.finished(RunResult("stopped", 30, folder.path, best_step=20, best_loss=0.25))


def test_early_failure_keeps_what_was_reached(folder: RunFolder) -> None:
    earlier(folder)
    recorder = Recorder(folder, 200)
    assert status(folder).state == "preparing"
    recorder.phase("loading the denoiser", 0, 0)
    recorder.finished(RunResult("failed", status(folder).step, folder.path, notes=["no model"]))
    now = status(folder)
    assert (now.state, now.message, now.step, now.steps) == ("failed", "no model", 30, 200)
    assert (now.best_step, now.best_loss, now.adapters) == (20, 0.25, {"a.safetensors": {"keys": 88}})


def test_resume_keeps_the_best_until_there_is_a_better(folder: RunFolder) -> None:
    earlier(folder)
    recorder = Recorder(folder, 100)
    recorder.started(25, 100)
    assert (status(folder).step, status(folder).best_step) == (25, 20)
    recorder.validated(40, 0.5, False)
    assert (status(folder).best_step, status(folder).best_loss) == (20, 0.25)
    recorder.validated(50, 0.125, True)
    assert (status(folder).best_step, status(folder).best_loss) == (50, 0.125)
    recorder.saved(50, folder.checkpoints, folder.adapters / "b.safetensors", {})
    assert sorted(status(folder).adapters) == ["a.safetensors", "b.safetensors"]


def test_best_beyond_the_resumed_step_is_forgotten(folder: RunFolder) -> None:
    earlier(folder)
    recorder = Recorder(folder, 100)
    recorder.started(10, 100)
    assert (status(folder).best_step, status(folder).best_loss) == (None, None)
    recorder.finished(RunResult("stopped", 12, folder.path, best_step=5, best_loss=0.75))
    assert (status(folder).best_step, status(folder).best_loss) == (5, 0.75)


# a status.json that says nothing readable


def whole(folder: RunFolder) -> dict[str, object]:
    Recorder(folder, 100)
    return asdict(status(folder))


def test_status_reads_back_as_written(folder: RunFolder) -> None:
    earlier(folder)
    now = status(folder)
    assert asdict(now) == json.loads(folder.status_file.read_text())
    assert now.is_alive
    assert RunFolder(folder.path / "nowhere").status() is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "EOF"),
        (b"\xff\xfe\x00", "Invalid JSON"),
        (b'{"state": "run', "EOF"),
        (b"[]", "should be an object"),
        (b"null", "should be an object"),
        (b'{"state": "done"}', "phase"),
        ({"colour": "red"}, "unknown: colour"),
        ({"state": "dreaming"}, "state"),
        ({"pid": -1}, "pid"),
        ({"pid": "me"}, "pid"),
        ({"adapters": [1]}, "adapters"),
        ({"step": None}, "step"),
    ],
    ids=str,
)
def test_damaged_or_newer_status_is_passed_over(
    folder: RunFolder, content: bytes | dict[str, object], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = whole(folder)
    raw = content if isinstance(content, bytes) else json.dumps({**values, **content}).encode()
    folder.status_file.write_bytes(raw)
    assert folder.status() is None
    (told,) = warnings(caplog)
    assert str(folder.status_file) in told
    assert says in told
    assert "\n" not in told

    recorder = Recorder(folder, 100)
    recorder.started(0, 100)
    assert status(folder).state == "running"


def test_status_that_cannot_be_read_is_passed_over(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.status_file.mkdir(parents=True)
    assert folder.status() is None
    assert "Is a directory" in warnings(caplog)[0]
