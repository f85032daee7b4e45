"""`burnish demo` replaces an earlier demo, and no other run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from typer.testing import CliRunner, Result

import burnish.run
from burnish.cli.main import app
from burnish.config.load import load_config, to_yaml
from burnish.config.schema import RunConfig
from burnish.demo.command import ASSETS
from burnish.errors import UserError
from burnish.events import Listener, RunResult
from burnish.run_folder import Recorder, RunFolder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """The demo's place; what comes after the check for other runs only says that it was reached."""

    def train_run(config: RunConfig, *, progress: Listener) -> NoReturn:
        raise UserError(f"training begins in {config.save.folder / config.name}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(burnish.run, "train_run", train_run)
    return RunFolder(tmp_path / "runs" / "demo")


def demo(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["demo", *arguments])


def demo_config(*overrides: str) -> str:
    return to_yaml(load_config(ASSETS / "demo.yaml", overrides=overrides).config)


def ended(folder: RunFolder, config: str | None) -> Path:
    """A run of `config` that is done; returns its adapter."""
    Recorder(folder, 300).finished(RunResult("done", 300, folder.path))
    if config is not None:
        folder.config.write_text(config)
    adapter = folder.adapters / "demo.safetensors"
    adapter.write_bytes(b"weights")
    return adapter


def test_new_place(folder: RunFolder) -> None:
    assert "training begins in runs/demo" in demo().stderr
    assert not folder.path.exists()


@pytest.mark.parametrize("overrides", [(), ("save.folder=elsewhere", "save.every=50")])
def test_earlier_demo_is_replaced(folder: RunFolder, overrides: tuple[str, ...]) -> None:
    ended(folder, demo_config(*overrides))
    assert "training begins in runs/demo" in demo().stderr
    assert not folder.path.exists()


def test_start_that_failed_early_is_no_run(folder: RunFolder) -> None:
    Recorder(folder, 300).finished(RunResult("failed", 0, folder.path, notes=["out of memory"]))
    assert "training begins in runs/demo" in demo().stderr


@pytest.mark.parametrize(
    "config",
    [None, "", "name: [", "train.steps=301", "seed=8"],
    ids=["none", "empty", "damaged", "steps", "seed"],
)
def test_another_run_is_left_alone(folder: RunFolder, config: str | None) -> None:
    text = demo_config(config) if config and "=" in config else config
    adapter = ended(folder, text)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    result = demo()
    assert result.exit_code == 2
    assert "runs/demo holds another run than this demo's" in result.stderr
    assert "--output" in result.stderr
    assert adapter.read_bytes() == b"weights"
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    assert "training begins in other/demo" in demo("--output", "other").stderr


def test_link_to_a_demo_is_left_alone(folder: RunFolder, tmp_path: Path) -> None:
    adapter = ended(RunFolder(tmp_path / "kept"), demo_config())
    folder.path.parent.mkdir()
    folder.path.symlink_to(tmp_path / "kept")
    assert demo().exit_code == 2
    assert adapter.exists()


def test_demo_that_another_process_trains_is_left_alone(folder: RunFolder) -> None:
    adapter = ended(folder, demo_config())
    parent = psutil.Process(os.getppid())
    status = json.loads(folder.status_file.read_text())
    status |= {"state": "running", "pid": parent.pid, "pid_created": parent.create_time()}
    folder.status_file.write_text(json.dumps(status))
    result = demo()
    assert result.exit_code == 2
    assert f"being trained by process {parent.pid}" in result.stderr
    assert adapter.exists()
