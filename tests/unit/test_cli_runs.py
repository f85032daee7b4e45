"""`burnish run inspect` reads a run's folder and nothing else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner, Result

from burnish.checkpoint.store import CheckpointStore
from burnish.cli.main import app
from burnish.events import RunResult, StepReport
from burnish.run_folder import Recorder, RunFolder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inspect(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["run", "inspect", *arguments], env={"COLUMNS": "200"})


def trained(here: Path, state: str | None = "done") -> RunFolder:
    """A run folder as a run writes it; with `state` None the run has not ended."""
    folder = RunFolder(here / "runs" / "robot")
    recorder = Recorder(folder, 10)
    recorder.started(0, 10)
    for step in range(1, 8):
        recorder.stepped(StepReport(step, 10, 0.5, 1.0 / step, 1.0, 1e-4, 0.5, None))
    recorder.validated(6, 0.125, True)
    (folder.adapters / "robot-00000006.safetensors").write_bytes(bytes(2**20))
    (folder.adapters / "stray.safetensors").write_bytes(b"x")
    recorder.saved(
        6,
        folder.checkpoints,
        folder.adapters / "robot-00000006.safetensors",
        {"keys": 88, "difference": 0.00123456},
    )
    CheckpointStore(folder.checkpoints).save(
        6, {"adapter": {"a": torch.ones(4)}}, {"step": 6}, config_hash="x"
    )
    (folder.samples / "one.png").write_bytes(b"")
    source = {"skipped": [{}, {}], "fixed": [{}]}
    folder.data_report.write_text(json.dumps({"used": 18, "sources": [source], "buckets": [{}]}))
    if state:
        recorder.finished(RunResult(state, 7, folder.path, notes=["a note"]))
    else:
        recorder.phase("drawing samples", 0, 1)  # writes the status at once
    return folder


def test_finished_run_is_told_in_full(here: Path) -> None:
    trained(here)
    for name in ("robot", "runs/robot"):
        result = inspect(name)
        assert result.exit_code == 0, result.stderr
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        for line in (
            "run runs/robot",
            "state done",
            "step 7 of 10",
            "message a note",
            "rate 2.00 steps/s; 0:00:02 for the steps left",
            "last loss 0.14286",
            "best held-out loss 0.12500 at step 6",
            "adapter robot-00000006.safetensors 1.0 MiB verified (keys 88, difference 0.00123)",
            "adapter stray.safetensors 0.0 MiB no verification noted",
            "samples 1 pictures",
            "data 18 pictures, 2 skipped, 1 fixed, 1 buckets",
        ):
            assert line in lines, line
        assert any(line.startswith("checkpoint step 6 ") for line in lines)


def test_running_process_is_alive(here: Path) -> None:
    trained(here, state=None)
    found = json.loads(inspect("robot", "--json").stdout)
    assert (found["state"], found["phase"], found["pid"]) == ("running", "drawing samples", os.getpid())


def test_process_that_is_gone_is_lost(here: Path) -> None:
    folder = trained(here, state=None)
    status = json.loads(folder.status_file.read_text())
    free = next(pid for pid in range(2**22 - 1, 0, -1) if not psutil.pid_exists(pid))
    folder.status_file.write_text(json.dumps({**status, "pid": free}))
    assert json.loads(inspect("robot", "--json").stdout)["state"] == "lost"
    assert "start it again to go on" in inspect("robot").stdout


def test_pid_that_another_process_took_over_is_lost(here: Path) -> None:
    folder = trained(here, state=None)
    status = json.loads(folder.status_file.read_text())
    folder.status_file.write_text(json.dumps({**status, "pid_created": time.time() - 1e6}))
    assert json.loads(inspect("robot", "--json").stdout)["state"] == "lost"


def test_verify_names_the_damaged_file(here: Path) -> None:
    folder = trained(here)
    assert [
        c["verified"] for c in json.loads(inspect("robot", "--verify", "--json").stdout)["checkpoints"]
    ] == ["verified"]
    file = folder.checkpoints / "step-00000006" / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (checkpoint,) = json.loads(inspect("robot", "--verify", "--json").stdout)["checkpoints"]
    assert "adapter.safetensors is damaged" in checkpoint["verified"]


def test_no_such_run_names_those_that_are(here: Path) -> None:
    trained(here)
    result = inspect("robto")
    assert result.exit_code == 2
    assert "Runs in runs: robot." in result.stderr


def test_failed_run_tells_why(here: Path) -> None:
    folder = trained(here, state=None)
    message = "cannot write runs/robot: no space is left on the disk (1.0 MiB needed, 0 bytes [free])"
    Recorder(folder, 10).finished(RunResult("failed", 6, folder.path, notes=[message]))
    lines = [" ".join(line.split()) for line in inspect("robot").stdout.splitlines()]
    assert {"state failed", "step 6 of 10", f"message {message}"} <= set(lines)
    assert "adapter robot-00000006.safetensors 1.0 MiB verified (keys 88, difference 0.00123)" in lines


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "done"}', '{"colour": 1}'])
def test_damaged_status_is_told(content: str, here: Path) -> None:
    trained(here).status_file.write_text(content)
    result = inspect("robot")
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert "status.json is damaged, or a newer Burnish wrote it: " in first
    assert "Start the run again" in second


def test_damaged_metrics_and_report_are_told(here: Path) -> None:
    folder = trained(here)
    folder.data_report.write_text("{}")
    assert "data_report.json is damaged" in inspect("robot").stderr
    for file in folder.path.glob("metrics.sqlite*"):
        file.write_bytes(b"no database, whatever it says" * 100)
    result = inspect("robot")
    assert result.exit_code == 2
    assert "metrics.sqlite cannot be read" in result.stderr


def test_looking_changes_nothing(here: Path) -> None:
    folder = trained(here)

    def content() -> dict[str, bytes]:
        files = [path for path in folder.path.rglob("*") if path.is_file() and "sqlite-" not in path.name]
        return {str(path): path.read_bytes() for path in files}

    before = content()
    inspect("robot", "--verify")
    assert content() == before
